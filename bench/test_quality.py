"""What precision costs, and how long the first step takes to come."""

from __future__ import annotations

import pytest

from bench import quality, startup
from bench.tables import RUN


def once(benchmark, function):
    """Run ``function`` once under the benchmark's clock."""
    return benchmark.pedantic(function, rounds=1, iterations=1)


def test_precision_loss(benchmark, device):
    row = once(benchmark, lambda: quality.precision_loss(device))
    RUN.add("quality", **row)
    assert quality.precision_holds(row), row


APPROXIMATIONS = {
    "default": lambda model: {},
    "large-tiles": lambda model: {"large_tiles": True},
    "fp8": lambda model: {"fp8": quality.float8_scales(model)},
    "float32-fp8": lambda model: {"fp8": quality.float8_scales(model), "dtype": "float32"},
}


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("recipe", quality.RECIPES)
@pytest.mark.parametrize("model", ["fashion32", "avatars64"])
def test_precision_of_recipes(benchmark, device, model, recipe, approximation):
    """Every row is printed; the bounds hold for the paper's recipe, whose error is not as small as rounding, and of
    those with few steps, which bfloat16 may happen to improve, for what it costs."""
    options = APPROXIMATIONS[approximation](model)
    for row in once(benchmark, lambda: quality.recipe_losses(device, model, (recipe,), **options)):
        RUN.add("quality", **row)
        if row["x_T"] != "inferred" or approximation != "default":
            continue
        if recipe == "published":
            assert abs(row["ssim_difference"]) <= quality.RECIPE_SSIM_BOUND, row
            assert abs(row["ratio_mse"] - 1) <= quality.RECIPE_MSE_BOUND, row
        elif recipe in ("fast", "balanced"):
            assert row["ssim_difference"] >= -quality.RECIPE_SSIM_BOUND, row
            assert row["ratio_mse"] <= 1 + quality.RECIPE_MSE_BOUND, row


def test_float32_plan_against_the_modules(benchmark, device):
    row = once(benchmark, lambda: quality.plan_difference(device))
    RUN.add("quality", **row)
    assert row["error"] <= quality.PLAN_BOUND, row


def test_startup(benchmark, device):
    row = once(benchmark, lambda: startup.measure(device=str(device)))
    RUN.add("startup", **row)
    assert row["total_s"] <= startup.BOUND, row
