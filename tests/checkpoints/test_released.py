"""Names and shapes of whole released checkpoints: told apart, configured as published, or refused by name."""

import pytest
import torch

from foreign_golden import listed, shapes
from pdae_fast import UserError, checkpoints
from pdae_fast.checkpoints import infer, names
from pdae_fast.checkpoints.diffusers import network_settings
from pdae_fast.checkpoints.kinds import Kind, identify
from pdae_fast.config import UNetConfig

_ALL = listed()
FAMILIES = {
    family: [n for n, v in _ALL.items() if v["family"] == family] for family in {v["family"] for v in _ALL.values()}
}
ADM = [n for n in FAMILIES["guided-diffusion"] + FAMILIES["improved-diffusion"] if "flags" in _ALL[n]]
# What the scripts of both projects take where no --channel_mult is given.
MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def configured(state: dict[str, torch.Tensor], **free) -> UNetConfig:
    return UNetConfig(**infer.unet_fields(infer.rename_classes(state), "file"), **free)


@pytest.mark.parametrize("name", ADM)
def test_improved_and_guided(name):
    state, flags = shapes(name), _ALL[name]["flags"]
    assert identify(state) is Kind.UNET
    guided = flags.get("resblock_updown", False)
    size = flags["image_size"]
    assert configured(state) == UNetConfig(
        input_channel=3,
        base_channel=flags["num_channels"],
        channel_multiplier=MULTIPLIERS[size],
        num_residual_blocks_of_a_block=flags["num_res_blocks"],
        attention_resolutions=tuple(sorted(size // int(s) for s in flags["attention_resolutions"].split(","))),
        learn_sigma=flags["learn_sigma"],
        use_scale_shift_norm=flags["use_scale_shift_norm"],
        downsample="residual" if guided else "conv",
        upsample="residual" if guided else "conv",
        num_classes=1000 if flags["class_cond"] else None,
    )


@pytest.mark.parametrize("name", FAMILIES["diffusers"])
def test_diffusers(name, tmp_path):
    state, config = shapes(name), _ALL[name]["config.json"]
    assert identify(state) is Kind.DIFFUSERS
    said = {key: given.value for key, given in network_settings(config, tmp_path / "config.json").items()}
    state = names.to_adm(names.modernise(state), names.DIFFUSERS, lambda channels: 1, "file")
    fields = infer.unet_fields(state, "file")
    # Every field that config.json states too agrees, but for what the tensors cannot tell.
    told = {key: value for key, value in fields.items() if key in said}
    told |= {"downsample": said["downsample"], "time_channel": fields["time_channel"] or 4 * fields["base_channel"]}
    assert told == {key: said[key] for key in told}
    assert said["image_size"] == config["sample_size"]
    assert said["downsample"] == ("conv" if config["downsample_padding"] else "conv_asymmetric")
    assert (fields["downsample"], fields["upsample"], fields["middle"]) == ("conv", "conv", "attention")
    assert len(state) == len(fabricated(fields, said))


def fabricated(fields, said) -> dict:
    """The state dict of this project's network with that configuration."""
    from pdae_fast.models import UNet

    free = {key: said[key] for key in ("num_heads", "head_channel", "norm_groups", "norm_eps") if key in said}
    with torch.device("meta"):
        return UNet(UNetConfig(**fields, **free)).state_dict()


@pytest.mark.parametrize("name", FAMILIES["pytorch_diffusion / ddim"])
def test_ddim(name):
    state, config = shapes(name), _ALL[name]["config"]
    assert identify(state) is Kind.DDIM
    found = configured(names.to_adm(state, names.DDIM, lambda channels: 1, "file"))
    assert found == UNetConfig(
        base_channel=config["ch"],
        channel_multiplier=tuple(config["ch_mult"]),
        num_residual_blocks_of_a_block=config["num_res_blocks"],
        attention_resolutions=tuple(config["image_size"] // size for size in config["attn_resolutions"]),
        use_scale_shift_norm=False,
        downsample="conv",
        upsample="conv",
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [("64_256_upsampler", "a super-resolution U-Net"), ("64x64_classifier", "noisy-image classifier")],
)
def test_refused_by_name(name, said, tmp_path):
    torch.save(shapes(name), tmp_path / "model.pt")
    with pytest.raises(UserError, match=said):
        checkpoints.load(tmp_path / "model.pt")


def test_every_list_is_tested():
    tested = {
        *ADM,
        *FAMILIES["diffusers"],
        *FAMILIES["pytorch_diffusion / ddim"],
        "64_256_upsampler",
        "64x64_classifier",
    }
    assert tested == {n for n, v in _ALL.items() if v["family"] != "Diff-AE"}
