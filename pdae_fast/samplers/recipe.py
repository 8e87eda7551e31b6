"""How x_T is inferred and decoded, as one frozen value."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from ..arguments import as_int, as_number
from ..config import NOISES, check_noise
from ..errors import UserError
from ..schedule import SPACINGS, WHOLE, Schedule, Trajectory
from .reuse import Reuse
from .solvers import SOLVERS, Solver, find_solver


@dataclass(frozen=True)
class Recipe:
    """How a pipeline infers x_T and decodes it. The default is the best at its cost: 201 evaluations, SSIM 0.999.

    Args:
        steps: of a decoding.
        encode_steps: DDIM steps upward that infer x_T, where ``iterations`` is 0; None: as many as ``steps``.
        spacing: of the time points: "uniform" as published, "quadratic", "logsnr" or "karras"; "strided" or "respaced",
            which go all the way to alpha_bar 1 and 0 as guided-diffusion and Diff-AE do (Schedule.timesteps).
        iterations: how x_T is inferred. 0: DDIM steps upward, as published. From 1 on: each of the steps that decode is
            solved for its start by so many evaluations (inversion.invert_implicit); these are DDIM steps. None: 1
            where that is possible, and 0 with ``encode_steps``, another solver, noise in the steps or kept work.
        solver: what decodes: "ddim"; "ddpm", ancestral sampling (Algorithm 2); "dpm++2m", "dpm++3m", "unipc2", "unipc3"
            of higher order (multistep); "belm", whose pairs of states lead back to the image exactly (belm).
        eta: of DDIM: the share of the posterior's deviation that every step draws anew, 0 (none) to 1.
        reuse: work left out, an approximation: a Reuse or its text, such as "gradient:2" (reuse).
        noise: how random x_T is drawn: "normal" as published or "standardised" (noise.random_noise); None: as the
            model's configuration says.

    ``iterations`` is a number and ``reuse`` a Reuse once it is made. Raises UserError for values without a meaning and
    for those that do not go together.
    """

    steps: int = 100
    encode_steps: int | None = None
    spacing: str = "uniform"
    iterations: int | None = None
    solver: str = "ddim"
    eta: float = 0.0
    reuse: Reuse | str = "none"
    noise: str | None = None

    def __post_init__(self) -> None:
        solver = self.method
        self._set("reuse", Reuse.parse(self.reuse))
        for name in ("steps", "encode_steps", "iterations"):
            value = getattr(self, name)
            self._set(name, None if value is None and name != "steps" else as_int(name, value))
        for name, value in (("steps", self.steps), ("encode_steps", self.encode_steps)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be between 1 and 1000 (the model's time points), not {value}")
        if self.spacing not in SPACINGS:
            raise UserError(
                f"spacing {self.spacing!r} is not known; expected {', '.join(SPACINGS[:-1])} or {SPACINGS[-1]}"
            )
        if self.spacing in WHOLE and not (solver.solved or solver.draws):
            raise UserError(
                f"the spacing {self.spacing} ends at alpha_bar 1, where {self.solver} cannot go; expected ddim"
            )
        if self.noise is not None:
            check_noise(self.noise)
        try:
            self._set("eta", as_number("eta", self.eta, 0, 1))
        except UserError:
            raise UserError(f"eta must be a number between 0 and 1, not {self.eta!r}") from None
        if self.eta and not solver.solved:
            raise UserError(f"eta belongs to ddim and cannot be combined with {self.solver}")
        if self.iterations is None:
            plain = solver.solved and not self.eta and not self.reuse.keeps and self.encode_steps is None
            self._set("iterations", int(plain))
        if self.iterations < 0:
            raise UserError(f"iterations must not be negative, not {self.iterations}")
        if self.iterations and not solver.solved:
            raise UserError(f"iterations solve the steps of ddim and cannot be combined with {self.solver}")
        if self.iterations and self.eta:
            raise UserError("iterations infer x_T, which steps that draw noise (eta above 0) cannot lead back from")
        if self.reuse.keeps and (self.iterations or solver.backward):
            what = "iterations" if self.iterations else self.solver
            raise UserError(f"reuse {self.reuse} makes a step depend on those before it; {what} cannot run it backward")
        if self.encode_steps not in (None, self.steps) and (self.iterations or solver.backward or self.draws):
            what = "iterations" if self.iterations else self.solver
            raise UserError(
                f"{what} and encode steps do not go together: x_T is inferred by the {self.steps} steps that decode; "
                "leave out --encode-steps (encode_steps), or ask for iterations 0"
            )
        self._check_least(self.steps)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_least(self, steps: int) -> None:
        if steps < self.method.least:
            raise UserError(f"the solver {self.solver} needs at least {self.method.least} steps, not {steps}")

    @classmethod
    def of(cls, recipe: Recipe | str | None = None, **fields: Any) -> Recipe:
        """``recipe`` (a Recipe, or the name of one in RECIPES; None: the default) with ``fields`` in place of its own.

        TypeError for a field that does not exist.
        """
        if recipe is None:
            return cls(**fields)
        if isinstance(recipe, str):
            if recipe not in RECIPES:
                raise UserError(f"recipe {recipe!r} is not known; expected a Recipe or one of {', '.join(RECIPES)}")
            recipe = RECIPES[recipe]
        if not isinstance(recipe, Recipe):
            raise UserError(f"recipe must be a Recipe or one of {', '.join(RECIPES)}, not {recipe!r}")
        return dataclasses.replace(recipe, **fields) if fields else recipe

    # -- on the command line ---------------------------------------------------------------------------------------

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        """The options that `from_args` reads: one for every field, and --preset."""
        group = p.add_argument_group("recipe", "how x_T is inferred and decoded")
        add = group.add_argument
        add("--preset", choices=list(RECIPES), help="a named recipe; an option given beside it overrides its value")
        add("--steps", type=int, help="steps of a decoding (default: 100)")
        add(
            "--iterations",
            type=int,
            help="evaluations that solve each step of the decoder when x_T is inferred; 0: DDIM upward, as published "
            "(default: 1, and 0 with --encode-steps or what cannot be solved)",
        )
        add("--encode-steps", type=int, help="DDIM steps upward that infer x_T (with --iterations 0; default: --steps)")
        add(
            "--spacing",
            help="time points: uniform as published; quadratic, karras or logsnr have more of them at low noise; "
            "strided (Diff-AE's) or respaced end at the clean image and at pure noise (default: uniform)",
        )
        add(
            "--solver",
            help=f"what decodes: {', '.join(SOLVERS)} (default: ddim); belm is inverted exactly, ddpm draws noise in "
            "every step",
        )
        add(
            "--eta", type=float, help="of ddim: share of the posterior's noise drawn in every step, 0 to 1 (default: 0)"
        )
        add(
            "--reuse",
            help="work left out, an approximation: such as window:200-1000 (default: none; see docs/reconstruct.md)",
        )
        add(
            "--noise",
            choices=NOISES,
            help="of random x_T, and of x_t in analyses: normal as published, or standardised in every channel "
            "(default: as the model says)",
        )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Recipe:
        return cls.of(args.preset, **cls.given(args))

    @classmethod
    def given(cls, args: argparse.Namespace) -> dict[str, Any]:
        """The fields that the command line names."""
        names = (field.name for field in dataclasses.fields(cls))
        return {name: value for name in names if (value := getattr(args, name, None)) is not None}

    def describe(self) -> dict[str, Any]:
        """For reports and journals: every field, ``encode_steps`` as the number of steps upward (None where no x_T is
        inferred) and ``reuse`` as text."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "encode_steps": self.steps_up, "reuse": str(self.reuse)}

    def __str__(self) -> str:
        down = f"{self.steps} down by {self.solver}"
        if self.draws:
            how = f"{self.steps} steps down by {self.solver}"
        elif self.method.backward:
            how = f"{self.steps} steps of {self.solver} up and down"
        elif self.iterations:
            evaluations = "1 evaluation" if self.iterations == 1 else f"{self.iterations} evaluations"
            how = f"{self.steps} steps solved by {evaluations} each and {down}"
        else:
            how = f"{self.steps_up} steps up and {down}"
        extras = [f"eta {self.eta:g}"] * bool(self.eta) + [f"reuse {self.reuse}"] * (str(self.reuse) != "none")
        return ", ".join([how, f"{self.spacing} spacing", *extras])

    # -- what it means for a process -------------------------------------------------------------------------------

    @property
    def method(self) -> Solver:
        return find_solver(self.solver)

    @property
    def draws(self) -> bool:
        """Whether the steps draw noise, so that x_T cannot be inferred."""
        return self.method.draws or self.eta > 0

    @property
    def steps_up(self) -> int | None:
        if self.draws:
            return None
        return self.steps if self.encode_steps is None else self.encode_steps

    def check(self, schedule: Schedule) -> None:
        """UserError unless ``schedule`` has enough time points, and these leave the solver enough steps."""
        self._check_least(len(self.down(schedule)))
        if not self.draws:
            self.up(schedule)

    def down(self, schedule: Schedule, stop_percent: float = 0.0) -> Trajectory:
        """What decodes; G is left out for the last part ``stop_percent``."""
        trajectory = self.method.trajectory(schedule, self.steps, stop_percent, self.spacing)
        if self.method.extrapolates:
            wants = self.reuse.wants_gradient
            trajectory = tuple(step._replace(use_gradient=step.use_gradient and wants(step.t)) for step in trajectory)
        return trajectory

    def up(self, schedule: Schedule) -> Trajectory:
        """What the solver infers x_T along: DDIM steps upward, or the steps that decode where these are solved or run
        backward. UserError where the steps draw noise."""
        if self.draws:
            what = f"eta {self.eta:g}" if self.eta else f"the solver {self.solver}"
            raise UserError(f"x_T cannot be inferred with {what}: its steps draw noise; decode from random x_T")
        if self.iterations or self.method.backward:
            return schedule.decoding(self.steps, spacing=self.spacing)
        return schedule.inversion(self.steps_up, self.spacing)

    def evaluations(self, schedule: Schedule, inferred: bool) -> int:
        """Network evaluations (passes of the trunk) of one image: decoding, and inference of x_T where ``inferred``.

        UserError where x_T cannot be inferred.
        """
        down = self.method.evaluations(len(self.down(schedule)), inferred)
        return down + (self.evaluations_up(schedule) if inferred else 0)

    def evaluations_up(self, schedule: Schedule) -> int:
        steps = len(self.up(schedule))
        if self.method.backward:
            return steps + 2  # three find the first state above the image
        return 1 + self.iterations * steps if self.iterations else steps


# What each leaves of the error is in docs/reconstruct.md. Fewer steps are another, coarser decoder, which does not show
# where x_T is solved for it.
RECIPES: dict[str, Recipe] = {
    "published": Recipe(steps=100, iterations=0),
    "fast": Recipe(steps=10, spacing="quadratic", iterations=2),
    "balanced": Recipe(steps=13, spacing="quadratic", iterations=2),
    "exact": Recipe(steps=30, spacing="quadratic", iterations=5),
    "reversible": Recipe(steps=19, solver="belm"),
    "diffae": Recipe(steps=20, encode_steps=250, spacing="strided"),  # as Diff-AE does
}
