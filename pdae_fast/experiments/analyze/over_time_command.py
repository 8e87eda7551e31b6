"""The analyses over t as commands: gap, loss, one-step and shift."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ... import cli
from ...data import save_grid, stream
from ...errors import UserError
from ...files import make_folder
from ...plots import COLOURS, chart
from ...sampling import ImageNoise
from .. import common
from ..common import Cost
from . import shift, times
from .times import Comparison, write_csv

DEFAULT_TIMES = 50
DEFAULT_IMAGES = 64
SHOWN = 8  # images in a picture
SHOWN_TIMES = (999, 800, 650, 500, 350, 200, 50)


def time_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--times", type=int, default=DEFAULT_TIMES, help="equally spaced t at which to evaluate")
    p.add_argument("--all-times", action="store_true", help="every t")


def picture_options(p: argparse.ArgumentParser) -> None:
    time_options(p)
    p.add_argument("--show", type=int, nargs="+", metavar="T", help=f"t in the picture (default: {SHOWN_TIMES})")


class _OverTime:
    """The images of a command at many t: ``found`` [times, N] of what was measured."""

    def __init__(self, args: argparse.Namespace, name: str, function: times.Measure, shown: bool = False) -> None:
        self.run = run = common.open_run(args, default_limit=DEFAULT_IMAGES)
        T = run.pipe.schedule.T
        self.times = list(range(T)) if args.all_times else times.time_grid(T, args.times)
        self.shown = _shown_times(args, T) if shown else []
        make_folder(run.out)
        self.broken: list[tuple[str, str]] = []
        self.cost = Cost()
        total = len(run.dataset) * len(self.times)
        with common.progress(run.pipe, total, name, args.quiet) as advance, self.cost.of(run.pipe):
            self.found = times.measure(
                run.pipe,
                run.dataset,
                self.times,
                function,
                seed=args.seed,
                on_error=args.on_error,
                broken=self.broken,
                advance=advance,
            )
        self.images = next(iter(self.found.values())).shape[1]

    def comparison(self) -> Comparison:
        return Comparison(self.times, self.found["without"], self.found["with"])

    def points(self) -> tuple[torch.Tensor, list[times.Point]]:
        """The first images [n, C, H, W] and their Points at the times to be shown, highest first; one noise for all."""
        run = self.run
        x0 = next(stream(run.dataset, min(SHOWN, run.pipe.batch_size), run.args.on_error, [])).images
        noise = ImageNoise(run.args.seed, range(len(x0)), x0.shape[1:])()
        drawn = times.points(run.pipe, x0, self.shown, lambda t: noise, lambda n: None)
        return x0, [times.Point(p.t, *(v.cpu() for v in p[1:])) for p in drawn]

    def report(self, **values: Any) -> dict[str, Any]:
        report = common.report(
            self.run,
            images=self.images,
            times=self.times,
            broken=[{"name": name, "reason": reason} for name, reason in self.broken],
            **self.cost.report(self.images),
            **values,
        )
        for unused in ("steps", "encode_steps", "preset", "spacing", "iterations", "solver"):
            report.pop(unused)
        return report

    def say(self, text: list[str]) -> None:
        if not self.run.args.quiet:
            noise = f"{self.run.pipe.noise} noise"
            where = f"{self.images} images at {len(self.times)} times, {noise}, model {self.run.args.model}"
            print("\n".join([*text, where, f"wrote {self.run.out}"]))


def _shown_times(args: argparse.Namespace, T: int) -> list[int]:
    shown = args.show or sorted({min(t, T - 1) for t in SHOWN_TIMES}, reverse=True)
    if not all(0 <= t < T for t in shown):
        raise UserError(f"--show takes times from 0 to {T - 1}, not {' '.join(map(str, shown))}")
    return sorted(set(shown), reverse=True)


def _range_table(rows: list[dict[str, float]], overall: dict[str, float]) -> str:
    lines = [[f"{row['from']}-{row['to']}", *_factor_cells(row)] for row in rows]
    table = cli.table(["t", "without", "with", "factor", "95%"], [*lines, ["all", *_factor_cells(overall)]])
    return f"{table}\ngeometric mean over t of the factor: {overall['typical']:.2f}"


def _factor_cells(row: dict[str, float]) -> list[str]:
    return [
        f"{row['without']:.3e}",
        f"{row['with']:.3e}",
        f"{row['factor']:.2f}",
        f"{row['low']:.2f}-{row['high']:.2f}",
    ]


def _compared(over: _OverTime, comparison: Comparison, **values: Any) -> str:
    """Write metrics.json of a Comparison; its summary."""
    seed, T = over.run.args.seed, over.run.pipe.schedule.T
    overall, ranges = comparison.factor(seed), comparison.ranges(T, seed)
    interval = "95%, bootstrap over images"
    report = over.report(overall=overall, ranges=ranges, interval=interval, at=comparison.rows(), **values)
    cli.write_json(over.run.out / "metrics.json", report)
    return _range_table(ranges, overall)


def gap(args: argparse.Namespace) -> None:
    over = _OverTime(args, "gap", shift.posterior_mean_gap)
    comparison, out = over.comparison(), over.run.out
    write_csv(out / "gap.csv", comparison.rows())
    shift.two_curves(out / "gap.png", comparison, "|| posterior mean - model's mean ||\u00b2")
    text = _compared(over, comparison, quantity="|| mu~(x_t, x_0) - mu(x_t) ||^2, summed over pixels")
    over.say(["posterior-mean gap", text])


def loss(args: argparse.Namespace) -> None:
    over = _OverTime(args, "loss", shift.eps_loss)
    plain, schedule, out = over.comparison(), over.run.pipe.schedule, over.run.out
    heavy = shift.weighted(schedule, over.times, plain)
    rows = []
    for row, other in zip(plain.rows(), heavy.rows(), strict=True):
        rows.append({**row, "weight": float(schedule.loss_weight[row["t"]]),
                     **{f"weighted_{k}": other[k] for k in ("without", "with")}})  # fmt: skip
    write_csv(out / "loss.csv", rows)
    with chart(out / "loss.png", 9.6, 3.8, 1, 2) as axes:
        for panel, comparison, title in zip(axes, (plain, heavy), ("unweighted", "times lambda_t"), strict=True):
            for name, label, colour in (
                ("without", "unconditional (G = 0)", COLOURS[0]),
                ("with", "conditional", COLOURS[1]),
            ):
                shift.draw_curve(panel, over.times, comparison.rows(), name, label, colour)
            panel.set_yscale("log")
            panel.set_xlabel("t")
            panel.set_title(title, loc="left", fontsize=10)
        axes[0].set_ylabel("mean squared error of the predicted noise")
        axes[0].legend()
    weighted = {"overall": heavy.factor(args.seed), "ranges": heavy.ranges(schedule.T, args.seed)}
    text = _compared(over, plain, quantity="(eps - eps')^2, mean over pixels", weighted=weighted)
    over.say(["loss of the predicted noise, unweighted", text, "weighted by lambda_t",
              _range_table(weighted["ranges"], weighted["overall"])])  # fmt: skip


def one_step(args: argparse.Namespace) -> None:
    over = _OverTime(args, "one-step", shift.one_step_error, shown=True)
    comparison, out = over.comparison(), over.run.out
    write_csv(out / "one_step.csv", comparison.rows())
    shift.two_curves(out / "one_step.png", comparison, "MSE of the one-step estimate of x0")
    x0, drawn = over.points()
    rows, labels = [x0], ["input"]
    for point in drawn:
        without, with_g = shift.one_step(over.run.pipe.schedule, point)
        rows += [point.x_t.clamp(-1, 1), without, with_g]
        labels += [f"t = {point.t}: x_t", "without G", "with G"]
    save_grid(rows, out / "grid.png", labels)
    text = _compared(over, comparison, quantity="MSE of x0_hat on [0, 1], clamped")
    over.say(["one-step estimate of x0 from x_t", text])


def shift_along_t(args: argparse.Namespace) -> None:
    over = _OverTime(args, "shift", shift.shift_size, shown=True)
    out = over.run.out
    means = {name: values.mean(axis=1) for name, values in over.found.items()}
    rows = [{"t": t, **{name: float(v[i]) for name, v in means.items()}} for i, t in enumerate(over.times)]
    write_csv(out / "shift.csv", rows)
    with chart(out / "shift.png", 9.6, 3.8, 1, 2) as axes:
        axes[0].plot(over.times, means["missing"], color=COLOURS[0], label="what the prior misses, noise - eps")
        axes[0].plot(over.times, means["shift"], color=COLOURS[1], label="the shift, c_t G")
        axes[0].set_yscale("log", nonpositive="mask")  # at t = 0 there is no shift
        axes[0].set_ylabel("root mean square, in units of the noise")
        axes[0].legend()
        axes[1].plot(over.times, means["cosine"], color=COLOURS[2])
        axes[1].set_ylim(min(0.0, float(means["cosine"].min())), 1)
        axes[1].set_ylabel("cosine of the angle between the two")
        for panel in axes:
            panel.set_xlabel("t")
    x0, drawn = over.points()
    save_grid([x0, *map(shift.pictures_of_g, drawn)], out / "grid.png", ["input", *(f"t = {p.t}" for p in drawn)])
    cli.write_json(out / "metrics.json", over.report(at=rows))
    step = max(1, len(rows) // 10)
    header = ["t", "missing", "shift", "cosine"]
    lines = [[str(r["t"]), *(f"{r[name]:.3e}" for name in header[1:3]), f"{r['cosine']:.3f}"] for r in rows[::step]]
    over.say([cli.table(header, lines)])
