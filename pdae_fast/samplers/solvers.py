"""The solvers by name: each a small object that says what it can do, how it infers x_T and how it decodes.

Latents are [B, C, H, W], or [B, 2, C, H, W] where a solver's are pairs of states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..schedule import Schedule, Trajectory
from . import ddim
from .belm import belm, belm_invert
from .ddim import Field, Noise, Progress
from .inversion import invert_implicit, invert_once
from .multistep import Method, multistep


class Solver:
    """What all solvers share; a class below says where it differs.

    ``least``: steps that it needs. ``states``: of a latent that it infers. ``solved``: whether ``iterations`` can solve
    its steps for their start. ``backward``: whether its own steps run upward, exactly. ``draws``: whether its steps
    draw noise, so that no x_T leads back to an image. ``extrapolates``: whether it looks across steps, and so has to
    know where a window switches G.
    """

    least = 1
    states = 1
    solved = backward = draws = extrapolates = False

    def trajectory(self, schedule: Schedule, steps: int, stop_percent: float, spacing: str) -> Trajectory:
        return schedule.decoding(steps, stop_percent, spacing)

    def evaluations(self, steps: int, inferred: bool) -> int:
        """Of a decoding by ``steps``; ``inferred``: from a latent that this solver inferred."""
        return steps

    def infer(
        self, field: Field, x0: Tensor, up: Trajectory, iterations: int, progress: Progress | None = None
    ) -> Tensor:
        """The latent [B, ...] of x0 [B, C, H, W]: by DDIM steps upward, as published, along Recipe.up's trajectory."""
        return ddim.integrate(field, x0, up, progress=progress)

    def decode(
        self,
        field: Field,
        latent: Tensor,
        trajectory: Trajectory,
        *,
        eta: float = 0.0,
        noise: Noise | None = None,
        clamp: float | None = 1.0,
        progress: Progress | None = None,
    ) -> Tensor:
        """x at the end of ``trajectory``, unclamped; noise() is called where a step draws."""
        raise NotImplementedError


class Ddim(Solver):
    solved = True

    def infer(
        self, field: Field, x0: Tensor, up: Trajectory, iterations: int, progress: Progress | None = None
    ) -> Tensor:
        """``iterations`` 0: upward as published; from 1 on ``up`` is what decodes, and each of its steps is solved."""
        if not iterations:
            return super().infer(field, x0, up, iterations, progress)
        if iterations == 1:
            return invert_once(field, x0, up, progress=progress)
        return invert_implicit(field, x0, up, iterations=iterations, progress=progress).x_T

    def decode(self, field, latent, trajectory, *, eta=0.0, noise=None, clamp=1.0, progress=None) -> Tensor:
        return ddim.integrate(field, latent, trajectory, clamp=clamp, eta=eta, noise=noise, progress=progress)


class Ddpm(Solver):
    """Algorithm 2; it clamps nothing."""

    least = 2
    draws = True

    def trajectory(self, schedule: Schedule, steps: int, stop_percent: float, spacing: str) -> Trajectory:
        return schedule.ancestral(steps, stop_percent, spacing)

    def decode(self, field, latent, trajectory, *, eta=0.0, noise=None, clamp=1.0, progress=None) -> Tensor:
        return ddim.ddpm(field, latent, trajectory, noise, progress=progress)


class Multistep(Solver):
    extrapolates = True

    def __init__(self, method: Method) -> None:
        self.method, self.least = method, method.order

    def decode(self, field, latent, trajectory, *, eta=0.0, noise=None, clamp=1.0, progress=None) -> Tensor:
        return multistep(field, latent, trajectory, self.method, clamp=clamp, progress=progress)


class Belm(Solver):
    least = 2
    states = 2
    backward = True

    def evaluations(self, steps: int, inferred: bool) -> int:
        return steps - inferred  # of a pair the second state is known

    def infer(
        self, field: Field, x0: Tensor, up: Trajectory, iterations: int, progress: Progress | None = None
    ) -> Tensor:
        """Pairs: [:, 0] x_T and [:, 1] the state one point below, from which `decode` leads back to x0."""
        return torch.stack(belm_invert(field, x0, up, progress=progress), dim=1)

    def decode(self, field, latent, trajectory, *, eta=0.0, noise=None, clamp=1.0, progress=None) -> Tensor:
        x_T, companion = latent.unbind(1) if latent.ndim == 5 else (latent, None)
        return belm(field, x_T, trajectory, companion, clamp=clamp, progress=progress)


SOLVERS: dict[str, Solver] = {
    "ddim": Ddim(),
    "dpm++2m": Multistep(Method(2, False)),
    "dpm++3m": Multistep(Method(3, False)),
    "unipc2": Multistep(Method(2, True)),
    "unipc3": Multistep(Method(3, True)),
    "ddpm": Ddpm(),
    "belm": Belm(),
}


def find_solver(name: str) -> Solver:
    """UserError for one that does not exist."""
    if not isinstance(name, str) or name not in SOLVERS:
        *others, last = SOLVERS
        raise UserError(f"solver {name!r} is not known; expected {', '.join(others)} or {last}")
    return SOLVERS[name]
