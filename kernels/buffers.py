"""Memory of large maps on the CPU that is used again from step to step.

The C library maps fresh pages for every allocation above 32 MiB and gives them back when it is freed: at ffhq128 with
eight images that is half a million page faults a step. `Buffers` keep the memory instead. They belong to who made them,
not to the process, whose allocator is left alone.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

LEAST = 4 << 20  # bytes of a map; smaller ones are left to the framework, which has them again for nothing
SPARE = 1.5  # what is kept at most, over the most that was ever lent at once
_current = threading.local()


class _Lease(np.ndarray):
    """A block's memory while a tensor stands on it; the block goes back when the last one is gone."""

    owner: deque[np.ndarray] | None = None
    block: np.ndarray | None = None

    def __del__(self) -> None:
        # In whatever thread, perhaps inside of `Buffers.take`: only what needs no lock.
        if self.owner is not None:
            self.owner.append(self.block)


class Buffers:
    """Blocks of memory that maps are lent from; a map has its block for as long as any tensor stands on it.

    Several threads may use them at once. Blocks that are not needed any more are given up when others are allocated, so
    that at most `SPARE` times what was lent at once is held; all of them when the owner and the last map are gone.
    """

    def __init__(self) -> None:
        self._lock, self._returned = threading.Lock(), deque()
        self._free: list[np.ndarray] = []  # smallest first
        self._held = self._most = 0

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Maps that this thread makes by `empty_map` inside of this context come from here."""
        before, _current.buffers = getattr(_current, "buffers", None), self
        try:
            yield
        finally:
            _current.buffers = before

    def idle(self) -> int:
        """Bytes that are held and lent to nobody."""
        with self._lock:
            self._collect()
            return sum(block.nbytes for block in self._free)

    def held(self) -> int:
        """Bytes in all."""
        return self._held

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` elements, not initialised."""
        size = count * dtype.itemsize
        with self._lock:
            block = self._find(size)
        lease = np.ndarray.__new__(_Lease, size, np.uint8, block)
        lease.owner, lease.block = self._returned, block
        return torch.from_numpy(lease).view(dtype)

    def _collect(self) -> None:
        while self._returned:
            bisect.insort(self._free, self._returned.popleft(), key=lambda block: block.nbytes)

    def _find(self, size: int) -> np.ndarray:
        self._collect()
        lent = self._held - sum(block.nbytes for block in self._free) + size
        self._most = max(self._most, lent)
        for i, block in enumerate(self._free):
            if size <= block.nbytes <= 2 * size:
                return self._free.pop(i)
        # Small ones are had again for less.
        while self._free and self._held + size > SPARE * self._most:
            self._held -= self._free.pop(0).nbytes
        block = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        self._held += size
        return block


def empty_map(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[batch, channels, height, width] on the CPU, channels-last, not initialised; large ones from the `Buffers` in use
    in this thread."""
    buffers, count = getattr(_current, "buffers", None), batch * channels * height * width
    if buffers is None or count * dtype.itemsize < LEAST:
        shape = (batch, channels, height, width)
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
    return buffers.take(count, dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)
