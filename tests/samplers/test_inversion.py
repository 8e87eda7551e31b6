"""Accurate inversion against closed forms, against its own residual, and on networks."""

import numpy as np
import pytest
import torch

from helpers import images, tiny_pdae
from pdae_fast import PDAE, Pipeline, UserError, metrics
from pdae_fast.config import ScheduleConfig
from pdae_fast.data import open_dataset
from pdae_fast.data.bundled import SAMPLES
from pdae_fast.samplers.ddim import ddim_invert, integrate
from pdae_fast.samplers.inversion import _FixedPoint, invert_implicit, invert_once
from pdae_fast.schedule import build_schedule

SCHEDULE = build_schedule(ScheduleConfig())


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def gaussian_field(std):
    """Exact eps_hat for data N(0, std^2)."""

    def field(x, t, use_gradient):
        a = float(SCHEDULE.alpha_bar[t])
        return (1 - a) ** 0.5 * x / (a * std**2 + 1 - a), None

    return field


def gaussian_inverse(x0, std, trajectory):
    """x_T of a decoder whose every step multiplies x by a known number (no clamp)."""
    factor = 1.0
    for step in trajectory:
        a, b = step.alpha_bar, step.alpha_bar_next
        eps = (1 - a) ** 0.5 / (a * std**2 + 1 - a)
        factor *= b**0.5 * (1 - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    return x0 / factor


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_it_converges_to_the_inverse_of_the_decoder(spacing):
    x0, trajectory = noise(3, 1, 4, 4), SCHEDULE.decoding(20, spacing=spacing)
    expected = gaussian_inverse(x0.double(), 0.5, trajectory)
    errors = []
    for iterations in (1, 2, 4, 8):
        found = invert_implicit(gaussian_field(0.5), x0, trajectory, iterations=iterations, clamp=None)
        errors.append(float((found.x_T - expected).norm() / expected.norm()))
        assert found.evaluations <= 1 + iterations * len(trajectory)  # fewer once a residual is exactly zero
    assert errors[0] > 10 * errors[1] and max(errors[2:]) < 1e-5
    explicit = ddim_invert(gaussian_field(0.5), x0, SCHEDULE, 20, clamp=None)
    if spacing == "uniform":
        assert float((explicit - expected).norm() / expected.norm()) > 10 * errors[1]


def test_the_first_iterate_is_the_published_step():
    # One evaluation a step, and none of it at the top: the explicit inversion, one step behind.
    trajectory = SCHEDULE.decoding(1)
    seen = []

    def field(x, t, use_gradient):
        seen.append((t, x.clone()))
        return gaussian_field(0.5)(x, t, use_gradient)

    x0 = noise(1, 1, 2, 2)
    invert_implicit(field, x0, trajectory, iterations=1, clamp=None)
    assert [t for t, _ in seen] == [0, 999]
    expected = ddim_invert(gaussian_field(0.5), x0, SCHEDULE, 1, clamp=None)
    torch.testing.assert_close(seen[1][1], expected, rtol=1e-3, atol=1e-4)


def test_the_residual_is_what_one_decoding_step_misses():
    trajectory = SCHEDULE.decoding(5)
    points = []

    def field(x, t, use_gradient):
        points.append((t, x.clone()))
        return gaussian_field(0.5)(x, t, use_gradient)

    x0 = noise(2, 1, 4, 4)
    found = invert_implicit(field, x0, trajectory, iterations=1, clamp=None)

    x = x0
    for i, step in enumerate(reversed(trajectory)):
        t, candidate = points[i + 1]
        assert t == step.t
        reached = integrate(gaussian_field(0.5), candidate, (step,), clamp=None)
        missed = (reached - x).square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(found.residual[i], missed, rtol=1e-3, atol=1e-6)

        r = (step.alpha_bar / step.alpha_bar_next) ** 0.5
        gain = (1 - step.alpha_bar) ** 0.5 - r * (1 - step.alpha_bar_next) ** 0.5
        x = r * x + gain * gaussian_field(0.5)(candidate, step.t, True)[0]


def test_clamped_regions_come_back():
    # Most of the image sits on the clamp, as the background of product photographs does.
    x0 = torch.where(noise(2, 1, 8, 8) > 1, torch.zeros(()), -torch.ones(()))

    def field(x, t, use_gradient):
        a = float(SCHEDULE.alpha_bar[t])
        return (x - a**0.5 * torch.tanh(3 * x)) / (1 - a) ** 0.5, None

    trajectory = SCHEDULE.decoding(20)
    found = invert_implicit(field, x0, trajectory, iterations=6)
    explicit = ddim_invert(field, x0, SCHEDULE, 20)
    errors = [float((integrate(field, x, trajectory) - x0).norm()) for x in (found.x_T, explicit)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "strided"])
@pytest.mark.parametrize("clamp", [1.0, None])
def test_one_evaluation_a_step_is_a_linear_method(spacing, clamp):
    calls, x0 = [], noise(2, 1, 8, 8).double().clamp(-1, 1)

    def field(x, t, use_gradient):
        calls.append((t, use_gradient))
        return x.tanh() - (1.3 * x).sin(), x.cos() if use_gradient else None

    trajectory, ticks = SCHEDULE.decoding(20, 0.4, spacing), []
    found = invert_once(field, x0, trajectory, clamp=clamp, progress=lambda: ticks.append(1))
    evaluated, calls[:] = list(calls), []
    torch.testing.assert_close(found, invert_implicit(field, x0, trajectory, iterations=1, clamp=clamp).x_T)
    assert evaluated == calls and len(ticks) == len(calls) == 21


def test_an_image_that_diverges_keeps_its_best_point_and_disturbs_no_other():
    def field(x, t, use_gradient):
        a = float(SCHEDULE.alpha_bar[t])
        wild = (40 * x).sin() * 30 / (1 - a) ** 0.5
        tame = gaussian_field(0.5)(x, t, use_gradient)[0]
        return torch.cat([wild[:1], tame[1:]]), None

    x0, trajectory = noise(2, 1, 4, 4), SCHEDULE.decoding(10)
    both = invert_implicit(field, x0, trajectory, iterations=4)
    assert bool(torch.isfinite(both.x_T).all()) and bool(torch.isfinite(both.residual).all())
    alone = invert_implicit(gaussian_field(0.5), x0[1:], trajectory, iterations=4)
    torch.testing.assert_close(both.x_T[1:], alone.x_T)
    torch.testing.assert_close(both.residual[:, 1:], alone.residual)
    fewer = invert_implicit(field, x0, trajectory, iterations=1)
    assert bool((both.residual[0] <= fewer.residual[0] * 1.0001).all())  # never worse than the published step


def test_a_growing_residual_goes_back_to_the_best_point_evaluated():
    solver = _FixedPoint(torch.zeros(2, 1, 1, 1))
    solver.add(torch.ones(2, 1, 1, 1))
    second = solver.u.clone()
    solver.add(second + torch.tensor([0.1, 7.0])[:, None, None, None])
    last = solver.u.clone()
    assert bool((last[1] != 0).all())
    # The first image's residual shrank: on to where it points. The second's grew: back to the guess.
    assert torch.equal(solver.result(), torch.stack([last[0], torch.zeros(1, 1, 1)]))
    torch.testing.assert_close(solver.residual, torch.tensor([0.1, 1.0]))


def test_a_tolerance_saves_evaluations():
    x0, trajectory = noise(2, 1, 4, 4), SCHEDULE.decoding(50)
    full = invert_implicit(gaussian_field(0.5), x0, trajectory, iterations=8, clamp=None)
    short = invert_implicit(gaussian_field(0.5), x0, trajectory, iterations=8, tolerance=1e-5, clamp=None)
    assert short.evaluations < full.evaluations and float(short.residual.max()) <= 1e-5


def test_random_networks_through_the_pipeline():
    model, x0 = tiny_pdae(), images(3)
    ticks = []
    shared = {"steps": 20, "iterations": 3, "device": "cpu", "dtype": "float32"}
    pipe = Pipeline(model, **shared, progress=ticks.append, batch_size=2)
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    assert sum(ticks) == 3 * 61 and pipe.evaluations["trunk"] == 3 * 61
    # The same numbers, whatever the batch.
    whole = Pipeline(model, **shared, batch_size=3)
    torch.testing.assert_close(whole.invert(x0, z), x_T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x: Pipeline(p.model, iterations=-1), "iterations must not be negative, not -1"),
        (lambda p, x: p.with_recipe(encode_steps=5), "leave out --encode-steps"),
        (
            lambda p, x: Pipeline(p.model, spacing="cubic"),
            "'cubic' is not known; expected uniform, quadratic, logsnr, karras, strided or respaced",
        ),
    ],
)
def test_mistakes(call, words):
    pipe = Pipeline(tiny_pdae(), steps=2, device="cpu", dtype="float32", iterations=1)
    with pytest.raises(UserError, match=words):
        call(pipe, images(1))


def test_quadratic_spacing():
    assert SCHEDULE.timesteps(3, "quadratic").tolist() == [0, 111, 444, 999]
    assert SCHEDULE.timesteps(1, "quadratic").tolist() == [0, 999]
    points = SCHEDULE.timesteps(500, "quadratic")
    assert points[0] == 0 and points[-1] == 999 and bool((np.diff(points) > 0).all()) and len(points) < 500


@pytest.mark.slow
def test_forty_evaluations_beat_two_hundred_on_the_bundled_model():
    model = PDAE.from_pretrained("fashion32")
    dataset = open_dataset([SAMPLES], 32, 1)
    x0 = torch.stack([dataset[i].image for i in range(4)])
    published = Pipeline(model, "published", device="cpu", dtype="float32")
    quick = Pipeline(model, "balanced", device="cpu", dtype="float32")
    x = quick.reconstruct(x0)
    assert quick.evaluations["trunk"] == 4 * 40
    error, reference = (float(metrics.mse(x0, y).mean()) for y in (x, published.reconstruct(x0)))
    assert error < reference / 10
