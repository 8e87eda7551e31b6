"""What precision costs, and how long the first step takes to come."""

from __future__ import annotations

from bench import quality, startup
from bench.tables import RUN


def once(benchmark, function):
    """Run ``function`` once under the benchmark's clock."""
    return benchmark.pedantic(function, rounds=1, iterations=1)


def test_precision_loss(benchmark, device):
    row = once(benchmark, lambda: quality.precision_loss(device))
    RUN.add("quality", **row)
    assert quality.precision_holds(row), row


def test_float32_plan_against_the_modules(benchmark, device):
    row = once(benchmark, lambda: quality.plan_difference(device))
    RUN.add("quality", **row)
    assert row["error"] <= quality.PLAN_BOUND, row


def test_startup(benchmark, device):
    row = once(benchmark, lambda: startup.measure(device=str(device)))
    RUN.add("startup", **row)
    assert row["total_s"] <= startup.BOUND, row
