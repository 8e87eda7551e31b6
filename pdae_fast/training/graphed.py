"""One optimiser step as a CUDA graph: forward and backward of its batches and Adam, replayed with new inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.graphs import CaptureError, capture
from ..errors import UserError

Losses = Callable[[Sequence[tuple[Tensor, ...]]], Tensor]


class GraphedStep:
    """``__call__(batches)`` copies them into the captured buffers and replays; returns the losses [accumulate].

    losses: runs forward and backward of all batches of a step and returns their losses; it is captured with the
    optimiser's step by :meth:`build`, or at the first call. The result is overwritten by the next call. What a step
    needs from the host is set before the call: rates are device tensors (see `build_optimizer`), and a replay takes the
    seed and offset of the device's generator as they are then. capture: as `engine.graphs.capture`.
    Raises UserError when the device refuses to capture.
    """

    def __init__(
        self, losses: Losses, optimizer: torch.optim.Optimizer, device: torch.device, capture: Callable = capture
    ) -> None:
        self.losses, self.optimizer, self.device, self._capture = losses, optimizer, device, capture
        self.graph = None
        self.inputs: list[tuple[Tensor, ...]] = []
        self.result: Tensor | None = None

    def __call__(self, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
        self.build(batches)
        for buffers, tensors in zip(self.inputs, batches, strict=True):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result

    def build(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        """Capture, unless that is done; weights, moments and the next call's result are not changed by it."""
        if self.graph is not None:
            return
        self.inputs = [tuple(v.clone() for v in tensors) for tensors in batches]
        before = self._snapshot()
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        try:
            self.graph = self._capture(self._step, lambda: self._restore(before), self.device, pool)
        except CaptureError as error:
            raise UserError(f"--cuda-graph: this step cannot be captured ({error}); leave the option out") from None
        # The warm-up trained on the first batches; the run has not.
        self._restore(before)

    def _step(self) -> None:
        # Without gradients at its start the captured backward writes them instead of adding to the last replay's.
        self.optimizer.zero_grad(set_to_none=True)
        self.result = self.losses(self.inputs)
        self.optimizer.step()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _snapshot(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        weights = [p.detach().clone() for p in self._parameters()]
        moments = [{k: v.clone() for k, v in self.optimizer.state[p].items()} for p in self._parameters()]
        return weights, moments

    @torch.no_grad()
    def _restore(self, before: tuple[list[Tensor], list[dict[str, Any]]]) -> None:
        """In place: the graph knows weights and moments by their addresses. Moments that did not exist are zeros."""
        for parameter, weight, moments in zip(self._parameters(), *before, strict=True):
            parameter.copy_(weight)
            for name, value in self.optimizer.state[parameter].items():
                if name in moments:
                    value.copy_(moments[name])
                else:
                    value.zero_()
