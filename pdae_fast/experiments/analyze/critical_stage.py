"""When a diffusion model decides what the image shows: classifier guidance in a part of the trajectory only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import sampling
from ...errors import UserError
from ...plots import chart
from ...schedule import Schedule, Trajectory
from .. import common
from ..parts import find_parts
from ..targets import Targets

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
    field: sampling.Field,
    log_prob: Callable[[Tensor, int], Tensor],
    x_T: Tensor,
    schedule: Schedule,
    parts: Sequence[Trajectory],
    *,
    scale: float = 1.0,
    clamp: float | None = 1.0,
    progress: sampling.Progress | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """(low, high, x at t = 0) for every stage [low, high) of ``parts`` (from `stages_of`) that is guided, the rest of
    the trajectory being left to ``field``; (0, 0) first, which is guided nowhere.

    Trajectories that agree up to a point are run once up to there: what is left of a stage's cost are its own steps
    (see `evaluations`).
    """
    led = sampling.guided(field, log_prob, scale)

    def run(x: Tensor, part: int, guide: bool) -> Tensor:
        steps = tuple(step._replace(use_gradient=guide) for step in parts[part])
        return sampling.integrate(led, x, steps, clamp=clamp, progress=progress)

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


class Stage(NamedTuple):
    """Guidance for low <= t < high (nowhere, where they are the same): the share of samples that are of the class
    asked for, and its standard error."""

    low: int
    high: int
    accuracy: float
    standard_error: float


def shortest(stages: Sequence[Stage], accuracy: float) -> Stage | None:
    """The shortest stage that reaches ``accuracy``, and more than no guidance does; the most accurate of equally short
    ones; None when none does."""
    nothing = max(stage.accuracy for stage in stages if stage.high == stage.low)
    reaching = [stage for stage in stages if stage.accuracy >= accuracy and stage.accuracy > nothing]
    return min(reaching, key=lambda stage: (stage.high - stage.low, -stage.accuracy), default=None)


def heat_map(path: Path, stages: Sequence[Stage], T: int, count: int, best: Stage | None) -> None:
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
