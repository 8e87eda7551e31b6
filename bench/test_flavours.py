"""One evaluation of other families' networks, random weights: the fused plan against the same network's modules.

The modules are this project's own, eager and in float32, which give the original code's numbers.
"""

from __future__ import annotations

import pytest
import torch

from bench.networks import fill
from bench.tables import RUN
from bench.timing import Alternation, pedantic, rounds_within
from pdae_fast import DiffAE, Prior, UNetConfig
from pdae_fast.config import DiffAEConfig, PriorConfig
from pdae_fast.engine import build_plan

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


@pytest.mark.parametrize("batch", (1,), ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", MODELS)
def test_evaluation(benchmark, device, network, batch):
    model = fill(MODELS[network]()).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *model.image_shape, generator=generator).to(device)
    z = torch.randn(batch, 512, generator=generator) if isinstance(model, DiffAE) else None
    plans = {"modules-float32": ("eager", torch.float32)}
    plans |= {f"fused-{name}": ("fused", getattr(torch, name)) for name in ("bfloat16", "float32")}
    fields = {name: build_plan(model, device, dtype, plan).field(z) for name, (plan, dtype) in plans.items()}
    alternation = Alternation({name: lambda f=f: f(x, 500, True)[0] for name, f in fields.items()}, device)
    results, one_round = alternation.first()
    expected = results["modules-float32"]
    errors = {name: float((v - expected).norm() / expected.norm()) for name, v in results.items()}
    for name, error in errors.items():
        assert error < TOLERANCE[name.rpartition("-")[2]]
    if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round)):
        return
    for name in fields:
        ratio = alternation.ratio(name, "modules-float32")
        RUN.add(
            "evaluation", network=network, batch=batch, contender=name, median_s=alternation.spread(name).median,
            ratio=ratio.median, ratio_spread=[ratio.low, ratio.high], error=errors[name],
        )  # fmt: skip
