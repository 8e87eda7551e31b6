"""From a run's JSON to markdown, plot and the committed table."""

import csv
import importlib.util
import json

import pytest

from bench import report, tables
from pdae_fast import cli
from pdae_fast.errors import UserError


def run(kind="cpu", **changes):
    machine = {"date": "2026-11-21T12:00:00Z", "commit": "abc1234567", "device": "A Chip, 2 threads", "kind": kind,
               "torch": "2.13.0", "triton": "none", "python": "3.11.7"}  # fmt: skip

    def step(contender, ratio, batch=1, **values):
        return {
            "network": "celeba64", "batch": batch, "contender": contender, "median_s": 0.5 / ratio,
            "spread_s": [0.1, 0.2], "ratio": ratio, "ratio_spread": [ratio - 0.1, ratio + 0.2],
            "images_per_s": 2 * ratio, "peak_fraction": 0.843, "memory_bytes": 1, "error": 3e-3, "rounds": 9, **values,
        }  # fmt: skip

    rows = [step("baseline", 1.0), step("fused-bfloat16", 2.478), step("compile-max-autotune", 1.9)]
    rows.append(step("fused-bfloat16", 2.31, batch=8))
    quality = [
        {"what": "bfloat16 against float32, fused plan", "images": 16, "steps": "100+100", "ssim_difference": 0.0006,
         "ratio_mse": 0.998},
        {"what": "float32 fused plan against the plain modules", "images": 4, "steps": "100", "error": 2.7e-7},
    ]  # fmt: skip
    return {"machine": machine | changes, "tables": {"step": rows, "quality": quality}}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run()))
    return path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_markdown(results):
    text = report.markdown(tables.load(results))
    lines = text.split("\n")
    assert lines[0] == "| network | batch | fused plan, bfloat16 | torch.compile, max-autotune |"
    assert lines[2] == "| celeba64 | 1 | **2.48×** (2.38-2.68), 84% | **1.90×** (1.80-2.10), 84% |"
    assert lines[3] == "| celeba64 | 8 | **2.31×** (2.21-2.51), 84% | - |"
    assert "A Chip, 2 threads, torch 2.13.0, 2026-11-21, commit abc1234567" in text
    assert "mean SSIM +0.0006, MSE x0.998 (16 images, 100+100 steps)" in text and "2.7e-07" in text


def test_appending_twice_adds_once(results, tmp_path):
    target = tmp_path / "results.csv"
    rows = report.csv_rows(tables.load(results))
    assert report.append(target, rows) == 3
    before = target.read_bytes()
    assert report.append(target, rows) == 0 and target.read_bytes() == before
    later = report.csv_rows((run(date="2026-11-22T12:00:00Z")["machine"], run()["tables"]))
    assert report.append(target, later) == 3
    assert target.read_bytes().startswith(before) and len(rows_of(target)) == 6
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_only_a_gpu_publishes_absolute_times():
    for kind, published in (("cpu", False), ("cuda", True)):
        values = run(kind)
        for row in report.csv_rows((values["machine"], values["tables"])):
            assert bool(row["median_ms"]) is bool(row["images_per_s"]) is published
            assert row["ratio"] and row["ratio_p20"] and row["peak_fraction"] == "0.843"


def test_the_command(results, tmp_path, capsys):
    target = tmp_path / "out.csv"
    report.main([str(results), "--csv", str(target), "--no-plot"])
    printed = capsys.readouterr().out
    assert "**2.48×**" in printed and "3 rows added" in printed and len(rows_of(target)) == 3
    report.main([str(results), "--csv", str(target), "--no-plot"])
    assert "0 rows added" in capsys.readouterr().out


def test_a_commit_can_be_named_where_there_was_no_git(tmp_path, capsys):
    path, target = tmp_path / "run.json", tmp_path / "out.csv"
    path.write_text(json.dumps(run(commit="unknown")))
    report.main([str(path), "--csv", str(target), "--no-plot", "--commit", "fedcba9876"])
    assert {row["commit"] for row in rows_of(target)} == {"fedcba9876"}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_plot(results, tmp_path):
    from PIL import Image

    target = tmp_path / "docs" / "speed.png"
    report.main([str(results), str(results), "--no-csv", "--plot", str(target)])
    with Image.open(target) as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_without_matplotlib_the_install_line(results, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "out.csv"
    arguments = [str(results), "--csv", str(target), "--plot", str(tmp_path / "speed.png")]
    assert cli.run(report.main, arguments) == 2
    assert "pip install 'pdae_fast[plot]'" in capsys.readouterr().err and not target.exists()


def test_the_newest_run_is_the_default(tmp_path):
    import os

    for i, name in enumerate(("b.json", "a.json")):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (i, i))
    assert report.newest(tmp_path).name == "a.json"
    with pytest.raises(UserError, match="no results"):
        report.newest(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {}}', '{"machine": {}, "tables": {"step": [1]}}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not the JSON file of a bench run"):
        tables.load(path)


def test_a_table_with_other_columns_is_left_alone(results, tmp_path):
    target = tmp_path / "results.csv"
    target.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        report.append(target, report.csv_rows(tables.load(results)))
    assert target.read_text() == "a,b\n1,2\n"


def test_rows_become_text():
    rows = tables.ResultTables()
    rows.add("step", network="celeba64", median_s=0.01234, spread_s=[0.01, 0.02], ratio=2.5, images_per_s=81.0)
    rows.add("step", network="ffhq128", ratio=None, peak_fraction=0.5, memory_bytes=3 << 20, error=1.5e-7)
    ((title, text),) = rows.sections()
    assert title == tables.TITLES["step"]
    header, first, second = text.split("\n")
    assert " ".join(header.split()) == "network ms p20-p80 ms ratio images/s of matmul peak memory error"
    assert first.split() == ["celeba64", "12.34", "10-20", "2.50x", "81", "-", "-", "-"]
    assert second.split() == ["ffhq128", "-", "-", "-", "-", "50%", "3.0", "MiB", "1.5e-07"]


def test_a_run_is_saved_with_its_machine(tmp_path):
    rows = tables.ResultTables()
    rows.add("deploy", backend="onnx", total_s=float("nan"))
    rows.save(tmp_path / "new" / "run.json", {"device": "A Chip"})
    assert tables.load(tmp_path / "new" / "run.json") == (
        {"device": "A Chip"},
        {"deploy": [{"backend": "onnx", "total_s": None}]},
    )
