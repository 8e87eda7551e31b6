"""The losses of a run, kept where they are computed until somebody needs to know them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError

Gather = Callable[[Tensor], Tensor]


def _alone(values: Tensor) -> Tensor:
    return values[None]


class Losses:
    """The sum of the losses since the last :meth:`mean`, and the first loss ever that was not finite.

    Reading a number from a GPU makes the processor wait for everything that was queued there. With ``deferred`` nothing
    is therefore read until :meth:`mean` or :meth:`check` asks; whoever is about to write a checkpoint asks. Without it,
    :meth:`add` checks at once. ``gather``: float64 [n] of this process -> [processes, n] of all of them.
    """

    def __init__(self, device: torch.device, deferred: bool, gather: Gather = _alone) -> None:
        self.deferred, self.gather = deferred, gather
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0
        self.bad = torch.zeros((), dtype=torch.float64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int, share: float = 1.0) -> None:
        """Count ``share`` of ``loss``, a scalar of ``step``. UserError for NaN and infinity, unless deferred."""
        value = loss.detach().double()
        if not self.deferred and not math.isfinite(value):
            raise _error(float(value), step)
        self.total += value * share
        if self.deferred:
            first = ~torch.isfinite(value) & (self.bad_step < 0)
            self.bad = torch.where(first, value, self.bad)
            self.bad_step.masked_fill_(first, step)

    def check(self) -> None:
        """UserError when a loss of any process was not finite; all processes call it together."""
        self._read()

    def mean(self) -> float:
        """Mean loss of the steps since the last call, over all processes, which call it together; checks as well."""
        rows = self._read()
        steps, self.steps = self.steps, 0
        self.total.zero_()
        return float(rows[:, 0].mean()) / steps

    def _read(self) -> Tensor:
        own = torch.stack([self.total, self.bad, self.bad_step.double()])
        rows = self.gather(own.cpu())
        bad = rows[rows[:, 2] >= 0]
        if len(bad):
            first = bad[bad[:, 2].argmin()]
            raise _error(float(first[1]), int(first[2]))
        return rows


def _error(value: float, step: int) -> UserError:
    return UserError(f"the loss is {value} at step {step}; nothing was written after the last checkpoint")
