"""Every switch of the fused plan turned around, against the plan as it is on this device.

The last row of a case is a bound: what would be gained if the output convolutions and the DDIM update, which are
separate operations on the CPU, cost nothing.
"""

from __future__ import annotations

import pytest
import torch

from bench.contenders import CHECKED, PlanSide, check, relative
from bench.gpu.paths import variants
from bench.networks import case
from bench.tables import RUN
from bench.timing import Alternation, pedantic, rounds_within
from pdae_fast.samplers.ddim import ddim_step

NETWORKS = ("fashion32", "celeba64")
DTYPES = ("float32", "bfloat16")
SECONDS = 20.0  # of measuring, a case


def tail(side: PlanSide):
    """The end of a step alone: both output convolutions and the update, on maps of the right shape."""
    c, plan = side.case, side.plan
    shape = (c.batch, plan.unet.config.base_channel, *c.x.shape[2:])
    h = torch.randn(shape, device=c.device, dtype=plan.dtype).contiguous(memory_format=torch.channels_last)
    channels = c.x.shape[1]

    @torch.inference_mode()
    def run():
        eps, gradient = plan.eps.head(h)[:, :channels], plan.gradient.head(h)
        return ddim_step(c.x, eps.float(), gradient.float(), 0.5, 0.6)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", (1, 8), ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", NETWORKS)
def test_rewrites(benchmark, device, network, batch, dtype):
    c = case(network, batch, device)
    default = PlanSide(c, f"fused-{dtype}")
    expected, errors = default.step(*CHECKED), {}
    functions = {"default": default.step, "tail": tail(default)}
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
    share = alternation.spread("tail").median / alternation.spread("default").median
    RUN.add(
        "rewrite", network=network, batch=batch, dtype=dtype, changed="output convolutions and update for nothing",
        ratio=1 / (1 - share), rounds=alternation.spread("tail").count,
    )  # fmt: skip
