"""`analyze critical-stage`: the grid of stages, its heat map, and the shortest stage that is enough."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import cli
from ...data import save_grid
from ...errors import UserError
from ...files import make_folder
from ...schedule import Trajectory
from .. import common, image_classifier
from ..common import Cost
from . import critical_stage
from .times import write_csv

SEEN = 60000  # images that a classifier sees in training
SHOWN = 10  # samples in a row of the picture


def options(p: argparse.ArgumentParser) -> None:
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


def run_command(args: argparse.Namespace) -> None:
    if args.count < 1 or (args.epochs is not None and args.epochs < 1) or not 1 <= args.stages <= 100:
        raise UserError("--count and --epochs must be at least 1, --stages from 1 to 100")
    run = common.open_run(args)
    pipe, out = run.pipe, run.out
    T = pipe.schedule.T
    trajectory = pipe.schedule.decoding(args.steps, spacing=args.spacing)
    parts = critical_stage.stages_of(trajectory, T, args.stages)
    data = critical_stage.labelled(run, args.attribute)
    make_folder(out)
    if args.epochs is None:
        args.epochs = max(1, SEEN // len(data.images))
    trained = (args.guide is None) + (args.judge is None)
    with common.progress(pipe, trained * args.epochs * len(data.images), "classifiers", args.quiet) as advance:
        guide, judge, quality = _classifiers(run, data, advance)
    wanted = torch.arange(args.count) % len(data.names)
    right, shown, cost = _sample(run, parts, guide, judge, wanted)
    stages = [
        critical_stage.Stage(low * T // args.stages, high * T // args.stages, *_share(hits))
        for (low, high), hits in right.items()
    ]
    nothing, throughout = stages[0], next(s for s in stages if s.low == 0 and s.high == T)
    target = args.accuracy
    if target is None:
        target = nothing.accuracy + 0.9 * (throughout.accuracy - nothing.accuracy)
    best = critical_stage.shortest(stages, target)
    write_csv(out / "stages.csv", [stage._asdict() for stage in stages])
    critical_stage.heat_map(out / "heat_map.png", stages, T, args.stages, best)
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
    if not args.quiet:
        ordered = sorted(stages, key=lambda s: (s.high - s.low, s.low))
        lines = [[_stage_name(s, T), f"{s.accuracy:.3f}", f"{s.standard_error:.3f}"] for s in ordered]
        print(cli.table(["guided", "accuracy", "standard error"], lines))
        print(f"asked for, in turn: {', '.join(data.names)}")
        print("; ".join(f"{name} {value:.3f}" for name, value in quality.items()))
        found = f"guidance at {best.low} <= t < {best.high}" if best else "none"
        print(f"shortest stage with an accuracy of {target:.3f}: {found}")
        print(f"wrote {out}")


def _sample(
    run: common.Run, parts: list[Trajectory], guide: nn.Module, judge: nn.Module, wanted: Tensor
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor], Cost]:
    """For every (low, high) of `guided_stages` which samples the judge finds to be of the class ``wanted`` [count], the
    first of them [SHOWN, C, H, W], and what it cost."""
    args, pipe, cost = run.args, run.pipe, Cost()
    hits: dict[tuple[int, int], list[Tensor]] = {}
    shown: dict[tuple[int, int], Tensor] = {}
    total = len(wanted) * critical_stage.evaluations(parts)
    with common.progress(pipe, total, "critical-stage", args.quiet) as advance, cost.of(pipe):
        pipe.plan.prepare(step.t for part in parts for step in part)
        for part in torch.arange(len(wanted)).split(pipe.batch_size):
            found = critical_stage.guided_stages(
                pipe.plan.field(),
                critical_stage.log_probability(guide, wanted[part]),
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


def _stage_name(stage: critical_stage.Stage, T: int) -> str:
    if stage.low == stage.high:
        return "not guided"
    return "guided throughout" if (stage.low, stage.high) == (0, T) else f"guided {stage.high} to {stage.low}"


def _share(right: Tensor) -> tuple[float, float]:
    share = float(right.float().mean())
    return share, (share * (1 - share) / len(right)) ** 0.5


def _classifiers(
    run: common.Run, data: critical_stage.Labelled, advance: Callable[[int], Any]
) -> tuple[Any, Any, dict]:
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
