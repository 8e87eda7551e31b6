"""GroupNorm: the kernels against float64, the torch path, gradients, and the op as the compiler sees it."""

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
low_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def make_case(image, vector):
    def make(shape, dtype=torch.float32, channels_last=False, affine=True, silu=True, mean=-2.3, std=0.5):
        batch, c1, c2, height, width, groups = shape
        channels = c1 + c2
        x = image((batch, c1, height, width), dtype, channels_last, mean, std)
        x2 = image((batch, c2, height, width), dtype, channels_last, 0.7, 1.5) if c2 else None
        # The halves of one projection, so rows are strided, as in the models.
        scale, shift = vector(batch, 2 * channels).chunk(2, 1) if affine else (None, None)
        return SimpleNamespace(
            x=x, x2=x2, weight=vector(channels), bias=vector(channels), groups=groups,
            scale=scale, shift=shift, silu=silu,
        )  # fmt: skip

    return make


def arguments(c, dtype=None):
    """Positional arguments of group_norm, tensors cast when a dtype is given."""
    values = (c.x, c.weight, c.bias, c.groups, 1e-5, c.scale, c.shift, c.silu, c.x2)
    return tuple(v.to(dtype) if dtype and isinstance(v, torch.Tensor) else v for v in values)


def framework(x, weight, bias, groups, eps, scale, shift, silu, x2):
    """What a model does without this op, every step in the dtype of x."""
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
        x, weight, bias, groups, eps, scale, shift, silu, x2 = arguments(c)
        launch(group_norm_launches(x, weight, bias, groups, eps, scale, shift, silu, x2, y, mean, rstd, path))
        return y, mean, rstd

    return run


@by_shape
@by_layout
@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernel(make_case, run_kernel, assert_no_worse, error, shape, channels_last, path):
    c = make_case(shape, channels_last=channels_last)
    y, mean, rstd = run_kernel(c, path)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert_no_worse(y, framework(*arguments(c)), truth)
    grouped = (c.x if c.x2 is None else torch.cat([c.x, c.x2], 1)).double().reshape(shape[0], c.groups, -1)
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
    c = make_case(shape, affine=False, silu=False, mean=1000.0, std=0.25)
    assert error(run_kernel(c, path)[0], group_norm_reference(*arguments(c, torch.float64))) < bound


@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernel_float16_range(make_case, run_kernel, assert_no_worse, path):
    """Values whose squares do not exist in float16."""
    c = make_case((1, 4, 0, 9, 9, 2), torch.float16, affine=False, mean=3000.0, std=400.0)
    y, _, _ = run_kernel(c, path)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert_no_worse(y, framework(*arguments(c, torch.float32)).half(), truth)


@by_layout
def test_kernel_shared_statistics(make_case, launch, poisoned, error, monkeypatch, channels_last):
    """Channel statistics of each input, computed apart and merged per group, across the boundary."""
    from pdae_fast.kernels.group_norm_plan import apply_launches, channel_stats_launches

    c = make_case((2, 5, 3, 47, 53, 2), channels_last=channels_last)
    pixels = 47 * 53
    tables = []
    for processors, x in ((1, c.x), (1000, c.x2)):  # one split; several, merged
        monkeypatch.setattr("pdae_fast.kernels.group_norm_plan.processors", lambda _device, n=processors: n)
        stats = torch.full((2, x.shape[1], 2), float("nan"), device=x.device)
        launches = channel_stats_launches(x, stats)
        launch(launches)
        flat = x.double().flatten(2)
        assert error(stats[:, :, 0], flat.mean(2)) < 2e-7
        assert error(stats[:, :, 1], flat.var(2, correction=0) * pixels) < 1e-6
        tables.append((stats, 1, pixels))
    assert len(launches) == 2, "the second input was meant to need a merge"
    y = poisoned(c.x, (2, 8, 47, 53))
    mean, rstd = (torch.empty(2, 2, device=c.x.device) for _ in range(2))
    x, weight, bias, groups, eps, scale, shift, silu, x2 = arguments(c)
    first, second = tables
    launch(apply_launches(x, first, weight, bias, groups, eps, scale, shift, silu, x2, second, y, mean, rstd))
    assert error(y, group_norm_reference(*arguments(c, torch.float64))) < 5e-7


def gradients(function, c, dtype, upstream):
    """(inputs' gradients by name) of sum(function * upstream)."""
    names = [n for n in ("x", "x2", "weight", "bias", "scale", "shift") if getattr(c, n) is not None]
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
    _, weight, bias, groups, _, scale, shift, silu, x2 = arguments(c)
    backward = cuda("group_norm", "group_norm_backward")
    dx, dx2, _, _ = backward(upstream, c.x, weight, bias, mean, rstd, groups, scale, shift, silu, x2)
    truth = gradients(group_norm_reference, c, torch.float64, upstream)
    plain = gradients(framework, c, None, upstream)
    for name, value in (("x", dx), ("x2", dx2)):
        assert value.dtype == dtype
        assert_no_worse(value, plain[name], truth[name])


def check_kernel_gradients(c, backward, image, error, channels_last):
    batch, channels = c.x.shape[0], c.weight.shape[0]
    upstream = image((batch, channels, *c.x.shape[2:]), torch.float32, channels_last, 0.0, 1.0)
    _, mean, rstd = torch.ops.pdae_fast.group_norm(*arguments(c))
    dx, dx2, da, db = backward(upstream, c.x, c.weight, c.bias, mean, rstd, c.groups, c.scale, c.shift, c.silu, c.x2)
    got = {"x": dx, "x2": dx2, "shift": db, "scale": da * c.weight + db * c.bias}
    got |= {"weight": (da * c.scale).sum(0), "bias": (db * c.scale).sum(0)}
    for name, value in gradients(group_norm_reference, c, torch.float64, upstream).items():
        assert error(got[name], value) < 2e-6, name
    assert dx.stride() == c.x.stride()


@by_layout
@pytest.mark.parametrize("shape", ["odd-size", "straddling-groups"])
def test_cuda_implementation(make_case, cuda, error, shape, channels_last):
    """The whole function behind the op on CUDA, on inputs it has to copy: a slice of channels, another
    layout."""
    c = make_case(SHAPES[shape], channels_last=channels_last)
    c.x = torch.cat([c.x, c.x], 1)[:, : c.x.shape[1]]
    c.scale = c.scale.T.contiguous().T
    if c.x2 is not None:
        other = torch.contiguous_format if channels_last else torch.channels_last
        c.x2 = c.x2.contiguous(memory_format=other)
    truth = group_norm_reference(*arguments(c, torch.float64))
    y, mean, rstd = cuda("group_norm", "group_norm")(*arguments(c))
    assert error(y, truth) < 1e-6
    x, weight, bias, groups, eps, scale, shift, silu, x2 = arguments(c)
    channel_stats = cuda("group_norm", "channel_stats")
    stats, stats2 = (None if t is None else channel_stats(t) for t in (x, x2))
    apply = cuda("group_norm", "group_norm_apply")
    applied = apply(x, stats, weight, bias, groups, eps, scale, shift, silu, x2, stats2)
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
    assert chosen(1, 128, 128, False) == "split"  # 32 groups for 132 processors
    assert chosen(8, 128, 128, False) == "fused"  # enough groups
    assert chosen(64, 128, 128, True) == "split"  # 8 bytes of every 32-byte sector


# --- the ops, on whatever device this machine has ---


@by_shape
@by_layout
def test_op(make_case, error, shape, channels_last):
    c = make_case(shape, channels_last=channels_last)
    truth = group_norm_reference(*arguments(c, torch.float64))
    y = group_norm(*arguments(c))
    assert error(y, truth) < (1e-5 if shape == SHAPES["one-pixel"] else 1e-6)  # three values a group
    x, weight, bias, groups, eps, scale, shift, silu, x2 = arguments(c)
    stats, stats2 = (None if t is None else channel_stats(t) for t in (x, x2))
    applied = group_norm_apply(x, stats, weight, bias, groups, eps, scale, shift, silu, x2, stats2)
    assert error(applied, truth) < 1e-6
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert y.stride() == applied.stride() and y.dtype == x.dtype


@low_precision
@by_layout
@pytest.mark.parametrize("affine", [False, True])
def test_op_low_precision(make_case, assert_no_worse, dtype, channels_last, affine):
    c = make_case(SHAPES["straddling-groups"], dtype, channels_last, affine)
    truth = group_norm_reference(*arguments(c, torch.float64))
    assert_no_worse(group_norm(*arguments(c)), framework(*arguments(c)), truth)
    x, weight, bias, groups, eps, scale, shift, silu, x2 = arguments(c)
    y = group_norm_apply(x, channel_stats(x), weight, bias, groups, eps, scale, shift, silu, x2, channel_stats(x2))
    assert_no_worse(y, framework(*arguments(c)), truth)


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "affine"), [("odd-size", False), ("straddling-groups", True)])
def test_op_gradients(make_case, image, assert_no_worse, shape, affine, dtype, channels_last):
    c = make_case(SHAPES[shape], dtype, channels_last, affine)
    size = (c.x.shape[0], c.weight.shape[0], *c.x.shape[2:])
    upstream = image(size, dtype, channels_last, 0.0, 1.0)
    truth = gradients(group_norm_reference, c, torch.float64, upstream)
    plain = gradients(framework, c, None, upstream)
    for name, value in gradients(group_norm, c, None, upstream).items():
        assert value.dtype == getattr(c, name).dtype
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
    x, weight, bias, groups, eps, scale, shift, silu, x2 = arguments(c)
    leaves = [v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments(c)]
    torch.library.opcheck(torch.ops.pdae_fast.group_norm.default, leaves)
    torch.library.opcheck(torch.ops.pdae_fast.channel_stats.default, (x,))
    rest = (weight, bias, groups, eps, scale, shift, silu, x2, channel_stats(x2))
    torch.library.opcheck(torch.ops.pdae_fast.group_norm_apply.default, (x, channel_stats(x), *rest))
    _, mean, rstd = torch.ops.pdae_fast.group_norm(*arguments(c))
    grad = torch.cat([x, x2], 1)
    backward = (grad, x, weight, bias, mean, rstd, groups, scale, shift, silu, x2)
    torch.library.opcheck(torch.ops.pdae_fast.group_norm_backward.default, backward)


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
    ],
)
def test_errors(change, message):
    c = SimpleNamespace(
        x=torch.zeros(2, 4, 3, 3), weight=torch.zeros(4), bias=torch.zeros(4), groups=2,
        scale=torch.zeros(2, 4), shift=torch.zeros(2, 4), silu=False, x2=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        group_norm(*arguments(SimpleNamespace(**{**vars(c), **change})))


def test_errors_of_statistics():
    x, w = torch.zeros(1, 4, 2, 2), torch.zeros(4)
    with pytest.raises(ValueError, match="stats must have shape"):
        group_norm_apply(x, torch.zeros(1, 4), w, w, 2)
    with pytest.raises(ValueError, match="go together"):
        group_norm_apply(x, channel_stats(x), torch.zeros(8), torch.zeros(8), 2, x2=x)
