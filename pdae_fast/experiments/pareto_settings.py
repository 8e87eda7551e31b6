"""The settings that `pdae_fast.pareto` compares, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..engine import Reuse
from ..errors import UserError
from ..pipeline import PRESETS, Pipeline
from .common import evaluations, variant

SETS = ("quick", "standard", "full")
FAMILIES = ("published", "spacing", "solved", "solver", "reversible", "reuse", "preset")


@dataclass(frozen=True)
class Setting:
    """One way to decode, and to infer x_T where ``modes`` has "inferred"; ``family`` is its colour in the plot."""

    name: str
    family: str
    steps: int
    encode_steps: int | None = None
    spacing: str = "uniform"
    iterations: int = 0
    solver: str = "ddim"
    reuse: str = "none"
    modes: tuple[str, ...] = ("inferred", "random")

    def pipeline(self, pipe: Pipeline) -> Pipeline:
        """``pipe`` with this setting; the weights are shared, the counters of evaluations are not."""
        plan = pipe.plan.reusing(Reuse.parse(self.reuse))
        return variant(
            pipe,
            plan=plan,
            reuse=plan.reuse,
            steps=self.steps,
            spacing=self.spacing,
            iterations=self.iterations,
            solver=self.solver,
        )

    def evaluations(self, pipe: Pipeline, mode: str) -> int:
        """Evaluations of the field for one image, of which ``reuse`` may compute only a part."""
        return evaluations(self.pipeline(pipe), mode, self.encode_steps)

    def values(self) -> dict[str, Any]:
        """The fields that decide the result."""
        values = dataclasses.asdict(self)
        del values["modes"]
        return values


def _published(steps: int, encode_steps: int | None = None) -> Setting:
    up = steps if encode_steps is None else encode_steps
    modes = ("inferred", "random") if encode_steps is None else ("inferred",)
    return Setting(f"published {up}+{steps}", "published", steps, encode_steps, modes=modes)


def _spaced(spacing: str, steps: int) -> Setting:
    return Setting(f"{spacing} {steps}+{steps}", "spacing", steps, spacing=spacing)


def _solved(steps: int, iterations: int, spacing: str = "quadratic") -> Setting:
    name = f"solved {spacing} {steps}x{iterations}"
    return Setting(name, "solved", steps, spacing=spacing, iterations=iterations, modes=("inferred",))


def _solver(solver: str, steps: int, spacing: str) -> Setting:
    return Setting(f"{solver} {spacing} {steps}", "solver", steps, spacing=spacing, solver=solver, modes=("random",))


def _reversible(steps: int, spacing: str) -> Setting:
    return Setting(f"belm {spacing} {steps}+{steps}", "reversible", steps, spacing=spacing, solver="belm")


def _reused(spec: str, steps: int, iterations: int = 0, spacing: str = "uniform") -> Setting:
    how = f"{spacing} {steps}x{iterations}" if iterations else f"{spacing} {steps}+{steps}"
    modes = ("inferred",) if iterations else ("inferred", "random")
    return Setting(f"{spec} {how}", "reuse", steps, spacing=spacing, iterations=iterations, reuse=spec, modes=modes)


def _preset(name: str) -> Setting:
    values = {"modes": ("inferred",), **PRESETS[name]}
    return Setting(name, "preset", **values)


PUBLISHED = {
    "quick": (5, 10, 20, 50),
    "standard": (5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 80, 100, 128, 160),
    "full": (5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 80, 100, 128, 160, 200, 320, 500, 1000),
}
SOLVED = {
    "quick": ((8, 2), (13, 2)),
    "standard": (
        *((6, n) for n in (1, 2, 3)),
        *((8, n) for n in (1, 2, 3)),
        *((10, n) for n in (1, 2, 3)),
        *((13, n) for n in (1, 2, 3)),
        *((16, n) for n in (1, 2, 3)),
        *((20, n) for n in (1, 2, 3)),
        *((30, n) for n in (1, 2, 3, 5)),
    ),
    "full": ((40, 1), (40, 3), (50, 5)),
}
SOLVERS = {"quick": (10, 20), "standard": (5, 8, 10, 13, 16, 20, 25, 32), "full": (50, 100)}
REVERSIBLE = {"quick": (20,), "standard": (5, 8, 10, 13, 16, 20, 32), "full": (50, 100)}
SPACED = {"quick": (), "standard": (10, 20), "full": (5, 50, 100)}


# What is kept from step to step was made for many small steps and cannot be inverted by solving; what leaves G out can.
KEPT = {
    "quick": ("gradient:2", "deep:2"),
    "standard": ("trunk:2", "deep:2:1", "window:200-1000"),
    "full": (
        "gradient:2",
        "gradient:4",
        "deep:2",
        "deep:4",
        "gradient:8",
        "trunk:4",
        "deep:8",
        "deep:4:1",
        "gradient:4,deep:2",
        "window:0-500",
        "window:100-700",
    ),
}
KEPT_STEPS = {"quick": (20,), "standard": (20,), "full": (20, 50, 100)}
LEFT_OUT = {
    "quick": (("window:200-1000", 10, 2), ("window:500-1000", 10, 2), ("gradient:off", 13, 2)),
    "standard": (
        *(("window:200-1000", steps, 2) for steps in (6, 8, 10, 13, 16)),
        *(("window:500-1000", steps, 2) for steps in (8, 10, 13)),
        *(("gradient:off", steps, 2) for steps in (6, 8, 10, 13, 16, 20)),
        *((spec, 30, 5) for spec in ("window:200-1000", "gradient:off")),
    ),
    "full": (
        *(("window:100-700", steps, 2) for steps in (8, 10, 13)),
        *(("window:0-500", steps, 2) for steps in (8, 10, 13)),
    ),
}


def settings(which: str = "standard") -> list[Setting]:
    """The table: "quick" is in "standard", and that in "full". UserError for another name."""
    if which not in SETS:
        raise UserError(f"set {which!r} is not known; expected {', '.join(SETS)}")
    chosen: dict[str, Setting] = {}
    for level in SETS[: SETS.index(which) + 1]:
        found = [_published(steps) for steps in PUBLISHED[level]]
        if level == "standard":
            found.append(_published(100, 1000))
        found += [_solved(steps, n) for steps, n in SOLVED[level]]
        found += [_spaced(spacing, steps) for spacing in ("quadratic", "logsnr", "karras") for steps in SPACED[level]]
        solvers = ("dpm++2m", "unipc2") if level == "quick" else ("dpm++2m", "dpm++3m", "unipc2", "unipc3")
        spacings = ("logsnr",) if level == "quick" else ("quadratic", "logsnr")
        found += [
            _solver(solver, steps, spacing) for solver in solvers for spacing in spacings for steps in SOLVERS[level]
        ]
        found += [
            _reversible(steps, spacing)
            for spacing in (("quadratic",) if level == "quick" else ("uniform", "quadratic"))
            for steps in REVERSIBLE[level]
        ]
        found += [_reused(spec, steps) for spec in KEPT[level] for steps in KEPT_STEPS[level]]
        found += [_reused(spec, steps, n, "quadratic") for spec, steps, n in LEFT_OUT[level]]
        if level == "quick":
            found += [_preset(name) for name in PRESETS if name != "published"]
        chosen.update((setting.name, setting) for setting in found)
    return list(chosen.values())


def select(table: list[Setting], pattern: str | None) -> list[Setting]:
    """Those whose name or family fits ``pattern`` (a shell pattern, or a part of the name); UserError for none."""
    if pattern is None:
        return table
    found = [s for s in table if s.family == pattern or fnmatchcase(s.name, pattern) or pattern in s.name]
    if not found:
        raise UserError(
            f"--only {pattern!r} fits no setting of this set; expected a family ({', '.join(FAMILIES)}) or a part of "
            f"a name, such as {table[0].name!r}"
        )
    return found
