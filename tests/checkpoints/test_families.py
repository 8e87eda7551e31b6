"""ermongroup/ddim, improved- and guided-diffusion: what the files do not say, and the way back to guided-diffusion."""

import dataclasses

import pytest
import torch
import yaml
from checkpoints import fabricate
from safetensors.torch import load_file

from golden_rule import relative
from pdae_fast import Prior, PriorConfig, ScheduleConfig, UNetConfig, UserError, checkpoints
from pdae_fast.checkpoints import names
from pdae_fast.checkpoints.exports import guided_flags
from pdae_fast.checkpoints.settings import DDIM_NETWORK
from pdae_fast.convert import main

DDIM = fabricate.unet(
    **{name: given.value for name, given in DDIM_NETWORK.items()},
    use_scale_shift_norm=False,
    downsample="conv_asymmetric",
    upsample="conv",
    dropout=0.0,
)
YAML = {
    "data": {"image_size": 32, "channels": 3},
    "model": {
        "type": "simple",
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [16],
        "dropout": 0.0,
        "resamp_with_conv": True,
    },
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "num_diffusion_timesteps": 500},
}


def ddim_state(prior: Prior) -> dict[str, torch.Tensor]:
    """Under their names; their attention is made of 1x1 convolutions."""
    state = names.from_adm(prior.unet.state_dict(), names.DDIM, prior.config.unet)
    return {k: t[:, :, None, None] if ".attn" in k and t.ndim == 2 else t for k, t in state.items()}


def same_outputs(found: Prior, source: Prior) -> bool:
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 70])
    y = None if source.config.unet.num_classes is None else torch.tensor([0, 1])
    with torch.no_grad():
        return relative(found(x, t, y), source(x, t, y)) < 1e-6


def test_ddim_and_its_configuration(tmp_path):
    source = fabricate.prior(PriorConfig(32, DDIM, ScheduleConfig("linear", 500, 0.001, 0.01)))
    state = ddim_state(source)
    training = [{f"module.{k}": t + 1 for k, t in state.items()}, {"state": {}, "param_groups": []}, 3, 900, state]
    path = fabricate.save(tmp_path / "ckpt.pth", training)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(YAML).replace("0.001", "1e-3"))
    found = Prior.from_pretrained(path, config=tmp_path / "c.yml")
    assert found.config == source.config
    assert found.notes == ()
    assert all(torch.equal(t, source.state_dict()[k]) for k, t in found.state_dict().items())
    assert same_outputs(found, source)
    # Without it the schedule and the size are assumed, and said.
    loaded = checkpoints.load(path)
    assert loaded.config.schedule == ScheduleConfig() and loaded.config.image_size == 32
    assert [("schedule" in n, "image size" in n) for n in loaded.notes] == [(False, True), (True, False)]


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model", "ch", 64, "base_channel 64 but the weights say 32"),
        ("model", "ch_mult", [1, 4], "channel_multiplier [1, 4] but the weights say [1, 2]"),
        ("model", "num_res_blocks", 2, "but the weights say 1"),
        ("model", "attn_resolutions", [32], "feature-map sizes [32]"),
        ("model", "attn_resolutions", [True], "expected a list of integers"),
        ("model", "resamp_with_conv", False, "resamp_with_conv False but the weights say True"),
        ("diffusion", "beta_schedule", "jsd", "'jsd' is not known"),
        ("diffusion", "beta_start", "low", "beta_start is 'low'; expected a number"),
    ],
)
def test_a_ddim_configuration_that_contradicts(section, key, value, said, tmp_path):
    path = fabricate.save(tmp_path / "p.pt", ddim_state(fabricate.prior(PriorConfig(32, DDIM))))
    with pytest.raises(UserError) as error:
        checkpoints.load(path, config={**YAML, section: YAML[section] | {key: value}})
    assert said in str(error.value)


def test_ddim_variants(tmp_path):
    pooled = fabricate.prior(PriorConfig(32, dataclasses.replace(DDIM, downsample="pool", upsample="nearest")))
    state = ddim_state(pooled)
    found = Prior.from_pretrained(fabricate.save(tmp_path / "pool.pt", state | {"logvar": torch.zeros(1000)}))
    assert (found.config.unet.downsample, found.config.unet.upsample) == ("pool", "nearest")
    assert same_outputs(found, pooled)
    assert any("logvar" in note for note in found.notes)
    wide = {k.replace("nin_shortcut", "conv_shortcut"): t for k, t in state.items()}
    with pytest.raises(UserError, match="3x3 shortcuts"):
        checkpoints.load(fabricate.save(tmp_path / "wide.pt", wide))
    with pytest.raises(UserError, match="says num_heads 4 but ermongroup/ddim says num_heads 1"):
        checkpoints.load(tmp_path / "pool.pt", num_heads=4)
    state.pop("mid.attn_1.k.weight")
    with pytest.raises(UserError, match="mid.attn_1.k.weight is missing"):
        checkpoints.load(fabricate.save(tmp_path / "missing.pt", state))


ADM = {
    "guided": fabricate.unet(head_channel=16, use_new_attention_order=True, num_classes=4, learn_sigma=True),
    "half": fabricate.unet(base_channel=64, channel_multiplier=(0.5, 1), num_classes=3),
    "improved": fabricate.unet(num_heads=4, num_heads_upsample=2, downsample="conv", upsample="conv"),
    "improved-stem": fabricate.unet(
        channel_multiplier=(2, 2), stem_channel=32, downsample="conv", upsample="conv", use_scale_shift_norm=False
    ),
    "no-conv-resample": fabricate.unet(
        channel_multiplier=(1, 2, 2), num_residual_blocks_of_a_block=2, downsample="pool", upsample="nearest"
    ),
    "one-level": fabricate.unet(channel_multiplier=(1,), attention_resolutions=(1,)),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ADM)
def test_to_guided_and_back(name, suffix, tmp_path, capsys):
    unet = dataclasses.replace(ADM[name], time_scale=0.25)
    source = fabricate.prior(PriorConfig(32, unet, ScheduleConfig("cosine", 4000), prediction="sample"))
    source.save_pretrained(tmp_path / "ours")
    out = tmp_path / f"guided{suffix}"
    assert main([str(tmp_path / "ours"), "--to", "guided", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "--num_channels" in printed and "--rescale_timesteps True" in printed
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert ("label_emb.weight" in state) == (unet.num_classes is not None)
    assert not any(key.startswith(("class_emb", "unet.")) for key in state)
    # The flags, as a configuration, give back everything.
    found = Prior.from_pretrained(out, config={**guided_flags(source.config)})
    assert found.config == source.config
    assert same_outputs(found, source)


def test_flags_are_options(tmp_path, capsys):
    unet = dataclasses.replace(ADM["improved"], num_heads=4, num_heads_upsample=-1)
    source = fabricate.prior(PriorConfig(32, unet))
    path = str(fabricate.save(tmp_path / "ema_0.9999_500000.pt", source.unet.state_dict()))
    flags = ["--num-head-channels", "16", "--noise-schedule", "cosine", "--diffusion-steps", "4000"]
    flags += ["--rescale-timesteps", "--predict-xstart", "--image-size", "32", "--use-new-attention-order"]
    assert main([path, "--out", str(tmp_path / "m"), *flags]) == 0
    assert "assumed" not in capsys.readouterr().out
    config = Prior.from_pretrained(tmp_path / "m").config
    assert config.unet == dataclasses.replace(
        unet, num_heads=1, head_channel=16, use_new_attention_order=True, time_scale=0.25
    )
    assert (config.schedule, config.prediction) == (ScheduleConfig("cosine", 4000), "sample")
    notes = checkpoints.load(path, timesteps=4000).notes
    assert [any(word in note for note in notes) for word in ("head", "schedule", "eps", "given t", "image size")] == [
        True
    ] * 5
    with pytest.raises(UserError, match="expected an integer from 1 to"):
        checkpoints.load(path, timesteps=0, rescale_timesteps=True)
    with pytest.raises(UserError, match="say head_channel 8 and num_head_channels 16, which is another name"):
        checkpoints.load(path, head_channel=8, num_head_channels=16)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("num_channels", 64, "base_channel 64 but the weights say 32"),
        ("channel_mult", "1,4", "channel_multiplier [1, 4] but the weights say [1, 2]"),
        ("attention_resolutions", "32", "feature-map sizes [32]"),
        ("class_cond", False, "class_cond False but the weights say True"),
        ("resblock_updown", False, "resblock_updown False but the weights say True"),
        ("learn_sigma", False, "learn_sigma False but the weights say True"),
        ("use_scale_shift_norm", False, "use_scale_shift_norm False but the weights say True"),
        ("num_head_channels", 24, "cannot be split by head_channel=24"),
    ],
)
def test_flags_that_contradict(flag, value, said, tmp_path):
    prior = fabricate.prior(PriorConfig(32, ADM["guided"]))
    path = fabricate.save(tmp_path / "p.pt", prior.unet.state_dict())
    with pytest.raises(UserError) as error:
        checkpoints.load(path, config=guided_flags(prior.config) | {flag: value})
    assert said in str(error.value)


REFUSED = {
    "eps": ({"norm_eps": 1e-6}, {}, "eps 1e-5, not 32 and 1e-06"),
    "sinusoid": ({"flip_sin_to_cos": False}, {}, "starts with the cosine"),
    "padding": ({"downsample": "conv_asymmetric", "upsample": "conv"}, {}, "does not resample by conv_asymmetric"),
    "middle": ({"middle": "plain"}, {}, "its middle block has attention"),
    "v": ({}, {"prediction": "v_prediction"}, "it predicts eps or x_0"),
    "schedule": ({}, {"schedule": ScheduleConfig("sigmoid")}, "its schedules are linear"),
    "time": ({"time_channel": 512}, {}, "its time embedding is 128 wide"),
}


@pytest.mark.parametrize("layout", ["guided", "official"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed(name, layout, tmp_path, capsys):
    unet, process, said = REFUSED[name]
    fabricate.prior(PriorConfig(32, fabricate.unet(**unet), **process)).save_pretrained(tmp_path / "ours")
    out = tmp_path / "out.pt"
    status = main([str(tmp_path / "ours"), "--to", layout, "--out", str(out)])
    error = capsys.readouterr().err
    if layout == "official" and name == "time":  # its reader takes it from the weights
        assert status == 0
        return
    assert status == 2 and error.count("\n") == 1 and not out.exists()
    assert (said if layout == "guided" else "the published PDAE layout cannot express") in error


def test_an_autoencoder_goes_nowhere_else(tmp_path, capsys):
    fabricate.pdae(fabricate.config()).save_pretrained(tmp_path / "ours")
    for layout in ("guided", "diffusers"):
        assert main([str(tmp_path / "ours"), "--to", layout, "--out", str(tmp_path / "out.pt")]) == 2
        assert "a PDAE autoencoder, which no other project's format holds" in capsys.readouterr().err
        assert not (tmp_path / "out.pt").exists()


def test_widths_that_are_no_multiple_keep_their_channels():
    for base, width in ((96, 160), (24, 40), (32, 33), (56, 7)):
        from pdae_fast.checkpoints.infer import _multiplier

        assert UNetConfig(base_channel=base, channel_multiplier=(_multiplier(width, base),), norm_groups=1).widths == (
            width,
        )
