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
from ..schedule import Step, Trajectory
from .ddim import Field, Progress, combine
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
    # The states are x and the one above it.
    states, known = ([x_T, x_T], [_ddim(decoding[0])]) if companion is None else ([companion, x_T], [])
    rows = [*known, *(_down(before, step) for before, step in pairwise(decoding))]
    return _carry(field, states, decoding[-len(rows) :], rows, clamp, progress)[0]


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
    x = invert_implicit(field, x0, decoding[-1:], iterations=START_ITERATIONS, clamp=clamp, progress=progress).x_T
    upward = decoding[::-1]
    rows = [_up(step, after) for step, after in pairwise(upward)]
    # The states are x and the one below it.
    return ReversibleLatent(*_carry(field, [x, x0], upward[:-1], rows, clamp, progress))


Row = tuple[float, float, float]  # the weights of x, of the state beyond it and of u(x)


def _carry(
    field: Field,
    states: list[Tensor],
    steps: Trajectory,
    rows: list[Row],
    clamp: float | None,
    progress: Progress | None,
) -> list[Tensor]:
    """``states`` are x and its neighbour, which x becomes when it moves on."""
    steps = tuple(step._replace(alpha_bar_next=0.0) for step in steps)
    weights = tuple((row, (1.0, 0.0, 0.0)) for row in rows)
    return combine(field, states, steps, weights, clamp=clamp, progress=progress)


def _down(before: Step, step: Step) -> Row:
    if step.use_gradient != before.use_gradient:
        return _ddim(step)
    a, b, c = _coefficients(step.alpha_bar_next, step.alpha_bar, before.alpha_bar)
    return b, a, -c


def _up(step: Step, after: Step) -> Row:
    a, b, c = _coefficients(step.alpha_bar_next, step.alpha_bar, after.alpha_bar)
    return -b / a, 1 / a, c / a


def _coefficients(low: float, middle: float, high: float) -> tuple[float, float, float]:
    """a, b, c of x_low = a x_high + b x_middle - c u(x_middle), from the three alpha_bar."""
    s_low, s_middle, s_high = ((1 / alpha_bar - 1) ** 0.5 for alpha_bar in (low, middle, high))
    h, h_above = s_middle - s_low, s_high - s_middle
    g = (h / h_above) ** 2
    return g * (low / high) ** 0.5, (1 - g) * (low / middle) ** 0.5, (h + g * h_above) * low**0.5


def _ddim(step: Step) -> Row:
    r = (step.alpha_bar_next / step.alpha_bar) ** 0.5
    return r, 0.0, (1 - step.alpha_bar_next) ** 0.5 - r * (1 - step.alpha_bar) ** 0.5


def _check(decoding: Trajectory) -> None:
    if len(decoding) < 2:
        raise UserError(f"belm needs at least 2 steps, not {len(decoding)}")
