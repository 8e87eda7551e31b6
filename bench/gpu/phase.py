"""One phase in a process of its own: `python -m bench.gpu.phase NAME --out DIR ...` (started by `bench.gpu`)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import environment, kernel_tests, paths, speed, training
from .cases import Cases, Context, run_cases


@dataclass(frozen=True)
class Phase:
    """``seconds`` is what the phase may take of a visit; None: whatever is left."""

    title: str
    seconds: float | None
    cases: Callable[[Context], Cases]


PHASES = {
    "environment": Phase("what is here, and its ceilings", 40, environment.cases),
    "kernels": Phase("every kernel against float64", 130, kernel_tests.cases),
    "paths": Phase("every plan against the float32 modules on the CPU", 80, paths.cases),
    "speed": Phase("steps against the baseline", 80, speed.speed),
    "operations": Phase("bandwidth of every kernel", 35, speed.operation_bandwidth),
    "graphs": Phase("captured against uncaptured steps", 30, speed.graphs),
    "rewrites": Phase("every rewrite turned around, against the defaults", 50, speed.rewrites),
    "quality": Phase("loss of precision on the bundled model", 35, speed.quality_loss),
    "startup": Phase("from process start to the first step", 20, speed.start_up),
    "training": Phase("training steps against the published loop", 50, training.cases),
    "compile": Phase("steps against torch.compile of the baseline", None, speed.compile_opponent),
}


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("phase", choices=list(PHASES))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", required=True)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--networks", nargs="+", required=True)
    p.add_argument("--batches", nargs="+", type=int, required=True)
    args = p.parse_args()
    context = Context(
        args.out, torch.device(args.device), args.quick, time.time() + args.seconds, tuple(args.networks),
        tuple(args.batches),
    )  # fmt: skip
    if context.cuda:
        torch.cuda.set_device(context.device)
    return run_cases(args.phase, PHASES[args.phase].cases(context), context)


if __name__ == "__main__":
    sys.exit(main())
