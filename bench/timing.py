"""Comparing things that take time: the sides take turns in one process, and medians with their spread are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of ``count`` samples; of times, in seconds."""

    median: float
    low: float
    high: float
    count: int

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)


def spread(samples: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation; ValueError without samples."""
    if not samples:
        raise ValueError("no samples to take a median of")
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Spread(at(0.5), at(0.2), at(0.8), len(ordered))


def clock(function: Function, device: torch.device) -> tuple[float, Any]:
    """(seconds, result) of one call. On CUDA the work is waited for before and after, and timed by events, which
    count from the moment the first operation could start to the end of the last one."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


class Alternation:
    """Named functions called in turns, so that whatever disturbs the machine disturbs all of them.

    ``first()`` warms all up and hands back their results, which are to be checked before anything is timed; then
    ``turn(name)`` times one call of one function, or ``run`` whole rounds of all, every other round in reverse order.
    """

    def __init__(self, functions: Mapping[str, Function], device: torch.device, clock: Callable = clock) -> None:
        self.functions, self.device, self.clock = dict(functions), device, clock
        self.samples: dict[str, list[float]] = {name: [] for name in self.functions}

    def first(self) -> tuple[dict[str, Any], float]:
        """({name: result}, seconds of a second, warm round); nothing of it is kept as a sample."""
        results = {name: function() for name, function in self.functions.items()}
        return results, sum(self.clock(function, self.device)[0] for function in self.functions.values())

    def turn(self, name: str) -> None:
        seconds, _ = self.clock(self.functions[name], self.device)
        self.samples[name].append(seconds)

    def run(self, rounds: int, seconds: float = float("inf")) -> None:
        """At least three rounds, then more until there are ``rounds`` or ``seconds`` have passed."""
        start = time.perf_counter()
        for i in range(rounds):
            if i >= 3 and time.perf_counter() - start > seconds:
                break
            for name in list(self.functions)[:: -1 if i % 2 else 1]:
                self.turn(name)

    def spread(self, name: str) -> Spread:
        return spread(self.samples[name])

    def ratio(self, name: str, over: str) -> Spread:
        """How many times faster ``name`` is than ``over``: the ratio of their medians, with the percentiles of the
        ratios of samples that were taken side by side."""
        pairs = [o / own for o, own in zip(self.samples[over], self.samples[name], strict=True)]
        paired = spread(pairs)
        return Spread(self.spread(over).median / self.spread(name).median, paired.low, paired.high, paired.count)


def pedantic(benchmark: Any, alternation: Alternation, rounds: int) -> bool:
    """Drive ``alternation`` from pytest-benchmark: it times the last function, the others take their turns in between.

    False when timing is switched off (``--benchmark-disable``): then every function ran once, and that is all.
    """
    *others, last = alternation.functions

    def in_between() -> None:
        for name in others:
            alternation.turn(name)

    benchmark.pedantic(lambda: alternation.turn(last), setup=in_between, rounds=rounds, iterations=1, warmup_rounds=0)
    return not benchmark.disabled


def rounds_within(seconds: float, one_round: float, least: int = 3, most: int = 25) -> int:
    """How many rounds of ``one_round`` seconds fit into ``seconds``, within limits."""
    return max(least, min(most, int(seconds / max(one_round, 1e-9))))
