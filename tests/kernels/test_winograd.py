"""The CPU's compiled 3x3 convolution: against float64, on any number of threads, and wherever it cannot be had."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import _native, winograd, winograd_bytes, winograd_fits, winograd_status, winograd_weights
from pdae_fast.kernels.winograd import UPSAMPLED, _library

COMPILER = next((found for found in map(shutil.which, _native.COMPILERS) if found), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

# (batch, C, N, H, W)
SHAPES = {
    "one-pixel": (1, 16, 32, 1, 1),
    "one-row": (2, 16, 32, 1, 19),
    "one-tile": (1, 32, 64, 4, 4),
    "odd": (3, 32, 40, 5, 11),
    "cut-panel": (1, 48, 7, 13, 6),
    "many-channels": (1, 528, 96, 8, 8),
    "many-images": (9, 16, 33, 6, 7),
    "several-blocks": (2, 64, 64, 37, 39),
    "model": (1, 64, 64, 32, 32),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_tile = pytest.mark.parametrize("tile", [2, 4], ids=["2x2", "4x4"])
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Relative RMS error; textbook points (1 and 2) would make 2.5 times as much of it in float32.
BOUND = {(torch.float32, 2): 6e-7, (torch.float32, 4): 1.2e-6, (torch.bfloat16, 2): 7e-3, (torch.bfloat16, 4): 2.5e-2}
BOUND |= {(torch.float32, UPSAMPLED): 6e-7, (torch.bfloat16, UPSAMPLED): 7e-3}
# What a map is read as, and in which tiles.
KINDS = {
    "same-2x2": (False, 2), "same-4x4": (False, 4), "upsampled-2x2": (True, 2), "upsampled-4x4": (True, 4),
    "upsampled": (True, UPSAMPLED),
}  # fmt: skip
by_kind = pytest.mark.parametrize("upsample, tile", KINDS.values(), ids=KINDS)


@pytest.fixture
def native():
    if COMPILER is None:
        pytest.skip("no C compiler")
    usable, reason = winograd_status()
    assert usable, reason  # where there is a compiler, nothing may be skipped in silence


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled or loaded yet, and an empty cache folder; afterwards all is as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PDAE_FAST_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    _library.cache_clear()
    yield
    _library.cache_clear()


def case(shape, dtype=torch.float32, upsample=False, seed=0):
    batch, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    def image(channels, scale, mean):
        values = draw(batch, channels, height * scale, width * scale) + mean
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    return SimpleNamespace(
        x=image(channels, 1, -2.3), weight=draw(outputs, channels, 3, 3) / (9 * channels) ** 0.5,
        bias=3 * draw(outputs), residual=image(outputs, 1 + upsample, 0.7), upsample=upsample,
    )  # fmt: skip


def exact(c):
    x = F.interpolate(c.x.double(), scale_factor=2.0) if c.upsample else c.x.double()
    y = F.conv2d(x, c.weight.double(), None if c.bias is None else c.bias.double(), padding=1)
    return y if c.residual is None else y + c.residual.double()


def run(c, tile):
    u = winograd_weights(c.weight, tile, c.x.dtype)
    assert u.numel() * u.element_size() == winograd_bytes(*c.weight.shape[:2], tile, c.x.dtype)
    return winograd(c.x, u, c.bias, len(c.weight), tile, c.residual, upsample=c.upsample)


@by_shape
@by_kind
@by_dtype
def test_winograd(native, poisoned_memory, error, shape, tile, dtype, upsample):
    c = case(shape, dtype, upsample)
    for missing in ((), ("residual",), ("bias",)):
        vars(c).update(dict.fromkeys(missing))
        y = run(c, tile)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, exact(c)) < BOUND[dtype, tile]


@by_tile
def test_every_layout_of_weights(native, tile):
    c = case(SHAPES["odd"])
    expected = run(c, tile)
    c.weight = c.weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(c, tile), expected)


@by_shape
@by_kind
@by_dtype
def test_nothing_else_is_written_or_read(native, monkeypatch, guarded, shape, tile, dtype, upsample):
    """All buffers between canaries. NaNs beside the inputs must not reach the result."""
    c = case(shape, dtype, upsample)
    expected, checks, empty = run(c, tile), [], torch.empty

    def allocate(*arguments, **keywords):
        found, check = guarded(empty(*arguments, **keywords).fill_(float("nan")))
        checks.append(check)
        return found

    inputs = [guarded(t) for t in (c.x, c.bias, c.residual)]
    (c.x, c.bias, c.residual), before = (t for t, _ in inputs), [t.clone() for t, _ in inputs]
    monkeypatch.setattr(torch, "empty", allocate)
    found = run(c, tile)
    monkeypatch.undo()
    assert len(checks) == 2 and all(check() for check in checks)  # weights and result
    assert all(check() and torch.equal(t, old) for (t, check), old in zip(inputs, before, strict=True))
    assert torch.equal(found, expected)


@by_kind
@by_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 64, 40, 40), (3, 96, 96, 20, 21), (1, 256, 160, 8, 8), (1, 32, 32, 8, 8), (1, 512, 512, 16, 16)],
    ids=str,
)
def test_any_number_of_threads(native, poisoned_memory, shape, upsample, tile, dtype):
    """Blocks that divide evenly and not, output channels that do and do not: the same to the bit."""
    c, before = case(shape, dtype, upsample), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(c, tile))
    finally:
        torch.set_num_threads(before)
    assert not found[0].isnan().any() and all(torch.equal(y, found[0]) for y in found)


@by_kind
def test_an_image_in_any_batch(native, upsample, tile):
    c = case((5, 64, 64, 21, 13), upsample=upsample)
    whole = run(c, tile)
    x, residual = c.x, c.residual
    for i in range(5):
        c.x, c.residual = (t[i : i + 1].contiguous(memory_format=torch.channels_last) for t in (x, residual))
        assert torch.equal(run(c, tile)[0], whole[i])


def test_what_fits(native):
    weight = torch.zeros(8, 32, 3, 3)
    assert winograd_fits(weight, torch.float32)
    assert not winograd_fits(weight, torch.float32, stride=2) and not winograd_fits(weight, torch.float32, padding=0)
    assert not winograd_fits(weight, torch.float64) and not winograd_fits(weight[:, :24], torch.float32)
    assert not winograd_fits(weight[..., :1, :1], torch.float32)


def test_nothing_fits_without_native_code(fresh, monkeypatch):
    monkeypatch.setenv("PDAE_FAST_NATIVE", "0")
    assert winograd_status() == (False, "switched off by PDAE_FAST_NATIVE")
    assert not winograd_fits(torch.zeros(8, 32, 3, 3), torch.float32)


SMALL_TEAM = """
import torch
from pdae_fast.kernels import winograd, winograd_status, winograd_weights
assert winograd_status()[0]
x = torch.randn(1, 256, 8, 8).contiguous(memory_format=torch.channels_last)
weight = torch.randn(160, 256, 3, 3)
for tile in (2, 3, 4):
    u, found = winograd_weights(weight, tile, x.dtype), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(winograd(x, u, None, 160, tile, upsample=tile == 3))
    assert all(torch.equal(y, found[0]) for y in found)
"""


def test_a_team_smaller_than_asked_for(native):
    """Threads divide output channels here, and each has memory for its share of them alone."""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1", "MALLOC_PERTURB_": "85"}
    done = subprocess.run([sys.executable, "-c", SMALL_TEAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_python_threads_at_once(native):
    cases = [case(SHAPES["several-blocks"], seed=i) for i in range(2)]
    expected = [run(c, 4) for c in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(lambda c: run(c, 4), cases), expected))


def test_no_images(native):
    c = case(SHAPES["one-tile"])
    u = winograd_weights(c.weight, 4, torch.float32)
    assert winograd(c.x[:0], u, c.bias, 64, 4).shape == (0, 64, 4, 4)


LESSER = """
from pdae_fast.kernels import attention_native, attention_status, native_status, pointwise_status
assert attention_status()[0] and native_status()[0], (attention_status(), native_status())
assert pointwise_status()[0], pointwise_status()
for dtype, bounds in ((torch.float32, (2e-6, 2e-6)), (torch.bfloat16, (7e-3, 2.5e-2))):
    x, weight = torch.randn(3, 48, 9, 11).to(dtype), torch.randn(37, 48, 3, 3) / 20
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    x = x.contiguous(memory_format=torch.channels_last)
    for tile, bound in zip((2, 4), bounds):
        found = winograd(x, winograd_weights(weight, tile, dtype), None, 37, tile).double()
        assert (found - expected).norm() < bound * expected.norm()
    q, k, v = torch.randn(2, 45, 2, 3, 48).to(dtype).unbind(3)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)))
    assert (attention_native(q, k, v).double() - expected.transpose(1, 2)).norm() < bounds[0] * expected.norm()
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor's extensions")
@pytest.mark.parametrize("without", ["avx512f", "avx512bf16"])
def test_a_lesser_processor(native, tmp_path, without):
    """What is built where AVX-512, or its bfloat16, is missing: other vectors and other micro-kernels."""
    environment = {**os.environ, "CC": f"{COMPILER} -mno-{without}", "XDG_CACHE_HOME": str(tmp_path)}
    code = SMALL_TEAM + LESSER
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_under_sanitisers(native, sanitised):
    """The self-checks of all native sources, and teams of several sizes, in builds that end at the first fault."""
    code = (
        SMALL_TEAM
        + """
from pdae_fast.kernels import attention_native, attention_status, native_status
assert native_status()[0] and attention_status()[0], (native_status(), attention_status())
q, k, v = torch.randn(1, 75, 1, 3, 48).unbind(3)
for threads in (1, 3):
    torch.set_num_threads(threads)
    attention_native(q, k, v)
"""
    )
    assert sanitised(code) == 3  # all were built anew
