"""Numbers on test images with their 95% intervals, by resampling the images."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Score(NamedTuple):
    """A value on the test images, and what it is on each of RESAMPLES resamples of them, the same for every feature
    set: two scores on the same images are compared by their difference on each resample."""

    value: float
    resampled: np.ndarray

    def __sub__(self, other: Score) -> Score:
        return Score(self.value - other.value, self.resampled - other.resampled)

    @property
    def estimate(self) -> Estimate:
        return estimate(self.value, self.resampled)


class Estimate(NamedTuple):
    """A value on the test images and its 95% interval over resampled test images (percentile bootstrap)."""

    value: float
    low: float
    high: float


def accuracy(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which predictions are right, float64 [M]: scores [M, classes], labels [M]."""
    return (scores.argmax(axis=1) == labels).astype(np.float64)


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of ``values`` [M] (or of differences, for a paired comparison)."""
    return mean_score(values, seed).estimate


def mean_score(values: np.ndarray, seed: int = 0) -> Score:
    """Mean of ``values`` [M]."""
    return Score(float(values.mean()), resamples(len(values), seed) @ values / len(values))


def iou_score(confusions: np.ndarray, seed: int = 0) -> Score:
    """Mean over the parts of intersection over union on all images together; confusions [M, P, P] count each image's
    pixels by their part and by what was said of them. A part that is in neither is left out."""

    def mean_iou(counts: np.ndarray) -> np.ndarray:
        hits = np.einsum("kpp->kp", counts)
        union = counts.sum(axis=1) + counts.sum(axis=2) - hits
        with np.errstate(invalid="ignore"):
            return np.nanmean(hits / union, axis=1)

    whole = confusions.astype(np.float64)
    drawn = np.einsum("rm,mpq->rpq", resamples(len(whole), seed), whole, optimize=True)
    return Score(float(mean_iou(whole.sum(axis=0)[None])[0]), mean_iou(drawn))


def bootstrap_auroc(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[Estimate, np.ndarray]:
    """Area under the ROC curve of scores [M] for labels [M] (0, 1), and its resampled values [RESAMPLES]; both kinds
    must occur. Ties count half (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    score, positive = scores[order], labels[order] > 0
    _, tie = np.unique(score, return_inverse=True)
    weights = resamples(len(labels), seed)[:, order]

    def area(w: np.ndarray) -> np.ndarray:
        groups = tie.max() + 1
        ups = np.stack([np.bincount(tie, row, groups) for row in w * positive])
        downs = np.stack([np.bincount(tie, row, groups) for row in w * ~positive])
        below = downs.cumsum(axis=1) - downs / 2
        with np.errstate(invalid="ignore"):
            return (ups * below).sum(axis=1) / (ups.sum(axis=1) * downs.sum(axis=1))

    resampled = area(weights)
    return estimate(float(area(np.ones((1, len(labels))))[0]), resampled), resampled


def resamples(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` images is drawn, [RESAMPLES, count]; the same for every feature set."""
    return np.random.default_rng((seed, 5)).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def mean_estimate(estimates: list[Estimate], resampled: list[np.ndarray]) -> Estimate:
    """The mean over attributes, with the interval of the mean over the same resampled images."""
    return mean_of([e.value for e in estimates], resampled).estimate


def mean_of(values: list[float], resampled: list[np.ndarray]) -> Score:
    """The mean over attributes of their values and of their resampled ones."""
    mean = float(np.mean(values))
    with warnings.catch_warnings():  # a resample of few images may lack both kinds of every attribute: left out
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        drawn = np.nanmean(np.stack(resampled), axis=0)
    return Score(mean, drawn)
