"""Every switch of the fused plan turned around, against the plan as it is on this device."""

from __future__ import annotations

import pytest

from bench.contenders import CHECKED, PlanSide, check, relative
from bench.gpu.paths import variants
from bench.networks import case
from bench.tables import RUN
from bench.timing import Alternation, pedantic, rounds_within

NETWORKS = ("fashion32", "celeba64")
DTYPES = ("float32", "bfloat16")
SECONDS = 20.0  # of measuring, a case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", (1, 8), ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", NETWORKS)
def test_rewrites(benchmark, device, network, batch, dtype):
    c = case(network, batch, device)
    default = PlanSide(c, f"fused-{dtype}")
    expected, errors = default.step(*CHECKED), {}
    functions = {"default": default.step}
    for label, keywords in variants(device):
        if "attention" in keywords:
            continue
        side = PlanSide(c, default.name, **keywords)
        errors[label] = check(label, relative(side.step(*CHECKED), expected), 2 * side.tolerance)
        functions[label] = side.step
    alternation = Alternation(functions, device)
    _, one_round = alternation.first()
    if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round)):
        return
    for label, error in errors.items():
        ratio = alternation.ratio(label, "default")
        RUN.add(
            "rewrite", network=network, batch=batch, dtype=dtype, changed=label,
            ratio=ratio.median, ratio_spread=[ratio.low, ratio.high], error=error, rounds=ratio.count,
        )  # fmt: skip
