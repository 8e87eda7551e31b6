"""The end of a block that reads two maps: against float64, with the statistics of what is stored."""

import pytest
import torch

from pdae_fast.kernels import add_projected, add_projected_reference, partial_stats

# (batch, images of x2, rows of weights, c1, c2, outputs, height, width, part, splits)
SHAPES = {
    "stacked": (4, 2, 2, 8, 16, 24, 5, 7, 2, 3),
    "aligned": (4, 2, 2, 16, 32, 48, 6, 5, 4, 3),
    "one-pixel": (2, 1, 2, 4, 4, 8, 1, 1, 4, 1),
    "odd": (3, 3, 1, 5, 3, 6, 9, 5, 1, 4),
    "more-than-a-block": (2, 2, 1, 40, 33, 136, 6, 6, 8, 1),
    "several-tiles": (2, 1, 2, 8, 8, 16, 30, 31, 4, 2),
    "an-empty-tile": (1, 1, 1, 4, 4, 8, 27, 19, 2, 4),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def given(image, vector):
    def make(shape, dtype=torch.float32, channels_last=True, mean=-2.3, bias=1.0):
        batch, batch2, rows, c1, c2, outputs, *size = shape[:8]
        h = image((batch, outputs, *size), dtype, channels_last, mean)
        x = image((batch, c1, *size), dtype, channels_last)
        x2 = image((batch2, c2, *size), dtype, channels_last, 0.7, 1.5)
        weight = (vector(rows, c1 + c2, outputs) / (c1 + c2) ** 0.5).to(dtype)
        return h, x, x2, weight, bias * (vector(rows, outputs) if rows > 1 else vector(outputs))

    return make


def truth_of(h, x, x2, weight, bias):
    """By float64 convolutions of the joined maps, image by image."""
    made = []
    for i in range(len(h)):
        joined = torch.cat([x[i], x2[i % len(x2)]])[None].double()
        kernel = weight[i * len(weight) // len(h)].double().T[..., None, None]
        added = bias if bias.dim() == 1 else bias[i * len(bias) // len(h)]
        made.append(torch.nn.functional.conv2d(joined, kernel, added.double()) + h[i].double())
    return torch.cat(made)


@by_shape
@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel(given, launch, poisoned, error, assert_no_worse, shape, dtype, with_stats):
    from pdae_fast.kernels.add_projected_triton import add_projected_launches

    arguments = given(shape, dtype)
    *_, part, splits = shape
    h = arguments[0]
    out = poisoned(torch.empty(h.shape, dtype=dtype, device=h.device, memory_format=torch.channels_last))
    partial = torch.full((len(h), h.shape[1] // part, splits, 2), float("nan"), device=h.device)
    launch(add_projected_launches(*arguments, out, partial if with_stats else None, splits))
    assert_no_worse(out, add_projected_reference(*arguments).to(dtype), truth_of(*arguments))
    if with_stats:
        expected = partial_stats(out.double(), part, splits)
        assert error(partial[..., 0], expected[..., 0]) < 4e-7
        if expected[..., 1].any():
            assert error(partial[..., 1], expected[..., 1]) < 2e-6
    else:
        assert bool(partial.isnan().all())


@pytest.mark.parametrize(("mean", "bias"), [(1000, 1), (-2.3, 1000)])
def test_kernel_far_from_zero(given, launch, poisoned, error, mean, bias):
    """Sums of squares would have no digit left."""
    from pdae_fast.kernels.add_projected_triton import add_projected_launches

    arguments = given((1, 1, 1, 4, 4, 8, 30, 31, 1, 2), mean=mean, bias=bias)
    out = poisoned(arguments[0])
    partial = torch.full((1, 8, 2, 2), float("nan"), device=out.device)
    launch(add_projected_launches(*arguments, out, partial, 2))
    expected = partial_stats(out.double(), 1, 2)
    assert error(partial[..., 0], expected[..., 0]) < 4e-7
    assert error(partial[..., 1], expected[..., 1]) < 2e-4


@by_shape
def test_ops(given, cuda, error, shape):
    """The CPU's and CUDA's functions alike, on inputs that have to be copied."""
    arguments, (*_, part, splits) = given(shape, channels_last=False), shape
    truth = truth_of(*arguments)
    for op in (add_projected, cuda("add_projected", "add_projected")):
        y, table = op(*arguments, part, splits)
        assert error(y, truth) < 1e-6 and y.is_contiguous(memory_format=torch.channels_last)
        assert error(table, partial_stats(y.double(), part, splits)) < 1e-6
        assert error(op(*arguments, 0, 1)[0], truth) < 1e-6
    torch.library.opcheck(torch.ops.pdae_fast.add_projected.default, (*arguments, part, splits))
    assert add_projected(*arguments)[1] is None


COMPILE = """
import torch
from pdae_fast.kernels import aot
from pdae_fast.kernels.add_projected_triton import add_projected_launches

def empty(*shape, dtype):
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

for dtype in (torch.float32, torch.bfloat16):
    for batch, side, c, splits in ((2, 8, 512, 1), (128, 64, 128, 4), (2, 15, 96, 1), (4, 32, 32, 8)):
        h, x, x2 = (empty(n, c, side, side, dtype=dtype) for n in (batch, batch, batch // 2))
        bias, partial = (empty(*s, dtype=torch.float32) for s in ((2, c), (batch, c, splits, 2)))
        for table in (None, partial):
            (launch,) = add_projected_launches(h, x, x2, empty(2, 2 * c, c, dtype=dtype), bias, h, table, splits)
            for arch in aot.ARCHITECTURES:
                usage = aot.compile_launch(launch, arch)
                excess = usage.excess(aot.BUDGETS["add_projected_kernel"])
                print(arch, dtype, launch.constants, usage, excess or "fits")
"""


@pytest.mark.slow
def test_it_compiles(compiled):
    """Without spills."""
    lines = compiled(COMPILE)
    assert len(lines) == 64 and all(line.endswith("fits") for line in lines), lines


def test_errors():
    h, x, weight, bias = torch.zeros(4, 6, 2, 2), torch.zeros(4, 4, 2, 2), torch.zeros(2, 8, 6), torch.zeros(6)
    for arguments, words in (
        ((h, x, torch.zeros(3, 4, 2, 2), weight, bias), "x2 must have shape"),
        ((h, x[:2], x, weight, bias), "x must have shape"),
        ((h, x, x, torch.zeros(3, 8, 6), bias), "weight must have shape"),
        ((h, x, x, weight[:, :7], bias), "weight must have shape"),
        ((h, x, x, weight.bfloat16(), bias), "weight is torch.bfloat16 but h is"),
        ((h, x, x, weight, bias[:5]), "bias must have shape"),
        ((h, x, x, weight, bias, 4, 1), "6 channels do not fall into parts of 4"),
        ((h, x, x, weight, bias, 2, 3), "4 pixels do not fall into 3 splits"),
    ):
        with pytest.raises(ValueError, match=words):
            add_projected(*arguments)
