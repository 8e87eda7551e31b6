"""What is in z: linear probes against pixels and their principal components, and nearest neighbours.

The protocol, the same for every feature set: features are mapped linearly so that on the training images each
direction has mean 0 and variance 1 (whitened), or only each dimension (standardised); a logistic regression with an L2
penalty ||w||^2 / (2C) is fitted, C chosen from CHOICES by its log loss on a fifth of the training images and then
refitted on all of them; the test images are seen once.

Whitening changes nothing that a linear classifier can express, only what the penalty prefers: without it a code is
judged by how evenly its variance happens to be spread over its dimensions.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import cli
from ..errors import UserError
from ..files import atomic_write, claim_folder
from ..plots import COLOURS, chart
from . import common
from .parts import Side, find_parts
from .targets import Targets

CHOICES = (0.001, 0.01, 0.1, 1.0, 10.0)  # of C
SCALINGS = ("whiten", "standardise")
RESAMPLES = 1000
ITERATIONS = 2000


class FeatureSet(NamedTuple):
    """One description of the images: float32 [N, F] of the training images and [M, F] of the test images."""

    name: str
    train: np.ndarray
    test: np.ndarray


def pixel_features(train: np.ndarray, test: np.ndarray, dimension: int, seed: int = 0) -> list[FeatureSet]:
    """The baselines of at most ``dimension`` numbers an image: principal components of the pixels, and the image
    averaged down to the largest square that has so few values. train, test: [N, C, H, W]."""
    from sklearn.decomposition import PCA

    flat, flat_test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    components = min(dimension, *flat.shape)
    pca = PCA(components, random_state=seed).fit(flat)
    _, C, H, _ = train.shape
    side = max(1, min(H, int((dimension / C) ** 0.5)))
    small, small_test = (_shrink(x, side).reshape(len(x), -1) for x in (train, test))
    return [
        FeatureSet(f"PCA of pixels ({components})", pca.transform(flat), pca.transform(flat_test)),
        FeatureSet(f"pixels {side}x{side}" + ("" if C == 1 else f"x{C}"), small, small_test),
    ]


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


# -- classifiers ---------------------------------------------------------------------------------------------------


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


# -- numbers with their uncertainty --------------------------------------------------------------------------------


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
    weights = _resamples(len(values), seed)
    return _estimate(float(values.mean()), weights @ values / len(values))


def bootstrap_auroc(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[Estimate, np.ndarray]:
    """Area under the ROC curve of scores [M] for labels [M] (0, 1), and its resampled values [RESAMPLES]; both kinds
    must occur. Ties count half (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    score, positive = scores[order], labels[order] > 0
    _, tie = np.unique(score, return_inverse=True)
    weights = _resamples(len(labels), seed)[:, order]

    def area(w: np.ndarray) -> np.ndarray:
        groups = tie.max() + 1
        ups = np.stack([np.bincount(tie, row, groups) for row in w * positive])
        downs = np.stack([np.bincount(tie, row, groups) for row in w * ~positive])
        below = downs.cumsum(axis=1) - downs / 2
        with np.errstate(invalid="ignore"):
            return (ups * below).sum(axis=1) / (ups.sum(axis=1) * downs.sum(axis=1))

    resampled = area(weights)
    return _estimate(float(area(np.ones((1, len(labels))))[0]), resampled), resampled


def _resamples(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` images is drawn, [RESAMPLES, count]; the same for every feature set."""
    return np.random.default_rng((seed, 5)).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def mean_estimate(estimates: list[Estimate], resampled: list[np.ndarray]) -> Estimate:
    """The mean over attributes, with the interval of the mean over the same resampled images."""
    mean = float(np.mean([e.value for e in estimates]))
    with warnings.catch_warnings():  # a resample of few images may lack both kinds of every attribute: left out
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        drawn = np.nanmean(np.stack(resampled), axis=0)
    return _estimate(mean, drawn)


# -- nearest neighbours --------------------------------------------------------------------------------------------

GOOD, BAD = "#007a4d", "#b3261e"


def check(k: int, count: int) -> None:
    """UserError unless ``count`` training images have ``k`` that are nearest."""
    if not 1 <= k <= count:
        raise UserError(f"the number of neighbours must be from 1 to {count}, not {k}")


def neighbours(features: FeatureSet, k: int) -> np.ndarray:
    """Places [M, k] of the ``k`` training images nearest to each test image (Euclidean), nearest first."""
    from sklearn.neighbors import NearestNeighbors

    check(k, len(features.train))
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features.train)
    return search.kneighbors(features.test, return_distance=False)


def agreement(found: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """How much the neighbours [M, k] agree with their query, float64 [M]: the share of them in its class (precision at
    k), or for attributes [., A] the mean share of attributes that are equal."""
    same = train[found] == (test[:, None] if test.ndim == 1 else test[:, None, :])
    return same.reshape(len(found), -1).mean(axis=1)


def chance(train: np.ndarray, test: np.ndarray) -> float:
    """`agreement` of neighbours drawn at random."""
    if train.ndim == 1:
        count = max(train.max(), test.max()) + 1
        return float((np.bincount(train, minlength=count) / len(train))[test].mean())
    rate = (train > 0).mean(axis=0)
    return float(np.where(test > 0, rate, 1 - rate).mean())


def picture(
    path: Path,
    queries: np.ndarray,
    rows: list[tuple[str, np.ndarray]],
    train: np.ndarray,
    test: np.ndarray,
    targets: tuple[Targets, Targets],
) -> None:
    """Queries at the left of their neighbours, a line of images for each of ``rows`` = (name, places [M, k]).

    queries: places in test. train, test: images [., C, H, W] in [-1, 1]. targets: of both, row for row. Classes are
    written above the images, green where they agree; for attributes, how many of them agree.
    """
    k = rows[0][1].shape[1]
    known, asked = targets
    lines = [(query, name, found[query]) for query in queries for name, found in rows]
    with chart(path, 0.85 * (k + 1) + 1.1, 0.98 * len(lines), len(lines), k + 1, squeeze=False) as axes:
        for line, (query, name, found) in enumerate(lines):
            shown = [(test[query], _name(asked, query) if line % len(rows) == 0 else "", "black")]
            shown += [(train[place], *_verdict(known, place, asked, query)) for place in found]
            if line % len(rows):
                shown[0] = (np.ones_like(test[query]), "", "black")  # the query stands once
            for column, (image, words, colour) in enumerate(shown):
                _tile(axes[line, column], image, words, colour)
            axes[line, 1].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)


def _name(targets: Targets, row: int) -> str:
    return targets.names[int(targets.values[row])] if targets.kind == "classes" else "query"


def _verdict(known: Targets, place: int, asked: Targets, query: int) -> tuple[str, str]:
    if known.kind == "classes":
        same = known.values[place] == asked.values[query]
        return _name(known, place), GOOD if same else BAD
    equal = int((known.values[place] == asked.values[query]).sum())
    return f"{equal}/{len(known.names)}", GOOD if equal == len(known.names) else "black"


def _tile(axes: Any, image: np.ndarray, words: str, colour: str) -> None:
    pixels = np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1)
    axes.imshow(
        pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_title(words, color=colour, fontsize=7, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


# -- the command ---------------------------------------------------------------------------------------------------

SCALED = {"whiten": "whitened", "standardise": "standardised"}
SHOWN = 6  # queries in the picture
QUERIES = 2000  # test images whose neighbours are counted


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("probe", "Linear probes on z against pixels, and nearest neighbours in z.")
    common.add_options(p, out="probe", labels=True)
    add = p.add_argument
    add("--holdout", type=float, default=0.25, help="fraction that is tested on, for data without splits of its own")
    add("--test", nargs="+", metavar="DATA", help="images to test on, labelled like those of --input (all are learned)")
    add("--scaling", choices=SCALINGS, default="whiten", help="of every feature set, by its training images")
    add("--neighbours", type=int, default=8, help="how many training images each test image is compared with")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for module in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise UserError("probe needs scikit-learn and matplotlib: pip install 'pdae_fast[experiments]'")
    run = common.open_run(args, infers=False)
    claim_folder(run.out)
    cache = run.out / "latents"
    train, test, how = find_parts(run, cache, args.holdout, args.test or ())
    check(args.neighbours, len(train.z))  # before minutes of fitting
    latent = FeatureSet(f"z ({train.z.shape[1]})", train.z, test.z)
    sets = [latent, *pixel_features(train.images, test.images, train.z.shape[1], args.seed)]
    scaled = [scale(features, args.scaling) for features in sets]
    if train.targets.kind == "classes":
        measure, rows, notes = _classes(scaled, train, test, args.seed)
    else:
        measure, rows, notes = _attributes(scaled, train, test, args.seed)
    own = _classifier(run, test)
    near = _neighbours(run, latent, train, test)
    report = common.report(
        run,
        images=len(train.z) + len(test.z),
        split=how,
        train_images=len(train.z),
        test_images=len(test.z),
        targets={"kind": train.targets.kind, "names": train.targets.names},
        scaling=args.scaling,
        regularisation=f"L2, C from {list(CHOICES)} by log loss on a fifth of the training images",
        measure=measure,
        interval="95%, bootstrap over test images",
        features=rows,
        classifier=own,
        retrieval=near,
        notes=notes,
    )
    cli.write_json(run.out / "metrics.json", report)
    _chart(run.out / "probe.png", report)
    common.say(run, _summary(report), ["probe.png", "neighbours.png", "neighbours.csv", "metrics.json"])


def _classes(sets: list[FeatureSet], train: Side, test: Side, seed: int) -> tuple[str, list[dict], list[str]]:
    rows, right = [], []
    for features in sets:
        count = max(3, len(train.targets.names))  # two classes too: scores for each of them
        fitted = fit(features, train.targets.values, count, seed)
        right.append(accuracy(fitted.scores, test.targets.values))
        row = {"name": features.name, "C": fitted.C, "accuracy": bootstrap_mean(right[-1], seed)._asdict()}
        if len(right) > 1:
            row["z_minus_this"] = bootstrap_mean(right[0] - right[-1], seed)._asdict()
        rows.append(row)
    return "accuracy", rows, []


def _attributes(sets: list[FeatureSet], train: Side, test: Side, seed: int) -> tuple[str, list[dict], list[str]]:
    usable, notes = [], []
    for j, name in enumerate(train.targets.names):
        sides = [np.bincount(part.targets.values[:, j] > 0, minlength=2) for part in (train, test)]
        if sides[0].min() < 2 or sides[1].min() < 1:
            notes.append(f"{name}: left out, too few images with or without it")
        else:
            usable.append(j)
    if not usable:
        raise UserError(f"no attribute can be probed: {'; '.join(notes)}")
    rows, resampled = [], []
    for features in sets:
        found, samples, Cs = [], [], {}
        for j in usable:
            fitted = fit(features, (train.targets.values[:, j] > 0).astype(np.int64), 2, seed)
            estimate, drawn = bootstrap_auroc(fitted.scores, test.targets.values[:, j], seed)
            found.append(estimate)
            samples.append(drawn)
            Cs[train.targets.names[j]] = fitted.C
        resampled.append(samples)
        names = [train.targets.names[j] for j in usable]
        row = {
            "name": features.name,
            "C": Cs,
            "mean_auroc": mean_estimate(found, samples)._asdict(),
            "auroc": {name: e._asdict() for name, e in zip(names, found, strict=True)},
        }
        if len(resampled) > 1:
            difference = [a - b for a, b in zip(resampled[0], samples, strict=True)]
            gap = [Estimate(rows[0]["auroc"][n]["value"] - e.value, 0, 0) for n, e in zip(names, found, strict=True)]
            row["z_minus_this"] = mean_estimate(gap, difference)._asdict()
        rows.append(row)
    return "mean_auroc", rows, notes


def _classifier(run: common.Run, test: Side) -> dict[str, Any] | None:
    """What the model's own classifier, which nothing here is fitted to, says of the test images; None without one for
    all classes or any attribute."""
    own, targets, seed = run.model.config.attributes, test.targets, run.args.seed
    shared = [name for name in targets.names if name in own]
    if targets.kind == "classes":
        if shared != targets.names:
            return None
        scores = run.pipe.logits(torch.from_numpy(test.z))[:, [own.index(name) for name in shared]].numpy()
        return {"accuracy": bootstrap_mean(accuracy(scores, targets.values), seed)._asdict()}
    shared = [name for name in shared if 0 < targets.positive(name).sum() < len(test.z)]
    if not shared:
        return None
    scores = run.pipe.logits(torch.from_numpy(test.z)).numpy()
    pairs = [bootstrap_auroc(scores[:, own.index(n)], targets.positive(n), seed) for n in shared]
    found, samples = zip(*pairs, strict=True)
    each = {name: value._asdict() for name, value in zip(shared, found, strict=True)}
    return {"mean_auroc": mean_estimate(list(found), list(samples))._asdict(), "auroc": each}


def _neighbours(run: common.Run, latent: FeatureSet, train: Side, test: Side) -> dict[str, Any]:
    """Agreement of the neighbours in z and in pixels, neighbours.csv, and the picture."""
    count, seed, k = min(QUERIES, len(test.z)), run.args.seed, run.args.neighbours
    chosen = np.sort(np.random.default_rng((seed, 6)).permutation(len(test.z))[:count])
    asked, known = test.targets.values[chosen], train.targets.values
    flat = [part.images.reshape(len(part.images), -1) for part in (train, test)]
    latent = latent._replace(test=latent.test[chosen])
    sets = {f"z {SCALED[word]}": scale(latent, word) for word in SCALINGS}
    sets["pixels"] = FeatureSet("pixels", flat[0], flat[1][chosen])
    found = {name: neighbours(features, k) for name, features in sets.items()}
    values = {name: agreement(places, known, asked) for name, places in found.items()}
    queries = np.random.default_rng((seed, 7)).permutation(count)[:SHOWN]
    targets = (train.targets, test.targets._replace(values=asked))
    shown = {"z": found[f"z {SCALED[run.args.scaling]}"], "pixels": found["pixels"]}
    path = run.out / "neighbours.png"
    picture(path, queries, list(shown.items()), train.images, test.images[chosen], targets)
    with atomic_write(run.out / "neighbours.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "by", *range(1, k + 1)])
        for i, place in enumerate(chosen):
            for name, places in found.items():
                writer.writerow([test.names[place], name, *(train.names[j] for j in places[i])])
    return {
        "k": k,
        "queries": count,
        "measure": "precision" if train.targets.kind == "classes" else "attribute agreement",
        "found": {name: bootstrap_mean(row, seed)._asdict() for name, row in values.items()},
        "chance": chance(known, asked),
    }


def _chart(path: Path, report: dict[str, Any]) -> None:
    rows = report["features"]
    if report["measure"] == "accuracy":
        groups = {"accuracy": [row["accuracy"] for row in rows]}
    else:
        groups = {"mean": [row["mean_auroc"] for row in rows]}
        groups |= {name: [row["auroc"][name] for row in rows] for name in rows[0]["auroc"]}
    height = 0.8 / len(rows)
    with chart(path, 6.4, 1.4 + 0.5 * len(groups)) as axes:
        for i, row in enumerate(rows):
            values = [group[i] for group in groups.values()]
            middle = [v["value"] for v in values]
            error = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
            places = np.arange(len(groups)) + (i - (len(rows) - 1) / 2) * height
            axes.errorbar(middle, places, xerr=error, fmt="o", label=row["name"], color=COLOURS[i], capsize=2)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        lowest = min(v["low"] for group in groups.values() for v in group)
        axes.set_xlim(max(0.0, np.floor(10 * lowest - 0.5) / 10), 1)
        axes.set_xlabel("test accuracy" if report["measure"] == "accuracy" else "AUROC on the test images")
        axes.figure.legend(loc="outside upper center", ncols=len(rows))


def _summary(report: dict[str, Any]) -> list[str]:
    def cell(e: dict[str, float]) -> str:
        return f"{e['value']:.4f} ({e['low']:.4f} to {e['high']:.4f})"

    measure = report["measure"]
    title = {"accuracy": "test accuracy (95%)", "mean_auroc": "mean AUROC (95%)"}[measure]
    lines = [
        [row["name"], cell(row[measure]), cell(row["z_minus_this"]) if "z_minus_this" in row else ""]
        for row in report["features"]
    ]
    near, targets = report["retrieval"], report["targets"]
    if report["classifier"]:
        lines.append(["the model's own classifier", cell(report["classifier"][measure]), ""])
    return [
        cli.table(["features", title, "z minus this"], lines),
        f"{near['measure']} at {near['k']} of {near['queries']} test images: "
        + ", ".join(f"{name} {cell(value)}" for name, value in near["found"].items())
        + f", chance {near['chance']:.4f}",
        f"{len(targets['names'])} {targets['kind']}, {report['train_images']} training and {report['test_images']} "
        f"test images of {' '.join(report['input'])}: {report['split']}",
        f"model {report['model']}; logistic regression, features {SCALED[report['scaling']]}, "
        f"{report['regularisation']}",
        *report["notes"],
    ]
