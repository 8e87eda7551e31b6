"""`manipulate` against its formula in float64, single calls and brute force; mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from golden_rule import relative
from helpers import TINY, image_folder, images, tiny_pdae
from pdae_fast import Pipeline, cli
from pdae_fast.experiments import manipulate as experiment

SCALES = [-0.5, 0.7]


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model, "published", steps=2, device="cpu", batch_size=8)


@pytest.fixture
def base(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 3)
    return [
        "--model",
        model_dir,
        "--input",
        folder,
        "--device",
        "cpu",
        "--batch-size",
        8,
        "--steps",
        2,
        "--iterations",
        0,
    ]


def run(*argv):
    return cli.run(experiment.main, [str(a) for a in argv])


def test_the_edit_is_the_formula(model, pipe):
    z = pipe.encode(images(3))
    w = model.classifier.weight[1].detach().double()
    mean, std = model.latent_mean.double(), model.latent_std.double()
    scale = torch.tensor([0.2, -1.5, 0.0])
    expected = ((z.double() - mean) / std + scale[:, None].double() * 16**0.5 * w / w.norm()) * std + mean
    assert relative(pipe.edit(z, "dark", scale).double(), expected) < 1e-6
    assert relative(pipe.edit(z, 1, -1.5)[1].double(), expected[1]) < 1e-6
    # The logits are those of the classifier on normalised z, and move as much as `asked` says.
    logits = torch.nn.functional.linear((z.double() - mean) / std, model.classifier.weight.double()) + (
        model.classifier.bias.double()
    )
    assert relative(pipe.logits(z).double(), logits.detach()) < 1e-6
    moved = pipe.logits(pipe.edit(z, "dark", 0.7)) - pipe.logits(z)
    torch.testing.assert_close(moved, experiment.asked(pipe, "dark", 0.7).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_one_run_equals_single_calls(pipe):
    x0 = images(3)
    before = pipe.evaluations.get("trunk", 0)
    found = experiment.manipulate(pipe, x0, ["round", "dark"], SCALES)
    # x_T once an image, up 2 steps; then 3 reconstructions and 12 edits down.
    assert pipe.evaluations["trunk"] - before == 3 * 2 + 15 * 2
    assert found.edited.shape == (2, 2, 3, 1, 32, 32)
    for a, name in enumerate(("round", "dark")):
        for s, scale in enumerate(SCALES):
            one = torch.cat([pipe.manipulate(x0[i : i + 1], name, scale) for i in range(3)])
            assert relative(found.edited[a, s], one) < 1e-3  # random weights: rounding grows
            torch.testing.assert_close(found.edited_logits[a, s], pipe.logits(pipe.encode(one)), rtol=1e-3, atol=1e-3)
    assert relative(found.reconstructions, pipe.reconstruct(x0)) < 1e-4


def test_measures_by_hand(pipe):
    x = torch.zeros(2, 3, 4, 4)
    edited = x.clone()
    edited[0, 0, 0, :3] = 0.09  # one channel of three pixels moves by 0.045 on [0, 1]
    edited[1, 0, 1, 1] = 0.05  # less than can be seen
    logits = torch.tensor([[1.0, -1.0], [-2.0, 3.0]])
    after = torch.tensor([[3.0, -0.5], [1.0, 1.0]])
    found = experiment.Manipulation(x + 1, x, edited[None, None], logits, after[None, None])
    (row,) = experiment.measure(pipe, found, ["round"], [0.4])
    p = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    assert row["target"] == pytest.approx((2 + 3) / 2) and row["others"] == pytest.approx((0.5 + 2) / 2)
    assert row["target_probability"] == pytest.approx((p(3) - p(1) + p(1) - p(-2)) / 2)
    assert row["others_probability"] == pytest.approx((abs(p(-0.5) - p(-1)) + abs(p(1) - p(3))) / 2)
    assert (row["positive_before"], row["positive"]) == (0.5, 1.0)
    assert row["changed_pixels"] == pytest.approx(3 / 32)
    assert row["mean_change"] == pytest.approx((3 * 0.045 + 0.025) / 96)
    # Rows of blocks of different sizes are averaged over images.
    parts = [(1, [{**row, "target": 1.0}]), (3, [{**row, "target": 3.0}])]
    assert experiment.average(parts)[0] == {**row, "target": 2.5}


def test_rows_in_which_the_target_stands_out():
    def row(scale, target, others):
        return {"scale": scale, "target": target, "others": others}

    rows = [row(0.3, 1.0, 0.5), row(0.3, 0.4, 0.5), row(0.3, -2.0, 0.5), row(-0.3, -1.0, 0.5), row(-0.3, 0.2, 0.5)]
    assert experiment.stands_out(rows) == {"raised": (1, 3), "lowered": (1, 2)}
    # A classifier of one attribute has no others.
    assert experiment.stands_out([row(0.1, 0.2, None)]) == {"raised": (1, 1), "lowered": (0, 0)}


def test_default_attributes():
    assert experiment.default_attributes(["Bald", "Smiling", "Hat", "Male", "X", "Y"]) == [
        "Smiling",
        "Male",
        "Hat",
        "Bald",
    ]
    assert experiment.default_attributes(["a"]) == ["a"] and experiment.default_attributes([]) == []


def test_the_command(tmp_path, base, capsys, pairs):
    folder, out = pairs(tmp_path / "pairs"), tmp_path / "out"
    argv = ["--out", out, "--scales", -0.5, 0, 0.7, "--batch-size", 2, "--pairs", folder, "--compare"]
    assert run(*base, *argv) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["attributes"] == ["round", "dark"] and report["scales"] == SCALES and report["images"] == 3
    assert [(r["attribute"], r["scale"]) for r in report["rows"]] == [(n, s) for n in ("round", "dark") for s in SCALES]
    assert report["pairs"]["count"] == 2 and [row["scale"] for row in report["pairs"]["rows"]] == [0, 0.5, 0.7, None]
    assert report["compare"]["largest_difference"] < 1e-2
    expected = [int(r["target"] > r["others"]) for r in report["rows"] if r["scale"] > 0]
    assert report["stands_out"]["raised"] == [sum(expected), 2]
    # Two steps up and down for an image, and down for each of its four edits; per edit.
    assert report["network_evaluations_per_image"]["trunk"] == pytest.approx((2 + 2 + 4 * 2) / 4)
    printed = capsys.readouterr().out
    assert f"raised in {sum(expected)} of 2 rows" in printed
    assert "round +0.7" in printed and "z of the true image" in printed and "one run" in printed
    names = sorted(path.name for path in (out / "images" / "dark").iterdir())
    assert names == sorted(f"{i:02d}_{s}.png" for i in range(3) for s in ("-0.5", "+0.7"))
    with Image.open(out / "grid.png") as grid, Image.open(out / "pairs.png") as known:
        assert grid.size[1] == 6 * 66 - 2 and known.size[1] == 6 * 66 - 2
    # Blocks of two images give what one block gives.
    assert run(*base, *argv[2:-1], "--out", tmp_path / "whole", "--batch-size", 8) == 0
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    for a, b in zip(report["rows"], whole["rows"], strict=True):
        assert a["target"] == pytest.approx(b["target"], rel=1e-3, abs=1e-3)


BAD = [
    (["--attribute", "round", "blue"], "'blue' is not known; expected one of round, dark"),
    (["--scales", 0], "other than 0"),
    (["--pairs", "nowhere"], "--pairs nowhere: no pairs.csv"),
    (["--pair-limit", 0], "at least 1"),
    (["--model", "plain"], "needs an attribute classifier; this model has none: make one with"),
]


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_a_mistake_is_one_line(tmp_path, base, capsys, argv, words):
    out = tmp_path / "out"
    if "plain" in argv:
        tiny_pdae(TINY).save_pretrained(tmp_path / "plain")
        argv = ["--model", tmp_path / "plain"]
    assert run(*base, "--out", out, *argv) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not out.exists()
