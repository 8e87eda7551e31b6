"""One evaluation of other families' networks, random weights, and one code of every family: the fused plan against the
same network's modules.

The modules are this project's own, eager and in float32, which give the original code's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.machine import worth_timing
from bench.networks import build, fill, inputs
from bench.tables import RUN
from bench.timing import Alternation, pedantic, rounds_within
from pdae_fast import PDAE, DiffAE, Prior, UNetConfig
from pdae_fast.config import DiffAEConfig, PriorConfig
from pdae_fast.engine import build_plan
from pdae_fast.engine.plan import Plan

# google/ddpm-celebahq-256, and church, bedroom and cat.
GOOGLE = UNetConfig(
    base_channel=128,
    channel_multiplier=(1, 1, 2, 2, 4, 4),
    attention_resolutions=(16,),
    use_scale_shift_norm=False,
    downsample="conv_asymmetric",
    upsample="conv",
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
)
# Diff-AE's FFHQ-256.
DIFFAE = UNetConfig(
    base_channel=128, channel_multiplier=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,), time_channel=512
)
MODELS = {
    "google256": lambda: Prior(PriorConfig(256, GOOGLE)),
    "diffae256": lambda: DiffAE(DiffAEConfig(256, 512, DIFFAE, (1, 1, 2, 2, 4, 4, 4))),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
SECONDS = 40.0


def against_modules(
    benchmark: Any, device: torch.device, model: PDAE | Prior, run: Callable[[Plan], Callable[[], Tensor]], **row: Any
) -> None:
    """Time ``run(plan)()`` of the fused plan in each dtype beside the modules in float32, into the table "modules"."""
    plans = {"modules-float32": ("eager", torch.float32)}
    plans |= {
        f"fused-{name}": ("fused", getattr(torch, name)) for name in worth_timing(("bfloat16", "float32"), device)
    }
    runs = {name: run(build_plan(model, device, dtype, plan)) for name, (plan, dtype) in plans.items()}
    alternation = Alternation(runs, device)
    results, one_round = alternation.first()
    expected = results["modules-float32"]
    errors = {name: float((v - expected).norm() / expected.norm()) for name, v in results.items()}
    for name, error in errors.items():
        assert error < TOLERANCE[name.rpartition("-")[2]]
    if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round)):
        return
    for name in plans:
        ratio = alternation.ratio(name, "modules-float32")
        RUN.add(
            "modules", **row, contender=name, median_s=alternation.spread(name).median, ratio=ratio.median,
            ratio_spread=[ratio.low, ratio.high], error=errors[name],
        )  # fmt: skip


@pytest.mark.parametrize("batch", (1,), ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", MODELS)
def test_evaluation(benchmark, device, network, batch):
    model = fill(MODELS[network]()).eval()
    x, z = inputs(model, batch, device)

    def run(plan: Plan) -> Callable[[], Tensor]:
        field = plan.field(z)
        return lambda: field(x, 500, True)[0]

    against_modules(benchmark, device, model, run, network=network, batch=batch, computed="eps")


@pytest.mark.parametrize("batch", (1, 8), ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", ("fashion32", "avatars64", "celeba64", "ffhq128", "diffae256"))
def test_encode(benchmark, device, network, batch):
    model = fill(MODELS[network]()).eval() if network in MODELS else build(network)
    x0, _ = inputs(model, batch, device)
    against_modules(
        benchmark, device, model, lambda plan: lambda: plan.encode(x0), network=network, batch=batch, computed="z"
    )
