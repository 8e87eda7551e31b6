"""Loss curves of runs: `python -m pdae_fast.train curves RUN ... --out curves.png`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..experiments.plots import COLOURS, chart
from ..files import make_folder


def read_log(run: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses, float64 [n], from the log.jsonl of a run (its directory, or the file itself).

    A last line that a killed run left unfinished is passed over. UserError when there is no such log, or nothing in it.
    """
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{run}: no log.jsonl; expected the directory of a run of pdae_fast.train")
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            found.append((float(values["step"]), float(values["loss"])))
        except (ValueError, KeyError, TypeError):
            continue
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


def plot_curves(
    runs: Sequence[str | os.PathLike], out: str | os.PathLike, fraction: float = 0.05, log_scale: bool = False
) -> Path:
    """Write a PNG with the loss of every run against its step: what was logged pale, its running mean in front.

    Runs are called by their directories. The losses of different tasks are different quantities: plot alike with alike.
    Raises UserError for a run without a log, and when matplotlib is not installed.
    """
    curves = [(_name(run), *read_log(run)) for run in runs]
    out = Path(out)
    make_folder(out.parent)
    with chart(out, width=7.2, height=4.0) as axes:
        for i, (name, steps, losses) in enumerate(curves):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(losses, fraction), color=colour, linewidth=1.8, label=name)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss")
        if log_scale:
            axes.set_yscale("log")
        else:
            # The first steps of a run are far above the rest and would press it flat.
            tails = np.concatenate([losses[len(losses) // 20 :] for _, _, losses in curves])
            low, high = tails.min(), np.quantile(tails, 0.999)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) if high > low else None)
        axes.legend()
    return out


def _name(run: str | os.PathLike) -> str:
    path = Path(run).absolute()
    return path.parent.name if path.name == "log.jsonl" else path.name
