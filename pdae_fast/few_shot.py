"""Sample a class from a few labels: `python -m pdae_fast.few_shot --name Bag --positives 50`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import cli
from .data import save_grid, save_images
from .errors import UserError
from .experiments import common, few_shot
from .experiments.few_shot import SETTINGS, Draws, Judge
from .experiments.image_classifier import cached_classifier
from .experiments.parts import Part, find_parts
from .experiments.targets import Targets
from .files import make_folder

TITLES = {"pu": "positive-unlabelled", "binary": "binary", "unconditional": "unconditional"}
COLUMNS = 10  # of the grid
MOST_DRAWS = 200  # for every image asked for, unless given


def main(argv: list[str] | None = None) -> None:
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
    add("--stop-percent", type=float, default=0.3, help="last part of the trajectory that G is left out of, 0 to 1")
    add("--latent-steps", type=int, help="steps of the latent DPM (default: --steps)")
    add("--no-latent-clamp", action="store_true", help="do not clamp z_T and every estimate of z_0 to +-1")
    add("--holdout", type=float, default=0.25, help="fraction the judge is tested on, for data without a test split")
    add("--epochs", type=int, default=25, help="of the judge, a classifier of pixels trained on all labels")
    args = common.parse(p, argv)
    for name in ("count", "epochs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("few-shot sampling needs scikit-learn: pip install 'pdae_fast[experiments]'")
    run = common.open_run(args)
    pipe = run.pipe
    pipe.sample_latents(1, 1)  # without a latent DPM this says so
    pipe.schedule.decoding(args.steps, args.stop_percent)
    pipe.schedule.timesteps(args.latent_steps or args.steps)
    settings = list(dict.fromkeys(args.settings))

    def check(targets: Targets) -> None:
        for name in _names(args, targets):
            for setting in settings:
                _choose(args, targets, name, setting)

    train, test, how = find_parts(run, run.out / "latents", args.holdout, check=check)
    names = _names(args, train.targets)
    make_folder(run.out)
    draws = Draws(pipe, args.latent_steps, not args.no_latent_clamp, args.seed)
    chosen = [_accept(run, draws, train, name, setting) for name in names for setting in settings]
    judges = {name: _judge(run, train, test, name) for name in names}
    total = (len(chosen) + 1) * args.count * common.evaluations(pipe, "random", None)
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
        stop_percent=args.stop_percent,
        latent_steps=args.latent_steps or args.steps,
        latent_clamp=not args.no_latent_clamp,
        positives=args.positives,
        l2=args.l2,
        rows=rows,
    )
    cli.write_json(run.out / "metrics.json", report)
    if not args.quiet:
        print(_summary(report, run.out))


def _names(args: argparse.Namespace, targets: Targets) -> list[str]:
    return list(dict.fromkeys(args.name or few_shot.default_names(targets, args.positives)))


def _choose(args: argparse.Namespace, targets: Targets, name: str, setting: str) -> few_shot.Labelled:
    negatives = args.positives if args.negatives is None else args.negatives
    others = negatives if setting == "binary" else args.unlabelled
    positive = targets.positive(name)
    try:
        return few_shot.choose(positive, setting, args.positives, others, args.seed)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _accept(run: common.Run, draws: Draws, train: Part, name: str, setting: str) -> dict[str, Any]:
    """Fit the classifier of one name and setting, and draw until enough z are accepted."""
    args = run.args
    labelled = _choose(args, train.targets, name, setting)
    mean, std = (v.cpu().numpy() for v in (run.model.latent_mean, run.model.latent_std))
    normalised = (train.z - mean) / std
    classifier = few_shot.fit(normalised[labelled.positives], normalised[labelled.others], args.l2)
    most = MOST_DRAWS * args.count if args.max_draws is None else args.max_draws
    try:
        accepted = few_shot.reject(
            draws, lambda z: few_shot.probability(classifier, (z.numpy() - mean) / std), args.count, most, args.seed
        )
    except UserError as error:
        raise UserError(f"{name}, {TITLES[setting]}: {error}") from None
    hidden = int(train.targets.positive(name)[labelled.others].sum())
    return {"name": name, "setting": setting, "labelled": labelled, "accepted": accepted, "hidden": hidden}


def _judge(run: common.Run, train: Part, test: Part, name: str) -> Judge:
    """The classifier of pixels that says what a sample shows; its file is found again for the same images."""
    asked = few_shot.question(train.targets, name)
    chosen = np.sort(np.random.default_rng((run.args.seed, 12)).permutation(len(train.z))[: few_shot.JUDGED])
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
        return few_shot.examine(classifier, asked.positive, torch.from_numpy(test.images), test.targets.positive(name))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _decode(run: common.Run, z: Tensor, numbers: Any) -> Tensor:
    """x_T goes by a draw's number: whoever accepts it gets the same image."""
    x = run.pipe.decode(z, run.pipe.random_x_T(run.args.seed, numbers), run.args.stop_percent)
    if not bool(torch.isfinite(x).all()):
        raise UserError("the sampled images hold NaN or infinite values; try --dtype float32")
    return x


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
        "interval": few_shot.interval(int(said.sum()), len(said)),
        "corrected": judge.corrected(share),
        "unconditional": rate,
        "unconditional_interval": few_shot.interval(int(usual.sum()), len(usual)),
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


def _summary(report: dict[str, Any], out: Path) -> str:
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
    text = [
        cli.table(header, lines, left=2),
        "positive: share of the samples that the judge, a classifier of pixels, calls so (95%); corrected: its errors "
        "on held-out images taken out; unconditional: the same share without rejection; data: of the training images; "
        "judge: its balanced accuracy on held-out images",
        f"{report['images']} images a row, {report['steps']} steps, {report['train_images']} training and "
        f"{report['test_images']} held-out images ({report['split']}), model {report['model']}, "
        f"{report['plan']} plan, {report['dtype']}, {report['device']}",
        *(f"assumed about the model: {note}" for note in report["assumed"]),
        f"wrote {out / 'grid.png'}, {out / 'images'} and {out / 'metrics.json'}",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
