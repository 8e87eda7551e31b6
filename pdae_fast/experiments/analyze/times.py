"""What the networks say about noisy images at many t: one pass for all analyses over time."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data import none_read, stream
from ...errors import UserError
from ...files import atomic_write
from ...pipeline import Pipeline
from ...samplers.noise import ImageNoise, random_noise
from ...schedule import Schedule, q_sample

RANGES = 10  # into which t is divided for summaries
RESAMPLES = 1000


class Point(NamedTuple):
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise of a batch, and what the networks answer; all
    float32 [B, C, H, W] on the pipeline's device."""

    t: int
    x0: Tensor
    x_t: Tensor
    noise: Tensor
    eps: Tensor
    gradient: Tensor


def time_grid(T: int, count: int) -> list[int]:
    """``count`` times from 0 to T - 1, equally spaced and rounded, ascending; UserError for fewer than 2 or over T."""
    if not 2 <= count <= T:
        raise UserError(f"--times must be between 2 and {T}, not {count}")
    return np.rint(np.linspace(0, T - 1, count)).astype(int).tolist()


def noise_at(seed: int, t: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draws for the noise of x_t [B, *shape]: image k has the same at t whatever else is computed, others elsewhere."""
    # Streams 0 and 1 are x_T's and z_T's.
    return ImageNoise(seed, indices, shape, stream=(t + 2) * 2**32)()


def points(
    pipe: Pipeline, x0: Tensor, times: Sequence[int], noise: Callable[[int], Tensor], advance: Callable[[int], Any]
) -> Iterator[Point]:
    """One Point for each of ``times``; x0 [B, C, H, W] in [-1, 1], all in one batch, noise(t) of the same shape:
    standard normal draws, of which the pipeline's kind of noise is made (`noise.random_noise`).

    z is E(x0). One evaluation of trunk and both decoders for each t.
    """
    schedule, device = pipe.schedule, pipe.device
    pipe.plan.prepare(times)
    z = pipe.encode(x0)
    x0 = x0.float().to(device)
    for t in times:
        field = pipe.field(z)  # a new one: reuse between neighbouring times would not be what is measured
        eps_true = random_noise(pipe.noise, noise(t)).to(device)
        x_t = q_sample(schedule, x0, torch.full((len(x0),), t, dtype=torch.int64, device=device), eps_true)
        eps, gradient = field(x_t, t, True)
        yield Point(t, x0, x_t, eps_true, eps, gradient)
        advance(len(x0))


Measure = Callable[[Schedule, Point], dict[str, Tensor]]


def measure(
    pipe: Pipeline,
    dataset: Any,
    times: Sequence[int],
    function: Measure,
    *,
    seed: int = 0,
    on_error: str = "skip",
    broken: list | None = None,
    advance: Callable[[int], Any] = lambda n: None,
) -> dict[str, np.ndarray]:
    """``function`` of every image at every one of ``times``: {name: float64 [len(times), N]}, images in order.

    Memory holds one batch of images and the numbers. Raises UserError when no image can be read.
    """
    broken = [] if broken is None else broken
    gathered: dict[str, list[np.ndarray]] = {}
    first = 0
    for batch in stream(dataset, pipe.batch_size, on_error, broken):
        indices = range(first, first + len(batch.images))
        first += len(batch.images)
        columns: dict[str, list[np.ndarray]] = {}
        shape = batch.images.shape[1:]
        drawn = points(pipe, batch.images, times, lambda t, i=indices, s=shape: noise_at(seed, t, i, s), advance)
        for point in drawn:
            for name, values in function(pipe.schedule, point).items():
                columns.setdefault(name, []).append(values.double().cpu().numpy())
        for name, values in columns.items():
            gathered.setdefault(name, []).append(np.stack(values))
    if not first:
        raise none_read(broken)
    found = {name: np.concatenate(parts, axis=1) for name, parts in gathered.items()}
    for name, values in found.items():
        if not np.isfinite(values).all():
            t = times[int(np.argmin(np.isfinite(values).all(axis=1)))]
            raise UserError(f"{name} is not finite at t = {t}; try --dtype float32")
    return found


# -- two curves compared -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A number with and without the shift, each [len(times), N]: smaller is better."""

    times: Sequence[int]
    without: np.ndarray
    with_shift: np.ndarray

    def factor(self, seed: int = 0) -> dict[str, float]:
        """How many times smaller the average over all times and images is with the shift, with its 95% interval over
        resampled images (percentile bootstrap). "typical": the geometric mean over times of the factor at each, which
        the few times with the largest values do not decide."""
        found = self._factor(np.ones(len(self.times), dtype=bool), seed)
        at_each = self.without.mean(axis=1) / self.with_shift.mean(axis=1)
        return {**found, "typical": float(np.exp(np.log(at_each).mean()))}

    def ranges(self, T: int, seed: int = 0) -> list[dict[str, float]]:
        """`factor` in each tenth of t that holds any of the times."""
        times, rows = np.asarray(self.times), []
        for k in range(RANGES):
            low, high = k * T // RANGES, (k + 1) * T // RANGES
            inside = (times >= low) & (times < high)
            if inside.any():
                rows.append({"from": low, "to": high - 1, "times": int(inside.sum()), **self._factor(inside, seed)})
        return rows

    def _factor(self, inside: np.ndarray, seed: int) -> dict[str, float]:
        a, b = (values[inside].mean(axis=0) for values in (self.without, self.with_shift))  # [N]
        N = len(a)
        weights = np.random.default_rng((seed, 8)).multinomial(N, np.full(N, 1 / N), RESAMPLES)
        low, high = np.percentile((weights @ a) / (weights @ b), [2.5, 97.5])
        return {
            "without": float(a.mean()),
            "with": float(b.mean()),
            "factor": float(a.mean() / b.mean()),
            "low": float(low),
            "high": float(high),
        }

    def rows(self) -> list[dict[str, float]]:
        """For every t the means over images, their standard errors and the factor between them."""
        N = self.without.shape[1]
        spread = [v.std(axis=1, ddof=1) / N**0.5 if N > 1 else np.full(len(v), np.nan) for v in self._both()]
        means = [v.mean(axis=1) for v in self._both()]
        return [
            {
                "t": int(t),
                "without": float(means[0][i]),
                "without_standard_error": float(spread[0][i]),
                "with": float(means[1][i]),
                "with_standard_error": float(spread[1][i]),
                "factor": float(means[0][i] / means[1][i]),
            }
            for i, t in enumerate(self.times)
        ]

    def _both(self) -> tuple[np.ndarray, np.ndarray]:
        return self.without, self.with_shift


def write_csv(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> None:
    """``rows`` with all their keys as header; floats in full, what is missing or not finite as an empty cell."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(row.get(name)) for name in header] for row in rows)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return f"{value:.9g}" if isinstance(value, float) else value


def per_image(values: Tensor) -> Tensor:
    """Mean over all but the first dimension, in float64."""
    return values.double().flatten(1).mean(1)
