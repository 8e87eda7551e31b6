"""What a student is taught with labels, classes, parts or points: where the truth comes from, the loss, the measure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .. import cli
from ..data import Subset, stream
from ..data.attributes import class_names, file_labels
from ..data.avatar_truth import read_landmarks, read_parts
from ..errors import UserError
from ..models import Student
from ..student_config import HEADS

BATCH = 64
EYES = ("left_eye", "right_eye")


class TaskTruth(NamedTuple):
    """What is known of K images of a data set, ``indices`` [K] ascending, for one of HEADS called ``labels``.

    values: classes int64 [K]; parts uint8 [K, S, S], places in ``labels``; or points float32 [K, n, 2], (x, y) in
    pixels of an image of side S from the outer corner of its first pixel. scale: a loss of 1 is that of somebody who
    always says the mean (points; else 1).
    """

    task: str
    labels: list[str]
    values: Tensor
    indices: np.ndarray
    scale: float = 1.0

    def rows(self, places: Sequence[int] | np.ndarray) -> TaskTruth:
        """That of the images at ``places`` among the K."""
        places = np.sort(np.asarray(places, dtype=np.int64))
        return self._replace(values=self.values[torch.from_numpy(places)], indices=self.indices[places])

    def digest(self) -> str:
        """16 hexadecimal digits of which images are labelled and how."""
        found = hashlib.sha256(f"{self.task} {self.labels}".encode())
        for array in (self.indices, self.values.numpy()):
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()[:16]


def find_truth(
    task: str,
    spec: str,
    dataset: Any,
    attributes: str | None = None,
    columns: Sequence[str] | None = None,
) -> TaskTruth:
    """What is known about the images of ``dataset``, which was opened as ``spec``.

    classes: the columns of ``attributes``, the labels of the data set (IDX files), or its first subfolders. parts and
    points: masks and landmarks.csv of a folder of avatars (or in their format). Nothing of the images is decoded.
    Raises UserError for labels that are missing, for masks of another size, and for one class alone.
    """
    if task not in HEADS:
        raise UserError(f"--task {task} is not known; expected {', '.join(HEADS)}")
    if task == "classes":
        found = _classes(spec, dataset, attributes, columns)
    else:
        if attributes or columns:
            raise UserError(f"--attributes and --columns are for --task classes, not {task}")
        found = _avatars(task, spec, dataset)
    present = found.values.unique() if task != "points" else range(2)
    if len(present) < 2:
        raise UserError(f"all {len(found.indices)} images are of one class; expected at least two")
    return found


def choose_labels(truth: TaskTruth, count: int | None, seed: int) -> TaskTruth:
    """``count`` of the images of ``truth`` (None: all), drawn by ``seed``, of classes as evenly as there are; a smaller
    count draws some of those of a larger one. UserError where there are fewer, and where all would be of one class."""
    if count is None:
        return truth
    total = len(truth.indices)
    if not 1 <= count <= total:
        raise UserError(
            f"--labels must be from 1 to the {total} images that have some and are not held out, not {count}"
        )
    order = np.random.default_rng((seed, 12)).permutation(total)
    if truth.task == "classes":
        values, seen = truth.values.numpy()[order], {}
        turn = np.array([seen.setdefault(int(v), iter(range(total))).__next__() for v in values])
        order = order[np.argsort(turn, kind="stable")]
    found = truth.rows(order[:count])
    if truth.task == "classes" and len(found.values.unique()) < 2:
        raise UserError(f"--labels {count} are all of one class; expected at least two")
    return found


def _classes(spec: str, dataset: Any, attributes: str | None, columns: Sequence[str] | None) -> TaskTruth:
    every = np.arange(len(dataset))
    if attributes is not None:
        table = file_labels(dataset.names, attributes, columns)
        odd = next((i for i, row in enumerate(table.values) if int(row.sum()) != 1), None)
        if odd is not None:
            raise UserError(
                f"{attributes}: {dataset.names[table.indices[odd]]} has {int(table.values[odd].sum())} of the "
                f"{len(table.columns)} columns positive; expected one, its class (see --columns)"
            )
        values = table.values.long().argmax(1)
        return TaskTruth("classes", list(table.columns), values, np.asarray(table.indices, dtype=np.int64))
    labels = getattr(dataset, "labels", None)
    if labels is not None:
        values = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        return TaskTruth("classes", class_names([spec], int(values.max()) + 1), values, every)
    folders = [name.partition("/")[0] if "/" in name else None for name in dataset.names]
    if None in folders:
        raise UserError(
            "these images have no classes: give --attributes FILE with one column for each class, a folder with one "
            "subfolder for each, or IDX files with labels"
        )
    known = sorted(set(folders))
    place = {folder: i for i, folder in enumerate(known)}
    return TaskTruth("classes", known, torch.tensor([place[folder] for folder in folders]), every)


def _avatars(task: str, spec: str, dataset: Any) -> TaskTruth:
    side, every = dataset.size, np.arange(len(dataset))
    if task == "parts":
        masks = read_parts(spec, dataset.names)
        if masks.size != side:
            raise UserError(f"{spec}: masks of {masks.size} x {masks.size} pixels; the student sees {side} x {side}")
        return TaskTruth(task, list(masks.names), torch.from_numpy(masks.values), every)
    marks = read_landmarks(spec, dataset.names)
    values = torch.from_numpy(marks.values) * (side / marks.size)
    spread = float((values - values.mean(0)).square().mean()) / side**2
    return TaskTruth(task, list(marks.names), values, every, spread or 1.0)


# -- learning ----------------------------------------------------------------------------------------------------------


def task_loss(task: str, out: Tensor, truth: Tensor, scale: float = 1.0) -> Tensor:
    """Loss [B] of each image. classes: cross entropy of logits [B, n]. parts: that of logits [B, n, h, w], mean over
    the pixels; a larger mask is read at every so-many-th pixel. points: mean squared error of [B, n, 2], both in shares
    of the image's side, over ``scale``."""
    if task == "classes":
        return F.cross_entropy(out, truth, reduction="none")
    if task == "points":
        return (out - truth).square().mean((1, 2)) / scale
    step = truth.shape[-1] // out.shape[-1]
    truth = truth[:, step // 2 :: step, step // 2 :: step].long()
    return F.cross_entropy(out, truth, reduction="none").mean((1, 2))


class Labelled(Dataset):
    """The images that have a truth, each with it."""

    def __init__(self, dataset: Any, truth: TaskTruth) -> None:
        self.dataset, self.truth = dataset, truth

    def __len__(self) -> int:
        return len(self.truth.indices)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.dataset[int(self.truth.indices[row])].image, self.truth.values[row]


# -- judging -----------------------------------------------------------------------------------------------------------


def evaluate(student: Student, dataset: Any, truth: TaskTruth, batch_size: int = BATCH) -> dict[str, Any]:
    """How well ``student`` reads the images that have a truth: `measure` of what it says of them."""
    student = student.eval()
    device = student.trunk.stem.weight.device
    images = Subset(dataset, truth.indices.tolist())
    found = [student.predict(batch.images.to(device)).cpu() for batch in stream(images, batch_size, "fail")]
    said = torch.cat(found)
    return measure(truth, said.argmax(1) if truth.task == "classes" else said)


def measure(truth: TaskTruth, said: Tensor) -> dict[str, Any]:
    """How right ``said`` [K, ...] is: classes int64 [K], parts int64 [K, S, S] or points [K, n, 2].

    classes: "accuracy". parts: "miou", the mean over the parts that are there of their intersection over union, over
    all pixels together, "iou" of each, and "pixels", the share of right ones. points: "distance", the mean one in
    pixels, of each in "points", and where both eyes are among them "nme", the distance over that of the eyes.
    """
    if truth.task == "classes":
        return {"accuracy": float((said == truth.values).double().mean())}
    if truth.task == "parts":
        n = len(truth.labels)
        pairs = truth.values.long().flatten() * n + said.flatten()
        return _overlap(torch.bincount(pairs, minlength=n * n).reshape(n, n), truth.labels)
    found = (said.double() - truth.values).norm(dim=2)
    report: dict[str, Any] = {"distance": float(found.mean())}
    if set(EYES) <= set(truth.labels):
        left, right = (truth.values[:, truth.labels.index(eye)] for eye in EYES)
        report["nme"] = float((found.mean(1) / (left - right).norm(dim=1)).mean())
    return report | {"points": dict(zip(truth.labels, found.mean(0).tolist(), strict=True))}


def _overlap(confusion: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    hit, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = {name: int(h) / int(t + s - h) for name, h, t, s in zip(labels, hit, true, said, strict=True) if t > 0}
    return {"miou": sum(iou.values()) / len(iou), "pixels": float(hit.sum() / confusion.sum()), "iou": iou}


MEASURES = {"classes": "accuracy", "parts": "miou", "points": "distance"}  # the first number of each


def summary(task: str, report: dict[str, Any]) -> str:
    """``report`` of `evaluate` as lines."""
    if task == "classes":
        return f"accuracy {report['accuracy']:.4f}"
    if task == "parts":
        rows = [[name, f"{value:.3f}"] for name, value in report["iou"].items()]
        return cli.table(["part", "IoU"], [*rows, ["mean", f"{report['miou']:.3f}"]])
    rows = [[name, f"{value:.2f}"] for name, value in report["points"].items()]
    nme = f"; {report['nme']:.1%} of the eyes' distance" if "nme" in report else ""
    return (
        cli.table(["point", "px"], [*rows, ["mean", f"{report['distance']:.2f}"]])
        + f"\nmean distance {report['distance']:.2f} px{nme}"
    )
