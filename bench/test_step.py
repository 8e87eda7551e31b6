"""One autoencoding step (trunk, both decoders, DDIM update) against the published computation.

All contenders and the baseline take turns in one process; medians are compared. A contender whose numbers are wrong
gets no speed. `--compile` adds `torch.compile(mode="max-autotune")` of the baseline, which compiles for minutes.
"""

from __future__ import annotations

import pytest
import torch

from bench.compiled import CompiledBaseline
from bench.contenders import measure
from bench.machine import worth_timing
from bench.networks import case
from bench.tables import RUN
from bench.timing import pedantic, rounds_within

NETWORKS = ("fashion32", "celeba64", "ffhq128")
CONTENDERS = ("eager-bfloat16", "fused-float32", "fused-bfloat16")
BATCHES = (1, 8, 64) if torch.cuda.is_available() else (1, 8)
SECONDS = 30.0  # of measuring, a case; never fewer than three rounds


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", NETWORKS)
def test_step(benchmark, request, device, peaks, network, batch):
    c = case(network, batch, device)
    extra = {}
    if request.config.getoption("--compile"):
        extra["compile-max-autotune"] = CompiledBaseline(c.model, device)

    def drive(alternation, one_round):
        return pedantic(benchmark, alternation, rounds_within(SECONDS, one_round))

    rows = measure(c, worth_timing(CONTENDERS, device), extra=extra, peaks=peaks, drive=drive)
    for row in rows:
        RUN.add("step", **row)
    if rows:
        benchmark.extra_info.update(rows[-1])
