"""Batches in dataset order, decoded ahead of time, in constant memory."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from pdae_fast.data.sample import Batch, BrokenImage, Sample, Subset, collate
from pdae_fast.errors import UserError

# Decoding and resizing release Python's lock; each thread may hold one full-size picture.
_WORKERS = min(8, os.cpu_count() or 1)


def stream(
    dataset, batch_size: int, on_error: str = "skip", broken: list | None = None, prefetch: int = 2
) -> Iterator[Batch]:
    """Generate the dataset once, in order, as Batches; threads load the next ones meanwhile.

    dataset: anything with `len`, `names` and `dataset[i] -> Sample`, safe to index from several threads.
    batch_size: every batch is full except the last; after a skipped image the batch is filled up.
    on_error: what a BrokenImage does. "skip": (name, reason) is appended to `broken`, or warned of when
    that is None; "fail": it is raised when its turn comes. Other exceptions are always raised.
    prefetch: how many batches may be loaded ahead, at least 1. At most (prefetch + 1) * batch_size images
    are loaded and not yet handed out. The threads end with the generator, be it exhausted, closed or
    interrupted.

    Raises UserError for a bad argument, at the call. A dataset of broken images alone gives no batch.
    """
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1, not {batch_size}")
    if prefetch < 1:
        raise UserError(f"prefetch must be at least 1, not {prefetch}")
    if on_error not in ("skip", "fail"):
        raise UserError(f"on_error must be 'skip' or 'fail', not {on_error!r}")
    return _stream(dataset, batch_size, on_error, broken, prefetch)


def _stream(dataset, batch_size: int, on_error: str, broken: list | None, prefetch: int) -> Iterator[Batch]:
    # No feeder thread: whenever the caller comes back, loading is topped up to the bound. That bound is the
    # queue, and a caller who stops coming stops the loading.
    pending: deque[tuple[int, Future[Sample]]] = deque()
    indices = iter(range(len(dataset)))
    samples: list[Sample] = []
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="pdae-data")
    try:
        while True:
            while len(pending) < prefetch * batch_size and (index := next(indices, None)) is not None:
                pending.append((index, pool.submit(dataset.__getitem__, index)))
            if not pending:
                break
            index, future = pending.popleft()
            try:
                samples.append(future.result())
            except BrokenImage as error:
                if on_error == "fail":
                    raise
                if broken is None:
                    warnings.warn(f"skipped a broken image: {error}", stacklevel=2)
                else:
                    broken.append((dataset.names[index], error.reason))
            del future  # it holds the image
            if len(samples) == batch_size:
                batch = collate(samples)
                samples.clear()
                yield batch
                del batch
        if samples:
            yield collate(samples)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def readable(dataset: Any, quiet: bool = True) -> tuple[Any, list[tuple[str, str]]]:
    """``dataset`` without its broken images, and the name of each with the reason. Every image is decoded once, by
    several threads, with a progress bar unless ``quiet``; arrays held in memory (IDX files) need not be.

    Raises UserError when no image can be read.
    """
    if isinstance(getattr(dataset, "images", None), np.ndarray):
        return dataset, []
    broken: list[tuple[str, str]] = []
    left = []
    with tqdm(total=len(dataset), unit="image", unit_scale=True, desc="read", disable=quiet or None) as bar:
        for batch in stream(dataset, 1, "skip", broken, prefetch=4 * _WORKERS):
            left += batch.names
            bar.update()
    if not left:
        raise none_read(broken)
    place = {name: i for i, name in enumerate(dataset.names)}
    return (Subset(dataset, [place[name] for name in left]) if broken else dataset), broken


def none_read(broken: Sequence[tuple[str, str]]) -> UserError:
    """The error of a data set of broken images alone; ``broken``: the name of each, and the reason."""
    return UserError(f"none of the {len(broken)} images could be read; the first: {': '.join(broken[0])}")
