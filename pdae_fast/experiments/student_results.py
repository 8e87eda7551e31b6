"""What the comparison of students measures: its arms, results as they come, gains with intervals, a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli
from ..errors import UserError
from ..plots import COLOURS, chart
from ..training.recognition import MEASURES

SCRATCH, LONGER, TEACHER, PIXELS = "scratch", "longer", "teacher", "pixels"
ARMS = (SCRATCH, LONGER, "0", "50", "200", "uniform", "policy", "all", PIXELS)
QUICK_ARMS = (SCRATCH, LONGER, "0", "policy", PIXELS)
TIMED = ("0", "50", "200", "uniform", "all")
LABELS = {"points": (20, 50), "parts": (10, 20), "classes": (100, 1000)}
QUICK_LABELS = {"points": (20,), "parts": (10,), "classes": (100,)}


def ways_of(arm: str) -> tuple[str, ...]:
    return {TEACHER: ("frozen",), LONGER: ("tuned",)}.get(arm, ("tuned", "frozen"))


def labels_of(args: argparse.Namespace, task: str) -> Sequence[int]:
    return args.labels or (LABELS if args.full else QUICK_LABELS)[task]


class Results:
    """What was measured, one line of JSON each, so that a command that was stopped goes on where it was."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.found = path, {}
        settings = json.loads(json.dumps(settings))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines()
        if not lines:
            self._append(settings)
        elif json.loads(lines[0]) != settings:
            raise UserError(f"{path.parent} holds results of other settings; choose another --out, or delete it")
        for line in lines[1:]:
            try:
                *key, value = json.loads(line)
            except ValueError:  # a killed command wrote half of it
                continue
            self.found[tuple(key)] = value
        if lines and not text.endswith("\n"):
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n")

    def _append(self, values: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def add(self, key: Sequence[Any], value: float) -> None:
        self.found[tuple(key)] = value
        self._append([*key, value])

    def of(self, *key: Any) -> dict[int, float]:
        """By seed, of (task, labels, arm, way)."""
        return {found[-1]: value for found, value in self.found.items() if found[:-1] == key}


def paired(values: dict[int, float], base: dict[int, float]) -> tuple[float, float | None]:
    """Mean over the common seeds of values - base, and half the width of its 95% t-interval (None: one seed)."""
    seeds = sorted(values.keys() & base.keys())
    differences = np.array([values[seed] - base[seed] for seed in seeds])
    if len(seeds) < 2:
        return float(differences.mean()), None
    from scipy.stats import t

    return float(differences.mean()), float(t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / len(seeds) ** 0.5)


def rows(results: Results, args: argparse.Namespace, arms: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each task, label count, arm and way: mean, and the gain over other arms, the same way (a positive one
    is better, whatever is measured) with half its interval: over scratch, over "longer" for what was tuned, and of a
    policy over every other choice of times."""
    found = []
    for task in args.task:
        sign = -1 if MEASURES[task] == "distance" else 1
        for count in labels_of(args, task):
            for arm in [*arms, TEACHER]:
                for way in ways_of(arm):
                    values = results.of(task, count, arm, way)
                    if not values:
                        continue
                    row = {
                        "task": task, "labels": count, "arm": arm, "way": way, "measure": MEASURES[task],
                        "mean": float(np.mean(list(values.values()))), "seeds": len(values),
                    }  # fmt: skip
                    for other in (SCRATCH, LONGER, *(TIMED if arm == "policy" else ())):
                        base = results.of(task, count, other, way)
                        if arm != other and values.keys() & base.keys():
                            gain, row[f"interval over {other}"] = paired(values, base)
                            row[f"gain over {other}"] = sign * gain
                    row["values"] = [values[seed] for seed in sorted(values)]
                    found.append(row)
    return found


def _gain(row: dict[str, Any], other: str) -> str:
    gain, half = row.get(f"gain over {other}"), row.get(f"interval over {other}")
    return "-" if gain is None else f"{gain:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        [row["task"], str(row["labels"]), row["arm"], row["way"], f"{row['mean']:.3f}",
         *(_gain(row, other) for other in (SCRATCH, LONGER)), str(row["seeds"])]
        for row in found
    ]  # fmt: skip
    header = ["task", "labels", "arm", "way", "mean", "over scratch", "over longer", "seeds"]
    text = [cli.table(header, lines, left=4)]
    for row in found:
        gains = [f"{_gain(row, other)} over {other}" for other in TIMED if f"gain over {other}" in row]
        if gains:
            text.append(f"{row['task']}, {row['labels']} labels, {row['way']}: policy {', '.join(gains)}")
    return "\n".join(text)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each task and label count: every arm's mean, tuned and frozen, with a dot for each seed."""
    panels = list(dict.fromkeys((row["task"], row["labels"]) for row in found))
    with chart(path, width=4.2 * len(panels), height=4.2, columns=len(panels), squeeze=False) as axes:
        for panel, (task, count) in zip(axes[0], panels, strict=True):
            own = [row for row in found if (row["task"], row["labels"]) == (task, count)]
            arms = list(dict.fromkeys(row["arm"] for row in own))
            for row in own:
                place = arms.index(row["arm"]) + (0.17 if row["way"] == "frozen" else -0.17)
                colour = COLOURS[0] if row["way"] == "tuned" else COLOURS[1]
                panel.barh(place, row["mean"], height=0.3, color=colour, alpha=0.75)
                panel.plot(row["values"], [place] * len(row["values"]), "k.", markersize=4)
            panel.set_yticks(range(len(arms)), arms)
            panel.invert_yaxis()
            better = "lower is better" if MEASURES[task] == "distance" else "higher is better"
            unit = {"distance": "mean distance, px", "miou": "mean IoU", "accuracy": "accuracy"}[MEASURES[task]]
            panel.set_xlabel(f"{unit} ({better})")
            panel.set_title(f"{task}, {count} labelled images")
        for name, colour in (("fine-tuned", COLOURS[0]), ("frozen, linear", COLOURS[1])):
            axes[0][0].barh([0], [0], color=colour, alpha=0.75, label=name)
        axes[0][0].figure.legend(loc="outside lower center", ncols=2)
