"""Phases that time: "speed" (steps against the baseline, taking turns), "operations" (bandwidth), "graphs", "rewrites",
"quality" and "startup"; and "sanitizer", which looks for what a kernel reads or writes where nothing is its own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from bench import quality, startup
from bench.contenders import CHECKED, TRAJECTORY_FACTOR, PlanSide, check, default_steps, measure, relative
from bench.machine import copy_bandwidth
from bench.networks import case
from bench.operations import operations, prepare, row
from bench.timing import Alternation, clock
from pdae_fast.engine.build import FLOAT8_TOLERANCE
from pdae_fast.engine.fused import KEPT_TRAJECTORIES
from pdae_fast.engine.options import Rewrites
from pdae_fast.samplers.inversion import invert_once
from pdae_fast.samplers.solvers import SOLVERS

from .cases import CaseLog, Cases, Context, NotHere
from .paths import describe, need_xformers, variants
from .side import CommandFailed, float8_keywords, measured_peaks, need_float8, run_command

SIDES = ("eager-bfloat16", "fused-float32", "fused-float16", "fused-bfloat16")
CPU_SIDES = ("eager-bfloat16", "fused-float32", "fused-bfloat16")
# f(field, x, trajectory) by name: what `Rewrites.fused_solvers` is for.
SOLVED = {name: SOLVERS[name].decode for name in ("dpm++3m", "unipc3", "belm")} | {"x_T by one evaluation": invert_once}
TRAJECTORIES = range(3, 15)  # steps of those that are captured one after the other: more than are kept


def timed_steps(batch: int, context: Context) -> int:
    if context.quick:
        return 2
    return default_steps(context.device) if batch <= 8 else min(4, default_steps(context.device))


def speed(context: Context) -> Cases:
    for network in context.networks:
        for batch in context.batches:
            yield f"{network} batch {batch}", lambda network=network, batch=batch: _speed(network, batch, context)


def _speed(network: str, batch: int, context: Context) -> list[dict[str, Any]]:
    failures: dict[str, Exception] = {}
    rows = measure(
        case(network, batch, context.device), SIDES if context.cuda else CPU_SIDES, steps=timed_steps(batch, context),
        rounds=3 if context.quick else 20, seconds=6.0, peaks=measured_peaks(context),
        failures=failures,
    )  # fmt: skip
    for name, error in failures.items():
        details = "".join(traceback.format_exception(error))
        where = f"{network} batch {batch}: {name}"
        CaseLog(context.out).fail("speed", where, f"{type(error).__name__}: {error}", details)
    return [{"status": "INFO", "table": "step", **r} for r in rows]


def operation_bandwidth(context: Context) -> Cases:
    bandwidth = [r["rate"] for r in CaseLog(context.out).rows("environment") if r["case"] == "copy" and "rate" in r]
    rate = bandwidth[0] if bandwidth else copy_bandwidth(context.device)
    for batch in (1,) if context.quick else (1, 16):
        for operation in operations(batch, tiny=context.quick):
            yield (
                f"{operation.name} {operation.shape}",
                lambda operation=operation: _operation(operation, context, rate),
            )


def _operation(operation, context: Context, rate: float) -> dict[str, Any]:
    alternation, calls, *errors = prepare(operation, context.device, 1 << 20 if context.quick else None)
    alternation.run(3 if context.quick else 15, seconds=2.0)
    return {"status": "INFO", "table": "kernel", **row(operation, alternation, calls, tuple(errors), rate)}


def graphs(context: Context) -> Cases:
    """What no stand-in for the runtime can show comes first: what is timed here, other phases time too."""
    yield "captures and evictions", lambda: _evictions(context.networks[0], min(context.batches), context)
    yield "a capture that fails", lambda: _failing_capture(context.networks[0], min(context.batches), context)
    for network, batch in itertools.product(context.networks, context.batches):
        yield f"{network} batch {batch}", lambda network=network, batch=batch: _graph(network, batch, context)


def _evictions(network: str, batch: int, context: Context) -> dict[str, Any]:
    """More trajectories than are kept, captured one after the other: memory stays bounded, and results right."""
    if not context.cuda:
        raise NotHere("nothing is captured on the CPU")
    side, held = PlanSide(case(network, batch, context.device), "fused-bfloat16"), []
    expected = side.trajectory(TRAJECTORIES[0])
    for steps in [*TRAJECTORIES, TRAJECTORIES[0]]:
        found = side.trajectory(steps)
        torch.cuda.synchronize(context.device)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved(context.device))
    error, full = relative(found, expected), max(held[:KEPT_TRAJECTORIES])
    allowed = 1.2 * full + (64 << 20)
    return {
        "status": "PASS" if max(held) <= allowed and error <= side.tolerance else "FAIL",
        "error": error, "allowed": side.tolerance,
        "first_bytes": held[0], "kept_bytes": full, "most_bytes": max(held), **describe(side.plan),
    }  # fmt: skip


def _failing_capture(network: str, batch: int, context: Context) -> dict[str, Any]:
    """A step that waits for the device where it is captured: the reason is named, and everything works afterwards."""
    if not context.cuda:
        raise NotHere("nothing is captured on the CPU")
    side = PlanSide(case(network, batch, context.device), "fused-float32")
    expected, advance = side.plain_trajectory(3), side.plan.advance
    stream = torch.cuda.current_stream(context.device)

    def breaking(x: Any, *arguments: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return advance(x, *arguments)

    side.plan.advance = breaking
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = side.trajectory(3)
    side.plan.advance = advance
    torch.cuda.empty_cache()  # refused while the allocator takes the capture for underway
    again = PlanSide(side.case, "fused-float32")
    error = max(relative(found, expected), relative(again.trajectory(3), expected))
    reason = str(side.plan.capture_failure)
    sound = [
        error <= 5 * side.tolerance,
        torch.cuda.current_stream(context.device) == stream,
        any("capture failed" in str(w.message) for w in said),
        "captur" in reason and again.plan.capture_failure is None,
    ]
    return {"status": "PASS" if all(sound) else "FAIL", "error": error, "reason": f"{reason}; {sound}"}


def _graph(network: str, batch: int, context: Context) -> dict[str, Any]:
    """The same plan captured, as it is without graphs, and called step by step, as it is and with evaluations captured
    (fields), taking turns; what capturing costs."""
    steps = max(2, timed_steps(batch, context))
    c = case(network, batch, context.device)
    usual = Rewrites.for_device(context.device)
    off, on = dataclasses.replace(usual, graphs=False), dataclasses.replace(usual, captured_fields=True)
    fields = PlanSide(c, "fused-bfloat16", options=on)
    side, without = PlanSide(c, "fused-bfloat16"), PlanSide(c, "fused-bfloat16", options=off)
    without.trajectory(steps)  # compiles and tunes, so that what remains below is the capture
    first, _ = clock(lambda: side.trajectory(steps), context.device)
    if failure := getattr(side.plan, "capture_failure", None):
        raise AssertionError(f"nothing was captured; graphs are {failure}")
    error = side.check_trajectory(steps)
    alternation = Alternation(
        {
            "single": lambda: side.plain_trajectory(steps),
            "uncaptured": lambda: without.trajectory(steps),
            "captured": lambda: side.trajectory(steps),
            "fields": lambda: fields.plain_trajectory(steps),
        },
        context.device,
    )
    alternation.first()
    alternation.run(3 if context.quick else 11, seconds=3.0)
    times = {name: alternation.spread(name).scaled(1 / steps) for name in alternation.functions}
    ratio = alternation.ratio("captured", "uncaptured")
    return {
        "status": "INFO",
        "table": "graph",
        "network": network,
        "batch": batch,
        **{f"{name}_s": spread.median for name, spread in times.items()},
        "spread_s": [times["captured"].low, times["captured"].high],
        "ratio": ratio.median,
        "ratio_spread": [ratio.low, ratio.high],
        "first_call_extra_s": first - times["captured"].median * steps,
        "error": error,
        **describe(side.plan),
    }


def rewrites(context: Context) -> Cases:
    """fp8, every switch of the fused plan turned around, and every attention backend, against the defaults, on the
    first network."""
    network = context.networks[0]
    batches = list(dict.fromkeys((context.batches[0], context.batches[-1])))[: 1 if context.quick else 2]
    # The largest batch is what fp8 is for; the smallest comes last, so that its default side is made once.
    for batch in batches[::-1]:
        for how, coded in (("by codes", True), ("emulated", False)):
            yield f"{network} batch {batch}: fp8, {how}", lambda b=batch, c=coded: _float8(network, b, c, context)
    for batch in batches:
        for label, keywords in variants(context.device):
            yield (
                f"{network} batch {batch}: {label}",
                lambda b=batch, label=label, k=keywords: _rewrite(network, b, label, k, context),
            )
        for name in SOLVED:
            yield f"{network} batch {batch}: {name}", lambda b=batch, name=name: _solver(network, b, name, context)


def _solver(network: str, batch: int, name: str, context: Context) -> dict[str, Any]:
    """Whole trajectories of a solver that looks at several steps, on the device and driven from the host."""
    c, steps = case(network, batch, context.device), max(4, timed_steps(batch, context))
    default = dataclasses.replace(Rewrites.for_device(c.device), fused_update=True, fused_solvers=True)
    sides = {
        label: PlanSide(c, "fused-bfloat16", options=options)
        for label, options in (("default", default), ("changed", dataclasses.replace(default, fused_solvers=False)))
    }
    trajectory = sides["default"].schedule.decoding(steps)
    functions = {label: functools.partial(SOLVED[name], side.field, c.x, trajectory) for label, side in sides.items()}
    alternation = Alternation(functions, c.device)
    results, _ = alternation.first()
    error = relative(results["changed"], results["default"])
    check(name, error, TRAJECTORY_FACTOR * sides["default"].tolerance)
    alternation.run(3 if context.quick else 9, seconds=1.5)
    times, ratio = alternation.spread("changed").scaled(1 / steps), alternation.ratio("changed", "default")
    return {
        "status": "INFO", "table": "rewrite", "network": network, "batch": batch,
        "changed": f"{name}: fused_solvers off", "median_s": times.median, "ratio": ratio.median,
        "ratio_spread": [ratio.low, ratio.high], "error": error,
    }  # fmt: skip


def _float8(network: str, batch: int, coded: bool, context: Context) -> dict[str, Any]:
    """fp8 with scales of one step of the modules, which its plan is compared with before it is timed."""
    need_float8(context)
    keywords = float8_keywords(case(network, batch, context.device), coded)
    return _rewrite(network, batch, f"fp8, {'by codes' if coded else 'emulated'}", keywords, context)


@functools.lru_cache(maxsize=1)
def _default_side(network: str, batch: int, device: torch.device) -> PlanSide:
    return PlanSide(case(network, batch, device), "fused-bfloat16")


def _rewrite(network: str, batch: int, label: str, keywords: dict[str, Any], context: Context) -> dict[str, Any]:
    if keywords.get("attention") == "xformers":
        need_xformers(context)
    steps = timed_steps(batch, context)
    default = _default_side(network, batch, context.device)
    side = PlanSide(default.case, default.name, **keywords)
    apart = relative(side.step(*CHECKED), default.step(*CHECKED))
    if "fp8" in keywords:
        side.tolerance = FLOAT8_TOLERANCE
    check(label, apart, 2 * side.tolerance)
    side.check_trajectory(steps)  # some switches act on whole trajectories only
    alternation = Alternation(
        {"default": lambda: default.trajectory(steps), "changed": lambda: side.trajectory(steps)}, context.device
    )
    alternation.first()
    alternation.run(3 if context.quick else 15, seconds=1.5)
    times, ratio = alternation.spread("changed").scaled(1 / steps), alternation.ratio("changed", "default")
    return {
        "status": "INFO",
        "table": "rewrite",
        "network": network,
        "batch": batch,
        "changed": label,
        "median_s": times.median,
        "ratio": ratio.median,
        "ratio_spread": [ratio.low, ratio.high],
        "error": apart,
    }


def quality_loss(context: Context) -> Cases:
    steps, limit = (3, 2) if context.quick else (100, None)
    dtypes = ("bfloat16", "float16") if context.cuda else ("bfloat16",)
    for dtype in dtypes:
        yield f"{dtype} against float32", lambda dtype=dtype: _precision(context, steps, limit, dtype)
    yield "float32 plan against the modules", lambda: _plan_difference(context, steps)


def _precision(context: Context, steps: int, limit: int | None, dtype: str) -> dict[str, Any]:
    found = quality.precision_loss(context.device, steps, limit, dtype)
    # A few steps reconstruct nothing: only the full protocol is held to the bounds.
    held = quality.precision_holds(found) or context.quick
    return {"status": "PASS" if held else "FAIL", "table": "quality", **found}


def _plan_difference(context: Context, steps: int) -> dict[str, Any]:
    found = quality.plan_difference(context.device, steps, 2, plan="fused")
    return {"status": "PASS" if found["error"] <= quality.PLAN_BOUND else "FAIL", "table": "quality", **found}


def start_up(context: Context) -> Cases:
    network = context.networks[0]
    yield (
        network,
        lambda: {
            "status": "INFO",
            "table": "startup",
            **startup.measure(network, str(context.device), repeats=1),
        },
    )


# Words of compute-sanitizer where it cannot watch the device, as in many a sandbox.
REFUSALS = ("Device not supported", "Internal Sanitizer Error", "Failed to initialize", "Unable to", "not permitted")
# The tests whose odd sizes and unaligned channels reach the kernel; the file with the fewest first.
UNALIGNED = "test_kernel and odd"
WATCHED = ("test_ddim_update.py", "test_head_convolution.py", "test_add_projected.py", "test_add_upsample.py")


def sanitizer(context: Context) -> Cases:
    for file in WATCHED:
        yield f"memcheck of {file}", lambda file=file: _memcheck(file, context)


def _memcheck(file: str, context: Context) -> dict[str, Any]:
    """A kernel's own tests of odd sizes under compute-sanitizer, which sees reads and writes outside of a tensor."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not context.cuda or not Path(tool).exists():
        raise NotHere("no CUDA device" if not context.cuda else "compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-p"]
    command += ["bench.gpu.watched", "-p", "no:cacheprovider", "-q", "-x", "-k", UNALIGNED, f"tests/kernels/{file}"]
    limit = max(10.0, context.left())
    try:
        output = run_command(command, limit)
    except subprocess.TimeoutExpired:
        raise NotHere(f"compute-sanitizer did not end in {limit:.0f} s") from None
    except CommandFailed as error:
        said = [line for line in error.output.splitlines() if line.startswith("=====")]
        refusal = next((line for line in said if any(words in line for words in REFUSALS)), None)
        # What it found before it gave up counts.
        if refusal is None or any("Invalid" in line for line in said):
            raise
        raise NotHere(f"compute-sanitizer: {refusal.strip('= ')}") from None
    summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
    return {"status": "PASS", "reason": "; ".join(summary)}
