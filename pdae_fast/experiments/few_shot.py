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

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import cli
from ..data import save_grid, save_images
from ..errors import UserError
from ..files import claim_folder
from ..pipeline import Pipeline
from . import common
from .image_classifier import ImageClassifier, cached_classifier, predict
from .parts import Side, find_parts
from .sample import add_drawing_options, check_drawing
from .targets import Targets

SETTINGS = ("pu", "binary")
DEFAULT_NAMES = 3
BLOCK = 256  # z drawn at a time
JUDGED = 5000  # training images of the judge, at most


# -- the classifier on z -------------------------------------------------------------------------------------------


class Shots(NamedTuple):
    """Places of the images that the classifier learns from: positives, and what it takes for negatives."""

    positives: np.ndarray
    others: np.ndarray


def choose(positive: np.ndarray, setting: str, k: int, others: int, seed: int = 0) -> Shots:
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
    return Shots(np.sort(chosen), np.sort(random.permutation(pool)[:others]))


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

    def __init__(self, pipe: Pipeline, steps: int | None = None, clamp: bool | None = None, seed: int = 0) -> None:
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


# -- the command ---------------------------------------------------------------------------------------------------

TITLES = {"pu": "positive-unlabelled", "binary": "binary", "unconditional": "unconditional"}
COLUMNS = 10  # of the grid
MOST_DRAWS = 200  # for every image asked for, unless given


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("few_shot", "New images of a class from a few labels: a classifier on z, and rejection of drawn z.")
    common.add_options(p, out="few_shot", labels=True)
    add = p.add_argument
    add("--name", nargs="+", metavar="NAME", help="classes or attributes to sample (default: a few of them)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is known besides the positives")
    add("--positives", type=int, default=50, help="images that are known to be positive")
    add("--negatives", type=int, help="images known to be negative, in the binary setting (default: --positives)")
    add("--unlabelled", type=int, default=1000, help="images nobody looked at, in the positive-unlabelled setting")
    add("--l2", type=float, default=0.01, help="weight decay of the classifier on z")
    add("--count", type=int, default=20, help="images of each name and setting")
    add("--max-draws", type=int, help=f"z drawn for them at most (default: {MOST_DRAWS} times --count)")
    add_drawing_options(p)
    add("--holdout", type=float, default=0.25, help="fraction the judge is tested on, for data without a test split")
    add("--epochs", type=int, default=25, help="of the judge, a classifier of pixels trained on all labels")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for name in ("count", "epochs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("few-shot sampling needs scikit-learn: pip install 'pdae_fast[experiments]'")
    run = common.open_run(args, infers=False)
    pipe = run.pipe
    drawing = check_drawing(pipe, args)
    settings = list(dict.fromkeys(args.settings))

    def check(targets: Targets) -> None:
        for name in _names(args, targets):
            for setting in settings:
                _choose(args, targets, name, setting)

    claim_folder(run.out)
    train, test, how = find_parts(run, run.out / "latents", args.holdout, check=check)
    names = _names(args, train.targets)
    draws = Draws(pipe, args.latent_steps, args.latent_clamp, args.seed)
    chosen = [_accept(run, draws, train, name, setting) for name in names for setting in settings]
    judges = {name: _judge(run, train, test, name) for name in names}
    total = (len(chosen) + 1) * args.count * common.evaluations(pipe, "random")
    with common.progress(pipe, total, "few-shot", args.quiet):
        base = _decode(run, draws(0, args.count), range(args.count))
        for row in chosen:
            accepted = row["accepted"]
            row["images"] = _decode(run, accepted.z, accepted.numbers)
    _save(run.out, base, chosen)
    rows = [_row(row, base, train.targets, judges[row["name"]]) for row in chosen]
    report = common.report(
        run,
        images=args.count,
        split=how,
        train_images=len(train.z),
        test_images=len(test.z),
        **drawing,
        positives=args.positives,
        l2=args.l2,
        rows=rows,
    )
    cli.write_json(run.out / "metrics.json", report)
    common.say(run, _summary(report), ["grid.png", "images", "metrics.json"])


def _names(args: argparse.Namespace, targets: Targets) -> list[str]:
    return list(dict.fromkeys(args.name or default_names(targets, args.positives)))


def _choose(args: argparse.Namespace, targets: Targets, name: str, setting: str) -> Shots:
    negatives = args.positives if args.negatives is None else args.negatives
    others = negatives if setting == "binary" else args.unlabelled
    positive = targets.positive(name)
    try:
        return choose(positive, setting, args.positives, others, args.seed)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _accept(run: common.Run, draws: Draws, train: Side, name: str, setting: str) -> dict[str, Any]:
    """Fit the classifier of one name and setting, and draw until enough z are accepted."""
    args = run.args
    labelled = _choose(args, train.targets, name, setting)
    mean, std = (v.cpu().numpy() for v in (run.model.latent_mean, run.model.latent_std))
    normalised = (train.z - mean) / std
    classifier = fit(normalised[labelled.positives], normalised[labelled.others], args.l2)
    most = MOST_DRAWS * args.count if args.max_draws is None else args.max_draws
    try:
        accepted = reject(
            draws, lambda z: probability(classifier, (z.numpy() - mean) / std), args.count, most, args.seed
        )
    except UserError as error:
        raise UserError(f"{name}, {TITLES[setting]}: {error}") from None
    hidden = int(train.targets.positive(name)[labelled.others].sum())
    return {"name": name, "setting": setting, "labelled": labelled, "accepted": accepted, "hidden": hidden}


def _judge(run: common.Run, train: Side, test: Side, name: str) -> Judge:
    """The classifier of pixels that says what a sample shows; its file is found again for the same images."""
    asked = question(train.targets, name)
    chosen = np.sort(np.random.default_rng((run.args.seed, 12)).permutation(len(train.z))[:JUDGED])
    what = "classes" if train.targets.kind == "classes" else f"attribute-{train.targets.names.index(name)}"
    total = run.args.epochs * len(chosen)
    with tqdm(total=total, unit="image", unit_scale=True, desc="judge", disable=run.args.quiet or None) as bar:
        classifier = cached_classifier(
            run.out / "judges" / f"{what}.pt",
            torch.from_numpy(train.images[chosen]),
            torch.from_numpy(asked.labels[chosen]),
            asked.classes,
            seed=run.args.seed,
            epochs=run.args.epochs,
            device=run.pipe.device,
            advance=bar.update,
        )
    try:
        return examine(classifier, asked.positive, torch.from_numpy(test.images), test.targets.positive(name))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _decode(run: common.Run, z: Tensor, numbers: Any) -> Tensor:
    """x_T goes by a draw's number: whoever accepts it gets the same image."""
    x = run.pipe.decode(z, None, run.args.stop_percent, seed=run.args.seed, indices=numbers)
    return common.check_finite(x, "the sampled images hold")


def _row(row: dict[str, Any], base: Tensor, targets: Targets, judge: Judge) -> dict[str, Any]:
    said, usual = judge(row["images"]), judge(base)
    accepted, share, rate = row["accepted"], float(said.mean()), float(usual.mean())
    return {
        "name": row["name"],
        "setting": row["setting"],
        "positives": len(row["labelled"].positives),
        "others": len(row["labelled"].others),
        "positives_among_others": row["hidden"],
        "acceptance": accepted.rate,
        "drawn": accepted.drawn,
        "accuracy": share,
        "interval": interval(int(said.sum()), len(said)),
        "corrected": judge.corrected(share),
        "unconditional": rate,
        "unconditional_interval": interval(int(usual.sum()), len(usual)),
        "unconditional_corrected": judge.corrected(rate),
        "data": float(targets.positive(row["name"]).mean()),
        "judge": {"accuracy": judge.accuracy, "hit": judge.hit, "false_alarm": judge.false_alarm},
    }


def _save(out: Path, base: Tensor, chosen: list[dict[str, Any]]) -> None:
    rows, labels = [base[:COLUMNS]], ["unconditional"]
    save_images(base, out / "images" / "unconditional", [f"{i:06d}" for i in range(len(base))])
    for row in chosen:
        folder = out / "images" / f"{row['name'].replace('/', '-').replace('..', '-')}-{row['setting']}"
        save_images(row["images"], folder, [f"{i:06d}" for i in row["accepted"].numbers])
        rows.append(row["images"][:COLUMNS])
        labels.append(f"{row['name']}, {row['setting']}")
    save_grid(rows, out / "grid.png", labels)


def _summary(report: dict[str, Any]) -> list[str]:
    def share(value: float | None, ends: tuple[float, float] | None = None) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" + (f" ({ends[0]:.2f}-{ends[1]:.2f})" if ends else "")

    lines = [
        [
            row["name"],
            TITLES[row["setting"]],
            f"{row['positives']} + {row['others']}",
            f"{100 * row['acceptance']:.1f}%",
            share(row["accuracy"], row["interval"]),
            share(row["corrected"]),
            share(row["unconditional"], row["unconditional_interval"]),
            share(row["data"]),
            f"{row['judge']['accuracy']:.3f}",
        ]
        for row in report["rows"]
    ]
    header = ["of", "setting", "labels", "accepted", "positive", "corrected", "unconditional", "data", "judge"]
    return [
        cli.table(header, lines, left=2),
        "positive: share of the samples that the judge, a classifier of pixels, calls so (95%); corrected: its errors "
        "on held-out images taken out; unconditional: the same share without rejection; data: of the training images; "
        "judge: its balanced accuracy on held-out images",
        f"{report['images']} images a row, {report['steps']} steps, {report['train_images']} training and "
        f"{report['test_images']} held-out images ({report['split']}), {common.where(report)}",
    ]
