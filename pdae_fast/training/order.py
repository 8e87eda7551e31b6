"""Which image is seen when, and every random draw of a step, as functions of (seed, step) alone.

Nothing random is carried from one step to the next, so a resumed run continues bit for bit with no generator state
to save, and the order does not depend on the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


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
