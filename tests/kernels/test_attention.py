"""The CPU's compiled attention: against float64, where its inputs stand, and on any number of threads."""

import shutil

import pytest
import torch

from pdae_fast.kernels import _native, attention_fits, attention_native, attention_status
from pdae_fast.kernels.attention import _library

HAS_COMPILER = any(map(shutil.which, _native.COMPILERS))
# (batch, tokens, heads, width)
SHAPES = {
    "one-token": (1, 1, 1, 16),
    "fewer-than-a-panel": (2, 5, 3, 16),
    "odd": (2, 45, 2, 48),
    "half-a-vector": (2, 37, 3, 8),
    "no-whole-vectors": (2, 64, 4, 24),
    "whole-panels": (1, 64, 4, 64),
    "wide": (1, 70, 1, 400),
    "long": (1, 1029, 1, 32),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
by_order = pytest.mark.parametrize("side", [2, 3], ids=["q-k-v", "heads"])
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def native():
    if not HAS_COMPILER:
        pytest.skip("no C compiler")
    usable, reason = attention_status()
    assert usable, reason  # where there is a compiler, nothing may be skipped in silence


def rows(shape, dtype, side, seed=0):
    """What the projection leaves: q, k and v side by side, all heads' or every head's. Keys that are alike and large
    scores among them."""
    batch, tokens, heads, width = shape
    size = [batch, tokens, heads, width]
    size.insert(side, 3)
    return (1.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed)) + 0.4).to(dtype)


def exact(q, k, v):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2)


@by_shape
@by_dtype
@by_order
def test_attention(poisoned_memory, error, shape, dtype, side):
    q, k, v = rows(shape, dtype, side).unbind(side)
    assert attention_fits(q, k, v)
    y = attention_native(q, k, v)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == q.shape
    assert error(y, exact(q, k, v)) < BOUND[dtype]


@by_dtype
def test_scores_of_any_size(error, dtype):
    """A softmax that is one key, one that is all of them, and sums that would overflow."""
    q, k, v = rows((1, 40, 1, 16), dtype, 2).unbind(2)
    for factor in (0.0, 40.0, 1e4):
        assert error(attention_native(q * factor, k * 1.0, v * 1.0), exact(q * factor, k, v)) < 2 * BOUND[dtype]


@by_dtype
def test_a_nan_reaches_its_own_row_alone(dtype):
    q, k, v = (t.clone() for t in rows((1, 33, 1, 16), dtype, 2).unbind(2))
    q[0, 7, 0, 3] = float("nan")
    found = attention_native(q, k, v).isnan().any(dim=-1).flatten()
    assert found[7] and found.sum() == 1


@by_shape
@by_dtype
@by_order
def test_nothing_else_is_written_or_read(monkeypatch, guarded, shape, dtype, side):
    """All buffers between canaries; a NaN beside the inputs would reach the result."""
    given = rows(shape, dtype, side)
    expected, checks, empty = attention_native(*given.unbind(side)), [], torch.empty
    memory = torch.full((given.numel() + 2 * 4096,), float("nan"), dtype=dtype)
    inner = memory[4096:-4096].view(given.shape).copy_(given)

    def allocate(*arguments, **keywords):
        found, check = guarded(empty(*arguments, **keywords).fill_(float("nan")).flatten())
        checks.append(check)
        return found.view(shape)

    monkeypatch.setattr(torch, "empty", allocate)
    found = attention_native(*inner.unbind(side))
    monkeypatch.undo()
    assert len(checks) == 1 and checks[0]() and torch.equal(inner, given) and torch.equal(found, expected)


@by_dtype
def test_any_number_of_threads_and_any_batch(dtype):
    q, k, v = rows((3, 77, 2, 32), dtype, 2).unbind(2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            found.append(attention_native(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
    for i in range(3):
        assert torch.equal(attention_native(*(t[i : i + 1] for t in (q, k, v)))[0], found[0][i])


def test_what_fits():
    q, k, v = rows(SHAPES["odd"], torch.float32, 2).unbind(2)
    assert attention_fits(q, k, v) and not attention_fits(q.double(), k.double(), v.double())
    assert not attention_fits(q, k, v.contiguous()) and not attention_fits(q, k[:, :9], v)
    assert attention_fits(*(t[..., :40] for t in (q, k, v)))
    assert not attention_fits(*(t[..., :41] for t in (q, k, v)))
    assert not attention_fits(*(t[..., ::3] for t in (q, k, v)))
    assert attention_native(q[:0], k[:0], v[:0]).shape == (0, *q.shape[1:])


def test_without_native_code(monkeypatch):
    monkeypatch.setenv("PDAE_FAST_NATIVE", "0")
    _library.cache_clear()
    try:
        q, k, v = rows(SHAPES["odd"], torch.float32, 2).unbind(2)
        assert attention_status() == (False, "switched off by PDAE_FAST_NATIVE") and not attention_fits(q, k, v)
    finally:
        _library.cache_clear()
