"""Phases that time: "speed" (steps against the baseline), "operations" (bandwidth), "graphs", "quality", "startup"
and "compile" (the second opponent, in processes that can be stopped)."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from typing import Any

import torch

from bench import ROOT, quality, startup
from bench.compiled import MODES
from bench.contenders import CHECKED, PlanSide, check, default_steps, measure, relative
from bench.machine import copy_bandwidth
from bench.networks import case
from bench.operations import operations, prepare, row
from bench.timing import Alternation, clock
from pdae_fast.engine.options import Rewrites

from .cases import CaseLog, Cases, Context, Skip
from .paths import describe, need_xformers, variants

SIDES = ("eager-bfloat16", "fused-float32", "fused-float16", "fused-bfloat16")
CPU_SIDES = ("eager-bfloat16", "fused-float32", "fused-bfloat16")
FALLBACK_SHARE = 0.35  # of the time left that stays for a cheaper mode if max-autotune takes too long to compile
MIN_COMPILE_SECONDS = 40.0


def _peaks(context: Context) -> dict[str, float]:
    """The matrix-product peaks that the first phase measured."""
    rows = CaseLog(context.out).rows("environment")
    return {
        r["case"].removeprefix("matmul "): r["rate"] for r in rows if r["case"].startswith("matmul ") and "rate" in r
    }


def _steps(batch: int, context: Context) -> int:
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
        case(network, batch, context.device), SIDES if context.cuda else CPU_SIDES, steps=_steps(batch, context),
        rounds=3 if context.quick else 20, seconds=6.0, peaks=_peaks(context),
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
    for network in context.networks:
        for batch in context.batches:
            yield f"{network} batch {batch}", lambda network=network, batch=batch: _graph(network, batch, context)


def _graph(network: str, batch: int, context: Context) -> dict[str, Any]:
    """The same plan captured, as it is without graphs, and called step by step, taking turns; what capturing costs."""
    steps = max(2, _steps(batch, context))
    c = case(network, batch, context.device)
    off = dataclasses.replace(Rewrites.for_device(context.device), graphs=False)
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
    """Every switch of the fused plan turned around, and every attention backend, against the defaults, on the first
    network."""
    network = context.networks[0]
    for batch in list(dict.fromkeys((context.batches[0], context.batches[-1])))[: 1 if context.quick else 2]:
        for label, keywords in variants(context.device):
            yield (
                f"{network} batch {batch}: {label}",
                lambda b=batch, label=label, k=keywords: _rewrite(network, b, label, k, context),
            )


@functools.lru_cache(maxsize=1)
def _default_side(network: str, batch: int, device: torch.device) -> PlanSide:
    return PlanSide(case(network, batch, device), "fused-bfloat16")


def _rewrite(network: str, batch: int, label: str, keywords: dict[str, Any], context: Context) -> dict[str, Any]:
    if keywords.get("attention") == "xformers":
        need_xformers(context)
    steps = _steps(batch, context)
    default = _default_side(network, batch, context.device)
    side = PlanSide(default.case, default.name, **keywords)
    apart = relative(side.step(*CHECKED), default.step(*CHECKED))
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


def compile_opponent(context: Context) -> Cases:
    """The bars first: batch 1 and the largest batch of every network, then the rest while there is time."""
    if context.quick:
        yield "(all)", _not_compiled
        return
    ends = [b for b in (context.batches[0], context.batches[-1])]
    order = [(n, b) for b in dict.fromkeys(ends) for n in context.networks]
    order += [(n, b) for n in context.networks for b in context.batches if b not in ends]
    for network, batch in order:
        yield f"{network} batch {batch}", lambda network=network, batch=batch: _compile(network, batch, context)


def _not_compiled() -> None:
    raise Skip("a quick visit does not wait for a compiler; try `python -m bench.compiled --network tiny`")


def _compile(network: str, batch: int, context: Context) -> list[dict[str, Any]]:
    """max-autotune within most of the time left, else a mode that compiles faster, else a note that there was none."""
    modes = (MODES[0], "reduce-overhead")
    notes = []
    for i, mode in enumerate(modes):
        last = i == len(modes) - 1
        limit = context.left() * (1 if last else 1 - FALLBACK_SHARE)
        if limit < MIN_COMPILE_SECONDS:
            notes.append(f"{mode}: only {limit:.0f} s left")
            continue
        try:
            rows = compile_in_process(network, batch, mode, limit, context)
        except subprocess.TimeoutExpired:
            notes.append(f"{mode} did not compile in {limit:.0f} s")
            continue
        return [{"status": "INFO", "table": "compiled", "note": "; ".join(notes) or None, **r} for r in rows]
    raise Skip("; ".join(notes))


def compile_in_process(network: str, batch: int, mode: str, limit: float, context: Context) -> list[dict[str, Any]]:
    """The rows of `bench.compiled`; subprocess.TimeoutExpired when it takes longer than ``limit`` seconds."""
    out = context.out / ".compiled.json"
    command = [
        *(sys.executable, "-m", "bench.compiled", "--network", network, "--batch", str(batch)),
        *("--device", str(context.device), "--mode", mode, "--steps", str(_steps(batch, context)), "--out", str(out)),
        *("--rounds", "20", "--seconds", "6"),
    ]
    if peak := _peaks(context).get("bfloat16"):
        command += ["--peak", str(peak)]
    # A process group of its own: the compiler's workers have to end with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode or not out.exists():
        raise RuntimeError(f"bench.compiled ended with {process.returncode}:\n{output[-3000:]}")
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    out.unlink()
    return rows
