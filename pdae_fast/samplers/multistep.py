"""Higher-order decoders: exponential multistep methods in data prediction, one network evaluation a step.

With lambda = log(sqrt(alpha_bar / (1 - alpha_bar))), alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), the flow
that DDIM follows is, exactly,

    x' = (sigma' / sigma) x + alpha' (1 - exp(-h)) <x0_hat>,    h = lambda' - lambda,

<x0_hat> being the mean of x0_hat over the step with weight exp(lambda). A method is its estimate of that mean: a
weighted sum of values of x0_hat at points already evaluated. DDIM takes the last one.

DPM-Solver++ (arXiv 2211.01095) extrapolates through the last two (2M) or three (3M). UniPC (arXiv 2302.04867)
extrapolates likewise (UniP) and, when the networks have been evaluated at the end of the step, takes the step again
with that value among the points (UniC), which raises the order by one without another evaluation. Where a method has
two points to weigh, both papers take half of the difference of their values instead of the exact share; for UniPC that
is the variant B_2(h) = exp(h) - 1. With more points the weights are exact, and B(h) cancels. (The 3M formula in
circulation takes half of the second-derivative term, which makes it a method of order 2; this one has order 3.)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..schedule import Step, Trajectory
from .ddim import Field, Progress, Weights, combine


class Method(NamedTuple):
    """``order`` of the predictor; ``corrector``: whether every step is taken again with the value at its end."""

    order: int
    corrector: bool


# Below this many steps the last ones extrapolate less, as both papers' code does: the last step is the longest there.
FEW_STEPS = 15


class _Point(NamedTuple):
    """A value of x0_hat, as weights [n + 1] of what a step has."""

    log_snr: float
    x0: np.ndarray


def multistep(
    field: Field,
    x: Tensor,
    trajectory: Trajectory,
    method: Method,
    *,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Carry x along ``trajectory`` by ``method``. The first steps have the order that the points so far allow.

    Where G comes into use or out of it, x0_hat jumps: the points before are forgotten and the order starts again.
    """
    if len(trajectory) < method.order:
        raise UserError(f"a method of order {method.order} needs at least {method.order} steps, not {len(trajectory)}")
    steps, weights = _weights_of(trajectory, method)
    return combine(field, [x] * len(weights[0]), steps, weights, clamp=clamp, progress=progress)[0]


@functools.lru_cache(maxsize=8)
def _weights_of(trajectory: Trajectory, method: Method) -> tuple[Trajectory, Weights]:
    """(steps, weights) for :func:`combine`. The states are x, with a corrector the start of the step that led to it,
    and the values of x0_hat before, latest first."""
    before = 1 + method.corrector
    count = before + method.order - 1 + method.corrector
    x_predicted, *_, value = basis = np.eye(count + 1)
    history, weights = basis[before:-1], []
    known: list[float] = []  # the half log-SNR of the history
    previous = None
    for i, step in enumerate(trajectory):
        x, point = x_predicted, _Point(_log_snr(step.alpha_bar), value)
        points = [_Point(*pair) for pair in zip(known, history, strict=False)]
        if previous is not None and step.use_gradient != previous.use_gradient:
            points = []
        elif previous is not None and method.corrector:
            x = _advance(basis[1], previous, [point, *points])
        points = [point, *points][: method.order]
        if len(trajectory) < FEW_STEPS:
            points = points[: len(trajectory) - i]
        rows = [_advance(x, step, points), *[x] * method.corrector, value, *history]
        weights.append(tuple(tuple(map(float, row)) for row in rows[:count]))
        known, previous = [point.log_snr for point in points], step
    return tuple(step._replace(alpha_bar_next=1.0) for step in trajectory), tuple(weights)


def _advance(x: np.ndarray, step: Step, points: list[_Point]) -> np.ndarray:
    """x at the end of ``step`` with x0_hat interpolated through ``points``, of which one is the start of the step."""
    h = _log_snr(step.alpha_bar_next) - _log_snr(step.alpha_bar)
    weights = _weights([(point.log_snr - _log_snr(step.alpha_bar)) / h for point in points], h)
    mean = sum(weight * point.x0 for weight, point in zip(weights, points, strict=True))
    ratio = ((1 - step.alpha_bar_next) / (1 - step.alpha_bar)) ** 0.5
    return ratio * x - step.alpha_bar_next**0.5 * math.expm1(-h) * mean


def _weights(nodes: list[float], h: float) -> list[float]:
    """Weights of the values at ``nodes`` (in steps from the start of the step) in the mean of x0_hat over the step.

    The mean of the Lagrange polynomials with weight exp(h s), by Gauss-Legendre quadrature: exact to rounding for every
    h here, where the closed forms cancel for small ones. Two nodes: the mean of s is taken to be 1/2.
    """
    if len(nodes) == 1:
        return [1.0]
    if len(nodes) == 2:
        a, b = nodes
        return [(0.5 - b) / (a - b), (0.5 - a) / (b - a)]
    s, mass = np.polynomial.legendre.leggauss(24)
    s = (s + 1) / 2
    mass = mass * np.exp(h * (s - 1))
    mass /= mass.sum()
    return [
        float(mass @ np.prod([(s - other) / (node - other) for other in nodes if other != node], axis=0))
        for node in nodes
    ]


def _log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))
