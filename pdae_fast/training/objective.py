"""What is minimised: the simple loss for the prior, the weighted shift loss of Algorithm 1 for PDAE."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import PDAE, Prior
from ..schedule import Schedule


def _column(values, t: Tensor) -> Tensor:
    """Float64 constants [T] gathered at t [B] -> float32 [B, 1, 1, 1]."""
    table = torch.as_tensor(values.copy(), device=t.device)
    return table[t].float()[:, None, None, None]


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise; x0 and noise [B, C, H, W], t int64 [B]."""
    return _column(schedule.alpha_bar**0.5, t) * x0 + _column((1 - schedule.alpha_bar) ** 0.5, t) * noise


def prior_loss(model: Prior, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of eps_hat (DDPM's L_simple); a scalar."""
    return (noise - model(q_sample(schedule, x0, t, noise), t).float()).square().mean()


def pdae_loss(model: PDAE, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """lambda_t (eps - (eps_hat + c_t G))^2, mean over batch and pixels (Algorithm 1); a scalar.

    The trunk and the eps-decoder are frozen: they run without a graph, and only G and the encoder get gradients.
    """
    x_t = q_sample(schedule, x0, t, noise)
    decoder = model.decoder
    with torch.no_grad():
        features = decoder.trunk(x_t, t)
        eps = decoder.decode_eps(features).float()
    gradient = decoder.decode_gradient(features, model.encode(x0)).float()
    error = noise - (eps + _column(schedule.shift_coef, t) * gradient)
    return (_column(schedule.loss_weight, t) * error.square()).mean()
