"""What a sweep over features found: its table, its tables on the terminal, and curves along t."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from .. import cli
from ..files import atomic_write
from ..plots import COLOURS, chart
from .probe_features import MEASURES, TOGETHER

COLUMNS = ("target", "features", "grid", "input", "t", "value", "low", "high")
COMPARED = ("minus_baseline", "minus_first")
RANK = "rank"
SHADE = 0.15  # of an interval
Row = dict[str, Any]


def lower_is_better(target: str) -> bool:
    return target == "landmarks"


def write_table(path: Path, rows: list[Row]) -> None:
    """All rows as CSV; the target "rank" is the effective rank of the features."""
    ends = ("value", "low", "high")
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *(f"{name}_{end}" for name in COMPARED for end in ends)])
        for row in rows:
            compared = [row.get(name, {}).get(end, "") for name in COMPARED for end in ends]
            writer.writerow([*("" if row.get(c) is None else row[c] for c in COLUMNS), *compared])


def _curves(rows: list[Row], target: str) -> dict[tuple[str, int | None, str], dict[int, Row]]:
    """(features, grid, input) -> rows by t, of what was probed along t."""
    found: dict[tuple[str, int | None, str], dict[int, Row]] = {}
    for row in rows:
        if row["target"] == target and row["t"] is not None:
            found.setdefault((row["features"], row["grid"], row["input"]), {})[row["t"]] = row
    return found


def _baselines(rows: list[Row], target: str) -> list[Row]:
    return [row for row in rows if row["target"] == target and row["t"] is None]


def _best(rows: list[Row], target: str) -> Row:
    return (min if lower_is_better(target) else max)(rows, key=lambda row: row["value"])


# -- on the terminal -----------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> list[str]:
    """One table of values along t for each target, with what is best and how it compares."""
    rows, times, lines = report["features"], report["times"], []
    for target in report["targets"]:
        curves, baselines = _curves(rows, target), _baselines(rows, target)
        cells = [[_label(*key), *(_cell(by_t[t]["value"], target) for t in times)] for key, by_t in curves.items()]
        title = f"{target}: {report['measures'][target]}"
        lines.append(cli.table([title, *(f"t = {t}" for t in times)], cells))
        lines.append("beside them: " + ", ".join(f"{row['features']} {_estimate(row, target)}" for row in baselines))
        best = _best([row for by_t in curves.values() for row in by_t.values()], target)
        where = f"{_label(best['features'], best['grid'], best['input'])}, t = {best['t']}"
        lines.append(
            f"best: {where}: {_estimate(best, target)}; minus {_best(baselines, target)['features']}: "
            f"{_estimate(best['minus_baseline'], target)}; minus itself at t = {times[0]}: "
            f"{_estimate(best['minus_first'], target)} (chosen on these test images: a little too good)"
        )
    ranks = _curves(rows, RANK)
    if ranks:
        cells = [[_label(*key), *(f"{by_t[t]['value']:.1f}" for t in times)] for key, by_t in ranks.items()]
        lines.append(cli.table(["effective rank", *(f"t = {t}" for t in times)], cells))
    learned = f"{report['train_images']} training and {report['test_images']} test images"
    if report["part_images"]:
        learned += f" (parts: {report['part_images']} training images)"
    lines.append(f"{learned} of {' '.join(report['input'])}: {report['split']}; {report['interval']}")
    lines.append(
        f"model {report['model']}; features standardised, logistic regression, ridge for landmarks, linear "
        "discriminant of pixels for parts"
    )
    return [*lines, *report["notes"]]


def _label(features: str, grid: int | None, of: str) -> str:
    return features + ("" if grid is None else f" {grid}x{grid}") + (" of x_t" if of == "x_t" else "")


def _cell(value: float, target: str) -> str:
    return f"{value:.2f}" if lower_is_better(target) else f"{value:.3f}"


def _estimate(row: dict[str, Any], target: str) -> str:
    return f"{_cell(row['value'], target)} ({_cell(row['low'], target)} to {_cell(row['high'], target)})"


# -- the picture ---------------------------------------------------------------------------------------------------


def draw(path: Path, report: dict[str, Any]) -> None:
    """Curves along t: a row of panels for each target and one for the effective rank, a column for each grid."""
    rows, grids = report["features"], report["grids"]
    kinds = [*report["targets"], *([RANK] if any(row["target"] == RANK for row in rows) else [])]
    names = list(dict.fromkeys(row["features"] for row in rows if row["t"] is not None))
    colours = _colours(names)
    columns = len(grids) if kinds != ["parts"] else 1
    with chart(path, 3.8 * columns + 1.9, 2.7 * len(kinds) + 0.3, len(kinds), columns, squeeze=False) as axes:
        seen: dict[str, Any] = {}
        for i, kind in enumerate(kinds):
            curves, baselines = _curves(rows, kind), _baselines(rows, kind)
            for k in range(columns):
                panel, grid = axes[i, k], None if kind == "parts" else grids[k]
                if kind == "parts" and k:
                    panel.axis("off")
                    continue
                for (name, of_grid, of), by_t in curves.items():
                    if of_grid == grid:
                        _curve(panel, by_t, colours[name], of, shaded=name == names[0])
                        seen.setdefault(name, _handle(colours[name]))
                if baselines:
                    best = _best(baselines, kind)
                    panel.axhline(best["value"], color="#666666", linestyle=":", linewidth=1.2, zorder=1.4)
                    panel.annotate(
                        best["features"],
                        (1, best["value"]),
                        xycoords=("axes fraction", "data"),
                        ha="right",
                        va="center",
                        fontsize=7,
                        color="#444444",
                        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                        zorder=1.5,  # below the curves
                    )
                where = "maps" if grid is None else "pooled" if grid == 1 else f"averaged to {grid} x {grid}"
                panel.set_title(f"{kind if kind != RANK else 'effective rank'}, {where}", fontsize=9)
                panel.set_ylabel(MEASURES.get(kind, "directions"), fontsize=8)
                panel.tick_params(labelsize=8)
                if lower_is_better(kind):
                    panel.invert_yaxis()  # better is above, as everywhere
                panel.set_xlabel("t", fontsize=9)
        if any(row["input"] == "x_t" for row in rows):
            seen |= {"of the images": _handle("black"), "of x_t": _handle("black", "--")}
        seen |= {f"95% of {names[0]}": _area(colours[names[0]]), "without features": _handle("#666666", ":", None)}
        axes[0, 0].figure.legend(list(seen.values()), list(seen), loc="outside right center", fontsize=8)


def _curve(panel: Any, by_t: dict[int, Row], colour: Any, of: str, shaded: bool) -> None:
    times = sorted(by_t)
    values = [by_t[t]["value"] for t in times]
    panel.plot(times, values, "o-" if of == "x0" else "o--", color=colour, markersize=3, linewidth=1.4)
    if shaded and of == "x0" and "low" in by_t[times[0]]:  # one interval is enough to see how wide they are
        ends = [[by_t[t][end] for t in times] for end in ("low", "high")]
        panel.fill_between(times, *ends, color=colour, alpha=SHADE, linewidth=0)


def _handle(colour: Any, style: str = "-", marker: str | None = "o") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=3)


def _area(colour: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, alpha=SHADE, linewidth=0)


def _colours(names: list[str]) -> dict[str, Any]:
    """Decoder blocks from dark to light in their order; the others apart from them."""
    import matplotlib

    blocks = [name for name in names if name.startswith("decoder")]
    scale = matplotlib.colormaps["viridis"]
    found = {name: scale(0.1 + 0.8 * i / max(1, len(blocks) - 1)) for i, name in enumerate(blocks)}
    return found | {"middle": COLOURS[1], TOGETHER: "black"}
