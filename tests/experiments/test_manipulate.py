"""`manipulate` against its formula in float64, single calls and brute force; pairs with a known truth; mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from golden_rule import relative
from helpers import TINY, image_folder, images, tiny_pdae
from pdae_fast import Pipeline, UserError, cli, manipulate, metrics
from pdae_fast.experiments import manipulate as experiment

SCALES = [-0.5, 0.7]


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model, steps=2, device="cpu", batch_size=8)


@pytest.fixture
def base(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 3)
    return ["--model", model_dir, "--input", folder, "--device", "cpu", "--batch-size", 8, "--steps", 2]


def run(*argv):
    return cli.run(manipulate.main, [str(a) for a in argv])


def pairs(folder):
    """Three pairs: 0 gains "dark" in a square, 1 loses "round", 2 changes both, 3 neither."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(2)
    rows, labels = [], {0: ((1, 0), (1, 1)), 1: ((1, 0), (0, 0)), 2: ((0, 0), (1, 1)), 3: ((1, 1), (1, 1))}
    for k, halves in labels.items():
        first = random.integers(0, 200, (32, 32), dtype=np.uint8)
        second = first.copy()
        second[4:12, 6:16] += 50
        for half, pixels, values in zip("ab", (first, second), halves, strict=True):
            Image.fromarray(pixels).save(folder / "images" / f"{k:06d}_{half}.png")
            rows.append([f"{k:06d}_{half}.png", *values, "word"])
    with open(folder / "attributes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "round", "dark", "colour"], *rows])
    with open(folder / "pairs.csv", "w", newline="") as file:
        names = [[f"{k:06d}_a.png", f"{k:06d}_b.png", "colour", "x", "y"] for k in labels]
        csv.writer(file).writerows([["first", "second", "attribute", "before", "after"], *names])
    return folder


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


def test_region_and_error_in_it():
    truth = torch.zeros(2, 3, 8, 8)
    first = truth.clone()
    first[0, 1, 2:4, 2:6] = 1.0  # one channel of 8 pixels, 0.5 on [0, 1]
    first[1, 0, 0, 0] = 0.04
    region = experiment.changed_region(first, truth)
    assert region.sum(dim=(1, 2)).tolist() == [8, 0] and bool(region[0, 2:4, 2:6].all())
    x = first.clone()
    x[0, :, 7, 7] = -1.0
    found = experiment.compare_with(x, truth, region)
    assert float(found["mse_inside"][0]) == pytest.approx(0.25 / 3)
    assert float(found["mse_outside"][0]) == pytest.approx(0.25 / 56)
    assert bool(found["mse_inside"][1].isnan())
    torch.testing.assert_close(found["ssim"], metrics.ssim(x, truth))
    # Both parts together are the whole.
    whole = (8 * found["mse_inside"][0] + 56 * found["mse_outside"][0]) / 64
    assert float(whole) == pytest.approx(float(metrics.mse(x, truth)[0]))


def test_pairs_that_differ_in_one_attribute(tmp_path):
    folder = pairs(tmp_path / "pairs")
    edits = experiment.find_edits(folder, ["dark", "unknown", "round"])
    assert edits == [("000000_a", "000000_b", "dark", 1), ("000001_a", "000001_b", "round", -1)]
    # With one of them alone the third pair differs in one attribute as well.
    assert [edit.first for edit in experiment.find_edits(folder, ["dark"])] == ["000000_a", "000002_a"]
    with pytest.raises(UserError, match=r"round, dark\) are none of the classifier's \(blue"):
        experiment.find_edits(folder, ["blue"])
    first, second = experiment.load_pairs(folder, edits, (1, 32, 32))
    region = experiment.changed_region(first, second)
    assert region[:, 4:12, 6:16].all() and int(region.sum()) == 2 * 80
    assert experiment.pairs_folder("none", [str(tmp_path)]) is None
    assert experiment.pairs_folder(None, [str(tmp_path)]) == folder
    assert experiment.pairs_folder(None, [str(folder)]) is None
    with pytest.raises(UserError, match="no pairs.csv"):
        experiment.pairs_folder(str(tmp_path), [])


def test_the_truth_by_single_calls(tmp_path, pipe):
    folder = pairs(tmp_path / "pairs")
    edits = experiment.find_edits(folder, ["round", "dark"])
    first, second = experiment.load_pairs(folder, edits, (1, 32, 32))
    truth = experiment.against_truth(pipe, first, second, edits, [0.3, 0.6])
    assert [row["name"] for row in truth.rows] == ["no edit", "scale 0.3", "scale 0.6", "z of the true image"]
    region = experiment.changed_region(first, second)
    one = torch.cat([pipe.manipulate(first[:1], "dark", 0.6), pipe.manipulate(first[1:], "round", -0.6)])
    z, z_second = pipe.encode(first), pipe.encode(second)
    x_T = pipe.invert(first, z)
    for row, x in ((0, pipe.decode(z, x_T)), (2, one), (3, pipe.decode(z_second, x_T))):
        expected = experiment.compare_with(x, second, region)
        for key, values in expected.items():
            assert truth.rows[row][key] == pytest.approx(float(values.mean()), rel=1e-3), (row, key)
    assert truth.rows[0]["closer_inside"] == 0
    better = [p["scale 0.6"]["mse_inside"] < p["no edit"]["mse_inside"] for p in truth.per_pair]
    assert truth.rows[2]["closer_inside"] == sum(better) / 2
    assert truth.per_pair[1]["sign"] == -1 and truth.per_pair[1]["region"] == pytest.approx(80 / 1024)


def test_the_command(tmp_path, base, capsys):
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
