"""The training bench: its opponent is Algorithm 1, and a side that computes something else gets no speed."""

import pytest
import torch

from bench import training
from bench.contenders import WrongNumbers
from bench.training_baseline import PublishedTraining
from helpers import images
from pdae_fast.schedule import build_schedule
from pdae_fast.training import tasks
from pdae_fast.training.feed import step_generator

CPU = torch.device("cpu")


def test_the_opponents_first_loss_is_algorithm_1():
    """lambda_t (eps - eps_hat - c_t G)^2 written out with the schedule's own constants, in float64; a G that is not
    zero."""
    model = training.build("tiny")
    opponent = PublishedTraining(model, CPU, seed=4)
    x0 = images(8)
    loss = opponent.step(iter([x0]))
    generator = step_generator(4, 0)
    t = torch.randint(0, 1000, (8,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator).double()
    mirrored = torch.rand(8, generator=generator) < 0.5
    assert mirrored.any() and not mirrored.all()
    x0[mirrored] = x0[mirrored].flip(-1)
    schedule = build_schedule(model.config.schedule)
    a, c, weight = (
        torch.from_numpy(v[t.numpy()])[:, None, None, None]
        for v in (schedule.alpha_bar, schedule.shift_coef, schedule.loss_weight)
    )
    whole = training.PDAE.from_state(model.config, model.state_dict(), "tiny").double()
    with torch.no_grad():
        eps, gradient = whole(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, whole.encode(x0.double()))
    assert float(gradient.abs().mean()) > 0.01
    assert loss == pytest.approx(float((weight * (noise - eps - c * gradient) ** 2).mean()), rel=1e-5)


def test_sides_agree_are_timed_and_leave_nothing_behind():
    names = ["float32", "bfloat16 fast channels-last"]
    rows = training.measure("tiny", 2, CPU, names, rounds=3, compared=3)
    assert [row["contender"] for row in rows] == ["baseline", *names]
    assert rows[0]["error_losses"] == 0 and rows[1]["error_losses"] < 1e-5 < rows[2]["error_losses"] < 0.01
    assert all(row["rounds"] == 3 and row["ratio"] > 0 and row["images_per_s"] > 0 for row in rows)


def test_a_side_with_other_losses_gets_no_speed(monkeypatch):
    loss = tasks.pdae_loss
    monkeypatch.setattr(tasks, "pdae_loss", lambda *a: 1.02 * loss(*a))
    with pytest.raises(WrongNumbers, match="float32: a loss of the first 2 steps is 2.0% from .*no speed"):
        training.measure("tiny", 2, CPU, ["float32"], rounds=3, compared=2)
    failures = {}
    rows = training.measure("tiny", 2, CPU, ["bfloat16"], rounds=3, compared=2, failures=failures)
    assert [row["contender"] for row in rows] == ["baseline"] and set(failures) == {"bfloat16"}
    assert not training.apart([float("nan")], [1.0]) <= 1e9
