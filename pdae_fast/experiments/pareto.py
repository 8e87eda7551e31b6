"""Quality against cost for a table of recipes: measured row by row, kept as it grows, and the rows nothing beats."""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import cli
from ..data import none_read, stream
from ..engine.device import describe_device
from ..errors import UserError
from ..files import atomic_write, claim_folder
from ..metrics import METRICS
from ..pipeline import Pipeline
from ..plots import COLOURS, chart
from ..samplers import Recipe
from . import common
from .common import MODES, Cost, Run, autoencode, names_digest
from .pareto_settings import FAMILIES, SETS, Candidate, candidates, select

# Evaluations that time the machine before every batch: decoding by that many plain steps.
REFERENCE_STEPS = 4
PARTS = ("trunk", "eps", "gradient")
COLUMNS = (
    *("mode", "name", "family", "steps", "encode_steps", "spacing", "iterations", "solver", "eta", "reuse", "images"),
    *("ssim", "psnr", "mse", "evaluations", "trunk", "eps", "gradient", "seconds_per_image"),
    *("relative_seconds", "relative_low", "relative_high", "front_evaluations", "front_seconds"),
)
Row = dict[str, Any]


# -- one row -------------------------------------------------------------------------------------------------------


def measure(run: Run, candidate: Candidate, mode: str, broken: list) -> Row:
    """One row of the table: ``candidate`` on all images of ``run``, streamed.

    evaluations: of the whole network (trunk and both decoders), by equal numbers of multiplications, per image.
    relative_seconds: seconds over those of one such evaluation on the same batch, taken from a short plain decoding
    just before it; the median over the batches with the 20th and 80th percentile. The encoder is in the seconds and
    not in the evaluations; reading images is in neither.
    """
    pipe = candidate.pipeline(run.pipe)
    plain = reference(run.pipe)
    quality: dict[str, list[float]] = {name: [] for name in METRICS}
    pixels, cost, ratios, units, first = hashlib.sha256(), Cost(), [], [], 0
    for batch in stream(run.dataset, run.pipe.batch_size, run.args.on_error, broken):
        x0, indices = batch.images, range(first, first + len(batch.images))
        first += len(x0)
        pixels.update(x0.contiguous().numpy().tobytes())
        z, x_T = plain.encode(x0), plain.random_x_T(run.args.seed, indices)
        start = time.perf_counter()
        plain.decode(z, x_T)
        units.append((time.perf_counter() - start) / REFERENCE_STEPS / len(x0))
        one = Cost()
        with one.of(pipe):
            x = autoencode(pipe, mode, x0, indices, run.args.seed)
        cost.add(one.values())
        ratios.append(one.seconds / len(x0) / units[-1])
        for name, function in METRICS.items():
            quality[name] += function(x0, x).tolist()
    if not first:
        raise none_read(broken)
    counts = {name: sum(cost.evaluations.get(p + name, 0) for p in ("", "outer_")) for name in PARTS}
    low, high = _percentiles(ratios)
    return {
        "mode": mode,
        **candidate.values(),
        "images": first,
        **{name: statistics.fmean(values) for name, values in quality.items()},
        "evaluations": common.whole_evaluations(pipe, cost.evaluations, first),
        **{name: n / first for name, n in counts.items()},
        "seconds_per_image": cost.seconds / first,
        "relative_seconds": statistics.median(ratios),
        "relative_low": low,
        "relative_high": high,
        "reference_seconds": statistics.median(units),
        "pixels": pixels.hexdigest()[:16],
    }


def reference(pipe: Pipeline) -> Pipeline:
    """The plain decoding whose seconds are the unit of relative_seconds."""
    return pipe.with_recipe("published", steps=REFERENCE_STEPS, noise=pipe.recipe.noise)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """20th and 80th; of one value, itself."""
    if len(values) == 1:
        return values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


# -- what nothing beats --------------------------------------------------------------------------------------------


def front(points: Iterable[tuple[float, float]]) -> list[bool]:
    """Which (cost, loss) are not dominated: none is at least as good in both and better in one. NaN never is."""
    points = list(points)
    chosen = [False] * len(points)
    best = float("inf")
    order = sorted((cost, loss, i) for i, (cost, loss) in enumerate(points) if cost == cost and loss == loss)
    last: tuple[float, float] | None = None
    for cost, loss, i in order:
        # Equal points do not dominate each other.
        if loss < best or (cost, loss) == last:
            chosen[i], best, last = True, loss, (cost, loss)
    return chosen


def mark(rows: list[Row]) -> list[Row]:
    """The rows with front_evaluations and front_seconds, per mode, cheapest first."""
    marked = []
    for mode in MODES:
        own = sorted((dict(row) for row in rows if row["mode"] == mode), key=lambda row: row["evaluations"])
        for name, cost in (("front_evaluations", "evaluations"), ("front_seconds", "relative_seconds")):
            for row, chosen in zip(own, front((row[cost], row["mse"]) for row in own), strict=True):
                row[name] = chosen
        marked += own
    return marked


# -- all rows, resumable -------------------------------------------------------------------------------------------


def job(run: Run) -> dict[str, Any]:
    """What all rows of one folder must share, or their numbers cannot be compared."""
    args, pipe = run.args, run.pipe
    return {
        "model": str(args.model),
        "weights": run.weights,
        "noise": pipe.noise,
        "input": list(run.spec),
        "images": len(run.dataset),
        "names": names_digest(run.dataset),
        "background": args.background,
        "crop": args.crop,
        "seed": args.seed,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "plan": pipe.plan.name,
        **common.approximations(args),
        "device": describe_device(pipe.device),
        "batch_size": pipe.batch_size,
        "torch": torch.__version__,
    }


def sweep(run: Run, table: Sequence[Candidate], broken: list, after: Callable[[Row], None] | None = None) -> list[Row]:
    """Measure what ``run.out``/metrics.json does not hold yet; after every row all files are written anew.

    Raises UserError when the folder holds rows of another model, other images, another dtype or another machine.
    """
    path, current = run.out / "metrics.json", job(run)
    rows = _load(path, current)
    for candidate, mode in wanted(table):
        if any(_is(row, candidate, mode) for row in rows):
            continue
        row = measure(run, candidate, mode, broken)
        if rows and rows[0]["pixels"] != row["pixels"]:
            raise UserError(f"the images are not those of the rows in {path} any more; choose another --out")
        # A candidate of this name whose definition was changed is replaced.
        rows = [*(r for r in rows if (r["mode"], r["name"]) != (mode, candidate.name)), row]
        save(run.out, current, rows, broken)
        if after:
            after(row)
    return rows


def wanted(table: Sequence[Candidate]) -> list[tuple[Candidate, str]]:
    return [(candidate, mode) for candidate in table for mode in candidate.modes]


def remaining(run: Run, table: Sequence[Candidate]) -> list[tuple[Candidate, str]]:
    """What `sweep` would measure."""
    rows = _load(run.out / "metrics.json", job(run))
    return [(s, mode) for s, mode in wanted(table) if not any(_is(row, s, mode) for row in rows)]


def _is(row: Row, candidate: Candidate, mode: str) -> bool:
    return row["mode"] == mode and all(row.get(name) == value for name, value in candidate.values().items())


def _load(path: Path, current: dict[str, Any]) -> list[Row]:
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known, rows = values["job"], values["rows"]
        if not all(row["pixels"] and row["name"] and row["mode"] for row in rows):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not one of this command; choose another --out") from None
    current = json.loads(json.dumps(current))
    for name in {**current, **known}:
        value = current.get(name)
        if known.get(name) != value:
            raise UserError(
                f"{path} holds rows with {name} {known.get(name)}, now it is {value}: they cannot be compared; "
                "choose another --out"
            )
    return rows


def save(out: Path, job: dict[str, Any], rows: list[Row], broken: Sequence[tuple[str, str]] = ()) -> None:
    """metrics.json (from which a run is continued) and pareto.csv."""
    marked = mark(rows)
    report = {"job": job, "versions": cli.versions(), "reference_steps": REFERENCE_STEPS, "rows": marked}
    report["broken"] = common.named(list(dict(broken).items()))
    cli.write_json(out / "metrics.json", report)
    with atomic_write(out / "pareto.csv", "w") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(row[name]) for name in COLUMNS} for row in marked)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def text(rows: list[Row], only_front: bool = True) -> str:
    """The terminal's table, per mode, cheapest first; a front's rows have a star at their cost."""
    shown = [
        row for row in mark(rows) if not only_front or row["front_evaluations"] or row["front_seconds"] or _named(row)
    ]
    lines = [
        [
            row["mode"],
            row["name"],
            f"{row['ssim']:.4f}",
            f"{row['psnr']:.2f}",
            f"{row['mse']:.2e}",
            f"{row['evaluations']:.1f}{'*' if row['front_evaluations'] else ' '}",
            f"{row['relative_seconds']:.1f}{'*' if row['front_seconds'] else ' '}",
            f"{row['relative_low']:.1f}-{row['relative_high']:.1f}",
        ]
        for row in shown
    ]
    header = ["x_T", "setting", "SSIM", "PSNR", "MSE", "evaluations", "relative s", "p20-p80"]
    return cli.table(header, lines, left=2)


def _named(row: Row) -> bool:
    return row["family"] == "preset" or row["name"] in ("published 100+100", "published 1000+100")


# -- the picture ---------------------------------------------------------------------------------------------------

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
    # From random x_T the recipes differ by a few per cent: a logarithm would only spoil the ticks.
    axis.set(xscale="log", yscale="log" if max(losses) > 5 * min(losses) else "linear")
    low, high = axis.get_xlim()
    for row in rows:
        if _named(row):
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


# -- the command ---------------------------------------------------------------------------------------------------

DEFAULT_LIMIT = 64


def _parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "pareto",
        "Compare recipes by the error they leave and by what they cost. The same command continues a run that was "
        "stopped. --steps, --encode-steps, --spacing, --iterations, --solver, --eta and --reuse, where given, add one "
        "of your own to the table.",
    )
    common.add_options(p, out="pareto")
    p.add_argument("--set", dest="which", choices=SETS, default="quick", help="how many candidates")
    p.add_argument("--only", metavar="PATTERN", help="candidates of this family, or whose name holds or fits PATTERN")
    p.add_argument("--list", action="store_true", help="print the candidates and what they would evaluate, run nothing")
    p.add_argument("--no-plot", action="store_true", help="draw nothing")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    table = select(candidates(args.which), args.only) + _own(args)
    run = common.open_run(args, default_limit=DEFAULT_LIMIT, infers=False)
    if args.list:
        print(_listing(run, table))
        return
    if not args.no_plot:
        _needs_matplotlib()
    claim_folder(run.out)
    todo = remaining(run, table)
    each = [candidate.evaluations(run.pipe, mode) + REFERENCE_STEPS for candidate, mode in todo]
    broken: list[tuple[str, str]] = []
    with common.progress(run.pipe, sum(each) * len(run.dataset), "pareto", args.quiet):
        rows = sweep(run, table, broken)
    if not args.no_plot:
        draw(run.out / "pareto.png", rows, _title(run, rows))
    files = ["pareto.csv", *([] if args.no_plot else ["pareto.png"]), "metrics.json"]
    common.say(run, _summary(rows, len(todo)), files, broken)


def _own(args: argparse.Namespace) -> list[Candidate]:
    """The candidate that the command line describes, if it says anything of one."""
    if args.preset is None and not Recipe.given(args).keys() - {"noise"}:
        return []
    recipe = Recipe.from_args(args)
    return [Candidate("yours", "preset", recipe, ("random",) if recipe.draws else ("inferred", "random"))]


def _needs_matplotlib() -> None:
    """Said before the work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plot needs matplotlib: pip install 'pdae_fast[plot]' (or --no-plot)")


def _listing(run: common.Run, table: list[Candidate]) -> str:
    rows, total = [], 0
    for candidate, mode in wanted(table):
        evaluations = candidate.evaluations(run.pipe, mode)
        total += evaluations
        rows.append([mode, candidate.name, candidate.family, str(evaluations)])
    head = cli.table(["x_T", "setting", "family", "evaluations"], rows, left=3)
    return f"{head}\n{len(rows)} rows, {total} evaluations an image, {total * len(run.dataset)} in all"


def _title(run: common.Run, rows: list[Row]) -> str:
    name = Path(str(run.args.model)).name
    dtype = str(run.pipe.dtype).removeprefix("torch.")
    return f"{name}, {rows[0]['images']} images, {dtype}, {run.pipe.plan.name} plan"


def _summary(rows: list[Row], new: int) -> list[str]:
    return [
        text(rows),
        f"* nothing is as cheap and better; {len(rows)} rows, {new} of them new, {rows[0]['images']} images; the unit "
        "of time is one plain evaluation of the whole network in the same batch",
    ]
