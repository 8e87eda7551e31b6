"""A tiny student and made-up features of a made-up teacher, which the tests of students share."""

from __future__ import annotations

import numpy as np
import torch

from helpers import images
from pdae_fast import Student, StudentConfig
from pdae_fast.data import Sample
from pdae_fast.training.features import Features, FeatureSet
from pdae_fast.training.recognition import TaskTruth
from pdae_fast.training.students import Bandit, Choice, StudentTask

CONFIG = StudentConfig(image_size=32, input_channel=1, width=8, depth=1, halvings=2)
COUNT, TIMES = 12, (0, 10, 50)


class Pictures:
    """Random images in memory."""

    size = 32

    def __init__(self, count: int = COUNT) -> None:
        self.pixels = images(count)
        self.names = [f"{i:02d}" for i in range(count)]
        self.labels = np.arange(count) % 3

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.pixels[index], self.names[index], int(self.labels[index]))


def student(seed: int = 0, **changes) -> Student:
    torch.manual_seed(seed)
    return Student(StudentConfig(**{**vars(CONFIG), **changes}))


def features(times: int = len(TIMES), levels: int = 1, seed: int = 0) -> Features:
    random = np.random.default_rng(seed)
    shapes = [(6, 8, 8), (5, 16, 16)][:levels]
    found = [(3 * random.standard_normal((COUNT, times, *shape)) + 1).astype(np.float16) for shape in shapes]
    statistics = [
        tuple(torch.from_numpy(np.float32(f(level.astype(np.float64), (0, 3, 4)))) for f in (np.mean, np.std))
        for level in found
    ]
    return Features(found, statistics, "teacher", "images")


def truth(task: str = "classes", count: int = COUNT) -> TaskTruth:
    random = torch.Generator().manual_seed(3)
    values = {
        "classes": torch.arange(count) % 3,
        "parts": torch.randint(0, 3, (count, 32, 32), generator=random, dtype=torch.uint8),
        "points": 32 * torch.rand(count, 3, 2, generator=random),
    }[task]
    return TaskTruth(task, ["a", "b", "c"], values, np.arange(count), 0.1 if task == "points" else 1.0)


def student_task(choose: str = "0", loss: str = "dense", levels: int = 1, known: TaskTruth | None = None, **bandit):
    """A task and what it learns from."""
    choice = Choice.of(choose, None if choose.isdecimal() else TIMES, 1000)
    found = features(len(choice.times), levels)
    start = student()
    torch.manual_seed(1)
    task = StudentTask(start, found, choice, loss, known, Bandit(passes=6, **bandit))
    return task, FeatureSet(Pictures(), found, known)
