"""Wall clock: images encoded and decoded by the engine and a preset, against the published computation (eager float32
NCHW) at its headline setting, 999 steps up and 100 down.

The published side would take from minutes to hours, so SAMPLED of its steps are timed, spread over the trajectory (a
step costs the same at every t), and multiplied up; its encoder is left out, the engine's is timed. All sides take
turns. Where the weights are trained, the rows say what error the engine leaves. The published error takes the 1,099
evaluations that this bench avoids: `python -m pdae_fast.pareto --set standard --only "published 1000+100"` prints it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baseline import Baseline
from bench.machine import worth_timing
from bench.networks import build
from bench.quality import bundled_images
from bench.tables import RUN
from bench.timing import Alternation, pedantic, rounds_within
from pdae_fast import Pipeline, available, metrics
from pdae_fast.samplers import RECIPES
from pdae_fast.schedule import build_schedule

UP, DOWN = 1000, 100  # 1,000 evenly spaced points upward are 999 steps
SAMPLED = 4
FAST = RECIPES["fast"]
TIMED = {"fast": FAST, "fast, G at t >= 500": dataclasses.replace(FAST, reuse="window:500-1000")}
DTYPES = ("float32", "bfloat16")
CASES = (("fashion32", 8), ("celeba64", 1))
SECONDS = 30.0  # of measuring, a case; never fewer than three rounds
BOUND = 60.0  # on the CPU, of the quickest side


def headline(model) -> list[tuple[int, int]]:
    """(t, following t) of every step of the published setting, up and then down."""
    schedule = build_schedule(model.config.schedule)
    up, down = (schedule.timesteps(steps) for steps in (UP, DOWN))
    steps = [*zip(up[:-1], up[1:], strict=True), *zip(down[:0:-1], down[-2::-1], strict=True)]
    return [(int(t), int(following)) for t, following in steps]


def sampled(steps: list[Any], count: int) -> list[Any]:
    """``count`` of them, evenly spread, the first and the last among them."""
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def pipelines(model, device: torch.device, batch: int) -> dict[str, Pipeline]:
    return {
        f"{name}, {dtype}": Pipeline(model, recipe, device=device, dtype=dtype, batch_size=batch)
        for name, recipe in TIMED.items()
        for dtype in worth_timing(DTYPES, device)
    }


def sides(model, x0: Tensor, device: torch.device) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Pipeline], int]:
    """Functions to be timed by name ("published" first), the pipelines behind the others, and the published steps."""
    steps, baseline = headline(model), Baseline(model, device)
    some, pipes = sampled(steps, SAMPLED), pipelines(model, device, len(x0))
    x = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    z = pipes[next(iter(pipes))].encode(x0).to(device)

    def published() -> Tensor:
        for t, following in some:
            found = baseline.step(x, t, following, z)
        return found

    functions = {"published": published}
    functions.update((name, lambda pipe=pipe: pipe.reconstruct(x0)) for name, pipe in pipes.items())
    return functions, pipes, len(steps)


@pytest.mark.parametrize(("network", "batch"), CASES, ids=[f"{n}-batch{b}" for n, b in CASES])
def test_wall_clock(benchmark, device, network, batch):
    model, trained = build(network), network in available()
    if trained:
        x0 = bundled_images(model, batch)
    else:
        x0 = torch.rand(batch, *model.image_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    functions, pipes, steps = sides(model, x0, device)
    alternation = Alternation(functions, device)
    found, one_round = alternation.first()
    costs = {name: pipe.equivalents / 2 / batch for name, pipe in pipes.items()}  # first() calls everything twice
    if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round)):
        return
    table = []
    for name, cost in costs.items():
        ratio = alternation.ratio(name, "published").scaled(steps / SAMPLED)
        row = {"network": network, "batch": batch, "engine": name, "evaluations": round(cost, 1)}
        row |= {"published": f"{SAMPLED} of {steps} steps timed", "ratio": ratio.median}
        row |= {"ratio_spread": [ratio.low, ratio.high], "rounds": ratio.count}
        row["error_mse"] = metrics.mse(x0, found[name]).mean().item() if trained else None
        RUN.add("wall_clock", **row)
        table.append(row)
    if device.type == "cpu":
        assert max(row["ratio"] for row in table) >= BOUND, table
