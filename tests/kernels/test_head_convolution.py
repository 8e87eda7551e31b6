"""The last convolution of a U-Net, in float32 whatever it reads: against float64."""

import pytest
import torch

from pdae_fast.kernels import head_convolution, head_weights

# (batch, rows of weights, channels, outputs, height, width)
SHAPES = {
    "aligned": (4, 2, 64, 3, 8, 16),
    "one-pixel": (1, 1, 16, 1, 1, 1),
    "odd": (3, 1, 5, 6, 9, 5),
    "odd-row": (2, 2, 16, 3, 1, 7),
    "several-steps": (2, 2, 80, 3, 5, 4),
    "several-tiles": (2, 1, 16, 1, 13, 31),
    "many-outputs": (2, 1, 32, 20, 4, 3),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def given(image, vector):
    def make(shape, dtype=torch.float32, channels_last=True):
        batch, rows, channels, outputs, *size = shape
        x = image((batch, channels, *size), dtype, channels_last, 0.7)
        weights = (vector(rows, outputs * channels * 9) / (9 * channels) ** 0.5).view(rows, outputs, channels, 3, 3)
        return x, weights.to(dtype), vector(rows, outputs)

    return make


def truth_of(x, weights, bias):
    """Image by image, in float64."""
    own = [i * len(bias) // len(x) for i in range(len(x))]
    made = [
        torch.nn.functional.conv2d(x[i : i + 1].double(), weights[row].double(), bias[row].double(), padding=1)
        for i, row in enumerate(own)
    ]
    return torch.cat(made)


@by_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel(given, launch, poisoned, error, shape, dtype):
    """Nothing is rounded but sums in float32, whatever the map's dtype."""
    from pdae_fast.kernels.head_convolution_triton import head_convolution_launches

    x, weights, bias = given(shape, dtype)
    truth = truth_of(x, weights, bias)
    out = poisoned(torch.empty(truth.shape, device=x.device))
    launch(head_convolution_launches(x, head_weights(weights), bias, out))
    assert error(out, truth) < 1e-6


@by_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops(given, cuda, error, shape, dtype):
    """The CPU's and CUDA's functions alike, on inputs that have to be copied."""
    x, weights, bias = given(shape, dtype, channels_last=False)
    laid_out = head_weights(weights)
    for op in (head_convolution, cuda("head_convolution", "head_convolution")):
        y = op(x, laid_out, bias)
        assert y.dtype is torch.float32 and y.is_contiguous()
        assert error(y, truth_of(x, weights, bias)) < 1e-6
    torch.library.opcheck(torch.ops.pdae_fast.head_convolution.default, (x, laid_out, bias))


COMPILE = """
import torch
from pdae_fast.kernels import aot
from pdae_fast.kernels.head_convolution_triton import head_convolution_launches

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

for dtype in (torch.float32, torch.bfloat16):
    for batch, side, c, outputs in ((2, 64, 64, 3), (128, 128, 128, 3), (2, 32, 32, 1), (4, 256, 256, 6)):
        x = empty(batch, c, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        given = empty(2, 9, c, 16, dtype=dtype), empty(2, outputs), empty(batch, outputs, side, side)
        (launch,) = head_convolution_launches(x, *given)
        for arch in aot.ARCHITECTURES:
            usage = aot.compile_launch(launch, arch)
            excess = usage.excess(aot.BUDGETS["head_kernel"])
            print(arch, dtype, launch.constants, usage, excess or "fits")
"""


@pytest.mark.slow
def test_it_compiles(compiled):
    """Without spills."""
    lines = compiled(COMPILE)
    assert len(lines) == 32 and all(line.endswith("fits") for line in lines), lines


def test_errors():
    x, weight, bias = torch.zeros(4, 8, 2, 2), head_weights(torch.zeros(2, 3, 8, 3, 3)), torch.zeros(2, 3)
    for arguments, words in (
        ((x[0], weight, bias), "x must be"),
        ((x[:3], weight, bias), "weight must have shape"),
        ((x, weight[:, :, :7], bias), "weight must have shape"),
        ((x, weight[..., :3], bias), "weight must have shape"),
        ((x, weight.bfloat16(), bias), "weight is torch.bfloat16 but x is"),
        ((x, weight, bias[:1]), "bias must have shape"),
    ):
        with pytest.raises(ValueError, match=words):
            head_convolution(*arguments)
