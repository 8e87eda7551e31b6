"""Samplers as pure functions over a field: a thing that returns (eps_hat, G).

A field is called as ``field(x, t, use_gradient)`` with x float32 [B, ...], an integer t and a flag; it returns
eps_hat and G of x's shape, and None for G when it was not asked for (or there is none). What conditions it (z, a
mixture of several z, nothing) is the field's business. State and arithmetic are float32 (float64 where x comes as
such, with a field that takes it); coefficients are computed in float64. Symbols and algorithm numbers are those of
PDAE (arXiv 2212.12990).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .config import check_noise
from .schedule import Schedule, Step, Trajectory

Progress = Callable[[], None]


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
    if clamp is None:
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
) -> Tensor:
    """One deterministic DDIM step from alpha_bar to alpha_bar_next, downward or upward (Algorithm 3).

    eps' = eps - sqrt(1 - alpha_bar) G; x0_hat = clamp(x / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) eps'); the noise
    that leads from that x0_hat to x then carries on. ``clamp`` None leaves x0_hat as it is.
    """
    scaled, ratio = x / alpha_bar**0.5, (1 / alpha_bar - 1) ** 0.5
    x0 = scaled - ratio * shifted_eps(eps, gradient, alpha_bar)
    if clamp is not None:
        x0 = x0.clamp(-clamp, clamp)
    direction = (scaled - x0) / ratio
    return alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * direction


def integrate(
    field: Field,
    x: Tensor,
    trajectory: Trajectory,
    *,
    clamp: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Carry x along the DDIM steps of ``trajectory``.

    A field that knows how to run whole trajectories (captured CUDA graphs) says so by a method ``integrate``, which
    computes the same steps; it clamps to the range of images or not at all.
    """
    own = getattr(field, "integrate", None)
    if own is not None and clamp in (None, 1.0):
        return own(x.float(), trajectory, clamp, progress)
    x = state(x)
    for step in trajectory:
        eps, gradient = field(x, step.t, step.use_gradient)
        x = ddim_step(x, eps, gradient, step.alpha_bar, step.alpha_bar_next, clamp)
        if progress:
            progress()
    return x


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
    field: Field,
    x_T: Tensor,
    schedule: Schedule,
    noise: Callable[[], Tensor],
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling over all T steps (Algorithm 2): mean from eps + c_t G, plus sigma_t noise; no clamp.

    ``noise()`` returns a fresh standard normal of x_T's shape; it is called T - 1 times.
    """
    x = x_T.float()
    for t in range(schedule.T - 1, -1, -1):
        eps, gradient = field(x, t, True)
        if gradient is not None:
            eps = eps + float(schedule.shift_coef[t]) * gradient
        beta, alpha, alpha_bar = (float(a[t]) for a in (schedule.beta, schedule.alpha, schedule.alpha_bar))
        x = (x - beta / (1 - alpha_bar) ** 0.5 * eps) / alpha**0.5
        if t > 0:
            x = x + float(np.exp(0.5 * schedule.posterior_log_variance_clipped[t])) * noise()
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


def lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """(1 - w) a + w b; a and b broadcast against each other, weight [B]."""
    w = weight.view(-1, *[1] * (max(a.ndim, b.ndim) - 1))
    return (1 - w) * a + w * b


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation over all dimensions but the first; a and b [1 or B, ...], weight [B].

    Falls back to :func:`lerp` where the two are (nearly) parallel.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    theta = torch.acos(cosine)
    sine = torch.sin(theta)
    w = weight.double()
    parallel = sine < 1e-4
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    weight_a = torch.where(parallel, 1 - w, torch.sin((1 - w) * theta) / safe)
    weight_b = torch.where(parallel, w, torch.sin(w * theta) / safe)
    shape = (-1, *[1] * (a.ndim - 1))
    return (weight_a.view(shape) * a.double() + weight_b.view(shape) * b.double()).to(a.dtype)


class ImageNoise:
    """Standard normal noise with one generator per image, so that results do not depend on how a batch is split.

    Image number ``indices[k]`` of seed ``seed`` gets the same draws whatever else is in its batch, on every device
    (drawn on the CPU). Calling the object returns float32 [len(indices), *shape].
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.device = tuple(shape), device
        states = [np.random.SeedSequence((seed, int(i))).generate_state(1, np.uint64)[0] for i in indices]
        self.generators = [torch.Generator().manual_seed(int(state) >> 1) for state in states]

    def __call__(self) -> Tensor:
        if not self.generators:
            return torch.empty(0, *self.shape, device=self.device)
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def standardise(x: Tensor) -> Tensor:
    """x [B, C, H, W] shifted and scaled to mean 0 and standard deviation 1 in every channel of every image."""
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    return (x - mean) * variance.clamp_min(torch.finfo(x.dtype).tiny).rsqrt()


def random_noise(kind: str, draws: Tensor) -> Tensor:
    """x_T of one of config.NOISES from standard normal ``draws`` [B, C, H, W].

    "normal" is those draws, as published. "standardised" takes from them the little by which the mean and the spread of
    a finite map differ from 0 and 1. A U-Net whose norms have few channels in a group does not see that difference (a
    norm takes away just these two numbers) and leaves it in eps_hat, where 1 / sqrt(SNR) turns it into speckles and
    wrong colours. Not in the paper.
    """
    check_noise(kind)
    return standardise(draws) if kind == "standardised" else draws
