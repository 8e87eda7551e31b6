"""Phases that compile: kernels of the models' steps at once, by many processes, before anything is timed.

Triton compiles a kernel when it is first launched, half a second each, and keeps it on disk. Here a driver stands for
the GPU, so that workers need none: the launches of a step on meta tensors go through Triton's own launch path, which
binds and specialises the arguments and compiles, and ends where a binary would be loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import ROOT, budget, quality
from bench.contenders import DTYPES, TIMED
from bench.machine import child_environment, end_with_parent
from pdae_fast import kernels
from pdae_fast.engine import float8
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.kernels._launch import Launch, run
from pdae_fast.models import unet_of

from .cases import Cases, Context, NotHere
from .side import FLOAT8, order

MOST_WORKERS = 16
SPARED = 3.0  # seconds of a phase that workers have for what they are compiling when the time is up


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


class Step(NamedTuple):
    """A DDIM step of a plan, with G or without."""

    network: str
    batch: int
    dtype: str  # or "bfloat16-fp8"
    gradient: bool = True

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Step:
        network, batch, dtype, gradient = text.split(":")
        return cls(network, int(batch), dtype, gradient == "True")


def bars(context: Context) -> list[Step]:
    """What phase "bars" times."""
    float8 = [Step(network, max(context.batches), "bfloat16" + FLOAT8) for network in context.networks]
    return [*(Step(*case, "bfloat16") for case in order(context)), *float8]


def others(context: Context) -> list[Step]:
    """What the other phases of part 1 run."""
    # Precision is measured on all bundled images, the plan against the modules on two.
    found = [Step(quality.MODEL, 16, dtype) for dtype in ("float32", "bfloat16", "float16")]
    found.append(Step(quality.MODEL, 2, "float32"))
    return found + [Step(network, b, "bfloat16") for b in context.batches for network in context.networks]


def all_steps(context: Context) -> list[Step]:
    """What part 2 runs, what matters most first."""
    found, checked = bars(context), ("tiny", "fashion32", "celeba64")
    found += [
        Step(context.networks[0], batch, "bfloat16" + FLOAT8) for batch in (context.batches[0], context.batches[-1])
    ]
    for dtype in ("bfloat16", "float32", "float16"):
        found += [Step(network, batch, dtype) for network in context.networks for batch in context.batches]
        # Phase "paths": single evaluations, with and without G, then the trajectories of the small networks.
        for gradient in (True, False):
            found += [Step(network, batch, dtype, gradient) for network in checked for batch in (1, 5)]
    found += [Step(network, batch, "float32") for network in checked[:2] for batch in (2, 3, 7)]
    found += [Step(network, 2, "float32", False) for network in checked[:2]]
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def chip_of(processors: int) -> Iterator[None]:
    """Whatever plans a launch takes the chip for one of so many multiprocessors."""
    names = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(name) for name in names]  # all, lest one be imported while this stands
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "processors"):
                stack.enter_context(mock.patch.object(module, "processors", lambda device: processors))
        yield


def kind(launch: Launch) -> tuple:
    """What tells compiled kernels apart: arguments as far as Triton specialises on them, constants and warps."""

    def special(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype
        return "float" if isinstance(value, float) else "one" if value == 1 else value % 16

    arguments = tuple(special(value) for value in launch.arguments.values())
    return launch.kernel.fn.__name__, arguments, tuple(launch.constants.items()), launch.num_warps


def launches(steps: Iterable[Step], processors: int) -> Iterator[Launch]:
    """One launch of every kind that these steps need on a chip of ``processors``, in their order, and that a plan needs
    to be compared with its modules."""
    seen: dict[tuple, Launch] = {}
    for network, batch, dtype, gradient in steps:
        found: list[Launch] = []
        with chip_of(processors), torch.inference_mode(), budget.cuda_functions(found.extend):
            plan = _plan(network, dtype)
            if gradient:
                trajectory = budget.meta_trajectory(plan, batch)
                trajectory._step(trajectory.workloads[0])
                _evaluate(plan, 1, True)
            else:
                trajectory = budget.meta_trajectory(plan, batch, codes=None)
                trajectory._step(trajectory.workloads[0])
                _evaluate(plan, batch, False)
        fresh = {kind(launch): launch for launch in found if kind(launch) not in seen}
        seen |= fresh
        yield from fresh.values()


@functools.lru_cache(maxsize=1)
def _plan(network: str, dtype: str) -> FusedPlan:
    model, options = budget.empty_model(network), budget.ON_A_GPU
    if dtype.endswith(FLOAT8):
        unet, options = unet_of(model), dataclasses.replace(options, float8=True)
        for name, layer in float8.float8_layers(unet).items():
            parent, _, last = name.rpartition(".")
            setattr(unet.get_submodule(parent), last, float8.Float8Conv2d(layer, 1.0))
    return budget.meta_plan(model, DTYPES[dtype.removesuffix(FLOAT8)], options)


def _evaluate(plan: FusedPlan, batch: int, gradient: bool) -> None:
    """One evaluation with z of ``batch`` images."""
    x = torch.empty(batch, *plan.model.image_shape, device=budget.META)
    z = torch.empty(batch, plan.model.config.latent_dim, device=budget.META)
    plan.field(z)(x, TIMED[0], gradient)


def main() -> None:
    """A worker: compile every ``--of``-th launch, while there is time."""
    p = argparse.ArgumentParser()
    p.add_argument("--steps", nargs="+", type=Step.parse, required=True)
    p.add_argument("--arch", type=int, required=True)
    p.add_argument("--processors", type=int, required=True)
    p.add_argument("--worker", type=int, default=0)
    p.add_argument("--of", type=int, default=1)
    p.add_argument("--until", type=float, required=True, help="time.time()")
    args = p.parse_args()
    end_with_parent()
    start = time.time()
    torch.set_num_threads(1)
    from triton.runtime import driver

    driver.set_active(OfflineDriver(args.arch))
    done, whole = 0, True
    for launch in itertools.islice(launches(args.steps, args.processors), args.worker, None, args.of):
        if time.time() > args.until:
            whole = False
            break
        run([launch])
        done += 1
    print(json.dumps({"kernels": done, "whole": whole, "seconds": time.time() - start}))


def first(context: Context) -> Cases:
    yield "kernels of the bars", lambda: prepare(bars(context), context)


def second(context: Context) -> Cases:
    yield "kernels of the other phases", lambda: prepare(others(context), context)


def everything(context: Context) -> Cases:
    yield "kernels of both parts", lambda: prepare(all_steps(context), context)


def prepare(steps: list[Step], context: Context) -> dict[str, Any]:
    """Compile the kernels of ``steps``; what the time does not suffice for is compiled where it is launched."""
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
    if arch < 89:
        steps = [step for step in steps if not step.dtype.endswith(FLOAT8)]
    if context.quick:
        steps = steps[:1]
    workers = 1 if context.quick else min(MOST_WORKERS, os.cpu_count() or 1)
    environment = child_environment()
    environment.pop("TRITON_INTERPRET", None)
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.gpu.compiling", "--steps", *map(str, steps)),
                *("--arch", str(arch), "--processors", str(processors), "--worker", str(worker), "--of", str(workers)),
                *("--until", str(context.deadline - SPARED)),
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
    whole = all(f["whole"] for f in found)
    return {
        "status": "INFO",
        "table": "prepare",
        "arch": f"sm_{arch}",
        "kernels": sum(f["kernels"] for f in found),
        "workers": workers,
        "slowest_worker_s": round(max(f["seconds"] for f in found), 2),
        "left": "none" if whole else "some: the time was up",
    }


if __name__ == "__main__":
    main()
