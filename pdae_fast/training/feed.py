"""Which image is seen when, and its way to the device: one batch ahead, from pinned memory, on a stream of its own.

The order and every random draw of a step are functions of (seed, step) alone. Nothing random is carried from one step
to the next, so a resumed run continues bit for bit with no generator state to save, and the order does not depend on
the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# -- the order ---------------------------------------------------------------------------------------------------------


class BatchOrder:
    """Endless batches of indices: each epoch is a fresh permutation, cut where it falls; batch n is a pure function.

    Used as a DataLoader's ``batch_sampler``, starting at batch ``start``. ``rows``: the part of each batch to give.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, start: int = 0, stop: int | None = None, rows: slice = slice(None)
    ) -> None:
        self.count, self.batch_size, self.seed, self.start, self.stop = count, batch_size, seed, start, stop
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        batch = self.start
        while self.stop is None or batch < self.stop:
            positions = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
            indices: list[int] = []
            for position in positions:
                if position // self.count != epoch:
                    epoch = int(position // self.count)
                    permutation = np.random.default_rng((self.seed, 1, epoch)).permutation(self.count)
                indices.append(int(permutation[position % self.count]))
            yield indices[self.rows]
            batch += 1


def step_generator(seed: int, micro_step: int) -> torch.Generator:
    """CPU generator for all draws of one forward pass (noise, t, flips)."""
    state = int(np.random.SeedSequence((seed, 2, micro_step)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)


def global_seed(seed: int, micro_step: int, rank: int = 0) -> int:
    """Seed of torch's global generator for the same pass in process ``rank``: dropout draws from it."""
    entropy = (seed, 3, micro_step, rank) if rank else (seed, 3, micro_step)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1


# -- the way -----------------------------------------------------------------------------------------------------------

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
