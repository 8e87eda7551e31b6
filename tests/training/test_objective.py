"""The losses of a prior that predicts eps, v or x0, and of a PDAE around each, against float64."""

import dataclasses

import pytest
import torch

from helpers import TINY, images, tiny_pdae
from pdae_fast import ScheduleConfig
from pdae_fast.config import PREDICTIONS
from pdae_fast.schedule import Tables, build_schedule
from pdae_fast.training.feed import step_generator
from pdae_fast.training.objective import pdae_loss, simple_loss
from pdae_fast.training.step import FrozenHalf
from pdae_fast.training.tasks import TASKS

TIMES = torch.tensor([30, 400, 900])
ZERO = ScheduleConfig(zero_terminal_snr=True)


def model_of(prediction, schedule=TINY.schedule):
    return tiny_pdae(dataclasses.replace(TINY, prediction=prediction, schedule=schedule)).eval()


def truth(model, x0, noise, t=TIMES):
    """x_t, alpha_bar, and eps_hat and G of ``model``, float64."""
    a = torch.tensor(build_schedule(model.config.schedule).alpha_bar[t])[:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    eps, gradient = model.double()(x_t, t, model.encode(x0.double()))
    model.float()
    return x_t, a, eps, gradient


@pytest.mark.parametrize("velocity", [0.0, 0.3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_a_prior_keeps_the_loss_of_what_it_predicts(prediction, velocity):
    """The error of v is that of eps / sqrt(alpha_bar), that of x0 sqrt(1 - alpha_bar) times as much; whatever is
    predicted, the velocity adds the first, at most a hundred times the error of what is predicted."""
    model, x0, noise = model_of(prediction), images(3), images(3, seed=1)
    _, a, eps, _ = truth(model, x0, noise)
    v = (eps - noise) ** 2 / a
    own = {"epsilon": v * a, "v_prediction": v, "sample": v * (1 - a)}[prediction]
    expected = (own + velocity * torch.minimum(v, 100 * own)).mean()
    schedule = build_schedule(TINY.schedule)
    found = simple_loss(model.prior(), schedule, x0, TIMES, noise, velocity)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(simple_loss(model.prior(), Tables(schedule), x0, TIMES, noise, velocity), found)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_the_loss_of_a_pdae_is_that_of_eps(prediction):
    model, x0, noise = model_of(prediction), images(3), images(3, seed=1)
    schedule = build_schedule(TINY.schedule)
    _, _, eps, gradient = truth(model, x0, noise)
    c, weight = (torch.tensor(v[TIMES])[:, None, None, None] for v in (schedule.shift_coef, schedule.loss_weight))
    expected = float((weight * (noise - (eps + c * gradient)) ** 2).mean())
    assert float(pdae_loss(model, schedule, x0, TIMES, noise)) == pytest.approx(expected, rel=1e-4)
    tables, half = Tables(schedule, prediction), FrozenHalf(model.decoder)
    assert float(pdae_loss(model, tables, x0, TIMES, noise, half)) == pytest.approx(expected, rel=0.03)


@torch.no_grad()
def test_a_terminal_snr_of_zero():
    """At the last t the prior is shown noise alone and asked for -x0 (v) or x0; there is nothing to ask G for."""
    x0, noise, last = images(2), images(2, seed=1), torch.tensor([999, 999])
    for prediction, target in (("v_prediction", -x0), ("sample", x0)):
        prior = model_of(prediction, ZERO).prior()
        out = prior.unet.decode(prior.unet.trunk(noise, last))
        found = simple_loss(prior, build_schedule(ZERO), x0, last, noise, velocity=0.1)
        assert float(found) == pytest.approx(1.1 * float((target - out).square().mean()), rel=1e-5)


def test_times_end_where_eps_tells_something():
    def largest(task):
        batch = torch.zeros(2000, 1, 1, 1)
        drawn = [task.draw(batch, step_generator(0, n), flip=False)[1] for n in range(10)]
        return int(torch.cat(drawn).max())

    model = model_of("v_prediction", ZERO)
    assert largest(TASKS["pdae"](model)) == 998 and largest(TASKS["prior"](model.prior())) == 999
    usual = model_of("v_prediction")
    assert largest(TASKS["pdae"](usual)) == 999
