"""Inferring x_T accurately: every step of the DDIM decoder solved for where it started, instead of run upward.

The published inversion (:func:`ddim.ddim_invert`) evaluates the networks at the lower end of a step, where the
decoder evaluates them at the upper end: an error of first order in the step, which is why it takes up to 999 of them.
Here x_t is found from x_s, s < t, such that the decoder's own step from t leads to x_s. With
sigma = sqrt(1 - alpha_bar) and r = sqrt(alpha_bar_t / alpha_bar_s) that step is

    x_s = x_t / r + (sigma_s - sigma_t / r) u(x_t),

u being the noise that Algorithm 3 re-derives from the clamped x0_hat, so x_t is the fixed point of

    x_t = r x_s + (sigma_t - r sigma_s) u(x_t).

Written in u the map contracts: where x0_hat is clamped, its slope is 1 - r sigma_s / sigma_t, and elsewhere it is
smaller by as much as the networks denoise. (Written in x0_hat the same fixed point has the gain sigma / sqrt(alpha_bar)
and diverges at high noise.) The first guess is the u of the step below, which makes the first iterate the published
step; the second and later ones are extrapolated by Anderson's rule with one previous iterate.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..schedule import Step, Trajectory
from .ddim import Field, Progress, combine, estimate_noise, state

MAX_EXTRAPOLATION = 2.0  # beyond it two residuals in a row were nearly the same, and their difference is rounding


class Inversion(NamedTuple):
    """``x_T`` [B, C, H, W]; ``residual`` [S, B], lowest step first: by how much (RMS) the decoder's step from the last
    point that was evaluated misses the x below it; ``evaluations`` of the networks, for every image alike."""

    x_T: Tensor
    residual: Tensor
    evaluations: int


def invert_implicit(
    field: Field,
    x0: Tensor,
    decoding: Trajectory,
    *,
    iterations: int = 2,
    tolerance: float = 0.0,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> Inversion:
    """x_T from which ``decoding`` (from Schedule.decoding) leads to ``x0`` [B, C, H, W], the clean image at t = 0.

    Every step takes ``iterations`` evaluations, fewer when all images miss by no more than ``tolerance``: at most
    1 + iterations * len(decoding) in all. The point that the last evaluation points to is taken, unless the residual
    of an image grew: then the best point that was evaluated, the published step among them, is kept for that image.
    Raises UserError for fewer than one iteration or a negative tolerance.
    """
    if iterations < 1:
        raise UserError(f"iterations must be at least 1, not {iterations}")
    if not tolerance >= 0:
        raise UserError(f"tolerance must not be negative, not {tolerance}")
    x, residuals, evaluations = state(x0), [], 1
    u = estimate_noise(field, x, _below(decoding), clamp)
    if progress:
        progress()
    for step in reversed(decoding):
        r, gain = _move(step)
        solver = _FixedPoint(u)
        for _ in range(iterations):
            solver.add(estimate_noise(field, r * x + gain * solver.u, step, clamp))
            evaluations += 1
            if progress:
                progress()
            # A residual in u is one of gain / r in the x below.
            if bool((gain / r * solver.residual <= tolerance).all()):
                break
        u = solver.result()
        x = r * x + gain * u
        residuals.append(gain / r * solver.residual)
    return Inversion(x, torch.stack(residuals), evaluations)


def invert_once(
    field: Field, x0: Tensor, decoding: Trajectory, *, clamp: float | None = 1.0, progress: Progress | None = None
) -> Tensor:
    """x_T as :func:`invert_implicit` finds it with one iteration a step, which is a linear method: every u is taken at
    the point to which the u before it leads."""
    upward = (_below(decoding), *reversed(decoding))
    moves = [(1.0, 0.0), *(_move(step) for step in reversed(decoding)), (1.0, 0.0)]
    # The states are that point, which at last is x itself, and x.
    weights = tuple(((0.0, s * r, s * gain + h), (0.0, r, gain)) for (r, gain), (s, h) in pairwise(moves))
    steps = tuple(step._replace(alpha_bar_next=0.0) for step in upward)
    return combine(field, [x0, x0], steps, weights, clamp=clamp, progress=progress)[0]


def _below(decoding: Trajectory) -> Step:
    """Where the decoding ends."""
    last = decoding[-1]
    return Step(0, last.alpha_bar_next, last.alpha_bar, last.use_gradient)


def _move(step: Step) -> tuple[float, float]:
    """r and the gain of u, of the fixed point."""
    r = (step.alpha_bar / step.alpha_bar_next) ** 0.5
    return r, (1 - step.alpha_bar) ** 0.5 - r * (1 - step.alpha_bar_next) ** 0.5


class _FixedPoint:
    """u = U(u) by Anderson's rule with one previous iterate, every image for itself.

    ``u`` is the next point to evaluate; ``residual`` [B] the RMS of U(u) - u at the last one that was.
    """

    def __init__(self, guess: Tensor) -> None:
        self.u, self.best = guess, guess
        self.residual = self.least = guess.new_full((len(guess),), float("inf"))
        self.grew = torch.zeros_like(self.residual, dtype=torch.bool)
        self.previous: tuple[Tensor, Tensor] | None = None

    def add(self, found: Tensor) -> None:
        """Take note of U(``u``) and move on to the next ``u``."""
        difference = found - self.u
        residual = difference.square().flatten(1).mean(1).sqrt()
        self.grew = self.grew | ~(residual <= self.residual)
        better = residual < self.least
        self.best = _where(better, self.u, self.best)
        self.least = torch.where(better, residual, self.least)
        self.residual = residual
        following = found
        if self.previous is not None:
            old_found, old_difference = self.previous
            change = difference - old_difference
            weight = (_dot(difference, change) / _dot(change, change).clamp_min(1e-30)).clamp(
                -MAX_EXTRAPOLATION, MAX_EXTRAPOLATION
            )
            following = found - weight * (found - old_found)
        self.previous, self.u = (found, difference), following

    def result(self) -> Tensor:
        """The next point, or the best one evaluated for images whose residual grew."""
        self.residual = torch.where(self.grew, self.least, self.residual)
        return _where(self.grew, self.best, self.u)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of every image's values, [B, 1, ...]."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))
