"""What the shift does at every t: the posterior-mean gap, the loss, the one-step estimate of x0, and G itself.

The functions take a schedule and a :class:`Point` and give one number an image; `times.measure` runs them. "without"
is the pre-trained model alone, "with" is the autoencoder. Two coefficients turn G into a shift of eps, and they are
not the same: c_t in training and ancestral sampling (Algorithms 1 and 2), -sqrt(1 - alpha_bar_t) in DDIM (Algorithm 3).
Gap and loss are those of the former, the estimate of x0 that of the latter, as the paper's samplers have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import metrics
from ...plots import COLOURS, chart
from ...sampling import shifted_eps
from ...schedule import Schedule
from .times import Comparison, Point, per_image


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
