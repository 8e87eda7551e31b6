"""What is minimised: the simple loss for the prior and for Diff-AE, the weighted shift loss of Algorithm 1 for PDAE,
the losses of the two networks on z, and that of an encoder which is told its codes.

``velocity`` adds, to the first two, that many times the squared error of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar)
x0 (Salimans and Ho 2022, arXiv 2202.00512), which is 1 / alpha_bar_t times that of eps. The factor is held at
VELOCITY_LIMIT: where x_t is all but noise, what is left of the error is the prior's own, and would drown the rest. Not
in the paper, and 0 there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import PDAE, DiffAE, Prior
from ..models.latent import LatentMLP
from ..models.unet import Features, PDAEDecoder
from ..schedule import Schedule, Tables, as_tables, column, q_sample

VELOCITY_LIMIT = 100.0


def _weighted(
    tables: Tables, error: Tensor, t: Tensor, weight: Tensor | None, velocity: float, of: str = "epsilon"
) -> Tensor:
    """Mean squared ``error`` of what a network predicts (``of``, as in PriorConfig), times ``weight`` [T] at t unless
    None, plus ``velocity`` times that of v."""
    square = error.square()
    if velocity:
        # x_t is given, so an error of eps, of x0 and of v are the same one at different scales.
        factor = {"epsilon": tables.signal.pow(-2), "sample": tables.spread.pow(-2)}.get(of)
        extra = velocity if factor is None else velocity * column(factor.clamp(max=VELOCITY_LIMIT), t)
        return ((extra + (1 if weight is None else column(weight, t))) * square).mean()
    return (square if weight is None else column(weight, t) * square).mean()


def simple_loss(
    model: Prior | DiffAE,
    schedule: Schedule | Tables,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    velocity: float = 0.0,
    y: Tensor | None = None,
) -> Tensor:
    """Mean squared error of what the network predicts: eps (DDPM's L_simple), v or x0; and of v where ``velocity`` asks
    for it; a scalar. y int64 [B]: labels, for a class-conditional prior. A Diff-AE is given z = encoder(x0), and
    gradients reach all of it (arXiv 2111.15640, eq. 6)."""
    tables, prediction = as_tables(schedule, x0.device), model.config.prediction
    z = model.encode(x0) if isinstance(model, DiffAE) else None
    out = model.unet.decode(model.unet.trunk(q_sample(tables, x0, t, noise), t, y, z)).float()
    if prediction == "v_prediction":
        target = column(tables.signal, t) * noise - column(tables.spread, t) * x0
    else:
        target = noise if prediction == "epsilon" else x0
    return _weighted(tables, target - out, t, None, velocity, prediction)


def _frozen_half(decoder: PDAEDecoder, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Features, Tensor]:
    features = decoder.trunk(x_t, t, y)
    return features, decoder.decode(features)


def _eps(tables: Tables, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """eps_hat from the network's output, float32: near t = 0 it is the small difference of x_t and x0."""
    if tables.to_eps is None:
        return out.float()
    of_x, of_out = tables.to_eps.unbind(1)
    return column(of_x, t) * x_t + column(of_out, t) * out.float()


def pdae_loss(
    model: PDAE,
    schedule: Schedule | Tables,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    frozen: Callable[[Tensor, Tensor, Tensor | None], tuple[Features, Tensor]] | None = None,
    velocity: float = 0.0,
    y: Tensor | None = None,
) -> Tensor:
    """lambda_t (eps - (eps_hat + c_t G))^2, mean over batch and pixels (Algorithm 1), and the same error of v where
    ``velocity`` asks for it; a scalar. Tables must be those of the model's prediction; y as in `simple_loss`.

    The trunk and the eps-decoder are frozen: they run without a graph, and only G and the encoder get gradients.
    ``frozen``: another way to compute both, (x_t, t, y) -> (features, the network's output).
    """
    tables = as_tables(schedule, x0.device, model.config.prediction)
    x_t = q_sample(tables, x0, t, noise)
    decoder = model.decoder
    with torch.no_grad():
        features, out = frozen(x_t, t, y) if frozen else _frozen_half(decoder, x_t, t, y)
        eps = _eps(tables, x_t, out, t)
    if features.h.device.type == "cpu" and not features.h.is_contiguous() and not torch.compiler.is_compiling():
        # PyTorch 2.13's GroupNorm on the CPU writes the gradient of a channels-last input also where nobody wants one
        # and no memory was made for it: a segmentation fault.
        features.h.requires_grad_()
    gradient = decoder.decode_gradient(features, model.encode(x0)).float()
    error = noise - (eps + column(tables.shift_coef, t) * gradient)
    return _weighted(tables, error, t, tables.loss_weight, velocity)


def encoder_loss(model: nn.Module, x0: Tensor, z: Tensor) -> Tensor:
    """Mean squared error of E_phi(x0) against the codes z [B, D]; a scalar. Not in the paper."""
    return (model(x0).float() - z).square().mean()


def latent_loss(model: LatentMLP, schedule: Schedule | Tables, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean absolute error of eps_hat on normalised latents z [B, D], t int64 [B], noise [B, D]; a scalar."""
    return (noise - model(q_sample(schedule, z, t, noise), t).float()).abs().mean()


def classifier_loss(model: nn.Linear, z: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, mean over batch and attributes; normalised z [B, D], labels [B, n] of 0 and 1; a scalar."""
    return F.binary_cross_entropy_with_logits(model(z).float(), labels.float())
