"""The skip convolutions of both decoders as one product per skip: the same numbers, fewer products."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from golden_rule import relative
from helpers import ON_DEVICE, TINY_UNET, noise, tiny_pdae, tiny_prior
from pdae_fast import PDAEConfig
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.samplers import ddim
from pdae_fast.samplers.reuse import Reuse
from pdae_fast.schedule import build_schedule

CPU = torch.device("cpu")
SHARED = dataclasses.replace(ON_DEVICE, shared_products=True)
NETWORKS = {
    "attention": {"channel_multiplier": (1, 2), "attention_resolutions": (2,)},
    "three-levels": {"channel_multiplier": (1, 2, 3), "num_residual_blocks_of_a_block": 2},
    "learned-sigma": {"channel_multiplier": (1, 1), "learn_sigma": True},
    "one-level": {"channel_multiplier": (1,), "input_channel": 3},
}


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("linear", "addmm", "addmm_", "mm", "bmm")
        return function(*args, **(kwargs or {}))


def network(changes):
    unet = dataclasses.replace(TINY_UNET, **changes)
    return tiny_pdae(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet))


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("shared_statistics", [True, False])
def test_the_same_numbers_by_fewer_products(changes, shared_statistics):
    model = network(changes)
    x, z = noise(3, *model.image_shape), noise(3, 8, seed=1)
    options = dataclasses.replace(SHARED, shared_statistics=shared_statistics)
    plan, apart = (FusedPlan(model, CPU, torch.float32, o) for o in (options, ON_DEVICE))
    assert plan.options == options
    if shared_statistics:  # as where a map is larger than a GPU's cache
        plan._cache = apart._cache = -1
    eager = Plan(model, CPU, torch.float32)
    for t in (0, 17, 999):
        found, expected = plan.field(z)(x, t, True), eager.field(z)(x, t, True)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    eps, gradient = plan.field(z)(x, 17, False)
    assert gradient is None and relative(eps, eager.field()(x, 17, True)[0]) < 1e-5
    counts = []
    for p in (plan, apart):
        field = p.field(z)
        field(x, 17, True)  # makes the time tables
        with Products() as products:
            field(x, 17, True)
        counts.append(products.count)
    assert counts[1] - counts[0] == len(plan.unet.input_blocks)  # of four products for a skip, three


def test_mixtures_priors_and_approximations():
    model = network(NETWORKS["three-levels"])
    x, z = noise(2, *model.image_shape), noise(3, 2, 8, seed=1)
    weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
    plan, eager = FusedPlan(model, CPU, torch.float32, SHARED), Plan(model, CPU, torch.float32)
    found, expected = (p.field(z, weights)(x, 400, True) for p in (plan, eager))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    prior = tiny_prior()
    found, expected = (p.field()(noise(2, 1, 32, 32), 9, True)[0] for p in (
        FusedPlan(prior, CPU, torch.float32, SHARED), Plan(prior, CPU, torch.float32)
    ))  # fmt: skip
    assert relative(found, expected) < 1e-5
    schedule, apart = build_schedule(model.config.schedule), FusedPlan(model, CPU, torch.float32, ON_DEVICE)
    for spec in ("deep:2", "deep:2:2", "trunk:2", "gradient:2,deep:3"):
        one, two = (ddim.ddim(p.reusing(Reuse.parse(spec)).field(z[0]), x, schedule, 6) for p in (plan, apart))
        assert relative(one, two) < 1e-4


def test_it_needs_split_skips_and_folded_biases():
    for name in ("split_skips", "folded_biases"):
        options = dataclasses.replace(SHARED, **{name: False})
        assert not options.usable_on(CPU, torch.float32).shared_products
    assert not Rewrites.for_device(CPU).shared_products
