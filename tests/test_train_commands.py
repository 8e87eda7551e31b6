"""`python -m pdae_fast.train latent | classifier | curves` as a user runs them."""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import idx_files
import killing
from helpers import TINY, image_folder, tiny_pdae, tiny_prior
from pdae_fast import PDAE, Pipeline, Prior, UserError, cli, config, train
from pdae_fast.checkpoints import save_official
from pdae_fast.engine import plan
from pdae_fast.training import Trainer, curves
from pdae_fast.training.curves import plot_curves, read_log, smooth

SMALL = ("--steps", 4, "--batch-size", 8, "--log-every", 1, "--device", "cpu")
MLP = ("--hidden", 32, "--layers", 3)


def run(*argv):
    try:
        return cli.run(train.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def refused(capsys, *argv):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and printed.err.startswith("error: ")
    return printed.err


@pytest.fixture
def start(tmp_path):
    tiny_pdae().save_pretrained(tmp_path / "pdae")
    return tmp_path / "pdae"


@pytest.fixture
def table(tmp_path):
    rows = [f"{i:02d}.png,{(i % 2) * 2 - 1},{int(i < 4)},{'red' if i % 3 else 'blue'}" for i in range(12)]
    (tmp_path / "table.csv").write_text("\n".join(["name,odd,low,colour", *rows]) + "\n")
    return tmp_path / "table.csv"


def test_from_an_autoencoder_to_one_that_samples_and_manipulates(tmp_path, start, capsys, monkeypatch):
    data = idx_files.write_set(tmp_path / "data", count=30)
    labels = (np.arange(30) % 3).astype(np.uint8)
    (data / "train-labels-idx1-ubyte.gz").unlink()
    (data / "train-labels-idx1-ubyte").write_bytes(idx_files.idx_bytes(labels))
    latent, full = tmp_path / "latent", tmp_path / "full"
    shared = ("--data", data, *SMALL)
    assert run("latent", "--init-from", start, "--out", latent, *MLP, "--sample-every", 4, *shared) == 0
    assert {p.name for p in latent.iterdir()} == {
        "config.json", "model.safetensors", "checkpoint.pt", "train.json", "log.jsonl", "samples",
    }  # fmt: skip
    assert json.loads((latent / "train.json").read_text())["init_from"] == str(start)
    with Image.open(latent / "samples" / "0000004.png") as picture:
        picture.load()
    printed = capsys.readouterr().out
    (kept,) = (tmp_path / "latents").iterdir()
    assert f"30 latents: {kept}" in printed

    def encode(self, x0):
        raise AssertionError("these latents were there already")

    monkeypatch.setattr(plan.Plan, "encode", encode)
    options = ("--attributes", "classes", "--holdout", 0.2, "--cached-only")
    assert run("classifier", "--init-from", latent, "--out", full, *options, *shared) == 0
    printed = capsys.readouterr().out
    report = json.loads((full / "metrics.json").read_text())
    assert report["images"] == 6 and report["part"] == "held out" and list(report["attributes"]) == ["0", "1", "2"]
    assert f"{report['class_accuracy']:.4f}" in printed and "6 images, held out" in printed
    assert json.loads((full / "train.json").read_text())["task"] == "classifier"
    monkeypatch.undo()
    model = PDAE.from_pretrained(full)
    assert model.config.attributes == ("0", "1", "2") and model.config.latent.hidden == 32
    pipe = Pipeline(model, steps=2, device="cpu")
    assert (
        torch.isfinite(pipe.sample(1)).all()
        and torch.isfinite(pipe.manipulate(torch.zeros(1, 1, 32, 32), 1, 0.5)).all()
    )


def test_an_attribute_file_and_a_resumed_command(tmp_path, start, table, capsys):
    data = image_folder(tmp_path / "images", 12)
    (data / "05.png").unlink()
    out = tmp_path / "run"
    base = ("classifier", "--init-from", start, "--data", data, "--out", out, "--attributes", table)
    options = ("--columns", "odd", "colour=red", *SMALL)
    assert run(*base, *options) == 0
    printed = capsys.readouterr()
    assert "1 rows have no image (05)" in printed.err
    assert PDAE.from_pretrained(out).config.attributes == ("odd", "colour=red")
    assert list(json.loads((out / "metrics.json").read_text())["attributes"]) == ["odd", "colour=red"]
    assert "already holds a run; add --resume" in refused(capsys, *base, *options)
    further = [8 if i and options[i - 1] == "--steps" else v for i, v in enumerate(options)]
    assert run(*base, *further, "--resume") == 0
    assert run(*base[:5], "--out", tmp_path / "straight", *base[7:], *further) == 0
    weights = [(d / "model.safetensors").read_bytes() for d in (out, tmp_path / "straight")]
    assert weights[0] == weights[1]
    # What changed since is refused, and nothing is lost.
    assert "attributes" in refused(capsys, *base, "--columns", "low", "odd", *SMALL, "--resume", "--quiet")
    table.write_text(table.read_text().replace("00.png,-1", "00.png,1"))
    assert "other labels" in refused(capsys, *base, *options, "--resume", "--quiet")
    shutil.copy(data / "00.png", data / "01.png")
    assert "other images" in refused(capsys, *base, *options, "--resume", "--quiet")
    assert (out / "model.safetensors").read_bytes() == weights[0]


def test_an_lmdb_and_a_foreign_checkpoint(tmp_path, capsys):
    lmdb = pytest.importorskip("lmdb", reason='needs pip install "pdae_fast[data]"')
    folder = image_folder(tmp_path / "images", 10)
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for i in range(10):
            transaction.put(f"32-{i:05d}".encode(), (folder / f"{i:02d}.png").read_bytes())
        transaction.put(b"length", b"10")
    rows = [f"{i}.jpg,{i % 2}" for i in range(10)]
    (tmp_path / "hq.csv").write_text("\n".join(["name,odd", *rows]) + "\n")
    model = tiny_pdae()
    save_official(tmp_path / "official.pt", model.config, model.state_dict())
    heads = ("--num-heads", TINY.unet.num_heads)
    base = ("--init-from", tmp_path / "official.pt", "--data", f"lmdb:{tmp_path / 'db'}", *heads, *SMALL, "--quiet")
    assert run("latent", *base, "--out", tmp_path / "latent", *MLP) == 0
    attributes = ("--attributes", tmp_path / "hq.csv")
    assert run("classifier", *base, "--out", tmp_path / "classifier", *attributes) == 0
    assert PDAE.from_pretrained(tmp_path / "classifier").config.attributes == ("odd",)
    assert len(list((tmp_path / "latents").iterdir())) == 1
    for name, value in PDAE.from_pretrained(tmp_path / "latent").encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name])
    assert capsys.readouterr().out == ""


def test_broken_images_are_named(tmp_path, start, capsys):
    data = image_folder(tmp_path / "images", 12)
    (data / "03.png").write_bytes(b"x")
    base = ("latent", "--init-from", start, "--data", data, *MLP, *SMALL)
    assert "03.png" in refused(capsys, *base, "--out", tmp_path / "a", "--on-error", "fail", "--quiet")
    assert run(*base, "--out", tmp_path / "b", "--quiet") == 0
    assert capsys.readouterr().err.startswith("left out: 03: ")


MISTAKES = [
    ("latent", ["--hidden", "0"], "latent hidden must be a positive integer"),
    ("latent", ["--layers", "1"], "at least 2 layers"),
    ("latent", ["--data", "{empty}"], "no images"),
    ("latent", ["--data", "/none"], "no such input"),
    ("latent", ["--init-from", "{prior}"], "is a prior"),
    ("latent", ["--init-from", "/none"], "neither a bundled model"),
    ("latent", ["--out", "{start}"], "is --init-from itself"),
    ("latent", ["--out", "{file}/sub"], "cannot create the folder"),
    ("latent", ["--latents", "{file}"], "cannot create the folder"),
    ("latent", ["--cached-only"], "no latents of these 12 images"),
    ("latent", ["--resume"], "nothing to resume"),
    ("latent", ["--flip"], "unrecognized arguments: --flip"),
    ("latent", ["--save-every", "0"], "--save-every must be at least 1"),
    ("classifier", ["--attributes", "/none"], "cannot read /none"),
    ("classifier", ["--columns", "hat"], "no attribute hat"),
    ("classifier", ["--attributes", "classes", "--columns", "odd"], "--attributes classes takes every class"),
    ("classifier", ["--attributes", "classes"], "these images have no classes"),
    ("classifier", ["--holdout", "1"], "holdout must be a fraction"),
    ("curves", [], "required: RUN"),
    ("curves", ["{empty}"], "no log.jsonl"),
]


@pytest.mark.parametrize(("task", "arguments", "words"), MISTAKES, ids=[f"{t} {' '.join(a)}" for t, a, _ in MISTAKES])
def test_mistakes_print_one_line_and_exit_2(tmp_path, start, table, capsys, task, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    tiny_prior().save_pretrained(tmp_path / "prior")
    places = {name: tmp_path / name for name in ("empty", "file", "prior")}
    arguments = [a.format(start=start, **places) for a in arguments]
    before = (start / "model.safetensors").read_bytes()
    base = [task]
    if task != "curves":
        data = image_folder(tmp_path / "images", 12)
        base += ["--init-from", start, "--data", data, "--out", tmp_path / "out", *SMALL, "--quiet"]
    if task == "classifier" and "--attributes" not in arguments:
        base += ["--attributes", table]
    assert words in refused(capsys, *base, *arguments)
    assert (start / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out" / "model.safetensors").exists()


# -- curves ------------------------------------------------------------------------------------------------------------


def test_the_running_mean():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    np.testing.assert_array_equal(smooth(values, 0), values)
    expected = [3, 8 / 3, 14 / 5, 20 / 5, 21 / 5, 17 / 4, 16 / 3]  # windows of 1, 3, 5, 5, 5, 4, 3
    np.testing.assert_allclose(smooth(values, 4 / 7), expected)
    line = np.linspace(5, 1, 40)  # a centred mean keeps a straight line, its start included
    np.testing.assert_allclose(smooth(line, 0.3)[:34], line[:34])
    with pytest.raises(UserError, match="fraction"):
        smooth(values, 2)


def write_log(path, losses):
    path.mkdir()
    lines = [
        json.dumps({"step": 10 * (i + 1), "loss": loss, "images_per_second": 1.0}) for i, loss in enumerate(losses)
    ]
    (path / "log.jsonl").write_text("\n".join([*lines, '{"step": 99']) + "\n")


def test_a_log_that_was_cut_off(tmp_path):
    write_log(tmp_path / "run", [3.0, 2.0])
    for source in (tmp_path / "run", tmp_path / "run" / "log.jsonl"):
        steps, losses = read_log(source)
        assert steps.tolist() == [10, 20] and losses.tolist() == [3, 2]
    (tmp_path / "run" / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="no losses"):
        read_log(tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs pip install 'pdae_fast[plot]'")
def test_curves(tmp_path, capsys):
    random = np.random.default_rng(0)
    for name, level in (("one", 1.0), ("two", 1.5)):
        write_log(tmp_path / name, (level / np.sqrt(np.arange(1, 200)) + 0.05 * random.random(199)).tolist())
    out = tmp_path / "new" / "curves.png"
    assert run("curves", tmp_path / "one", tmp_path / "two", "--out", out) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ("#0072b2", "#d55e00"):  # each run has its line
        assert (pixels == tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))).all(1).sum() > 100
    plot_curves([tmp_path / "one"], out, log_scale=True)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs pip install 'pdae_fast[plot]'")
def test_every_task_has_axes_of_its_own(tmp_path, monkeypatch):
    """In the order of the runs, each with a range of its own; a run of one line is a dot."""
    for name, task, losses in (("a", "prior", [5.0, 4.0]), ("b", "pdae", [0.02, 0.01]), ("c", "prior", [3.0])):
        write_log(tmp_path / name, losses)
        (tmp_path / name / "train.json").write_text(json.dumps({"task": task}))
    write_log(tmp_path / "d", [50.0, 70.0])
    seen = []
    whole = curves.chart

    @contextlib.contextmanager
    def chart(*arguments, **options):
        with whole(*arguments, **options) as panels:
            yield panels
            seen.extend(panels[0])

    monkeypatch.setattr(curves, "chart", chart)
    plot_curves([tmp_path / name for name in "abcd"], tmp_path / "x.png")
    found = [(axes.get_title(), [text.get_text() for text in axes.get_legend().get_texts()]) for axes in seen]
    assert found == [("prior", ["a", "c"]), ("pdae", ["b"]), ("unknown task", ["d"])]
    for axes, (low, high) in zip(seen, ((3, 5), (0.01, 0.02), (50, 70)), strict=True):
        bottom, top = axes.get_ylim()
        assert low - (high - low) < bottom < low and high < top < high + (high - low)
    assert [line.get_marker() for line in seen[0].get_lines()] == ["None", "None", "None", "o"]


def test_curves_without_matplotlib(tmp_path, capsys, monkeypatch):
    write_log(tmp_path / "run", [3.0, 2.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'pdae_fast[plot]'" in refused(capsys, "curves", tmp_path / "run", "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("base", (32, 64))
def test_a_prior_that_cannot_see_colour_is_pointed_out(tmp_path, capsys, base):
    image_folder(tmp_path / "data", 4)
    config = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, base_channel=base))
    tiny_pdae(config).save_pretrained(tmp_path / "model")
    arguments = (
        "--data",
        tmp_path / "data",
        "--architecture",
        tmp_path / "model/config.json",
        "--out",
        tmp_path / "run",
    )
    assert run("prior", *arguments, "--steps", 1, "--batch-size", 2, "--device", "cpu") == 0
    assert ("normalised alone" in capsys.readouterr().out) == (base == 32)


# -- broken images, and the crop ---------------------------------------------------------------------------------------


def images_command(tmp_path, data, out, *options, task="prior"):
    (tmp_path / "tiny.json").write_text(config.dumps(TINY))
    tiny_prior().save_pretrained(tmp_path / "prior")
    start = () if task == "prior" else ("--init-from", tmp_path / "prior")
    return run(task, "--data", data, "--out", out, "--architecture", tmp_path / "tiny.json", "--steps", 4,
               "--batch-size", 2, "--save-every", 2, "--device", "cpu", "--quiet", *start, *options)  # fmt: skip


@pytest.mark.parametrize("task", ["prior", "pdae"])
def test_a_broken_image_is_left_out_as_if_it_were_not_there(tmp_path, capsys, task):
    whole, parts = image_folder(tmp_path / "whole", 6), image_folder(tmp_path / "parts", 6)
    (whole / "03.png").unlink()
    (parts / "03.png").write_bytes((parts / "03.png").read_bytes()[:60])
    assert images_command(tmp_path, whole, tmp_path / "a", task=task) == 0
    assert images_command(tmp_path, parts, tmp_path / "b", "--on-error", "skip", task=task) == 0
    assert "left out: 03: truncated" in capsys.readouterr().err
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    # Stopped by it, and continued without it; with the file deleted too.
    assert images_command(tmp_path, parts, tmp_path / "c", task=task) == 2
    assert "--resume continues once the file is whole, with --on-error skip without it" in capsys.readouterr().err
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    assert images_command(tmp_path, parts, tmp_path / "c", "--resume", "--on-error", "skip", task=task) == 0
    assert "note: 1 images fewer than the saved run saw" in capsys.readouterr().err
    (parts / "03.png").unlink()
    assert images_command(tmp_path, parts, tmp_path / "d", "--resume", task=task) == 2
    assert images_command(tmp_path, parts, tmp_path / "d", "--resume", "--on-error", "skip", task=task) == 0
    assert (tmp_path / "c/model.safetensors").read_bytes() == (tmp_path / "d/model.safetensors").read_bytes()
    assert images_command(tmp_path, parts, tmp_path / "b", "--resume", task=task) == 0  # it never saw the broken one


def test_a_trained_model_remembers_its_crop(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("L", (178, 218), 60 * i).save(tmp_path / "data" / f"{i}.png")
    assert images_command(tmp_path, tmp_path / "data", tmp_path / "a", "--crop", "celeba") == 0
    assert Prior.from_pretrained(tmp_path / "a").config.crop == "celeba" and capsys.readouterr().err == ""
    assert images_command(tmp_path, tmp_path / "data", tmp_path / "a", "--resume") == 2
    assert "crop is centre, not celeba" in capsys.readouterr().err
    assert images_command(tmp_path, tmp_path / "data", tmp_path / "b") == 0
    assert Prior.from_pretrained(tmp_path / "b").config.crop == "centre"


def test_two_runs_at_once_in_one_folder(tmp_path):
    """The second is refused while the first runs; nothing of the first changes, and it ends as one alone."""
    data = image_folder(tmp_path / "images", 6)
    assert images_command(tmp_path, data, tmp_path / "alone") == 0
    inner = []

    def second(self, values, real=Trainer._log):
        if not inner:
            before = killing.content(tmp_path / "out")
            ended = killing.run(lambda: images_command(tmp_path, data, tmp_path / "out", "--seed", 1))
            inner.append((ended.status, ended.err, killing.content(tmp_path / "out") == before))
        real(self, values)

    original, Trainer._log = Trainer._log, second
    try:
        assert images_command(tmp_path, data, tmp_path / "out", "--log-every", 1) == 0
    finally:
        Trainer._log = original
    ((status, err, same),) = inner
    assert status == 2 and same and len(err.splitlines()) == 1 and "another process is writing to" in err
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")} == set()
