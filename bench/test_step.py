"""One autoencoding step (trunk, both decoders, DDIM update) against the published computation.

`pytest bench/ --benchmark-only`. Both sides run alternately in one process; medians are compared. A contender whose
numbers are wrong gets no speed.
"""

from __future__ import annotations

import statistics
import time
import zlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.baseline import Baseline
from bench.conftest import ROWS
from pdae_fast import PDAE, available, presets
from pdae_fast.engine import build_plan
from pdae_fast.sampling import ddim_step

CPU = torch.device("cpu")
NETWORKS = ("fashion32", "celeba64", "ffhq128")
CONTENDERS = {"eager-bfloat16": 0.05, "fused-float32": 1e-4, "fused-bfloat16": 0.05}
T_NOW, T_NEXT = 499, 489


def _network(name: str) -> PDAE:
    """The bundled model of that name, else the preset with weights drawn from a fixed rule."""
    if name in available():
        return PDAE.from_pretrained(name)
    model = PDAE(presets[name])
    with torch.no_grad():
        for key, p in model.decoder.named_parameters():
            r = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            norm = p.ndim == 1 and key.endswith("weight")
            p.copy_(1 + 0.05 * r if norm else r / p[0].numel() ** 0.5 if p.ndim > 1 else 0.05 * r)
    return model.eval()


@pytest.fixture(scope="module", params=[(n, b) for n in NETWORKS for b in (1, 8)], ids=lambda p: f"{p[0]}-batch{p[1]}")
def case(request):
    name, B = request.param
    model = _network(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, *model.image_shape, generator=generator)
    z = torch.randn(B, model.config.latent_dim, generator=generator)
    baseline = Baseline(model)
    with FlopCounterMode(display=False) as counter:
        expected = baseline.step(x, T_NOW, T_NEXT, z)
    return name, B, model, x, z, baseline, expected, counter.get_total_flops()


def _matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a 2048 matrix product in ``dtype``, best of five."""
    a = torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times[1:])


@pytest.mark.parametrize("contender", CONTENDERS)
def test_step(benchmark, case, contender):
    name, B, model, x, z, baseline, expected, flops = case
    plan_name, dtype_name = contender.split("-")
    dtype = getattr(torch, dtype_name)
    plan = build_plan(model, CPU, dtype, plan_name)
    field = plan.field(z)
    alpha_bar = [float(baseline.alpha_bar[t]) for t in (T_NOW, T_NEXT)]

    def step() -> torch.Tensor:
        eps, gradient = field(x, T_NOW, True)
        return ddim_step(x, eps, gradient, *alpha_bar)

    error = float((step() - expected).norm() / expected.norm())
    assert error < CONTENDERS[contender], f"wrong numbers ({error:.2e} from the baseline): no speed is reported"

    opponent: list[float] = []

    def run_baseline() -> None:
        start = time.perf_counter()
        baseline.step(x, T_NOW, T_NEXT, z)
        opponent.append(time.perf_counter() - start)

    rounds = 5 if name == "ffhq128" and B > 1 else 9
    benchmark.pedantic(step, setup=run_baseline, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return
    own = sorted(benchmark.stats.stats.data)
    base, median = statistics.median(opponent[1:]), statistics.median(own)
    fraction = flops / median / _matmul_peak(dtype)
    benchmark.extra_info.update(
        baseline_median=base, ratio=base / median, error=error, fraction_of_matmul_peak=fraction
    )
    low, high = own[int(0.2 * len(own))], own[min(len(own) - 1, int(0.8 * len(own)))]
    ROWS.append(
        [
            *(name, str(B), contender, f"{base * 1e3:.1f}", f"{median * 1e3:.1f}"),
            *(f"{low * 1e3:.1f}-{high * 1e3:.1f}", f"{base / median:.2f}x", f"{fraction:.0%}", f"{error:.1e}"),
        ]
    )
