"""Runs what a `Reuse` leaves: which evaluation of a trajectory computes what, and what it leaves for later ones."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..samplers.reuse import Reuse


class Workload(NamedTuple):
    """What one evaluation computes. ``features``: "all" of the trunk, the "outer" part of all networks, or the trunk as
    it was "kept"; ``gradient``: "run", "kept" or "none"."""

    features: str
    gradient: str


class Workloads:
    """Says what every evaluation of one trajectory computes, called once for each in their order.

    A step is told by its time t: evaluations that follow each other at one t are of one step and compute the same.
    Times must go one way; RuntimeError otherwise, since what was kept belongs to one trajectory.
    """

    def __init__(self, reuse: Reuse) -> None:
        self.reuse = reuse
        self.t: int | None = None
        self.direction = 0
        self.workload = Workload("all", "none")
        self.period = max(reuse.trunk, reuse.deep)
        self.features_age = self.gradient_age = 0  # steps since the trunk, and G, were evaluated
        self.has_gradient = self.has_deep_gradient = False

    def __call__(self, t: int, use_gradient: bool) -> Workload:
        """``use_gradient``: whether the sampler asks for G at this evaluation and there is a z to evaluate it for."""
        reuse = self.reuse
        wanted = use_gradient and reuse.wants_gradient(t)
        if not reuse.keeps:
            return Workload("all", "run" if wanted else "none")
        if t == self.t and wanted == (self.workload.gradient != "none"):
            return self.workload
        if self.t is not None and t != self.t:
            direction = 1 if t > self.t else -1
            if direction == -self.direction:
                raise RuntimeError(f"a field that keeps {reuse} carries one trajectory: make another for the next one")
            self.direction = direction
        first, self.t = self.t is None, t
        self.features_age += 1
        self.gradient_age += 1
        gradient = "none"
        if wanted:
            gradient = "kept" if self.has_gradient and self.gradient_age < reuse.gradient else "run"
        features = "kept" if reuse.trunk > 1 else "outer"
        if first or self.features_age >= self.period:
            features = "all"
        if features == "outer" and gradient == "run" and not self.has_deep_gradient:
            features = "all"
        if features == "all":
            self.features_age, self.has_deep_gradient = 0, gradient == "run"
        if gradient == "run":
            self.gradient_age, self.has_gradient = 0, True
        self.workload = Workload(features, gradient)
        return self.workload


class Kept:
    """What the evaluations of one trajectory leave for later ones.

    With ``static`` a name keeps its memory, as captured graphs need; else the newest tensor itself is kept.
    """

    def __init__(self, static: bool = False) -> None:
        self.static = static
        self._values: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor) -> None:
        if not self.static:
            self._values[name] = value
        elif name in self._values:
            self._values[name].copy_(value)
        else:
            self._values[name] = value.clone()

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]
