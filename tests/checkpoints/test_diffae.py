"""Diff-AE's autoencoder in every form that people share it in, against the numbers of its own code."""

import dataclasses
import json

import pytest
import torch
from checkpoints import fabricate
from diffae_golden import NAMES, averaged, model, trained
from safetensors.torch import save_file

from foreign_golden import about, numbers, shapes
from pdae_fast import PDAE, DiffAE, Prior, UserError, checkpoints
from pdae_fast.checkpoints import diffae, foreign, kinds
from pdae_fast.checkpoints.attributes import CELEBA
from pdae_fast.checkpoints.settings import Settings
from pdae_fast.config import LatentConfig
from pdae_fast.convert import main
from pdae_fast.models import Autoencoder


def prediction(found: DiffAE, name: str) -> float:
    """How far z and eps_hat are from the recorded ones."""
    g = numbers(name)
    with torch.no_grad():
        z, eps = found.encode(g["encode.x_0"]), found(g["forward.x"], g["forward.t"], g["forward.z"])
    return max(float((a - b).abs().max()) for a, b in ((z, g["encode.z"]), (eps, g["forward.out"])))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_its_trainer(name, tmp_path):
    conf = about(name)["conf"]
    path = fabricate.save(tmp_path / "last.ckpt", trained(name))
    loaded = checkpoints.load(path)
    c, u = loaded.config, loaded.config.unet
    assert (loaded.kind, loaded.weights) == ("a Diff-AE autoencoder", "EMA")
    assert (c.image_size, c.latent_dim) == (conf["image_size"], conf["enc_out_channels"])
    assert (list(c.encoder_multiplier), list(u.channel_multiplier)) == (conf["enc_channel_mult"], conf["channel_mult"])
    assert (u.base_channel, u.time_channel) == (conf["model_channels"], conf["embed_channels"])
    assert u.attention_resolutions == (conf["image_size"] // conf["attention_resolutions"][0],)
    assert c.latent == (LatentConfig(48, 96, 4) if name == "diffae-latent" else None)
    assert c.latent_statistics == (name == "diffae-latent")
    assert prediction(DiffAE.from_pretrained(path), name) < 1e-5
    assert prediction(DiffAE.from_pretrained(path, weights="raw"), name) > 1e-2


def test_its_settings_are_read_and_compared(tmp_path):
    said = {"img_size": 32, "net_attn": [16], "net_beatgans_attn_head": 1, "beta_scheduler": "linear", "style_ch": 64}
    path = fabricate.save(tmp_path / "a.ckpt", trained(NAMES[0], hyper_parameters=said))
    assert checkpoints.load(path).notes == []
    for wrong, words in (({"style_ch": 512}, "latent_dim 512"), ({"net_attn": [8]}, "feature-map sizes")):
        path = fabricate.save(tmp_path / "b.ckpt", trained(NAMES[0], hyper_parameters=said | wrong))
        with pytest.raises(UserError, match=words):
            checkpoints.load(path)


@pytest.mark.parametrize("form", ["state-dict", "safetensors", "parts", "without-ema", "own"])
def test_other_forms(form, tmp_path):
    name = "diffae-latent"
    state, g = averaged(name), numbers(name)
    options = {}
    if form == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({k: v.clone() for k, v in state.items()}, path)
    elif form == "without-ema":
        inner = {k: v for k, v in trained(name)["state_dict"].items() if not k.startswith("model.")}
        path = fabricate.save(
            tmp_path / "a.ckpt", {"state_dict": {k.removeprefix("ema_"): v for k, v in inner.items()}}
        )
    elif form == "parts":
        parts = {part: {} for part in ("encoder.", "latent_net.", "")}
        for key, value in state.items():
            prefix = next(p for p in parts if key.startswith(p))
            parts[prefix][key.removeprefix(prefix)] = value
        path, *rest = (fabricate.save(tmp_path / f"{p}pt", parts[p]) for p in ("", "encoder.", "latent_net."))
        options = dict(zip(("encoder", "latent"), rest, strict=True))
    elif form == "own":
        path = fabricate.save(tmp_path / "a.pt", model(name).state_dict())
    else:
        path = fabricate.save(tmp_path / "a.pt", state)
    if form not in ("without-ema", "own"):
        statistics = {
            "conds": torch.zeros(5, 48),
            **{n: g[f"file.conds_{n[6:]}"][0] for n in ("conds_mean", "conds_std")},
        }
        options["statistics"] = fabricate.save(tmp_path / "latent.pkl", statistics)
    found = DiffAE.from_pretrained(path, **options)
    assert prediction(found, name) < 1e-5
    assert any("the raw ones are used" in note for note in found.notes) == (form == "without-ema")
    assert found.config == model(name).config
    assert torch.equal(found.latent_std, g["file.conds_std"][0])
    with torch.no_grad():
        assert float((found.latent_denoiser(g["latent.z_t"], g["latent.t"]) - g["latent.out"]).abs().max()) < 1e-5


def classifier(tmp_path, name, **buffers):
    weight = numbers("diffae-latent")["edit.classifier_weight"]
    both = {
        f"{which}classifier.{k}": v for which in ("", "ema_") for k, v in (("weight", weight), ("bias", weight[:, 0]))
    }
    return fabricate.save(tmp_path / f"{name}.ckpt", {"state_dict": both | buffers, "global_step": 1})


def test_the_classifier_and_its_statistics(tmp_path):
    path = fabricate.save(
        tmp_path / "a.pt", {k: v for k, v in averaged("diffae-latent").items() if "latent_net" not in k}
    )
    g = numbers("diffae-latent")
    known = {"conds_mean": g["file.conds_mean"], "conds_std": g["file.conds_std"]}
    found = DiffAE.from_pretrained(path, classifier=classifier(tmp_path, "c", **known))
    assert found.config.attributes == CELEBA and found.config.latent_statistics
    assert torch.equal(found.classifier.weight, g["edit.classifier_weight"])
    assert torch.equal(found.latent_mean, g["file.conds_mean"][0])
    # Those that the model has stay, and a difference is said.
    whole = fabricate.save(tmp_path / "b.ckpt", trained("diffae-latent"))
    other = classifier(tmp_path, "d", **known | {"conds_mean": known["conds_mean"] + 1})
    loaded = checkpoints.load(whole, classifier=other)
    assert torch.equal(loaded.state["latent_mean"], g["file.conds_mean"][0])
    assert any("normalised by another mean and std" in note for note in loaded.notes)
    assert not any("another" in n for n in checkpoints.load(whole, classifier=classifier(tmp_path, "c", **known)).notes)


def test_the_command_writes_a_directory_that_is_read(tmp_path, capsys):
    name = "diffae-latent"
    path, extra = fabricate.save(tmp_path / "last.ckpt", trained(name)), classifier(tmp_path, "c")
    assert main([str(path), "--classifier", str(extra), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "a Diff-AE autoencoder, weights: EMA" in told and "latent DPM of 4 layers" in told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kind"] == "diffae"
    found = DiffAE.from_pretrained(tmp_path / "out")
    assert prediction(found, name) < 1e-5
    assert found.config == dataclasses.replace(model(name).config, attributes=CELEBA)
    assert type(Autoencoder.from_pretrained(tmp_path / "out")) is DiffAE
    assert main([str(tmp_path / "out"), "--to", "official", "--out", str(tmp_path / "back.pt")]) == 2
    assert "which the published PDAE layout has no place for" in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()


# Released checkpoints: image size, base, U-Net and encoder multipliers, layers of the latent DPM.
RELEASED = {
    "celeba64d2c_autoenc": (64, 64, (1, 2, 4, 8), (1, 2, 4, 8, 8), None),
    "ffhq128_autoenc": (128, 128, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4), None),
    "ffhq256_autoenc": (256, 128, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4, 4), None),
    "ffhq256_autoenc_latent": (256, 128, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4, 4), 10),
    "horse128_autoenc_latent": (128, 128, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4), 20),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_recognised_by_their_names_and_shapes(name):
    size, base, multiplier, encoder, layers = RELEASED[name]
    contents = {"state_dict": shapes(name)}
    kind = kinds.identify(contents)
    assert kind is kinds.Kind.DIFFAE_AUTOENCODER
    file = foreign.ForeignFile(name, kind, contents, diffae.entries(contents))
    loaded = foreign.build(file, Settings())
    c, u = loaded.config, loaded.config.unet
    assert (c.image_size, u.base_channel, u.channel_multiplier, c.encoder_multiplier) == (
        size,
        base,
        multiplier,
        encoder,
    )
    assert (c.latent_dim, u.time_width, u.attention_resolutions) == (512, 512, (size // 16,))
    assert file.has("latent_denoise_fn") == (layers is not None)
    with torch.device("meta"):
        own = DiffAE(c).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in loaded.state.items()}


def _less_attention(state):
    return {
        k: v for k, v in state.items() if not k.startswith(("encoder.input_blocks.4.1.", "encoder.input_blocks.5.1."))
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k.startswith("encoder.")}, "without its U-Net .its encoder alone"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("encoder.")}, "alone; expected its encoder too"),
        (_less_attention, "attends at down-sampling rates .2. and the encoder of .* at ..; expected the same"),
        (lambda s: s | {"encoder.out.3.weight": torch.zeros(32, 64, 1, 1)}, "the encoder has latent_dim 32; .* has 64"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("encoder.input_blocks.11.")},
            "11 input blocks; expected levels of 2 residual blocks",
        ),
    ],
)
def test_what_does_not_fit(change, words, tmp_path):
    path = fabricate.save(tmp_path / "a.pt", change(averaged(NAMES[0])))
    with pytest.raises(UserError, match=words) as failure:
        DiffAE.from_pretrained(path)
    assert "\n" not in str(failure.value)


def test_each_class_loads_its_own(tmp_path):
    path = fabricate.save(tmp_path / "last.ckpt", trained(NAMES[0]))
    with pytest.raises(UserError, match="is a Diff-AE; expected a PDAE"):
        PDAE.from_pretrained(path)
    with pytest.raises(UserError, match="is a Diff-AE, whose U-Net needs z"):
        Prior.from_pretrained(path)
    pdae = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(fabricate.pdae(fabricate.config())))
    with pytest.raises(UserError, match="is a PDAE autoencoder; expected a Diff-AE"):
        DiffAE.from_pretrained(pdae)
    assert type(Autoencoder.from_pretrained(pdae)) is PDAE
