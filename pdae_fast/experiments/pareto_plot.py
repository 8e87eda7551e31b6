"""The picture of a Pareto table: error against evaluations and against seconds, what nothing beats as a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plots import COLOURS, chart
from .common import MODES
from .pareto import Row, mark
from .pareto_settings import FAMILIES

COSTS = (
    ("evaluations", "front_evaluations", "whole-network evaluations per image"),
    ("relative_seconds", "front_seconds", "time per image, in plain evaluations"),
)


def draw(path: Path, rows: list[Row], title: str) -> None:
    """One row of axes for every mode; both axes logarithmic. UserError without matplotlib."""
    rows = [row for row in mark(rows) if row["mse"] > 0]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    with chart(path, 11, 4.6 * len(modes) + 0.5, len(modes), 2, squeeze=False) as axes:
        for line, mode in zip(axes, modes, strict=True):
            own = [row for row in rows if row["mode"] == mode]
            for axis, (cost, front, label) in zip(line, COSTS, strict=True):
                _panel(axis, own, cost, front)
                axis.set(title=f"decoded from {MODES[mode]}", xlabel=label, ylabel="MSE on [0, 1]")
        handles = {}
        for axis in axes.flat:
            handles.update(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        figure = axes[0, 0].figure
        figure.suptitle(title, fontsize=11)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))


def _panel(axis: Any, rows: list[Row], cost: str, front: str) -> None:
    for family, colour in zip(FAMILIES, COLOURS, strict=True):
        points = [(row[cost], row["mse"]) for row in rows if row["family"] == family]
        if points:
            special = family == "preset"
            axis.scatter(
                *zip(*points, strict=True),
                s=70 if special else 22,
                marker="*" if special else "o",
                color=colour,
                label=family,
                zorder=4 if special else 3,
                linewidths=0,
            )
    best = sorted((row[cost], row["mse"]) for row in rows if row[front])
    axis.plot(*zip(*best, strict=True), color="0.35", lw=1, drawstyle="steps-post", zorder=2, label="nothing is better")
    losses = [row["mse"] for row in rows]
    # From random x_T the settings differ by a few per cent: a logarithm would only spoil the ticks.
    axis.set(xscale="log", yscale="log" if max(losses) > 5 * min(losses) else "linear")
    low, high = axis.get_xlim()
    for row in rows:
        if row["family"] == "preset" or row["name"] in ("published 100+100", "published 1000+100"):
            left = row[cost] > (low * high) ** 0.5
            axis.annotate(
                row["name"],
                (row[cost], row["mse"]),
                (-6 if left else 6, 5),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8,
                zorder=5,
            ).set_in_layout(False)
