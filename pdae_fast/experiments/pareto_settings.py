"""The candidates that `pdae_fast.pareto` compares, as data."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UserError
from ..pipeline import Pipeline
from ..samplers import RECIPES, Recipe
from .common import Case, evaluations

SETS = ("quick", "standard", "full")
FAMILIES = ("published", "spacing", "solved", "solver", "reversible", "reuse", "preset")


@dataclass(frozen=True)
class Candidate:
    """A recipe under a name, and what is decoded by it; ``family`` is its colour in the plot."""

    name: str
    family: str
    recipe: Recipe
    modes: tuple[str, ...] = ("inferred", "random")

    def pipeline(self, pipe: Pipeline) -> Pipeline:
        return Case(self.modes[0], self.recipe).pipeline(pipe)

    def evaluations(self, pipe: Pipeline, mode: str) -> int:
        """Evaluations of the field for one image, of which ``reuse`` may compute only a part."""
        return evaluations(self.pipeline(pipe), mode)

    def values(self) -> dict[str, Any]:
        """What decides the result; the kind of noise is the whole run's."""
        values = {"name": self.name, "family": self.family, **self.recipe.describe()}
        del values["noise"]
        return values


def _published(steps: int, encode_steps: int | None = None) -> Candidate:
    recipe = Recipe(steps, encode_steps, iterations=0)
    modes = ("inferred", "random") if encode_steps is None else ("inferred",)
    return Candidate(f"published {recipe.steps_up}+{steps}", "published", recipe, modes)


def _spaced(spacing: str, steps: int) -> Candidate:
    return Candidate(f"{spacing} {steps}+{steps}", "spacing", Recipe(steps, spacing=spacing, iterations=0))


def _solved(steps: int, iterations: int, spacing: str = "quadratic") -> Candidate:
    recipe = Recipe(steps, spacing=spacing, iterations=iterations)
    return Candidate(f"solved {spacing} {steps}x{iterations}", "solved", recipe, ("inferred",))


def _solver(solver: str, steps: int, spacing: str) -> Candidate:
    recipe = Recipe(steps, spacing=spacing, solver=solver)
    return Candidate(f"{solver} {spacing} {steps}", "solver", recipe, ("random",))


def _reversible(steps: int, spacing: str) -> Candidate:
    return Candidate(f"belm {spacing} {steps}+{steps}", "reversible", Recipe(steps, spacing=spacing, solver="belm"))


def _drawing(steps: int, **fields: Any) -> Candidate:
    recipe = Recipe(steps, **fields)
    name = f"eta {recipe.eta:g} uniform {steps}" if recipe.eta else f"{recipe.solver} uniform {steps}"
    return Candidate(name, "solver", recipe, ("random",))


def _reused(spec: str, steps: int, iterations: int = 0, spacing: str = "uniform") -> Candidate:
    how = f"{spacing} {steps}x{iterations}" if iterations else f"{spacing} {steps}+{steps}"
    recipe = Recipe(steps, spacing=spacing, iterations=iterations, reuse=spec)
    return Candidate(f"{spec} {how}", "reuse", recipe, ("inferred",) if iterations else ("inferred", "random"))


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
DRAWING = ({"solver": "ddpm"}, {"eta": 1.0})
DRAWING_STEPS = {"quick": (), "standard": (20, 100), "full": (1000,)}
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


def candidates(which: str = "standard") -> list[Candidate]:
    """The table: "quick" is in "standard", and that in "full". UserError for another name."""
    if which not in SETS:
        raise UserError(f"set {which!r} is not known; expected {', '.join(SETS)}")
    chosen: dict[str, Candidate] = {}
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
        found += [_drawing(steps, **fields) for fields in DRAWING for steps in DRAWING_STEPS[level]]
        found += [_reused(spec, steps) for spec in KEPT[level] for steps in KEPT_STEPS[level]]
        found += [_reused(spec, steps, n, "quadratic") for spec, steps, n in LEFT_OUT[level]]
        if level == "quick":
            found.append(Candidate("default", "preset", Recipe(), ("inferred",)))
            named = {name: recipe for name, recipe in RECIPES.items() if name != "published"}
            found += [Candidate(name, "preset", recipe, ("inferred",)) for name, recipe in named.items()]
        chosen.update((candidate.name, candidate) for candidate in found)
    return list(chosen.values())


def select(table: list[Candidate], pattern: str | None) -> list[Candidate]:
    """Those whose name or family fits ``pattern`` (a shell pattern, or a part of the name); UserError for none."""
    if pattern is None:
        return table
    found = [s for s in table if s.family == pattern or fnmatchcase(s.name, pattern) or pattern in s.name]
    if not found:
        raise UserError(
            f"--only {pattern!r} fits no candidate of this set; expected a family ({', '.join(FAMILIES)}) or a part of "
            f"a name, such as {table[0].name!r}"
        )
    return found
