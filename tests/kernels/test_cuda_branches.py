"""What the ops run for CUDA tensors where no kernel can take them: on the CPU, where the operators are the same."""

import importlib

import pytest
import torch

from pdae_fast import kernels
from pdae_fast.kernels import group_norm_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def fallback(monkeypatch):
    """fallback(module, name): the CUDA function of an op, without usable Triton, told that nothing is on the CPU."""
    monkeypatch.setattr(group_norm_torch, "_on_cpu", lambda x: False)

    def function(module, name):
        module = importlib.import_module(f"pdae_fast.kernels.{module}")
        monkeypatch.setattr(module, "fallback_reason", lambda *_: "no triton")
        return getattr(module, f"_{name}_cuda")

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm(fallback, image, vector, error, dtype, last, affine):
    x, x2 = image((3, 64, 6, 5), dtype, last), image((3, 32, 6, 5), dtype, last)
    weight, bias, x_bias, scale, shift = vector(96), vector(96), vector(64), vector(3, 96), vector(3, 96)
    outer = (scale, shift) if affine else (None, None)
    y, mean, rstd = fallback("group_norm", "group_norm")(x, weight, bias, 32, 1e-5, *outer, True, x2, x_bias)
    truth = kernels.group_norm_reference(x.double(), weight, bias, 32, 1e-5, *outer, True, x2.double(), x_bias=x_bias)
    assert error(y, truth) < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == (3, 32)


@pytest.mark.parametrize("last", [False, True])
def test_statistics_and_their_application(fallback, image, vector, error, last):
    x, weight, bias = image((2, 64, 6, 5), torch.float32, last), vector(64), vector(64)
    stats = fallback("group_norm", "channel_stats")(x)
    y = fallback("group_norm", "group_norm_apply")(x, stats, weight, bias, 32, 1e-5, None, None, False, None, None)
    assert error(y, kernels.group_norm_reference(x.double(), weight, bias)) < 1e-6


def test_ddim_update_of_one_step_and_of_a_step_a_sample(fallback, image, error):
    x, eps, gradient = (image((3, 3, 8, 8), last) for last in (torch.float32, torch.bfloat16, torch.bfloat16))
    table = kernels.ddim_coefficients([0.3, 0.6, 0.9], [0.6, 0.9, 1.0])
    update = fallback("ddim_update", "ddim_update")
    for index in (torch.tensor(1), torch.tensor([2, 0, 1])):
        wide = (t.double() for t in (x, eps, gradient))
        truth = kernels.ddim_update_reference(*wide, table, index)
        assert error(update(x, eps, gradient, table, index, True), truth) < 1e-6


@pytest.mark.parametrize("last", [False, True])
def test_additions(fallback, image, vector, error, last):
    h, small, bias = image((2, 8, 6, 4), channels_last=last), image((2, 8, 3, 2), channels_last=last), vector(8)
    wide = h.double(), small.double()
    assert (
        error(fallback("add_upsample", "residual_add")(h, h, bias), kernels.residual_add_reference(wide[0], h, bias))
        < 1e-6
    )
    found = fallback("add_upsample", "upsample_add")(h, small, bias)
    assert error(found, kernels.upsample_add_reference(*wide, bias)) < 1e-6
    found = fallback("add_upsample", "add_upsample")(small, small)
    assert error(found, kernels.add_upsample_reference(wide[1], small)) < 1e-6
