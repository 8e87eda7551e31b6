"""Loss curves of runs: `python -m pdae_fast.train curves RUN ... --out curves.png`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..files import make_folder
from ..plots import COLOURS, chart


def read_log(run: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses, float64 [n], from the log.jsonl of a run (its directory, or the file itself).

    Lines that are none, such as the one that a killed run left unfinished, are passed over. UserError when there is no
    such log, or nothing in it.
    """
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{run}: no log.jsonl; expected the directory of a run of pdae_fast.train")
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    for line in lines:
        try:
            values = json.loads(line)
            pair = (float(values["step"]), float(values["loss"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if all(map(math.isfinite, pair)):
            found.append(pair)
    if not found:
        raise UserError(f"{path}: no losses in it; expected lines with step and loss")
    steps, losses = np.array(found).T
    return steps, losses


def smooth(values: np.ndarray, fraction: float) -> np.ndarray:
    """Running mean of ``values`` [n] over ``fraction`` of them around each.

    Near the start, where a loss falls steeply, the window shrinks to stay centred; at the end it is cut off, so that
    the last value is a mean of half a window and not one noisy number.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"smooth must be a fraction in [0, 1], not {fraction}")
    n = len(values)
    places = np.arange(n)
    half = np.minimum(round(fraction * n / 2), places)
    first, last = places - half, np.minimum(places + half, n - 1)
    total = np.append(0.0, np.cumsum(values))
    return (total[last + 1] - total[first]) / (last + 1 - first)


class Curve(NamedTuple):
    """The losses of one run: its name, its task ("" where nothing says), steps and losses float64 [n]."""

    name: str
    task: str
    steps: np.ndarray
    losses: np.ndarray


def plot_curves(
    runs: Sequence[str | os.PathLike], out: str | os.PathLike, fraction: float = 0.05, log_scale: bool = False
) -> Path:
    """Write a PNG with the loss of every run against its step: what was logged pale, its running mean in front.

    Runs are called by their directories. The losses of different tasks are different quantities: each task, as
    train.json beside the log says, has axes of its own, from left to right in the order in which they come.
    Raises UserError for a run without a log, and when matplotlib is not installed.
    """
    groups: dict[str, list[Curve]] = {}
    for run in runs:
        curve = Curve(_name(run), _task(run), *read_log(run))
        groups.setdefault(curve.task, []).append(curve)
    out, many = Path(out), len(groups) > 1
    make_folder(out.parent)
    with chart(out, width=4.4 * len(groups) if many else 7.2, columns=len(groups), squeeze=False) as panels:
        for axes, (task, curves) in zip(panels[0], groups.items(), strict=True):
            _draw(axes, curves, fraction, log_scale)
            if many:
                axes.set_title(task or "unknown task")
    return out


def _draw(axes: Any, curves: Sequence[Curve], fraction: float, log_scale: bool) -> None:
    for i, (name, _, steps, losses) in enumerate(curves):
        colour, mark = COLOURS[i % len(COLOURS)], "o" if len(steps) == 1 else None  # a line of one point is not seen
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses, fraction), color=colour, linewidth=1.8, marker=mark, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    if log_scale:
        axes.set_yscale("log")
    else:
        # The first steps of a run are far above the rest and would press it flat.
        tails = np.concatenate([losses[len(losses) // 20 :] for _, _, _, losses in curves])
        low, high = tails.min(), np.quantile(tails, 0.999)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) if high > low else None)
    axes.legend()


def _name(run: str | os.PathLike) -> str:
    path = Path(run).absolute()
    return path.parent.name if path.name == "log.jsonl" else path.name


def _task(run: str | os.PathLike) -> str:
    path = Path(run)
    try:
        return str(json.loads(((path if path.is_dir() else path.parent) / "train.json").read_bytes())["task"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # an old log, or one that was copied alone
