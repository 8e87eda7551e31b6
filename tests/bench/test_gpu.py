"""The visit to a GPU: phases that fail or die, what the report says of them, and all of it on the CPU, tiny."""

import csv
import dataclasses
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import budget, tables
from bench.gpu import __main__ as visit
from bench.gpu import compiling, kernel_tests, opponent, paths, phase, profile, side, speed, summary
from bench.gpu.cases import CaseLog, Context, NotHere, run_cases
from bench.gpu.phase import PHASES
from bench.networks import TINY
from fake_cuda import FakeCuda
from pdae_fast import cli
from pdae_fast.engine.cost import network_costs

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def context(out, seconds=60.0):
    return Context(out, CPU, True, time.time() + seconds, ("tiny",), (1, 2))


def statuses(journal, phase):
    return [(r["case"], r["status"]) for r in journal.rows(phase)]


def test_a_failing_case_stops_no_other(tmp_path):
    def skipped():
        raise NotHere("nothing to do")

    cases = [
        ("good", lambda: {"error": 0.5}),
        ("bad", lambda: 1 / 0),
        ("two rows", lambda: [{"status": "FAIL", "n": 1}, {"status": "INFO", "n": 2}]),
        ("skipped", skipped),
        ("nothing", lambda: None),
    ]
    assert run_cases("p", cases, context(tmp_path)) == 0
    journal = CaseLog(tmp_path)
    assert statuses(journal, "p") == [
        ("good", "PASS"), ("bad", "FAIL"), ("two rows", "FAIL"), ("two rows", "INFO"), ("skipped", "SKIP"),
        ("nothing", "PASS"),
    ]  # fmt: skip
    failures = (tmp_path / "failures.txt").read_text()
    assert "=== p: bad" in failures and "ZeroDivisionError" in failures and "Traceback" in failures


def test_cases_run_once_and_only_while_there_is_time(tmp_path):
    calls = []
    cases = [(name, lambda name=name: calls.append(name)) for name in "ab"]
    run_cases("p", cases[:1], context(tmp_path))
    run_cases("p", cases, context(tmp_path))
    assert calls == ["a", "b"]
    run_cases("late", cases, context(tmp_path, seconds=-1))
    assert calls == ["a", "b"] and {s for _, s in statuses(CaseLog(tmp_path), "late")} == {"SKIP"}


def test_a_broken_device_ends_the_process_but_not_the_phase(tmp_path, monkeypatch):
    from bench.gpu import cases

    monkeypatch.setattr(cases, "_device_broken", lambda device: True)
    assert run_cases("p", [("bad", lambda: 1 / 0), ("next", lambda: None)], context(tmp_path)) == cases.DEVICE_BROKEN
    assert CaseLog(tmp_path).started("p") == {"bad"}


# A phase as its parent sees it, without the imports of a real one: lines in the journal, and an end.
DYING = """
import json, os, sys, time
phase, path = sys.argv[1], sys.argv[3] + "/rows.jsonl"
if phase == "stillborn":
    os._exit(7)
lines = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
done = {line["case"] for line in lines if line["phase"] == phase}
actions = {"first": int, "dies": lambda: os._exit(11), "sleeps": lambda: time.sleep(60), "second": int}
for case in {"dies": ("first", "dies", "second"), "hangs": ("first", "sleeps")}[phase]:
    for status in ("START", "PASS") if case not in done else ():
        with open(path, "a") as file:
            file.write(json.dumps({"phase": phase, "case": case, "status": status}) + chr(10))
        if status == "START":
            actions[case]()
"""


def test_a_process_that_dies_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "dying_phase.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    journal = CaseLog(tmp_path)
    options = ["--out", str(tmp_path)]
    visit.run_phase("dies", options, 60, journal, "dying_phase")
    assert statuses(journal, "dies") == [("first", "PASS"), ("dies", "FAIL"), ("second", "PASS")]
    visit.run_phase("stillborn", options, 60, journal, "dying_phase")
    assert statuses(journal, "stillborn") == [("(process)", "FAIL")]
    visit.run_phase("late", options, 0, journal, "dying_phase")
    assert statuses(journal, "late") == [("(rest)", "SKIP")]
    assert "ended its process (11)" in (tmp_path / "failures.txt").read_text()


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "dying_phase.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(visit, "GRACE", 0.1)
    journal, start = CaseLog(tmp_path), time.time()
    visit.run_phase("hangs", ["--out", str(tmp_path)], 5, journal, "dying_phase")
    assert time.time() - start < 30
    assert statuses(journal, "hangs") == [("first", "PASS"), ("sleeps", "FAIL")]
    assert "still running" in (tmp_path / "failures.txt").read_text()


def test_a_line_cut_off_is_ignored(tmp_path):
    journal = CaseLog(tmp_path)
    journal.write("p", "a", "PASS")
    with open(journal.path, "a") as file:
        file.write('{"phase": "p", "ca')
    assert len(journal.rows()) == 1


def fabricated(ratio=12.0, fp8=7.0, compiled=1.0, peak=0.6, ssim=0.001, failures=0, training=5.0):
    """Rows as a visit to a GPU leaves them."""
    rows = [{"phase": "environment", "case": "versions", "status": "INFO", "device": "A GPU", "torch": "2.11.0"}]
    for network in ("celeba64", "ffhq128"):
        for batch in (1, 8, 64):
            sides = {"baseline": 1.0, "fused-bfloat16": ratio, "fused-bfloat16-fp8": fp8}
            for contender, factor in sides.items():
                if contender.endswith("fp8") and batch != 64:
                    continue
                rows.append({
                    "phase": "speed", "case": f"{network} batch {batch}", "status": "INFO", "table": "step",
                    "network": network, "batch": batch, "contender": contender, "median_s": 0.1 / factor,
                    "spread_s": [0.1, 0.2], "ratio": factor, "ratio_spread": [factor, factor], "images_per_s": 10.0,
                    "peak_fraction": peak, "memory_bytes": 1 << 30, "error": 1e-3,
                })  # fmt: skip
            for contender, seconds in (("compile-max-autotune", 1.5 / compiled), ("fused-bfloat16", 1.0)):
                rows.append({**rows[-1], "phase": "compile", "table": "compiled", "contender": contender,
                             "median_s": seconds})  # fmt: skip
    rows.append({
        "phase": "quality", "case": "bfloat16", "status": "PASS", "table": "quality", "what": "bfloat16",
        "steps": "100+100", "ssim_difference": ssim, "ratio_mse": 1.01,
    })  # fmt: skip
    rows.append({
        "phase": "quality", "case": "plan", "status": "PASS", "table": "quality", "what": "float32", "steps": "100",
        "error": 1e-6, "seconds": 1.5,
    })  # fmt: skip
    rows += [
        {
            "phase": "training", "case": "celeba64", "status": "INFO", "table": "training", "network": "celeba64",
            "batch": 128, "contender": contender, "median_s": 0.1, "ratio": found, "ratio_spread": [found, found],
            "images_per_s": 10.0, "memory_bytes": 1 << 30, "error_losses": 1e-3,
        }
        for contender, found in (("baseline", 1.0), ("bfloat16", training / 2), ("bfloat16 fast", training))
    ]  # fmt: skip
    rows += [{"phase": "kernels", "case": f"k{i}", "status": "PASS", "error": 1e-7} for i in range(3)]
    rows += [
        {"phase": "paths", "case": f"p{i}" * 30, "status": "FAIL", "error": 1.0, "allowed": 1e-4}
        for i in range(failures)
    ]
    rows.append({"phase": "paths", "case": "p", "status": "PASS"})
    return rows


def verdicts(rows):
    return [holds for _, holds in summary.bars(rows, summary.collect(rows))]


def test_bars():
    assert set(verdicts(fabricated())) == {True}
    assert set(verdicts([])) == {None}
    rows = fabricated(ratio=8.0)
    assert [what for what, holds in summary.bars(rows, summary.collect(rows)) if not holds] == [
        f"{network} batch 1: fused-bfloat16 >= 10x the baseline: 8.00x" for network in ("celeba64", "ffhq128")
    ]
    assert verdicts(fabricated(ratio=3.9)).count(False) == 4 and verdicts(fabricated(fp8=5.9)).count(False) == 2
    assert set(verdicts(fabricated(compiled=1.2))) == {True}  # 1.5 / 1.2 = 1.25
    assert verdicts(fabricated(compiled=1.3)).count(False) == 6  # 1.15, at every batch size
    assert verdicts(fabricated(peak=0.54)).count(False) == 1
    assert verdicts(fabricated(training=3.9)).count(False) == 1
    assert verdicts(fabricated(ssim=-0.003)).count(False) == 1
    assert verdicts(fabricated(failures=2)).count(False) == 1


def test_the_report_fits_and_ends_with_the_bars(tmp_path):
    rows = fabricated(failures=400)
    rows += [{**row, "network": f"net{i}"} for row in rows if row.get("table") == "step" for i in range(30)]
    journal = CaseLog(tmp_path)
    for row in rows:
        values = {k: v for k, v in row.items() if k not in ("phase", "case", "status")}
        journal.write(row["phase"], row["case"], row["status"], **values)
    text = summary.write(tmp_path, journal, ["environment", "speed", "kernels", "paths"], CPU)
    assert len(text) <= summary.LONGEST and text.endswith(
        "FAIL every path agrees with float32: 1 passed, 400 failed, 0 skipped"
    )
    assert "and 386 more" in text and "(cut:" in text
    assert text + "\n" == (tmp_path / "report.txt").read_text()
    with open(tmp_path / "rows.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    _, found = tables.load(tmp_path / "results.json")
    contenders = {row["contender"] for row in found["step"]}
    assert contenders == {"baseline", "fused-bfloat16", "fused-bfloat16-fp8", "compile-max-autotune"}


def reported(path, rows):
    """The report of these rows, by way of the journal."""
    path.mkdir()
    journal = CaseLog(path)
    for row in rows:
        values = {k: v for k, v in row.items() if k not in ("phase", "case", "status")}
        journal.write(row["phase"], row["case"], row["status"], **values)
    return summary.write(path, journal, list(PHASES), CPU)


# What bars are made of: (the row that has it, its value).
JUDGED = (
    ({"contender": "fused-bfloat16", "table": "step", "batch": 64, "network": "ffhq128"}, "ratio"),
    ({"contender": "fused-bfloat16", "table": "step", "batch": 64, "network": "ffhq128"}, "peak_fraction"),
    ({"contender": "fused-bfloat16-fp8", "table": "step"}, "ratio"),
    ({"contender": "fused-bfloat16", "table": "compiled"}, "median_s"),
    ({"contender": "compile-max-autotune", "table": "compiled"}, "median_s"),
    ({"table": "quality", "what": "bfloat16"}, "ssim_difference"),
    ({"table": "quality", "what": "bfloat16"}, "ratio_mse"),
    ({"table": "quality", "what": "float32"}, "error"),
)


def test_a_number_that_is_none_holds_for_nothing_and_loses_no_report(tmp_path, monkeypatch):
    """Every number of every row in turn, and of sides that were measured alone."""
    monkeypatch.setattr(summary, "describe", lambda device: {})  # asks git and the driver
    alone = [row for row in fabricated() if row.get("table") == "step"]
    alone = [{k: v for k, v in row.items() if not k.startswith("ratio")} for row in alone]
    whole, tried = fabricated(), 0
    assert "\nFAIL" not in reported(tmp_path / "whole", whole)
    for rows in (whole, alone):
        for i, row in enumerate(rows):
            for name, value in row.items():
                if isinstance(value, list):
                    broken = [[float("nan"), value[1]], [value[0], float("nan")]]
                else:
                    broken = [float("nan")] if isinstance(value, (int, float)) else []
                for changed in broken:
                    tried += 1
                    found = [*rows[:i], {**row, name: changed}, *rows[i + 1 :]]
                    text = reported(tmp_path / str(tried), found)
                    assert "cannot be read" not in text
                    judged = any(name == value and wanted.items() <= row.items() for wanted, value in JUDGED)
                    assert "\nFAIL" in text or not judged or rows is alone
    assert tried > 200


def test_a_row_unlike_all_others_loses_no_report(tmp_path):
    """Such as one of the steps that does not say of which network."""
    row = {"phase": "bars", "case": "odd", "status": "INFO", "table": "step", "contender": "baseline", "median_s": 1.0}
    text = reported(tmp_path / "out", [*fabricated(), row])
    assert text.endswith("FAIL the tables cannot be read: KeyError: 'network'")
    assert "PASS every path agrees" in text and (tmp_path / "out" / "report.txt").exists()


def test_memory_is_poisoned_and_put_back():
    with kernel_tests.poisoned_memory():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_kernel_and_a_wrong_gradient_fail(tmp_path):
    operation = next(iter(kernel_tests.operations(1, torch.float32, tiny=True)))
    assert kernel_tests._check(operation, context(tmp_path))["status"] == "PASS"
    wrong = dataclasses.replace(operation, ours=lambda **values: operation.ours(**values) * 1.001)
    assert kernel_tests._check(wrong, context(tmp_path))["status"] == "FAIL"
    assert {r["status"] for r in kernel_tests._gradients(operation, context(tmp_path))} == {"PASS"}
    assert "FAIL" in {r["status"] for r in kernel_tests._gradients(wrong, context(tmp_path))}


def test_a_wrong_path_fails(tmp_path, monkeypatch):
    cases = dict(paths.cases(context(tmp_path)))
    assert cases["tiny batch 3 float32: fused"]()["status"] == "PASS"
    build = paths.build_plan

    def wrong(model, device, dtype, name, **keywords):
        plan = build(model, device, dtype, name, **keywords)
        if name == "fused":
            field = plan.field
            plan.field = lambda *z: lambda x, t, g: field(*z)(x * 1.01, t, g)
        return plan

    monkeypatch.setattr(paths, "build_plan", wrong)
    for name in (
        "tiny batch 3 float32: fused",
        "tiny decode 4 steps, float32",
        "tiny trajectory mixture",
        "tiny same plan, other z, other steps",
    ):
        assert cases[name]()["status"] == "FAIL"


def test_stacked_decoders_may_round_as_the_modules_do(tmp_path, monkeypatch):
    """eps with G and without are two computations there, whose difference is rounding; more of it is a failure."""
    monkeypatch.setattr(paths, "TIMES", paths.TIMES[:1])
    case = ("tiny", 1, context(tmp_path), "bfloat16", "fused", {"options": budget.ON_A_GPU})
    assert paths._evaluation(*case)["status"] == "PASS"
    build = paths.build_plan

    def wrong(*arguments, **keywords):
        plan = build(*arguments, **keywords)
        field = plan.field
        plan.field = lambda z: lambda x, t, g: tuple(v if g or v is None else 1.1 * v for v in field(z)(x, t, g))
        return plan

    monkeypatch.setattr(paths, "build_plan", wrong)
    assert paths._evaluation(*case)["status"] == "FAIL"


def test_a_used_folder_and_a_missing_gpu_are_refused(tmp_path):
    CaseLog(tmp_path).write("p", "a", "PASS")
    with pytest.raises(cli.UserError, match="already holds a visit"):
        visit.main(["--out", str(tmp_path), "--device", "cpu"])
    if not torch.cuda.is_available():
        with pytest.raises(cli.UserError, match="use --device cpu"):
            visit.main(["--out", str(tmp_path / "new")])


# -- sides and opponents in processes of their own ---------------------------------------------------------------------


def test_sides_that_were_measured_alone_get_their_ratio():
    rows = [
        {"phase": "bars", "case": name, "status": "INFO", "table": "step", "network": network, "batch": 64,
         "contender": name, "median_s": seconds, "spread_s": [seconds, 2 * seconds], "peak_fraction": 0.6}
        for network, name, seconds in (
            ("celeba64", "baseline", 1.0), ("celeba64", "fused-bfloat16", 0.1), ("ffhq128", "fused-bfloat16", 0.1),
        )
    ]  # fmt: skip
    found = summary.collect(rows)
    ours = {r["network"]: r for r in found["step"] if r["contender"] == "fused-bfloat16"}
    assert ours["celeba64"]["ratio"] == 10 and ours["celeba64"]["ratio_spread"] == [5, 20]
    assert "ratio" not in ours["ffhq128"]  # killed before its baseline: the row still counts
    bars = {what.split(":")[0]: (what, holds) for what, holds in summary.bars(rows, found) if "x the base" in what}
    assert bars["celeba64 batch 64"][1] and bars["ffhq128 batch 64"][1] is None
    # They are the last word, also beside rows of sides that took turns; and torch.compile is held against them.
    turns = {**rows[1], "phase": "speed", "ratio": 2.0, "ratio_spread": [2, 2]}
    compiled = {**rows[0], "phase": "compile", "table": "compiled", "contender": "compile-x", "median_s": 0.2}
    rows = [*rows, turns, {**compiled, "ratio": 5.0}]
    said = [what for what, _ in summary.bars(rows, summary.collect(rows)) if what.startswith("celeba64 batch 64")]
    assert "10.00x" in said[0] and "2.00x" in said[1]


def test_the_bars_have_a_side_in_fp8(tmp_path):
    """Of the largest batch, with scales of one step; here its plan computes with rounded values."""
    cases = dict(side.cases(context(tmp_path)))
    assert list(cases)[-1] == "tiny batch 2: fused-bfloat16-fp8" and len(cases) == 5
    with pytest.raises(NotHere, match="no GPU"):
        cases["tiny batch 2: fused-bfloat16-fp8"]()
    row = side.measure_alone("tiny", 2, "fused-bfloat16-fp8", CPU, 2, 0.1)
    assert row["contender"] == "fused-bfloat16-fp8" and "convolutions of rounded values" in row["fp8"]
    assert side.measure_alone("tiny", 2, "fused-bfloat16", CPU, 2, 0.1)["error"] < row["error"] < 0.2


OPPONENT = """
import json, os, pathlib, sys, time
out, go, how = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
if how == "dies":
    sys.exit(5)
if how == "slow":
    time.sleep(60)
if how != "at once":
    go.with_suffix(".part").write_text(str(os.getpid()))
    go.with_suffix(".part").rename(go.with_suffix(".ready"))
    while not go.exists():
        time.sleep(0.01)
if how == "hangs":
    time.sleep(60)
rows = [{"contender": name, "median_s": s} for name, s in (("baseline", 6.0), ("compile-max-autotune", 2.0))]
out.with_suffix(".part").write_text(json.dumps({"rows": rows, "how": how}))
out.with_suffix(".part").rename(out)
"""


@pytest.fixture
def opponents(tmp_path, monkeypatch):
    """The early opponents of batch sizes 8 and 1 that behave as they are told, and how a case is timed."""
    monkeypatch.setattr(opponent, "TIMING_SECONDS", 1.0)
    monkeypatch.setattr(opponent, "FALLBACK_SECONDS", 1.0)
    monkeypatch.setattr(opponent, "LEAST_SECONDS", 1.0)
    own, started = Context(tmp_path, CPU, False, time.time() + 60, ("tiny",), (1, 8)), []

    def start(**how):
        def command(network, batch, mode, context, *options):
            path = opponent._result(tmp_path, network, batch)
            early = options[:1] == ("--wait-for",)
            assert mode == ("max-autotune" if early else "reduce-overhead")
            behaviour = how[f"batch{batch}"] if early else "at once"
            return [sys.executable, "-c", OPPONENT, str(path), str(path.with_suffix(".go")), behaviour]

        def ours(network, batch, name, context):
            working = [p for p in early.running.values() if p.poll() is None]
            return {"status": "INFO", "table": "step", "contender": name, "median_s": 1.0, "beside": len(working)}

        early = opponent.Early(own, command)
        started.append(early)
        return early, lambda batch: opponent.compile_case("tiny", batch, own, command, ours)

    yield own, start
    for early in started:
        early.end()
    assert not list(tmp_path.glob(".compiled-*"))


def test_all_opponents_compile_early_and_each_is_timed_beside_ours(opponents):
    own, start = opponents
    early, timed = start(batch8="waits", batch1="waits")
    assert len(early.running) == 2
    early.settle(time.time() + 60)
    assert not list(own.out.glob("*.json"))  # nothing is timed before its phase
    for batch in (8, 1):
        rows = timed(batch)
        assert [r["contender"] for r in rows] == ["baseline", "compile-max-autotune", "fused-bfloat16"]
        assert rows[2]["ratio"] == 6 and {r["table"] for r in rows} == {"compiled"} and rows[0]["note"] is None


def test_an_opponent_that_compiles_too_long_is_stopped_before_anything_is_timed(opponents):
    own, start = opponents
    early, timed = start(batch8="slow", batch1="waits")
    processes = list(early.running.values())
    while not opponent._ready(opponent._result(own.out, "tiny", 1)).exists():
        time.sleep(0.01)
    early.settle(time.time() + 1.5)
    assert processes[0].poll() == -signal.SIGKILL and processes[1].poll() is None
    # Those that are compiled come first; the other one gets what is left, in a mode that compiles faster.
    assert list(dict(opponent.cases(own))) == ["tiny batch 1", "tiny batch 8"]
    assert timed(1)[2]["beside"] <= 1
    found = timed(8)
    assert found[0]["note"].startswith("max-autotune did not compile in") and found[2]["beside"] == 0


def test_an_opponent_that_is_broken_goes_on_beside_no_other(opponents, monkeypatch):
    monkeypatch.setattr(opponent, "MOST_TIMING_SECONDS", 0.5)
    own, start = opponents
    early, timed = start(batch8="dies", batch1="hangs")
    processes = list(early.running.values())
    early.settle(time.time() + 60)
    with pytest.raises(RuntimeError, match="ended with 5"):
        timed(8)
    with pytest.raises(TimeoutError):
        timed(1)
    assert processes[1].wait(10) == -signal.SIGKILL


def test_rows_of_the_opponent_count_where_ours_fails(opponents):
    own, start = opponents
    early, _ = start(batch8="waits", batch1="waits")
    early.settle(time.time() + 60)
    assert len(opponent.compile_case("tiny", 8, own, None, lambda *_: 1 / 0)) == 2
    assert statuses(CaseLog(own.out), "compile") == [("tiny batch 8: fused-bfloat16", "FAIL")]


def test_the_compiled_step_waits_until_it_may_be_timed(tmp_path, monkeypatch):
    """bench.compiled itself: ready when compiled, by its process id, and no rows before it is told to go."""
    from bench import compiled

    go, seen = tmp_path / "x.go", []

    def sleep(seconds):
        seen.append(go.with_suffix(compiled.READY).read_text())
        go.touch()

    monkeypatch.setattr(compiled.time, "sleep", sleep)
    compiled.wait_for(go)
    assert seen == [str(os.getpid())]


def test_the_compiled_step_runs_on_a_device_with_an_index(monkeypatch):
    """set_device refuses one without."""
    from bench import compiled

    FakeCuda(monkeypatch)
    given = []

    def case(network, batch, device):
        given.append((device, torch.cuda.current_device()))
        raise NotHere("no such device here")

    monkeypatch.setattr(compiled, "case", case)
    with pytest.raises(NotHere):
        compiled.main(["--network", "tiny", "--device", "cuda"])
    assert given == [(torch.device("cuda", 0), 0)]


def test_what_was_skipped_is_tried_again_where_it_is_asked_for(tmp_path, monkeypatch):
    journal = CaseLog(tmp_path)
    for case, status in (("a", "PASS"), ("b", "SKIP"), ("(rest)", "SKIP"), ("c", "FAIL")):
        journal.write("compile", case, "START")
        journal.write("compile", case, status)
    journal.write("kernels", "b", "SKIP")
    started = []
    monkeypatch.setattr(visit, "run_phase", lambda *_, **__: started.append(journal.started("compile")))
    visit.main(["--out", str(tmp_path), "--device", "cpu", "--only", "compile"])
    assert started == [{"a", "c"}] and journal.started("kernels") == {"b"}
    assert statuses(journal, "compile") == [("a", "PASS"), ("c", "FAIL")]


@pytest.mark.parametrize("only", [("--part", "1"), ("--only", "compile")])
def test_opponents_start_when_nothing_is_timed_before_them(tmp_path, monkeypatch, only):
    events = []

    class Early:
        def __init__(self, context):
            events.append("early")

        def look(self):
            pass

        def settle(self, end, look):
            events.append("settled")

        def end(self):
            events.append("ended")

    monkeypatch.setattr(opponent, "Early", Early)
    monkeypatch.setattr(visit, "run_phase", lambda name, *_, **__: events.append(name))
    # Not a quick visit, though it is on the CPU.
    monkeypatch.setattr("pdae_fast.engine.resolve_device", lambda device: torch.device("cuda:0"))
    monkeypatch.setattr(summary, "describe", lambda device: {})
    visit.main(["--out", str(tmp_path), *only])
    before = ["environment", "prepare", "bars"] if only[0] == "--part" else ["environment"]
    between = ["prepare-more", "kernels", "quality"] if only[0] == "--part" else []
    assert events[:-1] == [*before, "early", *between, "settled", "compile", "ended"]


# -- what the kernels' own tests, the compiler and the profiler say ----------------------------------------------------


def test_the_kernels_tests_count_as_far_as_they_came(tmp_path):
    lines = [
        {"test": "tests/kernels/test_a.py::one", "outcome": "passed"},
        {"test": "tests/kernels/test_a.py::two", "outcome": "skipped"},
        {"test": "tests/kernels/test_b.py::three", "outcome": "failed", "message": "a\nE  assert 1 == 2"},
    ]
    (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "tests/ker')
    (tmp_path / "0.log").write_text("the end of a log")
    journal = CaseLog(tmp_path)
    found = kernel_tests.outcomes(("test_a.py", "test_b.py", "test_c.py"), tmp_path, True, journal)
    assert [row["status"] for row in found] == ["PASS", "FAIL", "FAIL"]
    assert found[0]["reason"] == "test_a.py: 1 passed, 0 failed, 1 skipped; the time was up"
    assert [r["reason"] for r in journal.rows()] == ["E assert 1 == 2", "no test of it ended"]
    assert "the end of a log" in (tmp_path / "failures.txt").read_text()


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_all_kernels_of_a_step_are_compiled_before(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    ((_, case),) = compiling.first(dataclasses.replace(context(tmp_path), batches=(1,)))
    found = case()
    assert found["arch"] == "sm_90" and found["kernels"] > 10 and found["workers"] == 1 and found["left"] == "none"


@needs_triton
def test_kernels_that_there_is_no_time_for_are_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "SPARED", 60.0)
    found = compiling.prepare([compiling.Step("tiny", 1, "float32")], context(tmp_path))
    assert found["kernels"] == 0 and found["left"].startswith("some")


def compiled_kinds(steps, processors=132):
    return {compiling.kind(launch) for launch in compiling.launches(steps, processors)}


@needs_triton
def test_what_the_other_phases_launch_is_compiled_before(tmp_path):
    """The phase of precision, whose model is neither that of the bars nor in their dtype, and a checked path."""
    visit = dataclasses.replace(context(tmp_path), networks=("celeba64", "ffhq128"), batches=(1, 8, 64))
    assert list(map(str, compiling.bars(visit)))[:2] == ["celeba64:64:bfloat16:True", "ffhq128:64:bfloat16:True"]
    first, second, both = (compiled_kinds(of(visit)) for of in (compiling.bars, compiling.others, compiling.all_steps))

    def launched(network, dtype, batch, gradient, codes=1):
        found, plan = [], compiling._plan(network, dtype)
        with torch.inference_mode(), budget.cuda_functions(found.extend):
            trajectory = budget.meta_trajectory(plan, batch, codes=codes)
            trajectory._step(trajectory.workloads[0])
            compiling._evaluate(plan, batch, gradient)
            compiling._evaluate(plan, 1, True)  # as every plan is compared with its modules
        return {compiling.kind(launch) for launch in found}

    for dtype in ("float32", "bfloat16", "float16"):
        assert launched("fashion32", dtype, 16, True) <= second
    assert launched("fashion32", "float32", 2, True) <= second  # the plan against the modules
    for network in ("tiny", "fashion32", "celeba64"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert launched(network, dtype, 5, False) <= both
    assert launched("tiny", "float32", 2, False, None) <= both
    for network in visit.networks:
        coded = launched(network, "bfloat16-fp8", 64, True)
        assert "conv_float8_kernel" in {name for name, *_ in coded} and coded <= first
        assert launched(network, "float16", 64, True) | launched(network, "float32", 8, True) <= both


# Kernels of a step where every module of the kernels was told the number of multiprocessors before it was imported.
CHIPS = """
import importlib.util, json, sys
from bench import ROOT  # makes pdae_fast.kernels the checkout's
spec = importlib.util.spec_from_file_location("pdae_fast.kernels._launch", ROOT / "kernels" / "_launch.py")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
chip = [0]
module.processors = lambda device: chip[0]
import torch
from bench import budget
from bench.gpu import compiling
answer = {}
for chip[0] in map(int, sys.argv[1:]):
    found = []
    plan = budget.meta_plan(budget.empty_model("fashion32"), torch.bfloat16)
    with torch.inference_mode(), budget.cuda_functions(found.extend):
        for batch in (1, 16):
            trajectory = budget.meta_trajectory(plan, batch)
            trajectory._step(trajectory.workloads[0])
    answer[chip[0]] = sorted({repr(compiling.kind(launch)) for launch in found})
print(json.dumps(answer))
"""


@needs_triton
def test_kernels_are_compiled_for_the_chip_that_is_there():
    """Their splits follow its multiprocessors: those of an A100, a GH200's share, an H100 or H200, a B200."""
    chips = ("108", "114", "132", "148")
    done = subprocess.run([sys.executable, "-c", CHIPS, *chips], cwd=ROOT, capture_output=True, text=True, check=True)
    launched = {int(chip): set(kinds) for chip, kinds in json.loads(done.stdout).items()}
    steps = [compiling.Step("fashion32", batch, "bfloat16") for batch in (1, 16)]
    for chip, kinds in launched.items():
        assert kinds <= {repr(kind) for kind in compiled_kinds(steps, chip)}
    assert launched[108] != launched[148]


def test_the_profile_has_every_convolution(tmp_path):
    cases = dict(profile.cases(context(tmp_path)))
    assert list(cases) == ["convolutions of tiny batch 2", "tiny batch 2", "tiny batch 1"]
    rows = cases["tiny batch 1"]()
    assert rows[0]["kernel"] == "(all)" and 0.9 < sum(r["time_fraction"] for r in rows[1:]) <= 1.001
    rows = cases["convolutions of tiny batch 2"]()
    flops = sum(r["tflop_rate"] * 1e12 * r["together_s"] for r in rows)
    # All multiplications but those of 1x1 convolutions that run as matrix products, attention and projections.
    assert 0.8 < flops / (2 * 2 * network_costs(TINY).full) < 1


def test_what_only_a_gpu_can_tell_comes_first(tmp_path):
    graphs, rewrites = (list(dict(f(context(tmp_path)))) for f in (speed.graphs, speed.rewrites))
    assert graphs[:2] == ["captures and evictions", "a capture that fails"]
    assert rewrites[:2] == ["tiny batch 1: fp8, by codes", "tiny batch 1: fp8, emulated"]
    whole = list(dict(speed.rewrites(dataclasses.replace(context(tmp_path), quick=False))))
    assert whole[0] == "tiny batch 2: fp8, by codes" and whole[2] == "tiny batch 1: fp8, by codes"


def test_processes_share_the_cases_of_a_phase(tmp_path, monkeypatch):
    on_a_gpu = dataclasses.replace(context(tmp_path), device=torch.device("cuda:0"), quick=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert PHASES["paths"].shares(on_a_gpu) == 8 and PHASES["paths"].shares(context(tmp_path)) == 1
    assert PHASES["speed"].shares(on_a_gpu) == 1
    monkeypatch.setattr(phase.Phase, "shares", lambda self, context: 2)
    options = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--seconds", "100"]
    monkeypatch.setattr(sys, "argv", ["phase", "environment", *options, "--networks", "tiny", "--batches", "1"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(phase, "end_with_parent", lambda: None)
    assert phase.main() == 0
    found = [r["case"] for r in CaseLog(tmp_path).rows("environment")]
    assert sorted(found) == sorted(dict(PHASES["environment"].cases(context(tmp_path))))


SANITIZER = """#!/bin/sh
echo "$@" >> {folder}/calls
{body}
"""


@pytest.mark.parametrize(
    ("body", "expected", "outcome"),
    [
        ("echo '========= Error: Device not supported. Please refer ...'; exit 1", NotHere, "Device not supported"),
        ("sleep 60", NotHere, "did not end in"),
        ("echo '========= Invalid __global__ read of size 4 bytes'; exit 9", RuntimeError, "Invalid __global__ read"),
        ("echo '1 failed'; exit 1", RuntimeError, "1 failed"),
        ("echo '6 passed'; echo '========= ERROR SUMMARY: 0 errors'", None, None),
    ],
    ids=["refused", "late", "found", "failed", "clean"],
)
def test_a_sanitizer_that_cannot_watch_is_no_failure(tmp_path, monkeypatch, body, expected, outcome):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(folder=tmp_path, body=body))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(speed, "run_command", lambda command, limit: side.run_command(command, min(limit, 1.0)))
    on_a_gpu = dataclasses.replace(context(tmp_path), device=torch.device("cuda:0"), quick=False)
    case = dict(speed.sanitizer(on_a_gpu))["memcheck of test_add_projected.py"]
    if outcome is None:
        assert case()["reason"] == "6 passed; ========= ERROR SUMMARY: 0 errors"
    else:
        with pytest.raises(expected, match=outcome):
            case()
    assert "test_kernel and odd" in (tmp_path / "calls").read_text()


def test_what_the_sanitizer_watches_is_there():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--collect-only", "-k", speed.UNALIGNED]
    done = subprocess.run(
        [*command, *(f"tests/kernels/{file}" for file in speed.WATCHED)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    for file in speed.WATCHED:
        found = [line for line in done.stdout.splitlines() if f"/{file}::" in line]
        assert len(found) >= 6 and all("::test_kernel[" in line and "odd" in line for line in found)


# -- killed ------------------------------------------------------------------------------------------------------------


def visitors(name):
    """Processes with VISITOR=``name`` in their environment, which all inherit that a visit starts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"VISITOR={name}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# Starts a process and is gone before that has imported anything.
ORPHANED = """
import os, subprocess, sys
sys.path.insert(0, os.getcwd())
from bench.machine import child_environment
null = subprocess.DEVNULL
subprocess.Popen(sys.argv[1:], env=child_environment(), stdin=null, stdout=null, stderr=null)
"""


@needs_triton
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("what", ["tests", "compilation"])
def test_what_a_killed_phase_started_ends(tmp_path, what):
    if what == "tests":
        (tmp_path / "test_long.py").write_text("import time\ndef test_it():\n    time.sleep(300)\n")
        command = ["-m", "pytest", "-p", "bench.gpu.shard", "-p", "no:cacheprovider", str(tmp_path / "test_long.py")]
    else:
        steps = [f"celeba64:{batch}:{dtype}:True" for batch in (1, 8, 64) for dtype in ("float32", "bfloat16")]
        command = ["-m", "bench.gpu.compiling", "--arch", "90", "--processors", "132", "--until", "1e10"]
        command += ["--steps", *steps]
    own = {"VISITOR": tmp_path.name, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    own |= {"SHARD": "0/1", "SHARD_LINES": str(tmp_path / "lines"), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-c", ORPHANED, sys.executable, *command]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, check=True, timeout=100)
    end = time.time() + 60
    try:
        while visitors(tmp_path.name):
            assert time.time() < end
            time.sleep(0.1)
    finally:
        for process in visitors(tmp_path.name):
            os.kill(process, signal.SIGKILL)


KILLED_IN = (
    "prepare",
    "bars",
    "kernels",
    "quality",
    "profile",
    "graphs",
    "speed",
    "operations",
    "rewrites",
    "training",
)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_visit_that_is_killed_reports_what_it_found(tmp_path, capsys):
    out, seed = tmp_path / "out", random.randrange(2**32)
    drawn = random.Random(seed)
    killed_in = drawn.choice(KILLED_IN)
    with capsys.disabled():
        print(f" seed {seed}: killed in {killed_in}", end=" ")
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out), "--device", "cpu", "--quick"]
    process, end = (
        subprocess.Popen(
            [*command, "--only", killed_in], cwd=ROOT, stdout=subprocess.DEVNULL,
            env={**os.environ, "VISITOR": str(seed)},
        ),
        time.time() + 120,
    )  # fmt: skip
    while not CaseLog(out).started(killed_in):
        assert time.time() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(drawn.uniform(0, 2))  # now a process of a process of its own may run
    process.kill()
    process.wait()
    while visitors(seed):  # nothing goes on behind its back
        assert time.time() < end
        time.sleep(0.05)
    rows = CaseLog(out).rows()
    assert visit.main(["--out", str(out), "--device", "cpu", "--report"]) == 0
    report = capsys.readouterr().out
    assert report == (out / "report.txt").read_text() and "matmul bfloat16" in report
    assert report.rstrip().split("\n")[-1].startswith("----") and len(CaseLog(out).rows()) == len(rows)


def test_a_visit_that_is_asked_to_end_reports_what_it_found(tmp_path, monkeypatch):
    def run_phase(names, options, seconds, journal, look):
        journal.write("environment", "matmul bfloat16", "INFO", table="peak", rate=1e12, unit="FLOP/s")
        look()
        assert "matmul bfloat16" in (tmp_path / "report.txt").read_text()  # also without an end
        (tmp_path / "report.txt").unlink()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(visit, "run_phase", run_phase)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        visit.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "matmul bfloat16" in (tmp_path / "report.txt").read_text() and signal.getsignal(signal.SIGTERM) == before


def test_the_second_part_adds_to_the_first(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(visit, "run_phase", lambda names, *_, **__: ran.append(names.split(",")))
    CaseLog(tmp_path).write("bars", "a", "PASS")
    for part in ("1", "2"):
        if part == "1":
            with pytest.raises(cli.UserError, match="already holds a visit"):
                visit.main(["--out", str(tmp_path), "--device", "cpu", "--part", part])
            continue
        assert visit.main(["--out", str(tmp_path), "--device", "cpu", "--part", part]) == 0
    assert visit.main(["--out", str(tmp_path / "new"), "--device", "cpu", "--part", "1"]) == 0
    second, first = ran
    assert first[:3] == ["environment", "prepare", "bars"] and second[:3] == ["environment", "recompile", "profile"]
    assert set(first) & set(second) == {"environment"} and set(first) | set(second) == set(PHASES)
    assert all(phase.seconds is None or phase.seconds <= 150 for phase in PHASES.values())


@pytest.mark.slow
def test_a_visit_from_a_checkout_that_is_not_installed(tmp_path):
    """The whole script, in a Python that finds pdae_fast nowhere but in the working directory."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    # Runs before anything else in every process of the visit: takes away what an editable installation added.
    (blocked / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(out), "--device", "cpu", "--quick", "--batches", "1",
         "--only", "kernels", "paths", "speed", "graphs", "quality", "compile"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(blocked)}, timeout=500,
    )  # fmt: skip
    problems = (out / "failures.txt").read_text() if (out / "failures.txt").exists() else (out / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{problems[-5000:]}"
    assert done.stdout.rstrip().split("\n")[-1].startswith("PASS every path agrees with float32")
    assert {p.name for p in out.iterdir()} == {"log.txt", "report.txt", "results.json", "rows.csv", "rows.jsonl"}
    found = CaseLog(out).rows()
    assert {r["phase"] for r in found if r["status"] in ("PASS", "INFO")} == {
        "environment", "kernels", "paths", "speed", "graphs", "quality"
    }  # fmt: skip
    assert json.loads((out / "results.json").read_text())["tables"]["step"][0]["contender"] == "baseline"
