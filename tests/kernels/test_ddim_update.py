"""The DDIM update: kernel and op against Algorithm 3 in float64, downward and upward, at both ends of the
schedule."""

import numpy as np
import pytest
import torch

from pdae_fast.kernels import ddim_coefficients, ddim_update, ddim_update_reference

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
POINTS = np.unique(np.linspace(0, 999, 11).astype(int))
LAYOUTS = {"nchw": False, "channels-last": True}
by_layout = pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Odd sizes, one pixel, and more than one block of the kernel.
SHAPES = {"odd": (3, 3, 5, 7), "one-pixel": (2, 1, 1, 1), "blocks": (2, 3, 20, 17)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tables(upward):
    """(float64 ᾱ at each step's start, at its end) of a ten-step schedule."""
    now, following = ALPHA_BAR[POINTS[1:]], ALPHA_BAR[POINTS[:-1]]
    return (following, now) if upward else (now, following)


@pytest.fixture
def make_case(image, device):
    def make(shape, dtype=torch.float32, channels_last=False, upward=False, gradient=True, index=4):
        now, following = tables(upward)
        step = torch.as_tensor(index)
        exact = now[step.expand(shape[0]).numpy()][:, None, None, None]
        signal = torch.from_numpy(exact).sqrt()
        x0 = image(shape, torch.float64, channels_last, 0.0, 0.8).cpu()  # leaves [-1, 1] in places: the clamp acts
        noise = image(shape, torch.float64, channels_last, 0.0, 1.0).cpu()
        x = signal * x0 + (1 - signal**2).sqrt() * noise
        eps = noise.to(dtype).to(device)
        grad = image(shape, dtype, channels_last, 0.05, 0.1) if gradient else None
        coefficients = ddim_coefficients(now, following).to(device)
        return x.float().to(device), eps, grad, coefficients, step.to(device), (now, following)

    return make


def truth(x, eps, gradient, index, alpha_bars, clamp=True):
    """Algorithm 3 in float64, from float64 coefficients."""
    now, following = (torch.from_numpy(a).to(x.device) for a in alpha_bars)
    ratio = (1 / now - 1).sqrt()
    table = torch.stack([now.rsqrt(), ratio, (1 - now).sqrt(), 1 / ratio, following.sqrt(), (1 - following).sqrt()], 1)
    return ddim_update_reference(x.double(), eps, gradient, table, index, clamp)


def framework(x, eps, gradient, index, alpha_bars, clamp=True):
    """The same, composed of torch operations in float32 from the float32 cast of the schedule's tables."""
    now, following = (torch.from_numpy(a).to(x.device) for a in alpha_bars)
    ratio = (1 / now - 1).sqrt()
    table = torch.stack([now.rsqrt(), ratio, (1 - now).sqrt(), 1 / ratio, following.sqrt(), (1 - following).sqrt()], 1)
    return ddim_update_reference(x, eps, gradient, table.float(), index, clamp)


@pytest.fixture
def run_kernel(launch, poisoned):
    from pdae_fast.kernels.ddim_update_triton import ddim_launches

    def run(x, eps, gradient, coefficients, index, clamp=True):
        out = poisoned(x)
        launch(ddim_launches(x, eps, gradient, coefficients, index, clamp, out))
        return out

    return run


@by_shape
@by_layout
@by_dtype
def test_kernel(make_case, run_kernel, assert_no_worse, shape, channels_last, dtype):
    x, eps, gradient, coefficients, index, bars = make_case(shape, dtype, channels_last)
    out = run_kernel(x, eps, gradient, coefficients, index)
    assert_no_worse(out, framework(x, eps, gradient, index, bars), truth(x, eps, gradient, index, bars))


@pytest.mark.parametrize("upward", [False, True], ids=["decode", "invert"])
@pytest.mark.parametrize("step", [0, 5, 9], ids=["clean-end", "middle", "noise-end"])
@pytest.mark.parametrize("use", ["kernel", "op"])
def test_schedule(make_case, request, assert_no_worse, use, step, upward):
    """Both ends: ᾱ = 0.9999, where √(1/ᾱ-1) is 0.01, and ᾱ = 4e-5, where x/√ᾱ is 157 x."""
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    x, eps, gradient, coefficients, index, bars = make_case((2, 3, 5, 7), upward=upward, index=step)
    got = update(x, eps, gradient, coefficients, index)
    assert_no_worse(got, framework(x, eps, gradient, index, bars), truth(x, eps, gradient, index, bars))


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_clean_end_is_accurate(make_case, request, error, use):
    """Unclamped at ᾱ = 0.9999, the noise passes through: dividing x/√ᾱ - x̂0 by 0.01 would cost two
    digits."""
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    x, eps, _, coefficients, index, bars = make_case((2, 3, 5, 7), upward=True, index=0, gradient=False)
    coefficients = coefficients.clone()
    coefficients[0, 4:] = torch.tensor([0.0, 1.0])  # return the noise itself
    small = x * 0.3  # inside the clamp
    assert error(update(small, eps, None, coefficients, index), eps) < 1e-7


@pytest.mark.parametrize("use", ["kernel", "op"])
@pytest.mark.parametrize(("gradient", "clamp"), [(False, True), (True, False), (False, False)])
def test_options(make_case, request, assert_no_worse, use, gradient, clamp):
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    x, eps, grad, coefficients, index, bars = make_case((2, 3, 5, 7), gradient=gradient)
    expected, plain = (f(x, eps, grad, index, bars, clamp) for f in (truth, framework))
    assert_no_worse(update(x, eps, grad, coefficients, index, clamp), plain, expected)


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_step_a_sample(make_case, request, use):
    """[B] indices do for each sample what a [] index does for it alone."""
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    x, eps, gradient, coefficients, index, _ = make_case((3, 3, 20, 17), torch.bfloat16, True, index=[9, 0, 5])
    together = update(x, eps, gradient, coefficients, index)
    for i in range(3):
        row = slice(i, i + 1)
        alone = update(x[row], eps[row], gradient[row], coefficients, index[i])
        torch.testing.assert_close(together[row], alone, rtol=0, atol=0)


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_no_noise_left(image, device, request, use):
    """From ᾱ = 1 the step is finite: x̂0 = x, and the noise is the network's."""
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    coefficients = ddim_coefficients([1.0], [0.99]).to(device)
    x, eps = image((1, 3, 4, 4), mean=0.0), image((1, 3, 4, 4), mean=0.0)
    got = update(x, eps, None, coefficients, torch.tensor(0, device=device))
    expected = 0.99**0.5 * x.clamp(-1, 1) + 0.01**0.5 * eps
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use", ["kernel", "op"])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_to_pure_noise_and_to_the_clean_image(make_case, request, use, end):
    """ᾱ' = 0 leaves the noise that leads from the clamped x̂0 to x, ᾱ' = 1 that x̂0."""
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    x, eps, *_ = make_case((2, 3, 5, 7))
    out = update(x, eps, None, ddim_coefficients([0.3], [end]).to(x.device), torch.tensor(0, device=x.device))
    x0 = (x.double() / 0.3**0.5 - (1 / 0.3 - 1) ** 0.5 * eps.double()).clamp(-1, 1)
    noise = (x.double() - 0.3**0.5 * x0) / 0.7**0.5
    torch.testing.assert_close(out.double(), x0 if end else noise, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_nan_is_kept(make_case, request, use):
    """A network that returns NaN must not come out of the clamp as a plausible image."""
    update = ddim_update if use == "op" else request.getfixturevalue("run_kernel")
    x, eps, _, coefficients, index, _ = make_case((1, 3, 4, 4))
    eps[0, 1, 2, 3] = float("nan")
    out = update(x, eps, None, coefficients, index)
    assert out[0, 1, 2, 3].isnan() and out.isnan().sum() == 1


@by_dtype
def test_op_mixed_layouts(make_case, assert_no_worse, dtype):
    """eps cut out of a six-channel output, the gradient in the other layout."""
    x, eps, gradient, coefficients, index, bars = make_case((2, 3, 5, 7), dtype, channels_last=True)
    wide = torch.cat([eps, eps], 1)[:, :3]
    got = ddim_update(x, wide, gradient.contiguous(), coefficients, index)
    assert got.stride() == x.stride() and got.dtype == torch.float32
    assert_no_worse(got, framework(x, eps, gradient, index, bars), truth(x, eps, gradient, index, bars))


@by_layout
def test_cuda_implementation(make_case, cuda, error, channels_last):
    """The whole function behind the op on CUDA, on inputs it has to copy."""
    x, eps, gradient, coefficients, index, bars = make_case((2, 3, 5, 7), channels_last=channels_last, index=[2, 7])
    other = torch.contiguous_format if channels_last else torch.channels_last
    wide, turned = torch.cat([eps, eps], 1)[:, :3], gradient.contiguous(memory_format=other)
    got = cuda("ddim_update", "ddim_update")(x, wide, turned, coefficients, index, True)
    assert error(got, truth(x, eps, gradient, index, bars)) < 1e-6
    assert got.stride() == x.stride()


@by_layout
@pytest.mark.parametrize("index", [3, [1, 2]], ids=["one", "each"])
def test_opcheck(make_case, channels_last, index):
    x, eps, gradient, coefficients, index, _ = make_case((2, 3, 5, 7), torch.bfloat16, channels_last, index=index)
    for g in (gradient, None):
        torch.library.opcheck(torch.ops.pdae_fast.ddim_update.default, (x, eps, g, coefficients, index, True))


def test_compile(make_case):
    x, eps, gradient, coefficients, index, _ = make_case((2, 3, 5, 7))
    compiled = torch.compile(ddim_update, fullgraph=True, backend="aot_eager")
    got = compiled(x, eps, gradient, coefficients, index)
    torch.testing.assert_close(got, ddim_update(x, eps, gradient, coefficients, index))


def test_coefficients():
    now, following = tables(False)
    table = ddim_coefficients(list(now), torch.from_numpy(following))
    assert table.shape == (10, 6) and table.dtype == torch.float32
    expected = np.stack([now**-0.5, (1 / now - 1) ** 0.5, (1 - now) ** 0.5], 1)
    np.testing.assert_allclose(table[:, :3], expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("now", "following"), [([0.5], [0.5, 0.4]), ([[0.5]], [[0.4]]), ([0.0], [0.5]), ([0.5], [1.5]), ([np.nan], [0.5])]
)
def test_coefficient_errors(now, following):
    with pytest.raises(ValueError, match="ddim_coefficients"):
        ddim_coefficients(now, following)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).half()}, "x must be float32"),
        ({"x": torch.zeros(2, 3, 4)}, "x must be"),
        ({"eps": torch.zeros(2, 3, 4, 5)}, "eps must have shape"),
        ({"gradient": torch.zeros(1, 3, 4, 4)}, "gradient must have shape"),
        ({"coefficients": torch.zeros(10, 5)}, "coefficients must be"),
        ({"coefficients": torch.zeros(10, 6).double()}, "coefficients must be"),
        ({"index": torch.zeros((), dtype=torch.int32)}, "index must be"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, "index must be"),
    ],
)
def test_errors(change, message):
    x = torch.zeros(2, 3, 4, 4)
    values = {"x": x, "eps": x, "gradient": None, "coefficients": torch.zeros(10, 6), "index": torch.tensor(0)}
    with pytest.raises(ValueError, match=message):
        ddim_update(**{**values, **change})
