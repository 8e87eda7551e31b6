"""The end of a step: kernels and op against both heads and Algorithm 3 in float64."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import Head, ddim_coefficients, ddim_update_reference, output_step, output_step_reference

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
POINTS = np.unique(np.linspace(0, 999, 11).astype(int))
LAYOUTS = {"nchw": False, "channels-last": True}
by_layout = pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# (batch, channels, groups, image channels, height, width): C a power of two and not, one channel a group and all in
# one; maps of one pixel, row or column; more than one block of channels, of pixels, of a group's statistics.
SHAPES = {
    "odd": (2, 24, 4, 3, 5, 7),
    "grey": (3, 32, 32, 1, 6, 6),
    "one-pixel": (2, 20, 5, 3, 1, 1),
    "one-row": (1, 16, 1, 1, 1, 9),
    "one-column": (1, 16, 4, 2, 9, 1),
    "channel-blocks": (1, 96, 32, 3, 6, 7),
    "pixel-blocks": (1, 16, 4, 1, 2, 131),
    "statistics-blocks": (1, 68, 1, 3, 4, 5),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def alpha_bars(upward):
    """Float64 ᾱ at each step's start, and at its end, of a ten-step schedule."""
    now, following = ALPHA_BAR[POINTS[1:]], ALPHA_BAR[POINTS[:-1]]
    return (following, now) if upward else (now, following)


@pytest.fixture
def make_case(image, vector, device):
    """make(...): the arguments of `output_step`, x in the layout asked for, and the ᾱ of its table."""

    def make(shape, dtype=torch.float32, channels_last=False, upward=False, gradient=True, index=4):
        batch, channels, _, outputs, height, width = shape

        def head():
            # Maps biased as they are in a network; noise and gradient come out with a deviation of about 1.
            h = image((batch, channels, height, width), dtype, channels_last=True)
            weight = vector(outputs, channels, 3, 3) * 2 / (9 * channels) ** 0.5
            parts = 1 + vector(channels) / 4, vector(channels), weight.to(dtype), vector(outputs).to(dtype) / 4
            return Head(h, *parts)

        x = image((batch, outputs, height, width), torch.float32, channels_last, mean=0.0, std=1.0)
        now, following = alpha_bars(upward)
        coefficients = ddim_coefficients(now, following).to(device)
        index = torch.as_tensor(index, device=device)
        return x, head(), head() if gradient else None, coefficients, index, (now, following)

    return make


def exact_table(bars, device):
    now, following = (torch.from_numpy(a).to(device) for a in bars)
    ratio = (1 / now - 1).sqrt()
    columns = [now.rsqrt(), ratio, (1 - now).sqrt(), 1 / ratio, following.sqrt(), (1 - following).sqrt()]
    return torch.stack(columns, 1)


def truth(x, eps, gradient, bars, index, groups, clamp=True):
    """In float64, from float64 coefficients."""
    return output_step_reference(x.double(), eps, gradient, exact_table(bars, x.device), index, clamp, groups)


def framework(x, eps, gradient, bars, index, groups, clamp=True):
    """What a sampler does without the op: the norm, the SiLU and the convolution each in the dtype of the maps, the
    update in float32 from the float32 cast of the schedule's table."""

    def predict(head):
        norm = (head.norm_weight.to(head.h.dtype), head.norm_bias.to(head.h.dtype))
        y = F.silu(F.group_norm(head.h, groups, *norm))
        return F.conv2d(y, head.weight, head.bias, padding=1)

    predicted = None if gradient is None else predict(gradient)
    table = exact_table(bars, x.device).float()
    return ddim_update_reference(x, predict(eps), predicted, table, index, clamp)


@pytest.fixture
def run_kernel(launch, poisoned, interpreted):
    from pdae_fast.kernels.output_step_triton import output_step_launches

    def channels_last(head):
        return head._replace(weight=head.weight.contiguous(memory_format=torch.channels_last))

    def run(x, eps, gradient, coefficients, index, clamp, groups):
        out = poisoned(x)
        eps, gradient = (None if head is None else channels_last(head) for head in (eps, gradient))
        launches = output_step_launches(x, eps, gradient, coefficients, index, groups, 1e-5, clamp, out)
        for i, one in enumerate(launches):
            for name in {"partial", "products"} & one.arguments.keys():  # what one kernel leaves for the next
                one.arguments[name].fill_(float("nan"))
            if interpreted and "WIDE" in one.constants:
                # The interpreter multiplies bfloat16 wrongly. A product of two is exact in float32.
                launches[i] = dataclasses.replace(one, constants={**one.constants, "WIDE": True})
        launch(launches)
        return out

    return run


@by_shape
@by_dtype
def test_kernel(make_case, run_kernel, assert_no_worse, shape, dtype):
    x, eps, gradient, coefficients, index, bars = make_case(shape, dtype)
    groups = shape[2]
    out = run_kernel(x, eps, gradient, coefficients, index, True, groups)
    assert_no_worse(out, framework(x, eps, gradient, bars, index, groups), truth(x, eps, gradient, bars, index, groups))


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_state_channels_last(make_case, request, use):
    x, eps, gradient, coefficients, index, _ = make_case(SHAPES["odd"], channels_last=True)
    results = [run(request, use)(state, eps, gradient, coefficients, index, True, 4) for state in (x, x.contiguous())]
    assert results[0].stride() == x.stride() != results[1].stride()
    assert torch.equal(*results)


def test_the_shapes_take_every_loop(make_case, launch):
    """The names above are true."""
    from pdae_fast.kernels.output_step_triton import output_step_launches

    def plan(name):
        x, eps, gradient, coefficients, index, _ = make_case(SHAPES[name], torch.bfloat16)
        return output_step_launches(x, eps, gradient, coefficients, index, SHAPES[name][2], 1e-5, True, x)[-2:]

    assert plan("channel-blocks")[0].constants["CHUNKS"] > 1
    assert plan("statistics-blocks")[0].constants["MERGES"] > 1
    assert all(one.grid[0] > 1 for one in plan("pixel-blocks"))


@pytest.mark.parametrize("upward", [False, True], ids=["decode", "invert"])
@pytest.mark.parametrize("step", [0, 5, 9], ids=["clean-end", "middle", "noise-end"])
@pytest.mark.parametrize("use", ["kernel", "op"])
def test_schedule(make_case, request, assert_no_worse, use, step, upward):
    """Both ends: at ᾱ = 4e-5 the clamp acts on nearly all of x̂0, at 0.9999 on what leaves [-1, 1]."""
    x, eps, gradient, coefficients, index, bars = make_case(SHAPES["odd"], upward=upward, index=step)
    got = run(request, use)(x, eps, gradient, coefficients, index, True, 4)
    plain, exact = (f(x, eps, gradient, bars, index, 4) for f in (framework, truth))
    assert_no_worse(got, plain, exact)
    assert not torch.equal(exact, truth(x, eps, gradient, bars, index, 4, clamp=False))


def run(request, use):
    return output_step if use == "op" else request.getfixturevalue("run_kernel")


@pytest.mark.parametrize("use", ["kernel", "op"])
@pytest.mark.parametrize(("gradient", "clamp"), [(False, True), (True, False), (False, False)])
def test_options(make_case, request, assert_no_worse, use, gradient, clamp):
    x, eps, grad, coefficients, index, bars = make_case(SHAPES["odd"], torch.bfloat16, gradient=gradient)
    expected, plain = (f(x, eps, grad, bars, index, 4, clamp) for f in (truth, framework))
    assert_no_worse(run(request, use)(x, eps, grad, coefficients, index, clamp, 4), plain, expected)


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_step_a_sample(make_case, request, use):
    """[B] indices do for each sample what a [] index does for it alone."""
    x, eps, gradient, coefficients, index, _ = make_case((3, 8, 4, 1, 3, 5), torch.float16, index=[9, 0, 5])
    together = run(request, use)(x, eps, gradient, coefficients, index, True, 4)
    for i in range(3):
        row = slice(i, i + 1)
        heads = (head._replace(h=head.h[row]) for head in (eps, gradient))
        alone = run(request, use)(x[row], *heads, coefficients, index[i], True, 4)
        torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use", ["kernel", "op"])
@pytest.mark.parametrize("side", ["eps", "gradient"])
def test_nan_is_kept(make_case, request, use, side):
    """A network that returns NaN must not come out of the clamp as a plausible image."""
    x, eps, gradient, coefficients, index, _ = make_case(SHAPES["odd"])
    heads = {"eps": eps, "gradient": gradient}
    heads[side].h[1, 0, 2, 3] = float("nan")
    out = run(request, use)(x, *heads.values(), coefficients, index, True, 4)
    assert out[0].isfinite().all() and out[1].isnan().all()  # its group's statistics spread it over the map


@pytest.mark.parametrize("use", ["kernel", "op"])
def test_padding_is_of_the_activated_map(make_case, request, use, device):
    """With a norm that makes everything 3, every border pixel adds up fewer taps than an inner one."""
    x, eps, _, coefficients, index, _ = make_case((1, 16, 4, 1, 4, 5), gradient=False)
    three = torch.full((16,), 3.0, device=device)
    eps = eps._replace(norm_weight=0 * three, norm_bias=three, weight=torch.ones_like(eps.weight), bias=0 * eps.bias)
    coefficients = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]], device=device)  # return the noise itself
    out = run(request, use)(x, eps, None, coefficients, 0 * index, False, 4)
    taps = torch.tensor([2.0, 3, 3, 2])[:, None] * torch.tensor([2.0, 3, 3, 3, 2])
    torch.testing.assert_close(out[0, 0].cpu(), taps * 16 * F.silu(torch.tensor(3.0)))


def test_a_mean_of_many_deviations(make_case, run_kernel, image, error):
    """What float32 rounds off a mean of 600 deviations would be an error of 3e-5."""
    x, eps, _, _, index, _ = make_case(SHAPES["statistics-blocks"], gradient=False)
    eps = eps._replace(h=image(tuple(eps.h.shape), channels_last=True, mean=-300.0))
    noise = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]], device=x.device)  # return the noise itself
    got = run_kernel(x, eps, None, noise, 0 * index, False, 1)
    y = F.silu(F.group_norm(eps.h.double(), 1, eps.norm_weight.double(), eps.norm_bias.double()))
    assert error(got, F.conv2d(y, eps.weight.double(), eps.bias.double(), padding=1)) < 1e-5


@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.float16, True)], ids=str)
def test_cuda_implementation(make_case, cuda, assert_no_worse, dtype, channels_last):
    """The whole function behind the op on CUDA, on inputs it has to copy."""
    case = make_case(SHAPES["odd"], dtype, channels_last, index=[2, 7])
    x, eps, gradient, coefficients, index, bars = case
    gradient = gradient._replace(h=gradient.h.contiguous())
    eps = eps._replace(weight=eps.weight.repeat(2, 1, 1, 1)[:3], h=eps.h.repeat(1, 1, 1, 2)[..., :7])
    got = cuda("output_step", "output_step")(x, *eps, *gradient, coefficients, index, True, 4, 1e-5)
    assert_no_worse(got, *(f(x, eps, gradient, bars, index, 4) for f in (framework, truth)))
    assert got.stride() == x.stride()
    alone = cuda("output_step", "output_step")(x, *eps, *[None] * 5, coefficients, index, True, 4, 1e-5)
    assert_no_worse(alone, *(f(x, eps, None, bars, index, 4) for f in (framework, truth)))


def test_too_many_image_channels_fall_back(make_case, cuda):
    x, eps, gradient, coefficients, index, _ = make_case((1, 8, 4, 8, 3, 3))
    got = cuda("output_step", "output_step")(x, *eps, *gradient, coefficients, index, True, 4, 1e-5)
    torch.testing.assert_close(got, output_step(x, eps, gradient, coefficients, index, True, 4))


@by_layout
@pytest.mark.parametrize("index", [3, [1, 2]], ids=["one", "each"])
def test_opcheck(make_case, channels_last, index):
    case = make_case(SHAPES["odd"], torch.bfloat16, channels_last, index=index)
    x, eps, gradient, coefficients, index, _ = case
    for second in (gradient, [None] * 5):
        arguments = (x, *eps, *second, coefficients, index, True, 4, 1e-5)
        torch.library.opcheck(torch.ops.pdae_fast.output_step.default, arguments)


def test_compile(make_case):
    x, eps, gradient, coefficients, index, _ = make_case(SHAPES["odd"])
    compiled = torch.compile(output_step, fullgraph=True, backend="aot_eager")
    got = compiled(x, eps, gradient, coefficients, index, num_groups=4)
    torch.testing.assert_close(got, output_step(x, eps, gradient, coefficients, index, num_groups=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).half()}, "x must be float32"),
        ({"x": torch.zeros(2, 3, 4, 5)}, "eps.h must have shape"),
        ({"h": torch.zeros(2, 8, 4)}, "eps.h must be"),
        ({"h": torch.zeros(2, 8, 4, 4).half()}, "eps.weight is torch.float32 but eps.h is torch.float16"),
        ({"weight": torch.zeros(2, 8, 3, 3)}, "eps.weight must have shape"),
        ({"weight": torch.zeros(3, 8, 1, 1)}, "eps.weight must have shape"),
        ({"bias": torch.zeros(2)}, "eps.bias must have shape"),
        ({"norm_bias": torch.zeros(3)}, "eps.norm_bias must have shape"),
        ({"gradient": Head(torch.zeros(2, 16, 4, 4), *[torch.zeros(16)] * 2, torch.zeros(3, 16, 3, 3), torch.zeros(3))},
         "gradient.h must have shape"),
        ({"num_groups": 3}, "8 channels cannot be split into 3 groups"),
        ({"coefficients": torch.zeros(10, 5)}, "output_step: coefficients must be"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, "output_step: index must be"),
    ],
)  # fmt: skip
def test_errors(change, message):
    head = {
        "h": torch.zeros(2, 8, 4, 4), "norm_weight": torch.zeros(8), "norm_bias": torch.zeros(8),
        "weight": torch.zeros(3, 8, 3, 3), "bias": torch.zeros(3),
    }  # fmt: skip
    values = {"x": torch.zeros(2, 3, 4, 4), "gradient": None, "coefficients": torch.zeros(10, 6),
              "index": torch.tensor(0), "num_groups": 4}  # fmt: skip
    eps = Head(**{**head, **{k: v for k, v in change.items() if k in head}})
    with pytest.raises(ValueError, match=message):
        output_step(eps=eps, **{**values, **{k: v for k, v in change.items() if k not in head}})
