"""Phase "prepare": all kernels of the models' steps compiled at once, by many processes, before anything is timed.

Triton compiles a kernel when it is first launched, half a second each, and keeps it on disk. Here a driver stands for
the GPU, so that workers need none: the launches of a step on meta tensors go through Triton's own launch path, which
binds and specialises the arguments and compiles, and ends where a binary would be loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch

from bench import ROOT, budget

from .cases import Cases, Context, NotHere

MOST_WORKERS = 16


class OfflineDriver:
    """For `triton.runtime.driver.set_active`: a GPU of compute capability ``arch`` (90 is 9.0) that compiles only."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils, self.loaded = arch, self, 0

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10}  # the least of the supported chips

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        self.loaded += 1
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def launches(networks: tuple[str, ...], batches: tuple[int, ...], dtype: torch.dtype, processors: int) -> list:
    """One launch of every kernel and constants that the steps of these networks need on a chip of ``processors``."""
    found: dict[tuple, Any] = {}

    def collect(batch: list) -> None:
        for launch in batch:
            arguments = tuple(
                (v.dtype if isinstance(v, torch.Tensor) else v % 16 if v != 1 else "one")
                for v in launch.arguments.values()
            )
            key = (launch.kernel.fn.__name__, arguments, tuple(launch.constants.items()), launch.num_warps)
            found.setdefault(key, launch)

    with mock.patch("pdae_fast.kernels.group_norm_plan.processors", lambda device: processors):
        for network in networks:
            plan = budget.meta_plan(budget.empty_model(network), dtype)
            for batch in batches:
                trajectory = budget.meta_trajectory(plan, batch)
                with torch.inference_mode(), budget.cuda_functions(collect):
                    trajectory._step(trajectory.workloads[0])
    return list(found.values())


def main() -> None:
    """A worker: compile every ``--of``-th launch."""
    p = argparse.ArgumentParser()
    p.add_argument("--networks", nargs="+", required=True)
    p.add_argument("--batches", nargs="+", type=int, required=True)
    p.add_argument("--arch", type=int, required=True)
    p.add_argument("--processors", type=int, required=True)
    p.add_argument("--worker", type=int, default=0)
    p.add_argument("--of", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    chosen = launches(tuple(args.networks), tuple(args.batches), torch.bfloat16, args.processors)
    from triton.runtime import driver

    from pdae_fast.kernels._launch import run

    driver.set_active(OfflineDriver(args.arch))
    start, mine = time.time(), chosen[args.worker :: args.of]
    run(mine)
    print(json.dumps({"kernels": len(mine), "all": len(chosen), "seconds": time.time() - start}))


def cases(context: Context) -> Cases:
    yield "all kernels of bfloat16 steps", lambda: _prepare(context)


def _prepare(context: Context) -> dict[str, Any]:
    try:
        import triton  # noqa: F401
    except ImportError:
        raise NotHere("triton is not installed") from None
    if context.cuda:
        major, minor = torch.cuda.get_device_capability(context.device)
        processors = torch.cuda.get_device_properties(context.device).multi_processor_count
        arch = 10 * major + minor
    else:
        arch, processors = 90, 132
    workers = 1 if context.quick else min(MOST_WORKERS, os.cpu_count() or 1)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.gpu.compiling", "--networks", *context.networks, "--batches"),
                *(*map(str, context.batches), "--arch", str(arch), "--processors", str(processors)),
                *("--worker", str(worker), "--of", str(workers)),
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for worker in range(workers)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=max(1.0, context.left())) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(running, done, strict=True):
        if process.returncode:
            raise RuntimeError(f"a worker ended with {process.returncode}:\n{errors[-3000:]}")
    found = [json.loads(out.splitlines()[-1]) for out, _ in done]
    return {
        "status": "INFO",
        "table": "prepare",
        "arch": f"sm_{arch}",
        "kernels": sum(f["kernels"] for f in found),
        "workers": workers,
        "slowest_worker_s": round(max(f["seconds"] for f in found), 2),
    }


if __name__ == "__main__":
    main()
