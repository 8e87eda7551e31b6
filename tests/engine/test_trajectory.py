"""Whole trajectories by a step index on the device: on the CPU the same step runs uncaptured."""

import dataclasses

import pytest
import torch

from golden_rule import relative
from helpers import ON_DEVICE, capture_into, images, noise, tiny_pdae, tiny_prior
from pdae_fast.engine import graphs
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import NEEDS, Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.samplers import Recipe, ddim
from pdae_fast.samplers.reuse import Reuse
from pdae_fast.schedule import build_schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def both():
    model = tiny_pdae()
    return model, FusedPlan(model, CPU, torch.float32, ON_DEVICE), Plan(model, CPU, torch.float32)


@pytest.mark.parametrize("stop_percent", [0.0, 0.4, 1.0])
def test_decoding(both, stop_percent):
    model, plan, eager = both
    schedule, z = build_schedule(model.config.schedule), noise(2, model.config.latent_dim, seed=1)
    x_T = noise(2, *model.image_shape)
    ticks = []
    plan.evaluations.clear(), eager.evaluations.clear()
    found = ddim.ddim(plan.field(z), x_T, schedule, 10, stop_percent=stop_percent, progress=lambda: ticks.append(1))
    expected = ddim.ddim(eager.field(z), x_T, schedule, 10, stop_percent=stop_percent)
    assert relative(found, expected) < 1e-4
    assert len(ticks) == 10 and plan.evaluations == eager.evaluations
    assert plan._trajectories  # it did run through the device's tables


def test_inversion_and_no_clamp(both):
    model, plan, eager = both
    schedule, z, x0 = build_schedule(model.config.schedule), noise(2, model.config.latent_dim, seed=1), images(2)
    for clamp in (1.0, None):
        found, expected = (ddim.ddim_invert(p.field(z), x0, schedule, 10, clamp=clamp) for p in (plan, eager))
        assert relative(found, expected) < 1e-4
    other = [ddim.ddim_invert(p.field(z), x0, schedule, 10, clamp=0.5) for p in (plan, eager)]
    assert relative(*other) < 1e-4  # a clamp that the fused update does not know goes step by step


def test_a_ragged_batch_uses_the_buffers_of_a_full_one(both):
    model, _, eager = both
    plan = FusedPlan(model, CPU, torch.float32, ON_DEVICE)
    schedule, D = build_schedule(model.config.schedule), model.config.latent_dim
    x_T, z = noise(4, *model.image_shape), noise(4, D, seed=1)
    weights, codes = torch.rand(2, 4, generator=torch.Generator().manual_seed(3)), noise(2, 4, D, seed=2)
    expected = ddim.ddim(eager.field(z), x_T, schedule, 5)
    mixed = ddim.ddim(eager.field(codes, weights), x_T, schedule, 5)
    for B, kept in ((4, 1), (3, 1), (1, 1), (2, 1)):
        assert relative(ddim.ddim(plan.field(z[:B]), x_T[:B], schedule, 5), expected[:B]) < 1e-4
        assert len(plan._trajectories) == kept
    for B in (4, 3):
        field = plan.field(codes[:, :B], weights[:, :B])
        assert relative(ddim.ddim(field, x_T[:B], schedule, 5), mixed[:B]) < 1e-4
    assert len(plan._trajectories) == 2
    assert relative(ddim.ddim(plan.field(), x_T, schedule, 5), ddim.ddim(eager.field(), x_T, schedule, 5)) < 1e-4


def test_results_survive_the_next_call(both):
    model, plan, _ = both
    schedule, z = build_schedule(model.config.schedule), noise(1, model.config.latent_dim, seed=1)
    first = ddim.ddim(plan.field(z), noise(1, *model.image_shape), schedule, 3)
    kept = first.clone()
    ddim.ddim(plan.field(-z), noise(1, *model.image_shape, seed=5), schedule, 3)
    assert torch.equal(first, kept)


def test_only_so_many_trajectories_are_kept():
    prior = tiny_prior()
    plan, schedule = FusedPlan(prior, CPU, torch.float32, ON_DEVICE), build_schedule(prior.config.schedule)
    for steps in range(1, 12):
        ddim.ddim(plan.field(), noise(1, *prior.image_shape), schedule, steps)
    assert len(plan._trajectories) == 8


def test_what_cannot_run_is_switched_off_and_said():
    everything = Rewrites(**{field.name: True for field in dataclasses.fields(Rewrites)})
    plan = FusedPlan(tiny_pdae(), CPU, torch.float32, everything)
    assert not plan.options.graphs and not plan.options.parallel_decoders and not plan.options.folded_biases
    assert "graphs" not in plan.describe()["rewrites"] and plan.describe()["attention"] == "sdpa"
    nothing = dataclasses.replace(ON_DEVICE, kernels=False, parallel_decoders=True, graphs=True)
    assert nothing.usable_on(CPU, torch.float32) == Rewrites(
        packed_weights=False, phase_upsample=False, fused_update=True
    )


def test_the_table_of_needs_is_read_from_the_top():
    """A switch stands below every switch that it names, and all names are known: switches or what a device has."""
    switches, device = (
        {field.name for field in dataclasses.fields(Rewrites)},
        {"oneDNN", "a GPU", "native norms", "native convolutions"},
    )
    for place, (name, (needs, without)) in enumerate(NEEDS.items()):
        named = {other for one_of in (*needs, without) for other in one_of}
        assert name in switches and named <= switches | device
        assert not named & set(list(NEEDS)[place:])


LINEAR = {
    "default": {},
    "default, strided": {"spacing": "strided"},
    "dpm++2m": {"solver": "dpm++2m"},
    "dpm++3m": {"solver": "dpm++3m"},
    "unipc2": {"solver": "unipc2"},
    "unipc3": {"solver": "unipc3", "spacing": "quadratic"},
    "belm": {"solver": "belm"},
}


def whole(plan):
    """The trajectories that the plan has run: (states, steps) of each."""
    return [(len(lent.images) - 1 or 1, len(lent.steps)) for lent in plan._trajectories.values()]


@pytest.mark.parametrize("fields", LINEAR.values(), ids=LINEAR)
def test_linear_methods_are_those_stepped_from_the_host(both, fields):
    model, host, _ = both
    plan = FusedPlan(model, CPU, torch.float32, dataclasses.replace(ON_DEVICE, fused_solvers=True))
    recipe, schedule = Recipe(steps=20, **fields), build_schedule(model.config.schedule)
    z, x0, ticks = noise(2, model.config.latent_dim, seed=1), images(2), []
    host.evaluations.clear()

    def run(plan, B):
        infer, up = recipe.method.infer, recipe.up(schedule)
        latent = infer(plan.field(z[:B]), x0[:B], up, recipe.iterations, progress=lambda: ticks.append(plan))
        ends = [
            recipe.method.decode(plan.field(z[:B]), x_T, recipe.down(schedule, stop))
            for x_T, stop in ((latent, 0.0), (latent, 0.4), (noise(2, *model.image_shape)[:B], 0.0))
        ]
        return [latent, *ends]

    for B in (2, 1):
        for found, expected in zip(run(plan, B), run(host, B), strict=True):
            assert found.dtype == torch.float32 and found.is_contiguous() and relative(found, expected) < 1e-4
    assert plan.evaluations == host.evaluations and ticks.count(plan) == ticks.count(host)
    states = {"dpm++2m": 2, "dpm++3m": 3, "unipc2": 4, "unipc3": 5, "belm": 2, "ddim": 1}[recipe.solver]
    expected = {
        "ddim": [(2, 21), (1, 20), (1, 20)], "belm": [(2, 19), (2, 19), (2, 19), (2, 20)],
    }.get(recipe.solver, [(1, 20), (states, 20), (states, 20)])  # fmt: skip
    assert sorted(whole(plan)) == sorted(expected)


def test_linear_methods_of_mixtures_priors_and_kept_work(both):
    model, host, _ = both
    options, schedule = dataclasses.replace(ON_DEVICE, fused_solvers=True), build_schedule(model.config.schedule)
    decode, down = Recipe(steps=20, solver="unipc3").method.decode, schedule.decoding(20)
    x_T, z = noise(2, *model.image_shape), noise(3, 2, model.config.latent_dim, seed=2)
    weights = torch.tensor([[0.2, 0.5], [0.3, 0.5], [0.5, 0.0]])
    plan, prior = FusedPlan(model, CPU, torch.float32, options), tiny_prior()
    alone = [FusedPlan(prior, CPU, torch.float32, options) for options in (options, ON_DEVICE)]
    keeping = [p.reusing(Reuse.parse("gradient:2")) for p in (plan, host)]
    for found, expected in (
        (plan.field(z, weights), host.field(z, weights)), [p.field() for p in alone],
        [p.field(z[0]) for p in keeping],
    ):  # fmt: skip
        assert relative(decode(found, x_T, down), decode(expected, x_T, down)) < 1e-4
        assert whole(found.plan) == [(5, 20)] and (5, 20) not in whole(expected.plan)
    # A clamp that the fused update does not know goes step by step.
    assert relative(*(decode(p.field(z[0]), x_T, down, clamp=0.5) for p in (plan, host))) < 1e-4
    assert len(whole(plan)) == 1
    # Other weights along the same steps are another trajectory.
    other = Recipe(solver="dpm++2m").method.decode
    assert relative(*(other(p.field(z, weights), x_T, down) for p in (plan, host))) < 1e-4
    assert sorted(whole(plan)) == [(2, 20), (5, 20)]


def with_graphs(monkeypatch, capture, **changes):
    """A plan on the CPU that believes it can capture."""
    plan = FusedPlan(tiny_pdae(), CPU, torch.float32, dataclasses.replace(ON_DEVICE, **changes))
    plan.options = dataclasses.replace(plan.options, graphs=True)
    plan.graph_pool = object()
    monkeypatch.setattr(graphs, "capture", capture)
    return plan, build_schedule(plan.model.config.schedule)


def test_one_graph_for_steps_with_and_one_without_gradient(monkeypatch, both):
    captured = []
    plan, schedule = with_graphs(monkeypatch, capture_into(captured))
    z, x_T = noise(2, plan.model.config.latent_dim, seed=1), noise(2, *plan.model.image_shape)
    expected = ddim.ddim(both[2].field(z), x_T, schedule, 6, stop_percent=0.5)
    for B in (2, 2, 1):
        found = ddim.ddim(plan.field(z[:B]), x_T[:B], schedule, 6, stop_percent=0.5)
        assert relative(found, expected[:B]) < 1e-4
    assert captured == [plan.graph_pool] * 2
    assert plan.evaluations == {"trunk": 30, "eps": 30, "gradient": 15}  # warming up does not count


@pytest.mark.parametrize("solver", ["dpm++3m", "unipc2", "belm"])
def test_the_graphs_of_a_linear_method(monkeypatch, both, solver):
    captured = []
    plan, schedule = with_graphs(monkeypatch, capture_into(captured), fused_solvers=True)
    z, x_T = noise(2, plan.model.config.latent_dim, seed=1), noise(2, *plan.model.image_shape)
    decode, down = Recipe(solver=solver).method.decode, schedule.decoding(6, 0.5)
    expected = decode(both[1].field(z), x_T, down)
    for B in (2, 2, 1):  # what warming up left in the states is of no account
        assert relative(decode(plan.field(z[:B]), x_T[:B], down), expected[:B]) < 1e-4
    assert captured == [plan.graph_pool] * 2
    assert plan.evaluations == {"trunk": 30, "eps": 30, "gradient": 15}


def test_a_capture_that_fails_is_reported_and_survived(monkeypatch, both):
    attempts = []

    def capture(step, reset, device, pool):
        attempts.append(1)
        raise graphs.CaptureError("operation not permitted when stream is capturing")

    plan, schedule = with_graphs(monkeypatch, capture)
    z, x_T = noise(1, plan.model.config.latent_dim, seed=1), noise(1, *plan.model.image_shape)
    with pytest.warns(UserWarning, match="CUDA graphs are off: capture failed .operation not permitted"):
        found = ddim.ddim(plan.field(z), x_T, schedule, 4, stop_percent=0.5)
    assert relative(found, ddim.ddim(both[2].field(z), x_T, schedule, 4, stop_percent=0.5)) < 1e-4
    ddim.ddim(plan.field(z), x_T, schedule, 3)
    assert len(attempts) == 1 and "operation not permitted" in plan.capture_failure
