"""What the shift does at every t: the posterior-mean gap, the loss, the one-step estimate of x0, and G itself.

The functions take a schedule and a :class:`Point` and give one number an image; `times.measure` runs them. "without"
is the pre-trained model alone, "with" is the autoencoder. Two coefficients turn G into a shift of eps, and they are
not the same: c_t in training and ancestral sampling (Algorithms 1 and 2), -sqrt(1 - alpha_bar_t) in DDIM (Algorithm 3).
Gap and loss are those of the former, the estimate of x0 that of the latter, as the paper's samplers have them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import cli, metrics
from ...data import save_grid, stream
from ...errors import UserError
from ...files import claim_folder
from ...plots import COLOURS, chart
from ...samplers.ddim import shifted_eps
from ...samplers.noise import ImageNoise
from ...schedule import Schedule
from .. import common
from ..common import Cost
from .times import Comparison, Measure, Point, measure, per_image, points, time_grid, write_csv


def shifted(schedule: Schedule, point: Point) -> Tensor:
    """eps' = eps + c_t G, the noise that the autoencoder predicts (Algorithm 1)."""
    return point.eps + float(schedule.shift_coef[point.t]) * point.gradient


def posterior_mean_gap(schedule: Schedule, point: Point) -> dict[str, Tensor]:
    """|| mu~_t(x_t, x0) - mu_t(x_t) ||^2 per image [B], summed over pixels.

    mu~ is the mean of q(x_{t-1} | x_t, x0), mu that of the model, from eps or (with the shift) eps + c_t G, which adds
    sigma_t^2 G to it. Both are linear in the noise: mu~ - mu = beta_t (eps' - noise) / sqrt(alpha_t (1 - alpha_bar_t)),
    in which nothing cancels. The shift is 0 at t = 0.
    """
    t = point.t
    pixels = point.noise[0].numel()
    scale = pixels * float(schedule.beta[t] ** 2 / (schedule.alpha[t] * (1 - schedule.alpha_bar[t])))
    return {
        "without": scale * per_image((point.eps - point.noise).double().square()),
        "with": scale * per_image((shifted(schedule, point) - point.noise).double().square()),
    }


def eps_loss(schedule: Schedule, point: Point) -> dict[str, Tensor]:
    """Mean squared error of the predicted noise per image [B], unweighted: lambda_t times "with" is what is trained."""
    return {
        "without": per_image((point.eps - point.noise).square()),
        "with": per_image((shifted(schedule, point) - point.noise).square()),
    }


def weighted(schedule: Schedule, times: Sequence[int], comparison: Comparison) -> Comparison:
    """``comparison`` of losses times lambda_t (Algorithm 1)."""
    weight = schedule.loss_weight[list(times)][:, None]
    return Comparison(times, weight * comparison.without, weight * comparison.with_shift)


def one_step(schedule: Schedule, point: Point) -> tuple[Tensor, Tensor]:
    """x0_hat from x_t, clamped to [-1, 1] as the sampler does, without and with G (Algorithm 3)."""
    alpha_bar = float(schedule.alpha_bar[point.t])

    def estimate(gradient: Tensor | None) -> Tensor:
        eps = shifted_eps(point.eps, gradient, alpha_bar)
        return (point.x_t / alpha_bar**0.5 - (1 / alpha_bar - 1) ** 0.5 * eps).clamp(-1, 1)

    return estimate(None), estimate(point.gradient)


def one_step_error(schedule: Schedule, point: Point) -> dict[str, Tensor]:
    """MSE on [0, 1] of `one_step` per image [B]."""
    without, with_shift = one_step(schedule, point)
    return {"without": metrics.mse(point.x0, without), "with": metrics.mse(point.x0, with_shift)}


def shift_size(schedule: Schedule, point: Point) -> dict[str, Tensor]:
    """The shift c_t G against what the pre-trained model misses, noise - eps; per image [B].

    shift, missing: root mean squares, in units of the noise. cosine: of the angle between the two (0 where the shift
    is 0, at t = 0). gradient: root mean square of G itself.
    """
    shift = shifted(schedule, point).double() - point.eps.double()
    missing = (point.noise - point.eps).double()
    size, wanted = per_image(shift.square()).sqrt(), per_image(missing.square()).sqrt()
    product = size * wanted
    cosine = torch.where(product > 0, per_image(shift * missing) / product.clamp_min(1e-300), 0.0)
    return {"shift": size, "missing": wanted, "cosine": cosine, "gradient": per_image(point.gradient.square()).sqrt()}


# -- pictures ------------------------------------------------------------------------------------------------------


def pictures_of_g(point: Point) -> Tensor:
    """G with its largest value of every image at +-1: grey is 0. [B, C, H, W]."""
    largest = point.gradient.abs().flatten(1).amax(1).clamp_min(1e-30)
    return point.gradient / largest.view(-1, 1, 1, 1)


def two_curves(path: Path, comparison: Comparison, label: str, title: str = "", log: bool = True) -> None:
    """Chart of a Comparison over t: both means, with two standard errors on either side where there are any."""
    rows = comparison.rows()
    t = [row["t"] for row in rows]
    with chart(path, 6.4, 3.8) as axes:
        for name, text, colour in (("without", "without the shift", COLOURS[0]), ("with", "with it", COLOURS[1])):
            draw_curve(axes, t, rows, name, text, colour)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("t")
        axes.set_ylabel(label)
        if title:
            axes.set_title(title, loc="left", fontsize=10)
        axes.legend()


def draw_curve(axes: Any, t: Sequence[int], rows: Sequence[dict], name: str, label: str, colour: str) -> None:
    middle, error = ([row[key] for row in rows] for key in (name, f"{name}_standard_error"))
    axes.plot(t, middle, color=colour, label=label)
    if all(e == e for e in error):
        # A band that reached 0 would leave a logarithmic axis.
        low = [max(m - 2 * e, 0.1 * m) for m, e in zip(middle, error, strict=True)]
        high = [m + 2 * e for m, e in zip(middle, error, strict=True)]
        axes.fill_between(t, low, high, color=colour, alpha=0.2, linewidth=0)


# -- the commands --------------------------------------------------------------------------------------------------

DEFAULT_TIMES = 50
DEFAULT_IMAGES = 64
SHOWN = 8  # images in a picture
SHOWN_TIMES = (999, 800, 650, 500, 350, 200, 50)


def add_times(p: argparse.ArgumentParser) -> None:
    p.add_argument("--times", type=int, default=DEFAULT_TIMES, help="equally spaced t at which to evaluate")
    p.add_argument("--all-times", action="store_true", help="every t")


def add_pictures(p: argparse.ArgumentParser) -> None:
    add_times(p)
    p.add_argument("--show", type=int, nargs="+", metavar="T", help=f"t in the picture (default: {SHOWN_TIMES})")


class _OverTime:
    """The images of a command at many t: ``found`` [times, N] of what was measured."""

    def __init__(self, args: argparse.Namespace, name: str, function: Measure, shown: bool = False) -> None:
        self.run = run = common.open_run(args, default_limit=DEFAULT_IMAGES, infers=False)
        common.check_g(run.model, f"analyze {name}")
        T = run.pipe.schedule.T
        self.times = list(range(T)) if args.all_times else time_grid(T, args.times)
        self.shown = _shown_times(args, T) if shown else []
        claim_folder(run.out)
        self.broken: list[tuple[str, str]] = []
        self.cost = Cost()
        total = len(run.dataset) * len(self.times)
        with common.progress(run.pipe, total, name, args.quiet) as advance, self.cost.of(run.pipe):
            self.found = measure(
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

    def points(self) -> tuple[torch.Tensor, list[Point]]:
        """The first images [n, C, H, W] and their Points at the times to be shown, highest first; one noise for all."""
        run = self.run
        x0 = next(stream(run.dataset, min(SHOWN, run.pipe.batch_size), run.args.on_error, [])).images
        noise = ImageNoise(run.args.seed, range(len(x0)), x0.shape[1:])()
        drawn = points(run.pipe, x0, self.shown, lambda t: noise, lambda n: None)
        return x0, [Point(p.t, *(v.cpu() for v in p[1:])) for p in drawn]

    def report(self, **values: Any) -> dict[str, Any]:
        return common.report(
            self.run,
            self.broken,
            recipe=False,
            images=self.images,
            times=self.times,
            **self.cost.report(self.images),
            **values,
        )

    def say(self, summary: list[str], *files: str) -> None:
        where = f"{self.images} images at {len(self.times)} times, {self.run.pipe.noise} noise, model "
        common.say(self.run, [*summary, where + str(self.run.args.model)], [*files, "metrics.json"], self.broken)


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


def gap_command(args: argparse.Namespace) -> None:
    over = _OverTime(args, "gap", posterior_mean_gap)
    comparison, out = over.comparison(), over.run.out
    write_csv(out / "gap.csv", comparison.rows())
    two_curves(out / "gap.png", comparison, "|| posterior mean - model's mean ||\u00b2")
    text = _compared(over, comparison, quantity="|| mu~(x_t, x_0) - mu(x_t) ||^2, summed over pixels")
    over.say(["posterior-mean gap", text], "gap.png", "gap.csv")


def loss_command(args: argparse.Namespace) -> None:
    over = _OverTime(args, "loss", eps_loss)
    plain, schedule, out = over.comparison(), over.run.pipe.schedule, over.run.out
    heavy = weighted(schedule, over.times, plain)
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
                draw_curve(panel, over.times, comparison.rows(), name, label, colour)
            panel.set_yscale("log")
            panel.set_xlabel("t")
            panel.set_title(title, loc="left", fontsize=10)
        axes[0].set_ylabel("mean squared error of the predicted noise")
        axes[0].legend()
    heavier = {"overall": heavy.factor(args.seed), "ranges": heavy.ranges(schedule.T, args.seed)}
    text = _compared(over, plain, quantity="(eps - eps')^2, mean over pixels", weighted=heavier)
    over.say(["loss of the predicted noise, unweighted", text, "weighted by lambda_t",
              _range_table(heavier["ranges"], heavier["overall"])], "loss.png", "loss.csv")  # fmt: skip


def one_step_command(args: argparse.Namespace) -> None:
    over = _OverTime(args, "one-step", one_step_error, shown=True)
    comparison, out = over.comparison(), over.run.out
    write_csv(out / "one_step.csv", comparison.rows())
    two_curves(out / "one_step.png", comparison, "MSE of the one-step estimate of x0")
    x0, drawn = over.points()
    rows, labels = [x0], ["input"]
    for point in drawn:
        without, with_g = one_step(over.run.pipe.schedule, point)
        rows += [point.x_t.clamp(-1, 1), without, with_g]
        labels += [f"t = {point.t}: x_t", "without G", "with G"]
    save_grid(rows, out / "grid.png", labels)
    text = _compared(over, comparison, quantity="MSE of x0_hat on [0, 1], clamped")
    over.say(["one-step estimate of x0 from x_t", text], "grid.png", "one_step.png", "one_step.csv")


def shift_command(args: argparse.Namespace) -> None:
    over = _OverTime(args, "shift", shift_size, shown=True)
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
    save_grid([x0, *map(pictures_of_g, drawn)], out / "grid.png", ["input", *(f"t = {p.t}" for p in drawn)])
    cli.write_json(out / "metrics.json", over.report(at=rows))
    step = max(1, len(rows) // 10)
    header = ["t", "missing", "shift", "cosine"]
    lines = [[str(r["t"]), *(f"{r[name]:.3e}" for name in header[1:3]), f"{r['cosine']:.3f}"] for r in rows[::step]]
    over.say([cli.table(header, lines)], "grid.png", "shift.png", "shift.csv")
