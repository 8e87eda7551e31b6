"""The Pareto command: rows that are measured once, survive a kill, refuse what cannot be compared, and the front."""

import csv
import itertools
import json
import random

import pytest
import torch

from helpers import TINY, image_folder, tiny_pdae
from pdae_fast import cli, metrics
from pdae_fast.experiments import common
from pdae_fast.experiments import pareto as sweeps
from pdae_fast.experiments.pareto import draw
from pdae_fast.experiments.pareto_settings import FAMILIES, Candidate, candidates, select
from pdae_fast.pipeline import Pipeline
from pdae_fast.samplers import RECIPES, Recipe

CONFIG = TINY

TABLE = [
    Candidate("coarse", "published", Recipe(2, iterations=0)),
    Candidate("cached", "reuse", Recipe(4, reuse="gradient:2"), ("random",)),
    Candidate("solved", "solved", Recipe(2, spacing="quadratic", iterations=2), ("inferred",)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "in", 3)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sweeps, "candidates", lambda which: TABLE)


def command(model_dir, folder, out, *more):
    arguments = ("--model", model_dir, "--input", folder, "--out", out, "--device", "cpu", "--batch-size", 2, *more)
    return cli.run(sweeps.main, [str(a) for a in arguments])


def rows_of(out):
    return json.loads((out / "metrics.json").read_text())["rows"]


def test_a_sweep_leaves_table_csv_json_and_picture(tmp_path, model_dir, folder, small, capsys):
    out = tmp_path / "out"
    assert command(model_dir, folder, out) == 0
    rows = {(row["mode"], row["name"]): row for row in rows_of(out)}
    assert list(rows) == [("inferred", "coarse"), ("inferred", "solved"), ("random", "coarse"), ("random", "cached")]
    with open(out / "pareto.csv", encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == sweeps.COLUMNS and len(written) == 4
    for line in written:
        row = rows[line["mode"], line["name"]]
        assert float(line["mse"]) == pytest.approx(row["mse"], rel=1e-5) and int(line["images"]) == 3
        assert line["front_evaluations"] == str(int(row["front_evaluations"]))
        assert row["relative_low"] <= row["relative_seconds"] <= row["relative_high"] and row["seconds_per_image"] > 0
    assert rows["inferred", "coarse"]["evaluations"] == pytest.approx(4)
    assert rows["inferred", "solved"]["evaluations"] == pytest.approx(7)
    cached = rows["random", "cached"]
    assert (cached["trunk"], cached["eps"], cached["gradient"]) == (4, 4, 2) and 2 < cached["evaluations"] < 4
    # The numbers are those of a pipeline that is asked for the same.
    model = sweeps.common.PDAE.from_pretrained(model_dir)
    images = common.load(common.open_dataset([folder], 32, 1, split="test"), range(3)).images
    pipe = Pipeline(model, steps=2, device="cpu", spacing="quadratic", iterations=2)
    mse = metrics.mse(images, pipe.reconstruct(images)).mean()
    assert rows["inferred", "solved"]["mse"] == pytest.approx(float(mse), rel=1e-4)
    pipe = Pipeline(model, steps=4, device="cpu", reuse="gradient:2")
    ssim = metrics.ssim(images, pipe.decode(pipe.encode(images), seed=0)).mean()
    assert cached["ssim"] == pytest.approx(float(ssim), abs=1e-5)
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "coarse" in printed and "4 rows, 4 of them new, 3 images" in printed and "pareto.png" in printed


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path, model_dir, folder, small, monkeypatch, capsys):
    out, measure, done = tmp_path / "out", sweeps.measure, []

    def killed(run, candidate, mode, broken=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((candidate.name, mode))
        return measure(run, candidate, mode, broken)

    monkeypatch.setattr(sweeps, "measure", killed)
    assert command(model_dir, folder, out) == 130
    kept = rows_of(out)
    assert len(kept) == 2 and len((out / "pareto.csv").read_text().splitlines()) == 3
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    first, done[:] = list(done), []
    monkeypatch.setattr(
        sweeps, "measure", lambda *a, **k: done.append((a[1].name, a[2])) or measure(*a, **k)
    )  # fmt: skip
    assert command(model_dir, folder, out) == 0
    assert not set(first) & set(done) and len(done) == 2
    again = {(row["mode"], row["name"]): row for row in rows_of(out)}
    for row in kept:  # what was measured is neither measured again nor changed
        assert {k: v for k, v in again[row["mode"], row["name"]].items() if "front" not in k} == {
            k: v for k, v in row.items() if "front" not in k
        }
    done.clear()
    assert command(model_dir, folder, out) == 0 and not done
    # A candidate that means something else now is measured again.
    monkeypatch.setattr(
        sweeps, "candidates", lambda which: [Candidate("coarse", "published", Recipe(3, iterations=0)), *TABLE[1:]]
    )
    assert command(model_dir, folder, out) == 0 and done == [("coarse", "inferred"), ("coarse", "random")]
    assert len(rows_of(out)) == 4
    capsys.readouterr()


def test_rows_that_cannot_be_compared_are_refused(tmp_path, folder, small, capsys):
    out, model_dir = tmp_path / "out", tmp_path / "model"
    tiny_pdae(TINY).save_pretrained(model_dir)
    assert command(model_dir, folder, out, "--only", "cached", "--no-plot", "--quiet") == 0
    before = (out / "metrics.json").read_bytes()
    other = tmp_path / "other"
    changed = tiny_pdae(TINY)
    with torch.no_grad():
        changed.decoder.shift_out[2].bias += 0.1
    changed.save_pretrained(other)
    for more, word in (
        (("--model", other), "model"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--limit", 2), "images"),
        (("--seed", 1), "seed"),
        (("--batch-size", 3), "batch_size"),
    ):
        assert command(model_dir, folder, out, *more, "--no-plot") == 2
        line = capsys.readouterr().err
        assert f"holds rows with {word} " in line and line.count("\n") == 1, line
    # The same names with other pixels, and the same model's name with other weights.
    picture = folder / "00.png"
    kept = picture.read_bytes()
    picture.write_bytes((folder / "01.png").read_bytes())
    try:
        assert command(model_dir, folder, out, "--no-plot") == 2
        assert "the images are not those of the rows" in capsys.readouterr().err
    finally:
        picture.write_bytes(kept)
    changed.save_pretrained(model_dir)
    assert command(model_dir, folder, out, "--no-plot") == 2
    assert "holds rows with weights" in capsys.readouterr().err
    assert (out / "metrics.json").read_bytes() == before
    (out / "metrics.json").write_text('{"steps": 3}')
    assert command(model_dir, folder, out, "--no-plot") == 2
    assert "is not one of this command" in capsys.readouterr().err


def test_a_setting_of_ones_own_and_the_listing(tmp_path, model_dir, folder, small, capsys):
    out = tmp_path / "out"
    more = ("--only", "cached", "--steps", 3, "--spacing", "quadratic", "--iterations", 0, "--no-plot")
    assert command(model_dir, folder, out, *more, "--list") == 0
    printed = capsys.readouterr().out
    assert "yours" in printed and "3 rows, 13 evaluations an image, 39 in all" in printed and not out.exists()
    assert command(model_dir, folder, out, *more) == 0
    yours = [row for row in rows_of(out) if row["name"] == "yours"]
    assert [(row["mode"], row["steps"], row["spacing"]) for row in yours] == [
        ("inferred", 3, "quadratic"),
        ("random", 3, "quadratic"),
    ]
    assert not (out / "pareto.png").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--only", "nothing-like-this"), "fits no candidate of this set; expected a family"),
        (("--set", "huge"), "invalid choice"),
        (("--limit", 0), "--limit must be at least 1"),
        (("--input", "no-such-folder"), "no such input"),
        (("--solver", "belm", "--iterations", 2), "cannot be combined"),
    ],
)
def test_bad_input_is_one_line(tmp_path, model_dir, folder, small, capsys, more, words):
    out = tmp_path / "out"
    try:
        status = command(model_dir, folder, out, *more)
    except SystemExit as stop:
        status = stop.code
    line = capsys.readouterr().err
    assert status == 2 and words in line and line.count("\n") == 1
    assert not out.exists()


def dominated(point, points):
    return any(
        other[0] <= point[0] and other[1] <= point[1] and (other[0] < point[0] or other[1] < point[1])
        for other in points
    )


def test_the_front_is_what_nothing_dominates():
    generator = random.Random(0)
    for count in (0, 1, 2, 5, 30):
        for _ in range(40):
            points = [(generator.randint(1, 8), generator.randint(1, 8)) for _ in range(count)]
            assert sweeps.front(points) == [not dominated(point, points) for point in points]
    assert sweeps.front([(1.0, float("nan")), (2.0, 1.0), (float("nan"), 0.0)]) == [False, True, False]
    for points in itertools.permutations([(1, 3), (2, 3), (1, 4), (3, 1)]):
        assert [p for p, on in zip(points, sweeps.front(points), strict=True) if on] == [
            p for p in points if p in ((1, 3), (3, 1))
        ]


def test_rows_are_marked_per_mode():
    rows = [
        {"mode": mode, "name": str(i), "evaluations": cost, "relative_seconds": -cost, "mse": loss}
        for mode in ("inferred", "random")
        for i, (cost, loss) in enumerate([(3, 1.0), (1, 2.0), (2, 3.0)])
    ]
    marked = sweeps.mark(rows)
    assert [(row["mode"], row["name"]) for row in marked] == [(m, n) for m in ("inferred", "random") for n in "120"]
    assert [row["front_evaluations"] for row in marked] == [True, False, True] * 2
    assert [row["front_seconds"] for row in marked] == [False, False, True] * 2
    assert "front_seconds" not in rows[0]


def test_the_table_of_settings():
    quick, standard, full = (candidates(which) for which in ("quick", "standard", "full"))
    assert set(quick) < set(standard) < set(full) and {s.family for s in quick} == set(FAMILIES) - {"spacing"}
    for table in (quick, standard, full):
        assert len({s.name for s in table}) == len(table)
    published = [s.recipe.steps for s in standard if s.family == "published" and s.recipe.encode_steps is None]
    assert len(set(published)) >= 16 and {s.family for s in standard} == set(FAMILIES)
    assert any(s.recipe.encode_steps == 1000 and s.recipe.steps == 100 for s in standard)
    pipe = Pipeline(tiny_pdae(TINY), steps=2, device="cpu")
    for candidate in full:  # every one can be built, and counts its evaluations
        assert all(candidate.evaluations(pipe, mode) >= 5 for mode in candidate.modes)
    assert {s.name for s in quick if s.family == "preset"} == {"default", *RECIPES} - {"published"}
    assert [s.name for s in select(full, "published")][0] == "published 5+5"
    assert {s.recipe.spacing for s in select(full, "*logsnr*")} == {"logsnr"}
    assert select(full, None) == full and len(select(full, "gradient:2")) == 3


def test_the_picture_holds_every_mode(tmp_path):
    rows = [
        {"mode": mode, "name": name, "family": family, "evaluations": cost, "relative_seconds": cost, "mse": 1 / cost}
        for mode in ("inferred", "random")
        for cost, (family, name) in enumerate([(f, f) for f in FAMILIES], start=1)
    ]
    draw(tmp_path / "two.png", rows, "two")
    draw(tmp_path / "one.png", [row for row in rows if row["mode"] == "random"], "one")
    from PIL import Image

    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.size[0] == one.size[0] and two.size[1] > 1.7 * one.size[1]
