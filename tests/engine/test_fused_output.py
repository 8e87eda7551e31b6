"""Trajectories whose steps end in one op, against the same plan with heads and update apart."""

import dataclasses

import pytest
import torch

from golden_rule import relative
from helpers import TINY, capture_into, images, tiny_pdae, tiny_prior
from pdae_fast import kernels, sampling
from pdae_fast.engine import graphs
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.reuse import Reuse
from pdae_fast.schedule import build_schedule

CPU = torch.device("cpu")
APART = Rewrites(False, False, True, True, True, True, True)
FUSED = dataclasses.replace(APART, fused_output=True)
# Colour and a learned variance: the eps head then makes channels that no step reads.
COLOUR = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, input_channel=3, learn_sigma=True))
SCHEDULE = build_schedule(TINY.schedule)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """How each step ended, with G and without."""
    made = []

    def counting(name, original):
        def call(x, eps, gradient, *arguments):
            made.append(f"{name} {'without' if gradient is None else 'with'} G")
            return original(x, eps, gradient, *arguments)

        return call

    for name in ("output_step", "ddim_update"):
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    return made


def both(model, dtype=torch.float32):
    return (FusedPlan(model, CPU, dtype, options) for options in (FUSED, APART))


@pytest.mark.parametrize("config", [TINY, COLOUR], ids=["grey", "colour-learned-sigma"])
@pytest.mark.parametrize("sampler", [sampling.ddim, sampling.ddim_invert], ids=["decode", "invert"])
def test_steps_with_gradient(calls, config, sampler):
    model = tiny_pdae(config)
    fused, apart = both(model)
    z, x = noise(3, config.latent_dim, seed=1), images(3, config)
    assert fused.options == FUSED and apart.options == APART  # nothing was switched off behind the test's back
    for clamp in (1.0, None):
        expected = sampler(apart.field(z), x, SCHEDULE, 4, clamp=clamp)
        calls.clear()
        for B in (3, 2):  # a ragged batch fills the buffers of a full one
            assert relative(sampler(fused.field(z[:B]), x[:B], SCHEDULE, 4, clamp=clamp), expected[:B]) < 1e-5
        assert calls == ["output_step with G"] * 8
        assert fused._trajectories.keys() == apart._trajectories.keys()


def test_steps_without_gradient(calls):
    prior = tiny_prior()
    fused, apart = both(prior)
    x = noise(2, *prior.image_shape)
    expected = sampling.ddim(apart.field(), x, SCHEDULE, 3)
    calls.clear()
    assert relative(sampling.ddim(fused.field(), x, SCHEDULE, 3), expected) < 1e-5
    assert calls == ["output_step without G"] * 3


def test_gradient_stops_on_the_way(calls):
    model = tiny_pdae()
    fused, apart = both(model)
    x, z = noise(1, *model.image_shape), noise(1, model.config.latent_dim, seed=1)
    expected = sampling.ddim(apart.field(z), x, SCHEDULE, 4, stop_percent=0.5)
    calls.clear()
    assert relative(sampling.ddim(fused.field(z), x, SCHEDULE, 4, stop_percent=0.5), expected) < 1e-5
    assert calls == ["output_step with G"] * 2 + ["output_step without G"] * 2
    assert fused.evaluations == apart.evaluations == {"trunk": 4, "eps": 4, "gradient": 2}


def test_bfloat16():
    model = tiny_pdae()
    exact = next(both(model))
    fused, apart = both(model, torch.bfloat16)
    x, z = noise(2, *model.image_shape), noise(2, model.config.latent_dim, seed=1)
    exact, fused, apart = (sampling.ddim(plan.field(z), x, SCHEDULE, 3) for plan in (exact, fused, apart))
    assert relative(fused, exact) < 1.2 * relative(apart, exact)


def test_what_needs_the_gradient_itself_goes_apart(calls):
    model = tiny_pdae()
    fused, apart = both(model)
    x, z = noise(2, *model.image_shape), noise(2, 2, model.config.latent_dim, seed=1)
    weights = torch.tensor([[0.3, 0.6], [0.7, 0.4]])
    results = [sampling.ddim(plan.field(z, weights), x, SCHEDULE, 3) for plan in (fused, apart)]
    assert relative(*results) < 1e-6 and calls == ["ddim_update with G"] * 6  # mixtures of several G
    calls.clear()
    results = [sampling.ddim(p.reusing(Reuse(gradient=2)).field(z[0]), x, SCHEDULE, 3) for p in (fused, apart)]
    assert relative(*results) < 1e-6 and calls == ["ddim_update with G"] * 6  # G is kept for the next step
    calls.clear()
    results = [sampling.ddim(p.reusing(Reuse(deep=2)).field(z[0]), x, SCHEDULE, 3) for p in (fused, apart)]
    assert relative(*results) < 1e-5  # a deep map is kept, not G
    assert calls == ["output_step with G"] * 3 + ["ddim_update with G"] * 3


def test_it_is_switched_off_without_what_it_needs():
    for missing in ("kernels", "fused_update"):
        options = dataclasses.replace(FUSED, **{missing: False})
        assert not options.usable_on(CPU, torch.float32).fused_output
    assert "fused_output" in FusedPlan(tiny_pdae(), CPU, torch.float32, FUSED).describe()["rewrites"]


def test_captured_steps(monkeypatch, calls):
    """One graph with G and one without, as with heads and update apart."""

    captured = []
    monkeypatch.setattr(graphs, "capture", capture_into(captured))
    model = tiny_pdae()
    fused, apart = both(model)
    x, z = noise(2, *model.image_shape), noise(2, model.config.latent_dim, seed=1)
    expected = sampling.ddim(apart.field(z), x, SCHEDULE, 3, stop_percent=0.5)
    calls.clear()
    fused.options, fused.graph_pool = dataclasses.replace(FUSED, graphs=True), object()
    assert relative(sampling.ddim(fused.field(z), x, SCHEDULE, 3, stop_percent=0.5), expected) < 1e-5
    assert len(captured) == 2 and not any("ddim_update" in call for call in calls)
