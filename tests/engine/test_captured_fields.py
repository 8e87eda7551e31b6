"""Evaluations that are captured one by one, for every solver: on the CPU a graph is replayed by running the step."""

import dataclasses
import threading

import pytest
import torch

from golden_rule import relative
from helpers import ON_DEVICE, Replay, images, noise, tiny_pdae, tiny_prior
from pdae_fast import Pipeline
from pdae_fast.engine import graphs
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.plan import Plan
from pdae_fast.engine.trajectory import DeviceEvaluation
from pdae_fast.samplers.reuse import Reuse

CPU = torch.device("cpu")
TIMES = (999, 420, 9)


class Graph(Replay):
    """Replays into the memory that was captured, as a graph does: results are written over by every replay."""

    def __init__(self, step, results):
        def replay():
            kept = dict(results())
            step()
            for workload, pair in kept.items():
                for old, new in zip(pair, results()[workload], strict=True):
                    if old is not None and old is not new:
                        old.copy_(new)
            results().update(kept)

        super().__init__(replay)


def captured(monkeypatch, model, fails=False):
    """(plan that believes it can capture, what was captured)."""
    plan = FusedPlan(model, CPU, torch.float32, ON_DEVICE)
    plan.options = dataclasses.replace(plan.options, graphs=True, captured_fields=True)
    plan.graph_pool, made = object(), []

    def capture(step, reset, device, pool):
        for _ in range(graphs.WARM_UP_STEPS + 1):
            reset(), step()
        if fails:
            raise graphs.CaptureError("not here")
        made.append(step)
        owner = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "graphs"))
        return Graph(step, lambda: owner.results) if isinstance(owner, DeviceEvaluation) else Replay(step)

    monkeypatch.setattr(graphs, "capture", capture)
    return plan, made


@pytest.fixture(scope="module")
def model():
    return tiny_pdae()


def test_evaluations_are_those_of_the_modules_and_stay(monkeypatch, model):
    plan, made = captured(monkeypatch, model)
    eager, kept = Plan(model, CPU, torch.float32), []
    for seed, B in ((1, 3), (2, 3), (3, 2)):  # the last one in the buffers of the others
        z, x = noise(B, model.config.latent_dim, seed=seed), noise(B, *model.image_shape, seed=seed)
        fields = plan.field(z), eager.field(z)
        for t in TIMES:
            for use in (True, False):
                found, expected = (field(x, t, use) for field in fields)
                kept += [(found[0], found[0].clone(), expected[0])]
                kept += [(found[1], found[1].clone(), expected[1])] if use else []
                assert (found[1] is None) == (not use)
    assert len(made) == 2 and len(plan._trajectories) == 1  # with G and without
    for found, then, expected in kept:
        assert torch.equal(found, then) and found.dtype == torch.float32 and relative(found, expected) < 1e-5
    assert plan.evaluations == eager.evaluations


def test_mixtures_and_priors(monkeypatch, model):
    plan, made = captured(monkeypatch, model)
    z, x = noise(3, 2, model.config.latent_dim, seed=4), noise(2, *model.image_shape)
    weights = torch.tensor([[0.2, 0.5], [0.3, 0.5], [0.5, 0.0]])
    fields = plan.field(z, weights), Plan(model, CPU, torch.float32).field(z, weights)
    for t in TIMES:
        found, expected = (field(x, t, True) for field in fields)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    prior = tiny_prior()
    plan, more = captured(monkeypatch, prior)
    fields = plan.field(), Plan(prior, CPU, torch.float32).field()
    for t in TIMES:
        assert relative(*(field(x, t, True)[0] for field in fields)) < 1e-5
    assert len(made) == len(more) == 1


@pytest.mark.parametrize("fields", [
    {"recipe": "balanced"}, {"recipe": "exact", "steps": 6}, {"recipe": "reversible"}, {"steps": 5, "solver": "unipc3"},
    {"steps": 5, "eta": 0.5},
])  # fmt: skip
def test_every_solver_runs_on_them(monkeypatch, model, fields):
    x0 = images(2)
    plain = Pipeline(model, device="cpu", dtype="float32", plan="eager", **fields)
    pipe = Pipeline(model, device="cpu", dtype="float32", **fields)
    pipe.plan, made = captured(monkeypatch, model)
    z = plain.encode(x0)
    x_T = None if fields.get("eta") else plain.invert(x0, z)
    assert x_T is None or relative(pipe.invert(x0, z), x_T) < 1e-3
    assert relative(pipe.decode(z, x_T), plain.decode(z, x_T)) < 1e-3
    assert made and any(isinstance(lent, DeviceEvaluation) for lent in pipe.plan._trajectories.values())


def test_what_is_not_captured(monkeypatch, model):
    """A first call, approximations that keep something, and everything after a capture that failed."""
    x, z = noise(1, *model.image_shape), noise(1, model.config.latent_dim)
    plan, made = captured(monkeypatch, model)
    plan.field(z)(x, 9, True)
    keeping = plan.reusing(Reuse.parse("gradient:2")).field(z)
    for t in TIMES:
        keeping(x, t, True)
    assert not made
    plan, _ = captured(monkeypatch, model, fails=True)
    fields = plan.field(z), Plan(model, CPU, torch.float32).field(z)
    fields[0](x, 999, True)
    with pytest.warns(UserWarning, match="capture failed .not here"):
        found = fields[0](x, 9, True)
    assert relative(found[1], fields[1](x, 9, True)[1]) < 1e-5
    assert relative(*(field(x, 5, True)[0] for field in fields)) < 1e-5


def test_threads_have_evaluations_of_their_own(monkeypatch, model):
    plan, _ = captured(monkeypatch, model)
    eager, wrong = Plan(model, CPU, torch.float32), []

    def work(seed):
        z, x = noise(1, model.config.latent_dim, seed=seed), noise(1, *model.image_shape, seed=seed)
        fields = plan.field(z), eager.field(z)
        for t in (900, 500, 400, 100):
            found, expected = (field(x, t, True) for field in fields)
            wrong.extend(1 for a, b in zip(found, expected, strict=True) if not relative(a, b) < 1e-5)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
