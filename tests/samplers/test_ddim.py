"""Samplers against closed forms and float64 formulas."""

import numpy as np
import pytest
import torch

from pdae_fast import ScheduleConfig, UserError
from pdae_fast.samplers.ddim import ddim, ddim_invert, ddim_step, ddpm, integrate
from pdae_fast.samplers.noise import ImageNoise, lerp, random_noise, slerp
from pdae_fast.schedule import build_schedule

SCHEDULE = build_schedule(ScheduleConfig())
ALL_STEPS = SCHEDULE.ancestral(1000)


def gaussian_field(scale: float):
    """The exact field of data distributed as N(0, scale^2): eps = x sqrt(1 - a) / (a scale^2 + 1 - a)."""

    def field(x, t, use_gradient):
        a = SCHEDULE.alpha_bar[t]
        return x * float((1 - a) ** 0.5 / (a * scale**2 + 1 - a)), None

    return field


def transport(scale: float, t: int) -> float:
    """Standard deviation of x_t; the probability-flow ODE maps x_t to x_s by the ratio of the two."""
    a = SCHEDULE.alpha_bar[t]
    return float((a * scale**2 + 1 - a) ** 0.5)


def test_ddim_follows_the_probability_flow_of_a_gaussian():
    scale, x_T = 0.3, torch.tensor([[-1.5], [0.2], [2.0]])
    exact = x_T * transport(scale, 0) / transport(scale, 999)
    errors = []
    for steps in (50, 100, 200):
        x = ddim(gaussian_field(scale), x_T, SCHEDULE, steps, clamp=None)
        errors.append(float(((x - exact) / exact).abs().max()))
    assert errors[2] < 0.025
    # A first-order method: the error halves with the step.
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4


def test_inversion_follows_the_same_flow_upward():
    scale, x0 = 0.3, torch.tensor([[-0.4], [0.1], [0.6]])
    exact = x0 * transport(scale, 999) / transport(scale, 0)
    x_T = ddim_invert(gaussian_field(scale), x0, SCHEDULE, 500, clamp=None)
    assert float(((x_T - exact) / exact).abs().max()) < 0.01
    back = ddim(gaussian_field(scale), x_T, SCHEDULE, 500, clamp=None)
    assert float(((back - x0) / x0).abs().max()) < 0.02


def ddim_step_float64(x, eps, gradient, a, a_next, clamp):
    x, eps = x.double().numpy(), eps.double().numpy()
    if gradient is not None:
        eps = eps - np.sqrt(1 - a) * gradient.double().numpy()
    x0 = x / np.sqrt(a) - np.sqrt(1 / a - 1) * eps
    if clamp is not None:
        x0 = np.clip(x0, -clamp, clamp)
    eps = (x / np.sqrt(a) - x0) / np.sqrt(1 / a - 1)
    return np.sqrt(a_next) * x0 + np.sqrt(1 - a_next) * eps


@pytest.mark.parametrize("clamp", [1.0, None])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize(("now", "following"), [(0, 9), (999, 989), (500, 500), (9, 0)])
def test_step_against_float64(now, following, with_gradient, clamp):
    g = torch.Generator().manual_seed(now)
    x, eps, gradient = (torch.randn(2, 1, 5, 5, generator=g) for _ in range(3))
    gradient = gradient if with_gradient else None
    a, a_next = (float(SCHEDULE.alpha_bar[t]) for t in (now, following))
    found = ddim_step(x, eps, gradient, a, a_next, clamp).numpy()
    # sqrt(1/a - 1) is 0.01 at t = 0, so the division there amplifies float32 rounding a hundredfold.
    np.testing.assert_allclose(found, ddim_step_float64(x, eps, gradient, a, a_next, clamp), atol=3e-5)


def test_ddpm_mean_is_the_posterior_mean_shifted_by_sigma_squared_G():
    g = torch.Generator().manual_seed(0)
    x, eps, gradient = (torch.randn(3, 4, generator=g) for _ in range(3))
    calls = []

    def field(x_t, t, use_gradient):
        calls.append((t, x_t))
        return eps, gradient

    ddpm(field, x, ALL_STEPS, noise=lambda: torch.zeros(3, 4))
    assert [t for t, _ in calls] == list(range(999, -1, -1))
    for (t, x_t), (_, following) in zip(calls[:-1], calls[1:], strict=True):
        if t not in (999, 500, 37, 1):
            continue
        a = SCHEDULE.alpha_bar[t]
        x0 = x_t.double() / a**0.5 - (1 / a - 1) ** 0.5 * eps.double()
        mean = SCHEDULE.posterior_mean_x0[t] * x0 + SCHEDULE.posterior_mean_xt[t] * x_t.double()
        expected = mean + SCHEDULE.posterior_variance[t] * gradient.double()
        np.testing.assert_allclose(following.numpy(), expected.numpy(), rtol=2e-5, atol=2e-5)


def test_ddpm_noise_has_the_posterior_deviation():
    x_t = []

    def field(x, t, use_gradient):
        x_t.append(x)
        return torch.zeros_like(x), None

    draws = []

    def noise():
        draws.append(torch.randn(2, 3, generator=torch.Generator().manual_seed(len(draws))))
        return draws[-1]

    ddpm(field, torch.zeros(2, 3), ALL_STEPS, noise)
    assert len(draws) == 999  # none at t = 0
    t = 999
    sigma = SCHEDULE.posterior_variance[t] ** 0.5
    np.testing.assert_allclose(x_t[1].numpy(), sigma * draws[0].numpy(), rtol=1e-5)


def test_ddpm_reaches_the_data_distribution():
    scale = 0.5
    noise = ImageNoise(1, range(64), (64,))
    x = ddpm(gaussian_field(scale), noise(), ALL_STEPS, noise)
    assert float(x.std()) == pytest.approx(scale, rel=0.03)


@pytest.mark.parametrize(("stop_percent", "used"), [(0.0, 10), (0.3, 7), (1.0, 0)])
def test_stop_percent_leaves_G_out_of_the_last_steps(stop_percent, used):
    flags = []

    def field(x, t, use_gradient):
        flags.append(use_gradient)
        return torch.zeros_like(x), None

    ddim(field, torch.zeros(1, 2), SCHEDULE, 10, stop_percent=stop_percent)
    assert flags == [True] * used + [False] * (10 - used)


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_wrong_stop_percent(bad):
    with pytest.raises(UserError, match="stop_percent"):
        ddim(gaussian_field(1.0), torch.zeros(1, 1), SCHEDULE, 10, stop_percent=bad)


@pytest.mark.parametrize("steps", [0, 1001, -5])
def test_wrong_steps(steps):
    with pytest.raises(UserError, match="between 1 and 1000"):
        SCHEDULE.timesteps(steps)


def test_slerp_keeps_the_norm_and_the_angle():
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    w = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x = slerp(a, b, w)
    angle = w.double() * torch.pi / 2
    expected = torch.stack([angle.cos(), angle.sin(), torch.zeros(4)], dim=1).float()
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(a, a, w), a.expand(4, 3))
    torch.testing.assert_close(lerp(a, b, w)[1], torch.tensor([0.75, 0.25, 0]))


def test_image_noise_does_not_depend_on_the_batch():
    whole = ImageNoise(7, range(5), (2, 3))
    parts = [ImageNoise(7, indices, (2, 3)) for indices in ([0, 1], [2], [3, 4])]
    for _ in range(2):
        torch.testing.assert_close(whole(), torch.cat([part() for part in parts]), rtol=0, atol=0)
    assert not torch.equal(ImageNoise(8, [0], (9,))(), ImageNoise(7, [0], (9,))())
    assert not torch.equal(ImageNoise(7, [1], (9,))(), ImageNoise(7, [0], (9,))())


def test_random_noise():
    """Standardised: moments by numpy in float64, and nothing but a shift and a scale of each channel."""
    draws = ImageNoise(3, range(4), (3, 8, 8))()
    assert random_noise("normal", draws) is draws
    found = random_noise("standardised", draws)
    values, before = found.double().numpy(), draws.double().numpy()
    np.testing.assert_allclose(values.mean((2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(values.std((2, 3)), 1, rtol=1e-6)
    for image, raw in zip(values.reshape(12, 64), before.reshape(12, 64), strict=True):
        assert np.corrcoef(image, raw)[0, 1] == pytest.approx(1, abs=1e-12)
    assert torch.isfinite(random_noise("standardised", torch.ones(1, 1, 4, 4))).all()
    with pytest.raises(UserError, match="'pink' is not known; expected normal or standardised"):
        random_noise("pink", draws)


def draws(*shape, count=1000, seed=7):
    """The same normal draws at every call of the function that comes back: a sampler's ``noise``."""
    values = iter(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))
    return lambda: next(values)


@pytest.mark.parametrize("clamp", [None, 1.0])
def test_eta_1_with_all_steps_is_algorithm_2(clamp):
    """Both are q(x_{t-1} | x_t, x0_hat) where nothing is clamped and G, whose coefficients differ, is left out."""
    field, x_T = gaussian_field(0.5), torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).double()
    states = []

    def recording(x, t, use_gradient):
        states.append(x)
        return field(x, t, use_gradient)

    ddpm(recording, x_T, ALL_STEPS, draws(4, 8))
    x = integrate(field, x_T, SCHEDULE.decoding(1000), eta=1.0, noise=draws(4, 8), clamp=clamp)
    # Algorithm 2 takes one step more, from t = 0 to the clean image.
    if clamp is None:
        np.testing.assert_allclose(x.numpy(), states[-1].numpy(), rtol=1e-9, atol=1e-9)
    else:
        assert float((x - states[-1]).abs().max()) > 1e-3  # the test can tell two samplers apart


def test_eta_0_draws_nothing():
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))

    def refuse():
        raise AssertionError("drawn")

    plain, asked = (
        integrate(gaussian_field(0.5), x_T, SCHEDULE.decoding(20), eta=0.0, noise=n) for n in (None, refuse)
    )
    assert torch.equal(plain, asked)


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("sampler", ["ddpm", "eta 0.5", "eta 1"])
def test_moments_on_gaussian_data(sampler, steps):
    """With the exact score the steps that draw noise keep the moments of the process, respaced or not: variance against
    the recursion of the respaced process in float64."""
    scale, noise = 0.5, ImageNoise(3, range(256), (64,))
    eta = {"ddpm": 1.0, "eta 0.5": 0.5, "eta 1": 1.0}[sampler]
    trajectory = SCHEDULE.ancestral(steps) if sampler == "ddpm" else SCHEDULE.decoding(steps)
    x_T = noise()
    if sampler == "ddpm":
        x = ddpm(gaussian_field(scale), x_T, trajectory, noise)
    else:
        x = integrate(gaussian_field(scale), x_T, trajectory, eta=eta, noise=noise, clamp=None)
    variance = 1.0
    for step in trajectory:
        a, b = step.alpha_bar, step.alpha_bar_next
        share = a**0.5 * scale**2 / (a * scale**2 + 1 - a)  # x0_hat = share x
        drawn = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        keep = (1 - b - drawn) ** 0.5 * (1 - a**0.5 * share) / (1 - a) ** 0.5
        variance = (b**0.5 * share + keep) ** 2 * variance + drawn
    assert float(x.std()) == pytest.approx(variance**0.5, rel=0.03)
    assert float(x.mean()) == pytest.approx(0.0, abs=0.02)
    assert variance**0.5 == pytest.approx(scale, rel=0.35 if steps == 20 else 0.08)  # of few steps
