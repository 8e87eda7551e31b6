"""Results for the README: `python -m bench.report [FILE ...] [--plot docs/speed.png] [--csv bench/results.csv]`.

Takes the newest file of bench/results unless files are given, prints markdown, draws the plot, and appends the runs to
the one committed table of all machines. Of a CPU only ratios are published: its absolute times belong to one machine
on one day. Needs `pip install 'pdae_fast[plot]'` for the plot and nothing for the rest.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from pdae_fast import cli
from pdae_fast.errors import UserError
from pdae_fast.files import atomic_write, make_folder

from . import ROOT
from .tables import RESULTS, load

CSV = Path(__file__).resolve().parent / "results.csv"
PLOT = ROOT / "docs" / "speed.png"
# Columns of the committed table; the last two are filled on a GPU only.
FIELDS = (
    "date", "commit", "device", "torch", "triton", "python", "network", "batch", "contender", "opponent", "ratio",
    "ratio_p20", "ratio_p80", "peak_fraction", "error", "rounds", "median_ms", "images_per_s",
)  # fmt: skip
KEY = ("date", "device", "network", "batch", "contender", "opponent")
NAMES = {"eager": "modules", "fused": "fused plan"}

Loaded = tuple[dict[str, str], dict[str, list[dict[str, Any]]]]


def newest(folder: Path = RESULTS) -> Path:
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"there are no results in {folder}; run pytest bench/ --benchmark-only first, or name a file")
    return files[-1]


def label(contender: str) -> str:
    """ "fused-bfloat16" -> "fused plan, bfloat16"; opponents as they are called."""
    plan, _, rest = contender.partition("-")
    return f"{NAMES[plan]}, {rest}" if plan in NAMES else f"torch.compile, {rest}" if plan == "compile" else contender


def steps(run: Loaded) -> list[dict[str, Any]]:
    """The rows of the "step" table that hold a comparison."""
    return [row for row in run[1].get("step", []) if row["contender"] != "baseline"]


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """{(network, batch): {contender: row}}, in order of appearance; a later row replaces an earlier one."""
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["batch"]), {})[row["contender"]] = row
    return groups


def markdown(run: Loaded) -> str:
    """The README's table: ratio to the baseline, its spread, and the fraction of the matrix product's peak."""
    machine, tables = run
    groups = grouped(steps(run))
    contenders = list(dict.fromkeys(name for sides in groups.values() for name in sides))
    lines = [
        "| network | batch | " + " | ".join(label(name) for name in contenders) + " |",
        "|---" * (2 + len(contenders)) + "|",
    ]
    for (network, batch), sides in groups.items():
        cells = [_cell(sides.get(name)) for name in contenders]
        lines.append(f"| {network} | {batch} | " + " | ".join(cells) + " |")
    facts = f"{machine['device']}, torch {machine['torch']}, {machine['date'][:10]}, commit {machine['commit']}"
    lines += ["", f"{facts}. Ratio of medians to the baseline (p20-p80 of neighbouring pairs), and of matmul peak."]
    for row in tables.get("quality", []):
        if row.get("ssim_difference") is not None:
            lines.append(
                f"{row['what']}: mean SSIM {row['ssim_difference']:+.4f}, MSE x{row['ratio_mse']:.3f} "
                f"({row['images']} images, {row['steps']} steps)."
            )
        else:
            lines.append(f"{row['what']}: {row['error']:.1e} ({row['images']} images, {row['steps']} steps).")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["ratio_spread"]
    return f"**{row['ratio']:.2f}×** ({low:.2f}-{high:.2f}), {row['peak_fraction']:.0%}"


def csv_rows(run: Loaded) -> list[dict[str, str]]:
    """What a run adds to the committed table."""
    machine = run[0]
    rows = []
    for row in steps(run):
        low, high = row["ratio_spread"]
        values = {
            **{
                name: machine.get(name, "unknown") for name in ("date", "commit", "device", "torch", "triton", "python")
            },
            **{"network": row["network"], "batch": str(row["batch"]), "contender": row["contender"]},
            **{"opponent": "baseline", "ratio": f"{row['ratio']:.4g}"},
            **{"ratio_p20": f"{low:.4g}", "ratio_p80": f"{high:.4g}", "peak_fraction": f"{row['peak_fraction']:.3f}"},
            **{"error": f"{row['error']:.1e}", "rounds": str(row.get("rounds", ""))},
        }
        on_gpu = machine.get("kind") == "cuda"
        values["median_ms"] = f"{row['median_s'] * 1e3:.4g}" if on_gpu else ""
        values["images_per_s"] = f"{row['images_per_s']:.4g}" if on_gpu else ""
        rows.append(values)
    return rows


def append(path: Path, rows: list[dict[str, str]]) -> int:
    """Add to the committed table what it does not hold yet; returns how many rows that were."""
    known: list[dict[str, str]] = []
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != FIELDS:
                raise UserError(f"{path} has other columns than this version writes; expected {','.join(FIELDS)}")
            known = list(reader)
    keys = {tuple(row[name] for name in KEY) for row in known}
    fresh = []
    for row in rows:
        key = tuple(row[name] for name in KEY)
        if key not in keys:
            keys.add(key)
            fresh.append(row)
    if fresh:
        make_folder(path.parent)
        with atomic_write(path, "w") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(known + fresh)
    return len(fresh)


def plot(path: Path, runs: list[Loaded]) -> None:
    """Bars of the ratios, one panel a run; UserError with the install line without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'pdae_fast[plot]' (or --no-plot)") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(runs), 1, figsize=(8, 3.4 * len(runs)), squeeze=False, layout="constrained")
    for axis, run in zip(axes[:, 0], runs, strict=True):
        groups = grouped(steps(run))
        contenders = list(dict.fromkeys(name for sides in groups.values() for name in sides))
        width = 0.8 / len(contenders)
        for i, name in enumerate(contenders):
            at = [
                g + (i - (len(contenders) - 1) / 2) * width for g, sides in enumerate(groups.values()) if name in sides
            ]
            rows = [sides[name] for sides in groups.values() if name in sides]
            ratios = [row["ratio"] for row in rows]
            # Percentiles of pairs can lie beside the ratio of medians: a bar's whisker has no negative length.
            below = [max(0.0, row["ratio"] - row["ratio_spread"][0]) for row in rows]
            above = [max(0.0, row["ratio_spread"][1] - row["ratio"]) for row in rows]
            bars = axis.bar(at, ratios, width * 0.92, yerr=[below, above], label=label(name), error_kw={"lw": 0.8})
            axis.bar_label(bars, [f"{r:.3g}" for r in ratios], fontsize=7, padding=1)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.15)  # room for the legend
        axis.axhline(1, color="0.3", lw=0.8)
        axis.set_xticks(range(len(groups)), [f"{network}\nbatch {batch}" for network, batch in groups], fontsize=8)
        axis.set_ylabel("times the baseline's speed")
        axis.set_title(f"{run[0]['device']}, torch {run[0]['torch']}, {run[0]['date'][:10]}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, ncols=min(4, len(contenders)))
    make_folder(path.parent)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("report", "Turn results of the bench into a table, a plot and rows of the committed CSV.")
    p.prog = "python -m bench.report"
    p.add_argument("files", nargs="*", metavar="FILE", help="results (default: the newest of bench/results)")
    p.add_argument("--csv", default=str(CSV), metavar="FILE", help="append the ratios here")
    p.add_argument("--no-csv", action="store_true", help="append nothing")
    p.add_argument("--plot", default=str(PLOT), metavar="PNG", help="draw the ratios here")
    p.add_argument("--commit", help="what was measured, where the machine had no git to ask")
    p.add_argument("--no-plot", action="store_true", help="draw nothing")
    args = p.parse_args(argv)
    runs = [load(Path(file)) for file in args.files] or [load(newest())]
    runs = [run for run in runs if steps(run)]
    if not runs:
        raise UserError("these results hold no timed step; expected a run of bench/test_step.py or bench.gpu")
    for machine, _ in runs:
        if args.commit and machine.get("commit", "unknown") == "unknown":
            machine["commit"] = args.commit
    print("\n\n".join(markdown(run) for run in runs))
    if not args.no_plot:
        plot(Path(args.plot), runs)
        print(f"\n{args.plot}: written")
    if not args.no_csv:
        added = append(Path(args.csv), [row for run in runs for row in csv_rows(run)])
        print(f"{args.csv}: {added} rows added")


if __name__ == "__main__":
    sys.exit(cli.run(main))
