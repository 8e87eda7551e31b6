"""How long a user waits for the first step, and how much memory the process takes: `python -m bench.startup --network
celeba64` starts fresh ones.

What is counted is everything a command does before its first image advances: the interpreter, the imports, reading the
weights from a file, building the plan, the projections of z, and one step. The memory is the process's peak, on Linux,
after two more steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from . import ROOT

BOUND = 10.0  # seconds, celeba64 in bfloat16 at batch 1

# In the new process; argv: saved model, device, dtype, plan, batch. perf_counter of two processes has no common zero,
# so the wall clock is what is compared.
CHILD = """
import sys, time
import bench
import torch
from pdae_fast import PDAE
from pdae_fast.engine import build_plan
folder, device, dtype, plan, batch = sys.argv[1:]
device = torch.device(device)
imported = time.time()
model = PDAE.from_pretrained(folder)
loaded = time.time()
plan = build_plan(model, device, getattr(torch, dtype), plan, consume=True)
built = time.time()
x = torch.randn(int(batch), *model.image_shape, device=device)
field = plan.field(torch.randn(int(batch), model.config.latent_dim))
eps, gradient = field(x, 499, True)
assert bool(torch.isfinite(eps).all() and torch.isfinite(gradient).all())
stepped, peak = time.time(), 0
if sys.platform == "linux":  # getrusage would count the process that started this one as well
    for _ in range(2):
        field(x, 499, True)
    with open("/proc/self/status") as status:
        peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(imported, loaded, built, stepped, peak, plan.name)
"""


def measure(
    network: str = "celeba64",
    device: str = "cpu",
    dtype: str = "bfloat16",
    plan: str = "auto",
    batch: int = 1,
    repeats: int = 3,
) -> dict[str, Any]:
    """A row of the "startup" table: the median of ``repeats`` new processes, its parts, in seconds, and the memory."""
    from .networks import build
    from .timing import spread

    parts, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        build(network).save_pretrained(folder)
        for _ in range(repeats):
            start = time.time()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, folder, device, dtype, plan, str(batch)],
                cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"the new process failed:\n{done.stderr}")
            *times, peak, name = done.stdout.split()
            marks = [start, *map(float, times)]
            parts.append([b - a for a, b in zip(marks[:-1], marks[1:], strict=True)])
            peaks.append(int(peak))
    totals = spread([sum(p) for p in parts])
    medians = [spread(column).median for column in zip(*parts, strict=True)]
    return {
        "network": network,
        "batch": batch,
        "plan": f"{name}-{dtype}",
        "total_s": totals.median,
        "spread_s": [totals.low, totals.high],
        **dict(zip(("import_s", "load_s", "build_s", "first_step_s"), medians, strict=True)),
        "memory_bytes": sorted(peaks)[len(peaks) // 2] or None,
    }


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.splitlines()[0])
    p.add_argument("--network", default="celeba64")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--plan", default="auto")
    p.add_argument("--batch", type=int, default=1)
    args = p.parse_args()
    from .tables import text

    print(text([measure(args.network, args.device, args.dtype, args.plan, args.batch)]))


if __name__ == "__main__":
    main()
