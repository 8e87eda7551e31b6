"""Phase "profile": where the time of a step goes: by kernel, and by the shape of its convolutions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import budget
from bench.contenders import PlanSide
from bench.networks import case
from bench.timing import clock, spread

from .cases import Cases, Context
from .side import order
from .speed import timed_steps

SHOWN = 14  # kernels
REPEATS = 7


def cases(context: Context) -> Cases:
    batch = max(context.batches)
    for network in context.networks:
        yield f"convolutions of {network} batch {batch}", lambda n=network: _convolutions(n, batch, context)
    for network, batch_of in order(context):
        yield f"{network} batch {batch_of}", lambda n=network, b=batch_of: _profile(n, b, context)


def _profile(network: str, batch: int, context: Context) -> list[dict[str, Any]]:
    """Launches, time and share of every kernel in a step, and what was expected to be launched."""
    from torch.profiler import ProfilerActivity, profile

    steps = timed_steps(batch, context)
    side = PlanSide(case(network, batch, context.device), "fused-bfloat16")
    for _ in range(2):
        side.trajectory(steps)
    activity = ProfilerActivity.CUDA if context.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        side.trajectory(steps)
        if context.cuda:
            torch.cuda.synchronize(context.device)
    own = "self_device_time_total" if context.cuda else "self_cpu_time_total"
    found = [(e.key, e.count / steps, getattr(e, own) * 1e-6 / steps) for e in profiler.key_averages()]
    found = sorted((f for f in found if f[2] > 0), key=lambda f: -f[2])
    total, launches = sum(f[2] for f in found), sum(f[1] for f in found)
    expected = budget.count(budget.empty_model(network), batch)
    shown, others = found[:SHOWN], found[SHOWN:]
    if others:
        shown.append(("(others)", sum(f[1] for f in others), sum(f[2] for f in others)))
    head = {"status": "INFO", "table": "profile", "network": network, "batch": batch}
    rows = [
        {**head, "kernel": "(all)", "launches": launches, "kernel_s": total, "time_fraction": 1.0,
         "expected": expected.nodes, "moved_bytes": expected.bytes},
        *({**head, "kernel": key[:60], "launches": n, "kernel_s": s, "time_fraction": s / total}
          for key, n, s in shown),
    ]  # fmt: skip
    if context.cuda:
        rows[0]["reserved_bytes"] = torch.cuda.memory_reserved(context.device)
    return rows


class _Shapes(TorchDispatchMode):
    """Counts the convolutions by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple] = Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "conv2d":
            x, weight, _, stride, padding = (*args, None, 1, 0)[:5] if len(args) < 5 else args[:5]
            self.found[tuple(x.shape), tuple(weight.shape), tuple(_pair(stride)), tuple(_pair(padding))] += 1
        return function(*args, **(kwargs or {}))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def convolution_shapes(network: str, batch: int) -> Counter[tuple]:
    """((x's shape, weight's, stride, padding): how often) in a step with G."""
    trajectory = budget.meta_trajectory(budget.meta_plan(budget.empty_model(network)), batch)
    shapes = _Shapes()
    with torch.inference_mode(), budget.cuda_functions(lambda launches: None, "launches are not wanted"), shapes:
        trajectory._step(trajectory.workloads[0])
    return shapes.found


def _convolutions(network: str, batch: int, context: Context) -> list[dict[str, Any]]:
    """TFLOP/s of every shape in bfloat16, channels-last, by the algorithm that cuDNN finds fastest; costliest first."""
    rows, device = [], context.device
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.inference_mode():
        for (shape, weights, stride, padding), count in convolution_shapes(network, batch).items():
            x, weight = (
                torch.randn(s, device=device).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
                for s in (shape, weights)
            )

            def run(x: Tensor = x, weight: Tensor = weight, stride=stride, padding=padding) -> Tensor:
                return F.conv2d(x, weight, None, stride, padding)

            out = run()
            times = [clock(run, device)[0] for _ in range(2 if context.quick else REPEATS)]
            seconds = spread(times[1:]).median
            flops = 2 * out.numel() * weight[0].numel()
            text = f"{'x'.join(map(str, shape))} by {'x'.join(map(str, weights))}" + (" /2" if stride[0] == 2 else "")
            rows.append({
                "status": "INFO", "table": "convolution", "network": network, "shape": text, "count": count,
                "median_s": seconds, "tflop_rate": flops / seconds / 1e12, "together_s": count * seconds,
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row["together_s"])
