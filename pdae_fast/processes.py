"""The processes of one job, as `torchrun` starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch

from .errors import UserError


class Group(NamedTuple):
    """The processes that share a job: this one is number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints what there is once."""
        return self.rank == 0

    def sync(self) -> None:
        """Wait for the others; UserError when one of them is gone."""
        if self.size == 1:
            return
        try:
            torch.distributed.barrier()
        except RuntimeError:  # gloo names the connection that broke, which tells a user nothing
            raise UserError(
                "another process of this job ended before its work was done; "
                "what is finished is kept: run the same command again to continue"
            ) from None

    def device(self, device: str) -> str:
        """``device`` for this process: with several processes, "auto" and "cuda" are a GPU of its own."""
        if self.size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"


@contextmanager
def processes(
    kept: str = "finished blocks are kept: run the same command again to continue",
) -> Iterator[Group]:
    """The group that `torchrun` started, by its environment; a group of one outside `torchrun`.

    ``kept`` says what is left, and what to do, when the group is told to end.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Group()
        return
    # One process may be slower by hours. A dead one is noticed at once, because its connections close.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    rank = torch.distributed.get_rank()
    try:
        yield Group(rank, size)
    except KeyboardInterrupt:  # torchrun ends the others with SIGTERM when one process dies
        print(f"process {rank} of {size} was told to end, as all are when one dies; {kept}", file=sys.stderr)
        raise
    finally:
        torch.distributed.destroy_process_group()
