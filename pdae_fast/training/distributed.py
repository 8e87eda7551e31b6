"""Several processes train one model: `torchrun --nproc-per-node N -m pdae_fast.train ...`.

Every process holds the model, works on its share of each batch, and makes the same update from the mean gradient. What
is random about an image is drawn for the whole batch in every process and cut, so N processes see the images, noise, t
and flips that one process sees. Control goes over gloo on the CPU, gradients over NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from ..errors import UserError
from ..processes import Group
from .tasks import Task

# What gloo and NCCL say when the other end of a connection is gone; both raise a plain RuntimeError or a subclass.
_GONE = ("onnection closed", "onnection reset", "roken pipe", "imed out waiting", "remote process exited")


class PeerGone(Exception):
    """Another process of the run ended."""


@contextlib.contextmanager
def peers(group: Group) -> Iterator[None]:
    """Turns a collective's failure because a process is gone into PeerGone."""
    try:
        yield
    except RuntimeError as error:
        if group.size > 1 and any(words in str(error) for words in _GONE):
            raise PeerGone from None
        raise


def rows(group: Group, batch_size: int) -> slice:
    """Which part of a batch this process works on; UserError when it cannot be shared evenly."""
    if batch_size % group.size:
        raise UserError(
            f"--batch-size {batch_size} counts the images of all processes together and cannot be shared evenly by "
            f"{group.size}; give a multiple of {group.size}"
        )
    share = batch_size // group.size
    return slice(group.rank * share, (group.rank + 1) * share)


def draw(task: Task, batch: Any, generator: torch.Generator, flip: bool, group: Group) -> tuple[Tensor, ...]:
    """``task.draw`` of the whole batch, cut to this process's rows; ``batch`` holds those rows."""
    if group.size == 1:
        return task.draw(batch, generator, flip)
    # Shapes decide what is drawn, so the rows stand in for the others too; what that gives for the others is cut away.
    whole = tree_map(lambda v: torch.cat([v] * group.size), batch)
    drawn = task.draw(whole, generator, flip)
    return tuple(v[rows(group, len(v))] for v in drawn)


def gather(group: Group, values: Tensor) -> Tensor:
    """float64 [n] on the CPU of every process -> [processes, n] in all of them."""
    found = [torch.empty_like(values) for _ in range(group.size)]
    if group.size == 1:
        return values[None]
    with peers(group):
        dist.all_gather(found, values)
    return torch.stack(found)


def agree(group: Group, value: int) -> int:
    """The largest ``value`` of all processes, which call this together."""
    if group.size == 1:
        return value
    return int(gather(group, torch.tensor([float(value)], dtype=torch.float64)).max())


class Replicas:
    """``forward`` of this process, kept in step with the others.

    Call it as ``forward``; backward passes outside :meth:`accumulate` average the gradients. ``task`` is ``forward`` or
    what it was compiled from.
    """

    def __init__(self, forward: nn.Module, group: Group, device: torch.device) -> None:
        options: dict[str, Any] = {"broadcast_buffers": False}
        if device.type == "cuda":
            here = int(os.environ.get("LOCAL_WORLD_SIZE", group.size))
            if here > torch.cuda.device_count():
                raise UserError(f"{here} processes need as many GPUs here; there are {torch.cuda.device_count()}")
            torch.cuda.set_device(device)
            options["device_ids"] = [device]
            options["process_group"] = dist.new_group(backend="nccl", timeout=timedelta(minutes=30))
        with peers(group):
            self.wrapped = DistributedDataParallel(forward, **options)

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.wrapped(*tensors)

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Backward passes in here only add to this process's gradients."""
        return self.wrapped.no_sync()


def say_once() -> bool:
    """Whether this process is the first of the job to end with a message: the others would only repeat it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        # torchrun keeps this store itself, so it is there whichever process died.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"pdae_fast/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True
