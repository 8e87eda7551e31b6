"""Linear read-outs of frozen maps: what a representation says without being changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import linear

PENALTIES = 10.0 ** np.arange(-4, 5)  # of ridge regression, times the mean of the kernel's diagonal
PIXELS = 400  # of every labelled image
GRID = 4  # maps are averaged to it before classes are read


def ridge(train: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression of y [n, m] on train [n, D], both centred and the columns of train standardised; predictions for
    test [N, D]. The penalty is the one of PENALTIES with the least leave-one-out error, which has a closed form."""
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 1e-9 * max(std.max(), 1e-30), std, np.inf)
    a, b = ((x - mean) / std for x in (train.astype(np.float64), test.astype(np.float64)))
    middle = y.mean(0)
    values, vectors = np.linalg.eigh(a @ a.T)
    values, turned = np.maximum(values, 0), vectors.T @ (y - middle)
    best = None
    for penalty in PENALTIES * values.mean():
        shrunk = values / (values + penalty)
        # The mean is fitted too: 1/n of leverage.
        leverage = (vectors**2) @ shrunk + 1 / len(a)
        residual = (y - middle) - vectors @ (shrunk[:, None] * turned)
        error = float(np.square(residual / np.maximum(1 - leverage, 1e-6)[:, None]).mean())
        if best is None or error < best[0]:
            best = error, vectors @ (turned / (values + penalty)[:, None])
    return middle + b @ (a.T @ best[1])


def read_points(train: Tensor, points: Tensor, test: Tensor) -> Tensor:
    """Points [N, n, 2] of the test maps by `ridge` on the whole map; train [k, C, h, w], points [k, n, 2]."""
    found = ridge(train.flatten(1).numpy(), points.flatten(1).double().numpy(), test.flatten(1).numpy())
    return torch.from_numpy(found).unflatten(1, (-1, 2)).float()


def read_classes(train: Tensor, labels: Tensor, test: Tensor, classes: int, seed: int = 0) -> Tensor:
    """Classes int64 [N] of the test maps by logistic regression (see `linear`) on the map averaged to 4x4."""
    flat = (F.adaptive_avg_pool2d(x, GRID).flatten(1).numpy() for x in (train, test))
    features = linear.scale(linear.FeatureSet("", *flat), "standardise")
    scores = linear.fit(features, labels.numpy(), max(classes, 3), seed).scores
    return torch.from_numpy(scores.argmax(1))


def read_parts(train: Sequence[Tensor], masks: Tensor, test: Sequence[Tensor], seed: int = 0) -> Tensor:
    """The part int64 [N, S, S] of every pixel of the test images: logistic regression on all levels, enlarged
    bilinearly to S, of PIXELS pixels of every training image. train, test: levels [k, C, h, w]; masks [k, S, S]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    side, random = masks.shape[-1], np.random.default_rng((seed, 13))
    rows, known = [], []
    for i in range(len(masks)):
        places = random.permutation(side * side)[:PIXELS]
        rows.append(_pixels([level[i : i + 1] for level in train], side)[places])
        known.append(masks[i].flatten().numpy()[places])
    scaler = StandardScaler().fit(np.concatenate(rows))
    fitted = LogisticRegression(C=0.01, max_iter=300).fit(scaler.transform(np.concatenate(rows)), np.concatenate(known))
    found = [
        fitted.predict(scaler.transform(_pixels([level[i : i + 1] for level in test], side))).reshape(side, side)
        for i in range(len(test[0]))
    ]
    return torch.from_numpy(np.stack(found)).long()


def _pixels(levels: Sequence[Tensor], side: int) -> np.ndarray:
    """Levels of one image -> float32 [side * side, sum of C]."""
    large = [F.interpolate(level.float(), size=(side, side), mode="bilinear") for level in levels]
    return torch.cat(large, 1)[0].flatten(1).T.numpy()
