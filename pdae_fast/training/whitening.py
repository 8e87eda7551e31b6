"""A better-conditioned start for z: uncorrelated codes of equal spread, by an exact change of coordinates.

A fresh encoder's codes vary along a few directions alone, and so do those of a briefly trained one: the rest lie
orders of magnitude below and are learned as much slower. An affine map of z can be moved between the encoder's last
layer and ``label_emb``, the one layer that reads z, without changing what the model computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..models import PDAE

FLOOR = 1e-3  # of the mean variance: directions far below it would mostly be amplified rounding


@torch.no_grad()
def whiten_codes(model: PDAE, images: Tensor, batch_size: int = 64) -> None:
    """Change the coordinates of ``model``'s z so that over ``images`` [N, C, H, W] they have mean 0 and, but for
    directions below ``FLOOR`` of the mean variance, the identity as covariance; largest variance first.

    E_phi and ``label_emb`` change together: eps_hat and G of an image stay the same up to rounding. Latent statistics,
    classifier and latent DPM belong to the old coordinates: a model that has them is refused with a UserError, and so
    are fewer images than twice the latent dimensions.
    """
    config = model.config
    if config.latent_statistics or config.attributes or config.latent is not None:
        raise UserError("the codes of a model with latent statistics, classifier or latent DPM cannot be whitened")
    if len(images) < 2 * config.latent_dim:
        raise UserError(
            f"whitening {config.latent_dim} latent dimensions needs at least {2 * config.latent_dim} images, "
            f"not {len(images)}"
        )
    device = next(model.parameters()).device
    model.eval()
    z = torch.cat([model.encode(part.to(device)) for part in images.split(batch_size)]).double()
    mean = z.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((z - mean).T))
    variance, basis = variance.flip(0).clamp_min(0), basis.flip(1)
    deviation = (variance + FLOOR * variance.mean()).sqrt()
    last, reader = model.encoder.encoder[-1], model.decoder.label_emb
    # z' = M (z - mean) in the encoder, z = M^-1 z' + mean in label_emb.
    forward, backward = basis.T / deviation[:, None], basis * deviation
    new_weight, new_bias = forward @ last.weight.double(), forward @ (last.bias.double() - mean)
    reader.bias.copy_(reader.bias.double() + reader.weight.double() @ mean)
    reader.weight.copy_(reader.weight.double() @ backward)
    last.weight.copy_(new_weight)
    last.bias.copy_(new_bias)
