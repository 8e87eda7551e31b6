"""The diffusion process: constants built in float64, and the step spacing of the published sampler."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import as_int, as_number
from .config import ScheduleConfig
from .errors import UserError


def _betas(config: ScheduleConfig) -> np.ndarray:
    T, kind = config.timesteps, config.kind
    if kind == "stored":
        betas = np.array(config.betas, dtype=np.float64)
    elif kind == "constant":
        betas = np.full(T, 0.008, dtype=np.float64)
    elif kind == "cosine":

        def alpha_bar(u: float) -> float:  # arXiv 2102.09672 eq. 17
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)], np.float64)
    else:
        start, end = config.beta_start, config.beta_end
        if start is None:
            scale = 1 if kind == "sigmoid" else 1000 / T
            start, end = scale * 1e-4, min(scale * 0.02, 0.999)
        if kind == "sigmoid":
            betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T, dtype=np.float64)))
        elif kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, T, dtype=np.float64) ** 2
        else:
            betas = np.linspace(start, end, T, dtype=np.float64)
    return _zero_terminal(betas) if config.zero_terminal_snr else betas


def _zero_terminal(betas: np.ndarray) -> np.ndarray:
    """arXiv 2305.08891, algorithm 1: sqrt(alpha_bar) keeps its first value and ends at 0."""
    root = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


SPACINGS = ("uniform", "quadratic", "logsnr", "karras", "strided", "respaced")
# guided-diffusion's: N points are N steps, for every point is evaluated. Decoding ends at alpha_bar = 1, with x0_hat
# itself, and DDIM upward at alpha_bar = 0, with eps itself. With the others N steps join N + 1 points and end there.
WHOLE = ("strided", "respaced")
KARRAS_RHO = 7  # arXiv 2206.00364, section 3


class Step(NamedTuple):
    """One DDIM step: the networks see time ``t``; the state goes from ``alpha_bar`` to ``alpha_bar_next``."""

    t: int
    alpha_bar: float
    alpha_bar_next: float
    use_gradient: bool


Trajectory = tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Constants of q(x_t | x_0), indexed by t = 0 ... T-1, all float64 [T]; alpha_bar at t = -1 is 1.

    ``shift_coef`` is c_t = -sqrt(alpha_t) (1 - alpha_bar_{t-1}) / sqrt(1 - alpha_bar_t), which turns G into a shift of
    eps in the training objective and in ancestral sampling (Algorithms 1 and 2). ``loss_weight`` is
    lambda_t = SNR_t^0.1 / (1 + SNR_t).
    """

    beta: np.ndarray
    alpha: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_x0: np.ndarray
    posterior_mean_xt: np.ndarray
    shift_coef: np.ndarray
    loss_weight: np.ndarray

    @property
    def T(self) -> int:
        return len(self.beta)

    @property
    def half_log_snr(self) -> np.ndarray:
        """lambda_t = log(sqrt(alpha_bar_t / (1 - alpha_bar_t))), falling with t; up to `last`."""
        alpha_bar = self.alpha_bar[: self.last + 1]
        return 0.5 * np.log(alpha_bar / (1 - alpha_bar))

    @property
    def last(self) -> int:
        """The largest t at which x_t still holds something of x_0, where eps therefore tells x_0: T - 1, or T - 2 with
        a zero terminal SNR."""
        return self.T - 1 if self.alpha_bar[-1] > 0 else self.T - 2

    def to_eps(self, prediction: str) -> np.ndarray | None:
        """float64 [T, 2], the factors of x_t and of a network's output whose sum is eps; None where it is eps.

        v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512, appendix D), "sample" is x_0.
        """
        signal, spread = np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)
        if prediction == "v_prediction":
            return np.stack([spread, signal], axis=1)
        return np.stack([1 / spread, -signal / spread], axis=1) if prediction == "sample" else None

    def timesteps(self, steps: int, spacing: str = "uniform") -> np.ndarray:
        """Time points of an S-step trajectory, ascending from 0 to T-1 (see `last`), int64 [<= S+1], [S] if in WHOLE.

        "uniform": unique(int(linspace(0, T-1, S+1))), as published. "quadratic": the same with the square of
        linspace(0, 1, S+1) (DDIM, arXiv 2010.02502, appendix D.2): more points where there is little noise. "logsnr":
        equal steps of :attr:`half_log_snr` (DPM-Solver, arXiv 2206.00927, section 3.4). "karras": equal steps of
        sigma^(1/7), sigma = sqrt((1 - alpha_bar) / alpha_bar) (EDM, arXiv 2206.00364, eq. 5). The networks know whole
        t only, so the last three are rounded to the nearest, and points that fall together are one: at many steps
        there are then fewer of them than asked for, and as many evaluations fewer.

        Two are guided-diffusion's, whose points are S (see WHOLE). "strided" ("ddimS" there, and Diff-AE's): every
        n-th from 0, up to no more than T-1, n being the smallest for which they are S; UserError where no n is.
        "respaced": S evenly from 0 to T-1, rounded.
        """
        steps = as_int("steps", steps, 1, self.last + 1)
        if spacing == "strided":
            return self._strided(steps)
        if spacing == "respaced":
            return np.rint(np.arange(steps) * (self.last / max(1, steps - 1))).astype(np.int64)
        share = np.linspace(0, 1, steps + 1)
        if spacing == "uniform":
            return np.unique(np.linspace(0, self.last, steps + 1).astype(np.int64))
        if spacing == "quadratic":
            return np.unique(np.rint(self.last * share**2).astype(np.int64))
        ends = self.half_log_snr[[0, -1]]
        if spacing == "logsnr":
            return self._nearest(ends[0] + share * (ends[1] - ends[0]))
        if spacing == "karras":
            low, high = np.exp(-ends / KARRAS_RHO)
            return self._nearest(-KARRAS_RHO * np.log(low + share * (high - low)))
        raise UserError(f"spacing {spacing!r} is not known; expected {', '.join(SPACINGS[:-1])} or {SPACINGS[-1]}")

    def _strided(self, steps: int) -> np.ndarray:
        count = self.last + 1
        stride = -(-count // steps)
        if -(-count // stride) != steps:
            fewer, more = -(-count // stride), -(-count // (stride - 1))
            raise UserError(
                f"steps {steps}: no stride gives so many of {count} time points; expected {fewer} or {more} with the "
                "spacing strided"
            )
        return np.arange(0, count, stride)

    def _nearest(self, half_log_snr: np.ndarray) -> np.ndarray:
        # It falls with t, and np.interp wants rising abscissae.
        t = np.interp(-half_log_snr, -self.half_log_snr, np.arange(self.last + 1))
        return np.unique(np.rint(t).astype(np.int64))

    def decoding(self, steps: int, stop_percent: float = 0.0, spacing: str = "uniform") -> Trajectory:
        """The steps of Algorithm 3, from T to 0.

        G is used only while the remaining step index is at least int(stop_percent * steps): 0 uses it always, 1 never.
        """
        points = self.timesteps(steps, spacing)
        ends = self.alpha_bar[points[:-1]]
        if spacing in WHOLE:
            ends = np.append(1.0, ends)
        return self._down(points[-len(ends) :], ends, _stop(stop_percent, steps))

    def ancestral(self, steps: int, stop_percent: float = 0.0, spacing: str = "uniform") -> Trajectory:
        """The steps of Algorithm 2, from T - 1 down to alpha_bar = 1: all T of them, or those of a respaced process.

        Whatever the spacing it takes the last step too, from t = 0 to the clean image: S points, S evaluations.
        """
        if steps < 2:
            raise UserError(f"ancestral sampling needs at least 2 steps, not {steps}")
        points = self.timesteps(steps if spacing in WHOLE else steps - 1, spacing)
        return self._down(points, np.append(1.0, self.alpha_bar[points[:-1]]), _stop(stop_percent, steps))

    def inversion(self, steps: int, spacing: str = "uniform") -> Trajectory:
        """The same steps upward, the clean image taken to be at the first point (section 3.2 of the paper)."""
        points = self.timesteps(steps, spacing)
        ends = self.alpha_bar[points[1:]]
        if spacing in WHOLE:
            ends = np.append(ends, 0.0)
        return tuple(self._step(t, end, True) for t, end in zip(points[: len(ends)], ends, strict=True))

    def _down(self, points: np.ndarray, ends: np.ndarray, stop: int) -> Trajectory:
        """From each of ``points`` to the alpha_bar in ``ends``, last one first; G from step index ``stop`` on."""
        steps = [self._step(t, end, i >= stop) for i, (t, end) in enumerate(zip(points, ends, strict=True))]
        return tuple(reversed(steps))

    def _step(self, t: int, end: float, use_gradient: bool) -> Step:
        return Step(int(t), float(self.alpha_bar[t]), float(end), use_gradient)


def _stop(stop_percent: float, steps: int) -> int:
    """The least remaining step index at which G is still used."""
    return int(as_number("stop_percent", stop_percent, 0, 1) * steps)


@functools.lru_cache(maxsize=8)
def build_schedule(config: ScheduleConfig) -> Schedule:
    """All constants of ``config``, in float64."""
    beta = _betas(config)
    alpha = 1 - beta
    alpha_bar = np.cumprod(alpha)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    one_minus = 1 - alpha_bar
    posterior_variance = beta * (1 - alpha_bar_prev) / one_minus
    snr = alpha_bar / one_minus
    arrays = {
        "beta": beta,
        "alpha": alpha,
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": alpha_bar_prev,
        "posterior_variance": posterior_variance,
        # The variance is 0 at t = 0, where no noise is added anyway.
        "posterior_log_variance_clipped": np.log(np.append(posterior_variance[1], posterior_variance[1:])),
        "posterior_mean_x0": beta * np.sqrt(alpha_bar_prev) / one_minus,
        "posterior_mean_xt": (1 - alpha_bar_prev) * np.sqrt(alpha) / one_minus,
        "shift_coef": -np.sqrt(alpha) * (1 - alpha_bar_prev) / np.sqrt(one_minus),
        "loss_weight": snr**0.1 / (1 + snr),
    }
    for array in arrays.values():
        array.setflags(write=False)
    return Schedule(**arrays)


class Tables(nn.Module):
    """The constants of ``schedule`` that training gathers at t, float32 [T], rounded once from float64; ``to_eps``
    [T, 2], the factors that make eps of what a network of that ``prediction`` says (Schedule.to_eps), or None.

    Buffers, so that they go where the networks go and no step has to copy them there; no part of any state dict.
    """

    def __init__(self, schedule: Schedule, prediction: str = "epsilon") -> None:
        super().__init__()
        to_eps = schedule.to_eps(prediction)
        factors = None if to_eps is None else torch.from_numpy(to_eps).float()
        self.register_buffer("to_eps", factors, persistent=False)
        for name, values in (
            ("signal", schedule.alpha_bar**0.5),
            ("spread", (1 - schedule.alpha_bar) ** 0.5),
            ("shift_coef", schedule.shift_coef),
            ("loss_weight", schedule.loss_weight),
        ):
            self.register_buffer(name, torch.from_numpy(values.copy()).float(), persistent=False)


def as_tables(schedule: Schedule | Tables, device: torch.device, prediction: str = "epsilon") -> Tables:
    return schedule if isinstance(schedule, Tables) else Tables(schedule, prediction).to(device)


def column(values: Tensor, t: Tensor, ndim: int = 4) -> Tensor:
    """Constants [T] gathered at t [B] -> [B, 1, ...] of ``ndim`` dimensions."""
    return values[t].reshape(-1, *(1,) * (ndim - 1))


def q_sample(schedule: Schedule | Tables, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise; x0 and noise [B, ...], t int64 [B]."""
    tables = as_tables(schedule, x0.device)
    return column(tables.signal, t, x0.ndim) * x0 + column(tables.spread, t, x0.ndim) * noise
