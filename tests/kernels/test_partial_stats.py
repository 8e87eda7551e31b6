"""Statistics of parts of a group, read from a map or left by the addition that makes it: against float64, and as the
norm merges them."""

import pytest
import torch

from pdae_fast.kernels import (
    add_with_stats,
    group_norm_apply,
    group_norm_reference,
    partial_stats,
    residual_add_reference,
    stats_splits,
    upsample_add_reference,
)

LAYOUTS = {"nchw": False, "channels-last": True}
by_layout = pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
# (batch, channels, height, width, part, splits)
SHAPES = {
    "odd": (2, 6, 5, 7, 2, 3),
    "one-channel-parts": (1, 5, 9, 4, 1, 4),
    "one-pixel": (2, 8, 1, 1, 4, 1),
    "more-than-a-block": (1, 72, 6, 6, 8, 2),
    "wide-parts": (1, 64, 4, 3, 32, 2),
    "several-steps": (1, 4, 66, 70, 4, 2),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
# Mean and bias: as activations are, a large mean, a large bias, and large ones that cancel.
BIASED = {"activations": (-2.3, 1), "mean": (1000, 0), "bias": (0, 1000), "cancelling": (-1000, 1000)}


def truth_of(y, part, splits):
    """[B, C / part, splits, 2] of y, in float64."""
    y = y.double().cpu().flatten(2).reshape(len(y), y.shape[1] // part, part, -1)
    pieces = y.split(-(-y.shape[3] // splits), 3)
    assert len(pieces) == splits
    return torch.stack(
        [torch.stack([p.mean((2, 3)), p.var((2, 3), correction=0) * p[0, 0].numel()], 2) for p in pieces], 2
    )


@pytest.fixture
def close(error):
    """The error of a table's means may be a few units of float32; that of M2 is held to M2 itself."""

    def check(found, y, part, splits, mean_bound=3e-7, m2_bound=2e-6):
        truth = truth_of(y, part, splits)
        assert found.shape == truth.shape and found.dtype == torch.float32
        assert error(found[..., 0], truth[..., 0]) < mean_bound
        if truth[..., 1].any():
            assert error(found[..., 1], truth[..., 1]) < m2_bound

    return check


@by_shape
@by_layout
@pytest.mark.parametrize("biased", [False, True])
def test_kernel_of_a_map(image, vector, launch, close, shape, channels_last, biased):
    from pdae_fast.kernels.group_norm_plan import partial_stats_launches

    *size, part, splits = shape
    x, bias = image(size, torch.float32, channels_last), 3 * vector(size[1]) if biased else None
    partial = torch.full((size[0], size[1] // part, splits, 2), float("nan"), device=x.device)
    launch(partial_stats_launches(x, bias, partial))
    close(partial, x.double() if bias is None else x.double() + bias.double()[:, None, None], part, splits)


@by_shape
@by_layout
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_of_a_sum(
    image, vector, launch, poisoned, close, assert_no_worse, shape, channels_last, upsample, dtype
):
    """The sum as it was, and the statistics of what is stored, rounded."""
    from pdae_fast.kernels.add_upsample_triton import add_stats_launches

    batch, channels, height, width, part, splits = shape
    if upsample:
        height, width, splits = 2 * height, 2 * width, splits if height > 1 else 4
    h = image((batch, channels, height, width), dtype, channels_last)
    residual = image((batch, channels, *shape[2:4]), dtype, channels_last, 0.3, 1.0)
    bias = None if splits % 2 else 3 * vector(channels)
    out = poisoned(h)
    partial = torch.full((batch, channels // part, splits, 2), float("nan"), device=h.device)
    launch(add_stats_launches(h, residual, bias, out, partial))
    reference = upsample_add_reference if upsample else residual_add_reference
    truth = reference(h.double(), residual.double(), bias)
    assert_no_worse(out, reference(h, residual, bias).to(dtype), truth)
    close(partial, out, part, splits)


@by_layout
@pytest.mark.parametrize(("mean", "base"), BIASED.values(), ids=BIASED)
def test_kernel_of_a_sum_that_is_far_from_zero(image, vector, launch, poisoned, error, channels_last, mean, base):
    """4000 deviations from zero a naive sum of squares has no digit left; the norm that merges the parts keeps four."""
    from pdae_fast.kernels.add_upsample_triton import add_stats_launches

    h = image((1, 8, 33, 31), torch.float32, channels_last, mean, 0.25)
    residual = image((1, 8, 33, 31), torch.float32, channels_last, 0.0, 0.01)
    bias = base + 0.1 * vector(8)
    out, partial = poisoned(h), torch.full((1, 4, 3, 2), float("nan"), device=h.device)
    launch(add_stats_launches(h, residual, bias, out, partial))
    truth = truth_of(out, 2, 3)
    assert error(partial[..., 0], truth[..., 0]) < 3e-7
    assert error(partial[..., 1], truth[..., 1]) < 2e-4  # float32 of 1000 is 3e-5, of a deviation 1e-4
    w = torch.ones(8, device=h.device)
    y = group_norm_apply(out, partial, w, 0 * w, 2)
    assert error(y, group_norm_reference(out.double(), w, 0 * w, 2)) < 2e-4


@by_layout
@pytest.mark.parametrize(
    ("c1", "c2", "groups", "part", "splits"), [(12, 0, 3, 4, 5), (10, 14, 4, 2, 3), (4, 12, 1, 4, 9)]
)
def test_the_kernel_that_applies_them(
    image, vector, launch, poisoned, error, channels_last, c1, c2, groups, part, splits
):
    """Of one map, and of two whose groups straddle; more columns than one program merges at once in the last."""
    from pdae_fast.kernels.group_norm_plan import apply_launches, given_statistics

    channels = c1 + c2
    x = image((2, c1, 9, 7), torch.float32, channels_last)
    x2 = image((2, c2, 9, 7), torch.float32, channels_last, 0.7, 1.5) if c2 else None
    x_bias, weight, bias, scale, shift = 3 * vector(c1), vector(channels), vector(channels), *vector(2, 2, channels)
    tables = partial_stats(x, part, splits, x_bias), partial_stats(x2, part, splits) if c2 else None
    y = poisoned(x, (2, channels, 9, 7))
    mean, rstd = (torch.full((2, groups), float("nan"), device=x.device) for _ in range(2))
    launches = apply_launches(
        x, given_statistics(x, *tables), weight, bias, groups, 1e-5, scale, shift, True, x2, x_bias, y, mean, rstd
    )
    assert (launches[0].constants["MERGES"] > 1) == (c1 == 4)
    launch(launches)
    wide = x.double(), None if x2 is None else x2.double()
    truth = group_norm_reference(wide[0], weight, bias, groups, 1e-5, scale, shift, True, wide[1], x_bias)
    assert error(y, truth) < 1e-6
    found = group_norm_apply(x, tables[0], weight, bias, groups, 1e-5, scale, shift, True, x2, tables[1], x_bias)
    assert error(found, truth) < 1e-6


@by_shape
@by_layout
def test_ops(image, vector, cuda, close, error, shape, channels_last):
    """The CPU's and CUDA's functions alike, on inputs that have to be copied."""
    *size, part, splits = shape
    x, residual, bias = (
        image(size, torch.float32, channels_last),
        image(size, torch.float32, not channels_last),
        vector(size[1]),
    )
    for of_map in (partial_stats, cuda("group_norm", "partial_stats")):
        close(of_map(x, part, splits, bias), x.double() + bias.double()[:, None, None], part, splits)
        close(of_map(torch.cat([x, x], 1)[:, : size[1]], part, splits), x, part, splits)
    for of_sum in (add_with_stats, cuda("add_upsample", "add_with_stats")):
        y, table = of_sum(x, residual, bias, part, splits)
        assert error(y, residual_add_reference(x.double(), residual.double(), bias)) < 1e-7
        assert y.stride() == x.stride()
        close(table, y, part, splits)
    torch.library.opcheck(torch.ops.pdae_fast.partial_stats.default, (x, part, splits, bias))
    torch.library.opcheck(torch.ops.pdae_fast.add_with_stats.default, (x, residual, bias, part, splits))


def test_how_maps_are_split(monkeypatch):
    """Every split has pixels; one large map is split as often as a norm merges, a batch of them hardly."""
    assert stats_splits(1, 128 * 128, torch.device("cpu")) == 1
    meta = torch.device("meta")
    assert [stats_splits(B, 128 * 128, meta) for B in (1, 8, 64, 1000)] == [32, 16, 2, 1]
    assert [stats_splits(1, side * side, meta) for side in (1, 8, 16, 32)] == [1, 1, 4, 16]
    for pixels in range(1, 3000, 7):
        splits = stats_splits(1, pixels, meta)
        chunk = -(-pixels // splits)
        assert (splits - 1) * chunk < pixels <= splits * chunk


def test_errors():
    x, w = torch.zeros(1, 8, 2, 5), torch.zeros(8)
    for part, message in ((3, "parts of 3"), (16, "parts of 16"), (0, "parts of 0")):
        with pytest.raises(ValueError, match=message):
            partial_stats(x, part, 1)
    for splits in (0, 7, 11):  # seven splits of ten pixels would be five of two
        with pytest.raises(ValueError, match=f"10 pixels do not fall into {splits} splits"):
            add_with_stats(x, x, None, 1, splits)
    with pytest.raises(ValueError, match="residual must have shape"):
        add_with_stats(x[..., :4], torch.zeros(1, 8, 1, 3), None, 1, 1)
    with pytest.raises(ValueError, match="x_bias must have shape"):
        partial_stats(x, 2, 1, torch.zeros(4))
    with pytest.raises(ValueError, match="4 channels do not make up a group"):
        group_norm_apply(x, partial_stats(x, 4, 2), w, w, 4)
    for table in (partial_stats(x, 2, 5), partial_stats(x, 1, 2)):  # other splits, other parts
        with pytest.raises(ValueError, match="stats2 must have shape"):
            group_norm_apply(x, partial_stats(x, 2, 2), torch.zeros(16), torch.zeros(16), 4, x2=x, stats2=table)
