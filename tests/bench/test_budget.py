"""Launches and bytes of one captured step, held to a budget, so that a change shows; counted on meta tensors."""

import dataclasses
import functools

import pytest
import torch

from bench.budget import META, ON_A_GPU, Budget, Counting, count, cuda_functions, empty_model, meta_plan
from pdae_fast.samplers import Recipe
from pdae_fast.schedule import build_schedule

# One DDIM step with G in bfloat16: kernels of this project, convolutions, matrix products and attention, launches in
# all, and GB that have to move. A step that needs less may tighten its line; one that needs more has to say why.
BUDGETS = {
    ("celeba64", 1): (101, 91, 25, 240, 0.40),
    ("celeba64", 8): (103, 91, 25, 242, 1.69),
    ("celeba64", 64): (117, 91, 25, 256, 12.30),
    ("ffhq128", 1): (129, 113, 25, 293, 1.26),
    ("ffhq128", 8): (135, 113, 25, 299, 7.98),
    ("ffhq128", 64): (145, 113, 25, 309, 61.94),
    # Layers that multiply codes of fp8, and the three that pool in between and round.
    ("celeba64 by codes", 1): (188, 4, 25, 255, 0.27),
    ("celeba64 by codes", 8): (190, 4, 25, 257, 1.34),
    ("celeba64 by codes", 64): (204, 4, 25, 271, 10.14),
    ("ffhq128 by codes", 1): (237, 5, 25, 313, 0.96),
    ("ffhq128 by codes", 8): (243, 5, 25, 319, 6.54),
    ("ffhq128 by codes", 64): (253, 5, 25, 329, 51.36),
    # Rounding by the framework's operators.
    ("celeba64 emulated", 1): (101, 91, 25, 576, 0.80),
    ("celeba64 emulated", 64): (117, 91, 25, 626, 37.70),
}


@functools.lru_cache(maxsize=1)
def model_of(network):
    name, *fp8 = network.split(maxsplit=1)
    return empty_model(name, bool(fp8))


@pytest.mark.parametrize(("network", "batch"), BUDGETS)
def test_a_step_keeps_to_its_budget(network, batch):
    found = count(model_of(network), batch, dataclasses.replace(ON_A_GPU, float8="codes" in network))
    ours = sum(n for kind, n in found.launches.items() if kind.endswith("_kernel"))
    of = found.launches["conv2d"], found.launches["product"]
    assert (ours, *of, found.nodes, round(found.bytes / 1e9, 2)) == BUDGETS[network, batch]


# Launches of one step beside those of the networks, stepped from the host. "up" is x_T by one evaluation a step.
STEPPED = {"ddim": 4, "dpm++2m": 14, "dpm++3m": 16, "unipc2": 23, "unipc3": 27, "belm": 16, "up": 17}
ON_THE_DEVICE = 7  # of every linear method but DDIM, all of them in the captured step


@pytest.mark.parametrize("solver", STEPPED)
def test_what_solvers_add_keeps_to_its_budget(solver):
    found = [beside_the_networks(solver, dataclasses.replace(ON_A_GPU, fused_solvers=on)) for on in (False, True)]
    assert found == [STEPPED[solver], STEPPED[solver] if solver == "ddim" else ON_THE_DEVICE]


@pytest.mark.parametrize("network", ["celeba64", "ffhq128"])
def test_a_captured_step_of_a_linear_method_holds_all_of_it(network):
    weights = (((0.5,) * 3,) * 2,) * 10
    assert (
        count(model_of(network), 1, weights=weights).nodes == BUDGETS[network, 1][3] + ON_THE_DEVICE - STEPPED["ddim"]
    )


def beside_the_networks(solver, options):
    """Launches of one step more in whole runs: what a run does once is in both."""
    plan, totals = meta_plan(empty_model("tiny"), options=options), []
    config, schedule = plan.model.config, build_schedule(plan.model.config.schedule)
    x, z = torch.empty(1, *plan.model.image_shape, device=META), torch.empty(1, config.latent_dim, device=META)
    plan.prepare(range(schedule.T))
    plan.evaluate = lambda x, *_: (torch.empty_like(x, dtype=torch.bfloat16),) * 2
    for steps in (20, 21):
        recipe, counting = Recipe(steps=steps, **({} if solver == "up" else {"solver": solver})), Counting()
        with torch.inference_mode(), cuda_functions(counting.run), counting:
            if solver == "up":
                recipe.method.infer(plan.field(z), x, recipe.up(schedule), recipe.iterations)
            else:
                recipe.method.decode(plan.field(z), x, recipe.down(schedule))
        totals.append(counting.budget.nodes)
    return totals[1] - totals[0]


def test_what_is_counted():
    """One operator each, by hand: a launch that reads and writes, a view, a copy, a bias that is a pass of its own."""
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(16, 8, 3, 3, device="meta"), torch.empty(16, device="meta")
    cases = [
        (lambda: x + x, {"add": (1, 2 * x.nbytes)}),
        (lambda: x.add_(1), {"add_": (1, x.nbytes)}),
        (lambda: x.permute(0, 2, 3, 1).reshape(-1, 8), {}),
        (lambda: x.reshape(2, -1), {"reshape": (1, 2 * x.nbytes)}),
        (lambda: torch.empty_like(x), {}),
        (lambda: torch.nn.functional.conv2d(x, weight, None, 1, 1), {"conv2d": (1, 3 * x.nbytes + weight.nbytes)}),
        (
            lambda: torch.nn.functional.conv2d(x, weight, bias, 1, 1),
            {"conv2d": (1, 3 * x.nbytes + weight.nbytes + bias.nbytes), "bias of a convolution": (1, 2 * x.nbytes)},
        ),
        (lambda: torch.mm(weight.view(-1, 4), weight.view(4, -1)), {"product": (1, 2 * weight.nbytes + 288 * 288 * 4)}),
    ]
    for run, expected in cases:
        counting = Counting()
        with torch.inference_mode(), counting:
            run()
        found = counting.budget
        assert {kind: (n, found.moved[kind]) for kind, n in found.launches.items()} == expected


def test_launches_of_the_kernels_are_counted_from_their_plans():
    pytest.importorskip("triton")
    from pdae_fast import kernels

    h = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16)
    counting = Counting()
    with cuda_functions(counting.run):
        kernels.residual_add(h, h.clone(), torch.empty(8, device="meta"))
    assert counting.budget.launches == {"residual_kernel": 1}
    assert counting.budget.bytes == 3 * h.nbytes + 32
    assert Budget().nodes == 0
