"""GroupNorm: the kernels against float64, the torch path, gradients, and the op as the compiler sees it."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import channel_stats, group_norm, group_norm_apply, group_norm_reference

# (batch, C1, C2, H, W, groups): small, because the interpreter takes ten milliseconds a program.
SHAPES = {
    "one-channel-groups": (1, 8, 0, 6, 6, 8),
    "one-pixel": (2, 12, 0, 1, 1, 4),
    "odd-size": (2, 12, 0, 5, 7, 4),
    "three-channel-groups": (1, 12, 0, 9, 4, 4),
    "one-group": (2, 20, 0, 3, 5, 1),
    "straddling-groups": (2, 10, 14, 4, 5, 4),  # groups of 6: the second holds 4 channels of x and 2 of x2
    "uneven-inputs": (1, 3, 13, 7, 3, 2),
    "several-tiles": (1, 6, 0, 47, 43, 2),  # more than a group in registers
    "several-tiles-straddling": (1, 5, 3, 40, 51, 2),
}
LAYOUTS = {"nchw": False, "channels-last": True}
by_layout = pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_bias = pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
low_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def make_case(image, vector):
    def make(shape, dtype=torch.float32, channels_last=False, affine=True, silu=True, mean=-2.3, std=0.5, biased=True):
        batch, c1, c2, height, width, groups = shape
        channels = c1 + c2
        x = image((batch, c1, height, width), dtype, channels_last, mean, std)
        x2 = image((batch, c2, height, width), dtype, channels_last, 0.7, 1.5) if c2 else None
        # The halves of one projection, so rows are strided, as in the models.
        scale, shift = vector(batch, 2 * channels).chunk(2, 1) if affine else (None, None)
        return SimpleNamespace(
            x=x, x2=x2, weight=vector(channels), bias=vector(channels), groups=groups,
            scale=scale, shift=shift, silu=silu, x_bias=3 * vector(c1) if biased else None,
        )  # fmt: skip

    return make


def arguments(c, dtype=None):
    """Positional arguments of group_norm, and of its op, tensors cast when a dtype is given."""
    values = (c.x, c.weight, c.bias, c.groups, 1e-5, c.scale, c.shift, c.silu, c.x2, c.x_bias)
    return tuple(v.to(dtype) if dtype and isinstance(v, torch.Tensor) else v for v in values)


def joined(c):
    """cat([x + x_bias, x2], 1) in float64."""
    x = c.x.double() if c.x_bias is None else c.x.double() + c.x_bias.double()[:, None, None]
    return x if c.x2 is None else torch.cat([x, c.x2.double()], 1)


def framework(x, weight, bias, groups, eps, scale, shift, silu, x2, x_bias):
    """What a model does without this op, every step in the dtype of x."""
    x = x if x_bias is None else x + x_bias.to(x.dtype)[:, None, None]
    x = x if x2 is None else torch.cat([x, x2], 1)
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        y = y * scale.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None]
    return F.silu(y) if silu else y


@pytest.fixture
def run_kernel(launch, poisoned):
    """Launch the kernels of one path into poisoned outputs; returns y, mean, rstd."""
    from pdae_fast.kernels.group_norm_plan import group_norm_launches

    def run(c, path):
        batch, channels = c.x.shape[0], c.weight.shape[0]
        y = poisoned(c.x, (batch, channels, *c.x.shape[2:]))
        mean, rstd = (torch.full((batch, c.groups), float("nan"), device=c.x.device) for _ in range(2))
        launch(group_norm_launches(*arguments(c), y, mean, rstd, path))
        return y, mean, rstd

    return run


@by_shape
@by_layout
@by_bias
@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernel(make_case, run_kernel, assert_no_worse, error, shape, channels_last, path, biased):
    c = make_case(shape, channels_last=channels_last, biased=biased)
    y, mean, rstd = run_kernel(c, path)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert_no_worse(y, framework(*arguments(c)), truth)
    grouped = joined(c).reshape(shape[0], c.groups, -1)
    assert error(mean, grouped.mean(2)) < 1e-6
    assert error(rstd, 1 / (grouped.var(2, correction=0) + 1e-5).sqrt()) < 1e-6


@low_precision
@by_layout
@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernel_low_precision(make_case, run_kernel, assert_no_worse, dtype, channels_last, path):
    c = make_case(SHAPES["straddling-groups"], dtype, channels_last)
    y, _, _ = run_kernel(c, path)
    assert y.dtype == dtype
    assert_no_worse(y, framework(*arguments(c)), group_norm_reference(*arguments(c, torch.float64)))


@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize(("affine", "silu"), [(False, False), (False, True), (True, False)])
def test_kernel_options(make_case, run_kernel, assert_no_worse, path, affine, silu):
    c = make_case(SHAPES["odd-size"], affine=affine, silu=silu)
    y, _, _ = run_kernel(c, path)
    assert_no_worse(y, framework(*arguments(c)), group_norm_reference(*arguments(c, torch.float64)))


@by_layout
@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernel_splits_and_steps(make_case, run_kernel, error, monkeypatch, channels_last, path):
    """A chip of one processor makes each program loop, a large one makes many splits: both merge to the
    same."""
    c = make_case((1, 4, 0, 65, 71, 2), channels_last=channels_last, silu=False)
    truth = group_norm_reference(*arguments(c, torch.float64))
    for processors in (1, 1000):
        monkeypatch.setattr("pdae_fast.kernels.group_norm_plan.processors", lambda _device, n=processors: n)
        assert error(run_kernel(c, path)[0], truth) < 5e-7


@pytest.mark.parametrize(("path", "bound"), [("fused", 1e-6), ("split", 1e-4)])
@pytest.mark.parametrize("shape", [(1, 4, 0, 8, 8, 2), (1, 4, 0, 97, 93, 2)], ids=["small", "large"])
def test_kernel_large_mean(make_case, run_kernel, error, path, bound, shape):
    """A mean 4000 deviations from zero: E[x^2] - E[x]^2 has no correct digit left in float32.

    The split path's channel means are float32 themselves: 3e-5 is half a unit of 1000, a ten-thousandth of
    the deviation.
    """
    c = make_case(shape, affine=False, silu=False, mean=1000.0, std=0.25, biased=False)
    assert error(run_kernel(c, path)[0], group_norm_reference(*arguments(c, torch.float64))) < bound


@by_layout
@pytest.mark.parametrize(("path", "bound"), [("fused", 2e-6), ("split", 1e-4)])
@pytest.mark.parametrize(
    ("mean", "base"), [(0, 1000), (-1000, 1000), (1000, 0)], ids=["large-bias", "cancelling", "small-bias"]
)
@pytest.mark.parametrize("size", [(8, 8), (97, 93)], ids=["small", "large"])
def test_kernel_large_bias(make_case, run_kernel, error, path, bound, mean, base, size, channels_last):
    """Means or biases 4000 deviations from zero, and where the two cancel: x + bias in float32 would be wrong in
    the fourth digit."""
    c = make_case((1, 4, 0, *size, 2), channels_last=channels_last, affine=False, silu=False, mean=mean, std=0.25)
    c.x_bias = base + 0.1 * c.x_bias
    assert error(run_kernel(c, path)[0], group_norm_reference(*arguments(c, torch.float64))) < bound


@by_layout
@pytest.mark.parametrize(("c1", "c2", "groups"), [(38, 33, 1), (70, 64, 2)], ids=["one-group", "straddling"])
def test_kernel_wide_groups(make_case, run_kernel, launch, poisoned, error, c1, c2, groups, channels_last):
    """Groups of more channels than a program merges at once."""
    from pdae_fast.kernels.group_norm_plan import apply_launches, given_statistics

    c = make_case((1, c1, c2, 2, 3, groups), channels_last=channels_last)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert error(run_kernel(c, "split")[0], truth) < 1e-6
    y = poisoned(c.x, (1, c1 + c2, 2, 3))
    mean, rstd = (torch.empty(1, groups, device=c.x.device) for _ in range(2))
    x, *rest = arguments(c)
    statistics = given_statistics(x, channel_stats(x, c.x_bias), channel_stats(c.x2))
    launches = apply_launches(x, statistics, *rest, y, mean, rstd)
    assert launches[0].constants["MERGES"] > 1
    launch(launches)
    assert error(y, truth) < 1e-6


@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernel_float16_range(make_case, run_kernel, assert_no_worse, path):
    """Values whose squares do not exist in float16."""
    c = make_case((1, 4, 0, 9, 9, 2), torch.float16, affine=False, mean=3000.0, std=400.0)
    y, _, _ = run_kernel(c, path)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert_no_worse(y, framework(*arguments(c, torch.float32)).half(), truth)


@by_layout
@by_bias
def test_kernel_shared_statistics(make_case, launch, poisoned, error, monkeypatch, channels_last, biased):
    """Channel statistics of each input, computed apart and merged per group, across the boundary."""
    from pdae_fast.kernels.group_norm_plan import apply_launches, channel_stats_launches, given_statistics

    c = make_case((1, 5, 3, 67, 63, 2), channels_last=channels_last, biased=biased)
    pixels = 67 * 63
    tables = []  # one split, with a bias; several, merged, with and without one
    for processors, splits, x, x_bias in ((0, 1, c.x, c.x_bias), (1000, 2, c.x, c.x_bias), (1000, 2, c.x2, None)):
        monkeypatch.setattr("pdae_fast.kernels.group_norm_plan.processors", lambda _device, n=processors: n)
        stats = torch.full((*x.shape[:2], 2), float("nan"), device=x.device)
        launches = channel_stats_launches(x, x_bias, stats)
        assert len(launches) == splits
        launch(launches)
        flat = x.double().flatten(2)
        bias = 0 if x_bias is None else x_bias.double()
        assert error(stats[:, :, 0], flat.mean(2) + bias) < 2e-7
        assert error(stats[:, :, 1], flat.var(2, correction=0) * pixels) < 1e-6
        tables.append(stats)
    y = poisoned(c.x, (len(c.x), 8, 67, 63))
    mean, rstd = (torch.full((len(c.x), 2), float("nan"), device=c.x.device) for _ in range(2))
    x, *rest = arguments(c)
    launch(apply_launches(x, given_statistics(x, *tables[1:]), *rest, y, mean, rstd))
    assert error(y, group_norm_reference(*arguments(c, torch.float64))) < 5e-7
    grouped = joined(c).reshape(len(c.x), 2, -1)
    assert error(mean, grouped.mean(2)) < 1e-6
    assert error(rstd, 1 / (grouped.var(2, correction=0) + 1e-5).sqrt()) < 1e-6


def test_kernel_bias_leaves_m2(make_case, launch, monkeypatch):
    """M2 with a bias is M2 without one, to the bit."""
    from pdae_fast.kernels.group_norm_plan import channel_stats_launches

    c = make_case((1, 3, 0, 67, 63, 1))
    for processors in (1, 1000):
        monkeypatch.setattr("pdae_fast.kernels.group_norm_plan.processors", lambda _device, n=processors: n)
        plain, biased = (torch.full((1, 3, 2), float("nan"), device=c.x.device) for _ in range(2))
        launch(channel_stats_launches(c.x, None, plain))
        launch(channel_stats_launches(c.x, 1000 * c.x_bias, biased))
        assert torch.equal(plain[..., 1], biased[..., 1])


def gradients(function, c, dtype, upstream):
    """(inputs' gradients by name) of sum(function * upstream)."""
    names = [n for n in ("x", "x2", "weight", "bias", "scale", "shift", "x_bias") if getattr(c, n) is not None]
    leaves = {n: getattr(c, n).detach().to(dtype or getattr(c, n).dtype).requires_grad_() for n in names}
    y = function(*arguments(SimpleNamespace(**{**vars(c), **leaves})))
    return dict(zip(names, torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype)), strict=True))


@by_layout
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("shape", ["odd-size", "straddling-groups", "one-channel-groups"])
def test_kernel_gradients(make_case, cuda, image, error, shape, channels_last, silu):
    c = make_case(SHAPES[shape], channels_last=channels_last, silu=silu)
    check_kernel_gradients(c, cuda("group_norm", "group_norm_backward"), image, error, channels_last)


def test_kernel_gradients_split(make_case, cuda, image, error, monkeypatch):
    """Several splits a channel, and several steps a split."""
    c = make_case((1, 3, 1, 65, 71, 2), channels_last=True)
    for processors in (1, 1000):
        monkeypatch.setattr("pdae_fast.kernels.group_norm_plan.processors", lambda _device, n=processors: n)
        check_kernel_gradients(c, cuda("group_norm", "group_norm_backward"), image, error, True)


@low_precision
def test_kernel_gradients_low_precision(make_case, cuda, image, assert_no_worse, dtype):
    c = make_case(SHAPES["straddling-groups"], dtype)
    upstream = image((2, 24, 4, 5), dtype, False, 0.0, 1.0)
    _, mean, rstd = torch.ops.pdae_fast.group_norm(*arguments(c))
    backward = cuda("group_norm", "group_norm_backward")
    dx, dx2, _, _ = backward(upstream, *backward_arguments(c, mean, rstd))
    truth = gradients(group_norm_reference, c, torch.float64, upstream)
    plain = gradients(framework, c, None, upstream)
    for name, value in (("x", dx), ("x2", dx2)):
        assert value.dtype == dtype
        assert_no_worse(value, plain[name], truth[name])


def backward_arguments(c, mean, rstd):
    """Positional arguments of group_norm_backward, after the gradient."""
    return c.x, c.weight, c.bias, mean, rstd, c.groups, c.scale, c.shift, c.silu, c.x2, c.x_bias


def check_kernel_gradients(c, backward, image, error, channels_last):
    batch, channels = c.x.shape[0], c.weight.shape[0]
    upstream = image((batch, channels, *c.x.shape[2:]), torch.float32, channels_last, 0.0, 1.0)
    _, mean, rstd = torch.ops.pdae_fast.group_norm(*arguments(c))
    dx, dx2, da, db = backward(upstream, *backward_arguments(c, mean, rstd))
    got = {"x": dx, "x2": dx2, "shift": db, "scale": da * c.weight + db * c.bias, "x_bias": dx.sum((0, 2, 3))}
    got |= {"weight": (da * c.scale).sum(0), "bias": (db * c.scale).sum(0)}
    for name, value in gradients(group_norm_reference, c, torch.float64, upstream).items():
        if name == "x_bias" and c.groups == channels:
            assert got[name].abs().max() < 1e-4  # exactly 0: a group of one channel does not see its bias
        else:
            assert error(got[name], value) < (2e-5 if name == "x_bias" else 2e-6), name
    assert dx.stride() == c.x.stride()


def halves(c, channel_stats, group_norm_apply):
    """group_norm by its two halves."""
    x, *rest, x_bias = arguments(c)
    return group_norm_apply(x, channel_stats(x, x_bias), *rest, None if c.x2 is None else channel_stats(c.x2), x_bias)


@by_layout
@pytest.mark.parametrize("shape", ["odd-size", "straddling-groups"])
def test_cuda_implementation(make_case, cuda, error, shape, channels_last):
    """The whole function behind the op on CUDA, on inputs it has to copy: a slice of channels, another
    layout."""
    c = make_case(SHAPES[shape], channels_last=channels_last)
    c.x = torch.cat([c.x, c.x], 1)[:, : c.x.shape[1]]
    c.scale = c.scale.T.contiguous().T
    c.x_bias = torch.stack([c.x_bias, c.x_bias], 1)[:, 0]
    if c.x2 is not None:
        other = torch.contiguous_format if channels_last else torch.channels_last
        c.x2 = c.x2.contiguous(memory_format=other)
    truth = group_norm_reference(*arguments(c, torch.float64))
    y, mean, rstd = cuda("group_norm", "group_norm")(*arguments(c))
    assert error(y, truth) < 1e-6
    applied = halves(c, cuda("group_norm", "channel_stats"), cuda("group_norm", "group_norm_apply"))
    assert error(applied, truth) < 1e-6
    assert y.stride() == applied.stride() == group_norm(*arguments(c)).stride()
    plain = torch.ops.pdae_fast.group_norm(*arguments(c))
    assert error(mean, plain[1]) < 1e-6 and error(rstd, plain[2]) < 1e-6


def test_path_choice(launch):
    """Where each path runs; `launch` only for its skip."""
    from pdae_fast.kernels.group_norm_plan import _choose_path

    def chosen(batch, channels, size, channels_last):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (batch, channels, size, size)
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=layout)
        return _choose_path(x, 32, channels // 32)

    assert chosen(1, 512, 8, False) == chosen(1, 512, 8, True) == "fused"  # a small group
    assert chosen(64, 512, 16, True) == "fused"  # 32 bytes a pixel
    assert chosen(1, 256, 32, True) == "fused"  # two tiles, 32 groups
    assert chosen(64, 256, 32, False) == "split"  # two tiles, 2048 groups
    assert chosen(1, 128, 128, False) == chosen(8, 128, 128, False) == "split"  # 16 tiles
    assert chosen(8, 128, 32, True) == "fused"  # 8 bytes of every 32-byte sector, in a small image
    assert chosen(64, 128, 32, True) == "split"  # in many
    assert chosen(64, 128, 32, False) == "fused"


def test_launches(launch):
    """How many launches a call takes, and that a program's share of them fits the models' shapes; `launch` only
    for its skip."""
    from pdae_fast.kernels.group_norm_plan import apply_launches, given_statistics, group_norm_launches

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def picture(batch, channels, size):
        return empty(batch, channels, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    for batch in (1, 8, 64):
        for channels, size in ((64, 64), (192, 64), (128, 128), (384, 64), (640, 32), (896, 16)):
            x, vector, table, affine = picture(batch, channels, size), empty(channels), empty(batch, 32), None
            rest = (vector, vector, 32, 1e-5, affine, affine, True)
            outputs = (None, vector, picture(batch, channels, size), table, table)
            launches = group_norm_launches(x, *rest, *outputs)
            assert 1 <= len(launches) <= 2
            statistics = given_statistics(x, empty(batch, channels, 2), None)
            launches += apply_launches(x, statistics, *rest, *outputs)
            for kernel in launches:
                assert max(kernel.grid[1:]) <= 65535
                if "BLOCK_M" in kernel.constants:
                    assert kernel.constants["MERGES"] == 1
                    assert kernel.constants["BLOCK_C"] * kernel.constants["BLOCK_M"] <= 1024
                    assert kernel.constants["BLOCK_C"] * 2 >= 64, "a row of at least two sectors"


# --- the ops, on whatever device this machine has ---


@pytest.fixture(params=["native", "torch"])
def implementation(request, monkeypatch):
    """What the op runs on the CPU, for the maps that native code takes."""
    module = importlib.import_module("pdae_fast.kernels.group_norm")
    if request.param == "torch":
        monkeypatch.setattr(module, "native_status", lambda: (False, "switched off"))
    elif not module.native_status()[0]:
        pytest.skip(module.native_status()[1])


@by_shape
@by_layout
@by_bias
def test_op(make_case, error, implementation, shape, channels_last, biased):
    c = make_case(shape, channels_last=channels_last, biased=biased)
    x = c.x
    truth = group_norm_reference(*arguments(c, torch.float64))
    y = group_norm(*arguments(c))
    assert error(y, truth) < (1e-5 if shape == SHAPES["one-pixel"] else 1e-6)  # three values a group
    applied = halves(c, channel_stats, group_norm_apply)
    assert error(applied, truth) < 1e-6
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert y.stride() == applied.stride() and y.dtype == x.dtype


@low_precision
@by_layout
@pytest.mark.parametrize("affine", [False, True])
def test_op_low_precision(make_case, assert_no_worse, implementation, dtype, channels_last, affine):
    c = make_case(SHAPES["straddling-groups"], dtype, channels_last, affine)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert_no_worse(group_norm(*arguments(c)), framework(*arguments(c)), truth)
    assert_no_worse(halves(c, channel_stats, group_norm_apply), framework(*arguments(c)), truth)


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "affine"), [("odd-size", False), ("straddling-groups", True)])
def test_op_gradients(make_case, image, assert_no_worse, error, implementation, shape, affine, dtype, channels_last):
    c = make_case(SHAPES[shape], dtype, channels_last, affine)
    size = (c.x.shape[0], c.weight.shape[0], *c.x.shape[2:])
    upstream = image(size, dtype, channels_last, 0.0, 1.0)
    truth = gradients(group_norm_reference, c, torch.float64, upstream)
    plain = gradients(framework, c, None, upstream)
    for name, value in gradients(group_norm, c, None, upstream).items():
        assert value.dtype == getattr(c, name).dtype
        assert value.shape == getattr(c, name).shape
        if name == "x_bias":  # a sum over pixels that cancels: held to its own noise
            bound = max(4 * error(plain[name], truth[name]), 1e-6 if dtype == torch.float32 else 1e-2)
            assert error(value, truth[name]) < bound
            continue
        assert_no_worse(value, plain[name], truth[name])


def test_op_gradcheck(make_case):
    c = make_case((2, 3, 5, 3, 2, 2))
    leaves = [v.double().requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments(c)]
    assert torch.autograd.gradcheck(group_norm, leaves)


@by_layout
def test_op_other_strides(make_case, error, channels_last):
    """A slice of channels, and two inputs in different layouts: copied, never misread."""
    c = make_case((2, 10, 6, 4, 5, 4), channels_last=channels_last)
    c.x = torch.cat([c.x, c.x], 1)[:, :10]
    c.x2 = c.x2.contiguous(memory_format=torch.contiguous_format if channels_last else torch.channels_last)
    assert error(group_norm(*arguments(c)), group_norm_reference(*arguments(c, torch.float64))) < 1e-6


@by_layout
def test_opcheck(make_case, channels_last):
    c = make_case((2, 6, 2, 3, 5, 2), channels_last=channels_last)
    x, *rest, x2, x_bias = arguments(c)
    leaves = [v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments(c)]
    torch.library.opcheck(torch.ops.pdae_fast.group_norm.default, leaves)
    torch.library.opcheck(torch.ops.pdae_fast.group_norm.default, leaves[:-1])  # as it was called before x_bias
    torch.library.opcheck(torch.ops.pdae_fast.channel_stats.default, (x,))
    torch.library.opcheck(torch.ops.pdae_fast.channel_stats.default, (x, x_bias))
    rest = (*rest, x2, channel_stats(x2), x_bias)
    torch.library.opcheck(torch.ops.pdae_fast.group_norm_apply.default, (x, channel_stats(x, x_bias), *rest))
    _, mean, rstd = torch.ops.pdae_fast.group_norm(*arguments(c))
    grad = torch.cat([x, x2], 1)
    backward = torch.ops.pdae_fast.group_norm_backward.default
    torch.library.opcheck(backward, (grad, *backward_arguments(c, mean, rstd)))


def test_compile(make_case, error):
    c = make_case(SHAPES["straddling-groups"])
    upstream = torch.ones(2, 24, 4, 5, device=c.x.device)
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    plain = gradients(group_norm, c, None, upstream)
    for name, value in gradients(compiled, c, None, upstream).items():
        assert error(value, plain[name]) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, "x must be"),
        ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.int64)}, "float32, float16"),
        ({"weight": torch.zeros(5)}, "weight must have shape"),
        ({"groups": 3}, "3 groups"),
        ({"groups": 0}, "0 groups"),
        ({"scale": None}, "go together"),
        ({"scale": torch.zeros(4)}, "scale must have shape"),
        ({"x2": torch.zeros(2, 4, 3, 2)}, "x2 must have shape"),
        ({"x2": torch.zeros(2, 4, 3, 3).half()}, "x2 is torch.float16"),
        ({"x_bias": torch.zeros(5)}, "x_bias must have shape"),
        ({"x_bias": torch.zeros(4, dtype=torch.int64)}, "x_bias must be a floating"),
    ],
)
def test_errors(change, message):
    c = SimpleNamespace(
        x=torch.zeros(2, 4, 3, 3), weight=torch.zeros(4), bias=torch.zeros(4), groups=2,
        scale=torch.zeros(2, 4), shift=torch.zeros(2, 4), silu=False, x2=None, x_bias=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        group_norm(*arguments(SimpleNamespace(**{**vars(c), **change})))


def test_errors_of_statistics():
    x, w = torch.zeros(1, 4, 2, 2), torch.zeros(4)
    with pytest.raises(ValueError, match="stats must have shape"):
        group_norm_apply(x, torch.zeros(1, 4), w, w, 2)
    with pytest.raises(ValueError, match="go together"):
        group_norm_apply(x, channel_stats(x), torch.zeros(8), torch.zeros(8), 2, x2=x)
    with pytest.raises(ValueError, match="x_bias must have shape"):
        channel_stats(x, torch.zeros(8))
