"""A process whose last x_t is pure noise: sampled from the last t that still tells x_0."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers import TINY, images, tiny_pdae
from pdae_fast import Pipeline, ScheduleConfig, UserError
from pdae_fast.config import PriorConfig
from pdae_fast.schedule import SPACINGS, build_schedule

CONFIG = ScheduleConfig("scaled_linear", 100, 0.001, 0.2, zero_terminal_snr=True)


def test_alpha_bar_ends_at_zero_and_starts_where_it_did():
    plain, zero = build_schedule(dataclasses.replace(CONFIG, zero_terminal_snr=False)), build_schedule(CONFIG)
    root, moved = np.sqrt(plain.alpha_bar), np.sqrt(zero.alpha_bar)
    assert moved[0] == pytest.approx(root[0], rel=1e-12) and zero.alpha_bar[-1] == 0
    # Shifted and scaled: differences keep their proportions.
    np.testing.assert_allclose(np.diff(moved) / (moved[0] - moved[-1]), np.diff(root) / (root[0] - root[-1]), rtol=1e-7)
    assert (plain.last, zero.last) == (99, 98)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_no_step_starts_where_nothing_is_left(spacing):
    schedule = build_schedule(CONFIG)
    for trajectory in (schedule.decoding(9, spacing=spacing), schedule.inversion(9, spacing=spacing)):
        assert max(step.t for step in trajectory) <= 98
        assert all(step.alpha_bar > 0 for step in trajectory)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_pipeline_runs(prediction):
    model = tiny_pdae(dataclasses.replace(TINY, schedule=CONFIG, prediction=prediction))
    # At the last t eps is x itself where v is predicted, whatever the network says of the image.
    x = images(2)
    eps, _ = model(x, torch.full((2,), 99), torch.zeros(2, 16))
    assert bool(torch.isfinite(eps).all())
    assert prediction == "sample" or torch.allclose(eps, x)
    pipe = Pipeline(model, steps=5, device="cpu", dtype="float32")
    assert bool(torch.isfinite(pipe.reconstruct(images(2))).all())


def test_eps_says_nothing_there():
    with pytest.raises(UserError, match="zero_terminal_snr"):
        PriorConfig(32, TINY.unet, CONFIG)
