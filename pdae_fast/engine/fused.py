"""The fast plan: the same function as the model, with everything taken out that does not change the result."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..models import PDAE, Prior
from ..samplers.ddim import Weights
from ..samplers.reuse import Reuse
from ..schedule import Trajectory
from . import float8
from .networks import Conditioning, Networks
from .options import Rewrites
from .reuse import Kept, Workload, Workloads
from .trajectory import DeviceEvaluation, DeviceTrajectory, OnDevice

KEPT_TRAJECTORIES = 8
# Of all plans, so that a plan can be copied: locks cannot.
LENDING = threading.Lock()


class FusedPlan(Networks):
    """The fused networks as a plan: fields for samplers, and whole trajectories on the device."""

    name = "fused"
    tunes = True
    can_keep = True

    def __init__(
        self,
        model: PDAE | Prior,
        device: torch.device,
        dtype: torch.dtype,
        options: Rewrites | None = None,
        attention: str = "auto",
        copy: bool = True,
        consume: bool = False,
    ) -> None:
        super().__init__(model, device, dtype, options, attention, copy, consume)
        self._trajectories: OrderedDict[tuple, OnDevice] = OrderedDict()

    def reusing(self, reuse: Reuse) -> FusedPlan:
        """As :meth:`Plan.reusing`."""
        plan = super().reusing(reuse)
        plan._trajectories = OrderedDict()
        return plan

    def field(self, z: Tensor | None = None, weights: Tensor | None = None, labels: Tensor | None = None) -> FusedField:
        """As :meth:`Plan.field`."""
        self.check_field(z, weights, labels)
        codes = None if z is None else self.conditioning(z, weights)
        # A device's tables have a row for every step, and one for every image of a step would not fit.
        on_device = self.options.fused_update and labels is None
        return (DeviceField if on_device else FusedField)(self, codes, labels)

    @contextlib.contextmanager
    def trajectory(
        self, batch: int, codes: Conditioning | None, steps: Trajectory, clamp: float | None, weights: Weights = ()
    ) -> Iterator[DeviceTrajectory]:
        """The buffers (and captured graphs) that run ``steps`` on ``batch`` images, lent to one call at a time.

        A ragged last batch is padded into buffers of up to four times its size rather than captured anew.
        """
        make = functools.partial(DeviceTrajectory, self, batch, codes, steps, clamp, weights)
        with self._lent(make, batch, codes, clamp is not None, steps, weights) as run:
            yield run

    @contextlib.contextmanager
    def evaluation(self, batch: int, codes: Conditioning | None, width: int) -> Iterator[DeviceEvaluation]:
        """The same for one evaluation at a time, whose row of the time tables has ``width`` columns."""
        with self._lent(functools.partial(DeviceEvaluation, self, batch, codes, width), batch, codes) as run:
            yield run

    @contextlib.contextmanager
    def _lent(
        self, make: Callable[[], OnDevice], batch: int, codes: Conditioning | None, *what: object
    ) -> Iterator[OnDevice]:
        K = None if codes is None or codes.weights is None else len(codes.weights)
        kind = (codes is not None, K, *what)
        with LENDING:
            free = self._trajectories
            fitting = [key for key in free if key[2:] == kind and batch <= key[0] <= 4 * batch]
            key = min(fitting, key=lambda key: key[0], default=None)
            lent = None if key is None else free.pop(key)
        if lent is None:
            lent = make()
            key = (batch, id(lent), *kind)
        yield lent
        # Not where the call failed: what it left half is not looked into.
        with LENDING:
            free[key] = lent
            while len(free) > KEPT_TRAJECTORIES:
                free.popitem(last=False)

    def check_memory(self, batch: int) -> None:
        """As :meth:`Plan.check_memory`; memory of trajectories that nobody runs gives way first."""
        try:
            super().check_memory(batch)
        except UserError:
            with LENDING:
                idle = len(self._trajectories)
                self._trajectories.clear()
            if not idle:
                raise
            super().check_memory(batch)

    def describe(self) -> dict[str, object]:
        """As :meth:`Plan.describe`."""
        on = [name for name, value in vars(self.options).items() if value]
        report = {**super().describe(), "attention": self.attention, "rewrites": on}
        report |= self.native
        if self.device.type == "cuda":
            if self.options.float8:
                report |= float8.describe(self.unet, "by Triton kernels")
            with LENDING:
                captured = sum(len(t.graphs) for t in self._trajectories.values())
            report["graphs"] = self.capture_failure or captured
        return report


class FusedField:
    """The field of a :class:`FusedPlan`: called as field(x, t, use_gradient).

    Where the plan reuses anything, what is kept lives here: a field then carries one trajectory.
    """

    def __init__(self, plan: FusedPlan, codes: Conditioning | None, labels: Tensor | None = None) -> None:
        self.plan, self.codes = plan, codes
        self.labels = None if labels is None else labels.to(plan.device)
        self.workloads, self.kept = Workloads(plan.reuse), Kept()

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
        plan = self.plan
        workload = self.workloads(t, use_gradient and self.codes is not None and plan.gradient is not None)
        with plan.precision():
            eps, gradient = self._evaluate(x, plan.time_rows([t], self.labels), workload)
            # The side stream's memory goes back here, before another thread may be given it.
            eps = eps.to(torch.float32, copy=plan.options.parallel_decoders)
        plan.count(len(x), self.codes, workload)
        return eps, None if gradient is None else gradient.float()

    def _evaluate(self, x: Tensor, row: Tensor, workload: Workload) -> tuple[Tensor, Tensor | None]:
        return self.plan.evaluate(x, row, self.codes, workload, self.kept)


class DeviceField(FusedField):
    """A field that carries x along whole trajectories without the host in between.

    Called step by step it runs captured evaluations, where they are switched on, from its second call on.
    """

    calls = 0

    def _evaluate(self, x: Tensor, row: Tensor, workload: Workload) -> tuple[Tensor, Tensor | None]:
        plan = self.plan
        self.calls += 1
        # What a `Reuse` keeps is this field's own, and a graph's memory is not.
        if self.calls == 1 or not plan.options.captured_fields or plan.reuse.keeps or plan.capture_failure:
            return super()._evaluate(x, row, workload)
        with plan.evaluation(len(x), self.codes, row.shape[1]) as run:
            return run(x, row, self.codes, workload)

    def integrate(
        self, x: Tensor, steps: Trajectory, clamp: float | None, progress: Callable[[], None] | None
    ) -> Tensor:
        """As ddim.integrate; ``clamp`` is 1 or None."""
        return self._carry([x], steps, (), clamp, progress)[0]

    @property
    def combine(self) -> Callable[..., list[Tensor]] | None:
        """As ddim.combine; ``clamp`` is 1 or None. None where it is switched off."""
        return self._carry if self.plan.options.fused_solvers else None

    def _carry(
        self,
        states: Sequence[Tensor],
        steps: Trajectory,
        weights: Weights,
        clamp: float | None,
        progress: Callable[[], None] | None,
    ) -> list[Tensor]:
        with self.plan.trajectory(len(states[0]), self.codes, steps, clamp, weights) as run:
            return run(states, self.codes, progress)
