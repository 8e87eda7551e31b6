"""Steps as guided- and improved-diffusion take them, on their networks: against the numbers of their code."""

import numpy as np
import pytest
import torch
from checkpoints.test_foreign_golden import write

from foreign_golden import about, numbers
from pdae_fast import Pipeline, Prior, Recipe, ScheduleConfig, UserError
from pdae_fast.samplers import ddim
from pdae_fast.samplers.inversion import invert_implicit
from pdae_fast.schedule import build_schedule

NAMES = ("improved-plain", "improved-cosine4000", "guided-512", "guided-class")
SCHEDULE = build_schedule(ScheduleConfig())
STEP, GAPS = 1e-5, 8


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    path, options = write(request.param, tmp_path_factory.mktemp("foreign"))
    pipe = Pipeline(Prior.from_pretrained(path, **options), device="cpu", dtype="float32", plan="fused")
    g = numbers(request.param)
    return request.param, g, pipe, pipe.plan.field(labels=g["forward.y"][:2] if "forward.y" in g else None)


def assert_near(found: torch.Tensor, name: str, key: str) -> None:
    gap = about(name)["float64_gap"][key]["max_abs"]
    torch.testing.assert_close(found, numbers(name)[key], atol=GAPS * max(gap, STEP), rtol=0)


def test_trajectories(case):
    _, g, pipe, _ = case
    steps = len(g["ddim.timesteps"])
    down, up = pipe.schedule.decoding(steps, spacing="strided")[::-1], pipe.schedule.inversion(steps, "strided")
    for trajectory, end in ((down, "prev"), (up, "next")):
        assert [step.t for step in trajectory] == g["ddim.timesteps"].tolist()
        for key, values in (("", "alpha_bar"), (f"_{end}", "alpha_bar_next")):
            found = [getattr(step, values) for step in trajectory]
            np.testing.assert_allclose(found, g[f"ddim.alphas_cumprod{key}"].numpy(), rtol=1e-9, atol=1e-12)
    points = pipe.schedule.timesteps(len(g["respaced.timesteps"]), "respaced")
    assert points.tolist() == g["respaced.timesteps"].tolist()


def test_every_step_from_the_recorded_state(case):
    name, g, pipe, field = case
    states = [g["decode.x_T"], *g["decode.states"]]
    # The time embedding's frequencies are float32 exp, times t: a last bit that another processor rounds otherwise
    # moves a step at t = 800 by 1e-5, and the recorded numbers are no nearer to float64.
    near = STEP + about(name)["float64_gap"]["decode.x_0"]["max_abs"]
    for step, before, after in zip(pipe.schedule.decoding(len(states) - 1, spacing="strided"), states, states[1:]):  # noqa: B905
        torch.testing.assert_close(ddim.integrate(field, before, (step,)), after, atol=near, rtol=STEP)


def test_loops(case):
    name, g, pipe, field = case
    steps, schedule = len(g["ddim.timesteps"]), pipe.schedule
    assert_near(ddim.integrate(field, g["decode.x_T"], schedule.decoding(steps, spacing="strided")), name, "decode.x_0")
    assert_near(ddim.integrate(field, g["invert.x_0"], schedule.inversion(steps, "strided")), name, "invert.x_T")
    respaced = schedule.decoding(len(g["respaced.timesteps"]), spacing="respaced")
    assert_near(ddim.integrate(field, g["decode.x_T"], respaced), name, "respaced.x_0")


def test_which_numbers_of_steps_are_strided():
    """As they search for a stride: the first that gives so many points, or none."""
    for steps in (*range(1, 60), 250, 333, 334, 499, 500, 501, 999, 1000):
        stride = next((i for i in range(1, 1001) if len(range(0, 1000, i)) == steps), None)
        if stride is None:
            with pytest.raises(UserError, match=f"steps {steps}: no stride gives so many of 1000 time points"):
                SCHEDULE.timesteps(steps, "strided")
        else:
            assert SCHEDULE.timesteps(steps, "strided").tolist() == list(range(0, 1000, stride))
            assert (
                len(SCHEDULE.decoding(steps, spacing="strided")) == len(SCHEDULE.inversion(steps, "strided")) == steps
            )
    with pytest.raises(UserError, match="expected 500 or 1000"):
        SCHEDULE.timesteps(999, "strided")
    assert SCHEDULE.timesteps(1, "respaced").tolist() == [0]


@pytest.mark.parametrize("spacing", ["strided", "respaced"])
def test_ancestral_steps_take_the_same_points(spacing):
    trajectory = Recipe(10, spacing=spacing, solver="ddpm").down(SCHEDULE)
    assert [step.t for step in trajectory][::-1] == SCHEDULE.timesteps(10, spacing).tolist()
    assert trajectory[-1].alpha_bar_next == 1


def test_stop_percent_counts_from_the_clean_end():
    used = [step.use_gradient for step in SCHEDULE.decoding(10, 0.3, "strided")]
    assert used == [True] * 7 + [False] * 3


def test_steps_are_solved_down_to_the_clean_image():
    def field(x, t, use_gradient):  # of data N(0, 0.25)
        a = SCHEDULE.alpha_bar[t]
        return x * float((1 - a) ** 0.5 / (0.25 * a + 1 - a)), None

    x0 = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).view(3, 1, 2, 2)
    trajectory = SCHEDULE.decoding(20, spacing="strided")
    x_T = invert_implicit(field, x0, trajectory, iterations=8).x_T
    torch.testing.assert_close(ddim.integrate(field, x_T, trajectory), x0, atol=1e-6, rtol=0)
