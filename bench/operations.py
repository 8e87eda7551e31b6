"""Every op of `pdae_fast.kernels` on a model's shape, beside the sequence of framework operators that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdae_fast import kernels

from .contenders import WrongNumbers, relative
from .timing import Alternation

GROUPS = 32
# Inputs of one sweep: several times the last-level cache, so that every call reads memory.
SWEEP_BYTES = {"cuda": 512 << 20, "cpu": 96 << 20}
MOST_VARIANTS = 32
# What an op may be off where the framework happens to be exact: a fraction of the dtype's rounding step.
FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


@dataclass(frozen=True)
class Operation:
    """``ours`` and ``framework`` take the tensors that ``draw`` makes; ``exact`` takes them in float64. ``moved`` is
    the bytes that have to move: every input read once, every output written once."""

    name: str
    shape: str
    draw: Callable[[torch.Generator], dict[str, Any]]
    ours: Callable[..., Tensor]
    framework: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    moved: int
    dtype: torch.dtype


def _image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, device=generator.device) * 0.5 - 2.3
    return x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def framework_norm(x, weight, bias, scale, shift, x2=None, x_bias=None) -> Tensor:
    """What a model does without the op, every step in the dtype of x."""
    x = x if x_bias is None else x + x_bias.to(x.dtype)[:, None, None]
    x = x if x2 is None else torch.cat([x, x2], 1)
    y = F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
    return F.silu(y * scale.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None])


def _exact_norm(x, weight, bias, scale, shift, x2=None, x_bias=None) -> Tensor:
    return kernels.group_norm_reference(x, weight, bias, GROUPS, 1e-5, scale, shift, True, x2, x_bias=x_bias)


def norm(
    batch: int,
    c1: int,
    c2: int,
    side: int,
    dtype: torch.dtype,
    last: bool,
    given: bool = False,
    biased: bool = False,
) -> Operation:
    """GroupNorm, AdaGN affine and SiLU; of two inputs when c2 > 0; with channel statistics ``given`` already, or of a
    map whose convolution left its bias to be added (``biased``)."""
    channels, size = c1 + c2, torch.empty((), dtype=dtype).element_size()

    def draw(g: torch.Generator) -> dict[str, Any]:
        values = {"x": _image((batch, c1, side, side), dtype, last, g)}
        if c2:
            values["x2"] = _image((batch, c2, side, side), dtype, last, g)
        rows = torch.randn(2 + 2 * batch, channels, generator=g, device=g.device)
        values |= {"weight": rows[0], "bias": rows[1], "scale": rows[2 : 2 + batch], "shift": rows[2 + batch :]}
        if biased:
            values["x_bias"] = torch.randn(c1, generator=g, device=g.device)
        if given:
            values["stats"] = kernels.channel_stats(values["x"])
            values["stats2"] = kernels.channel_stats(values["x2"]) if c2 else None
        return values

    def ours(x, weight, bias, scale, shift, x2=None, stats=None, stats2=None, x_bias=None) -> Tensor:
        if given:
            return kernels.group_norm_apply(x, stats, weight, bias, GROUPS, 1e-5, scale, shift, True, x2, stats2)
        return kernels.group_norm(x, weight, bias, GROUPS, 1e-5, scale, shift, True, x2, x_bias=x_bias)

    def without_statistics(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda stats=None, stats2=None, **values: function(**values)

    name = "group_norm_apply" if given else "group_norm"
    name += ", two inputs" if c2 else ", biased input" if biased else ""
    shape = f"{batch}x{c1}{f'+{c2}' if c2 else ''}x{side}x{side} {'NHWC' if last else 'NCHW'}"
    moved = 2 * batch * channels * side * side * size
    return Operation(
        name, shape, draw, ours, without_statistics(framework_norm), without_statistics(_exact_norm), moved, dtype
    )


def channel_stats(batch: int, channels: int, side: int, dtype: torch.dtype, last: bool) -> Operation:
    def framework(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
        return torch.stack([mean, variance * (side * side)], 2)

    def exact(x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        return torch.stack([mean, (x - mean[:, :, None, None]).square().sum((2, 3))], 2)

    moved = batch * channels * side * side * torch.empty((), dtype=dtype).element_size()
    return Operation(
        "channel_stats", f"{batch}x{channels}x{side}x{side} {'NHWC' if last else 'NCHW'}",
        lambda g: {"x": _image((batch, channels, side, side), dtype, last, g)},
        kernels.channel_stats, framework, exact, moved, torch.float32,
    )  # fmt: skip


def ddim_update(batch: int, channels: int, side: int, dtype: torch.dtype, last: bool) -> Operation:
    now, following = 0.62, 0.66  # alpha_bar before and after

    def draw(g: torch.Generator) -> dict[str, Any]:
        shape = (batch, channels, side, side)
        x, eps, gradient = ((_image(shape, torch.float32, last, g) + 2.3) * 2 for _ in range(3))
        return {"x": x, "eps": eps.to(dtype), "gradient": gradient.to(dtype)}

    def chain(x: Tensor, eps: Tensor, gradient: Tensor) -> Tensor:
        """Algorithm 3 as a chain of the framework's operators, in the precision of x."""
        eps = eps.to(x.dtype) - (1 - now) ** 0.5 * gradient.to(x.dtype)
        x0 = (x / now**0.5 - (1 / now - 1) ** 0.5 * eps).clamp(-1, 1)
        eps = (x / now**0.5 - x0) / (1 / now - 1) ** 0.5
        return following**0.5 * x0 + (1 - following) ** 0.5 * eps

    tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def ours(x: Tensor, eps: Tensor, gradient: Tensor) -> Tensor:
        if x.device not in tables:  # made once: a captured graph cannot copy them there
            table = kernels.ddim_coefficients([now], [following]).to(x.device)
            tables[x.device] = table, torch.zeros((), dtype=torch.int64, device=x.device)
        return kernels.ddim_update(x, eps, gradient, *tables[x.device])

    elements = batch * channels * side * side
    moved = elements * (4 + 4 + 2 * torch.empty((), dtype=dtype).element_size())
    shape = f"{batch}x{channels}x{side}x{side} {'NHWC' if last else 'NCHW'}"
    return Operation("ddim_update", shape, draw, ours, chain, chain, moved, torch.float32)


def upsample(batch: int, channels: int, side: int, dtype: torch.dtype, last: bool, sum_first: bool) -> Operation:
    """add_upsample (sum first) or upsample_add, onto a map of ``side``."""
    half, size = side // 2, torch.empty((), dtype=dtype).element_size()

    def draw(g: torch.Generator) -> dict[str, Any]:
        own = half if sum_first else side
        h = _image((batch, channels, own, own), dtype, last, g)
        return {"h": h, "residual": _image((batch, channels, half, half), dtype, last, g)}

    def framework(h: Tensor, residual: Tensor) -> Tensor:
        if sum_first:
            return F.interpolate(h + residual, scale_factor=2.0)
        return h + F.interpolate(residual, scale_factor=2.0)

    ours = kernels.add_upsample if sum_first else kernels.upsample_add
    exact = kernels.add_upsample_reference if sum_first else kernels.upsample_add_reference
    large, small = (batch * channels * s * s * size for s in (side, half))
    moved = large + 2 * small if sum_first else 2 * large + small
    shape = f"{batch}x{channels}x{side}x{side} {'NHWC' if last else 'NCHW'}"
    return Operation("add_upsample" if sum_first else "upsample_add", shape, draw, ours, framework, exact, moved, dtype)


def residual_add(batch: int, channels: int, side: int, dtype: torch.dtype, last: bool) -> Operation:
    """The end of a ResBlock: its last convolution's bias and the residual, in one pass."""

    def draw(g: torch.Generator) -> dict[str, Any]:
        h, residual = (_image((batch, channels, side, side), dtype, last, g) for _ in range(2))
        return {"h": h, "residual": residual, "bias": torch.randn(channels, generator=g, device=g.device)}

    def framework(h: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return h + bias.to(h.dtype)[:, None, None] + residual

    moved = 3 * batch * channels * side * side * torch.empty((), dtype=dtype).element_size()
    shape = f"{batch}x{channels}x{side}x{side} {'NHWC' if last else 'NCHW'}"
    exact = kernels.residual_add_reference
    return Operation("residual_add", shape, draw, kernels.residual_add, framework, exact, moved, dtype)


def add_projected(batch: int, channels: int, side: int, dtype: torch.dtype) -> Operation:
    """The end of a decoder block of two networks at once, against batched products of the two maps that are then added:
    the skip of ``batch`` images is read by both. The weights are not counted."""

    def draw(g: torch.Generator) -> dict[str, Any]:
        h, x, x2 = (_image((n * batch, channels, side, side), dtype, True, g) for n in (2, 2, 1))
        weight = torch.randn(2, 2 * channels, channels, generator=g, device=g.device) / (2 * channels) ** 0.5
        bias = torch.randn(2, channels, generator=g, device=g.device)
        return {"h": h, "x": x, "x2": x2, "weight": weight.to(dtype), "bias": bias}

    def framework(h: Tensor, x: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, rows2 = (t.permute(0, 2, 3, 1).reshape(-1, channels) for t in (x, x2))
        product = torch.bmm(rows2.expand(2, -1, -1), weight[:, channels:])
        product.baddbmm_(rows.view(2, -1, channels), weight[:, :channels])
        added = bias.to(h.dtype).repeat_interleave(batch, 0)[:, :, None, None]
        return h + product.view(2 * batch, side, side, channels).permute(0, 3, 1, 2) + added

    def ours(*tensors: Tensor, **named: Tensor) -> Tensor:
        return kernels.add_projected(*tensors, **named)[0]

    moved = 7 * batch * channels * side * side * torch.empty((), dtype=dtype).element_size()
    shape = f"2x{batch}x{channels}x{side}x{side} NHWC"
    return Operation("add_projected", shape, draw, ours, framework, kernels.add_projected_reference, moved, dtype)


def head_convolution(batch: int, channels: int, side: int, dtype: torch.dtype) -> Operation:
    """The last convolutions of two networks, to float32; the framework's round theirs."""

    def draw(g: torch.Generator) -> dict[str, Any]:
        weights = torch.randn(2, 3, channels, 3, 3, generator=g, device=g.device) / (9 * channels) ** 0.5
        return {
            "x": _image((2 * batch, channels, side, side), dtype, True, g),
            "weight": kernels.head_weights(weights).to(dtype),
            "bias": torch.randn(2, 3, generator=g, device=g.device),
        }

    def kernel_of(weight: Tensor, bias: Tensor) -> Tensor:
        return weight[..., : bias.shape[1]].permute(0, 3, 2, 1).unflatten(3, (3, 3))

    def framework(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = zip(x.chunk(2), kernel_of(weight, bias), bias.to(x.dtype), strict=True)
        return torch.cat([F.conv2d(*of, padding=1) for of in own])

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return framework(x, weight.to(x.dtype), bias)

    moved = 2 * batch * side * side * (channels * torch.empty((), dtype=dtype).element_size() + 12)
    shape = f"2x{batch}x{channels}x{side}x{side} NHWC"
    return Operation("head_convolution", shape, draw, kernels.head_convolution, framework, exact, moved, dtype)


def operations(batch: int, dtype: torch.dtype = torch.bfloat16, tiny: bool = False) -> Iterator[Operation]:
    """Shapes of the FFHQ-128 and CelebA-64 decoders: the largest map, a middle one, the smallest, and skip pairs."""
    big, middle, small = (8, 8, 8) if tiny else (128, 32, 8)
    for last in (True, False):
        yield norm(batch, 128, 0, big, dtype, last)
        yield norm(batch, 256, 0, middle, dtype, last)
        yield norm(batch, 512, 0, small, dtype, last)
        yield norm(batch, 256, 0, middle, dtype, last, biased=True)
        yield norm(batch, 256, 128, middle, dtype, last)
        yield norm(batch, 128, 128, big, dtype, last, given=True)
        yield channel_stats(batch, 128, big, dtype, last)
        yield ddim_update(batch, 3, big, dtype, last)
        yield residual_add(batch, 128, big, dtype, last)
        yield upsample(batch, 256, 2 * middle, dtype, last, sum_first=False)
        yield upsample(batch, 256, 2 * middle, dtype, last, sum_first=True)
    for channels, side in ((128, big), (256, middle), (512, small)):
        yield add_projected(batch, channels, side, dtype)
    yield head_convolution(batch, 128, big, dtype)


def sweep(function: Callable[..., Tensor], variants: list[dict[str, Any]], device: torch.device) -> Callable[[], Any]:
    """A callable that runs ``function`` on every variant; on CUDA as one captured graph, as the engine runs it, so that
    the device is timed and not Python."""

    def run() -> list[Tensor]:
        return [function(**variant) for variant in variants]

    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay(inputs: object = variants) -> list[Tensor]:  # the graph reads them, and nothing else may keep them
        graph.replay()
        return results

    return replay


def prepare(operation: Operation, device: torch.device, sweep_bytes: int | None = None):
    """(alternation of the two sides, calls in a sweep, our error, the framework's), its numbers checked first."""
    generator = torch.Generator(device=device).manual_seed(0)
    wanted = (sweep_bytes or SWEEP_BYTES[device.type]) // operation.moved
    variants = [operation.draw(generator) for _ in range(max(1, min(MOST_VARIANTS, wanted)))]
    sides = {
        "framework": sweep(operation.framework, variants, device),
        "ours": sweep(operation.ours, variants, device),
    }
    alternation = Alternation(sides, device)
    results, _ = alternation.first()
    last = {k: v.double() if isinstance(v, Tensor) else v for k, v in variants[-1].items()}
    truth = operation.exact(**last)
    errors = {name: relative(found[-1], truth) for name, found in results.items()}
    allowed = max(2 * errors["framework"], FLOOR[operation.dtype])
    if not errors["ours"] <= allowed:
        raise WrongNumbers(
            f"{operation.name} {operation.shape}: wrong numbers (error {errors['ours']:.2e}, "
            f"allowed {allowed:.1e}): no speed is reported"
        )
    return alternation, len(variants), errors["ours"], errors["framework"]


def row(operation: Operation, alternation: Alternation, calls: int, errors: tuple[float, float], bandwidth: float):
    """A row of the "kernel" table."""
    times, ratio = alternation.spread("ours").scaled(1 / calls), alternation.ratio("ours", "framework")
    return {
        "op": operation.name,
        "shape": operation.shape,
        "median_s": times.median,
        "spread_s": [times.low, times.high],
        "ratio": ratio.median,
        "ratio_spread": [ratio.low, ratio.high],
        "moved_bytes": operation.moved,
        "copy_fraction": operation.moved / times.median / bandwidth,
        "error": errors[0],
        "error_framework": errors[1],
    }
