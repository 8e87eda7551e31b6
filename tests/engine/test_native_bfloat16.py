"""bfloat16 maps in native code: which layers, of which weights, in which tiles, and what larger ones cost."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench.quality import split_images
from helpers import tiny_pdae
from pdae_fast import PDAE, PDAEConfig, Pipeline, UNetConfig, kernels
from pdae_fast.engine import build_plan, convolution
from pdae_fast.engine.convolution import WinogradConvolution
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.errors import UserError

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
pytestmark = pytest.mark.skipif(not kernels.winograd_status()[0], reason=kernels.winograd_status()[1])


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    monkeypatch.setattr(convolution, "has_amx", lambda: False)


@pytest.fixture(scope="module")
def model():
    unet = UNetConfig(
        input_channel=1, base_channel=32, channel_multiplier=(1, 2), num_residual_blocks_of_a_block=1,
        attention_resolutions=(2,),
    )  # fmt: skip
    return tiny_pdae(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet))


def inputs(model, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *model.image_shape, generator=generator), torch.randn(batch, 8, generator=generator)


def outputs(plan, model):
    x, z = inputs(model)
    return torch.cat(plan.field(z)(x, 400, True))


def error(plan, model):
    exact = outputs(Plan(model, CPU, torch.float64), model).double()
    return float((outputs(plan, model).double() - exact).norm() / exact.norm())


def convolutions(plan):
    found, stack = [], [plan.trunk, plan.eps, plan.gradient]
    seen = set()
    while stack:
        value = stack.pop()
        if isinstance(value, WinogradConvolution):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            stack += value
        elif hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            stack += vars(value).values()
    return found


def test_it_is_no_worse_than_the_framework(model):
    plan = build_plan(model, CPU, BFLOAT16)
    assert plan.options.native_convolutions and plan.options.native_attention
    framework = FusedPlan(model, CPU, BFLOAT16, Rewrites())
    assert convolutions(plan) and not convolutions(framework)
    assert error(plan, model) < 1.5 * error(framework, model) < 0.05
    assert {c.tile for c in convolutions(plan)} == {2, kernels.UPSAMPLED}


def test_weights_are_rounded_once(model):
    """Transformed from float32, not from bfloat16: also in a copy and in a plan that was pickled."""
    plan = build_plan(model, CPU, BFLOAT16)
    found = outputs(plan, model)
    own = [m for m in model.decoder.modules() if convolution.native_fits(m)]
    upsampled = convolution.upsampled_layers(model.decoder)
    assert len(upsampled) == 2  # one level, two decoders
    for layer in own:
        tile = kernels.UPSAMPLED if layer in upsampled else 2
        u = kernels.winograd_weights(layer.weight.detach(), tile, BFLOAT16)
        assert any(torch.equal(u, c.weight) for c in convolutions(plan) if c.weight.numel() == u.numel())
        rounded = kernels.winograd_weights(layer.weight.detach().bfloat16().float(), tile, BFLOAT16)
        assert not torch.equal(u, rounded)
    assert len(convolutions(plan)) == len(own)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(outputs(other, model), found)


def test_a_model_in_half_precision_is_widened(model):
    half = copy.deepcopy(model).to(BFLOAT16)
    plan, same = build_plan(half, CPU, BFLOAT16), build_plan(copy.deepcopy(half).float(), CPU, BFLOAT16)
    assert torch.equal(outputs(plan, model), outputs(same, model))


def test_a_processor_with_amx_multiplies_directly(model, monkeypatch):
    monkeypatch.setattr(convolution, "has_amx", lambda: True)
    plan = build_plan(model, CPU, BFLOAT16)
    assert not plan.options.native_convolutions and not convolutions(plan)
    assert plan.describe()["native_convolutions"] == "no: AMX multiplies bfloat16 as it stands"
    assert build_plan(model, CPU, torch.float32).options.native_convolutions


def test_a_processor_that_onednn_has_no_bfloat16_for(model, monkeypatch):
    """AVX2 alone: asking oneDNN for its layout of weights is an error there."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    plan = build_plan(model, CPU, BFLOAT16)
    assert not plan.options.packed_weights and plan.options.native_convolutions and error(plan, model) < 0.05
    assert build_plan(model, CPU, torch.float32).options.packed_weights


def test_smaller_tiles_where_memory_is_short(model, monkeypatch):
    layers = [m for m in model.decoder.modules() if convolution.native_fits(m)]
    sizes = {tile: convolution.native_bytes(layers, torch.float32, tile) for tile in (2, 4)}
    assert sizes[2] < sizes[4]
    for free, tiles in (
        (2 * sizes[4], {4, kernels.UPSAMPLED}), (2 * sizes[4] - 1, {2}), (2 * sizes[2] - 1, set())
    ):  # fmt: skip
        monkeypatch.setattr(Plan, "free_bytes", lambda self, free=free: free)
        plan = build_plan(model, CPU, torch.float32)
        assert error(plan, model) < 1e-5
        assert {c.tile for c in convolutions(plan)} == tiles and plan.options.native_convolutions == bool(tiles)


def test_large_tiles_are_an_approximation(model):
    plan, large = build_plan(model, CPU, BFLOAT16), build_plan(model, CPU, BFLOAT16, large_tiles=True)
    assert error(plan, model) < error(large, model) < 4 * error(plan, model)
    assert 4 in {c.tile for c in convolutions(large)} and "large_tiles" in large.describe()["rewrites"]
    assert "large_tiles" not in plan.describe()["rewrites"]
    assert torch.equal(outputs(pickle.loads(pickle.dumps(large)), model), outputs(large, model))


def test_large_tiles_that_cannot_be(model, monkeypatch):
    with pytest.raises(UserError, match="approximation for bfloat16; float32 networks do without"):
        Pipeline(model, device="cpu", dtype="float32", large_tiles=True)
    with pytest.raises(UserError, match="large tiles need --plan fused"):
        Pipeline(model, device="cpu", dtype="bfloat16", plan="eager", large_tiles=True)
    monkeypatch.setattr(convolution, "has_amx", lambda: True)
    with pytest.raises(UserError, match="large tiles need native bfloat16 convolutions: AMX"):
        Pipeline(model, device="cpu", dtype="bfloat16", large_tiles=True)


def test_maps_come_from_the_plan_s_memory(model, monkeypatch):
    """Large ones; a second step allocates nothing, and what it returns is nobody else's."""
    monkeypatch.setattr(kernels.buffers, "LEAST", 1)
    plan = build_plan(model, CPU, torch.float32)
    expected = outputs(FusedPlan(model, CPU, torch.float32, Rewrites()), model)
    first = outputs(plan, model)
    held = plan._buffers.held()
    x, z = inputs(model)
    field = plan.field(z)
    kept = [field(x, t, True) for t in (400, 300, 200)]
    assert held > 0 and plan._buffers.held() <= 1.5 * held and torch.allclose(first, expected, atol=1e-4)
    assert torch.equal(torch.cat(kept[0]), first)
    assert not torch.equal(kept[0][0], kept[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["fp32", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(model, dtype):
    before, found = torch.get_num_threads(), []
    plan = build_plan(model, CPU, dtype)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outputs(plan, model))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


def test_two_pipelines_in_two_threads(model):
    """Each gives what it gives alone."""
    plans = [build_plan(model, CPU, dtype) for dtype in (torch.float32, BFLOAT16)]
    expected = [outputs(plan, model) for plan in plans]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            assert all(map(torch.equal, pool.map(lambda plan: outputs(plan, model), plans), expected))


def test_bfloat16_costs_a_reconstruction_next_to_nothing():
    """Of a bundled model that predicts eps, by the recipe with the fewest steps. Were x_t or eps rounded, it would cost
    more."""
    pdae = PDAE.from_pretrained("fashion32")
    x0, found = split_images("fashion32", pdae.image_shape, slice(8)), []
    for dtype in ("float32", "bfloat16"):
        pipe = Pipeline(pdae, "fast", device=CPU, dtype=dtype)
        found.append(float((pipe.reconstruct(x0) - x0).square().mean()))
    assert found[1] / found[0] < 1.1
