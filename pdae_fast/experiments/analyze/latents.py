"""Is an inferred x_T still noise, and does it interpolate: numbers beside those of true normal noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...pipeline import Pipeline
from .. import interpolate

STATISTICS = {
    "mean": "mean",
    "std": "standard deviation",
    "excess_kurtosis": "excess kurtosis",
    "autocorrelation": "correlation of neighbouring pixels",
    "norm": "norm / sqrt(d)",
    "beyond_3_sigma": "share beyond 3 sigma",
    "shared": "correlation between images",
}
REFERENCE_DRAWS = 100


def noise_statistics(x_T: Tensor) -> dict[str, float]:
    """Statistics of x_T [N, C, H, W], all values pooled, in float64; `STATISTICS` says what they are in words.

    excess_kurtosis: fourth central moment over the squared variance, minus 3 (biased, as scipy's default).
    autocorrelation: Pearson's, of each pixel and its right, and its lower, neighbour, the mean of the two. norm: mean
    over images of ||x_T|| / sqrt(d). beyond_3_sigma: share of |x_T| > 3. shared: mean over pairs of images of the
    correlation of their x_T (NaN for one image); what all images have in common, such as a background, shows in it.
    """
    x = x_T.double()
    N, mean = len(x), float(x.mean())
    centred = x - mean
    variance = float(centred.square().mean())
    across = float((centred[..., :, 1:] * centred[..., :, :-1]).mean())
    down = float((centred[..., 1:, :] * centred[..., :-1, :]).mean())
    flat = x.flatten(1)
    own = flat - flat.mean(1, keepdim=True)
    unit = own / own.norm(dim=1, keepdim=True).clamp_min(1e-300)
    between = float((unit.sum(0).square().sum() - N) / (N * (N - 1))) if N > 1 else float("nan")
    return {
        "mean": mean,
        "std": variance**0.5,
        "excess_kurtosis": float((centred**4).mean()) / variance**2 - 3,
        "autocorrelation": (across + down) / 2 / variance,
        "norm": float(flat.norm(dim=1).mean()) / flat.shape[1] ** 0.5,
        "beyond_3_sigma": float((x.abs() > 3).double().mean()),
        "shared": between,
    }


def noise_reference(shape: Sequence[int], draws: int = REFERENCE_DRAWS, seed: int = 0) -> dict[str, dict[str, float]]:
    """`noise_statistics` of true normal noise of ``shape`` [N, C, H, W]: mean and standard deviation over ``draws``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [noise_statistics(torch.randn(tuple(shape), generator=generator)) for _ in range(draws)]
    table = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return {name: {"mean": float(v.mean()), "standard_deviation": float(v.std())} for name, v in table.items()}


def interpolations(pipe: Pipeline, z: Tensor, x_T: Tensor, points: int) -> Tensor:
    """Images [N // 2, points, C, H, W] between neighbours 0 and 1, 2 and 3, ..., ends included, by lerp of z [N, D]
    and slerp of x_T [N, ...] (as `Pipeline.invert` gives it; a pair of states turns as one)."""
    ends = 2 * (len(z) // 2)
    pairs = (values[:ends].unflatten(0, (-1, 2)).transpose(0, 1) for values in (z, x_T))
    return pipe.blend(*pairs, torch.linspace(0, 1, points), "latent")


def smoothness(pipe: Pipeline, z: Tensor, x: Tensor) -> dict[str, Tensor]:
    """How even the paths x [P, points, C, H, W] of `interpolations` between z [N, D] are; one number a pair [P].

    length, largest_step: as `interpolate.smoothness` has them: both 1 for a cross-fade of pixels; noise that comes and
    goes makes a path longer. code: distance of the middle image's own z from the middle of the two, over the distance
    of the two; 0 is what z promises. roughness: mean squared difference of neighbouring pixels of the middle image
    over that of the ends; a cross-fade is below 1, noise above.
    """
    paths = [interpolate.smoothness(frames) for frames in x]
    middle = x.shape[1] // 2
    w = middle / (x.shape[1] - 1)
    a, b = z[: 2 * len(x)].double().unflatten(0, (-1, 2)).unbind(1)
    found = pipe.encode(x[:, middle].clamp(-1, 1)).double()
    return {
        **{name: torch.tensor([path[name] or float("nan") for path in paths]) for name in ("length", "largest_step")},
        "code": (found - ((1 - w) * a + w * b)).norm(dim=1) / (b - a).norm(dim=1),
        "roughness": _rough(x[:, middle]) / ((1 - w) * _rough(x[:, 0]) + w * _rough(x[:, -1])),
    }


def _rough(x: Tensor) -> Tensor:
    x = x.double()
    across, down = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    return across.square().flatten(1).mean(1) + down.square().flatten(1).mean(1)


def mean_and_error(values: dict[str, Tensor]) -> dict[str, Any]:
    """Mean of each, and its standard error (None for a single pair)."""
    return {
        name: {"mean": float(v.mean()), "standard_error": float(v.std() / len(v) ** 0.5) if len(v) > 1 else None}
        for name, v in values.items()
    }
