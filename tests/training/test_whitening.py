"""Whitened codes: another coordinate system for z, the same model."""

import copy
import dataclasses

import pytest
import torch

from helpers import tiny_pdae
from pdae_fast import UserError
from pdae_fast.config import LatentConfig
from pdae_fast.training.whitening import FLOOR, whiten_codes


def inputs(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator).clamp(-1, 1)


@torch.no_grad()
def test_eps_and_g_stay_and_the_codes_become_white():
    model = tiny_pdae()
    x0, before = inputs(200, model.image_shape), copy.deepcopy(model)
    whiten_codes(model, x0, batch_size=64)
    x_t, t = inputs(4, model.image_shape, seed=1), torch.tensor([0, 10, 500, 999])
    expected, found = before(x_t, t, before.encode(x0[:4])), model(x_t, t, model.encode(x0[:4]))
    assert expected[1].abs().max() > 1e-3  # a G that does nothing would agree with anything
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)

    z, old = model.encode(x0).double(), before.encode(x0).double()
    variance = torch.linalg.eigvalsh(torch.cov(old.T)).flip(0)
    assert z.mean(0).abs().max() < 1e-4
    covariance = torch.cov(z.T)
    torch.testing.assert_close(
        covariance, torch.diag(variance / (variance + FLOOR * variance.mean())), atol=1e-3, rtol=1e-3
    )


def test_what_cannot_be_whitened():
    model = tiny_pdae()
    D = model.config.latent_dim
    with pytest.raises(UserError, match=f"at least {2 * D} images, not {2 * D - 1}"):
        whiten_codes(model, inputs(2 * D - 1, model.image_shape))
    other = tiny_pdae(dataclasses.replace(model.config, latent=LatentConfig(D, 8, 2), latent_statistics=True))
    with pytest.raises(UserError, match="cannot be whitened"):
        whiten_codes(other, inputs(2 * D, model.image_shape))
