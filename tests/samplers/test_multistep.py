"""Higher-order decoders against the exact flow of Gaussian data, and against each other where theory ties them."""

import math

import numpy as np
import pytest
import torch

from golden_rule import relative
from helpers import images, tiny_pdae, tiny_prior
from pdae_fast import Pipeline, ScheduleConfig, UserError
from pdae_fast.samplers.ddim import combine, integrate
from pdae_fast.samplers.multistep import _weights
from pdae_fast.samplers.noise import ImageNoise
from pdae_fast.samplers.solvers import SOLVERS, Multistep
from pdae_fast.schedule import SPACINGS, WHOLE, Step, build_schedule

SCHEDULE = build_schedule(ScheduleConfig())
MEAN, STD = 0.3, 0.5


class Gaussian:
    """Data N(MEAN, STD^2) on a grid of its own: ``steps`` steps, equal in half log-SNR from -4 to 2.

    The schedule's whole t are too coarse to see an order of convergence; here t is an index into the grid.
    """

    def __init__(self, steps: int) -> None:
        self.alpha_bar = 1 / (1 + np.exp(-2 * np.linspace(-4, 2, steps + 1)))
        points = [float(a) for a in self.alpha_bar]
        self.trajectory = tuple(Step(i, points[i], points[i + 1], True) for i in range(steps))

    def field(self, x, t, use_gradient):
        """eps_hat and G such that eps_hat - sqrt(1 - alpha_bar) G is the exact noise."""
        a = float(self.alpha_bar[t])
        eps = (1 - a) ** 0.5 * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a)
        return eps + (1 - a) ** 0.5 * x.sin(), x.sin()

    def exact(self, x):
        a, b = self.alpha_bar[[0, -1]]
        return b**0.5 * MEAN + (x - a**0.5 * MEAN) * ((b * STD**2 + 1 - b) / (a * STD**2 + 1 - a)) ** 0.5


def error(solver: str, steps: int) -> float:
    model, x = Gaussian(steps), torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    return float((SOLVERS[solver].decode(model.field, x, model.trajectory, clamp=None) - model.exact(x)).abs().max())


ORDERS = {"ddim": 1, "dpm++2m": 2, "dpm++3m": 3, "unipc2": 3, "unipc3": 4, "belm": 2}


@pytest.mark.parametrize(("solver", "order"), ORDERS.items(), ids=ORDERS)
def test_order_of_convergence(solver, order):
    errors = [error(solver, steps) for steps in (80, 160, 320)]
    measured = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert measured == pytest.approx([order] * 2, abs=0.35)


def test_every_solver_is_in_the_table_of_orders():
    assert {*ORDERS, "ddpm"} == set(SOLVERS)  # ddpm is stochastic: its moments are tested with it


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++3m", "unipc2", "unipc3", "belm"])
def test_all_reach_what_ddim_reaches_with_many_steps(solver):
    field = clamped_field
    x_T = ImageNoise(0, range(2), (1, 8, 8))()
    limit = integrate(field, x_T, SCHEDULE.decoding(1000))
    few, many = (
        relative(SOLVERS[solver].decode(field, x_T, SCHEDULE.decoding(n, spacing="quadratic")), limit)
        for n in (15, 150)
    )
    assert many < 0.01 and many < few


def clamped_field(x, t, use_gradient):
    """Smooth, not linear, and beyond the clamp in places."""
    a = float(SCHEDULE.alpha_bar[t])
    x0 = 1.3 * torch.tanh(2 * a**0.5 * x)
    return (x - a**0.5 * x0) / (1 - a) ** 0.5, None


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if isinstance(solver, Multistep)])
def test_the_first_step_is_that_of_ddim(solver):
    seen = []

    def field(x, t, use_gradient):
        seen.append(x)
        return clamped_field(x, t, use_gradient)

    trajectory = SCHEDULE.decoding(20)
    x_T = ImageNoise(0, range(2), (1, 4, 4))()
    SOLVERS[solver].decode(field, x_T, trajectory)
    torch.testing.assert_close(seen[1], integrate(clamped_field, x_T, trajectory[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++3m", "unipc2", "unipc3"])
def test_a_constant_estimate_makes_all_methods_ddim(solver):
    constant = ImageNoise(1, [0], (1, 4, 4))()

    def field(x, t, use_gradient):
        a = float(SCHEDULE.alpha_bar[t])
        return (x - a**0.5 * constant) / (1 - a) ** 0.5, None

    x_T, trajectory = ImageNoise(0, range(2), (1, 4, 4))(), SCHEDULE.decoding(20, spacing="karras")
    x_T, constant = x_T.double(), constant.double()
    expected = integrate(field, x_T, trajectory, clamp=None)
    assert relative(SOLVERS[solver].decode(field, x_T, trajectory, clamp=None), expected) < 1e-10


@pytest.mark.parametrize("h", [0.01, 0.7, 4.0, -0.5])
@pytest.mark.parametrize("nodes", [(0.0, -0.8, -1.7), (1.0, 0.0, -0.6), (1.0, 0.0, -2.0, -2.5)])
def test_weights_integrate_polynomials(nodes, h):
    # The mean of s^k with weight exp(h s) on [0, 1], as a sum of positive terms or by a fine rule.
    s = (np.arange(200_000) + 0.5) / 200_000
    mass = np.exp(h * s) / np.exp(h * s).sum()
    weights = np.array(_weights(list(nodes), h))
    for k in range(len(nodes)):
        assert weights @ np.array(nodes) ** k == pytest.approx(mass @ s**k, rel=1e-9)


def test_2m_and_3m_in_the_notation_of_the_paper():
    # DPM-Solver++ 2M: D = (1 + 1 / 2r) x0_0 - 1 / 2r x0_1; 3M by the phi functions of exponential integrators.
    r, r1, h = 0.8, 0.9, 0.3
    assert _weights([0.0, -r], h) == pytest.approx([1 + 1 / (2 * r), -1 / (2 * r)])
    phi1 = math.expm1(-h)
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    d0, d1 = np.array([1, -1, 0]) / r, np.array([0, 1, -1]) / r1
    first, second = d0 + r / (r + r1) * (d0 - d1), 2 * (d0 - d1) / (r + r1)
    expected = (-phi1 * np.array([1, 0, 0]) + phi2 * first - phi3 * second) / -phi1
    assert _weights([0.0, -r, -r - r1], h) == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("solver", ORDERS)
def test_one_evaluation_a_step_in_order(solver):
    calls, ticks = [], []

    def field(x, t, use_gradient):
        calls.append((t, use_gradient))
        return clamped_field(x, t, use_gradient)

    trajectory = SCHEDULE.decoding(10, stop_percent=0.4)
    SOLVERS[solver].decode(field, torch.zeros(1, 1, 2, 2), trajectory, progress=lambda: ticks.append(1))
    assert calls == [(step.t, step.use_gradient) for step in trajectory] and len(ticks) == 10


@pytest.mark.parametrize("solver", ["dpm++3m", "unipc3", "belm"])
def test_history_is_forgotten_where_G_stops(solver):
    # Without G everything is a constant estimate, so whatever G said before must leave no trace but in x itself.
    x_T, trajectory = ImageNoise(0, [0], (1, 4, 4))(), SCHEDULE.decoding(20, stop_percent=0.5)
    seen = []

    def field(x, t, use_gradient):
        seen.append(x)
        a = float(SCHEDULE.alpha_bar[t])
        return x / (1 - a) ** 0.5, 5 * x.sin() if use_gradient else None

    x = SOLVERS[solver].decode(field, x_T.double(), trajectory, clamp=None)
    switch = next(i for i, step in enumerate(trajectory) if not step.use_gradient)
    # x0_hat = 0 from there on: x only shrinks with sigma (belm: with the noise of each point).
    after = integrate(field, seen[switch], trajectory[switch:], clamp=None)
    assert relative(x, after) < 1e-9


def test_few_steps_end_in_lower_order():
    # The last of fewer than 15 steps is DDIM's: x0_hat of the last point alone.
    trajectory = SCHEDULE.decoding(8)
    for solver in ("dpm++2m", "dpm++3m"):
        seen = []

        def field(x, t, use_gradient, seen=seen):
            seen.append(x)
            return clamped_field(x, t, use_gradient)

        x = SOLVERS[solver].decode(field, ImageNoise(0, [0], (1, 4, 4))(), trajectory)
        torch.testing.assert_close(x, integrate(clamped_field, seen[-1], trajectory[-1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spacing", [s for s in SPACINGS if s not in WHOLE])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 100, 1000])
@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(kind="cosine")], ids=["linear", "cosine"])
def test_grids_rise_from_0_to_T(spacing, steps, config):
    points = build_schedule(config).timesteps(steps, spacing)
    assert points[0] == 0 and points[-1] == 999 and points.dtype == np.int64
    assert bool((np.diff(points) > 0).all()) and len(points) <= steps + 1
    if steps <= 10 and config.kind == "linear":
        assert len(points) == steps + 1
    # As many steps as there are points to step between: what is counted is what runs.
    assert len(build_schedule(config).decoding(steps, spacing=spacing)) == len(points) - 1


def test_grids_are_even_in_what_they_say():
    low, high = SCHEDULE.half_log_snr[[0, -1]]
    inner = slice(5, -1)  # rounding to whole t tells at the lowest points
    found = SCHEDULE.half_log_snr[SCHEDULE.timesteps(20, "logsnr")]
    np.testing.assert_allclose(found[inner], np.linspace(low, high, 21)[inner], atol=0.06)
    found = np.exp(-SCHEDULE.half_log_snr[SCHEDULE.timesteps(20, "karras")] / 7)
    np.testing.assert_allclose(found[inner], np.linspace(*np.exp(-np.array([low, high]) / 7), 21)[inner], atol=0.01)


@pytest.fixture(scope="module")
def model():
    return tiny_pdae()


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++3m", "unipc2", "unipc3", "belm"])
def test_pipeline_runs_the_pure_functions(model, solver):
    pipe = Pipeline(model, steps=5, device="cpu", dtype="float32", batch_size=2, spacing="karras", solver=solver)
    z = pipe.encode(images(3))
    x_T = ImageNoise(0, range(3), (1, 32, 32))()

    def field(x, t, use_gradient):
        with torch.no_grad():
            eps, gradient = model(x, torch.full((len(x),), t), z)
        return eps, gradient if use_gradient else None

    expected = SOLVERS[solver].decode(field, x_T, pipe.schedule.decoding(5, 0.2, "karras"))
    before = pipe.evaluations.get("trunk", 0)
    assert relative(pipe.decode(z, x_T, 0.2), expected) < 1e-4
    assert pipe.evaluations["trunk"] - before == 3 * 5
    plain = Pipeline(model, steps=5, device="cpu", dtype="float32", spacing="karras")
    assert relative(plain.with_recipe(solver=solver, iterations=0).decode(z, x_T, 0.2), expected) < 1e-4
    assert relative(plain.decode(z, x_T, 0.2), expected) > 1e-3  # ddim is something else


def test_the_prior_alone():
    pipe = Pipeline(tiny_prior(), steps=4, device="cpu", dtype="float32", solver="unipc2")
    x = pipe.sample(2, seed=3)
    assert bool(torch.isfinite(x).all()) and pipe.evaluations == {"trunk": 8, "eps": 8}
    mixture = Pipeline(tiny_pdae(), steps=4, device="cpu", dtype="float32", solver="dpm++2m")
    z, x_T = mixture.encode(images(2)), ImageNoise(3, range(2), (1, 32, 32))()
    one = mixture.decode_mixture(z[None], torch.ones(1, 2), x_T)
    torch.testing.assert_close(one, mixture.decode(z, x_T), rtol=1e-3, atol=1e-3)


class Deviceside:
    """A field that can carry x along DDIM trajectories by itself, as captured CUDA graphs do."""

    def __init__(self) -> None:
        self.whole = 0

    def __call__(self, x, t, use_gradient):
        return clamped_field(x, t, use_gradient)

    def integrate(self, x, trajectory, clamp, progress):
        self.whole += 1
        return x


@pytest.mark.parametrize("solver", ORDERS)
def test_only_ddim_is_left_to_the_device(solver):
    field, x_T = Deviceside(), ImageNoise(0, [0], (1, 4, 4))()
    x = SOLVERS[solver].decode(field, x_T, SCHEDULE.decoding(5))
    assert field.whole == (solver == "ddim")
    if solver != "ddim":
        torch.testing.assert_close(x, SOLVERS[solver].decode(clamped_field, x_T, SCHEDULE.decoding(5)))


class Combining(Deviceside):
    """And along all linear methods."""

    def combine(self, states, trajectory, weights, clamp, progress):
        self.whole += 1
        return combine(clamped_field, states, trajectory, weights, clamp=clamp, progress=progress)


@pytest.mark.parametrize("solver", ORDERS)
def test_a_device_that_combines_is_left_them_all(solver):
    field, x_T = Combining(), ImageNoise(0, [0], (1, 4, 4))()
    x = SOLVERS[solver].decode(field, x_T, SCHEDULE.decoding(5))
    assert field.whole == 1
    if solver != "ddim":
        torch.testing.assert_close(x, SOLVERS[solver].decode(clamped_field, x_T, SCHEDULE.decoding(5)))
    SOLVERS[solver].decode(field, x_T, SCHEDULE.decoding(5), clamp=0.5)
    assert field.whole == 1  # a clamp that no device knows


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: Pipeline(m, solver="euler"), "'euler' is not known; expected ddim, dpm.* or belm"),
        (lambda m: Pipeline(m, steps=2, solver="dpm++3m"), r"dpm\+\+3m needs at least 3 steps, not 2"),
        (lambda m: Pipeline(m, steps=1, solver="unipc2"), "unipc2 needs at least 2 steps, not 1"),
        (lambda m: Pipeline(m, solver="unipc3", iterations=2), "iterations .* cannot be combined with unipc3"),
        (lambda m: Pipeline(m, solver="belm", iterations=1), "cannot be combined with belm"),
        (lambda m: Pipeline(m, spacing="edm"), "'edm' is not known; expected uniform, quadratic"),
        (lambda m: Pipeline(m, device="cpu").with_recipe(solver="plms"), "'plms' is not known"),
        (lambda m: Pipeline(m, device="cpu").with_recipe("published", steps=1, solver="dpm++2m"), "at least 2 steps"),
        (
            lambda m: SOLVERS["dpm++2m"].decode(clamped_field, torch.zeros(1, 1), SCHEDULE.decoding(1)),
            "at least 2 steps",
        ),
    ],
)
def test_mistakes(model, call, words):
    with pytest.raises(UserError, match=words) as failure:
        call(model)
    assert "\n" not in str(failure.value)
