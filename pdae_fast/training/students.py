"""A student's two trainings: distillation from a frozen teacher's features, and recognition from labels."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import cli
from ..config import AnyConfig
from ..data.latents import split
from ..errors import UserError
from ..models import Autoencoder, Prior, Student
from ..student_config import StudentConfig
from ..tensors import weights_fingerprint
from . import policy
from .distillation import LOSSES, Distiller
from .features import TIMELESS, Features, FeatureSet, Target, teacher_features
from .recognition import Labelled, TaskTruth, choose_labels, find_truth, task_loss
from .tasks import Task

TIMES = (0, 25, 50, 100, 200, 400, 700, 900)  # of 1000: what there is to choose among, unless given
CHOICES = ("uniform", "policy", "all")


class Choice(NamedTuple):
    """Which times of the teacher are learned from: ``how`` is "fixed" or one of CHOICES, ``times`` the candidates."""

    how: str
    times: tuple[int, ...]

    @classmethod
    def of(cls, asked: str, times: Sequence[int] | None, T: int) -> Choice:
        """``asked``: a time, or one of CHOICES among ``times`` (None: TIMES, of T in place of 1000)."""
        if asked in CHOICES:
            found = tuple(times) if times else tuple(sorted({round(t * T / 1000) for t in TIMES}))
            if len(set(found)) < 2 or len(set(found)) < len(found):
                raise UserError(f"--choose {asked} needs at least two different --times, not {list(found)}")
            return cls(asked, found)
        try:
            t = int(asked)
        except ValueError:
            raise UserError(f"--choose {asked} is neither a time nor one of {', '.join(CHOICES)}") from None
        if times:
            raise UserError(f"--times are what --choose {', '.join(CHOICES)} choose among; --choose {t} is one already")
        return cls("fixed", (t,))


# -- distillation ------------------------------------------------------------------------------------------------------


class Bandit(NamedTuple):
    """How a policy learns: the ``estimator`` of its gradient, one of policy.ESTIMATORS, and the weight of its
    ``entropy``, which falls to 0 over the first half of ``passes``."""

    estimator: str = "exact"
    entropy: float = 0.1
    passes: int = 1

    def check(self) -> None:
        if self.estimator not in policy.ESTIMATORS:
            raise UserError(f"--estimator {self.estimator} is not known; expected {' or '.join(policy.ESTIMATORS)}")
        if not 0 <= self.entropy < math.inf:
            raise UserError(f"--entropy must be a number from 0 up, not {self.entropy}")


class StudentTask(Task):
    """A student that learns the levels of a `FeatureSet`; what else learns with it is dropped at the end.

    fixed: the one time there is. uniform: one drawn for each image and step. all: every time, through projections that
    are told it (after CleanDIFT, arXiv 2412.03439). policy: one drawn by a policy, which learns beside it from the
    labelled images (see `policy`).
    """

    name = "student"
    collate = None  # the loader's own: items are tuples of tensors

    def __init__(
        self,
        student: Student,
        features: Features,
        choice: Choice,
        loss: str = "dense",
        truth: TaskTruth | None = None,
        bandit: Bandit | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        check_loss(loss, features.shapes)
        model = Distiller(student, features.shapes, features.statistics, loss, told=choice.how == "all")
        record = {
            "teacher": features.teacher,
            "images": features.images,
            "--loss": loss,
            "--choose": choice.how,
            "--times": list(choice.times),
            **(record or {}),
        }
        bandit, scale = bandit or Bandit(), 1.0
        if choice.how == "policy":
            if truth is None:
                raise UserError("--choose policy is rewarded by labels; say which with --task")
            bandit.check()
            scale = truth.scale
            record |= {"labels": truth.digest(), "--estimator": bandit.estimator, "--entropy": bandit.entropy}
            model.policy = policy.Policy(student.config.input_channel, len(choice.times))
            model.decoder = policy.Decoder(truth.task, features.shapes, len(truth.labels))
            model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        idle = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        super().__init__(model, record)
        self.choice, self.bandit, self.scale = choice, bandit, scale
        for parameter in idle:
            parameter.requires_grad_(False)

    @property
    def config(self) -> StudentConfig:
        return self.model.student.config

    def export(self, ema: nn.Module) -> Student:
        return ema.student

    def draw(self, batch: Any, generator: torch.Generator, flip: bool) -> tuple[Tensor, ...]:
        """(images, levels [B, K, C, h, w]) and of a policy (labelled images, their levels, truth) -> images, levels,
        then int64 [B] times (uniform), or two float32 [B] that draw them and the labelled part (policy)."""
        images, levels, *labelled = batch
        B = len(images)
        if self.choice.how == "uniform":
            k = torch.randint(0, len(self.choice.times), (B,), generator=generator)
            return images, *(level[torch.arange(B), k] for level in levels), k
        if self.choice.how == "fixed":
            return images, *(level[:, 0] for level in levels)
        if self.choice.how == "all":
            return images, *levels
        shown, known, truth = labelled
        u = torch.rand(2, B, generator=generator)
        return images, *levels, u[0], u[1], shown, *known, truth

    def forward(self, images: Tensor, *tensors: Tensor) -> Tensor:
        model, how = self.model, self.choice.how
        levels, rest = tensors[: len(model.sizes)], tensors[len(model.sizes) :]
        h = model.predict(images)
        if how == "fixed":
            return model.compare(h, levels, 0)
        if how == "uniform":
            return model.compare(h, levels, rest[0])
        if how == "all":
            K = len(self.choice.times)
            return torch.stack([model.compare(h, [v[:, k] for v in levels], k) for k in range(K)]).mean()
        u, u_labelled, shown, *known, truth = rest
        with torch.no_grad():
            k = policy.pick(model.policy(images), u)
        rows = torch.arange(len(k), device=k.device)
        learned = model.compare(h, [v[rows, k] for v in levels], k)
        return learned + self._bandit(shown, known, truth, u_labelled)

    def _bandit(self, images: Tensor, levels: Sequence[Tensor], truth: Tensor, u: Tensor) -> Tensor:
        """What policy and decoder minimise on labelled images whose levels [B, K, C, h, w] at all times are known."""
        model = self.model
        losses = self.losses(levels, truth)
        rewards, logits = -losses.detach(), model.policy(images)
        if self.bandit.estimator == "exact":
            chosen = policy.exact(logits, rewards)
            decoded = (logits.detach().softmax(1) * losses).sum(1).mean()
        else:
            actions = policy.pick(logits.detach(), u)
            chosen = policy.reinforce(logits, actions, rewards.gather(1, actions[:, None])[:, 0])
            decoded = losses.gather(1, actions[:, None]).mean()
        weight = policy.bonus(self.bandit.entropy, model.passes, self.bandit.passes)
        if self.training:
            model.passes += 1
        return chosen + decoded - weight * policy.entropy(logits)

    def losses(self, levels: Sequence[Tensor], truth: Tensor) -> Tensor:
        """The decoder's loss [B, K] at every time."""
        model = self.model
        B, K = levels[0].shape[:2]
        scaled = [
            ((v.float() - getattr(model, f"mean{i}")) / getattr(model, f"std{i}")).flatten(0, 1)
            for i, v in enumerate(levels)
        ]
        truth = truth.repeat_interleave(K, 0)
        if model.decoder.task == "points":
            truth = truth / self.config.image_size
        return task_loss(model.decoder.task, model.decoder(scaled), truth, self.scale).reshape(B, K)


def check_loss(loss: str, shapes: Sequence[Sequence[int]]) -> None:
    """UserError where ``loss`` is none, or says nothing of such levels."""
    if loss not in LOSSES:
        raise UserError(f"--loss {loss} is not known; expected {', '.join(LOSSES)}")
    if list(shapes[0][1:]) == [1, 1] and loss not in ("dense", "pooled", "relations"):
        raise UserError(f"--loss {loss} compares places; a code has none: use dense, pooled or relations")


@torch.inference_mode()
def describe_policy(model: Distiller, task: StudentTask, data: FeatureSet) -> dict[str, Any]:
    """What the policy of ``model`` does: the mean "probability" of each time and the "entropy" over the images, and on
    the labelled images the "reward" of the policy, of each time, of the best of these, and of a uniform choice."""
    total, entropy, count = 0.0, 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(data), 64):
        images = torch.stack([data.dataset[i].image for i in range(start, min(start + 64, len(data)))])
        logits = model.policy(images.to(device))
        total = total + logits.softmax(1).sum(0)
        entropy += float(policy.entropy(logits)) * len(images)
        count += len(images)
    rewards, chosen = [], []
    for index, truth in zip(data.truth.indices, data.truth.values, strict=True):
        levels = [level[None].to(device) for level in data.features.of(int(index))]
        rewards.append(-task.losses(levels, truth[None].to(device))[0])
        chosen.append(model.policy(data.dataset[int(index)].image[None].to(device)).softmax(1)[0])
    R, pi = torch.stack(rewards), torch.stack(chosen)
    times = [str(t) for t in task.choice.times]
    return {
        "probability": dict(zip(times, (total / count).tolist(), strict=True)),
        "entropy": entropy / count,
        "reward": {
            "policy": float((pi * R).sum(1).mean()),
            "uniform": float(R.mean()),
            "best fixed": float(R.mean(0).max()),
            "times": dict(zip(times, R.mean(0).tolist(), strict=True)),
        },
    }


# -- recognition -------------------------------------------------------------------------------------------------------


HEAD_FIRST, TRUNK_RATE = 0.5, 0.1


class RecogniseTask(Task):
    """A student with a head that learns from labels; ``freeze``: the head alone.

    ``head_first``: the head alone for this share of the steps, then all, the rest at TRUNK_RATE of the head's rate. A
    head that knows nothing yet would otherwise undo what the student has learned (Kumar et al., arXiv 2202.10054).
    """

    name = "recognise"
    collate = None

    def __init__(
        self,
        student: Student,
        truth: TaskTruth,
        freeze: bool = False,
        record: dict[str, Any] | None = None,
        head_first: float = 0.0,
    ) -> None:
        if not 0 <= head_first < 1:
            raise UserError(f"--head-first must be at least 0 and below 1, not {head_first}")
        record = {"labels": truth.digest(), "--freeze": freeze, **(record or {})}
        # What is off is not recorded: runs from before it existed can be resumed.
        super().__init__(student, record | ({"--head-first": head_first} if head_first else {}))
        self.scale, self.head_first = truth.scale, head_first
        student.trunk.requires_grad_(not freeze)
        student.pyramid.requires_grad_(not freeze and truth.task == "parts")

    def part_of(self, name: str) -> str:
        """As :meth:`Task.part_of`."""
        return "head" if name.startswith("head.") or not self.head_first else "trunk"

    def rate_of(self, part: str, progress: float) -> float:
        """As :meth:`Task.rate_of`."""
        return 1.0 if part == "head" else 0.0 if progress < self.head_first else TRUNK_RATE

    def draw(self, batch: Any, generator: torch.Generator, flip: bool) -> tuple[Tensor, Tensor]:
        """(images [B, C, S, S], truth [B, ...]); nothing is random."""
        return tuple(batch)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        out, task = self.model(images), self.config.head
        if task == "points":
            out, truth = out / self.config.image_size, truth / self.config.image_size
        return task_loss(task, out, truth, self.scale).mean()


def with_head(student: Student, truth: TaskTruth, seed: int = 0) -> Student:
    """``student`` with a fresh head for ``truth`` in place of any that it has; its weights are copied. Points start at
    their mean."""
    config = dataclasses.replace(student.config, head=truth.task, labels=tuple(truth.labels))
    torch.manual_seed(seed)
    fresh = Student(config)
    state = {k: v for k, v in student.state_dict().items() if not k.startswith("head.")}
    fresh.load_state_dict(state, strict=False)
    if truth.task == "points":
        with torch.no_grad():
            fresh.head.read.bias.copy_((truth.values.mean(0) / config.image_size - 0.5).flatten())
    return fresh


# -- from the options of a command -------------------------------------------------------------------------------------


def new_student(config: AnyConfig, width: int, depth: int, halvings: int | None = None, seed: int = 0) -> Student:
    """A fresh student for the images of a teacher of ``config``; without ``halvings`` as deep as its middle block."""
    halvings = max(config.unet.levels - 1, 1) if halvings is None else halvings
    torch.manual_seed(seed)
    return Student(
        StudentConfig(config.image_size, config.unet.input_channel, width, depth, halvings, crop=config.crop)
    )


def check_student(args: Any) -> None:
    """What of the options of train student can be wrong whatever the teacher."""
    if args.target in TIMELESS and (args.choose != "0" or args.times or args.noised):
        raise UserError(f"--target {args.target} is that of a clean image and no time; leave out --choose and --noised")
    if args.choose == "policy":
        if args.reads is None:
            raise UserError("--choose policy is rewarded by labels; say which with --task classes, parts or points")
        if args.cuda_graph:
            raise UserError("--cuda-graph: what --choose policy weighs changes with every step; leave the option out")
        Bandit(args.estimator, args.entropy).check()
    else:
        for name, flag in (("reads", "--task"), ("labels", "--labels")):
            if getattr(args, name) is not None:
                raise UserError(f"{flag} is for --choose policy; --choose {args.choose} reads no labels")


def student_task(
    args: Any, model: Prior | Autoencoder, dataset: Any, cache: str | os.PathLike, device: torch.device
) -> tuple[StudentTask, FeatureSet]:
    """The task of train student and what it learns from, by the teacher ``model``."""
    choice = Choice.of(args.choose, args.times, model.config.schedule.timesteps)
    student = new_student(model.config, args.width, args.depth, args.halvings, args.seed)
    sides = {"decoder": student.config.sizes, "pixels": student.config.sizes[-1:]}.get(args.target, ())
    target = Target(args.target, choice.times, sides, args.noised, args.label, args.seed if args.noised else 0)
    target.check(model)
    check_loss(args.loss, target.shapes(model))
    truth = None
    if choice.how == "policy":
        truth = find_truth(args.reads, args.data, dataset, args.attributes, args.columns)
        truth = choose_labels(truth, args.labels, args.seed)
    features = teacher_features(
        model, dataset, target, cache, batch_size=args.encode_batch_size, device=device, require=args.cached_only,
        quiet=args.quiet,
    )  # fmt: skip
    bandit = Bandit(args.estimator, args.entropy, args.steps * args.accumulate)
    record = {"--target": args.target, "--noised": args.noised}
    torch.manual_seed(args.seed + 1)  # of what is dropped again, apart from the student's
    task = StudentTask(student, features, choice, args.loss, truth, bandit, record)
    return task, FeatureSet(dataset, features, truth)


def recognise_task(
    args: Any, start: Student, dataset: Any, test: Any | None
) -> tuple[RecogniseTask, Labelled, tuple[Any, TaskTruth]]:
    """The task of train recognise, what it learns from, and the images with their truth that judge it: those of
    ``test``, else --holdout of ``dataset``."""
    find = partial(find_truth, args.reads, args.data, attributes=args.attributes, columns=args.columns)
    truth = find(dataset=dataset)
    if test is not None:
        judged = test, find(dataset=test)
        if judged[1].labels != truth.labels:
            raise UserError(f"{args.data}: its test images have other {args.reads} than its training images")
    else:
        kept, held = split(len(truth.indices), args.holdout, args.seed)
        judged = dataset, truth.rows(held if len(held) else kept)
        truth = truth.rows(kept)
    truth = choose_labels(truth, args.labels, args.seed)
    if args.scratch:
        torch.manual_seed(args.seed)
        start = Student(start.config)
    record = {"start": weights_fingerprint(start)[:16], "held-out images": len(judged[1].indices)}
    student = with_head(start, truth, args.seed)
    usual = 0.0 if args.scratch or args.freeze else HEAD_FIRST
    first = usual if args.head_first is None else args.head_first
    return RecogniseTask(student, truth, args.freeze, record, first), Labelled(dataset, truth), judged


def policy_table(report: dict[str, Any]) -> str:
    """What `describe_policy` found, as a table."""
    reward = report["reward"]
    rows = [[t, f"{p:.3f}", f"{reward['times'][t]:.4f}"] for t, p in report["probability"].items()]
    return cli.table(["t", "probability", "reward"], rows) + (
        f"\nreward on the labelled images: policy {reward['policy']:.4f}, uniform {reward['uniform']:.4f}, "
        f"best fixed {reward['best fixed']:.4f}; entropy {report['entropy']:.3f}"
    )
