"""The visit to a GPU: sides of a step and torch.compile, in processes of their own."""

import os
import signal
import sys
import time

import pytest
import torch
from gpu_visit import CPU, context, statuses

from bench.gpu import __main__ as visit
from bench.gpu import opponent, side, summary
from bench.gpu.cases import CaseLog, Context, NotHere
from fake_cuda import FakeCuda


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
