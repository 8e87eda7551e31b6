import dataclasses
import json

import pytest

from pdae_fast import LatentConfig, PDAEConfig, PriorConfig, ScheduleConfig, UNetConfig, UserError, config, presets


@pytest.mark.parametrize("name", presets)
def test_presets_round_trip_through_json(name):
    written = json.loads(config.dumps(presets[name]))
    assert config.from_dict(written) == presets[name]
    prior = presets[name].prior
    assert config.from_dict(json.loads(config.dumps(prior))) == prior


def test_everything_round_trips(tmp_path):
    full = PDAEConfig(
        image_size=128,
        latent_dim=48,
        unet=UNetConfig(1, 96, (1, 2, 2), 3, (2, 4), 1, 48, True, 0.3, True, 512),
        schedule=ScheduleConfig("cosine", 500),
        latent=LatentConfig(48, 100, 5),
        attributes=("a", "b"),
        latent_statistics=True,
        noise="standardised",
    )
    path = tmp_path / "config.json"
    path.write_text(config.dumps(full))
    assert config.load(path) == full
    assert full.prior.noise == "standardised"
    values = json.loads(config.dumps(full))
    del values["noise"]  # written before there was a choice
    assert config.from_dict(values) == dataclasses.replace(full, noise="normal")
    with pytest.raises(UserError, match="noise 'pink' is not known; expected normal or standardised"):
        config.from_dict(values | {"noise": "pink"})


def test_paper_networks():
    # Table 1: attention where the feature map is 16x16.
    for name in ("celeba64", "celebahq128", "ffhq128", "horse128", "bedroom128"):
        preset = presets[name]
        assert [preset.image_size // rate for rate in preset.unet.attention_resolutions] == [16]
        assert (
            preset.latent_dim == 512 and preset.unet.dropout == 0.1 and preset.unet.num_residual_blocks_of_a_block == 2
        )
    assert presets["celeba64"].unet.num_heads == 4 and presets["ffhq128"].unet.num_heads == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_channel": 48}, "a norm of 48 channels cannot have 32 groups"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"head_channel": 30}, "head_channel=30"),
        ({"channel_multiplier": ()}, "channel_multiplier"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_resolutions": (0,)}, "attention_resolutions"),
        ({"num_residual_blocks_of_a_block": 0}, "num_residual_blocks_of_a_block"),
    ],
)
def test_wrong_unet_settings(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(UNetConfig(), **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PDAEConfig(image_size=48, unet=UNetConfig(channel_multiplier=(1, 2))), "power of two"),
        (lambda: PriorConfig(image_size=36), "halved 3 times"),
        (lambda: PDAEConfig(encoder_channel=40), "encoder_channel"),
        (lambda: PDAEConfig(latent=LatentConfig(16)), "16-dimensional"),
        (lambda: ScheduleConfig("sine"), "sine"),
    ],
)
def test_wrong_model_settings(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected a JSON object"),
        ('{"format": 2, "kind": "pdae"}', "format 2"),
        ('{"format": 1, "kind": "gan"}', "kind 'gan'"),
        ('{"format": 1, "kind": "pdae", "widht": 3}', "unknown field widht"),
        ('{"format": 1, "kind": "pdae", "unet": {"num_heads": "4"}}', "num_heads"),
        ('{"format": 1, "kind": "pdae", "unet": {"dropout": "x"}}', r"dropout must be in"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        config.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        config.load(tmp_path / "none.json")
