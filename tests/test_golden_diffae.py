"""Diff-AE's own way of sampling, by either plan, against its code: steps to 1e-5, loops by their rounding."""

import dataclasses

import pytest
import torch
from diffae_golden import NAMES, model
from models.test_diffae import TINY

from foreign_golden import about, numbers
from golden_rule import fill
from pdae_fast import DiffAE, Pipeline, UserError
from pdae_fast.checkpoints.attributes import CELEBA
from pdae_fast.samplers import ddim

STEP, GAPS = 1e-5, 8


def assert_near(found: torch.Tensor, name: str, key: str) -> None:
    """Within a few times the distance of the recorded float32 numbers from float64."""
    expected, gap = numbers(name)[key], about(name)["float64_gap"][key]["max_abs"]
    torch.testing.assert_close(found, expected, atol=GAPS * max(gap, STEP), rtol=0)


@pytest.fixture(scope="module", params=[(n, p) for n in NAMES for p in ("eager", "fused")], ids="-".join)
def case(request):
    name, plan = request.param
    g = numbers(name)
    steps = {"steps": len(g["decode.timesteps"]), "encode_steps": len(g["invert.timesteps"])}
    return name, g, Pipeline(model(name), "diffae", **steps, device="cpu", dtype="float32", plan=plan)


def test_trajectories(case):
    _, g, pipe = case
    down, up = pipe.recipe.down(pipe.schedule)[::-1], pipe.recipe.up(pipe.schedule)
    for steps, key, end in ((down, "decode", "prev"), (up, "invert", "next")):
        assert [step.t for step in steps] == g[f"{key}.timesteps"].tolist()
        now, following = (torch.tensor([getattr(step, n) for step in steps]) for n in ("alpha_bar", "alpha_bar_next"))
        torch.testing.assert_close(now.double(), g[f"{key}.alphas_cumprod"], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(following.double(), g[f"{key}.alphas_cumprod_{end}"], atol=1e-7, rtol=1e-6)
    assert (down[0].alpha_bar_next, up[-1].alpha_bar_next) == (1, 0)


@pytest.mark.parametrize("way", ["decode", "invert"])
def test_every_step_from_the_recorded_state(case, way):
    _, g, pipe = case
    start, trajectory = (
        (g["decode.x_T"], pipe.recipe.down(pipe.schedule))
        if way == "decode"
        else (g["encode.x_0"], pipe.recipe.up(pipe.schedule))
    )
    states, field = [start, *g[f"{way}.states"]], pipe.plan.field(g["encode.z"])
    for step, before, after in zip(trajectory, states, states[1:], strict=False):
        torch.testing.assert_close(ddim.integrate(field, before, (step,)), after, atol=STEP, rtol=STEP)


def test_loops(case):
    name, g, pipe = case
    x0, z = g["encode.x_0"], g["encode.z"]
    torch.testing.assert_close(pipe.encode(x0), z, atol=STEP, rtol=0)
    assert_near(pipe.invert(x0, z), name, "invert.x_T")
    assert_near(pipe.decode(z, g["decode.x_T"]), name, "decode.x_0")
    assert_near(pipe.decode(z, g["invert.x_T"]), name, "reconstruct.x_0")
    assert pipe.evaluations.keys() == {"encoder", "trunk", "eps"}
    assert float(pipe.decode(z, seed=1).abs().max()) <= 1  # it ends with the clamped estimate of x_0


def test_latent_dpm(case):
    name, g, pipe = case
    if name != "diffae-latent":
        pytest.skip("no latent DPM in it")
    trajectory, clamp = pipe.latent_settings(len(g["latent.timesteps"]))
    assert [step.t for step in trajectory][::-1] == g["latent.timesteps"].tolist() and not clamp
    alpha_bar = torch.tensor([step.alpha_bar for step in trajectory[::-1]], dtype=torch.float64)
    torch.testing.assert_close(alpha_bar, g["latent.alphas_cumprod"], atol=1e-7, rtol=1e-6)
    z = ddim.integrate(pipe.plan.latent_field(), g["sample.z_T"], trajectory, clamp=None)
    # Their clip of x_0 is of no use on z, whose values grow here.
    assert_near(z, name, "sample.z_normalised")
    z = z * pipe.model.latent_std + pipe.model.latent_mean
    assert_near(z, name, "sample.z")
    assert_near(pipe.decode(g["sample.z"], g["decode.x_T"]), name, "sample.x_0")
    assert len(pipe.latent_settings()[0]) == 200 and pipe.sample_latents(3, 8).shape == (3, 48)
    assert pipe.sample(2, latent_steps=8).shape == (2, 3, 32, 32)


def test_edit():
    g, config = numbers("diffae-latent"), model("diffae-latent").config
    own = DiffAE(dataclasses.replace(config, attributes=CELEBA)).eval()
    with torch.no_grad():
        own.classifier.weight.copy_(g["edit.classifier_weight"])
        own.latent_mean.copy_(g["file.conds_mean"][0]), own.latent_std.copy_(g["file.conds_std"][0])
    pipe = Pipeline(own, "diffae", device="cpu", dtype="float32", plan="eager")
    # They scale by sqrt(512) whatever the width of z.
    found = pipe.edit(g["encode.z"], "Smiling", 0.3 * (512 / 48) ** 0.5)
    torch.testing.assert_close(found, g["edit.z"], atol=STEP, rtol=0)


@pytest.mark.parametrize("plan", ["eager", "fused"])
def test_the_default_recipe_inverts_its_decoder(plan):
    """Strided steps solved for their start, and our own recipe that is exact, against their DDIM upward."""
    own = fill(DiffAE(TINY))
    x0 = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8
    recipes = (
        ("diffae", {"encode_steps": 20}),
        ("diffae", {"encode_steps": None, "iterations": 4}),
        ("reversible", {}),
    )
    upward, solved, exact = (
        float(
            (Pipeline(own, recipe, device="cpu", dtype="float32", plan=plan, **f).reconstruct(x0) - x0).square().mean()
        )
        for recipe, f in recipes
    )
    assert solved < upward / 100 and exact < 1e-8


def test_what_a_diffae_cannot_do():
    own = fill(DiffAE(TINY))
    pipe = Pipeline(own, "diffae", device="cpu", dtype="float32")
    x = torch.zeros(1, 3, 32, 32)
    z = pipe.encode(x)
    for call, words in (
        (lambda: pipe.decode(count=1), "z is missing: every block of a Diff-AE reads it"),
        (lambda: pipe.invert(x), "z is missing"),
        (
            lambda: pipe.interpolate(x, x, [0.5], "trajectory"),
            "'trajectory' mixes G of several z, and a Diff-AE has no G",
        ),
        (lambda: pipe.decode_mixture(z[None], torch.ones(1, 1), x), "decode_mixture mixes G"),
        (lambda: pipe.sample(1), "needs a latent DPM"),
        (lambda: pipe.manipulate(x, "Smiling", 1.0), "needs an attribute classifier"),
        (lambda: pipe.with_recipe(steps=999), "no stride gives so many of 1000 time points; expected 500 or 1000"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    halfway = pipe.with_recipe(steps=4, encode_steps=4).interpolate(x, x - 0.5, [0.0, 0.5, 1.0])
    assert halfway.shape == (3, 3, 32, 32)
