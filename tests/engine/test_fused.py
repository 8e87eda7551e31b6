"""Every rewrite against the modules it replaces, and the whole plan against the eager one."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch.nn import functional as F

from golden_rule import fill, relative
from helpers import ON_DEVICE, images, noise, tiny_pdae, tiny_prior
from pdae_fast import PDAEConfig, Pipeline, UNetConfig, UserError, kernels
from pdae_fast.engine import build_plan, rewrites
from pdae_fast.engine.blocks import SplitSkip
from pdae_fast.engine.convolution import PackedConvolution, PlainConvolution, can_pack
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.norms import Join, Skip, normalise, normalise_fused, normalise_native
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.models.layers import AttentionBlock, ResBlock, group_norm

CPU = torch.device("cpu")
NETWORKS = {
    "attention": {"channel_multiplier": (1, 2), "attention_resolutions": (2,), "num_heads": 4},
    "new-order": {
        "channel_multiplier": (1, 2),
        "attention_resolutions": (1, 2),
        "head_channel": 16,
        "use_new_attention_order": True,
    },
    "three-levels": {"channel_multiplier": (1, 2, 3), "num_residual_blocks_of_a_block": 2, "attention_resolutions": ()},
    "learned-sigma": {"channel_multiplier": (1, 1), "learn_sigma": True, "time_channel": 48},
    "one-level-colour": {"channel_multiplier": (1,), "input_channel": 3},
}


needs_native = pytest.mark.skipif(not kernels.native_status()[0], reason=kernels.native_status()[1])


def network(changes):
    unet = UNetConfig(**{"input_channel": 1, "base_channel": 32, "num_residual_blocks_of_a_block": 1, **changes})
    return tiny_pdae(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet))


OPTIONS = {
    "cpu": Rewrites(),
    "not-packed": Rewrites(packed_weights=False),
    "no-phases": Rewrites(phase_upsample=False),
    "neither": Rewrites(packed_weights=False, phase_upsample=False),
    "native": Rewrites(native_norms=True),
    "convolutions": Rewrites(native_norms=True, native_convolutions=True),
    "attention": Rewrites(native_attention=True),
    "convolutions-folded": Rewrites(packed_weights=False, kernels=True, folded_biases=True, native_convolutions=True),
    "native-split": Rewrites(native_norms=True, split_skips=True),
    "native-folded": Rewrites(
        packed_weights=False, kernels=True, split_skips=True, folded_biases=True, native_norms=True
    ),
    "cuda": ON_DEVICE,
    "cuda-without-kernels": Rewrites(packed_weights=False, phase_upsample=False, fused_update=True),
    **{
        f"cuda-without-{name}": dataclasses.replace(ON_DEVICE, **{name: False})
        for name in ("shared_statistics", "folded_biases", "fused_update")
    },
    "cuda-without-split_skips": dataclasses.replace(ON_DEVICE, split_skips=False, shared_statistics=False),
    "cuda-with-phases": dataclasses.replace(ON_DEVICE, phase_upsample=True),
}


@functools.cache
def computed(name):
    """A network, an input, what its modules make of that at three times, and their eps at one of them without z."""
    model = network(NETWORKS[name])
    x, z = noise(3, *model.image_shape), noise(3, 8, seed=1)
    eager = Plan(model, CPU, torch.float32)
    return model, x, z, {t: eager.field(z)(x, t, True) for t in (0, 17, 999)}, eager.field()(x, 17, True)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_computes_the_model(name, options):
    if options.native_norms and not kernels.native_status()[0]:
        pytest.skip(kernels.native_status()[1])
    if options.native_convolutions and not kernels.winograd_status()[0]:
        pytest.skip(kernels.winograd_status()[1])
    if options.native_attention and not kernels.attention_status()[0]:
        pytest.skip(kernels.attention_status()[1])
    model, x, z, expected, eps_alone = computed(name)
    plan = FusedPlan(model, CPU, torch.float32, options)
    assert plan.options == options  # nothing was switched off behind the test's back
    for t, pair in expected.items():
        found = plan.field(z)(x, t, True)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, pair, strict=True))
    eps, gradient = plan.field(z)(x, 17, False)
    assert gradient is None and relative(eps, eps_alone) < 1e-5
    assert plan.evaluations == {"trunk": 12, "eps": 12, "gradient": 9}


@pytest.mark.parametrize("options", [Rewrites(), ON_DEVICE], ids=["cpu", "cuda"])
@pytest.mark.parametrize("B", [1, 2])
def test_mixtures_share_the_trunk(B, options):
    model = network(NETWORKS["attention"])
    x, z = noise(B, *model.image_shape), noise(3, B, 8, seed=1)
    weights = torch.rand(3, B, generator=torch.Generator().manual_seed(2))
    plan, eager = FusedPlan(model, CPU, torch.float32, options), Plan(model, CPU, torch.float32)
    found, expected = (p.field(z, weights)(x, 400, True) for p in (plan, eager))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    assert plan.evaluations == eager.evaluations == {"trunk": B, "eps": B, "gradient": 3 * B}


def test_a_prior_alone():
    prior = tiny_prior()
    x = noise(2, 1, 32, 32)
    found, expected = (p(prior, CPU, torch.float32).field()(x, 9, True)[0] for p in (FusedPlan, Plan))
    assert relative(found, expected) < 1e-5


def test_bfloat16_is_no_worse_than_the_model_in_bfloat16():
    model = network(NETWORKS["three-levels"])
    x, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    exact = Plan(model, CPU, torch.float32).field(z)(x, 300, True)
    eager, plan = (p(model, CPU, torch.bfloat16).field(z)(x, 300, True) for p in (Plan, FusedPlan))
    for e, a, b in zip(exact, eager, plan, strict=True):
        assert b.dtype == torch.float32 and relative(b, e) < 1.1 * relative(a, e)


def test_loops_agree_over_many_steps():
    model, x0 = tiny_pdae(), images(2)
    fused, eager = (Pipeline(model, steps=50, device="cpu", plan=p) for p in ("fused", "eager"))
    z = eager.encode(x0)
    assert relative(fused.invert(x0, z), eager.invert(x0, z)) < 1e-4


def test_a_time_does_not_depend_on_what_else_was_prepared():
    """A product of one row is rounded otherwise than one of many, and long trajectories amplify that."""
    model, times = tiny_pdae(), [0, 7, *range(20, 900, 40), 999]
    plan = FusedPlan(model, CPU, torch.float32)
    together = plan.time_rows(times)
    for asked in (times[::-1], *([t] for t in times), times[3:12]):
        alone = FusedPlan(plan.model, CPU, torch.float32) if len(asked) > 1 else plan
        alone._times.clear()
        same = alone.time_rows(asked) == together[[times.index(t) for t in asked]]
        assert same.double().mean() > 0.999  # a double may fall between two floats


def test_the_model_is_left_alone():
    model = tiny_pdae()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Pipeline(model, steps=2, device="cpu", dtype="bfloat16").reconstruct(images(1))
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in model.state_dict().items())


def test_affine_table_is_adagn():
    blocks = [fill(ResBlock(UNetConfig(time_channel=24), 32, c, z_width=24)) for c in (32, 64)]
    table = rewrites.AffineTable(blocks)
    emb, emb_z, h = noise(1, 24), noise(2, 24, seed=1), {c: noise(2, c, 3, 3, seed=c) for c in (32, 64)}
    multiplier, addend = table.at_times(emb)
    scale, shift = table.of_codes(emb_z)
    for block, columns, c in zip(blocks, table.columns, (32, 64), strict=True):
        s_t, b_t = block.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        s_z, b_z = block.emb_z_layers(emb_z)[:, :, None, None].chunk(2, 1)
        expected = (1 + s_z) * (block.out_layers[0](h[c]) * (1 + s_t) + b_t) + b_z
        both = (scale * multiplier, scale * addend + shift)
        found = normalise(h[c], (both[0][:, columns], both[1][:, columns]))
        torch.testing.assert_close(found, F.silu(expected), atol=1e-5, rtol=1e-5)
        # Time alone: one affine for all images.
        time_only = normalise(h[c], (multiplier[:, columns], addend[:, columns]))
        torch.testing.assert_close(time_only, F.silu(block.out_layers[0](h[c]) * (1 + s_t) + b_t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_a_norm_reads_a_join_from_its_parts(shared, rows):
    h, skip, bias = noise(2, 40, 3, 5), noise(2, 24, 3, 5, seed=1) - 2.3, noise(40, seed=2)
    affine = noise(rows, 64, seed=3), noise(rows, 64, seed=4)
    joined = Join(h, Skip(skip, kernels.channel_stats(skip) if shared else None))
    expected = normalise(torch.cat([h + bias[:, None, None], skip], 1), affine)
    torch.testing.assert_close(normalise_fused(joined, affine, x_bias=bias), expected, atol=2e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_norms(last, rows, dtype):
    """Of one map, in place or not, and of a join; maps in the other layout go to the op."""
    layout = torch.channels_last if last else torch.contiguous_format
    h, skip = ((noise(2, c, 3, 5, seed=c) - 2.3).to(dtype).contiguous(memory_format=layout) for c in (40, 24))
    bias, affine = noise(40, seed=2), (noise(rows, 64, seed=3), noise(rows, 64, seed=4))
    exact = affine[0].double(), affine[1].double()
    truth = normalise(torch.cat([h.double() + bias.double()[:, None, None], skip.double()], 1), exact)
    found = normalise_native(Join(h, Skip(skip)), affine, x_bias=bias)
    assert found.dtype == dtype and relative(found, truth) < (1e-6 if dtype == torch.float32 else 5e-3)
    x = torch.cat([h, skip], 1)
    before, alone = x.clone(), normalise_native(x, affine)
    assert torch.equal(x, before)
    overwritten = normalise_native(x, affine, overwrite=True)
    assert torch.equal(overwritten, alone) and (overwritten is x or not last)
    truth = normalise(before.double(), exact)
    assert relative(alone, truth) < (1e-6 if dtype == torch.float32 else 5e-3)


@needs_native
def test_the_default_on_the_cpu_is_native():
    model = network(NETWORKS["attention"])
    plan = build_plan(model, CPU, torch.float32)
    assert plan.options.native_norms and "native_norms" in plan.describe()["rewrites"]
    assert plan.describe()["native_norms"] == kernels.native_status()[1]
    off = FusedPlan(model, CPU, torch.float32, Rewrites())
    assert "native_norms" not in off.describe()
    half = FusedPlan(model, CPU, torch.float16)
    assert not half.options.native_norms and half.describe()["native_norms"] == "no: none for torch.float16"


def test_without_native_code_the_framework_runs(monkeypatch):
    for name in ("native_status", "winograd_status", "attention_status"):
        monkeypatch.setattr(kernels, name, lambda: (False, "no C compiler: cc not found"))
    model, x, z = network(NETWORKS["attention"]), noise(2, 1, 32, 32), noise(2, 8, seed=1)
    plan = build_plan(model, CPU, torch.float32)
    assert plan.options == Rewrites()
    for name in ("native_norms", "native_convolutions", "native_attention"):
        assert plan.describe()[name] == "no: no C compiler: cc not found"
    found, expected = (p.field(z)(x, 17, True) for p in (plan, Plan(model, CPU, torch.float32)))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_the_skip_convolution_of_a_join_is_a_sum():
    layer = fill(torch.nn.Conv2d(40, 8, 1))
    h, skip = (noise(2, c, 3, 5, seed=c).contiguous(memory_format=torch.channels_last) for c in (24, 16))
    with torch.no_grad():
        expected = layer(torch.cat([h, skip], 1))
        found, alone = SplitSkip(layer)(Join(h, Skip(skip))), SplitSkip(layer)(torch.cat([h, skip], 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("H", "W"), [(4, 4), (1, 5), (3, 2)])
def test_phase_convolutions_equal_upsampling_first(H, W):
    weight, bias, x = noise(6, 5, 3, 3), noise(6, seed=1), noise(2, 5, H, W, seed=2)
    phases = rewrites.phase_weights(weight)
    convolutions = [[PlainConvolution(phases[py, px], bias, padding=1) for px in (0, 1)] for py in (0, 1)]
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    torch.testing.assert_close(rewrites.upsample_conv(x, convolutions), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_on_tokens(new_order):
    block, x = fill(AttentionBlock(64, 4, group_norm(64), new_order)), noise(2, 64, 3, 5)
    with torch.no_grad():
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(rewrites.attention_tokens(block, last, block.norm), block(x), atol=1e-5, rtol=1e-5)
        projections = tuple(
            PlainConvolution(layer.weight[..., None], layer.bias) for layer in (block.qkv, block.proj_out)
        )
        found = rewrites.attention_tokens(block, last, block.norm, projections=projections)
        torch.testing.assert_close(found, block(x), atol=1e-5, rtol=1e-5)


# Narrow and wide groups, small and large maps, one affine for all images or one for each.
@pytest.mark.parametrize(("C", "side"), [(32, 5), (96, 8), (512, 4), (32, 32), (160, 16), (256, 17)])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_norm_with_affines(C, side, B, own, dtype):
    n = B if own else 1
    x, multiplier, addend = (noise(B, C, side, side) - 2.3).to(dtype), noise(n, C, seed=1), noise(n, C, seed=2)
    x = x.contiguous(memory_format=torch.channels_last)
    found = rewrites.group_norm(x, multiplier, addend)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    expected = F.group_norm(x.double(), 32) * multiplier.double()[..., None, None] + addend.double()[..., None, None]
    assert relative(found, expected) < (3e-6 if dtype == torch.float32 else 3e-3)


def test_time_embeddings_for_a_whole_schedule():
    unet, times = tiny_prior().unet, torch.tensor([0, 5, 999])
    with torch.no_grad():
        torch.testing.assert_close(rewrites.time_embeddings(unet, times), unet.trunk(noise(3, 1, 32, 32), times).emb)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (2, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_convolutions(kernel, stride, padding, dtype):
    if not can_pack(CPU, dtype):
        pytest.skip(f"oneDNN packs nothing of {dtype} here")
    weight, bias = noise(48, 32, kernel, kernel).to(dtype), noise(48, seed=1).to(dtype)
    conv = PackedConvolution(weight, bias, stride, padding)
    for B, side in ((1, 8), (3, 8), (2, 5)):  # the layout is chosen for the first and must serve the others
        x = noise(B, 32, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        expected = F.conv2d(x.float(), weight.float(), bias.float(), stride, padding)
        residual = noise(*expected.shape, seed=4).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            assert relative(conv(x), expected) < (1e-6 if dtype == torch.float32 else 5e-3)
            kept = residual.clone()
            assert relative(conv(x, residual), expected + residual) < (1e-6 if dtype == torch.float32 else 5e-3)
            assert torch.equal(residual, kept)  # a skip connection's map is read again by the other decoder


def test_unknown_plan():
    with pytest.raises(UserError, match="expected auto, eager or fused"):
        build_plan(tiny_prior(), CPU, torch.float32, "magic")
    with pytest.raises(UserError, match="attention 'magic' is not known; expected auto, sdpa, xformers"):
        build_plan(tiny_prior(), CPU, torch.float32, attention="magic")
    with pytest.raises(UserError, match="attention xformers cannot be used: xformers "):
        build_plan(tiny_pdae(), CPU, torch.float32, attention="xformers")
    with pytest.raises(UserError, match="needs --plan fused"):
        build_plan(tiny_prior(), CPU, torch.float32, "eager", attention="xformers")
    assert build_plan(tiny_prior(), CPU, torch.float32).name == "fused"


@pytest.mark.skipif(not kernels.winograd_status()[0], reason=kernels.winograd_status()[1])
def test_transformed_weights_are_awaited_once_and_copied():
    model, x = network(NETWORKS["three-levels"]), noise(2, 1, 32, 32)
    options = Rewrites(packed_weights=False, native_convolutions=True)
    plan = FusedPlan(model, CPU, torch.float32, options)
    before, copied = plan.awaited_bytes(), copy.deepcopy(plan)
    assert before > 4 * sum(c.weight.nbytes for c in model.decoder.modules() if isinstance(c, torch.nn.Conv2d)) // 2
    found = plan.field()(x, 17, False)[0]
    assert plan.awaited_bytes() == plan.reusing(plan.reuse).awaited_bytes() == 0
    assert copied.awaited_bytes() == 0 < before  # copies share the weights
    for other in (copied, copy.deepcopy(plan)):
        assert torch.equal(other.field()(x, 17, False)[0], found)


@pytest.mark.skipif(not kernels.winograd_status()[0], reason=kernels.winograd_status()[1])
def test_weights_that_would_fill_the_memory_are_not_transformed(monkeypatch):
    monkeypatch.setattr(Plan, "free_bytes", lambda self: 2 << 20)
    plan = FusedPlan(network(NETWORKS["three-levels"]), CPU, torch.float32, Rewrites(native_convolutions=True))
    assert plan.options == Rewrites() and plan.awaited_bytes() == 0
    assert plan.describe()["native_convolutions"].endswith("MiB, and 2 MiB are free")


def test_a_native_op_that_is_switched_off_is_not_compiled(monkeypatch):
    def compiled():
        raise AssertionError("asked for its status, which compiles it")

    monkeypatch.setattr(kernels, "winograd_status", compiled)
    options = Rewrites(native_norms=True).usable_on(torch.device("cpu"), torch.float32)
    assert not options.native_convolutions
    assert options.native_notes(torch.device("cpu"), torch.float32).keys() == {"native_norms"}
