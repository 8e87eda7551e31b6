"""The second opponent: what a skilled user gets from `torch.compile` of the published step, in bfloat16 channels-last.

    python -m bench.compiled --network celeba64 --batch 8 --device cuda --mode max-autotune --out FILE

compiles in this process, checks the numbers, lets baseline, compiled step and the engine's plans take turns and writes
the rows; `bench.gpu` starts it as a process of its own, because a compilation cannot be stopped from within.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from pdae_fast import PDAE, cli
from pdae_fast.engine import resolve_device
from pdae_fast.files import atomic_write

from .baseline import Baseline
from .contenders import TIMED, measure
from .machine import end_with_parent
from .networks import case

READY = ".ready"
MODES = ("max-autotune", "reduce-overhead", "max-autotune-no-cudagraphs", "default")


class CompiledBaseline(Baseline):
    """`Baseline` with the decoder in bfloat16 channels-last and the whole step compiled; state and update float32.

    Shapes are static and time points stay inputs: a program compiled for one t would be of no use to a sampler. On the
    CPU the weights are frozen into the program, which is what makes compilation pay there.
    """

    def __init__(
        self, model: PDAE, device: torch.device | str = "cpu", mode: str = "max-autotune", dtype=torch.bfloat16
    ) -> None:
        super().__init__(model, device)
        self.decoder = self.decoder.to(dtype).to(memory_format=torch.channels_last)
        self.mode, self.freezing = mode, torch.device(device).type == "cpu"
        self.compiled = torch.compile(super().advance, mode=mode, dynamic=False)
        self.seconds: float | None = None

    def advance(self, x: Tensor, now: Tensor, following: Tensor, z: Tensor) -> Tensor:
        if self.seconds is None:
            start = time.perf_counter()
            with _freezing() if self.freezing else contextlib.nullcontext():
                self._run(x, now, following, z)
            self.seconds = time.perf_counter() - start
        return self._run(x, now, following, z)

    def _run(self, x: Tensor, now: Tensor, following: Tensor, z: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        x = self.compiled(x.contiguous(memory_format=torch.channels_last), now, following, z)
        # The next replay of a captured graph writes over this result.
        return x.clone() if x.is_cuda else x


def _freezing():
    from torch._inductor import config

    return config.patch(freezing=True)


def wait_for(file: Path) -> None:
    """Say that this process is ready, by its id in a file beside ``file``, and wait until that exists."""
    with atomic_write(file.with_suffix(READY), "w") as ready:
        ready.write(str(os.getpid()))
    while not file.exists():
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.splitlines()[0])
    p.add_argument("--network", default="celeba64")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--device", default="cuda")
    p.add_argument("--mode", choices=MODES, default="max-autotune")
    p.add_argument("--plans", nargs="*", default=["fused-bfloat16"], help="the engine's sides, as plan-dtype")
    p.add_argument("--steps", type=int, help="steps of one timed call (default: 1 on the CPU, 10 on CUDA)")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--seconds", type=float, default=30.0, help="time for measuring, after compilation")
    p.add_argument("--peak", type=float, help="FLOP/s of a bfloat16 matrix product, if already measured")
    p.add_argument("--out", help="write the rows to this JSON file")
    p.add_argument("--wait-for", type=Path, metavar="FILE", help="compile, say so beside FILE, measure when it exists")
    p.add_argument("--with-parent", action="store_true", help="end when the process ends that started this one")
    args = p.parse_args(argv)
    if args.with_parent:
        end_with_parent()
    device = resolve_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    c = case(args.network, args.batch, device)
    opponent = CompiledBaseline(c.model, device, args.mode)
    peaks = {"bfloat16": args.peak} if args.peak else {}
    if args.wait_for:
        opponent.step(c.x, *TIMED, c.z)  # compiles
        wait_for(args.wait_for)
    rows = measure(
        c, args.plans, extra={f"compile-{args.mode}": opponent}, steps=args.steps, rounds=args.rounds,
        seconds=args.seconds, peaks=peaks,
    )  # fmt: skip
    for row in rows:
        row["compile_seconds"] = opponent.seconds if row["contender"].startswith("compile-") else None
    if args.out:
        cli.write_json(Path(args.out), {"rows": rows})
    else:
        print(json.dumps(cli.finite(rows), indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(main))
