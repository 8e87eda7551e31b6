"""Conditional samples from a few labels: a logistic classifier on z, and rejection of z drawn from the latent DPM.

As in the paper (section 4.5, after D2C): a few images are known to be positive. In the binary setting as many are known
to be negative; in the positive-unlabelled (PU) setting the others are images nobody looked at, positives among them,
and are taken for negatives. A logistic classifier is fitted to their normalised z, the positives oversampled so that
every batch is balanced; then z drawn from the latent DPM is rejected where p(y|z) < 0.5 and otherwise accepted with
probability p(y|z).

The classifier is scikit-learn's. Batches balanced by oversampling estimate the loss in which both kinds weigh the same;
here that loss is minimised itself (class_weight "balanced"), plus l2 / 2 ||w||^2, without which a few positives, which
can always be told apart by a plane, would have no minimum: the published code stops its descent early instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..pipeline import Pipeline
from .image_classifier import ImageClassifier, predict
from .targets import Targets

SETTINGS = ("pu", "binary")
DEFAULT_NAMES = 3
BLOCK = 256  # z drawn at a time
JUDGED = 5000  # training images of the judge, at most


# -- the classifier on z -------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """Places of the images that the classifier learns from: positives, and what it takes for negatives."""

    positives: np.ndarray
    others: np.ndarray


def choose(positive: np.ndarray, setting: str, k: int, others: int, seed: int = 0) -> Labelled:
    """``k`` positives at random, and at most ``others`` other images: for "binary" true negatives, for "pu" any others,
    unseen positives among them. positive: bool [N]. Raises UserError where there are fewer than k (or no) others."""
    if setting not in SETTINGS:
        raise UserError(f"setting {setting!r} is not known; expected {' or '.join(SETTINGS)}")
    if k < 1 or others < 1:
        raise UserError(f"few-shot needs at least 1 positive and 1 other image, not {k} and {others}")
    random = np.random.default_rng((seed, 10))
    (places,) = np.nonzero(positive)
    if len(places) < k:
        raise UserError(f"only {len(places)} of the {len(positive)} labelled images are positive; {k} were asked for")
    chosen = random.permutation(places)[:k]
    pool = np.flatnonzero(~positive) if setting == "binary" else np.setdiff1d(np.arange(len(positive)), chosen)
    if not len(pool):
        raise UserError("every labelled image is positive: there is nothing to tell the positives from")
    return Labelled(np.sort(chosen), np.sort(random.permutation(pool)[:others]))


def fit(positives: np.ndarray, others: np.ndarray, l2: float = 0.01) -> Any:
    """Logistic regression on normalised z, positives [k, D] against others [m, D]: the minimum of the mean of both
    kinds' mean log loss plus l2 / 2 ||w||^2."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("few-shot sampling needs scikit-learn: pip install 'pdae_fast[experiments]'") from None
    if not l2 > 0:
        raise UserError(f"--l2 must be positive, not {l2}")
    x = np.concatenate([positives, others]).astype(np.float64)
    y = np.repeat([1, 0], [len(positives), len(others)])
    # Balanced weights add up to the number of rows, and C multiplies a sum.
    return LogisticRegression(C=1 / (l2 * len(x)), class_weight="balanced", max_iter=5000, tol=1e-6).fit(x, y)


def probability(classifier: Any, z: np.ndarray) -> np.ndarray:
    """p(y|z) float64 [N] of normalised z [N, D]."""
    return classifier.predict_proba(np.asarray(z, dtype=np.float64))[:, 1]


# -- rejection -----------------------------------------------------------------------------------------------------


def accept(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Which z are kept, bool [N]: none with p < 0.5, the others with probability p; u uniform on [0, 1)."""
    return (p >= 0.5) & (u < p)


class Draws:
    """z from the latent DPM of ``pipe``, numbered, drawn in blocks when they are asked for, and kept."""

    def __init__(self, pipe: Pipeline, steps: int | None = None, clamp: bool = True, seed: int = 0) -> None:
        self._options = (steps, clamp, seed)
        self._pipe, self._blocks = pipe, [torch.empty(0, pipe.model.config.latent_dim)]
        self.count = 0

    def __call__(self, first: int, count: int) -> Tensor:
        """Numbers ``first`` ... ``first + count - 1``, [count, latent_dim]."""
        while self.count < first + count:
            self._blocks.append(self._pipe.sample_latents(BLOCK, *self._options, first=self.count))
            self.count += BLOCK
        self._blocks = [torch.cat(self._blocks)]
        return self._blocks[0][first : first + count]


@dataclass
class Accepted:
    """``z`` [n, D] that were kept, their ``numbers`` among the draws, and how many of ``drawn`` were (n or more)."""

    z: Tensor
    numbers: list[int]
    kept: int
    drawn: int

    @property
    def rate(self) -> float:
        return self.kept / self.drawn


def reject(
    draw: Callable[[int, int], Tensor],
    p: Callable[[Tensor], np.ndarray],
    count: int,
    most: int,
    seed: int = 0,
    block: int = BLOCK,
) -> Accepted:
    """Draw z until ``count`` are kept (see `accept`), at most ``most`` of them.

    draw(first, n): z [n, D]; p(z): float64 [n]. The same draws are kept whatever the ``block``; the acceptance rate is
    over all that were looked at. Raises UserError, with the rate so far, when ``most`` draws were not enough.
    """
    random = np.random.default_rng((seed, 11))
    kept: list[Tensor] = []
    numbers: list[int] = []
    drawn = 0
    while len(numbers) < count and drawn < most:
        n = min(block, most - drawn)
        z = draw(drawn, n)
        (places,) = np.nonzero(accept(p(z), random.random(n)))
        kept.append(z[places])
        numbers += [drawn + int(i) for i in places]
        drawn += n
    if len(numbers) < count:
        raise UserError(
            f"only {len(numbers)} of {drawn} draws were accepted, {count} were asked for: the latent DPM hardly ever "
            "draws what the classifier finds positive; ask for fewer (--count), allow more (--max-draws), or give more "
            "--positives"
        )
    return Accepted(torch.cat(kept)[:count], numbers[:count], len(numbers), drawn)


# -- who is right --------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What a judge answers: classes of the training images int64 [N], how many there are, and which count as yes."""

    labels: np.ndarray
    classes: int
    positive: int


def question(targets: Targets, name: str) -> Question:
    """For classes: which one it is, so that one judge serves all of them; for an attribute: yes or no."""
    if targets.kind == "classes":
        return Question(targets.values, len(targets.names), targets.names.index(name))
    return Question(targets.positive(name).astype(np.int64), 2, 1)


class Judge(NamedTuple):
    """A classifier of pixels. On held-out images ``hit`` and ``false_alarm`` are the shares of positives and of others
    that it calls positive, ``accuracy`` the mean of being right about either (balanced)."""

    classifier: ImageClassifier
    positive: int
    hit: float
    false_alarm: float

    @property
    def accuracy(self) -> float:
        return (self.hit + 1 - self.false_alarm) / 2

    def __call__(self, x: Tensor) -> np.ndarray:
        """bool [N]: which of x [N, C, H, W] it calls positive."""
        return (predict(self.classifier, x).argmax(dim=1) == self.positive).numpy()

    def corrected(self, share: float) -> float | None:
        """The share of true positives where the judge finds ``share``, its own errors taken out (Rogan and Gladen
        1978), within [0, 1]; None where it cannot tell."""
        informed = self.hit - self.false_alarm
        return float(np.clip((share - self.false_alarm) / informed, 0, 1)) if informed > 0.05 else None


def examine(classifier: ImageClassifier, positive: int, images: Tensor, truth: np.ndarray) -> Judge:
    """The judge with its errors on held-out images [M, C, H, W], of which ``truth`` [M] says which are positive."""
    if not truth.any() or truth.all():
        raise UserError(
            "the held-out images are all alike: the judge's errors cannot be measured; give more labelled data"
        )
    said = Judge(classifier, positive, 1.0, 0.0)(images)
    return Judge(classifier, positive, float(said[truth].mean()), float(said[~truth].mean()))


def interval(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z, share = 1.959964, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def default_names(targets: Targets, positives: int) -> list[str]:
    """A few classes or attributes that have enough positives, spread over the list of them."""
    enough = [name for name in targets.names if positives <= targets.positive(name).sum() < len(targets.values)]
    if not enough:
        raise UserError(
            f"none of {', '.join(targets.names)} has {positives} positive images; ask for fewer --positives"
        )
    count = min(DEFAULT_NAMES, len(enough))
    return [enough[i * len(enough) // count] for i in range(count)]
