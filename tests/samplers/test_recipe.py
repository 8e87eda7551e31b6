"""A recipe checks itself, counts its evaluations as they are counted when it runs, and reads the command line."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch

from golden_rule import relative
from helpers import TINY_FULL, images, tiny_pdae
from pdae_fast import Pipeline, Recipe, UserError
from pdae_fast.config import ScheduleConfig
from pdae_fast.samplers import RECIPES
from pdae_fast.schedule import build_schedule

SCHEDULE = build_schedule(ScheduleConfig())


@pytest.fixture(scope="module")
def model():
    return tiny_pdae(TINY_FULL)


def from_line(line: str) -> Recipe:
    p = argparse.ArgumentParser()
    Recipe.add_options(p)
    return Recipe.from_args(p.parse_args(line.split()))


def test_the_default_solves_each_of_100_steps_once():
    assert Recipe() == Recipe(100, None, "uniform", 1, "ddim", 0.0, "none", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 10


@pytest.mark.parametrize(
    ("fields", "iterations"),
    [
        ({}, 1),
        ({"encode_steps": 50}, 0),
        ({"solver": "unipc2"}, 0),
        ({"solver": "belm"}, 0),
        ({"solver": "ddpm"}, 0),
        ({"eta": 0.5}, 0),
        ({"reuse": "gradient:2"}, 0),
        ({"reuse": "window:0-500"}, 1),
        ({"iterations": 0}, 0),
        ({"iterations": 3}, 3),
    ],
)
def test_iterations_follow_from_the_rest(fields, iterations):
    assert Recipe(**fields).iterations == iterations


@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES.values(),
        Recipe(steps=7),
        Recipe(steps=4, encode_steps=9),
        Recipe(steps=4, spacing="karras", solver="dpm++3m"),
        Recipe(steps=900, spacing="quadratic", iterations=0),  # points fall together
        Recipe(steps=5, spacing="strided", iterations=2),
    ],
    ids=str,
)
def test_evaluations_are_those_that_run(recipe):
    """Counted by the field itself, on a process of which any field is as good."""
    count, x0 = 0, torch.linspace(-0.9, 0.9, 8).view(2, 1, 2, 2)

    def field(x, t, use_gradient):
        nonlocal count
        count += 1
        return (17 * x).sin(), None  # rough: no step is solved exactly before its last evaluation

    def ticked():
        nonlocal ticks
        ticks += 1

    ticks, solver = 0, recipe.method
    latent = solver.infer(field, x0, recipe.up(SCHEDULE), recipe.iterations, progress=ticked)
    assert count == ticks == recipe.evaluations_up(SCHEDULE)
    solver.decode(field, latent, recipe.down(SCHEDULE), progress=ticked)
    assert count == ticks == recipe.evaluations(SCHEDULE, inferred=True)
    count = 0
    solver.decode(field, x0, recipe.down(SCHEDULE))
    assert count == recipe.evaluations(SCHEDULE, inferred=False)


def test_the_presets_cost_what_the_documents_say():
    found = {name: recipe.evaluations(SCHEDULE, inferred=True) for name, recipe in RECIPES.items()}
    assert found == {"published": 200, "fast": 31, "balanced": 40, "exact": 181, "reversible": 39, "diffae": 270}
    assert Recipe().evaluations(SCHEDULE, inferred=True) == 201
    assert Recipe(encode_steps=1000).evaluations(SCHEDULE, inferred=True) == 1099
    assert Recipe(solver="ddpm", steps=1000).evaluations(SCHEDULE, inferred=False) == 1000


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ("", Recipe()),
        ("--steps 20", Recipe(steps=20)),
        ("--preset fast", RECIPES["fast"]),
        ("--preset fast --steps 20 --noise normal", dataclasses.replace(RECIPES["fast"], steps=20, noise="normal")),
        ("--preset published --encode-steps 1000", Recipe(encode_steps=1000)),
        ("--solver ddpm --steps 1000", Recipe(solver="ddpm", steps=1000)),
        ("--eta 0.5 --reuse none", Recipe(eta=0.5)),
        ("--iterations 0", RECIPES["published"]),
    ],
)
def test_the_command_line(line, recipe):
    assert from_line(line) == recipe


def test_a_pipeline_takes_names_recipes_and_fields(model):
    for arguments, fields, expected in (
        ((), {}, Recipe()),
        (("balanced",), {}, RECIPES["balanced"]),
        ((Recipe(steps=3),), {}, Recipe(steps=3)),
        (("balanced",), {"steps": 5}, dataclasses.replace(RECIPES["balanced"], steps=5)),
        ((), {"steps": np.int64(6), "solver": "belm"}, Recipe(steps=6, solver="belm")),
    ):
        assert Pipeline(model, *arguments, device="cpu", **fields).recipe == expected
    with pytest.raises(TypeError, match="colour"):
        Pipeline(model, device="cpu", colour="red")


def test_with_recipe_shares_the_weights(model):
    pipe = Pipeline(model, "published", steps=4, device="cpu", dtype="float32", batch_size=2)
    other = pipe.with_recipe("fast", steps=3)
    z = pipe.encode(images(2))
    x = other.decode(z, seed=1)
    assert other.evaluations == pipe.evaluations and pipe.evaluations["trunk"] == 6
    less = pipe.with_recipe("published", steps=4, reuse="gradient:2")
    assert less.evaluations == {} and less.plan.model is pipe.plan.model
    assert pipe.recipe.steps == 4 and other.recipe == dataclasses.replace(RECIPES["fast"], steps=3)
    own = Pipeline(model, "fast", steps=3, device="cpu", dtype="float32").decode(z, seed=1)
    torch.testing.assert_close(x, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", [{"solver": "ddpm", "steps": 12}, {"eta": 0.7, "steps": 12}], ids=str)
def test_noise_in_the_steps_is_an_images_own(model, fields):
    whole, split = (Pipeline(model, device="cpu", dtype="float32", batch_size=size, **fields) for size in (5, 2))
    z = whole.encode(images(5))
    x = whole.decode(z, seed=3)
    assert relative(split.decode(z, seed=3), x) < 1e-4
    assert relative(whole.decode(z[3:], seed=3, indices=[3, 4]), x[3:]) < 1e-4
    assert relative(whole.decode(z, seed=4), x) > 0.1
    # A given x_T leaves the steps their noise.
    x_T = whole.random_x_T(3, range(5))
    assert relative(whole.decode(z, x_T, seed=3), x) < 1e-4
    assert relative(whole.decode(z, x_T, seed=4), x) > 1e-2
    one, two = (torch.Generator().manual_seed(4) for _ in range(2))
    parts = torch.cat([whole.decode(z[:3], generator=two), whole.decode(z[3:], generator=two)])
    assert relative(parts, whole.decode(z, generator=one)) < 1e-4
    assert whole.sample(2, seed=1).shape == (2, 1, 32, 32)
    for call in (whole.invert, whole.reconstruct):
        with pytest.raises(UserError, match="x_T cannot be inferred with .*: its steps draw noise"):
            call(images(1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps must be between 1 and 1000"),
        ({"steps": 10.5}, "steps must be a whole number, not 10.5"),
        ({"steps": None}, "steps must be a whole number, not None"),
        ({"steps": True}, "whole number, not True"),
        ({"steps": "10"}, "whole number, not '10'"),
        ({"encode_steps": 0}, "encode_steps must be between"),
        ({"iterations": -1}, "must not be negative"),
        ({"iterations": 1, "encode_steps": 50}, "leave out --encode-steps .*, or ask for iterations 0"),
        ({"solver": "belm", "encode_steps": 50}, "leave out --encode-steps"),
        ({"solver": "belm", "iterations": 1}, "cannot be combined with belm"),
        ({"solver": "ddpm", "iterations": 1}, "cannot be combined with ddpm"),
        ({"solver": "ddpm", "eta": 0.5}, "eta belongs to ddim"),
        ({"eta": 1.5}, "eta must be a number between 0 and 1"),
        ({"eta": float("nan")}, "eta must be a number between 0 and 1"),
        ({"eta": 0.5, "iterations": 1}, "draw noise"),
        ({"spacing": "cubic"}, "'cubic' is not known"),
        ({"spacing": "strided", "solver": "belm"}, "spacing strided ends at alpha_bar 1, where belm cannot go"),
        ({"spacing": "respaced", "solver": "unipc2"}, "where unipc2 cannot go; expected ddim"),
        ({"solver": "plms"}, "'plms' is not known"),
        ({"noise": "pink"}, "noise 'pink' is not known"),
        ({"reuse": "often"}, "'often' is not understood"),
        ({"reuse": "deep:2", "iterations": 1}, "iterations cannot run it backward"),
        ({"reuse": "deep:2", "solver": "belm"}, "belm cannot run it backward"),
    ],
)
def test_mistakes(fields, words):
    with pytest.raises(UserError, match=words) as failure:
        Recipe(**fields)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("quick", "recipe 'quick' is not known; expected a Recipe or one of published, fast"), (10, "must be a Recipe")],
)
def test_recipes_that_do_not_exist(model, recipe, words):
    with pytest.raises(UserError, match=words):
        Pipeline(model, recipe, device="cpu")


def test_more_steps_than_the_process_has(model):
    with pytest.raises(UserError, match="between 1 and 1000, not 1001"):
        Pipeline(model, steps=1001, device="cpu")
    with pytest.raises(UserError, match="between 1 and 1000, not 1001"):
        Pipeline(model, encode_steps=1001, device="cpu")
