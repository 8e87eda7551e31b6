"""One phase in a process of its own: `python -m bench.gpu.phase NAME --out DIR ...` (started by `bench.gpu`)."""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import child_environment, end_with_parent

from . import compiling, environment, kernel_tests, opponent, paths, profile, side, speed, training
from .cases import Cases, Context, run_cases


@dataclass(frozen=True)
class Phase:
    """``seconds`` is what the phase may take of a visit; None: whatever is left. ``part``: of which call it is.
    ``processes`` share its cases out where there is a GPU."""

    title: str
    seconds: float | None
    cases: Callable[[Context], Cases]
    part: int
    timed: bool = True  # wants the device for itself
    processes: int = 1

    def shares(self, context: Context) -> int:
        return min(self.processes, os.cpu_count() or 1) if context.cuda and not context.quick else 1


PHASES = {
    "environment": Phase("what is here, and its ceilings", 30, environment.cases, 1),
    "prepare": Phase("kernels of the bars compiled at once", 60, compiling.first, 1, timed=False),
    "bars": Phase("the sides of the bars, each in a process of its own", 150, side.cases, 1),
    "prepare-more": Phase("kernels of the phases that follow", 30, compiling.second, 1, timed=False),
    "kernels": Phase("every kernel against float64", 110, kernel_tests.cases, 1, timed=False),
    "quality": Phase("loss of precision on the bundled model", 35, speed.quality_loss, 1, timed=False),
    "compile": Phase("steps against torch.compile of the baseline", None, opponent.cases, 1),
    "recompile": Phase("kernels of all phases, also where part 2 is on another machine", 45, compiling.everything, 2),
    "profile": Phase("where the time of a step goes", 60, profile.cases, 2),
    "graphs": Phase("captured against uncaptured steps, evictions, a failing capture", 50, speed.graphs, 2),
    "speed": Phase("steps against the baseline", 90, speed.speed, 2),
    "paths": Phase("every plan against the float32 modules on the CPU", 70, paths.cases, 2, processes=8),
    "operations": Phase("bandwidth of every kernel", 35, speed.operation_bandwidth, 2),
    "rewrites": Phase("every rewrite turned around, against the defaults", 45, speed.rewrites, 2),
    "training": Phase("training steps against the published loop", 45, training.cases, 2),
    "startup": Phase("from process start to the first step", 20, speed.start_up, 2),
    "sanitizer": Phase("reads and writes outside of a tensor", None, speed.sanitizer, 2),
}


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("phases", help="names, with commas between them: each of them where the one before ended well")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", required=True)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--networks", nargs="+", required=True)
    p.add_argument("--batches", nargs="+", type=int, required=True)
    p.add_argument("--share", metavar="I/N", help="only every N-th case, from the I-th on")
    args = p.parse_args()
    end_with_parent()
    context = Context(
        args.out, torch.device(args.device), args.quick, time.time() + args.seconds, tuple(args.networks),
        tuple(args.batches),
    )  # fmt: skip
    first, of = map(int, args.share.split("/")) if args.share else (0, 1)
    names = args.phases.split(",")
    if not args.share and (shares := PHASES[names[0]].shares(context)) > 1:
        return share_out(shares, context)
    if context.cuda:
        torch.cuda.set_device(context.device)
    for name in names:
        if code := run_cases(name, itertools.islice(PHASES[name].cases(context), first, None, of), context):
            return code
    return 0


def share_out(shares: int, context: Context) -> int:
    """This process's phase by ``shares`` others; the first of their exit statuses that is not 0."""
    threads = str(max(1, (os.cpu_count() or 1) // shares))
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "bench.gpu.phase", *sys.argv[1:]),
                *("--seconds", f"{context.left():.1f}", "--share", f"{share}/{shares}"),
            ],
            env=child_environment(OMP_NUM_THREADS=threads),
        )
        for share in range(shares)
    ]
    return next((code for code in [process.wait() for process in running] if code), 0)


if __name__ == "__main__":
    sys.exit(main())
