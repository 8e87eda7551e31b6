"""What features of images cost, in evaluations of eps by the same plan: both take turns, in processor time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.networks import build, inputs
from bench.tables import RUN
from bench.timing import Alternation, Function, clock, pedantic, rounds_within
from pdae_fast.engine import build_plan
from pdae_fast.engine.device import DTYPES

NETWORKS = ("fashion32", "avatars64", "celeba64")
BATCH, T = 64, 50
SECONDS = 30.0  # of measuring, a case


def processor(function: Function, device: torch.device) -> tuple[float, Any]:
    """As `clock`, but on the CPU the processor's seconds: other people's work does not count."""
    if device.type != "cpu":
        return clock(function, device)
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("network", NETWORKS)
def test_features(benchmark, device, network, dtype):
    model = build(network)
    plan, (x, _) = build_plan(model, device, DTYPES[dtype]), inputs(model, BATCH, device)
    last = len(plan.unet.output_blocks)
    field = plan.field()
    functions = {"eps": lambda: field(x, T, False)}
    functions |= {f"outputs {k}": lambda k=k: plan.features(x, T, k) for k in (0, 2, last)}
    functions["one t an image"] = lambda: plan.features(x, list(range(BATCH)))
    alternation = Alternation(functions, device, processor)
    _, one_round = alternation.first()
    if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round)):
        return
    for name in functions:
        if name != "eps":
            ratio = alternation.ratio("eps", name)  # of what it costs over what eps costs
            RUN.add(
                "features", network=network, batch=BATCH, dtype=dtype, features=name, ratio=ratio.median,
                ratio_spread=[ratio.low, ratio.high], median_s=alternation.spread(name).median / BATCH,
                eps_s=alternation.spread("eps").median / BATCH, rounds=ratio.count,
            )  # fmt: skip
