"""New images from a latent DPM, and figures of their quality that need nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..pipeline import Pipeline
from . import common

REFERENCE_IMAGES = 2000
_PAIRS = 2**24  # distances at a time


class Samples(NamedTuple):
    """``images`` [B, C, H, W]: numbers ``first`` ... ``first + B - 1``."""

    first: int
    images: Tensor


def sample(
    pipe: Pipeline,
    count: int,
    *,
    stop_percent: float = 0.3,
    latent_steps: int | None = None,
    latent_clamp: bool = True,
    seed: int = 0,
) -> Iterator[Samples]:
    """``count`` images by `Pipeline.sample` in blocks; the same images however large the blocks are."""
    options = {"stop_percent": stop_percent, "latent_steps": latent_steps, "latent_clamp": latent_clamp, "seed": seed}
    return _blocks(pipe, count, lambda first, n: pipe.sample(n, first=first, **options))


def sample_prior(pipe: Pipeline, count: int, seed: int = 0) -> Iterator[Samples]:
    """The same by the prior alone, from the same x_T: no z, and G is not run."""
    return _blocks(pipe, count, lambda first, n: pipe.decode(count=n, seed=seed, first=first))


def _blocks(pipe: Pipeline, count: int, draw: Callable[[int, int], Tensor]) -> Iterator[Samples]:
    for first in range(0, count, pipe.batch_size):
        x = draw(first, min(pipe.batch_size, count - first))
        if not bool(torch.isfinite(x).all()):
            raise UserError("the sampled images hold NaN or infinite values; try --dtype float32")
        yield Samples(first, x)


# -- the data they are compared with -------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Images [M, C, H, W] that samples are compared with, and others [K, C, H, W] of the same data that are not among
    them: how far real images are from real images. ``how``: where they come from, in words."""

    images: Tensor
    control: Tensor
    how: str


def find_reference(run: common.Run, limit: int = REFERENCE_IMAGES) -> Reference:
    """Training images of the data of ``run`` against its test images; of data without a split every second image
    against the others. At most ``limit`` of each, spread over the data."""
    training = common.open_data(run.args, run.model, run.spec, "train")
    if training.names[:1] != run.dataset.names[:1]:
        images, control = (
            _spread(training, range(len(training)), limit),
            _spread(run.dataset, range(len(run.dataset)), limit),
        )
        return Reference(images, control, "training images, against the data's test images")
    count = len(run.dataset)
    if count < 4:
        raise UserError(f"samples are compared with at least 4 images; the input has {count}")
    images = _spread(run.dataset, range(0, count, 2), limit)
    control = _spread(run.dataset, range(1, count, 2), limit)
    return Reference(images, control, "every second image, against the others")


def _spread(dataset: Any, places: Sequence[int], limit: int) -> Tensor:
    if len(places) > limit:
        places = [places[i * len(places) // limit] for i in range(limit)]
    return common.load(dataset, places).images


# -- figures -------------------------------------------------------------------------------------------------------


def nearest(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance float64 [N] of each image of x [N, C, H, W] from the nearest of ``reference`` [M, C, H, W], and its
    place: root mean square difference of pixels on [0, 1], x clamped."""
    flat = reference.flatten(1).double() / 2
    found = [
        torch.cdist(part.clamp(-1, 1).flatten(1).double() / 2, flat).min(dim=1)
        for part in x.split(max(1, _PAIRS // max(1, len(flat))))
    ]
    distance = torch.cat([f.values for f in found]) / flat.shape[1] ** 0.5
    return distance, torch.cat([f.indices for f in found])


def diversity(x: Tensor) -> float | None:
    """Mean root mean square distance of two different images of x [N, C, H, W] (clamped), on [0, 1]; None for one."""
    flat = x.clamp(-1, 1).flatten(1).double() / 2
    return float(torch.pdist(flat).mean()) / flat.shape[1] ** 0.5 if len(x) > 1 else None


def figures(x: Tensor, reference: Reference, logits: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """What is known about x [N, C, H, W] (samples, or ``reference.control``).

    "nearest": median distance from the nearest reference image; "nearest_smallest": the smallest, 0 for a copy;
    "diversity". With ``logits`` of a classifier for (x encoded again [N, n], the control images [K, n]): "entropy",
    mean entropy in bits of the n yes-or-no answers (low: the classifier is sure), and "rates_differ", the mean absolute
    difference of the shares of images that have each attribute.
    """
    distance, _ = nearest(x, reference.images)
    values: dict[str, Any] = {
        "nearest": float(distance.median()),
        "nearest_smallest": float(distance.min()),
        "diversity": diversity(x),
    }
    if logits is not None:
        own, control = logits
        values["entropy"] = float(entropy(own).mean())
        values["rates_differ"] = float(((own > 0).double().mean(0) - (control > 0).double().mean(0)).abs().mean())
    return values


def entropy(logits: Tensor) -> Tensor:
    """Entropy in bits of a yes-or-no answer with these logits, elementwise, float64."""
    p = logits.double().sigmoid()
    bits = torch.special.entr(p) + torch.special.entr(1 - p)
    return bits / torch.log(torch.tensor(2.0, dtype=torch.float64))
