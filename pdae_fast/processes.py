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


def _size() -> int:
    """How many processes the environment names; UserError where it does not say how they find each other."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"the environment has WORLD_SIZE={text}, which is no number of processes; unset it")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(text) > 1 and missing:
        raise UserError(
            f"the environment has WORLD_SIZE={text} but no {' or '.join(missing)}: start the processes with torchrun, "
            "or unset WORLD_SIZE for one process alone"
        )
    return int(text)


@contextmanager
def processes(
    kept: str = "finished blocks are kept: run the same command again to continue",
) -> Iterator[Group]:
    """The group that `torchrun` started, by its environment; a group of one outside `torchrun`.

    ``kept`` says what is left, and what to do, when the group is told to end.
    """
    size = _size()
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
