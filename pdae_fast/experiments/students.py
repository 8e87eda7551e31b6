"""What distillation buys: one small network, started in several ways, taught with few labels.

Every arm is the same network with the same head, the same labelled images and the same steps of fine-tuning (with
--full, the head of a distilled one learns alone in the first half); arms differ in what the network learned before,
without labels: nothing (scratch, and "longer", which gets the steps of distillation on top), the teacher's features at
one time, at times drawn at random, by a policy (which alone sees the labels of the labelled images), or at all of them,
or to reconstruct pixels, a control. Everything is drawn anew with every seed: weights, order, and which images are
labelled; arms are compared seed by seed. "frozen" reads the maps of the student, unchanged, by a linear read-out, and
"teacher" those of the teacher.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .. import cli
from ..arguments import seed_option
from ..data import Sample, Subset, open_dataset
from ..data.bundled import bundled_for
from ..data.latents import split
from ..data.spec import add_crop, crop_for
from ..engine import resolve_device
from ..engine.device import describe_device
from ..errors import UserError
from ..files import claim_folder
from ..models import PDAE, Student
from ..pipeline import Pipeline
from ..student_config import HEADS
from ..training import Trainer, TrainSettings
from ..training.features import FeatureSet, Target, teacher_features
from ..training.recognition import MEASURES, Labelled, TaskTruth, choose_labels, evaluate, find_truth, measure
from ..training.students import (
    HEAD_FIRST,
    Bandit,
    Choice,
    RecogniseTask,
    StudentTask,
    describe_policy,
    new_student,
    with_head,
)
from . import linear, pixelwise
from .student_results import (
    ARMS,
    LONGER,
    PIXELS,
    QUICK_ARMS,
    SCRATCH,
    TEACHER,
    Results,
    draw,
    labels_of,
    rows,
    table,
    ways_of,
)

TEACHERS = {"points": "avatars64", "parts": "avatars64", "classes": "fashion32"}
BATCH, TUNE_BATCH = 64, 20
# Steps of distillation and of fine-tuning, quick and full; images of 32 px are cheap.
STEPS = {"points": ((100, 100), (600, 300)), "parts": ((100, 100), (600, 300)), "classes": ((200, 300), (1000, 1000))}
RATE = 1e-3  # of distillation
TUNE_RATES = {"points": 5e-4, "parts": 1e-2, "classes": 1e-2}  # the best for scratch, on held-out training images
GRID = 4  # classes are read from maps averaged to it
RESULTS, POLICY = "results.jsonl", "policy.json"


class Held:
    """A data set in memory, as a data set."""

    def __init__(self, dataset: Any) -> None:
        samples = [dataset[i] for i in range(len(dataset))]
        self.pixels = torch.stack([sample.image for sample in samples])
        self.names, self.size, self.labels = list(dataset.names), dataset.size, getattr(dataset, "labels", None)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        label = None if self.labels is None else int(self.labels[index])
        return Sample(self.pixels[index], self.names[index], label)


@dataclass
class Task:
    """One task: its ``teacher``, loaded from ``source``, images to learn from and to test on, what is known of both."""

    name: str
    source: str
    teacher: PDAE
    learn: Held
    test: Held
    known: TaskTruth
    truth: TaskTruth

    @property
    def levels(self) -> str:
        """What of the teacher is learned: pixels need the finer levels."""
        return "decoder" if self.name == "parts" else "middle"

    @cached_property
    def pipe(self) -> Pipeline:
        return Pipeline(self.teacher, dtype="float32", batch_size=BATCH)

    @cached_property
    def test_maps(self) -> list[Tensor]:
        """The teacher's levels of the test images."""
        return teacher_maps(self, self.test.pixels)


def open_task(name: str, args: argparse.Namespace) -> Task:
    """The task ``name``; UserError for data or labels that are missing, before anything is computed."""
    source = args.model or TEACHERS[name]
    teacher = PDAE.from_pretrained(source)
    channels, size, _ = teacher.image_shape
    spec = args.input or bundled_for(source, channels)
    options = {"crop": crop_for(args.crop, teacher.config), "without": args.out}
    sides = [open_dataset(spec, size, channels, part, **options) for part in ("train", "test")]
    specs = [spec, spec]
    if sides[0].names[:1] == sides[1].names[:1]:  # one set of files: no test images of its own
        if name != "classes" and args.input:
            specs[1] = bundled_for("", channels)
            sides[1] = open_dataset(specs[1], size, channels)
        else:
            sides = [_part(sides[0], places) for places in split(len(sides[0]), 0.25, 0)]
    sides = [_part(side, np.arange(args.limit)) if args.limit and len(side) > args.limit else side for side in sides]
    learned, tested = (find_truth(name, spec, side) for spec, side in zip(specs, sides, strict=True))
    if learned.labels != tested.labels:
        raise UserError(f"{spec}: its {name} are not those of the test images: {', '.join(tested.labels)}")
    return Task(name, str(source), teacher, *(Held(side) for side in sides), learned, tested)


def _part(dataset: Any, places: np.ndarray) -> Any:
    part = Subset(dataset, places.tolist())
    part.size = dataset.size
    return part


# -- one run -----------------------------------------------------------------------------------------------------------


class Runs:
    """The trainings of one command in its folder; what is finished there is not done again."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.folder, self.cache = Path(args.out) / "runs", Path(args.out) / "features"

    def _train(self, task: Any, dataset: Any, name: str, steps: int, batch: int, rate: float, seed: int) -> Trainer:
        settings = TrainSettings(
            task.name, name, steps, batch, lr=rate, lr_schedule="cosine", warmup=min(50, steps // 4), flip=False,
            seed=seed,
        )  # fmt: skip
        out = self.folder / name
        trainer = Trainer(
            task, dataset, settings, out, device=self.device, quiet=True, log_every=steps, save_every=max(steps, 1)
        )
        if (out / "checkpoint.pt").exists():
            trainer.resume()
        if stopped := trainer.run():
            raise KeyboardInterrupt(stopped)
        return trainer

    def distil(self, task: Task, arm: str, seed: int, known: TaskTruth) -> Student:
        """The student of ``arm``, distilled without labels but for a policy, which sees those of ``known``."""
        steps, _ = steps_of(self.args, task.name)
        student = new_student(task.teacher.config, self.args.width, 1, seed=seed)
        if arm in (SCRATCH, LONGER):
            return student
        T = task.teacher.config.schedule.timesteps
        choice = Choice.of("0" if arm == PIXELS else arm, None, T)
        sides = student.config.sizes if task.levels == "decoder" else student.config.sizes[-1:]
        target = Target(PIXELS if arm == PIXELS else task.levels, choice.times, sides)
        features = teacher_features(
            task.teacher, task.learn, target, self.cache, device=self.device, batch_size=BATCH, quiet=True
        )
        truth = known if choice.how == "policy" else None
        torch.manual_seed(seed + 1)
        learned = StudentTask(student, features, choice, "dense", truth, Bandit(passes=steps))
        data = FeatureSet(task.learn, features, truth)
        counted = f"-{task.name}-{len(known.indices)}" if truth else ""
        name = f"{Path(task.source).name}-{task.levels}-{arm}{counted}-{seed}"
        trainer = self._train(learned, data, name, steps, BATCH, RATE, seed)
        if truth:
            found = describe_policy(trainer.ema, learned, data)
            about = {"task": task.name, "labels": len(known.indices), "seed": seed}
            cli.write_json(self.folder / name / POLICY, {**about, **found})
        return learned.export(trainer.ema).cpu()

    def policies(self) -> list[dict[str, Any]]:
        """What every policy that has learned here does (see `describe_policy`)."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob(f"*/{POLICY}"))]

    def tune(
        self, task: Task, student: Student, fresh: bool, known: TaskTruth, steps: int, name: str, seed: int
    ) -> float:
        """How good ``student``, which knows nothing yet where it is ``fresh``, is on the test images once it has
        learned from ``known``."""
        # A short distillation leaves little to keep.
        first = HEAD_FIRST if self.args.full and not fresh else 0.0
        learned = RecogniseTask(with_head(student, known, seed), known, head_first=first)
        trainer = self._train(
            learned, Labelled(task.learn, known), name, steps, TUNE_BATCH, TUNE_RATES[task.name], seed
        )
        return evaluate(trainer.ema, task.test, task.truth)[MEASURES[task.name]]


def read(task: Task, train: Sequence[Tensor], known: TaskTruth, test: Sequence[Tensor], seed: int) -> float:
    """How good a linear read-out of maps is (see `linear` and `pixelwise`): of points from the whole deepest map, of
    classes from that averaged to 4x4, of parts pixel by pixel from all levels. Levels [k, ...] of the labelled images
    and [K, ...] of the test images."""
    if task.name == "parts":
        fitted = pixelwise.Discriminant(len(known.labels))
        for start in range(0, len(known.values), BATCH):
            rows = slice(start, start + BATCH)
            fitted.learn([level[rows] for level in train], known.values[rows].long())
        linear_map, side = fitted.solve(range(len(train))), task.learn.size
        parts = [linear_map([level[i : i + BATCH] for level in test], side) for i in range(0, len(test[0]), BATCH)]
        return measure(task.truth, torch.cat(parts))[MEASURES[task.name]]
    if task.name == "classes":
        train, test = ([F.adaptive_avg_pool2d(levels[0], GRID)] for levels in (train, test))
    flat = (levels[0].flatten(1).numpy() for levels in (train, test))
    features = linear.compact(linear.scale(linear.FeatureSet("", *flat), "standardise"))
    if task.name == "points":
        said = torch.from_numpy(linear.ridge(features, known.values.numpy(), seed)[0])
    else:
        said = torch.from_numpy(
            linear.fit(features, known.values.numpy(), max(3, len(known.labels)), seed).scores.argmax(1)
        )
    return measure(task.truth, said)[MEASURES[task.name]]


def student_maps(task: Task, student: Student, images: Tensor) -> list[Tensor]:
    student = student.eval()
    with torch.inference_mode():
        parts = [student.maps(part, None if task.levels == "decoder" else 1) for part in images.split(BATCH)]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def teacher_maps(task: Task, images: Tensor) -> list[Tensor]:
    outputs = len(task.pipe.plan.unet.output_blocks) if task.levels == "decoder" else 0
    return list(task.pipe.features(images, 0, outputs).levels)


# -- all of them -------------------------------------------------------------------------------------------------------


def run_task(task: Task, runs: Runs, results: Results, arms: Sequence[str], bar: Any) -> None:
    """Every arm, label count and seed of ``task``."""
    args = runs.args
    for seed in range(args.seed, args.seed + args.seeds):
        students: dict[str, Student] = {}
        for arm in [TEACHER, *arms]:
            for count in labels_of(args, task.name):
                keys = {way: (task.name, count, arm, way, seed) for way in ways_of(arm)}
                bar.set_postfix_str(f"{task.name} {arm} {count} seed {seed}")
                missing = [way for way, key in keys.items() if key not in results.found]
                known = choose_labels(task.known, count, seed)
                if missing and arm == TEACHER:
                    train = teacher_maps(task, task.learn.pixels[torch.from_numpy(known.indices)])
                    value = read(task, train, known, task.test_maps, seed)
                    results.add(keys["frozen"], value)
                elif missing:
                    label = f"{arm}{count}" if arm == "policy" else arm
                    if label not in students:
                        students[label] = runs.distil(task, arm, seed, known)
                    for way in missing:
                        results.add(keys[way], _value(task, runs, students[label], arm, way, known, seed))
                bar.update(len(keys))


def _value(task: Task, runs: Runs, student: Student, arm: str, way: str, known: TaskTruth, seed: int) -> float:
    if way == "frozen":
        images = task.learn.pixels[torch.from_numpy(known.indices)]
        maps = [student_maps(task, student, x) for x in (images, task.test.pixels)]
        return read(task, maps[0], known, maps[1], seed)
    distilling, steps = steps_of(runs.args, task.name)
    steps += distilling if arm == LONGER else 0
    name = f"{task.name}-{len(known.indices)}-{arm}-{seed}"
    return runs.tune(task, student, arm in (SCRATCH, LONGER), known, steps, name, seed)


def steps_of(args: argparse.Namespace, task: str) -> tuple[int, int]:
    """Steps of distillation and of fine-tuning."""
    usual = STEPS[task][args.full]
    return args.steps or usual[0], args.tune_steps or usual[1]


def cost(task: Task, width: int) -> dict[str, float]:
    """Milliseconds an image, 64 at a time: of the student's map that stands for the middle block, and of all blocks of
    the teacher's fused network, the least of five interleaved times."""
    student = new_student(task.teacher.config, width, 1).eval()
    images = task.test.pixels[:BATCH]
    outputs = len(task.pipe.plan.unet.output_blocks)
    seconds: dict[str, list[float]] = {"student": [], "teacher": []}
    for _ in range(5):
        with torch.inference_mode():
            start = time.perf_counter()
            student.maps(images, 1)
        seconds["student"].append(time.perf_counter() - start)
        start = time.perf_counter()
        task.pipe.features(images, 0, outputs)
        seconds["teacher"].append(time.perf_counter() - start)
    found = {name: 1e3 * min(values) / len(images) for name, values in seconds.items()}
    return {**found, "share": found["student"] / found["teacher"]}


# -- the command -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "students", "What distillation buys: the same student from scratch and distilled, taught with few labels."
    )
    add = p.add_argument
    add("--task", nargs="+", choices=HEADS, help="what is taught (default: points and classes, or what fits --model)")
    add("--seeds", type=int, help="repetitions (default: 2; 5 with --full)")
    add("--full", action="store_true", help="the full-size run: all arms, two label counts, longer training")
    add("--arms", nargs="+", choices=ARMS, help="how the student starts (default: some; all with --full)")
    add("--labels", type=int, nargs="+", metavar="N", help="labelled images (default: a few, of each task its own)")
    add("--model", help="PDAE to learn from (default: the bundled one for the task)")
    add(
        "--input",
        metavar="DATA",
        help="labelled images to learn from; where those are avatars, the bundled ones are tested on (default: the "
        "bundled Fashion-MNIST; three quarters of the bundled avatars, tested on the others)",
    )
    add_crop(p)
    add("--limit", type=int, metavar="N", help="use at most N images to learn from, and to test on")
    add("--steps", type=int, help="of distillation, 64 images each (default: 100 to 1,000)")
    add("--tune-steps", type=int, help="of fine-tuning, 20 images each (default: 100 to 1,000)")
    add("--width", type=int, default=16, help="of the student")
    add("--out", default="students", help="directory for the results; the same command continues there")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--seed", type=seed_option, default=0, help="of the first repetition")
    add("--quiet", action="store_true", help="no progress bar, no table")
    return p


def _fitting(model: str | None) -> list[str]:
    """The tasks that bundled data has labels for, of the images that ``model`` takes."""
    if model is None:
        return ["points", "classes"]
    return ["classes" if PDAE.from_pretrained(model).image_shape[0] == 1 else "points"]


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    args.seeds = (5 if args.full else 2) if args.seeds is None else args.seeds
    for name in ("seeds", "steps", "tune_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    args.task = list(dict.fromkeys(args.task or _fitting(args.model)))
    arms = [arm for arm in ARMS if arm in (args.arms or (ARMS if args.full else QUICK_ARMS))]
    if SCRATCH not in arms:
        arms.insert(0, SCRATCH)
    device = resolve_device(args.device)
    tasks = [open_task(name, args) for name in args.task]
    for task in tasks:
        for count in labels_of(args, task.name):
            choose_labels(task.known, count, 0)
    out = Path(args.out)
    claim_folder(out)
    settings = {
        k: getattr(args, k) for k in ("model", "input", "crop", "limit", "full", "steps", "tune_steps", "width")
    }
    results, runs = Results(out / RESULTS, settings), Runs(args, device)
    ways = sum(len(ways_of(arm)) for arm in [TEACHER, *arms])
    total = sum(args.seeds * len(labels_of(args, task.name)) * ways for task in tasks)
    with tqdm(total=total, unit="run", disable=args.quiet or None) as bar:
        for task in tasks:
            run_task(task, runs, results, arms, bar)
    found = rows(results, args, arms)
    draw(found, out / "students.png")
    costs = {task.name: cost(task, args.width) for task in tasks}
    report = {
        **settings, "seeds": args.seeds, "device": describe_device(device), "versions": cli.versions(),
        "learned_from": {task.name: len(task.learn) for task in tasks},
        "tested_on": {task.name: len(task.test) for task in tasks},
        "cost": costs, "policies": runs.policies(), "rows": found,
    }  # fmt: skip
    cli.write_json(out / "metrics.json", report)
    if not args.quiet:
        print(table(found))
        for name, values in costs.items():
            print(
                f"{name}: a student's forward is {values['share']:.1%} of the teacher's "
                f"({values['student']:.2f} of {values['teacher']:.2f} ms an image, {describe_device(device)})"
            )
        print(f"wrote {out / 'students.png'} and {out / 'metrics.json'}")
