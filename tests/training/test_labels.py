"""Where the labels of a class-conditional prior's images come from, and `train prior | pdae | encoder` with them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import foreign_golden
import idx_files
from golden_rule import fill
from helpers import TINY, image_folder, needs_sklearn
from pdae_fast import PDAE, Prior, PriorConfig, ScheduleConfig, UserError, cli, config, train
from pdae_fast.data import open_dataset
from pdae_fast.training.arguments import parse
from pdae_fast.training.command import build_model
from pdae_fast.training.labels import image_labels

CLASSES = 3
PRIOR = dataclasses.replace(TINY.prior, unet=dataclasses.replace(TINY.unet, num_classes=CLASSES))
SMALL = ("--steps", 2, "--batch-size", 2, "--device", "cpu")


def run(*argv):
    try:
        return cli.run(train.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def folders(path, *names):
    """Two images in each subfolder."""
    for name in names:
        image_folder(path / name, 2)
    return path


class Named:
    def __init__(self, *names, labels=None):
        self.names, self.labels = names, labels

    def __len__(self):
        return len(self.names)


def test_labels_of_every_kind(tmp_path):
    words = open_dataset(folders(tmp_path / "words", "zebra", "ant", "Cat/deep"), 32, 1)
    assert words.names[0] == "Cat/deep/00"
    assert image_labels(words, 3).values.tolist() == [0, 0, 1, 1, 2, 2]
    numbers = open_dataset(folders(tmp_path / "numbers", "10", "9", "007"), 32, 1)
    assert dict(zip(numbers.names, image_labels(numbers, 1000).values.tolist(), strict=True)) == {
        "007/00": 7, "007/01": 7, "9/00": 9, "9/01": 9, "10/00": 10, "10/01": 10,
    }  # fmt: skip
    assert image_labels(words, 8, label=7).values.tolist() == [7] * 6
    data = idx_files.write_set(tmp_path / "idx", count=5)
    (data / "train-labels-idx1-ubyte.gz").unlink()
    (data / "train-labels-idx1-ubyte").write_bytes(idx_files.idx_bytes(np.array([4, 0, 3, 1, 2], np.uint8)))
    found = image_labels(open_dataset(data, 32, 1), 5)
    assert found.values.tolist() == [4, 0, 3, 1, 2] and found.values.dtype == torch.int64
    (tmp_path / "table.csv").write_text("name,kind,odd\na,red,1\nb,blue,0\nc,green,1\n")
    table = image_labels(Named("c", "a", "b"), 3, attributes=tmp_path / "table.csv", columns=["kind"])
    assert table.values.tolist() == [1, 2, 0]  # blue, green, red
    two = image_labels(Named("a", "b"), 2, attributes=tmp_path / "table.csv", columns=["kind=red", "kind=blue"])
    assert two.values.tolist() == [0, 1]
    assert table.record != two.record


@pytest.mark.parametrize(
    ("names", "classes", "options", "words"),
    [
        (["a", "b"], 3, {}, "this prior knows 3 classes and these images have no labels: give a folder with one"),
        (["cat/a", "b"], 3, {}, "these images have no labels"),
        (["cat/a", "dog/b"], 3, {}, "2 subfolders (cat ...) for the 3 classes"),
        (["2/a", "3/b"], 3, {}, "3/b has label 3; this prior knows classes 0 to 2"),
        (["a"], 3, {"label": 3}, "a has label 3"),
        (["a"], 3, {"label": -1}, "a has label -1"),
        (["a", "b"], 2, {"columns": ["odd"]}, "1 columns for the 2 classes"),
        (["a", "b"], 2, {"columns": ["odd", "even"]}, "b has 0 of the 2 columns positive"),
        (["a", "d"], 2, {"columns": ["odd", "even"]}, "1 images have no attributes (d)"),
    ],
)
def test_labels_that_are_missing_or_wrong(tmp_path, names, classes, options, words):
    if "columns" in options:
        (tmp_path / "table.csv").write_text("name,odd,even\na,1,0\nb,0,0\n")
        options = options | {"attributes": tmp_path / "table.csv"}
    with pytest.raises(UserError) as error:
        image_labels(Named(*names), classes, **options)
    assert words in str(error.value)


@pytest.fixture
def places(tmp_path):
    fill(Prior(PRIOR)).save_pretrained(tmp_path / "prior")
    fill(Prior(TINY.prior)).save_pretrained(tmp_path / "plain")
    folders(tmp_path / "classes", "0", "1", "2")
    image_folder(tmp_path / "images", 4)
    return tmp_path


def test_training_a_class_conditional_prior_and_a_pdae_around_it(places, capsys):
    base = ("--init-from", places / "prior", "--data", places / "classes", *SMALL)
    before = Prior.from_pretrained(places / "prior")
    for task in ("prior", "pdae"):
        out = places / f"new-{task}"
        assert run(task, *base, "--out", out) == 0
        assert "labels: 3 subfolders" in capsys.readouterr().out
        assert "class labels" in json.loads((out / "train.json").read_text())
        assert run(task, *base, "--out", out, "--resume", "--quiet") == 0
        assert run(task, *base, "--out", out, "--resume", "--label", 1) == 2
        assert "other class labels than those of the saved run" in capsys.readouterr().err
    tuned, adapted = Prior.from_pretrained(places / "new-prior"), PDAE.from_pretrained(places / "new-pdae")
    assert tuned.config == adapted.config.prior == PRIOR
    assert adapted.config.latent_dim == 512 and adapted.config.encoder_channel == 64
    weight = before.unet.class_emb.weight
    assert not torch.equal(tuned.unet.class_emb.weight, weight)
    assert torch.equal(adapted.decoder.class_emb.weight, weight)


@needs_sklearn
def test_features_of_a_class_conditional_prior(places, capsys):
    base = ("encoder", "--init-from", places / "prior", "--data", image_folder(places / "more", 12), "--quiet", *SMALL)
    base += ("--latent-dim", 4, "--target", "features")
    assert run(*base, "--out", places / "none") == 2
    assert "needs --label K from 0 to 2, not None" in capsys.readouterr().err
    for label in (0, 1):
        assert run(*base, "--out", places / f"out{label}", "--label", label) == 0
    assert PDAE.from_pretrained(places / "out0").config.latent_dim == 4
    codes = [torch.load(path, weights_only=True)["z"] for path in (places / "latents").iterdir()]
    assert len(codes) == 2 and not torch.allclose(codes[0].abs(), codes[1].abs(), rtol=1e-3)


MISTAKES = [
    ("prior", [], "these images have no labels"),
    ("pdae", ["--label", 3], "00 has label 3; this prior knows classes 0 to 2"),
    ("prior", ["--init-from", "{places}/plain", "--label", 0], "--label gives a class-conditional prior its labels"),
    ("prior", ["--label", 0, "--sample-every", 1], "--sample-every draws no pictures of a class-conditional prior"),
    ("encoder", ["--target", "pca", "--label", 0], "--label is for --target features"),
]


@pytest.mark.parametrize(("task", "arguments", "words"), MISTAKES)
def test_mistakes_print_one_line_and_exit_2(places, capsys, task, arguments, words):
    arguments = [str(a).format(places=places) for a in arguments]
    base = (task, "--init-from", places / "prior", "--data", places / "images", "--out", places / "out", *SMALL)
    assert run(*base, *arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
    assert not (places / "out").exists()


def test_a_foreign_class_conditional_file(tmp_path):
    """guided-diffusion's network at 512 px, in small: what is adapted computes what their code did."""
    torch.save(foreign_golden.weights("guided-512"), tmp_path / "512.pt")
    data = folders(tmp_path / "data", "0", "5")
    said = ("--image-size", 32, "--head-channel", 32, "--latent-dim", 8, "--encoder-channel", 32)
    base = ("--init-from", tmp_path / "512.pt", "--data", data, "--out", tmp_path / "out", "--quiet", *SMALL)
    assert run("pdae", *base, *said) == 0
    model, numbers = PDAE.from_pretrained(tmp_path / "out"), foreign_golden.numbers("guided-512")
    x, t, y = (numbers[f"forward.{name}"] for name in "xty")
    with torch.no_grad():
        eps, _ = model(x, t, torch.zeros(len(x), 8), y)
    torch.testing.assert_close(eps, numbers["forward.out"][:, :3], rtol=0, atol=2e-5)


# -- a new prior, and the networks of one that is there ---------------------------------------------------------------


def test_options_of_a_new_prior(places):
    schedule = ScheduleConfig("linear", 500, 1e-3, 0.03)
    (places / "tiny.json").write_text(config.dumps(dataclasses.replace(TINY.prior, schedule=schedule)))
    more = ("--norm-groups", 4, "--classes", 3, "--schedule", "cosine", "--prediction", "v_prediction", "--quiet")
    base = ("prior", "--data", places / "classes", "--architecture", places / "tiny.json", *SMALL)
    assert run(*base, *more, "--out", places / "out") == 0
    expected = dataclasses.replace(
        PRIOR,
        unet=dataclasses.replace(PRIOR.unet, norm_groups=4),
        schedule=ScheduleConfig("cosine", 500),
        prediction="v_prediction",
    )
    assert Prior.from_pretrained(places / "out").config == expected


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        (
            "prior",
            ["--architecture", "avatars64"],
            "avatars64: its image_size is 64, that of the prior of --init-from 32",
        ),
        ("pdae", ["--architecture", "fashion32"], "its channel_multiplier is (1, 2, 3), that of the prior"),
        ("prior", ["--norm-groups", 8], "--norm-groups is for a new prior"),
        ("prior", ["--classes", 8], "--classes is for a new prior"),
        ("prior", ["--init-from", "", "--num-heads", 2], "--num-heads is for the checkpoint of --init-from"),
        ("pdae", ["--latent-dim", 0], "latent_dim must be a positive integer"),
        (
            "pdae",
            ["--freeze-encoder", "--start-from", "{places}/pdae", "--latent-dim", 8],
            "its latent_dim is 16, not 8",
        ),
    ],
)
def test_what_init_from_settles_is_not_overridden_without_a_word(places, capsys, task, arguments, words):
    fill(PDAE(TINY)).save_pretrained(places / "pdae")
    arguments = [str(a).format(places=places) for a in arguments]
    base = ("--init-from", places / "plain", "--data", places / "images", "--out", places / "out", *SMALL)
    assert run(task, *base, *arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
    assert not (places / "out").exists()


def test_the_autoencoder_of_a_preset_goes_with_its_prior(tmp_path):
    """fashion32's z has 128 dimensions, whatever its prior is called and however it was trained further."""
    prior = Prior.from_pretrained("fashion32")
    unet = dataclasses.replace(prior.config.unet, dropout=0.2)
    other = Prior(PriorConfig(**{**vars(prior.config), "unet": unet, "noise": "normal"}))
    other.save_pretrained(tmp_path / "other")
    arguments = ["pdae", "--data", "x", "--out", "y", "--init-from", str(tmp_path / "other")]
    assert build_model(parse(arguments)).config.latent_dim == 128
    wide = build_model(parse([*arguments, "--latent-dim", "64", "--encoder-channel", "32"])).config
    assert (wide.latent_dim, wide.encoder_channel, wide.unet) == (64, 32, unet)
