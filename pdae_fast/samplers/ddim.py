"""DDIM and DDPM as pure functions over a field: a thing that returns (eps_hat, G).

A field is called as ``field(x, t, use_gradient)`` with x float32 [B, ...], an integer t and a flag; it returns
eps_hat and G of x's shape, and None for G when it was not asked for (or there is none). What conditions it (z, a
mixture of several z, nothing) is the field's business. State and arithmetic are float32 (float64 where x comes as
such, with a field that takes it); coefficients are computed in float64. Symbols and algorithm numbers are those of
PDAE (arXiv 2212.12990).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..schedule import Schedule, Step, Trajectory

Progress = Callable[[], None]
Noise = Callable[[], Tensor]  # a fresh standard normal of x's shape
Weights = tuple[tuple[tuple[float, ...], ...], ...]  # [S, n, n + 1], of `combine`


class Field(Protocol):
    def __call__(self, x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]: ...


def shifted_eps(eps: Tensor, gradient: Tensor | None, alpha_bar: float) -> Tensor:
    """eps' = eps - sqrt(1 - alpha_bar) G (Algorithm 3); eps itself without G."""
    return eps if gradient is None else eps - (1 - alpha_bar) ** 0.5 * gradient


def estimate_x0(field: Field, x: Tensor, step: Step, clamp: float | None = 1.0) -> Tensor:
    """x0_hat at x, clamped: what the solvers in data prediction integrate. One evaluation of ``field``."""
    eps, gradient = field(x, step.t, step.use_gradient)
    x0 = x / step.alpha_bar**0.5 - (1 / step.alpha_bar - 1) ** 0.5 * shifted_eps(eps, gradient, step.alpha_bar)
    return x0 if clamp is None else x0.clamp(-clamp, clamp)


def estimate_noise(field: Field, x: Tensor, step: Step, clamp: float | None = 1.0) -> Tensor:
    """u(x): the noise that leads from the clamped x0_hat to x, a function of x alone. One evaluation of ``field``."""
    eps, gradient = field(x, step.t, step.use_gradient)
    eps = shifted_eps(eps, gradient, step.alpha_bar)
    if clamp is None or step.alpha_bar == 1:  # where x is x0_hat, nothing else is to be had from it
        return eps
    scaled, ratio = x / step.alpha_bar**0.5, (1 / step.alpha_bar - 1) ** 0.5
    return (scaled - (scaled - ratio * eps).clamp(-clamp, clamp)) / ratio


def state(x: Tensor) -> Tensor:
    """x as the samplers carry it: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def ddim_step(
    x: Tensor,
    eps: Tensor,
    gradient: Tensor | None,
    alpha_bar: float,
    alpha_bar_next: float,
    clamp: float | None = 1.0,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One DDIM step from alpha_bar to alpha_bar_next, downward or upward (Algorithm 3).

    eps' = eps - sqrt(1 - alpha_bar) G; x0_hat = clamp(x / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) eps'); the noise
    that leads from that x0_hat to x then carries on. ``clamp`` None leaves x0_hat as it is. ``eta`` of the posterior's
    deviation is drawn anew, from a standard normal ``noise`` (DDIM, arXiv 2010.02502, eq. 12 and 16): downward only.
    """
    scaled, ratio = x / alpha_bar**0.5, (1 / alpha_bar - 1) ** 0.5
    x0 = scaled - ratio * shifted_eps(eps, gradient, alpha_bar)
    if clamp is not None:
        x0 = x0.clamp(-clamp, clamp)
    direction = (scaled - x0) / ratio
    if noise is None:
        return alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * direction
    variance = eta**2 * posterior_variance(alpha_bar, alpha_bar_next)
    return alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next - variance) ** 0.5 * direction + variance**0.5 * noise


def posterior_variance(alpha_bar: float, alpha_bar_next: float) -> float:
    """Variance of q(x_s | x_t, x_0), the process being that of the two points alone: beta_t (1 - alpha_bar_s) /
    (1 - alpha_bar_t)."""
    return (1 - alpha_bar / alpha_bar_next) * (1 - alpha_bar_next) / (1 - alpha_bar)


def ddpm_step(
    x: Tensor, eps: Tensor, gradient: Tensor | None, alpha_bar: float, alpha_bar_next: float, noise: Tensor | None
) -> Tensor:
    """One ancestral step (Algorithm 2): the mean from eps + c_t G, which shifts it by sigma_t^2 G, plus sigma_t noise.

    c_t = -sqrt(alpha_t) (1 - alpha_bar_s) / sqrt(1 - alpha_bar_t), alpha_t = alpha_bar_t / alpha_bar_s: not the
    coefficient of Algorithm 3. x0_hat is not clamped. ``noise`` None: the last step, which adds none.
    """
    alpha = alpha_bar / alpha_bar_next
    if gradient is not None:
        eps = eps - alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar) ** 0.5 * gradient
    mean = (x - (1 - alpha) / (1 - alpha_bar) ** 0.5 * eps) / alpha**0.5
    return mean if noise is None else mean + posterior_variance(alpha_bar, alpha_bar_next) ** 0.5 * noise


def integrate(
    field: Field,
    x: Tensor,
    trajectory: Trajectory,
    *,
    clamp: float | None = 1.0,
    eta: float = 0.0,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Carry x along the DDIM steps of ``trajectory``; with ``eta`` above 0, noise() is drawn for every step.

    A field that knows how to run whole trajectories (captured CUDA graphs) says so by a method ``integrate``, which
    computes the same steps; it clamps to the range of images or not at all.
    """
    own = getattr(field, "integrate", None)
    if own is not None and not eta and clamp in (None, 1.0):
        return own(x.float(), trajectory, clamp, progress)
    x = state(x)
    for step in trajectory:
        eps, gradient = field(x, step.t, step.use_gradient)
        drawn = noise() if eta else None
        x = ddim_step(x, eps, gradient, step.alpha_bar, step.alpha_bar_next, clamp, eta, drawn)
        if progress:
            progress()
    return x


def combine(
    field: Field,
    states: Sequence[Tensor],
    trajectory: Trajectory,
    weights: Weights,
    *,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Carry n ``states`` [B, ...] along a linear method, whose coefficients are all known before it starts.

    A step evaluates ``field`` at the first state. Where DDIM would go from there is the value found: x0_hat where the
    step's alpha_bar_next is 1, u where it is 0. The next states are sums of the states and this value, by the rows of
    the step's ``weights``, a matrix [n, n + 1] (a general linear method: Butcher, 1966).

    A field that knows how to run whole trajectories says so by a method ``combine``, as in :func:`integrate`.
    """
    own = getattr(field, "combine", None)
    if own is not None and clamp in (None, 1.0):
        return own(states, trajectory, weights, clamp, progress)
    states = [state(x) for x in states]
    for step, rows in zip(trajectory, weights, strict=True):
        estimate = estimate_x0 if step.alpha_bar_next else estimate_noise
        columns = [*states, estimate(field, states[0], step, clamp)]
        states = [_sum(row, columns) for row in rows]
        if progress:
            progress()
    return states


def _sum(row: Sequence[float], columns: list[Tensor]) -> Tensor:
    pairs = zip(row, columns, strict=True)
    first, *others = (column if weight == 1 else weight * column for weight, column in pairs if weight)
    return sum(others, first)


def ddim(
    field: Field,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    stop_percent: float = 0.0,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Decode: x_T -> x at t = 0, unclamped, by ``steps`` DDIM steps (Algorithm 3).

    G is used only while the remaining step index is at least int(stop_percent * steps): 0 uses it always, 1 never.
    """
    return integrate(field, x_T, schedule.decoding(steps, stop_percent), clamp=clamp, progress=progress)


def ddim_invert(
    field: Field,
    x0: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Infer x_T: the DDIM step run upward, the clean image taken to be at t = 0 (section 3.2 of the paper)."""
    return integrate(field, x0, schedule.inversion(steps), clamp=clamp, progress=progress)


def ddpm(
    field: Field, x_T: Tensor, trajectory: Trajectory, noise: Noise, *, progress: Progress | None = None
) -> Tensor:
    """Ancestral sampling (Algorithm 2) along ``trajectory`` (from Schedule.ancestral): x_T -> x at t = -1, unclamped.

    noise() is called for every step but the last.
    """
    x = state(x_T)
    for i, step in enumerate(trajectory, 1):
        eps, gradient = field(x, step.t, step.use_gradient)
        drawn = noise() if i < len(trajectory) else None
        x = ddpm_step(x, eps, gradient, step.alpha_bar, step.alpha_bar_next, drawn)
        if progress:
            progress()
    return x


def guided(field: Field, log_probability: Callable[[Tensor, int], Tensor], scale: float = 1.0) -> Field:
    """``field`` with classifier guidance: eps' = eps - sqrt(1 - alpha_bar_t) scale grad log p_t(y | x_t).

    That is the step of Algorithm 3 with the classifier's gradient where PDAE has G (section 2 of the paper), so the
    gradient is handed out as G, added to one that ``field`` has of its own, in the steps that use G.

    log_probability: a classifier that knows the noise of time t, as log p_t(y | x_t) of every image's own y:
    (x [B, ...], t) -> [B]; it is differentiated by autograd. The field runs step by step; it captures no graphs.
    """

    def evaluate(x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
        eps, gradient = field(x, t, use_gradient)
        if not use_gradient:
            return eps, None
        # Networks hand out tensors of inference mode, which autograd refuses.
        with torch.inference_mode(False), torch.enable_grad():
            point = x.detach().clone().requires_grad_(True)
            (ascent,) = torch.autograd.grad(log_probability(point, t).sum(), point)
        ascent = scale * ascent.to(eps.dtype)
        return eps, ascent if gradient is None else gradient + ascent

    return evaluate
