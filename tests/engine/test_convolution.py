"""Weights that are laid out by whichever thread comes first."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from golden_rule import relative
from pdae_fast import kernels
from pdae_fast.engine.convolution import (
    HeadConvolution,
    PackedConvolution,
    StemConvolution,
    WinogradConvolution,
    can_pack,
)

KINDS = [
    pytest.param(
        PackedConvolution,
        "_pack",
        marks=pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="oneDNN packs nothing here"),
    ),
    pytest.param(
        WinogradConvolution,
        "_transform",
        marks=pytest.mark.skipif(not kernels.native_status()[0], reason=kernels.native_status()[1]),
    ),
]


@pytest.mark.parametrize("cls, lay_out", KINDS)
def test_weights_are_laid_out_once_whoever_comes_first(monkeypatch, cls, lay_out):
    """While the first thread lays them out, the others are given time to go wrong."""
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 32, 3, 3, generator=random), torch.randn(32, generator=random)
    x = torch.randn(1, 32, 16, 16, generator=random)
    conv = cls(weight, bias, padding=1) if cls is PackedConvolution else cls(weight, bias)
    original, calls, start = getattr(cls, lay_out), [], threading.Barrier(3)

    def slow(self, x):
        calls.append(threading.get_ident())
        time.sleep(0.3)
        original(self, x)

    monkeypatch.setattr(cls, lay_out, slow)

    def run(_):
        start.wait(timeout=30)
        return conv(x)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert len(calls) == 1
    expected = F.conv2d(x, weight, bias, padding=1)
    assert max(relative(y, expected) for y in found) < 1e-5


@pytest.mark.parametrize("size", [3, 1, 5])
def test_a_stem_has_its_bias_in_its_weights(size):
    random = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(3, 32, size, padding=size // 2).requires_grad_(False)
    layer.bias.copy_(100 * torch.randn(32, generator=random))
    x = torch.randn(2, 3, 5, 7, generator=random).contiguous(memory_format=torch.channels_last)
    y = StemConvolution(layer)(x)
    assert relative(y, copy.deepcopy(layer).double()(x.double())) < 1e-6
    assert y.is_contiguous(memory_format=torch.channels_last)


def low_layer(*shape):
    """A layer whose every output is the difference of two neighbours, of all channels."""
    layer = torch.nn.Conv2d(*shape, 3, padding=1, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.zero_()
    layer.weight[:, :, 1, 1], layer.weight[:, :, 1, 2] = -1, 1
    return layer


@pytest.mark.parametrize("packed", [False, True])
def test_a_stem_in_bfloat16_reads_all_of_x(packed):
    """What is left of neighbours that bfloat16 does not tell apart."""
    if packed and not can_pack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("oneDNN packs nothing here")
    layer = low_layer(1, 32)
    layer.bias.zero_()
    x = 1 + torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) / 500
    y = StemConvolution(layer, packed)(x)[..., :-1]
    assert y.dtype is torch.bfloat16
    assert relative(y, F.conv2d(x, layer.weight.float(), padding=1)[..., :-1]) < 0.01
    assert relative(layer(x.bfloat16())[..., :-1], F.conv2d(x, layer.weight.float(), padding=1)[..., :-1]) > 0.5


def test_a_head_in_bfloat16_rounds_nothing():
    layer, random = low_layer(64, 3), torch.Generator().manual_seed(0)
    layer.weight.add_(0.1 * torch.randn(layer.weight.shape, generator=random))
    layer.bias.fill_(100)
    x = torch.randn(2, 64, 6, 5, generator=random).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(layer).double()(x.double())
    for packed in (False, can_pack(torch.device("cpu"), torch.bfloat16)):
        assert relative(HeadConvolution(layer, packed)(x), exact) < 1e-6
    assert relative(layer(x), exact) > 1e-4
