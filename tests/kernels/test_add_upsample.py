"""Residual addition with 2x upsampling, in both orders: kernel, op, gradients."""

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import add_upsample, add_upsample_reference, upsample_add, upsample_add_reference

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
    "sum-then-upsample": (add_upsample, add_upsample_reference),
    "upsample-then-sum": (upsample_add, upsample_add_reference),
}
by_op = pytest.mark.parametrize(("op", "reference"), OPS.values(), ids=OPS)


def upsampled(x):
    return F.interpolate(x, scale_factor=2.0)


def framework(op, h, residual):
    return upsampled(h + residual) if op is add_upsample else h + upsampled(residual)


@pytest.fixture
def make_case(image):
    def make(op, shape, dtype=torch.float32, channels_last=False):
        batch, channels, height, width = shape
        large = (batch, channels, 2 * height, 2 * width)
        h = image(shape if op is add_upsample else large, dtype, channels_last)
        return h, image(shape, dtype, channels_last, 0.3, 1.0)

    return make


@by_op
@by_shape
@by_layout
@by_dtype
def test_kernel(make_case, launch, poisoned, assert_no_worse, op, reference, shape, channels_last, dtype):
    from pdae_fast.kernels.add_upsample_triton import upsample_launches

    h, residual = make_case(op, shape, dtype, channels_last)
    batch, channels, height, width = shape
    # The output decides the layout: one pixel or one channel is dense in both.
    layout = torch.channels_last if channels_last and channels > 1 else torch.contiguous_format
    like = torch.empty(batch, channels, 2 * height, 2 * width, dtype=dtype, device=h.device, memory_format=layout)
    out = poisoned(like)
    launch(upsample_launches(h, residual, out))
    assert_no_worse(out, framework(op, h, residual), reference(h.double(), residual.double()))


@by_op
@by_shape
@by_layout
@by_dtype
def test_op(make_case, assert_no_worse, op, reference, shape, channels_last, dtype):
    h, residual = make_case(op, shape, dtype, channels_last)
    got = op(h, residual)
    layout = torch.contiguous_format if h.is_contiguous() else torch.channels_last
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
    assert_no_worse(got, framework(op, h, residual), reference(h.double(), residual.double()))


@by_op
def test_op_other_strides(make_case, error, op, reference):
    """A slice of channels, and a residual in the other layout."""
    h, residual = make_case(op, (2, 6, 3, 5), channels_last=True)
    h = torch.cat([h, h], 1)[:, :6]
    assert error(op(h, residual.contiguous()), reference(h.double(), residual.double())) < 1e-7


@by_op
@by_layout
@pytest.mark.parametrize("shape", ["odd", "one-pixel"])
def test_cuda_implementation(make_case, cuda, error, op, reference, shape, channels_last):
    """The whole function behind the op on CUDA, with the residual in the other layout."""
    h, residual = make_case(op, SHAPES[shape], channels_last=channels_last)
    other = torch.contiguous_format if channels_last else torch.channels_last
    got = cuda("add_upsample", op.__name__)(h, residual.contiguous(memory_format=other))
    assert error(got, reference(h.double(), residual.double())) < 1e-7
    assert got.stride() == op(h, residual).stride()


@by_op
def test_gradients(make_case, op, reference):
    h, residual = make_case(op, (1, 2, 3, 2))
    leaves = [h.double().requires_grad_(), residual.double().requires_grad_()]
    assert torch.autograd.gradcheck(op, leaves)


@by_op
@by_layout
def test_opcheck(make_case, op, reference, channels_last):
    h, residual = make_case(op, (2, 4, 3, 5), channels_last=channels_last)
    overload = getattr(torch.ops.pdae_fast, op.__name__).default
    torch.library.opcheck(overload, (h.requires_grad_(), residual.requires_grad_()))


@by_op
def test_compile(make_case, op, reference):
    h, residual = make_case(op, (2, 4, 3, 5))
    got = torch.compile(op, fullgraph=True, backend="aot_eager")(h, residual)
    torch.testing.assert_close(got, op(h, residual))


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
