"""The visit to a GPU: kernels' own tests, the compiler, the profiler and the sanitizer."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from gpu_visit import ROOT, context, needs_triton

from bench import budget
from bench.gpu import compiling, kernel_tests, phase, profile, side, speed
from bench.gpu.cases import CaseLog, NotHere
from bench.gpu.phase import PHASES
from bench.networks import TINY
from pdae_fast.engine.cost import network_costs
from pdae_fast.engine.fused import DeviceField


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


@pytest.mark.parametrize("name", speed.SOLVED)
def test_solvers_are_timed_both_ways(tmp_path, monkeypatch, name):
    on_device, carry = [], DeviceField._carry
    monkeypatch.setattr(DeviceField, "_carry", lambda self, *a: on_device.append(self.plan) or carry(self, *a))
    row = dict(speed.rewrites(context(tmp_path)))[f"tiny batch 1: {name}"]()
    assert row["changed"] == f"{name}: fused_solvers off" and row["ratio"] > 0
    assert len({id(plan) for plan in on_device}) == 1


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
