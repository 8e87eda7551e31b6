"""A class-conditional model in the pipeline: one label for all images, or one for each."""

import dataclasses

import numpy as np
import pytest
import torch

from golden_rule import relative
from helpers import TINY, images, tiny_pdae, tiny_prior
from pdae_fast import Pipeline, UserError
from pdae_fast.samplers import ddim

CONFIG = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, num_classes=4))


def by_modules(model, x, z, y, steps):
    """DDIM with the modules as they are."""

    def field(x, t, use_gradient):
        times = torch.full((len(x),), t)
        with torch.no_grad():
            return model(x, times, z, y) if z is not None else (model(x, times, y), None)

    return ddim.ddim(field, x, Pipeline(model, label=0, device="cpu").schedule, steps)


@pytest.mark.parametrize("plan", ["eager", "fused"])
def test_every_image_is_decoded_by_its_label(plan):
    model, x_T = tiny_pdae(CONFIG), torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    pipe = Pipeline(model, "published", steps=4, device="cpu", dtype="float32", plan=plan, batch_size=2, label=2)
    z = model.encode(images(3, CONFIG))
    y = torch.tensor([0, 3, 1])
    expected = by_modules(model, x_T, z, y, 4)
    for given in (y, [0, 3, 1], np.array([0, 3, 1])):
        assert relative(pipe.decode(z, x_T, y=given), expected) < 1e-4
    assert relative(pipe.decode(z, x_T), by_modules(model, x_T, z, torch.full((3,), 2), 4)) < 1e-4
    # The way up and down with the same labels, whatever the batch.
    x0 = images(3, CONFIG)
    whole = pipe.reconstruct(x0, y=y)
    alone = pipe.decode(z[1:2], pipe.invert(x0[1:2], z[1:2], y[1:2]), y=y[1:2])
    # Random networks amplify rounding on the way; another label changes far more.
    assert relative(alone, whole[1:2]) < 2e-3
    assert relative(pipe.invert(x0, z), pipe.invert(x0, z, y)) > 1e-2


def test_a_prior_samples_one_class():
    prior = tiny_prior(CONFIG)
    pipe = Pipeline(prior, "published", steps=3, device="cpu", dtype="float32", label=1)
    x_T = pipe.random_x_T(5, range(2))
    assert relative(pipe.sample(2, seed=5), by_modules(prior, x_T, None, torch.tensor([1, 1]), 3)) < 1e-4


@pytest.mark.parametrize("y", [None, [0, 1], [0, 1, 4], [-1, 0, 0], [0.5, 1, 1], "012"], ids=str)
def test_wrong_labels(y):
    pipe = Pipeline(tiny_pdae(CONFIG), steps=2, device="cpu", dtype="float32")
    with pytest.raises(UserError, match="^y "):
        pipe.decode(torch.zeros(3, 16), torch.zeros(3, 1, 32, 32), y=y)


def test_labels_of_a_model_without_classes():
    pipe = Pipeline(tiny_pdae(), steps=2, device="cpu", dtype="float32")
    with pytest.raises(UserError, match="not class-conditional"):
        pipe.invert(images(1), torch.zeros(1, 16), y=[0])
    with pytest.raises(UserError, match="not class-conditional"):
        Pipeline(tiny_pdae(), label=0)
    with pytest.raises(UserError, match="between 0 and 3"):
        Pipeline(tiny_pdae(CONFIG), label=4)
