import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import mutated, quick, values
from pdae_fast import (
    PDAE,
    DiffAEConfig,
    LatentConfig,
    PDAEConfig,
    PriorConfig,
    ScheduleConfig,
    UNetConfig,
    UserError,
    config,
    presets,
)


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


FULL = PDAEConfig(
    image_size=32,
    latent_dim=16,
    unet=UNetConfig(1, 32, (1, 2), 1, (2,), 2),
    schedule=ScheduleConfig("stored", 3, betas=(0.1, 0.2, 0.3)),
    latent=LatentConfig(16, 32, 3),
    attributes=("round", "dark"),
)
DIFFAE = DiffAEConfig(32, 16, UNetConfig(1, 32, (1, 2), 1, (2,), 2), (1, 2, 2), latent=LatentConfig(16, 32, 3))
WRITTEN = [json.loads(config.dumps(c)) for c in (FULL, FULL.prior, DIFFAE)]


def one_line(error):
    text = str(error)
    text.encode()
    assert len(text) < 1500 and text.isprintable(), text
    return text


@quick(600)
@given(st.one_of(values, *map(mutated, WRITTEN)))
def test_any_value_is_a_configuration_that_round_trips_or_one_line(value):
    try:
        found = config.from_dict(value)
    except UserError as error:
        one_line(error)
    else:
        assert config.from_dict(json.loads(config.dumps(found))) == found
        assert config.from_dict(config.to_dict(found)) == found


unets = st.fixed_dictionaries(
    {
        "base_channel": st.sampled_from((32, 64, 96)),
        "channel_multiplier": st.lists(st.integers(1, 4), min_size=2, max_size=4),
    },
    optional={
        "num_residual_blocks_of_a_block": st.integers(1, 4),
        "attention_resolutions": st.lists(st.sampled_from((1, 2, 4, 8)), max_size=3),
        "dropout": st.floats(0, 0.99),
        "norm_eps": st.floats(1e-12, 1),
        "time_scale": st.floats(1e-6, 1000),
        "learn_sigma": st.booleans(),
        "num_classes": st.none() | st.integers(1, 1000),
        "downsample": st.sampled_from(config.DOWNSAMPLES),
        "middle": st.sampled_from(config.MIDDLES),
    },
)
schedules = st.builds(ScheduleConfig, st.sampled_from(config.SCHEDULES[:-1]), st.integers(2, 10**5)) | st.lists(
    st.floats(0, 1, exclude_min=True), min_size=2, max_size=9
).map(lambda betas: ScheduleConfig("stored", len(betas), betas=tuple(betas)))


@quick(150)
@given(unets, schedules, st.lists(st.text("añ雪 :,'\\", max_size=9), max_size=4), st.booleans())
def test_every_configuration_round_trips(unet, schedule, names, statistics):
    made = PDAEConfig(
        64, 16, unet=UNetConfig(**unet), schedule=schedule, attributes=tuple(names), latent_statistics=statistics
    )
    assert config.from_dict(json.loads(config.dumps(made))) == made


def put(place, value, kind=0):
    values = json.loads(json.dumps(WRITTEN[kind]))
    *way, last = place.split(".")
    inner = values
    for key in way:
        inner = inner[key]
    inner[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (put("kind", ["a"]), r"kind \['a'\] is not known"),
        (put("format", True), "format True"),
        (put("schedule", None), "schedule must be a ScheduleConfig, not None"),
        (put("unet", None), "unet must be a UNetConfig"),
        (put("latent", 3), "latent: expected a JSON object, found int"),
        (put("latent.schedule", None), "schedule must be a ScheduleConfig"),
        (put("latent_statistics", "false"), "latent_statistics must be true or false, not 'false'"),
        (put("latent.layers", 10**6), "has at most 128, not 1000000"),
        (put("latent.hidden", 2**40), "latent hidden must be at most 65536"),
        (put("latent_dim", 2**40), "latent_dim must be at most 65536"),
        (put("encoder_channel", 2**40), "encoder_channel must be a multiple of 32 up to 65536"),
        (put("encoder_channel", 2**16), "the encoder would have 5.2e.10 weights"),
        (put("attributes", None), "attributes must be a list of names, not None"),
        (put("attributes", "round"), "attributes must be a list of names, not 'round'"),
        (put("attributes", [1]), "attributes must be at most 4096 names"),
        (put("attributes", ["x"] * 5000), "attributes must be at most 4096 names"),
        (put("attributes", ["a\nb"]), "attributes must be at most 4096 names"),
        (put("schedule.timesteps", 10**9), "timesteps must be an integer from 2 to 100000"),
        (put("schedule.betas", 0.1), "betas must be a list of numbers"),
        (put("schedule.betas", [0.1, float("nan"), 0.1]), "betas must be 3 numbers between 0 and 1"),
        (put("unet.dropout", float("-inf")), "dropout must be in .0, 1., not -inf"),
        (put("unet.dropout", 0.5).replace("0.5", "1e999"), "dropout must be in .0, 1., not inf"),
        (put("unet.num_residual_blocks_of_a_block", 10**5), "_of_a_block must be at most 32"),
        (put("unet.channel_multiplier", [1e-9, 1]), "channel_multiplier must be"),
        (put("unet.channel_multiplier", [1, 10**400]), "channel_multiplier must be"),
        (put("unet.channel_multiplier", [1, 2048]), r"the U-Net would have 2.*e.11 weights"),
        (put("unet.attention_resolutions", [2] * 99), "attention_resolutions must be"),
        (put("unet.time_scale", 10**400), "time_scale must be a positive number"),
        (put("unet.time_channel", 2**16 - 1), "what reads z|the U-Net would have"),
        (put("unet.middle", ["none"]), "middle .* is not known"),
        (put("noise", {}), "noise {} is not known"),
        (put("encoder_multiplier", [], 2), "encoder_multiplier: channel_multiplier must be"),
        (put("encoder_multiplier", [1, 2048], 2), "encoder_multiplier: the U-Net would have"),
        (put("x" * 5000, 1), "unknown field"),
        ("[" * 10**5, "nested deeper than 32"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" + "9" * 5000 + "]", "not a JSON file"),
        ("[" + "1," * 2**18 + "1]", "more than 262144 values"),
        (" " * 2**23 + "{}", "more than 8192 KiB"),
        (b"\x80\x00{}", "not a text file"),
    ],
    ids=lambda value: str(value)[:40] if len(value) < 100 else "",
)
def test_hostile_files_are_one_line(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as error:
        config.load(path)
    one_line(error.value)


def test_what_is_too_large_as_a_whole_is_not_built():
    with pytest.raises(UserError, match="the U-Net would have"):
        UNetConfig(base_channel=2**16, channel_multiplier=(1,) * 12)
    with pytest.raises(UserError, match="the latent DPM would have"):
        LatentConfig(2**16, 2**16, 128)
    # Twice as wide as the largest published network.
    UNetConfig(base_channel=512, channel_multiplier=(1, 2, 3, 4), num_residual_blocks_of_a_block=3)


def test_the_deepest_network_that_is_allowed_is_refused_quickly():
    unet = UNetConfig(base_channel=32, channel_multiplier=(1,) * 12, num_residual_blocks_of_a_block=32)
    with pytest.raises(UserError, match="do not fit the configuration"):
        PDAE.from_state(PDAEConfig(2048, unet=unet), {}, "here")
