"""The CPU's compiled 1x1 convolution, of one map or two: against float64, on any number of threads."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import (
    _native,
    pointwise,
    pointwise_fits,
    pointwise_status,
    pointwise_weights,
)
from pdae_fast.kernels.pointwise import _library

# (batch, C1, C2, N, H, W)
SHAPES = {
    "one-pixel": (1, 16, 0, 32, 1, 1),
    "odd": (3, 30, 0, 41, 5, 11),
    "two-maps": (2, 48, 16, 64, 4, 7),
    "two-odd-maps": (1, 2, 34, 7, 13, 3),
    "many-outputs": (1, 96, 0, 288, 4, 4),
    "many-channels": (1, 1024, 512, 96, 3, 3),
    "several-blocks": (2, 64, 64, 64, 37, 39),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BOUND = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # relative RMS error; rounding to bfloat16 alone makes 1.7e-3


@pytest.fixture(autouse=True)
def native():
    if not any(map(shutil.which, _native.COMPILERS)):
        pytest.skip("no C compiler")
    usable, reason = pointwise_status()
    assert usable, reason  # where there is a compiler, nothing may be skipped in silence


def case(shape, dtype=torch.float32, seed=0):
    batch, c1, c2, outputs, height, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    def image(channels, mean):
        values = draw(batch, channels, height, width) + mean
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    return SimpleNamespace(
        x=image(c1, -2.3), x2=image(c2, 1.4) if c2 else None, bias=3 * draw(outputs), residual=image(outputs, 0.7),
        weight=(draw(outputs, c1 + c2, 1, 1) / (c1 + c2) ** 0.5).to(dtype),
    )  # fmt: skip


def exact(c):
    x = c.x if c.x2 is None else torch.cat([c.x, c.x2], 1)
    y = F.conv2d(x.double(), c.weight.double(), None if c.bias is None else c.bias.double())
    return y if c.residual is None else y + c.residual.double()


def run(c):
    return pointwise(c.x, pointwise_weights(c.weight), c.bias, len(c.weight), c.x2, c.residual)


@by_shape
@by_dtype
def test_pointwise(poisoned_memory, error, shape, dtype):
    c = case(shape, dtype)
    for missing in ((), ("residual",), ("bias",)):
        vars(c).update(dict.fromkeys(missing))
        y = run(c)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, exact(c)) < BOUND[dtype]


@by_shape
@by_dtype
def test_nothing_else_is_written_or_read(monkeypatch, guarded, shape, dtype):
    """All buffers between canaries. NaNs beside the inputs must not reach the result."""
    c, checks, empty = case(shape, dtype), [], torch.empty
    u, expected = pointwise_weights(c.weight).flatten(), run(c)

    def allocate(*arguments, **keywords):
        found, check = guarded(empty(*arguments, **keywords).fill_(float("nan")))
        checks.append(check)
        return found

    inputs = [guarded(t) for t in (c.x, c.bias, c.residual, u, *(() if c.x2 is None else (c.x2,)))]
    (c.x, c.bias, c.residual, u, *two), before = (t for t, _ in inputs), [t.clone() for t, _ in inputs]
    monkeypatch.setattr(torch, "empty", allocate)
    found = pointwise(c.x, u, c.bias, len(c.weight), two[0] if two else None, c.residual)
    monkeypatch.undo()
    assert len(checks) == 1 and checks[0]()
    assert all(check() and torch.equal(t, old) for (t, check), old in zip(inputs, before, strict=True))
    assert torch.equal(found, expected)


@by_dtype
@pytest.mark.parametrize("shape", [(1, 64, 64, 64, 40, 40), (3, 96, 0, 96, 5, 7), (1, 256, 0, 160, 8, 8)], ids=str)
def test_any_number_of_threads(poisoned_memory, shape, dtype):
    """Rows that divide evenly and not, and output channels where there are few rows: the same to the bit."""
    c, before, found = case(shape, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(c))
    finally:
        torch.set_num_threads(before)
    assert not found[0].isnan().any() and all(torch.equal(y, found[0]) for y in found)


def test_an_image_in_any_batch():
    c = case((5, 32, 16, 48, 21, 13))
    whole, maps = run(c), (c.x, c.x2, c.residual)
    for i in range(5):
        c.x, c.x2, c.residual = (t[i : i + 1].contiguous(memory_format=torch.channels_last) for t in maps)
        assert torch.equal(run(c)[0], whole[i])


def test_two_python_threads_at_once():
    cases = [case(SHAPES["several-blocks"], seed=i) for i in range(2)]
    expected = [run(c) for c in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(run, cases), expected))


def test_what_fits():
    weight = torch.zeros(8, 32, 1, 1)
    assert pointwise_fits(weight) and pointwise_fits(weight.bfloat16())
    assert not pointwise_fits(weight, stride=2) and not pointwise_fits(weight, padding=1)
    assert not pointwise_fits(weight.double()) and not pointwise_fits(weight[:, :31])
    assert not pointwise_fits(torch.zeros(8, 32, 3, 3))


def test_nothing_fits_without_native_code(monkeypatch):
    monkeypatch.setenv("PDAE_FAST_NATIVE", "0")
    _library.cache_clear()
    try:
        assert pointwise_status() == (False, "switched off by PDAE_FAST_NATIVE")
        assert not pointwise_fits(torch.zeros(8, 32, 1, 1))
    finally:
        _library.cache_clear()


@pytest.mark.slow
def test_under_sanitisers(sanitised):
    """The self-check, and teams that divide rows and outputs, in a build that ends at the first fault."""
    code = """
import torch
from pdae_fast.kernels import pointwise, pointwise_status, pointwise_weights
assert pointwise_status()[0], pointwise_status()
for side in (3, 40):
    x, x2 = (torch.randn(1, c, side, side).contiguous(memory_format=torch.channels_last) for c in (30, 8))
    u = pointwise_weights(torch.randn(70, 38, 1, 1))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pointwise(x, u, torch.randn(70), 70, x2)
"""
    assert sanitised(code) == 1


def test_no_images():
    c = case(SHAPES["two-maps"])
    assert pointwise(c.x[:0], pointwise_weights(c.weight), c.bias, 64, c.x2[:0]).shape == (0, 64, 4, 7)
