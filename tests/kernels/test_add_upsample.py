"""Residual addition, plain and with 2x upsampling in both orders, with and without a bias: kernel, op,
gradients."""

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import (
    add_upsample,
    add_upsample_reference,
    residual_add,
    residual_add_reference,
    upsample_add,
    upsample_add_reference,
)

LAYOUTS = {"nchw": False, "channels-last": True}
by_layout = pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Low-resolution (batch, channels, height, width): odd sizes, one pixel, one channel, more than one block.
SHAPES = {
    "odd": (2, 3, 5, 7), "one-pixel": (2, 5, 1, 1), "one-channel": (1, 1, 3, 6), "blocks": (2, 6, 9, 11),
    "square": (1, 8, 8, 8),
}  # fmt: skip
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
OPS = {
    "sum-then-upsample": (add_upsample, add_upsample_reference, False),
    "upsample-then-sum": (upsample_add, upsample_add_reference, False),
    "upsample-then-sum-biased": (upsample_add, upsample_add_reference, True),
    "sum": (residual_add, residual_add_reference, False),
    "sum-biased": (residual_add, residual_add_reference, True),
}
KERNEL_OPS = {name: op for name, op in OPS.items() if name != "sum"}  # that one is torch's own addition
by_op = pytest.mark.parametrize(("op", "reference", "biased"), OPS.values(), ids=OPS)


def upsampled(x):
    return F.interpolate(x, scale_factor=2.0)


def framework(op, h, residual, bias=None):
    if op is add_upsample:
        return upsampled(h + residual)
    if bias is not None:
        h = h + bias.to(h.dtype)[:, None, None]
    return h + (upsampled(residual) if op is upsample_add else residual)


def double(tensors):
    return [t.double() for t in tensors]


@pytest.fixture
def make_case(image, vector):
    def make(op, shape, dtype=torch.float32, channels_last=False, biased=False):
        batch, channels, height, width = shape
        large = (batch, channels, 2 * height, 2 * width)
        h = image(large if op is upsample_add else shape, dtype, channels_last)
        bias = [3 * vector(channels)] if biased else []
        return [h, image(shape, dtype, channels_last, 0.3, 1.0), *bias]

    return make


@pytest.mark.parametrize(("op", "reference", "biased"), KERNEL_OPS.values(), ids=KERNEL_OPS)
@by_shape
@by_layout
@by_dtype
def test_kernel(make_case, launch, poisoned, assert_no_worse, op, reference, biased, shape, channels_last, dtype):
    from pdae_fast.kernels.add_upsample_triton import residual_launches, upsample_launches

    case = make_case(op, shape, dtype, channels_last, biased)
    h, residual, *bias = case
    batch, channels, height, width = shape
    scale = 1 if op is residual_add else 2
    # The output decides the layout: one pixel or one channel is dense in both.
    layout = torch.channels_last if channels_last and channels > 1 else torch.contiguous_format
    size = (batch, channels, scale * height, scale * width)
    out = poisoned(torch.empty(size, dtype=dtype, device=h.device, memory_format=layout))
    launch(residual_launches(*case, out) if op is residual_add else upsample_launches(h, residual, out, *bias))
    assert_no_worse(out, framework(op, *case), reference(*double(case)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["fp16", "bf16", "fp64"])
@pytest.mark.parametrize("op", [upsample_add, residual_add])
def test_bias_dtypes(make_case, launch, cuda, error, op, dtype):
    """A bias of another dtype than the image."""
    h, residual, bias = make_case(op, (2, 3, 5, 7), biased=True)
    bias = bias.to(dtype)
    reference = {upsample_add: upsample_add_reference, residual_add: residual_add_reference}[op]
    truth = reference(h.double(), residual.double(), bias.double())
    assert error(cuda("add_upsample", op.__name__)(h, residual, bias), truth) < 1e-7
    assert error(op(h, residual, bias), truth) < 1e-7


@by_op
@by_shape
@by_layout
@by_dtype
def test_op(make_case, assert_no_worse, op, reference, biased, shape, channels_last, dtype):
    case = make_case(op, shape, dtype, channels_last, biased)
    got = op(*case)
    layout = torch.contiguous_format if case[0].is_contiguous() else torch.channels_last
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
    assert_no_worse(got, framework(op, *case), reference(*double(case)))


@by_op
@by_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_op_rounds_once(make_case, op, reference, biased, channels_last, dtype):
    """The float32 sum, rounded: to the bit, but for ties that float32 already made."""
    case = make_case(op, (2, 6, 5, 7), dtype, channels_last, biased)
    apart = op(*case) != reference(*case).to(dtype)
    assert apart.float().mean() < 1e-3


@by_op
def test_op_other_strides(make_case, error, op, reference, biased):
    """A slice of channels, a residual in the other layout, and a strided bias."""
    h, residual, *bias = make_case(op, (2, 6, 3, 5), channels_last=True, biased=biased)
    h = torch.cat([h, h], 1)[:, :6]
    bias = [torch.stack([b, b], 1)[:, 0] for b in bias]
    truth = reference(*double([h, residual, *bias]))
    assert error(op(h, residual.contiguous(), *bias), truth) < 1e-7


@by_op
@by_layout
@pytest.mark.parametrize("shape", ["odd", "one-pixel"])
def test_cuda_implementation(make_case, cuda, error, op, reference, biased, shape, channels_last):
    """The whole function behind the op on CUDA, with the residual in the other layout and a strided bias."""
    h, residual, *bias = make_case(op, SHAPES[shape], channels_last=channels_last, biased=biased)
    other = torch.contiguous_format if channels_last else torch.channels_last
    residual = residual.contiguous(memory_format=other)
    bias = [torch.stack([b, b], 1)[:, 0] for b in bias]
    got = cuda("add_upsample", op.__name__)(h, residual, *bias)
    assert error(got, reference(*double([h, residual, *bias]))) < 1e-7
    assert got.stride() == op(h, residual, *bias).stride()


@by_op
def test_gradients(make_case, op, reference, biased):
    leaves = [t.double().requires_grad_() for t in make_case(op, (2, 2, 3, 2), biased=biased)]
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("op", [upsample_add, residual_add])
@pytest.mark.parametrize("frozen", [0, 2], ids=["frozen-h", "frozen-bias"])
def test_gradients_of_some(make_case, op, frozen):
    """Only what requires a gradient gets one; a bias's is in its own dtype."""
    case = make_case(op, (2, 3, 4, 2), torch.bfloat16, biased=True)
    for index, tensor in enumerate(case):
        tensor.requires_grad_(index != frozen)
    op(*case).sum().backward()
    assert [t.grad is None for t in case] == [index == frozen for index in range(3)]
    if frozen != 2:
        assert case[2].grad.dtype == torch.float32
        torch.testing.assert_close(case[2].grad.cpu(), torch.full((3,), float(case[0].numel() // 3)))


@by_op
@by_layout
def test_opcheck(make_case, op, reference, biased, channels_last):
    case = make_case(op, (2, 4, 3, 5), channels_last=channels_last, biased=biased)
    overload = getattr(torch.ops.pdae_fast, op.__name__).default
    torch.library.opcheck(overload, tuple(t.requires_grad_() for t in case))


@by_op
def test_compile(make_case, op, reference, biased):
    case = make_case(op, (2, 4, 3, 5), biased=biased)
    got = torch.compile(op, fullgraph=True, backend="aot_eager")(*case)
    torch.testing.assert_close(got, op(*case))


@pytest.mark.parametrize(
    ("h", "residual", "message"),
    [
        (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), "h must be"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 3, 3), "residual must have shape"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4).half(), "residual is torch.float16"),
    ],
)
def test_errors(h, residual, message):
    with pytest.raises(ValueError, match=f"add_upsample: {message}"):
        add_upsample(h, residual)


def test_errors_of_odd_size():
    with pytest.raises(ValueError, match="even height and width"):
        upsample_add(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 1, 2))


@pytest.mark.parametrize("op", [upsample_add, residual_add])
@pytest.mark.parametrize(
    ("bias", "message"), [(torch.zeros(3), "must have shape"), (torch.zeros(2, dtype=torch.int64), "floating-point")]
)
def test_errors_of_bias(op, bias, message):
    h = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=f"{op.__name__}: bias must .*{message[5:]}"):
        op(h, h[:, :, ::2, ::2] if op is upsample_add else h, bias)
