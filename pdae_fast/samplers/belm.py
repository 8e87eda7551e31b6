"""A decoder that runs backward exactly: inference of x_T is algebra, and only rounding is lost.

O-BELM (arXiv 2410.07273): with xbar = x / sqrt(alpha_bar), s = sqrt(1 / alpha_bar - 1), points numbered upward from the
clean image, h_i = s_i - s_{i-1}, and u(x) the noise that leads from the clamped x0_hat to x,

    xbar_{i-1} = g_i xbar_{i+1} + (1 - g_i) xbar_i - (h_i + g_i h_{i+1}) u(x_i),    g_i = (h_i / h_{i+1})^2,

the explicit midpoint rule for unequal steps: of second order, one evaluation a step. It is linear in the two outer
points, so it is solved for x_{i+1} as easily as for x_{i-1}, with the same u(x_i). The clamp does not stand in the way:
it is part of u, which is a function of x_i alone.

What a trajectory is known by is therefore *two* neighbouring states: x_T and its companion, the state at the point
below (:class:`Pipeline` stacks them: [B, 2, C, H, W]). From x_T alone, one DDIM step finds the companion. From an image
alone, the state above it is free, as far as the way back is concerned: any leads back to the image. What differs is how
far the two sequences of every other state drift apart on the way up (the midpoint rule does not damp that), hence how
normal the latent is. The state whose DDIM step leads to the image, solved for by :mod:`.inversion`, was best.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError
from ..schedule import Trajectory
from .ddim import Field, Progress, estimate_noise, state
from .inversion import invert_implicit

START_ITERATIONS = 2


class ReversibleLatent(NamedTuple):
    """``x_T`` and ``companion``, the state one point below it, both [B, ...]."""

    x_T: Tensor
    companion: Tensor


def belm(
    field: Field,
    x_T: Tensor,
    decoding: Trajectory,
    companion: Tensor | None = None,
    *,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """x at t = 0, unclamped, from x_T and its companion [B, ...], or from x_T alone.

    ``decoding`` has S >= 2 steps. S - 1 evaluations with a companion, S without. Where G comes into use or out of it
    (``stop_percent``), u jumps: one DDIM step is taken there.
    """
    _check(decoding)
    above, first = state(x_T), decoding[0]
    if companion is not None:
        x = state(companion)
    else:
        x = _ddim(above, estimate_noise(field, above, first, clamp), first.alpha_bar, first.alpha_bar_next)
        if progress:
            progress()
    for before, step in pairwise(decoding):
        u = estimate_noise(field, x, step, clamp)
        if step.use_gradient == before.use_gradient:
            a, b, c = _coefficients(step.alpha_bar_next, step.alpha_bar, before.alpha_bar)
            above, x = x, a * above + b * x - c * u
        else:
            above, x = x, _ddim(x, u, step.alpha_bar, step.alpha_bar_next)
        if progress:
            progress()
    return x


def belm_invert(
    field: Field,
    x0: Tensor,
    decoding: Trajectory,
    *,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> ReversibleLatent:
    """The latent from which :func:`belm` leads back to ``x0`` [B, ...], by S + 2 evaluations.

    ``decoding`` is what decodes, with G in all of its steps or in none.
    """
    _check(decoding)
    if len({step.use_gradient for step in decoding}) > 1:
        raise UserError("belm inverts a decoding with G in all of its steps or in none")
    below = state(x0)
    x = invert_implicit(field, below, decoding[-1:], iterations=START_ITERATIONS, clamp=clamp, progress=progress).x_T
    for step, after in pairwise(reversed(decoding)):
        a, b, c = _coefficients(step.alpha_bar_next, step.alpha_bar, after.alpha_bar)
        below, x = x, (below - b * x + c * estimate_noise(field, x, step, clamp)) / a
        if progress:
            progress()
    return ReversibleLatent(x, below)


def _coefficients(low: float, middle: float, high: float) -> tuple[float, float, float]:
    """a, b, c of x_low = a x_high + b x_middle - c u(x_middle), from the three alpha_bar."""
    s_low, s_middle, s_high = ((1 / alpha_bar - 1) ** 0.5 for alpha_bar in (low, middle, high))
    h, h_above = s_middle - s_low, s_high - s_middle
    g = (h / h_above) ** 2
    return g * (low / high) ** 0.5, (1 - g) * (low / middle) ** 0.5, (h + g * h_above) * low**0.5


def _ddim(x: Tensor, u: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    r = (alpha_bar_next / alpha_bar) ** 0.5
    return r * x + ((1 - alpha_bar_next) ** 0.5 - r * (1 - alpha_bar) ** 0.5) * u


def _check(decoding: Trajectory) -> None:
    if len(decoding) < 2:
        raise UserError(f"belm needs at least 2 steps, not {len(decoding)}")
