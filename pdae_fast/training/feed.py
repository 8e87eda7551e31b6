"""Batches on their way to the device: one ahead, from pinned memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Prepare = Callable[[Any, int], tuple[Tensor, ...]]


class Prepared(tuple):
    """The arguments of a task's forward, on the device."""


class Prefetcher:
    """``prepare(batch, n)`` of the batches n = ``first`` ... of ``batches``, on ``device``, one batch ahead.

    A thread loads, draws and pins batch n + 1 and queues its copy on a side stream while the device works on batch n.
    ``next`` lets the device (not the processor) wait for the copy. What loading raises is raised when its turn comes.
    On the CPU only the thread remains. ``close`` ends the thread.
    """

    def __init__(self, batches: Iterator[Any], prepare: Prepare, first: int, device: torch.device) -> None:
        self.batches, self.prepare, self.n, self.device = batches, prepare, first, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pdae-feed")
        self._ahead: Future | None = self._pool.submit(self._load)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Prepared:
        if self._ahead is None:
            raise StopIteration
        loaded, self._ahead = self._ahead.result(), None
        if loaded is None:
            raise StopIteration
        tensors, copied = loaded
        self._ahead = self._pool.submit(self._load)
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in tensors:
                # The memory was allocated for the side stream; it must not be given away while this one reads it.
                tensor.record_stream(current)
        return Prepared(tensors)

    def _load(self) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None] | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        tensors = self.prepare(batch, self.n)
        self.n += 1
        if self.stream is None:
            return tensors, None
        with torch.cuda.stream(self.stream):
            # The allocator of pinned memory remembers the copy: a tensor dropped here is not reused before its end.
            moved = tuple(v.pin_memory().to(self.device, non_blocking=True) for v in tensors)
            copied = torch.cuda.Event()
            copied.record()
        return moved, copied

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def closing_feed(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """``batches``, whose thread (if it has one) ends with the block."""
    try:
        yield batches
    finally:
        if isinstance(batches, Prefetcher):
            batches.close()
