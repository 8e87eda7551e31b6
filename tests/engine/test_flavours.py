"""The fused plan of every flavour of U-Net against the modules in float64."""

import dataclasses

import pytest
import torch

from flavours import BASE, FLAVOURS, GOOGLE, PREDICTIONS
from golden_rule import fill, relative
from helpers import ON_DEVICE, noise
from pdae_fast import PDAE, PDAEConfig, Prior, UNetConfig, UserError
from pdae_fast.engine.cost import network_costs
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.models import UNet
from pdae_fast.samplers.reuse import Reuse

CPU = torch.device("cpu")
OPTIONS = {"cpu": Rewrites.for_device(CPU), "plain": Rewrites(packed_weights=False), "device": ON_DEVICE}


def config(changes, **settings):
    return PDAEConfig(
        image_size=32, latent_dim=8, encoder_channel=32, unet=UNetConfig(**{**BASE, **changes}), **settings
    )


def agree(model, z, labels=None, options=None, t=7):
    """Largest relative difference of eps and G of two images from the modules in float64."""
    x = noise(2, *model.image_shape)
    exact = Plan(model, CPU, torch.float64).field(None if z is None else z.double(), labels=labels)
    plan = FusedPlan(model, CPU, torch.float32, options)
    pairs = list(zip(plan.field(z, labels=labels)(x, t, True), exact(x.double(), t, True), strict=True))
    if z is None or plan.gradient is None:
        assert all(value is None for value in pairs.pop())
    for _, expected in pairs:
        assert expected.abs().mean() > 0.01
    return max(relative(found, expected) for found, expected in pairs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("changes", FLAVOURS.values(), ids=FLAVOURS)
def test_flavours(changes, options):
    model = fill(PDAE(config(changes)))
    assert agree(model, noise(2, 8, seed=1), options=options) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("settings", PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions(settings, options):
    model = fill(PDAE(config({}, **settings)))
    assert agree(model, noise(2, 8, seed=1), options=options) < 1e-5
    # Late in the process the factors are others.
    assert agree(model, noise(2, 8, seed=1), options=options, t=40) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("changes", [{}, GOOGLE], ids=["adm", "google"])
def test_labels(changes, options):
    model, z = fill(PDAE(config({**changes, "num_classes": 5}))), noise(2, 8, seed=1)
    labels = torch.tensor([3, 1])
    assert agree(model, z, labels, options) < 1e-5
    plan, x = FusedPlan(model, CPU, torch.float32, options), noise(2, 3, 32, 32)
    # Every image has its own label, also where several codes are mixed for each.
    eps, gradient = plan.field(z, labels=labels)(x, 7, True)
    swapped = plan.field(z, labels=labels.flip(0))(x, 7, True)[0]
    assert relative(swapped, eps) > 1e-3
    weights = torch.tensor([[0.25, 0.25], [0.75, 0.75]])
    assert relative(plan.field(torch.stack([z, z]), weights, labels)(x, 7, True)[1], gradient) < 1e-5
    for given in (None, labels):
        other = Prior(dataclasses.replace(config({}).prior)) if given is not None else model
        with pytest.raises(UserError, match="class-conditional"):
            FusedPlan(other, CPU, torch.float32, options).field(None, labels=given)


class Conditioned(torch.nn.Module):
    """eps(x_t, t, z) with z in every block, as a plan sees it."""

    def __init__(self, changes):
        super().__init__()
        self.config = dataclasses.replace(config(changes), unet=UNetConfig(**{**BASE, **changes}))
        self.unet = UNet(self.config.unet, z_width=8)
        self.image_shape = (3, 32, 32)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("changes", [{}, GOOGLE], ids=["adm", "google"])
def test_z_in_every_block(changes, options):
    model, z = fill(Conditioned(changes)), noise(2, 8, seed=1)
    assert agree(model, z, options=options) < 1e-5
    plan, x = FusedPlan(model, CPU, torch.float32, options), noise(2, 3, 32, 32)
    assert relative(plan.field(z.flip(0))(x, 7, True)[0], plan.field(z)(x, 7, True)[0]) > 1e-3
    # A sampler that leaves G out cannot leave z out.
    assert torch.equal(plan.field(z)(x, 7, False)[0], plan.field(z)(x, 7, True)[0])
    for spec in ("gradient:2", "window:3-9", "gradient:off"):
        with pytest.raises(UserError, match="leaves out G"):
            plan.reusing(Reuse.parse(spec))
    for arguments in ((None,), (torch.stack([z, z]), torch.ones(2, 2) / 2)):
        with pytest.raises(UserError, match="Diff-AE"):
            plan.field(*arguments)


@pytest.mark.parametrize("changes", FLAVOURS.values(), ids=FLAVOURS)
def test_costs_are_counted(changes):
    costs = network_costs(config(changes))
    assert min(costs.trunk) > 0 or changes.get("downsample") == "pool"
    assert costs.full == sum(costs.trunk) + sum(costs.eps) + sum(costs.gradient)
