"""How long ways to the same result take, when they take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

ROUNDS = 5


def alternate(ways: dict[str, Callable[[], Tensor]], rounds: int = ROUNDS) -> dict[str, Any]:
    """Time ``ways``, each of which returns the same images, one after the other, ``rounds`` times after a warm-up.

    "ways": for each the median of its seconds, and "speedup": the median of the first way over its own, with the 20th
    and 80th percentile over the rounds. "largest_difference": of any result from the first way's, over the spread of
    its pixels; the times mean nothing unless it is small.
    """
    results = [run() for run in ways.values()]
    difference = max(float((x - results[0]).abs().max()) for x in results) / float(results[0].std())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    base = np.array(next(iter(seconds.values())))
    rows = {}
    for name, values in seconds.items():
        low, high = np.percentile(base / values, [20, 80])
        median = float(np.median(values))
        rows[name] = {
            "median_seconds": median,
            "speedup": float(np.median(base)) / median,
            "speedup_20": float(low),
            "speedup_80": float(high),
        }
    return {"rounds": rounds, "largest_difference": difference, "ways": rows}


def lines(compared: dict[str, Any]) -> list[str]:
    """What `alternate` found, a line a way."""
    return [
        f"  {name}: {way['speedup']:.2f}x ({way['speedup_20']:.2f}-{way['speedup_80']:.2f})"
        for name, way in compared["ways"].items()
    ]
