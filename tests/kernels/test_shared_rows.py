"""Parameters of two networks on one batch, a row for each half of it, and a second input that both halves read: every
op and kernel against itself on the halves apart, and the norm against float64."""

import pytest
import torch

from pdae_fast import kernels
from pdae_fast.kernels import group_norm, group_norm_reference, partial_stats

LAYOUTS = {"nchw": False, "channels-last": True}
by_layout = pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
ROWS, IMAGES = 2, 3  # rows of the parameters, images that share one
B = ROWS * IMAGES


@pytest.fixture
def case(image, vector):
    """x [6, 10, ...], x2 of three images, and strided rows: two of the bias, two or six of the affine."""

    def make(channels_last, own=False, size=(4, 5), mean=-2.3):
        rows = B if own else ROWS
        wide = vector(2, rows, 50)[..., 7:31]
        return {
            "x": image((B, 10, *size), torch.float32, channels_last, mean),
            "weight": wide[0], "bias": wide[1], "num_groups": 4, "silu": True,
            "x2": image((IMAGES, 14, *size), torch.float32, channels_last, 0.7, 1.5),
            "x_bias": 3 * vector(ROWS, 20)[:, 5:15],
        }  # fmt: skip

    return make


def wide_truth(c):
    """By the definition, image by image, with nothing shared."""
    found = []
    for i in range(B):
        row, shared = i // (B // len(c["weight"])), {**c, "x": c["x"][i : i + 1].double()}
        shared |= {"weight": c["weight"][row], "bias": c["bias"][row], "x_bias": c["x_bias"][i // IMAGES]}
        shared["x2"] = c["x2"][i % IMAGES][None].double()
        found.append(group_norm_reference(**shared))
    return torch.cat(found)


@by_layout
@pytest.mark.parametrize("own", [False, True], ids=["rows of halves", "rows of images"])
@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize("size", [(4, 5), (23, 24)], ids=["small", "large"])
def test_norm_kernels(case, launch, poisoned, error, channels_last, own, path, size):
    from pdae_fast.kernels.group_norm_plan import group_norm_launches

    c = case(channels_last, own, size)
    y = poisoned(c["x"], (B, 24, *size))
    mean, rstd = (torch.full((B, 4), float("nan"), device=y.device) for _ in range(2))
    order = (c["x"], c["weight"], c["bias"], 4, 1e-5, None, None, True, c["x2"], c["x_bias"], y, mean, rstd)
    launch(group_norm_launches(*order, path))
    assert error(y, wide_truth(c)) < 1e-6


@by_layout
@pytest.mark.parametrize("own", [False, True], ids=["rows of halves", "rows of images"])
def test_norm_ops(case, cuda, error, channels_last, own):
    c = case(channels_last, own)
    truth = wide_truth(c)
    assert error(group_norm(**c), truth) < 1e-6 and error(group_norm_reference(**c), truth) < 1e-6
    names = ("x", "weight", "bias", "num_groups", "eps", "scale", "shift", "silu", "x2", "x_bias")
    values = [{"eps": 1e-5, **c}.get(name) for name in names]
    assert error(cuda("group_norm", "group_norm")(*values)[0], truth) < 1e-6
    for splits in (1, 4):
        stats, stats2 = partial_stats(c["x"], 2, splits, c["x_bias"]), partial_stats(c["x2"], 2, splits)
        assert error(cuda("group_norm", "partial_stats")(c["x"], 2, splits, c["x_bias"]), stats) < 1e-6
        assert error(kernels.group_norm_apply(stats=stats, stats2=stats2, **c), truth) < 1e-6
        apply = cuda("group_norm", "group_norm_apply")
        assert error(apply(values[0], stats, *values[1:9], stats2, values[9]), truth) < 1e-6


@by_layout
def test_norm_gradients(case, cuda, error, channels_last):
    """Of shared rows and images they are sums."""
    c = case(channels_last)
    names = ("x", "weight", "bias", "x2", "x_bias")
    upstream = torch.randn(B, 24, 4, 5, generator=torch.Generator().manual_seed(1)).to(c["x"].device)

    def gradients(function, dtype):
        leaves = {name: c[name].detach().to(dtype).clone().requires_grad_() for name in names}
        y = function(**{**c, **leaves})
        return torch.autograd.grad(y, list(leaves.values()), upstream.to(dtype))

    found, truth = gradients(group_norm, torch.float32), gradients(group_norm_reference, torch.float64)
    assert all(a.shape == c[name].shape for a, name in zip(found, names, strict=True))
    assert all(error(a, b) < 2e-5 for a, b in zip(found, truth, strict=True))
    y, mean, rstd = torch.ops.pdae_fast.group_norm(
        c["x"], c["weight"], c["bias"], 4, 1e-5, None, None, True, c["x2"], c["x_bias"]
    )
    order = (c["x"], c["weight"], c["bias"], mean, rstd, 4, None, None, True, c["x2"], c["x_bias"])
    plain = torch.ops.pdae_fast.group_norm_backward(upstream, *order)
    for a, b in zip(cuda("group_norm", "group_norm_backward")(upstream, *order), plain, strict=True):
        assert error(a, b) < 1e-5
    torch.library.opcheck(torch.ops.pdae_fast.group_norm.default, (*order[:3], 4, 1e-5, None, None, True, *order[-2:]))


@by_layout
@pytest.mark.parametrize("name", ["residual_add", "upsample_add", "add_with_stats", "upsampled with_stats"])
def test_additions(image, vector, cuda, error, channels_last, name):
    """On CUDA and on the CPU, and their gradients, against the halves apart."""
    upsample, with_stats = name.startswith("upsample"), name.endswith("with_stats")
    h = image((B, 6, 6, 4), torch.float32, channels_last)
    residual = image((B, 6, 3, 2) if upsample else (B, 6, 6, 4), torch.float32, channels_last, 0.3, 1.0)
    bias = vector(ROWS, 12)[:, 4:10]
    reference = kernels.upsample_add_reference if upsample else kernels.residual_add_reference
    halves = [reference(h[i].double(), residual[i].double(), bias[k]) for k, i in enumerate((slice(3), slice(3, 6)))]
    name, extra = ("add_with_stats", (2, 3)) if with_stats else (name, ())
    for op in (getattr(kernels, name), cuda("add_upsample", name)):
        y = op(h, residual, bias, *extra)
        if with_stats:
            y, table = y
            assert error(table, partial_stats(y, *extra)) < 1e-6
        assert error(y, torch.cat(halves)) < 1e-7 and y.stride() == h.stride()
    if not with_stats:
        leaves = [t.detach().double().requires_grad_() for t in (h, residual, bias)]
        assert torch.autograd.gradcheck(getattr(kernels, name), leaves)


def test_errors():
    x, x2 = torch.zeros(6, 4, 2, 2), torch.zeros(4, 4, 2, 2)
    with pytest.raises(ValueError, match="weight must have shape"):
        group_norm(x, torch.zeros(4, 4), torch.zeros(4, 4), 2)  # six images are no four shares
    with pytest.raises(ValueError, match="bias must have shape"):
        group_norm(x, torch.zeros(2, 4), torch.zeros(4), 2)
    with pytest.raises(ValueError, match="x_bias must have shape"):
        group_norm(x, torch.zeros(4), torch.zeros(4), 2, x_bias=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="x2 must have shape"):
        group_norm(x, torch.zeros(8), torch.zeros(8), 2, x2=x2)
    with pytest.raises(ValueError, match="bias must have shape"):
        kernels.residual_add(x, x, torch.zeros(4, 4))
