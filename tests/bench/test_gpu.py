"""The visit to a GPU: phases that fail or die, what the report says of them, and all of it on the CPU, tiny."""

import csv
import dataclasses
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
from gpu_visit import CPU, ROOT, context, needs_triton, statuses

from bench import budget, tables
from bench.gpu import __main__ as visit
from bench.gpu import kernel_tests, paths, summary
from bench.gpu.cases import CaseLog, NotHere, run_cases
from bench.gpu.phase import PHASES
from pdae_fast import cli


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
@pytest.mark.parametrize("what", ["tests", "tests under a tool", "compilation"])
def test_what_a_killed_phase_started_ends(tmp_path, what):
    tool = []
    if what.startswith("tests"):
        (tmp_path / "test_long.py").write_text("import time\ndef test_it():\n    time.sleep(300)\n")
        command = ["-m", "pytest", "-p", "bench.gpu.shard", "-p", "no:cacheprovider", str(tmp_path / "test_long.py")]
        if what != "tests":
            tool, command[3] = ["sh", "-c", '"$@"; true', "sh"], "bench.gpu.watched"
    else:
        steps = [f"celeba64:{batch}:{dtype}:True" for batch in (1, 8, 64) for dtype in ("float32", "bfloat16")]
        command = ["-m", "bench.gpu.compiling", "--arch", "90", "--processors", "132", "--until", "1e10"]
        command += ["--steps", *steps]
    own = {"VISITOR": tmp_path.name, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    own |= {"SHARD": "0/1", "SHARD_LINES": str(tmp_path / "lines"), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-c", ORPHANED, *tool, sys.executable, *command]
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
