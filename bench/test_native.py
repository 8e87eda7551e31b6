"""Native 3x3 convolutions and attention of the CPU against the framework's, by shape; each error is against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.contenders import check, relative
from bench.tables import RUN
from bench.timing import Alternation, pedantic, rounds_within
from pdae_fast import kernels
from pdae_fast.engine.attention import sdpa
from pdae_fast.engine.convolution import PackedConvolution

# (batch, C, N, side): of celeba64 and ffhq128, the largest maps to the smallest.
CONVOLUTIONS = [
    (b, *shape)
    for shape in ((128, 128, 128), (64, 64, 64), (128, 64, 64), (256, 256, 16), (512, 512, 8))
    for b in (1, 8)
]
UPSAMPLED = [(b, *shape) for shape in ((128, 128, 64), (512, 512, 16)) for b in (1, 8)]
ATTENTION = [(1, 256, 4, 64), (8, 256, 4, 64), (8, 256, 1, 384), (8, 64, 4, 128)]  # (batch, tokens, heads, width)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of a side's error, over the framework's or rounding: 4x4 tiles of bfloat16 are the loosest.
ALLOWED = {"float32": 5e-6, "bfloat16": 3e-2}
SECONDS = 4.0
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = pytest.mark.skipif(not kernels.winograd_status()[0], reason=kernels.winograd_status()[1])


def compare(
    benchmark, op: str, shape: tuple, dtype: str, sides: dict[str, Callable[[], Tensor]], exact: Tensor, flops: float
):
    """A row for every side but the first, the framework's."""
    with torch.inference_mode():
        errors = {name: check(name, relative(run(), exact), ALLOWED[dtype]) for name, run in sides.items()}
        alternation = Alternation(sides, torch.device("cpu"))
        _, one_round = alternation.first()
        if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round, most=60)):
            return
    framework, *ours = sides
    for name in ours:
        times, ratio = alternation.spread(name), alternation.ratio(name, framework)
        RUN.add(
            "native", op=op, shape="x".join(map(str, shape)), dtype=dtype, contender=name, median_s=times.median,
            spread_s=[times.low, times.high], ratio=ratio.median, ratio_spread=[ratio.low, ratio.high],
            gflops_direct=round(flops / times.median / 1e9), error=errors[name], error_framework=errors[framework],
        )  # fmt: skip


@by_dtype
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=lambda s: "x".join(map(str, s)))
def test_convolution(benchmark, shape, dtype):
    measure(benchmark, shape, dtype, {f"F({tile}x{tile})": tile for tile in (2, 4)})


@by_dtype
@pytest.mark.parametrize("shape", UPSAMPLED, ids=lambda s: "x".join(map(str, s)))
def test_upsampled_convolution(benchmark, shape, dtype):
    """Of a map of half the side, after nearest-2x."""
    measure(benchmark, shape, dtype, {"F(2x2)": 2, "F(4x4)": 4, "upsampled": kernels.UPSAMPLED}, upsample=True)


def measure(benchmark, shape: tuple, dtype: str, tiles: dict[str, int], upsample: bool = False) -> None:
    kind, (batch, channels, outputs, side) = DTYPES[dtype], shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side >> upsample, side >> upsample, generator=generator).to(kind)
    x = x.contiguous(memory_format=torch.channels_last)
    large = F.interpolate(x, scale_factor=2.0) if upsample else x
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    direct = PackedConvolution(weight.to(kind), bias.to(kind), 1, 1)
    sides = {"direct": lambda: direct(large)}
    for name, tile in tiles.items():
        u = kernels.winograd_weights(weight, tile, kind)
        sides[name] = functools.partial(kernels.winograd, x, u, bias, outputs, tile, upsample=upsample)
    exact = F.conv2d(large.double(), weight.double(), bias.double(), padding=1)
    flops = 2 * 9 * batch * channels * outputs * side**2
    compare(benchmark, "upsampled convolution" if upsample else "convolution", shape, dtype, sides, exact, flops)


@by_dtype
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda s: "x".join(map(str, s)))
def test_attention(benchmark, shape, dtype):
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch, tokens, heads, 3, width, generator=generator).to(DTYPES[dtype])
    q, k, v = rows.unbind(3)
    if not kernels.attention_fits(q, k, v):
        pytest.skip(f"this processor does not multiply {dtype}")
    sides = {"sdpa": lambda: sdpa(q, k, v).contiguous(), "native": lambda: kernels.attention_native(q, k, v)}
    exact = sdpa(q.double(), k.double(), v.double())
    compare(benchmark, "attention", shape, dtype, sides, exact, 4 * batch * heads * tokens**2 * width)
