"""One side of the bars, alone in its process: `python -m bench.gpu.side NAME ...`, and phase "bars" that starts them.

What one side leaves in a process (graphs, workspaces, the compiler's own graph memory) reaches no other one. The price
is that the sides cannot take turns: their ratio is one of medians that were measured one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.baseline import Baseline
from bench.contenders import CHECKED, TIMED, TOLERANCE_TF32, PlanSide, baseline_trajectory, check, relative
from bench.machine import PeakMemory, child_environment, end_with_parent, tf32
from bench.networks import NetworkCase, case
from bench.timing import Alternation
from pdae_fast import cli, kernels
from pdae_fast.engine import Rewrites, float8
from pdae_fast.engine.build import FLOAT8_TOLERANCE

from .cases import CaseLog, Cases, Context, NotHere

BARS = ("baseline", "fused-bfloat16")
FLOAT8 = "-fp8"  # of the name of a side
LEAST_SECONDS = 20.0  # that a side needs to start, check its numbers and be timed


def float8_keywords(c: NetworkCase, coded: bool = True) -> dict[str, Any]:
    """Keywords of build_plan for fp8, ``coded`` by kernels that multiply codes, with scales of one step of the
    modules."""
    modules = PlanSide(c, "eager-bfloat16")
    with float8.watched(modules.plan.unet) as found:
        modules.step(*CHECKED)
    options = dataclasses.replace(Rewrites.for_device(c.device), float8=coded)
    return {"fp8": float8.calibration(c.model, found), "options": options}


def need_float8(context: Context) -> None:
    if not context.cuda or (obstacle := kernels.float8_obstacle()):
        raise NotHere(obstacle if context.cuda else "no GPU multiplies codes here")


def _plan_side(c: NetworkCase, name: str) -> PlanSide:
    if not name.endswith(FLOAT8):
        return PlanSide(c, name)
    side = PlanSide(c, name.removesuffix(FLOAT8), **float8_keywords(c))
    side.tolerance = FLOAT8_TOLERANCE
    return side


def measure_alone(network: str, batch: int, name: str, device: torch.device, steps: int, seconds: float) -> dict:
    """A row of the "step" table without a ratio; WrongNumbers when the side computes something else."""
    c = case(network, batch, device)
    with tf32(False):
        expected = Baseline(c.model, device).step(c.x, *CHECKED, c.z)
    with PeakMemory(device) as memory:
        if name == "baseline":
            baseline = Baseline(c.model, device)
            error = check(name, relative(baseline.step(c.x, *CHECKED, c.z), expected), TOLERANCE_TF32)

            def run() -> torch.Tensor:
                return baseline.step(c.x, *TIMED, c.z) if steps == 1 else baseline_trajectory(baseline, c, steps)
        else:
            side = _plan_side(c, name)
            error = check(name, relative(side.step(*CHECKED), expected), side.tolerance)
            if steps > 1:
                side.check_trajectory(steps)

            def run() -> torch.Tensor:
                return side.step() if steps == 1 else side.trajectory(steps)

    alternation = Alternation({name: run}, device)
    alternation.first()
    alternation.run(20, seconds)
    times = alternation.spread(name).scaled(1 / steps)
    row = {
        "network": network, "batch": batch, "contender": name, "median_s": times.median,
        "spread_s": [times.low, times.high], "images_per_s": batch / times.median,
        "flops_per_s": c.flops / times.median, "memory_bytes": memory.bytes, "error": error, "rounds": times.count,
    }  # fmt: skip
    if device.type == "cuda":
        row["reserved_bytes"] = torch.cuda.memory_reserved(device)
    if name != "baseline":
        report = side.plan.describe()
        row["graphs"] = str(report.get("graphs", "none"))
        if "fp8" in report:
            row["fp8"] = report["fp8"]
    return row


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("name")
    p.add_argument("--network", required=True)
    p.add_argument("--batch", type=int, required=True)
    p.add_argument("--device", required=True)
    p.add_argument("--steps", type=int, required=True)
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    end_with_parent()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    row = measure_alone(args.network, args.batch, args.name, device, args.steps, args.seconds)
    cli.write_json(args.out, row)


def order(context: Context) -> list[tuple[str, int]]:
    """The largest batch first, then the smallest: the cases that bars are about."""
    ends = list(dict.fromkeys((max(context.batches), min(context.batches))))
    return [(network, batch) for batch in ends for network in context.networks]


def cases(context: Context) -> Cases:
    exact = [(network, batch, name) for network, batch in order(context) for name in BARS]
    in_float8 = [(network, max(context.batches), BARS[1] + FLOAT8) for network in context.networks]
    for network, batch, name in [*exact, *in_float8]:
        yield f"{network} batch {batch}: {name}", lambda side=(network, batch, name): run_side(*side, context)


def run_side(network: str, batch: int, name: str, context: Context) -> dict[str, Any]:
    """A row of the "step" table: `measure_alone` in a process of its own."""
    from .speed import timed_steps

    if name.endswith(FLOAT8):
        need_float8(context)
    out = context.out / ".side.json"
    command = [
        *(sys.executable, "-m", "bench.gpu.side", name, "--network", network, "--batch", str(batch), "--device"),
        *(str(context.device), "--steps", str(timed_steps(batch, context)), "--out", str(out)),
        *("--seconds", "0.3" if context.quick else "4"),
    ]
    run_command(command, max(LEAST_SECONDS, context.left()))
    row = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    peaks = measured_peaks(context)
    kind = ("tf32" if context.cuda else "float32") if name == "baseline" else name.split("-")[1]
    rate = row.pop("flops_per_s")
    if kind in peaks:
        row["peak_fraction"] = rate / peaks[kind]
    return {"status": "INFO", "table": "step", **row}


def measured_peaks(context: Context) -> dict[str, float]:
    """The matrix-product peaks that the first phase measured."""
    rows = CaseLog(context.out).rows("environment")
    return {
        r["case"].removeprefix("matmul "): r["rate"] for r in rows if r["case"].startswith("matmul ") and "rate" in r
    }


class CommandFailed(RuntimeError):
    """Its text ends as what the command printed does; ``output`` is all of it."""

    def __init__(self, text: str, output: str) -> None:
        super().__init__(f"{text}:\n{output[-3000:]}")
        self.output = output


def run_command(command: list[str], limit: float) -> str:
    """What ``command`` printed; CommandFailed when it fails, subprocess.TimeoutExpired after ``limit`` seconds.

    A process group of its own: what it starts ends with it.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=child_environment(),
    )
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise CommandFailed(f"{' '.join(command[2:4])} ended with {process.returncode}", output)
    return output


if __name__ == "__main__":
    main()
