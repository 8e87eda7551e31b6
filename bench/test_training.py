"""One step of mean-shift training (PDAE on a frozen prior) against the published loop, in one run.

All sides take turns step by step; a side whose first losses are not the published loop's gets no speed. `--compile`
adds torch.compile of the step, which compiles for minutes. On the CPU celeba64 is left out unless `-k celeba64` asks
for it.
"""

from __future__ import annotations

import pytest
import torch

from bench.machine import worth_timing
from bench.tables import RUN
from bench.timing import pedantic, rounds_within
from bench.training import USUAL, measure

CUDA = torch.cuda.is_available()
CASES = [("fashion32", 32), ("fashion32", 128), ("celeba64", 16), ("celeba64", 128)] if CUDA else [
    ("fashion32", 16), ("celeba64", 2)
]  # fmt: skip
SECONDS = 60.0


@pytest.mark.parametrize(("network", "batch"), CASES, ids=lambda v: f"batch{v}" if isinstance(v, int) else v)
def test_training(benchmark, request, device, network, batch):
    asked = request.config.getoption("-k") or ""
    if device.type != "cuda" and network != "fashion32" and network not in asked:
        pytest.skip(f"slow on the CPU; -k {network} runs it")
    names = [*USUAL]
    if request.config.getoption("--compile"):
        names.append("bfloat16 fast compile")
    if device.type == "cuda":
        names.append("bfloat16 fast cuda-graph")

    def drive(alternation, one_round):
        return pedantic(benchmark, alternation, rounds_within(SECONDS, one_round))

    rows = measure(network, batch, device, worth_timing(names, device), drive=drive)
    for row in rows:
        RUN.add("training", **row)
    if rows:
        benchmark.extra_info.update(rows[-1])
