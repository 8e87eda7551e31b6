"""When a diffusion model decides what the image shows: classifier guidance in a part of the trajectory only."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import cli
from ...data import save_grid
from ...errors import UserError
from ...files import claim_folder
from ...plots import chart
from ...samplers import ddim
from ...schedule import Schedule, Trajectory
from .. import common, image_classifier
from ..common import Cost
from ..parts import find_parts
from ..targets import Targets
from .times import write_csv

HOLDOUT = 0.25  # of data without a test split, to judge the judge


class Labelled(NamedTuple):
    """Images [N, C, H, W] and their classes int64 [N], to learn from and to test on; ``names`` of the classes."""

    names: list[str]
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def labelled(run: common.Run, attribute: str | None) -> Labelled:
    """The labelled images of ``run``, divided by `parts.find_parts`.

    Attributes are one question at a time: ``attribute`` (default: the most evenly divided one) gives two classes.
    Raises UserError for an attribute that there is not, or beside classes.
    """

    def check(targets: Targets) -> None:
        if attribute is None:
            return
        if targets.kind == "classes":
            raise UserError("--attribute chooses one of several attributes; this data has classes")
        targets.positive(attribute)

    train, test, _ = find_parts(run, run.out / "latents", HOLDOUT, check=check)
    names = train.targets.names
    if train.targets.kind == "classes":
        labels = [part.targets.values for part in (train, test)]
    else:
        if attribute is None:
            attribute = names[int(np.abs(train.targets.values.mean(axis=0) - 0.5).argmin())]
        names, labels = [f"not {attribute}", attribute], [p.targets.positive(attribute) for p in (train, test)]
    images = [torch.from_numpy(part.images) for part in (train, test)]
    classes = [torch.as_tensor(values.astype(np.int64)) for values in labels]
    return Labelled(names, images[0], classes[0], images[1], classes[1])


# -- sampling ------------------------------------------------------------------------------------------------------


def log_probability(classifier: nn.Module, labels: Tensor) -> Callable[[Tensor, int], Tensor]:
    """log p(y | x_t) [B] of a noise-aware ``classifier`` for every image's own class ``labels`` [B]."""

    def evaluate(x: Tensor, t: int) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        return F.log_softmax(classifier(x, times), dim=1).gather(1, labels.to(x.device)[:, None]).squeeze(1)

    return evaluate


def stages_of(trajectory: Trajectory, T: int, stages: int) -> list[Trajectory]:
    """``trajectory`` cut into ``stages`` equal parts of [0, T) by the times at which its steps begin; lowest first."""
    parts: list[list] = [[] for _ in range(stages)]
    for step in trajectory:
        parts[step.t * stages // T].append(step)
    if not all(parts):
        raise UserError(f"{len(trajectory)} steps leave one of the {stages} stages empty; use more --steps")
    return [tuple(part) for part in parts]


def guided_stages(
    field: ddim.Field,
    log_prob: Callable[[Tensor, int], Tensor],
    x_T: Tensor,
    schedule: Schedule,
    parts: Sequence[Trajectory],
    *,
    scale: float = 1.0,
    clamp: float | None = 1.0,
    progress: ddim.Progress | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """(low, high, x at t = 0) for every stage [low, high) of ``parts`` (from `stages_of`) that is guided, the rest of
    the trajectory being left to ``field``; (0, 0) first, which is guided nowhere.

    Trajectories that agree up to a point are run once up to there: what is left of a stage's cost are its own steps
    (see `evaluations`).
    """
    led = ddim.guided(field, log_prob, scale)

    def run(x: Tensor, part: int, guide: bool) -> Tensor:
        steps = tuple(step._replace(use_gradient=guide) for step in parts[part])
        return ddim.integrate(led, x, steps, clamp=clamp, progress=progress)

    count = len(parts)
    entering = {count: x_T}  # x where a part begins, unguided so far
    for part in reversed(range(count)):
        entering[part] = run(entering[part + 1], part, False)
    yield 0, 0, entering[0]
    for high in range(count, 0, -1):
        x = entering[high]
        for low in reversed(range(high)):
            x = end = run(x, low, True)
            for part in reversed(range(low)):
                end = run(end, part, False)
            yield low, high, end


def evaluations(parts: Sequence[Trajectory]) -> int:
    """Network evaluations of `guided_stages`, for one image."""
    lengths, count = [len(part) for part in parts], len(parts)
    guided = sum(sum(lengths[:high]) for high in range(1, count + 1))
    tails = sum(sum(lengths[:low]) * (count - low) for low in range(count))
    return sum(lengths) + guided + tails


# -- results -------------------------------------------------------------------------------------------------------


class GuidedStage(NamedTuple):
    """Guidance for low <= t < high (nowhere, where they are the same): the share of samples that are of the class
    asked for, and its standard error."""

    low: int
    high: int
    accuracy: float
    standard_error: float


def shortest(stages: Sequence[GuidedStage], accuracy: float) -> GuidedStage | None:
    """The shortest stage that reaches ``accuracy``, and more than no guidance does; the most accurate of equally short
    ones; None when none does."""
    nothing = max(stage.accuracy for stage in stages if stage.high == stage.low)
    reaching = [stage for stage in stages if stage.accuracy >= accuracy and stage.accuracy > nothing]
    return min(reaching, key=lambda stage: (stage.high - stage.low, -stage.accuracy), default=None)


def heat_map(path: Path, stages: Sequence[GuidedStage], T: int, count: int, best: GuidedStage | None) -> None:
    """Accuracy over where guidance begins and ends; the shortest stage is framed."""
    cells = np.full((count, count), np.nan)
    for stage in stages:
        if stage.high > stage.low:
            cells[stage.high * count // T - 1, stage.low * count // T] = stage.accuracy
    edges = [k * T // count for k in range(count + 1)]
    nothing = next(stage.accuracy for stage in stages if stage.high == stage.low)
    with chart(path, 1.9 + 0.62 * count, 1.3 + 0.55 * count) as axes:
        picture = axes.imshow(cells, origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, j in np.argwhere(np.isfinite(cells)):
            colour = "white" if cells[i, j] > 0.6 else "black"
            axes.text(j, i, f"{cells[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=9)
        if best is not None:
            i, j = best.high * count // T - 1, best.low * count // T
            frame = {"fill": False, "edgecolor": "#d55e00", "linewidth": 2.5}
            axes.add_patch(_rectangle((j - 0.48, i - 0.48), 0.96, 0.96, **frame))
        axes.set_xticks(range(count), edges[:-1])
        axes.set_yticks(range(count), edges[1:])
        axes.grid(visible=False)
        axes.set_xlabel("guidance ends at t1")
        axes.set_ylabel("guidance begins at t2")
        axes.set_title(f"accuracy; {nothing:.2f} without guidance", loc="left", fontsize=10)
        axes.figure.colorbar(picture, ax=axes)


def _rectangle(*args: Any, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **options)


# -- the command ---------------------------------------------------------------------------------------------------

SEEN = 60000  # images that a classifier sees in training
SHOWN = 10  # samples in a row of the picture


def add_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    p.set_defaults(steps=50)
    add("--stages", type=int, default=5, help="parts of [0, T) at whose edges guidance begins and ends")
    add("--count", type=int, default=40, help="samples for every pair of edges; classes take turns")
    add("--scale", type=float, default=5.0, help="of the guidance")
    add(
        "--accuracy", type=float, help="what a stage must reach (default: nine tenths of what guidance throughout adds)"
    )
    add("--attribute", help="guide toward having, or not having, this one (default: the most evenly divided)")
    add("--epochs", type=int, help=f"of training the two classifiers (default: those of {SEEN:,} images in all)")
    add("--guide", metavar="FILE", help="your own classifier of x_t: TorchScript, (x_t, t int64 [B]) to logits")
    add("--judge", metavar="FILE", help="your own classifier of clean images: TorchScript, x to logits")


def command(args: argparse.Namespace) -> None:
    if args.count < 1 or (args.epochs is not None and args.epochs < 1) or not 1 <= args.stages <= 100:
        raise UserError("--count and --epochs must be at least 1, --stages from 1 to 100")
    run = common.open_run(args, infers=False)
    common.check_g(run.model, "analyze critical-stage")
    pipe, out = run.pipe, run.out
    T = pipe.schedule.T
    trajectory = pipe.schedule.decoding(pipe.recipe.steps, spacing=pipe.recipe.spacing)
    parts = stages_of(trajectory, T, args.stages)
    claim_folder(out)
    data = labelled(run, args.attribute)
    if args.epochs is None:
        args.epochs = max(1, SEEN // len(data.images))
    trained = (args.guide is None) + (args.judge is None)
    with common.progress(pipe, trained * args.epochs * len(data.images), "classifiers", args.quiet) as advance:
        guide, judge, quality = _classifiers(run, data, advance)
    wanted = torch.arange(args.count) % len(data.names)
    right, shown, cost = _sample(run, parts, guide, judge, wanted)
    stages = [
        GuidedStage(low * T // args.stages, high * T // args.stages, *_share(hits))
        for (low, high), hits in right.items()
    ]
    nothing, throughout = stages[0], next(s for s in stages if s.low == 0 and s.high == T)
    target = args.accuracy
    if target is None:
        target = nothing.accuracy + 0.9 * (throughout.accuracy - nothing.accuracy)
    best = shortest(stages, target)
    write_csv(out / "stages.csv", [stage._asdict() for stage in stages])
    heat_map(out / "heat_map.png", stages, T, args.stages, best)
    picked = dict.fromkeys([nothing, throughout, *([best] if best else [])])
    rows = [shown[s.low * args.stages // T, s.high * args.stages // T] for s in picked]
    save_grid(rows, out / "grid.png", [_stage_name(stage, T) for stage in picked])
    report = common.report(
        run,
        images=len(data.images),
        classes=data.names,
        samples=args.count,
        scale=args.scale,
        epochs=args.epochs,
        guide=args.guide or "trained here on x_t",
        judge=args.judge or "trained here on clean images",
        classifiers=quality,
        accuracy_wanted=target,
        shortest=best and best._asdict(),
        stages=[stage._asdict() for stage in stages],
        **cost.report(args.count),
    )
    cli.write_json(out / "metrics.json", report)
    common.say(run, _summary(report, T), ["grid.png", "heat_map.png", "stages.csv", "metrics.json"])


def _summary(report: dict[str, Any], T: int) -> list[str]:
    stages, best = [GuidedStage(**values) for values in report["stages"]], report["shortest"]
    ordered = sorted(stages, key=lambda s: (s.high - s.low, s.low))
    lines = [[_stage_name(s, T), f"{s.accuracy:.3f}", f"{s.standard_error:.3f}"] for s in ordered]
    found = f"guidance at {best['low']} <= t < {best['high']}" if best else "none"
    return [
        cli.table(["guided", "accuracy", "standard error"], lines),
        f"asked for, in turn: {', '.join(report['classes'])}",
        "; ".join(f"{name} {value:.3f}" for name, value in report["classifiers"].items()),
        f"shortest stage with an accuracy of {report['accuracy_wanted']:.3f}: {found}",
    ]


def _sample(
    run: common.Run, parts: list[Trajectory], guide: nn.Module, judge: nn.Module, wanted: Tensor
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor], Cost]:
    """For every (low, high) of `guided_stages` which samples the judge finds to be of the class ``wanted`` [count], the
    first of them [SHOWN, C, H, W], and what it cost."""
    args, pipe, cost = run.args, run.pipe, Cost()
    hits: dict[tuple[int, int], list[Tensor]] = {}
    shown: dict[tuple[int, int], Tensor] = {}
    total = len(wanted) * evaluations(parts)
    with common.progress(pipe, total, "critical-stage", args.quiet) as advance, cost.of(pipe):
        pipe.plan.prepare(step.t for part in parts for step in part)
        for part in torch.arange(len(wanted)).split(pipe.batch_size):
            found = guided_stages(
                pipe.field(),
                log_probability(guide, wanted[part]),
                pipe.random_x_T(args.seed, part.tolist()).to(pipe.device),
                pipe.schedule,
                parts,
                scale=args.scale,
                progress=functools.partial(advance, len(part)),
            )
            for low, high, x in found:
                x = x.cpu()
                hits.setdefault((low, high), []).append(image_classifier.predict(judge, x).argmax(1) == wanted[part])
                shown[low, high] = torch.cat([shown.get((low, high), x[:0]), x])[:SHOWN]
    return {stage: torch.cat(right) for stage, right in hits.items()}, shown, cost


def _stage_name(stage: GuidedStage, T: int) -> str:
    if stage.low == stage.high:
        return "not guided"
    return "guided throughout" if (stage.low, stage.high) == (0, T) else f"guided {stage.high} to {stage.low}"


def _share(right: Tensor) -> tuple[float, float]:
    share = float(right.float().mean())
    return share, (share * (1 - share) / len(right)) ** 0.5


def _classifiers(run: common.Run, data: Labelled, advance: Callable[[int], Any]) -> tuple[Any, Any, dict]:
    """The guide, the judge, and how good they are on the test images."""
    args, device, classes = run.args, run.pipe.device, len(data.names)
    schedule, settings = run.pipe.schedule, {"epochs": args.epochs, "device": device, "advance": advance}
    train = (data.images, data.labels, classes)
    # Files first: a mistake in one shows before minutes of training.
    guide, judge = None, None
    if args.guide:
        guide = image_classifier.UserClassifier(args.guide, "--guide", classes, True, device)
    if args.judge:
        judge = image_classifier.UserClassifier(args.judge, "--judge", classes, False, device)
    if guide is None:
        guide = image_classifier.cached_classifier(
            run.out / "guide.pt", *train, seed=args.seed, schedule=schedule, **settings
        )
    if judge is None:
        judge = image_classifier.cached_classifier(run.out / "judge.pt", *train, seed=args.seed + 1, **settings)
    right = image_classifier.predict(judge, data.test_images).argmax(1) == data.test_labels
    quality = {"judge on test images": float(right.float().mean())}
    for t in (0, schedule.T // 4, schedule.T // 2, 3 * schedule.T // 4):
        quality[f"guide on x_{t}"] = image_classifier.accuracy_at(
            guide, schedule, data.test_images, data.test_labels, t, args.seed
        )
    return guide, judge, quality
