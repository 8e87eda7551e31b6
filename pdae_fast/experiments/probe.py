"""What is in z: linear probes against pixels and their principal components, and nearest neighbours; or what is in the
features of the network, block by block along t."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import cli
from ..errors import UserError
from ..files import atomic_write, claim_folder
from ..plots import COLOURS, chart
from . import common, probe_features
from .estimates import Estimate, accuracy, bootstrap_auroc, bootstrap_mean, mean_estimate
from .linear import CHOICES, SCALINGS, FeatureSet, fit, pixel_features, scale
from .nearest import agreement, chance, check, neighbours, picture
from .parts import Side, find_parts
from .probe_results import draw, tables, write_table
from .targets import Targets

SCALED = {"whiten": "whitened", "standardise": "standardised"}
TIMES, GRIDS = (0, 50, 100, 200, 400), (1, 4)  # of features
SHOWN = 6  # queries in the picture
QUERIES = 2000  # test images whose neighbours are counted


def _words(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


def _parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "probe",
        "Linear probes on z against pixels, and nearest neighbours in z; with --features, what is in the network's "
        "features, block by block along t, beside z and pixels.",
    )
    common.add_options(p, out="probe", labels=True)
    add = p.add_argument
    add("--holdout", type=float, default=0.25, help="fraction that is tested on, for data without splits of its own")
    add("--test", nargs="+", metavar="DATA", help="images to test on, labelled like those of --input (all are learned)")
    add("--scaling", choices=SCALINGS, default="whiten", help="of every feature set, by its training images")
    add("--neighbours", type=int, default=8, help="how many training images each test image is compared with")
    add("--features", nargs="+", metavar="BLOCK", help="probe these: middle, decoder (all its blocks), decoder1 ...")
    add("--times", nargs="+", type=int, metavar="T", help=f"of the features (default: {_words(TIMES)})")
    add("--noised", action="store_true", help="features of x_t too, not of the images alone")
    add("--grid", nargs="+", type=int, metavar="N", help=f"features are averaged to N x N (default: {_words(GRIDS)})")
    add("--targets", nargs="+", choices=probe_features.TARGETS, help="what is read from features (default: all known)")
    add("--labelled", type=int, metavar="N", help="training images that read-outs of features see (default: all, for "
        f"parts {probe_features.PART_IMAGES})")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for module in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise UserError("probe needs scikit-learn and matplotlib: pip install 'pdae_fast[experiments]'")
    if args.features is None:
        for name in ("times", "noised", "grid", "targets", "labelled"):
            if getattr(args, name):
                raise UserError(f"--{name} is of features: say of which blocks, such as --features middle")
    run = common.open_run(args, infers=False, prior=args.features is not None)
    if args.features is not None:
        _features(run)
        return
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


def _features(run: common.Run) -> None:
    args, model = run.args, run.model
    grids = args.grid or GRIDS
    sets = probe_features.find_sets(run.pipe.plan.unet, model.config.image_size, args.features, grids)
    times = probe_features.check_times(args.times or TIMES, run.pipe.schedule.T)
    run.pipe.features(torch.empty(0, *model.image_shape), times[0], sets.outputs)  # says what the model misses: a label
    if args.labelled is not None and args.labelled < 1:
        raise UserError(f"--labelled must be at least 1, not {args.labelled}")
    folders = [probe_features.avatar_folder(spec) for spec in (run.spec, args.test or run.spec)]
    chosen: list[str] = []

    def check(known: Targets) -> None:
        chosen[:] = probe_features.choose_targets(args.targets, known, folders, model.config.image_size)

    claim_folder(run.out)
    train, test, how = find_parts(run, run.out / "latents", args.holdout, args.test or (), check)
    sweep, notes = probe_features.prepare(run, sets, chosen, (train, test), folders, args.labelled or 0)
    sweep.check_memory()
    table = run.out / "features.csv"
    rows = probe_features.measure(
        sweep, times, [False, True] if args.noised else [False], args.quiet, lambda rows: write_table(table, rows)
    )
    report = common.report(
        run,
        images=len(train.names) + len(test.names),
        recipe=False,
        split=how,
        train_images=len(sweep.train.names),
        part_images=len(sweep.learned) if "parts" in chosen else None,
        test_images=len(test.names),
        targets=chosen,
        blocks=[block._asdict() for block in sets.blocks],
        times=times,
        grids=sets.grids,
        measures={name: probe_features.MEASURES[name] for name in chosen},
        interval="95%, bootstrap over test images",
        features=rows,
        notes=notes,
    )
    cli.write_json(run.out / "metrics.json", report)
    draw(run.out / "features.png", report)
    common.say(run, tables(report), ["features.png", "features.csv", "metrics.json"])


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
