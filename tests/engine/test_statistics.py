"""Statistics that additions leave for the norms that read them: the same numbers, and none is computed twice."""

import dataclasses

import pytest
import torch

from golden_rule import relative
from helpers import ON_DEVICE, TINY_UNET, Calls, noise, tiny_pdae
from pdae_fast import PDAEConfig, kernels
from pdae_fast.engine import blocks, norms
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.norms import common_part
from pdae_fast.engine.plan import Plan
from pdae_fast.kernels._layout import count_splits

CPU = torch.device("cpu")
WIDE = dataclasses.replace(TINY_UNET, base_channel=64, channel_multiplier=(1, 2), num_residual_blocks_of_a_block=2)
NETWORKS = {
    "wide": WIDE,
    "attention": dataclasses.replace(WIDE, attention_resolutions=(2,)),
    "narrow": TINY_UNET,
}


@pytest.mark.parametrize("small", [0, 8192], ids=["all large", "as it is"])
@pytest.mark.parametrize("unet", NETWORKS.values(), ids=NETWORKS)
def test_the_same_numbers(monkeypatch, unet, small):
    model = tiny_pdae(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet))
    monkeypatch.setattr(kernels, "stats_splits", lambda batch, pixels, device: count_splits(pixels, 5))
    for module in (norms, blocks):
        monkeypatch.setattr(module, "SMALL_GROUP", small)
    x, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    plan, eager = FusedPlan(model, CPU, torch.float32, ON_DEVICE), Plan(model, CPU, torch.float32)
    assert plan.trunk.part == common_part(model.decoder) == (2 if unet.base_channel == 64 else 1)
    for t in (0, 17, 999):
        found, expected = plan.field(z)(x, t, True), eager.field(z)(x, t, True)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    assert relative(plan.field(z)(x, 17, False)[0], eager.field()(x, 17, True)[0]) < 1e-5


def test_who_computes_them(monkeypatch):
    """Every ResBlock leaves those of what it makes, but to an attention; the first convolution leaves none."""
    model = tiny_pdae(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=WIDE))
    monkeypatch.setattr("pdae_fast.engine.blocks.SMALL_GROUP", 2 * 16 * 16)  # the full-size maps alone are large
    field = FusedPlan(model, CPU, torch.float32, ON_DEVICE).field(noise(1, 8))
    x = noise(1, *model.image_shape)
    field(x, 17, True)
    with Calls() as calls:
        field(x, 17, True)
    made = sum(type(m).__name__ == "ResBlock" for m in model.decoder.modules())
    attention = sum(type(m).__name__ == "AttentionBlock" for m in model.decoder.modules())
    # What attention reads it changes, and what it leaves is small.
    assert calls.names.count("add_with_stats") == made - attention
    assert calls.names.count("partial_stats") == 1
    # The other norm of every block reads a convolution; those of the two heads read a block.
    assert calls.names.count("group_norm") == made + 2 * attention
    assert calls.names.count("group_norm_apply") == made - attention + 2
