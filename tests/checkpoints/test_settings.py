"""The published configuration files: found where they may be, checked against the weights."""

import json
import sys

import pytest
import yaml
from checkpoints import fabricate
from hypothesis import given

import hostile
from pdae_fast import UserError, checkpoints
from pdae_fast.checkpoints.settings import from_config
from pdae_fast.config import dumps

MODEL = fabricate.config(
    32, 12, num_heads=4, use_new_attention_order=True, dropout=0.25, num_residual_blocks_of_a_block=2
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return fabricate.save(tmp_path_factory.mktemp("s") / "a.pt", fabricate.autoencoder(fabricate.pdae(MODEL)))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    source = fabricate.prior(MODEL.prior)
    return fabricate.save(tmp_path_factory.mktemp("s") / "p.pt", fabricate.pdae_prior(source))


@pytest.mark.parametrize("form", ["yaml", "json", "mapping", "flat", "own", "json-named-yml"])
def test_forms(form, path, tmp_path):
    tree, file = fabricate.yaml_tree(MODEL), tmp_path / "c.yml"
    if form == "yaml":
        file.write_text(yaml.safe_dump(tree))
    elif form == "json":
        file = tmp_path / "c.json"
        file.write_text(json.dumps(tree))
    elif form == "json-named-yml":
        file.write_text(json.dumps(tree))
    elif form == "own":
        file.write_text(dumps(MODEL))
    else:
        file = tree if form == "mapping" else tree["denoise_fn_config"]
    assert checkpoints.load(path, config=file).config == MODEL


def test_json_needs_no_yaml(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "c.json").write_text(json.dumps(fabricate.yaml_tree(MODEL)))
    assert checkpoints.load(path, config=tmp_path / "c.json").config == MODEL
    (tmp_path / "c.yml").write_text("denoise_fn_config:\n  num_heads: 4\n")
    with pytest.raises(UserError, match=r"pip install \"pdae_fast\[convert\]\""):
        checkpoints.load(path, config=tmp_path / "c.yml")


def test_options_win_over_the_configuration(path):
    tree = fabricate.yaml_tree(MODEL)
    unet = checkpoints.load(path, config=tree, num_heads=2, dropout=0.0).config.unet
    assert (unet.num_heads, unet.dropout, unet.use_new_attention_order) == (2, 0.0, True)
    # One of the two ways of giving heads settles both.
    tree["denoise_fn_config"]["head_channel"] = 16
    assert checkpoints.load(path, config=tree, num_heads=2).config.unet.head_channel == -1
    assert checkpoints.load(path, config=tree).config.unet.head_channel == 16


def test_the_autoencoders_own_configuration_names_no_heads(path):
    tree = {
        "dataset_config": {"image_size": 32, "latent_dim": 12},
        "diffusion_config": {"timesteps": 500, "betas_type": "cosine"},
        "encoder_config": {"model": "SomeEncoder", "latent_dim": 12},
        "decoder_config": {"model": "SomeDecoder", "latent_dim": 12},
    }
    loaded = checkpoints.load(path, config=tree)
    assert (loaded.config.schedule.kind, loaded.config.schedule.timesteps) == ("cosine", 500)
    assert any("1 attention head" in note for note in loaded.notes)


def test_image_size_and_schedule_of_a_prior(prior):
    tree = fabricate.yaml_tree(MODEL.prior)
    tree["dataset_config"]["image_size"] = 128
    tree["diffusion_config"] = {"timesteps": 1000, "betas_type": "cosine"}
    config = checkpoints.load(prior, config=tree).config
    assert (config.image_size, config.schedule.kind) == (128, "cosine")
    assert checkpoints.load(prior, config=tree, image_size=64, schedule="linear").config.image_size == 64


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("denoise_fn_config", "base_channel", 64, "base_channel 64 but the weights say 32"),
        ("denoise_fn_config", "channel_multiplier", [1, 4], "channel_multiplier [1, 4] but the weights say [1, 2]"),
        ("denoise_fn_config", "num_residual_blocks_of_a_block", 3, "_blocks_of_a_block 3 but the weights say 2"),
        ("denoise_fn_config", "attention_resolutions", [1], "attention_resolutions [1] but the weights say [2]"),
        ("denoise_fn_config", "input_channel", 1, "input_channel 1 but the weights say 3"),
        ("denoise_fn_config", "learn_sigma", True, "learn_sigma True but the weights say False"),
        ("denoise_fn_config", "num_heads", 5, "cannot be split by num_heads=5"),
        ("denoise_fn_config", "num_heads", "four", "num_heads is 'four'; expected an integer"),
        ("denoise_fn_config", "use_new_attention_order", "yes", "expected true or false"),
        ("denoise_fn_config", "dropout", "high", "expected a number"),
        ("denoise_fn_config", "attention_resolutions", "16", "expected a list of integers"),
        ("dataset_config", "image_size", 64, "image_size 64 but the encoder's weights say 32"),
        ("dataset_config", "latent_dim", 512, "latent_dim 512 but the encoder's weights say 12"),
        ("diffusion_config", "betas_type", "const0.01", "'const0.01' is not known"),
        ("diffusion_config", "linear_beta_end", 0.03, "only 0.02 is supported"),
        ("decoder_config", "num_heads", 2, "num_heads is 4 in one section and 2 in another"),
    ],
)
def test_contradictions(section, key, value, said, path):
    tree = fabricate.yaml_tree(MODEL)
    tree.setdefault(section, {})[key] = value
    with pytest.raises(UserError) as error:
        checkpoints.load(path, config=tree)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_configurations_that_say_nothing(tmp_path):
    for text, said in (
        ("optimizer_config:\n  lr: 1e-4\n", "no section describes a model"),
        ("just words\n", "holds one str"),
        ("a: &a\n  b: *a\n", "nested deeper than 32"),
        ("a: [1,\nb: }", "not YAML"),
    ):
        (tmp_path / "c.yml").write_text(text)
        with pytest.raises(UserError, match=said):
            from_config(tmp_path / "c.yml")
    with pytest.raises(UserError, match="cannot be read"):
        from_config(tmp_path / "none.yml")


def laughs(first, row):
    return f"a0: &a0 {first}\n" + "".join(f"a{i}: &a{i} {row(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs("[1]", "[{}]".format) + "num_heads: *a11\n", "more than 262144 values"),
        (laughs("{x: 1}", "{{<<: [{}]}}".format), "more than 262144 values"),
        ("a: &a {b: *a, c: *a}", "nested deeper than 32"),
        ("num_heads: &a [*a, *a]", "nested deeper than 32"),
        ("[" * 10000, "nested too deeply"),
        ("\n".join(" " * i + "a:" for i in range(100)), "nested deeper than 32"),
        ("num_heads: " + "9" * 10000, "not YAML"),
        ("num_heads: 0x" + "f" * 10000, "num_heads is an unprintable int; expected an integer from 1 to 100000"),
        ("num_heads: -4", "num_heads is -4; expected an integer from 1"),
        ("image_size: 2024-13-45", "month must be in 1..12"),
        ("image_size: 2024-01-01", r"image_size is datetime.date\(2024, 1, 1\); expected an integer"),
        ("num_heads: !!set {a}", "num_heads is {'a'}; expected an integer"),
        ("num_heads: !!python/object/apply:os.getcwd []", "not YAML"),
        ("a: !!timestamp foo", "not YAML"),
        ("{base_channel: 32, dropout: .nan}", "dropout is nan; expected a number from 0"),
        ("{base_channel: 32, channel_multiplier: [1, .inf]}", r"channel_multiplier is \[1, inf\]; expected numbers"),
        ("{base_channel: 32, attention_resolutions: [0]}", r"attention_resolutions is \[0\]; expected numbers"),
        ("schedule: {kind: stored, betas: 3}", "betas are 3; expected a list of numbers"),
        ("prediction: [x]", r"prediction is \['x'\]; expected a word"),
        ('"a\\nb": {num_heads: x}', r"\(a b\): num_heads is 'x'"),
        ("# comment\n" * 20000, "more than 128 KiB of YAML"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path, text, said):
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        from_config(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_hostile_mappings_are_one_line(tmp_path):
    tree = {"num_heads": []}
    for _ in range(30):
        tree = {"a": tree, "b": tree}
    itself = {}
    itself["a"] = itself["b"] = itself
    for given_, said in ((tree, "more than 262144 values"), (itself, "nested deeper than 32"), (3, "config= is 3")):
        with pytest.raises(UserError, match=said):
            from_config(given_)
    (tmp_path / "c.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="not JSON"):
        from_config(tmp_path / "c.json")


@hostile.quick(300)
@given(hostile.mutated(fabricate.yaml_tree(MODEL)))
def test_any_configuration_is_settings_or_one_line(tree):
    try:
        from_config(tree)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1500


@hostile.quick(8)
@given(hostile.mutated(fabricate.yaml_tree(MODEL)))
def test_any_configuration_gives_a_model_or_one_line(path, tree):
    try:
        checkpoints.load(path, config=tree)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1500
