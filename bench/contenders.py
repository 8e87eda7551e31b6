"""The engine's sides of the comparison: made, checked against the baseline's numbers, and timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pdae_fast.engine import build_plan
from pdae_fast.samplers.ddim import ddim, ddim_step
from pdae_fast.schedule import build_schedule

from .baseline import Baseline
from .machine import PeakMemory, matmul_peak, tf32
from .networks import Case
from .timing import Alternation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The step that is timed, and the one that is checked: a long one at low noise, whose result is nearly x0_hat. After a
# short step x is nearly what it was, whatever the network says: without G at all the error there is below 1%.
TIMED, CHECKED = (499, 489), (199, 0)
# ||x - baseline's|| / ||baseline's|| after the checked step: about three times what rounding to the dtype was seen to
# cost in half precision (bfloat16 0.4 to 0.7%), and room for other convolution algorithms in float32 (8e-7 seen on the
# CPU); leaving G out costs 12% or more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.004}
TOLERANCE_TF32 = 5e-3  # of the baseline itself on CUDA, whose convolutions may round to TF32
# Captured steps against single ones of the same plan, relative to the dtype's tolerance: rounding feeds back.
TRAJECTORY_FACTOR = 5


class WrongNumbers(AssertionError):
    """A contender computes something else than the baseline; its speed means nothing."""


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64; NaN never passes a comparison."""
    a, b = a.detach().double(), b.detach().to(a.device).double()
    return float((a - b).norm() / b.norm())


def check(name: str, error: float, tolerance: float) -> float:
    """``error`` again; WrongNumbers when it is beyond ``tolerance`` or NaN."""
    if not error <= tolerance:
        raise WrongNumbers(f"{name}: wrong numbers (error {error:.2e}, allowed {tolerance:.1e}): no speed is reported")
    return error


def default_steps(device: torch.device) -> int:
    """Steps of one timed call: a trajectory on CUDA, where the engine replays captured steps; one on the CPU."""
    return 10 if device.type == "cuda" else 1


class PlanSide:
    """One of the engine's plans on a case. ``name`` is plan-dtype, such as "fused-bfloat16"."""

    def __init__(self, case: Case, name: str, **keywords: Any) -> None:
        plan_name, _, self.dtype_name = name.partition("-")
        self.case, self.name, self.tolerance = case, name, TOLERANCE[self.dtype_name]
        self.plan = build_plan(case.model, case.device, DTYPES[self.dtype_name], plan_name, **keywords)
        self.field = self.plan.field(case.z)
        self.schedule = build_schedule(case.model.config.schedule)

    def step(self, t: int = TIMED[0], t_next: int = TIMED[1]) -> Tensor:
        x, alpha_bar = self.case.x, self.schedule.alpha_bar
        eps, gradient = self.field(x, t, True)
        return ddim_step(x, eps, gradient, float(alpha_bar[t]), float(alpha_bar[t_next]))

    def trajectory(self, steps: int) -> Tensor:
        """``steps`` DDIM steps, by the way that the pipeline takes: captured where the plan captures."""
        return ddim(self.field, self.case.x, self.schedule, steps)

    def plain_trajectory(self, steps: int) -> Tensor:
        """The same steps, one call of the field after another."""
        return ddim(lambda x, t, use_gradient: self.field(x, t, use_gradient), self.case.x, self.schedule, steps)

    def check_trajectory(self, steps: int) -> float:
        """How far the two are apart; WrongNumbers when it is more than rounding."""
        apart = relative(self.trajectory(steps), self.plain_trajectory(steps))
        return check(f"{self.name}, {steps} steps at once", apart, TRAJECTORY_FACTOR * self.tolerance)


def baseline_trajectory(baseline: Baseline, case: Case, steps: int) -> Tensor:
    points = build_schedule(case.model.config.schedule).timesteps(steps)
    x = case.x
    for t_next, t in zip(points[-2::-1], points[:0:-1], strict=True):
        x = baseline.step(x, int(t), int(t_next), case.z)
    return x


def measure(
    case: Case,
    names: Iterable[str],
    *,
    extra: Mapping[str, Baseline] | None = None,
    steps: int | None = None,
    rounds: int | None = None,
    seconds: float = 30.0,
    peaks: dict[str, float] | None = None,
    drive: Callable[[Alternation, float], bool] | None = None,
    failures: dict[str, Exception] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the "step" table: the baseline, the ``names`` (plan-dtype) and ``extra`` opponents, alternated.

    Every side's numbers are checked first: one step (CHECKED) against the baseline in strict float32, and where a
    trajectory of ``steps`` is what is timed, that trajectory against the same plan's single steps. WrongNumbers ends it
    without a row. ``drive(alternation, seconds of a round)`` runs the rounds (default: ``rounds`` of them, within
    ``seconds``) and answers whether anything was timed. Times are per step.
    With ``failures`` a plan that fails or is wrong is left out and entered there, and the others go on.
    """
    steps = default_steps(case.device) if steps is None else steps
    peaks = {} if peaks is None else peaks
    with PeakMemory(case.device) as memory:
        baseline = Baseline(case.model, case.device)
        with tf32(False):
            expected = baseline.step(case.x, *CHECKED, case.z)
    own = relative(baseline.step(case.x, *CHECKED, case.z), expected)
    errors, used = {"baseline": check("baseline", own, TOLERANCE_TF32)}, {"baseline": memory.bytes}
    kinds = {"baseline": "tf32" if case.device.type == "cuda" else "float32"}
    functions: dict[str, Callable[[], Tensor]] = {}

    def published(opponent: Baseline) -> Callable[[], Tensor]:
        if steps == 1:
            return lambda: opponent.step(case.x, *TIMED, case.z)
        return lambda: baseline_trajectory(opponent, case, steps)

    functions["baseline"] = published(baseline)
    for name, opponent in (extra or {}).items():
        with PeakMemory(case.device) as memory:
            found = opponent.step(case.x, *CHECKED, case.z)
        errors[name] = check(name, relative(found, expected), TOLERANCE["bfloat16"])
        functions[name], used[name], kinds[name] = published(opponent), memory.bytes, "bfloat16"
    for name in names:
        try:
            with PeakMemory(case.device) as memory:
                side = PlanSide(case, name)
                found = side.step(*CHECKED)
                error = check(name, relative(found, expected), side.tolerance)
                if steps > 1:
                    side.check_trajectory(steps)
        except Exception as reason:
            if failures is None:
                raise
            failures[name] = reason
            continue
        errors[name] = error
        functions[name] = side.step if steps == 1 else lambda side=side: side.trajectory(steps)
        used[name], kinds[name] = memory.bytes, side.dtype_name
    alternation = Alternation(functions, case.device)
    _, one_round = alternation.first()
    if drive is None:
        alternation.run(rounds or 15, seconds)
    elif not drive(alternation, one_round):
        return []
    for kind in kinds.values():
        if kind not in peaks:
            peaks[kind] = matmul_peak(case.device, kind)
    return [_row(case, name, alternation, steps, used[name], errors[name], peaks[kinds[name]]) for name in functions]


def _row(case: Case, name: str, alternation: Alternation, steps: int, used: int | None, error: float, peak: float):
    times, ratio = alternation.spread(name).scaled(1 / steps), alternation.ratio(name, "baseline")
    return {
        "network": case.network,
        "batch": case.batch,
        "contender": name,
        "median_s": times.median,
        "spread_s": [times.low, times.high],
        "ratio": ratio.median,
        "ratio_spread": [ratio.low, ratio.high],
        "images_per_s": case.batch / times.median,
        "peak_fraction": case.flops / times.median / peak,
        "memory_bytes": used,
        "error": error,
        "rounds": ratio.count,
    }
