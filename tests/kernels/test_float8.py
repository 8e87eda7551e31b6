"""fp8 codes: the norm that writes them and the convolution that multiplies them; kernels, ops and fallbacks."""

import math

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import conv_float8, float8, float8_codes, group_norm_float8, group_norm_reference

CODE = torch.float8_e4m3fn
CODES = torch.tensor([(1 + m / 8) * 2.0**e if e > -7 else m * 2.0**-9 for e in range(-7, 9) for m in range(8)][:-1])


@pytest.fixture(autouse=True)
def capable(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < float8.MIN_CAPABILITY:
        pytest.skip("this GPU has no fp8")


def nearest(size):
    """The code of float64 magnitudes."""
    near = size.clamp(max=448.0)
    below = (torch.searchsorted(CODES.double(), near, right=True) - 1).clamp(min=0)
    above = (below + 1).clamp(max=len(CODES) - 1)
    return torch.where(CODES[above] - near < near - CODES[below], CODES[above], CODES[below])


def check_codes(found, truth, scale, interpreted):
    """Every code is the nearest, or one of two for values near the middle. The interpreter loses the carry of values
    that are rounded up to a power of two, and cuts off subnormal ones: of those only the first bound is held."""
    assert found.dtype is CODE
    found, truth = found.float().cpu(), truth.cpu() / scale
    size = truth.abs()
    low, high = nearest(size * (1 - 1e-5)), nearest(size * (1 + 1e-5))
    right = (found.abs() >= low) & (found.abs() <= high)
    if interpreted:
        mantissa = torch.frexp(size)[0]
        spared = ((mantissa > 0.96) & (size < 448)) | (size < 2.0**-6)
        assert spared.double().mean() < 0.2 and bool((found.abs() <= high).all())
        right |= spared
    assert bool(right.all())
    assert bool((found.sign() == truth.sign())[found != 0].all())


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("path", ["fused", "split", "given"])
@pytest.mark.parametrize("scale", [2.0**-4, 2.0**-9])
def test_norm_kernels_write_codes(launch, image, vector, interpreted, last, path, scale):
    from pdae_fast.kernels.group_norm_plan import apply_launches, given_statistics, group_norm_launches

    x, x2 = image((2, 64, 5, 6), torch.float32, last), image((2, 32, 5, 6), torch.float32, last)
    weight, bias, x_bias, multiplier, addend = vector(96), vector(96), vector(64), vector(2, 96), vector(2, 96)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(2, 96, 5, 6, device=x.device, memory_format=layout).fill_(float("nan")).to(CODE)
    mean, rstd = (torch.empty(2, 32, device=x.device) for _ in range(2))
    arguments = (weight, bias, 32, 1e-5, multiplier, addend, True, x2, x_bias, y, mean, rstd)
    if path == "given":
        biased = [x.double() + x_bias.double()[:, None, None], x2.double()]
        tables = [torch.stack([v.mean((2, 3)), v.var((2, 3), correction=0) * 30], -1).float() for v in biased]
        launch(apply_launches(x, given_statistics(x, *tables), *arguments, scale))
    else:
        launch(group_norm_launches(x, *arguments, path, code_scale=scale))
    truth = group_norm_reference(
        x.double(), weight, bias, 32, 1e-5, multiplier, addend, True, x2.double(), x_bias=x_bias
    )
    assert (float(truth.abs().max()) > 448 * scale) == (scale == 2.0**-9)  # the second is too small on purpose
    check_codes(y, truth, scale, interpreted)


@pytest.mark.parametrize("path", ["fused", "split", "given", "cpu"])
def test_a_norm_of_several_scales(request, image, vector, interpreted, path):
    """Each for as many images in turn."""
    from pdae_fast.kernels import channel_stats

    x, weight, bias = image((4, 64, 5, 6), torch.float32, True), vector(64), vector(64)
    scales = torch.tensor([2.0**-4, 2.0**-6], device=x.device)
    truth = group_norm_reference(x.double(), weight, bias, 32, 1e-5, None, None, True)
    if path == "cpu":
        y = group_norm_float8(x, weight, bias, scales, 32, 1e-5, None, None, True)
    else:
        launch = request.getfixturevalue("launch")
        from pdae_fast.kernels.group_norm_plan import apply_launches, given_statistics, group_norm_launches

        y = torch.empty(x.shape, device=x.device, memory_format=torch.channels_last).fill_(float("nan")).to(CODE)
        tables = (torch.empty(4, 32, device=x.device) for _ in range(2))
        arguments = (weight, bias, 32, 1e-5, None, None, True, None, None, y, *tables)
        if path == "given":
            launch(apply_launches(x, given_statistics(x, channel_stats(x), None), *arguments, scales))
        else:
            launch(group_norm_launches(x, *arguments, path, code_scale=scales))
    for part, of, scale in zip(y.chunk(2), truth.chunk(2), scales.tolist(), strict=True):
        check_codes(part, of, scale, interpreted and path != "cpu")


SHAPES = {  # batch, channels, height, width, outputs
    "least": (1, 32, 4, 4, 32), "odd": (2, 48, 5, 7, 40), "rest-of-channels": (1, 96, 4, 6, 64),
    "blocks": (2, 32, 10, 9, 160), "one-pixel": (3, 64, 1, 1, 32), "few-outputs": (1, 32, 6, 3, 5),
}  # fmt: skip


@pytest.fixture
def case(device):
    def make(shape, seed=0):
        batch, channels, height, width, outputs = shape
        random = torch.Generator().manual_seed(seed)
        x = float8_codes(torch.randn(batch, channels, height, width, generator=random) * 40, 1.0)
        weight = float8_codes(torch.randn(outputs, 3, 3, channels, generator=random) * 60, 1.0)
        scale = torch.exp2(torch.randint(-9, 3, (outputs,), generator=random).float())
        x = x.contiguous(memory_format=torch.channels_last)
        return [t.to(device) for t in (x, weight, scale)]

    return make


def convolved(x, weight, scale, upsample):
    x = x.double()
    x = F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x
    return F.conv2d(x, weight.double().permute(0, 3, 1, 2), padding=1) * scale.double()[:, None, None]


# Tensor cores of these add 32 products of codes at a time to a sum, each cut off where the largest of all of them has
# its 13th binary digit (measured by others: DeepSeek-V3, section 3.5.2; SageAttention2, section 3.3).
COARSE, AT_ONCE, DIGITS = ((8, 9), (9, 0)), 32, 13


def sum_bound(channels):
    """Of the relative error, by root mean square, of sums of 9 products a channel: n of them, cut off at 2^-13 of a sum
    that is no larger than the result, err by 2^-13 sqrt(n) of it at most, as they do so independently of each other."""
    coarse = torch.cuda.is_available() and torch.cuda.get_device_capability() in COARSE
    return max(1e-6, 2.0**-DIGITS * (9 * channels) ** 0.5 if coarse else 0.0)


def coarse_sums(products):
    """float64 [..., n] summed along n as such tensor cores do."""
    total = torch.zeros(*products.shape[:-1], 1, dtype=torch.float64)
    for some in products.split(AT_ONCE, -1):
        terms = torch.cat([total, some], -1)
        step = torch.exp2(torch.frexp(terms.abs().amax(-1, keepdim=True))[1] - 1.0 - DIGITS)
        total = ((terms / step).trunc() * step).sum(-1, keepdim=True)
        step = torch.exp2(torch.frexp(total.abs())[1] - 1.0 - DIGITS)
        total = (total / step).trunc() * step
    return total[..., 0]


by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_upsample = pytest.mark.parametrize("upsample", [False, True], ids=["", "up"])


@by_shape
def test_sums_of_tensor_cores_keep_to_the_bound(monkeypatch, case, error, shape):
    x, weight, scale = (t.cpu() for t in case(shape))
    patches = F.unfold(x.double(), 3, padding=1).mT.unflatten(-1, (-1, 9)).transpose(-1, -2)
    products = patches[:, :, None] * weight.double().flatten(1, 2)
    found = coarse_sums(products.flatten(-2)).mT.unflatten(-1, x.shape[2:]) * scale.double()[:, None, None]
    pairs = list(zip(found.unbind(1), convolved(x, weight, scale, False).unbind(1), strict=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in COARSE:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert 1e-6 < max(error(a, b) for a, b in pairs) < sum_bound(x.shape[1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert sum_bound(x.shape[1]) == 1e-6


@by_shape
@by_upsample
def test_conv_kernel(launch, case, error, interpreted, shape, upsample):
    from pdae_fast.kernels.float8_triton import conv_float8_launches

    x, weight, scale = case(shape)
    truth = convolved(x, weight, scale, upsample)
    # A value's rounding to bfloat16; the interpreter truncates.
    for dtype, bound in ((torch.float32, sum_bound(x.shape[1])), (torch.bfloat16, 2.0**-7 if interpreted else 2.0**-8)):
        y = torch.empty(truth.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        launch(conv_float8_launches(x, weight, scale, y.fill_(float("nan"))))
        # Channels apart: each has a scale of its own.
        assert max(error(a, b) for a, b in zip(y.unbind(1), truth.unbind(1), strict=True)) < bound


@by_shape
@by_upsample
@pytest.mark.parametrize("where", ["cpu", "cuda", "cuda without kernels"])
def test_conv_op(case, error, cuda, monkeypatch, shape, upsample, where):
    x, weight, scale = case(shape)
    monkeypatch.setattr(float8, "float8_obstacle", lambda: "none" if "without" in where else None)
    if where != "cpu":
        monkeypatch.setattr(float8, "_conv_float8", cuda("float8", "conv_float8"))
    y = conv_float8(x, weight, scale, torch.float32, upsample)
    assert y.dtype is torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, convolved(x, weight, scale, upsample)) < sum_bound(x.shape[1])


@by_upsample
@pytest.mark.parametrize("where", ["cpu", "cuda", "cuda without kernels"])
def test_conv_into_a_half(case, cuda, monkeypatch, upsample, where):
    x, weight, scale = case(SHAPES["odd"])
    monkeypatch.setattr(float8, "float8_obstacle", lambda: "none" if "without" in where else None)
    if where != "cpu":
        monkeypatch.setattr(float8, "_conv_float8", cuda("float8", "conv_float8"))
    expected = conv_float8(x, weight, scale, torch.float32, upsample)
    shape = (2 * len(x), *expected.shape[1:])
    whole = torch.empty(shape, device=x.device, memory_format=torch.channels_last).fill_(7.0)
    y = conv_float8(x, weight, scale, torch.float32, upsample, whole[len(x) :])
    assert y.data_ptr() == whole[len(x)].data_ptr()
    assert torch.equal(whole[len(x) :], expected) and bool((whole[: len(x)] == 7).all())
    for wrong in (whole, whole[: len(x)].bfloat16(), whole[: len(x)].contiguous()):
        with pytest.raises(ValueError, match="out must be torch.float32"):
            conv_float8(x, weight, scale, torch.float32, upsample, wrong)


def test_conv_of_unaligned_rows(case, error, cuda, monkeypatch):
    """The kernel would spill: no layer of a network whose norms have 32 groups asks for it."""
    x, weight, scale = case((1, 40, 5, 4, 32))
    monkeypatch.setattr(float8, "float8_obstacle", lambda: None)
    monkeypatch.setattr(float8, "_conv_float8", cuda("float8", "conv_float8"))
    monkeypatch.setattr(float8, "run", lambda launches: pytest.fail("launched"))
    assert error(conv_float8(x, weight, scale, torch.float32), convolved(x, weight, scale, False)) < 1e-6


@pytest.mark.parametrize("where", ["cpu", "cuda", "cuda without kernels"])
@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
def test_norm_op(image, vector, cuda, monkeypatch, interpreted, where, given, last):
    from pdae_fast.kernels import channel_stats

    x, x2 = image((2, 64, 4, 6), torch.float32, last), image((2, 32, 4, 6), torch.float32, last)
    weight, bias, x_bias, scale = vector(96), vector(96), vector(64), 2.0**-5
    monkeypatch.setattr(float8, "float8_obstacle", lambda: "none" if "without" in where else None)
    stats = (channel_stats(x, x_bias), channel_stats(x2)) if given else (None, None)
    rest = (32, 1e-5, None, None, True, x2, x_bias)
    if where == "cpu":
        y = group_norm_float8(x, weight, bias, scale, *rest, *stats)
    else:
        cuda("group_norm", "group_norm")  # whose obstacles are asked for too
        y = cuda("float8", "group_norm_float8")(x, weight, bias, scale, rest, *stats)
    truth = group_norm_reference(x.double(), weight, bias, 32, 1e-5, None, None, True, x2.double(), x_bias=x_bias)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    check_codes(y, truth, scale, interpreted and where == "cuda")


COMPILE = """
import torch
from pdae_fast.kernels import aot
from pdae_fast.kernels.float8_triton import conv_float8_launches
from pdae_fast.kernels.group_norm_plan import group_norm_launches

def empty(*shape, dtype=torch.float8_e4m3fn):
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

x, half, y = empty(8, 96, 32, 32), empty(8, 96, 16, 16), empty(8, 128, 32, 32, dtype=torch.bfloat16)
weight, table = empty(128, 3 * 3 * 96).view(128, 3, 3, 96), lambda *shape: empty(*shape, dtype=torch.float32)
wide = empty(8, 96, 32, 32, dtype=torch.bfloat16)
norm = (wide, table(96), table(96), 32, 1e-5, table(8, 96), table(8, 96), True, None, table(96), x, table(8, 32),
        table(8, 32))
launches = [conv_float8_launches(v, weight, table(128), y)[0] for v in (x, half)]
launches += [group_norm_launches(*norm, path, code_scale=0.5)[-1] for path in ("fused", "split")]
for arch in (89, 90, 100):
    for launch in launches:
        name = launch.kernel.fn.__name__
        usage = aot.compile_launch(launch, arch)
        print(arch, name, usage, usage.excess(aot.BUDGETS[name]) or "fits")
"""


def test_it_compiles_for_what_has_fp8(compiled):
    """Without spills, and the norms that write codes within the budget of those that do not."""
    lines = compiled(COMPILE)
    assert len(lines) == 12 and all(line.endswith("fits") for line in lines), lines


def test_why_a_gpu_cannot(monkeypatch):
    monkeypatch.setattr(float8, "triton_status", lambda: (False, "no CUDA device"))
    assert float8.float8_obstacle() == "no CUDA device"
    monkeypatch.setattr(float8, "triton_status", lambda: (True, "triton"))
    for capability, words in (((8, 0), "compute capability 8.0 is below 8.9"), ((8, 9), None), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert float8.float8_obstacle() == words


def test_the_table_of_codes_is_torch_s():
    every = torch.arange(127, dtype=torch.uint8).view(CODE).float()
    assert torch.equal(every, CODES) and math.isnan(float(torch.tensor([127], dtype=torch.uint8).view(CODE).float()))
