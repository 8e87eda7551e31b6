"""What runs on the device without the host: whole trajectories of DDIM and other linear methods, by a step index into
tables and one captured CUDA graph that is replayed for every step; and single evaluations, captured, for the rest."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..samplers.ddim import Weights
from ..schedule import Trajectory
from . import graphs
from .networks import Conditioning, Networks
from .reuse import Kept, Workload, Workloads

QUEUED_STEPS = 4  # replays the host may be ahead of the device, so that progress means something


class OnDevice:
    """Static buffers for ``batch`` images, ``columns`` times, and their codes, and the graphs that were captured with
    them, in memory of their own and on a stream of their own. One call at a time."""

    def __init__(self, plan: Networks, batch: int, codes: Conditioning | None, columns: int = 1) -> None:
        self.plan = plan
        with torch.inference_mode():
            float32 = {"dtype": torch.float32, "device": plan.device}
            C, H, W = plan.model.image_shape
            # As the networks read it and answer: nothing has to change layout between them and the update.
            self.columns = torch.empty(columns, batch, H, W, C, **float32)
            self.images = self.columns.permute(0, 1, 4, 2, 3)
            self.x = self.images[0]
            self.codes = None
            if codes is not None:
                K = 1 if codes.weights is None else len(codes.weights)
                width = codes.scale.shape[1]
                buffers = [torch.empty(K * batch, width, **float32) for _ in (0, 1)]
                weights = None if codes.weights is None else torch.empty(K, batch, 1, 1, 1, **float32)
                self.codes = Conditioning(*buffers, weights)
        self.pool = plan.graph_pool
        self.graphs: dict[Workload, graphs.Graph] = {}

    def _step(self, workload: Workload) -> None:
        """What is captured."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Before a step that only warms up."""

    def _capture(self, workload: Workload) -> None:
        """Capture one step; on failure the plan says why and runs uncaptured from then on."""
        plan = self.plan
        if self.pool is None:
            self.pool = graphs.Pool(plan.device)
        try:
            self.graphs[workload] = graphs.capture(lambda: self._step(workload), self._reset, plan.device, self.pool)
        except graphs.CaptureError as error:
            plan.capture_failure = f"off: capture failed ({error})"
            warnings.warn(f"CUDA graphs are {plan.capture_failure}; running uncaptured", stacklevel=2)

    def _run(self, workload: Workload) -> None:
        if workload in self.graphs:
            self.graphs[workload].replay()
        else:
            self._step(workload)

    def _load(self, states: Sequence[Tensor], codes: Conditioning | None) -> None:
        B, size = len(states[0]), len(self.x)
        padding = torch.arange(size, device=self.x.device) % B  # a ragged batch is filled up with its own images
        for image, x in zip(self.images, states, strict=False):
            image.copy_(x.to(image.device)[padding])
        if codes is None:
            return
        for buffer, values in zip(self.codes[:2], codes[:2], strict=True):
            K = len(values) // B
            buffer.view(K, size, -1).copy_(values.view(K, B, -1)[:, padding])
        if codes.weights is not None:
            self.codes.weights.copy_(codes.weights[:, padding])


class DeviceEvaluation(OnDevice):
    """One evaluation of the networks, captured with its own x, row of the time tables and codes: for samplers whose
    steps the device does not know. No hardware has run it yet."""

    def __init__(self, plan: Networks, batch: int, codes: Conditioning | None, width: int) -> None:
        super().__init__(plan, batch, codes)
        with torch.inference_mode():
            self.row = torch.empty(1, width, dtype=torch.float32, device=plan.device)
        self.results: dict[Workload, tuple[Tensor, Tensor | None]] = {}

    def _step(self, workload: Workload) -> None:
        # Of a captured step these are the graph's own, and every replay writes to them.
        self.results[workload] = self.plan.evaluate(self.x, self.row, self.codes, workload, Kept())

    def __call__(
        self, x: Tensor, row: Tensor, codes: Conditioning | None, workload: Workload
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Networks.evaluate` (new tensors, float32); inside of ``plan.precision()``."""
        self.row.copy_(row)
        self._load([x], codes)
        if workload not in self.graphs and self.plan.capture_failure is None:
            self._capture(workload)
        self._run(workload)
        eps, gradient = (
            None if v is None else v[: len(x)].to(torch.float32, copy=True) for v in self.results[workload]
        )
        return eps, gradient


class DeviceTrajectory(OnDevice):
    """Runs ``steps`` on ``batch`` images: static buffers, coefficients and time tables by step, an index on the device.

    The step reads its row of the tables by that index, moves x in place and advances the index, so one captured step
    serves the whole trajectory; steps that compute different things (with and without G, say) are different graphs.
    Where graphs are off or capture fails the same step runs as it is. x is overwritten by the next call: a call returns
    a copy. With ``weights``, those of `samplers.ddim.combine`, x is the first of n states.
    """

    def __init__(
        self,
        plan: Networks,
        batch: int,
        codes: Conditioning | None,
        steps: Trajectory,
        clamp: float | None,
        weights: Weights = (),
    ) -> None:
        super().__init__(plan, batch, codes, len(weights[0]) + 1 if weights else 1)
        self.steps, self.clamp = steps, clamp is not None
        with torch.inference_mode():
            self.index = torch.zeros((), dtype=torch.int64, device=plan.device)
            self.rows = plan.time_rows([step.t for step in steps])
            self.coefficients = kernels.ddim_coefficients(
                [step.alpha_bar for step in steps], [step.alpha_bar_next for step in steps]
            ).to(plan.device)
            self.weights = torch.tensor(weights, dtype=torch.float32, device=plan.device) if weights else None
        workloads = Workloads(plan.reuse)
        has_gradient = codes is not None and plan.gradient is not None
        self.workloads = [workloads(step.t, step.use_gradient and has_gradient) for step in steps]
        self.kept = Kept(static=plan.options.graphs)

    def _step(self, workload: Workload) -> None:
        row = self.rows.index_select(0, self.index[None])
        step = (self.coefficients, self.index, self.clamp)
        # Of DDIM, the only column.
        self.images[-1].copy_(self.plan.advance(self.x, row, self.codes, workload, self.kept, *step))
        if self.weights is not None:
            columns = self.columns.flatten(1)
            columns[:-1].copy_(self.weights.index_select(0, self.index[None])[0] @ columns)
        self.index.add_(1)

    def _reset(self) -> None:
        self.index.zero_()

    @torch.inference_mode()
    def __call__(
        self, states: Sequence[Tensor], codes: Conditioning | None, progress: Callable[[], None] | None
    ) -> list[Tensor]:
        """``states``, float32 [B, C, H, W], B at most ``batch``, after all steps (new tensors)."""
        plan, B = self.plan, len(states[0])
        with plan.precision():
            if plan.options.graphs and plan.capture_failure is None:
                # In their order on the trajectory: what a workload takes over, an earlier one has left.
                for workload in [workload for workload in dict.fromkeys(self.workloads) if workload not in self.graphs]:
                    self._load(states, codes)
                    self._capture(workload)
                    if plan.capture_failure:
                        break
            self._load(states, codes)
            self.index.zero_()
            queued: deque[torch.cuda.Event] = deque()
            for workload in self.workloads:
                self._run(workload)
                plan.count(B, codes, workload)
                if progress:
                    self._wait(queued)
                    progress()
            ends = self.images[: len(states), :B]
            return [x.clone(memory_format=torch.contiguous_format) for x in ends]

    def _wait(self, queued: deque[torch.cuda.Event]) -> None:
        if self.x.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.x.device))
        queued.append(event)
        if len(queued) > QUEUED_STEPS:
            queued.popleft().synchronize()
