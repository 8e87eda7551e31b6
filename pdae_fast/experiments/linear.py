"""Linear read-outs of features, and the baselines that they are compared with.

The protocol, the same for every feature set: features are mapped linearly so that on the training images each
direction has mean 0 and variance 1 (whitened), or only each dimension (standardised); a logistic regression with an L2
penalty ||w||^2 / (2C) is fitted, C chosen from CHOICES by its log loss on a fifth of the training images and then
refitted on all of them; the test images are seen once.

Whitening changes nothing that a linear classifier can express, only what the penalty prefers: without it a code is
judged by how evenly its variance happens to be spread over its dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError

CHOICES = (0.001, 0.01, 0.1, 1.0, 10.0)  # of C
SCALINGS = ("whiten", "standardise")
PENALTIES = tuple(10.0**k for k in range(-4, 4))  # of a ridge
ITERATIONS = 2000


class FeatureSet(NamedTuple):
    """One description of the images: float32 [N, F] of the training images and [M, F] of the test images."""

    name: str
    train: np.ndarray
    test: np.ndarray


def pixel_features(train: np.ndarray, test: np.ndarray, dimension: int, seed: int = 0) -> list[FeatureSet]:
    """The baselines of at most ``dimension`` numbers an image. train, test: [N, C, H, W]."""
    return [principal_components(train, test, dimension, seed), small_pixels(train, test, dimension)]


def principal_components(train: np.ndarray, test: np.ndarray, dimension: int, seed: int = 0) -> FeatureSet:
    """At most ``dimension`` principal components of the pixels."""
    from sklearn.decomposition import PCA

    flat, flat_test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    components = min(dimension, *flat.shape)
    pca = PCA(components, random_state=seed).fit(flat)
    return FeatureSet(f"PCA of pixels ({components})", pca.transform(flat), pca.transform(flat_test))


def small_pixels(train: np.ndarray, test: np.ndarray, dimension: int) -> FeatureSet:
    """The image averaged down to the largest square of at most ``dimension`` values."""
    _, C, H, _ = train.shape
    side = max(1, min(H, int((dimension / C) ** 0.5)))
    small, small_test = (_shrink(x, side).reshape(len(x), -1) for x in (train, test))
    return FeatureSet(f"pixels {side}x{side}" + ("" if C == 1 else f"x{C}"), small, small_test)


def _shrink(x: np.ndarray, side: int) -> np.ndarray:
    """Area average of [N, C, H, H] to [N, C, side, side]."""
    import torch
    import torch.nn.functional as F

    return F.interpolate(torch.from_numpy(x), size=(side, side), mode="area").numpy()


def scale(features: FeatureSet, scaling: str) -> FeatureSet:
    """``features`` in the scale that probes and neighbours see, decided by the training images alone."""
    if scaling not in SCALINGS:
        raise UserError(f"scaling {scaling!r} is not known; expected {' or '.join(SCALINGS)}")
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    train, test = (np.asarray(x, dtype=np.float64) for x in (features.train, features.test))
    scaler = StandardScaler().fit(train)  # constant dimensions stay 0
    train, test = scaler.transform(train), scaler.transform(test)
    if scaling == "whiten":
        pca = PCA(svd_solver="full").fit(train)
        # Directions that only rounding fills must not be blown up.
        kept = pca.explained_variance_ > 1e-9 * pca.explained_variance_[0]
        root = np.sqrt(pca.explained_variance_[kept])
        train, test = (((x - pca.mean_) @ pca.components_[kept].T) / root for x in (train, test))
    return FeatureSet(features.name, train, test)


def compact(features: FeatureSet) -> FeatureSet:
    """``features`` in the space that the training images span, where there are fewer of them than dimensions: what a
    penalty on the weights' length finds there is what it finds in all dimensions."""
    if features.train.shape[0] >= features.train.shape[1]:
        return features
    basis, coordinates = np.linalg.qr(features.train.T)
    return FeatureSet(features.name, coordinates.T, features.test @ basis)


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares, of features [N, F] less their mean (Roy and Vetterli 2007):
    how many directions they fill, at most min(N - 1, F)."""
    x = features.astype(np.float64)
    x -= x.mean(axis=0)
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    share = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    share = share[share > 1e-7 * share.max(initial=0)]  # what is below is rounding of the squares
    if not len(share):
        return 0.0
    share /= share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def ridge(features: FeatureSet, points: np.ndarray, seed: int = 0) -> tuple[np.ndarray, float]:
    """Ridge regression of ``points`` [N, P, 2] on the scaled ``features``, with an intercept: predictions [M, P, 2] for
    the test images, and the penalty, from PENALTIES times the features' mean square by the mean distance on a fifth of
    the training images."""
    count = len(points)
    if count < 5:
        raise UserError(f"a regression of points needs at least 5 training images, not {count}")
    order = np.random.default_rng((seed, 14)).permutation(count)
    kept, held = order[count // 5 :], order[: count // 5]
    x, y = features.train, points.reshape(count, -1).astype(np.float64)
    tried = _ridge(x[kept], y[kept], x[held], PENALTIES)
    errors = [distances(found.reshape(len(held), -1, 2), points[held]).mean() for found in tried]
    best = PENALTIES[int(np.argmin(errors))]
    (found,) = _ridge(x, y, features.test, (best,))
    return found.reshape(len(features.test), -1, 2), best


def _ridge(x: np.ndarray, y: np.ndarray, asked: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
    mean, middle = x.mean(axis=0), y.mean(axis=0)
    left, values, right = np.linalg.svd(x - mean, full_matrices=False)
    targets, directions = left.T @ (y - middle), (asked - mean) @ right.T
    unit = (values**2).sum() / max(1, len(values))  # of a direction, on the average
    shrunk = ((values / (values**2 + penalty * unit))[:, None] * targets for penalty in penalties)
    return [middle + directions @ weights for weights in shrunk]


def distances(found: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mean distance of the points of each image, float64 [M]; both [M, P, 2]."""
    return np.sqrt(((found - points) ** 2).sum(axis=2)).mean(axis=1)


@dataclass
class Probe:
    """A fitted probe's result. ``scores``: for classes log-probabilities [M, classes], for an attribute logits [M]."""

    C: float
    scores: np.ndarray


def fit(features: FeatureSet, labels: np.ndarray, classes: int, seed: int = 0) -> Probe:
    """Logistic regression of the scaled ``features`` on ``labels`` [N] (0 ... classes - 1; two classes: an attribute).

    Raises UserError when fewer than two classes, or too few images of one, are among the training images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import train_test_split

    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2 or counts.min() < 2:
        few = ", ".join(f"{value}: {n}" for value, n in zip(present, counts, strict=True))
        raise UserError(f"a probe needs at least two labels with two training images each; there are ({few})")

    def model(C: float) -> Any:
        return LogisticRegression(C=C, max_iter=ITERATIONS)

    held = max(len(present), round(0.2 * len(labels)))
    part = train_test_split(np.arange(len(labels)), test_size=held, random_state=seed, stratify=labels)
    losses = []
    for C in CHOICES:
        fitted = _fit(model(C), features.train[part[0]], labels[part[0]])
        losses.append(log_loss(labels[part[1]], fitted.predict_proba(features.train[part[1]]), labels=fitted.classes_))
    C = CHOICES[int(np.argmin(losses))]
    fitted = _fit(model(C), features.train, labels)
    if classes == 2:
        return Probe(C, fitted.decision_function(features.test))
    scores = np.full((len(features.test), classes), -np.inf)
    scores[:, fitted.classes_] = fitted.predict_log_proba(features.test)
    return Probe(C, scores)


def _fit(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # An unfinished fit would compare solvers, not features.
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(x, y)
        except ConvergenceWarning:
            raise UserError(f"the probe did not converge in {ITERATIONS} iterations; try --scaling whiten") from None
