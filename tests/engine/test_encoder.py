"""E_phi as the fused plan runs it, against the modules in float64."""

import copy

import pytest
import torch

from flavours import BASE, FLAVOURS
from golden_rule import fill, relative
from helpers import ON_DEVICE, noise
from pdae_fast import DiffAE, UNetConfig, kernels
from pdae_fast.config import DiffAEConfig
from pdae_fast.engine.attention import native, sdpa
from pdae_fast.engine.blocks import FusedEncoder
from pdae_fast.engine.convolution import WinogradConvolution, native_layers
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.ownership import owned
from pdae_fast.engine.plan import Plan
from pdae_fast.models.encoder import Encoder
from pdae_fast.models.unet import HalfUNet

CPU = torch.device("cpu")
OPTIONS = {"cpu": Rewrites.for_device(CPU), "plain": Rewrites(packed_weights=False), "device": ON_DEVICE}
HALVES = {"adm": {}, "deep": {"channel_multiplier": (1, 2, 2)}, **FLAVOURS}


def agrees(encoder, side, options, dtype=torch.float32, batch=2):
    """Relative difference of ``batch`` codes from those of the modules in float64."""
    x0 = noise(batch, 3, side, side)
    expected = copy.deepcopy(encoder).double()(x0.double())
    assert expected.shape == (batch, 8) and expected.abs().mean() > 0.01
    options = options.usable_on(CPU, dtype)
    own = owned(encoder, CPU, dtype, [layer.weight for layer in native_layers(encoder) if options.native_convolutions])
    with torch.inference_mode():
        run = FusedEncoder(own, options, native if options.native_attention else sdpa)
        found = run(x0.to(dtype).contiguous(memory_format=torch.channels_last))
    assert found.dtype == dtype
    return relative(found.double(), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("side", [32, 64])
def test_of_pdae(side, options):
    assert agrees(fill(Encoder(side, 3, 8, 32)), side, options) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("changes", HALVES.values(), ids=HALVES)
def test_of_diffae(changes, options):
    assert agrees(fill(HalfUNet(UNetConfig(**{**BASE, **changes}), 8)), 32, options) < 1e-5


@pytest.mark.parametrize("make", [lambda: Encoder(32, 3, 8, 32), lambda: HalfUNet(UNetConfig(**BASE), 8)])
def test_in_bfloat16(make):
    """No further off than bfloat16 modules are."""
    exact, x0 = fill(make()), noise(4, 3, 32, 32)
    with torch.no_grad():
        expected = copy.deepcopy(exact).double()(x0.double())
        modules = relative(copy.deepcopy(exact).bfloat16()(x0).double(), expected)
    assert agrees(exact, 32, OPTIONS["cpu"], torch.bfloat16, batch=4) < 1.2 * modules < 2e-2


def diffae(dtype=torch.float32):
    unet = UNetConfig(**{**BASE, "time_channel": 32})
    model = fill(DiffAE(DiffAEConfig(32, 8, unet, (1, 2, 2))))
    return model, FusedPlan(model, CPU, dtype)


def test_a_plan_encodes_with_it(monkeypatch):
    model, plan = diffae()
    x0 = noise(3, 3, 32, 32)
    expected = Plan(model, CPU, torch.float64).encode(x0.double())
    monkeypatch.delattr(HalfUNet, "forward")
    together = plan.encode(x0)
    assert relative(together.double(), expected.double()) < 1e-5 and plan.counts() == {"encoder": 3}
    alone = torch.cat([plan.encode(x) for x in x0.split(1)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not kernels.winograd_status()[0], reason="no native convolutions here")
@pytest.mark.parametrize("dtype", kernels.NATIVE_DTYPES, ids=str)
def test_convolutions_run_natively_from_float32_weights(dtype):
    model, plan = diffae(dtype)
    if not plan.options.native_convolutions:
        pytest.skip(plan.native["native_convolutions"])
    blocks = [layer for layer in plan.encoder.layers if hasattr(layer, "conv")]
    assert len(blocks) == 7 and all(isinstance(block.conv, WinogradConvolution) for block in blocks)
    own = plan.model.encoder.middle_block[0].in_layers[2].weight
    assert own.dtype == torch.float32 and torch.equal(own, model.encoder.middle_block[0].in_layers[2].weight)
