"""The comparison of students: its intervals, its read-outs, and the command on bundled data."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import needs_sklearn
from pdae_fast import UserError, cli
from pdae_fast.experiments import student_results, students
from pdae_fast.experiments.student_results import Results, paired

pytestmark = needs_sklearn


def run(*argv):
    return cli.run(students.main, [str(a) for a in argv])


def test_the_interval_is_that_of_paired_differences():
    from scipy import stats

    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 5)) + [[0.3], [0]]
    mean, half = paired(dict(enumerate(a)), {**dict(enumerate(b)), 9: 100.0})
    known = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((known.low, known.high)) and mean == pytest.approx(
        (a - b).mean()
    )
    assert paired({1: 2.0}, {1: 1.5}) == (0.5, None)


def test_results_survive_a_kill_and_know_their_settings(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path, {"steps": 3})
    results.add(("points", 20, "0", "tuned", 0), 1.5)
    results.add(("points", 20, "0", "tuned", 1), 2.5)
    path.write_text(path.read_text() + '["points", 20, "0", "tu')
    again = Results(path, {"steps": 3})
    assert again.of("points", 20, "0", "tuned") == {0: 1.5, 1: 2.5}
    again.add(("points", 20, "0", "tuned", 2), 3.5)
    assert Results(path, {"steps": 3}).of("points", 20, "0", "tuned") == {0: 1.5, 1: 2.5, 2: 3.5}
    with pytest.raises(UserError, match="results of other settings"):
        Results(path, {"steps": 4})


def test_arms_that_are_better_gain_whatever_is_measured():
    class Args:
        task, labels, full = ["points", "classes"], [10], False

    results = Results.__new__(Results)
    results.found = {}
    for seed in range(3):
        for task, values in (("points", (2.0, 1.5)), ("classes", (0.5, 0.75))):
            for arm, value in zip(("scratch", "0"), values, strict=True):
                results.found[task, 10, arm, "tuned", seed] = value + seed / 10
    found = student_results.rows(results, Args, ["scratch", "0"])
    gains = {row["task"]: row["gain over scratch"] for row in found if row["arm"] == "0"}
    assert gains == pytest.approx({"points": 0.5, "classes": 0.25})
    assert all(row["interval over scratch"] == pytest.approx(0, abs=1e-9) for row in found if row["arm"] == "0")
    assert "+0.500 ± 0.000" in student_results.table(found)


@pytest.mark.slow
def test_the_command_compares_goes_on_and_draws(tmp_path, capsys):
    out = tmp_path / "out"
    short = (
        "--steps",
        2,
        "--tune-steps",
        2,
        "--seeds",
        1,
        "--limit",
        40,
        "--width",
        8,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert run("--task", "points", "parts", "--arms", "scratch", "0", "pixels", *short) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "metrics.json").read_text())
    arms = {(row["task"], row["arm"], row["way"]) for row in report["rows"]}
    expected = {(arm, way) for arm in ("scratch", "0", "pixels") for way in ("tuned", "frozen")} | {
        ("teacher", "frozen")
    }
    assert arms == {(task, *pair) for task in ("points", "parts") for pair in expected}
    assert "over scratch" in printed and "of the teacher's" in printed and report["cost"]["points"]["share"] > 0
    with Image.open(out / "students.png") as picture:
        assert picture.size[0] > 1000
    # What is finished is not done again, and a new arm is added to it.
    before, start = (out / "results.jsonl").read_text(), time.perf_counter()
    assert run("--task", "points", "parts", "--arms", "scratch", "0", "pixels", *short, "--quiet") == 0
    assert (out / "results.jsonl").read_text() == before and time.perf_counter() - start < 60
    assert run("--task", "points", "--arms", "policy", *short, "--quiet") == 0
    report = json.loads((out / "metrics.json").read_text())
    (policy,) = report["policies"]
    assert policy["labels"] == 20 and sum(policy["probability"].values()) == pytest.approx(1)


def test_mistakes_are_said_before_anything_is_learned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(students, "run_task", lambda *a: pytest.fail("too late"))
    for options, message in (
        (("--task", "points", "--labels", 301), "--labels must be from 1 to the 300 images"),
        (("--task", "classes", "--labels", 1), "all of one class"),
        (("--task", "points", "--input", "bundled:fashion"), "not a folder of avatars"),
        (("--task", "classes", "--model", "avatars64"), "these images have no classes"),
        (("--seeds", 0), "--seeds must be at least 1"),
        (("--input", tmp_path / "nowhere"), "no such input"),
    ):
        assert run(*options, "--out", tmp_path / "out") == 2, options
        assert message in capsys.readouterr().err, options
    assert not (tmp_path / "out").exists()


def test_a_frozen_read_out_is_linear_in_the_maps():
    """Points that are a linear function of the deepest map are read without error, from unseen images too."""
    random = torch.Generator().manual_seed(0)
    maps, weights = torch.randn(300, 3, 2, 2, generator=random), torch.randn(12, 4, generator=random)
    points = (maps.flatten(1) @ weights).unflatten(1, (2, 2)) + 30

    class Task:
        name, truth = "points", None

    Task.truth = students.TaskTruth("points", ["a", "b"], points[200:], np.arange(100))
    known = Task.truth._replace(values=points[:200])
    assert students.read(Task, [maps[:200]], known, [maps[200:]], 0) < 0.01
