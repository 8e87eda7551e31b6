"""The reversible decoder: exact round trips, what a latent is, and what is refused."""

import copy

import pytest
import torch

from golden_rule import relative
from helpers import images, tiny_pdae, tiny_prior
from pdae_fast import PDAE, Pipeline, ScheduleConfig, UserError, metrics
from pdae_fast.data import open_dataset
from pdae_fast.data.bundled import SAMPLES
from pdae_fast.samplers.belm import _coefficients, belm, belm_invert
from pdae_fast.samplers.ddim import estimate_noise, integrate
from pdae_fast.samplers.inversion import invert_implicit
from pdae_fast.samplers.noise import ImageNoise
from pdae_fast.schedule import build_schedule

SCHEDULE = build_schedule(ScheduleConfig())


@pytest.fixture(scope="module")
def model():
    return tiny_pdae()


def network_field(model, z):
    """G is not zero, and most of x0_hat lies beyond the clamp: random weights."""

    def field(x, t, use_gradient):
        with torch.no_grad():
            eps, gradient = model(x, torch.full((len(x),), t), z)
        return eps, gradient if use_gradient else None

    return field


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "karras"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-3)], ids=["float64", "float32"]
)
def test_round_trip_on_random_networks(model, dtype, bound, spacing):
    x0 = images(2).to(dtype)
    own = copy.deepcopy(model).to(dtype)
    field = network_field(own, own.encode(x0).detach())
    decoding = SCHEDULE.decoding(10, spacing=spacing)
    latent = belm_invert(field, x0, decoding)
    assert latent.x_T.dtype == latent.companion.dtype == dtype
    assert relative(belm(field, latent.x_T, decoding, latent.companion), x0) < bound
    # DDIM, which is not reversible, misses by orders more with the same field.
    x_T = integrate(field, x0, SCHEDULE.inversion(10, spacing))
    assert relative(integrate(field, x_T, decoding), x0) > 0.05


def test_going_up_after_going_down(model):
    field = network_field(copy.deepcopy(model).double(), torch.zeros(1, 16, dtype=torch.float64))
    decoding, x_T = SCHEDULE.decoding(6), ImageNoise(0, [0], (1, 32, 32))().double()
    states = [x_T]

    def noting(x, t, use_gradient):
        states.append(x)
        return field(x, t, use_gradient)

    low = belm(noting, x_T, decoding)
    # x_T, x_T again (it starts the companion), then every state down to the one above the last.
    below, x = low, states[-1]
    for high, before, step in zip(states[-2:0:-1], decoding[-2::-1], decoding[:0:-1], strict=True):
        a, b, c = _coefficients(step.alpha_bar_next, step.alpha_bar, before.alpha_bar)
        below, x = x, (below - b * x + c * estimate_noise(field, x, step)) / a
        assert relative(x, high) < 1e-9


def test_the_step_is_exact_on_straight_and_bent_paths():
    # In xbar = x / sqrt(alpha_bar) against s = sqrt(1 / alpha_bar - 1), whose slope is u: exact for parabolas.
    bars = (0.9, 0.5, 0.1)
    s = [(1 / a - 1) ** 0.5 for a in bars]

    def path(v):
        return 0.3 - 1.1 * v + 0.7 * v * v

    low, middle, high = (a**0.5 * path(v) for a, v in zip(bars, s, strict=True))
    a, b, c = _coefficients(*bars)
    assert a * high + b * middle - c * (-1.1 + 1.4 * s[1]) == pytest.approx(low, rel=1e-12)


def test_the_first_state_is_one_ddim_step_away():
    def field(x, t, use_gradient):
        return x.tanh(), None

    decoding = SCHEDULE.decoding(4)
    x_T = ImageNoise(0, range(2), (1, 4, 4))()
    companion = integrate(field, x_T, decoding[:1])
    torch.testing.assert_close(belm(field, x_T, decoding), belm(field, x_T, decoding, companion))
    x0 = x_T.clamp(-1, 1)
    latent = belm_invert(field, x0, decoding[-2:])
    # Going up it is the one from which a DDIM step leads to the image.
    expected = invert_implicit(field, x0, decoding[-1:], iterations=2).x_T
    torch.testing.assert_close(latent.companion, expected)


def test_a_pipeline_stacks_the_two_states(model):
    ticks, x0 = [], images(3)
    pipe = Pipeline(model, steps=6, device="cpu", dtype="float32", batch_size=2, solver="belm", progress=ticks.append)
    z = pipe.encode(x0)
    latent = pipe.invert(x0, z)
    assert latent.shape == (3, 2, 1, 32, 32) and pipe.evaluations["trunk"] == 3 * 8
    assert relative(pipe.decode(z, latent), x0) < 1e-3
    assert relative(pipe.reconstruct(x0), x0) < 1e-3
    assert sum(ticks) == pipe.evaluations["trunk"] == 3 * (8 + 5 + 13)
    # x_T alone decodes too, to something else, and random x_T is drawn as for every solver.
    assert relative(pipe.decode(z, latent[:, 0]), x0) > 0.01
    torch.testing.assert_close(
        pipe.decode(z, seed=4), pipe.decode(z, ImageNoise(4, range(3), (1, 32, 32))()), rtol=1e-3, atol=1e-3
    )
    assert pipe.invert(images(0), z[:0]).shape == (0, 2, 1, 32, 32)
    assert pipe.decode(z[:0], latent[:0]).shape == (0, 1, 32, 32)


def test_edits_take_pairs(model):
    pipe = Pipeline(model, steps=5, device="cpu", dtype="float32", solver="belm", spacing="quadratic")
    x0 = images(2)
    for kind in ("latent", "trajectory"):
        ends = pipe.interpolate(x0[0], x0[1], [0.0, 1.0], kind)
        assert relative(ends, x0) < 1e-2
    alone = Pipeline(tiny_prior(), steps=5, device="cpu", dtype="float32", solver="belm")
    assert relative(alone.decode(None, alone.invert(x0)), x0) < 1e-2


def test_latents_of_the_wrong_form(model):
    pipe = Pipeline(model, steps=4, device="cpu", dtype="float32", solver="belm")
    z = torch.zeros(1, 16)
    for call, words in (
        (lambda: pipe.decode(z, torch.zeros(1, 3, 1, 32, 32)), r"x_T has shape .1, 3, 1, 32, 32.; .* expects"),
        (lambda: pipe.decode(z, torch.zeros(1, 2, 1, 16, 16)), r"expects .B, 1, 32, 32"),
        (lambda: pipe.decode(z, torch.full((1, 2, 1, 32, 32), float("nan"))), "NaN"),
        (
            lambda: pipe.with_recipe(solver="ddim").decode(z, torch.zeros(1, 2, 1, 32, 32)),
            r"only the solver belm .* x_T.:, 0.",
        ),
        (lambda: pipe.decode_mixture(z[None], torch.ones(1, 1), torch.zeros(1, 2, 1, 32, 16)), r"expects .B, 1, 32"),
        (lambda: pipe.with_recipe(steps=1), "belm needs at least 2 steps"),
        (lambda: pipe.with_recipe(encode_steps=5), "belm .* the 4 steps that decode"),
        (lambda: Pipeline(model, steps=1, solver="belm"), "belm needs at least 2 steps, not 1"),
        (lambda: belm_invert(None, images(1), SCHEDULE.decoding(4, 0.5)), "in all of its steps or in none"),
        (lambda: belm_invert(None, images(1), SCHEDULE.decoding(1)), "at least 2 steps"),
    ):
        with pytest.raises(UserError, match=words) as failure:
            call()
        assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_the_bundled_model_comes_back_to_rounding():
    dataset = open_dataset([SAMPLES], 32, 1)
    x0 = torch.stack([dataset[i].image for i in range(4)])
    pipe = Pipeline(PDAE.from_pretrained("fashion32"), steps=20, device="cpu", dtype="float32", solver="belm")
    assert float(metrics.mse(x0, pipe.reconstruct(x0)).max()) < 1e-8
    assert pipe.evaluations["trunk"] == 4 * 41
