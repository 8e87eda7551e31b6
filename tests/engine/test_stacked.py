"""Both decoders as one on twice the images: the same numbers as the modules, by fewer launches."""

import contextlib
import dataclasses

import pytest
import torch

from golden_rule import relative
from helpers import ON_DEVICE, TINY_UNET, Calls, noise, tiny_pdae, tiny_prior
from pdae_fast import PDAEConfig, kernels, presets
from pdae_fast.engine import blocks, norms
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.samplers import ddim
from pdae_fast.samplers.reuse import Reuse
from pdae_fast.schedule import build_schedule

CPU = torch.device("cpu")
STACKED = dataclasses.replace(ON_DEVICE, shared_products=True, stacked_decoders=True)
APART = dataclasses.replace(STACKED, stacked_decoders=False)


def narrow(name, **changes):
    """The preset of one channel multiple: its levels, blocks and attentions, on small maps."""
    unet = dataclasses.replace(presets[name].unet, base_channel=32, time_channel=None, **changes)
    return PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet)


def tiny(**changes):
    unet = dataclasses.replace(TINY_UNET, **changes)
    return PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet)


CONFIGS = {
    "celeba64": narrow("celeba64"),
    "ffhq128": narrow("ffhq128", num_residual_blocks_of_a_block=1),
    "fashion32": tiny(channel_multiplier=(1, 2)),
    "attention": tiny(channel_multiplier=(1, 2), attention_resolutions=(1, 2), num_heads=2),
    "new-order": tiny(
        channel_multiplier=(1, 2), attention_resolutions=(2,), head_channel=16, use_new_attention_order=True
    ),
    "time-added": tiny(channel_multiplier=(1, 2), use_scale_shift_norm=False),
    "learned-sigma": tiny(channel_multiplier=(1, 1), learn_sigma=True),
}


def build(config, options=STACKED, dtype=torch.float32):
    model = tiny_pdae(config)
    plan = FusedPlan(model, CPU, dtype, options)
    assert plan.options == options and (plan._stacked is not None) == options.stacked_decoders
    return model, plan


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_numbers(monkeypatch, config, B):
    monkeypatch.setattr(
        kernels, "stats_splits", lambda batch, pixels, device: 2 if batch < 4 and pixels % 2 == 0 else 1
    )
    monkeypatch.setattr(norms, "SMALL_GROUP", 0)  # every statistic that is known is used
    monkeypatch.setattr(blocks, "SMALL_GROUP", 0)
    model, plan = build(config)
    x, z = noise(B, *model.image_shape), noise(B, model.config.latent_dim, seed=1)
    eager = Plan(model, CPU, torch.float32)
    for t in (0, 17, 999):
        found, expected = plan.field(z)(x, t, True), eager.field(z)(x, t, True)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    eps, gradient = plan.field(z)(x, 17, False)
    assert gradient is None and relative(eps, eager.field()(x, 17, True)[0]) < 1e-5
    assert plan.evaluations == {"trunk": 4 * B, "eps": 4 * B, "gradient": 3 * B}


@pytest.mark.parametrize("options", [STACKED, APART], ids=["stacked", "apart"])
def test_last_convolutions_in_bfloat16(options):
    """They leave float32, each network its own."""
    model, plan = build(CONFIGS["fashion32"], options, torch.bfloat16)
    x, z = noise(2, *model.image_shape), noise(2, model.config.latent_dim, seed=1)
    expected = Plan(model, CPU, torch.float32).field(z)(x, 17, True)
    for found, exact in zip(plan.field(z)(x, 17, True), expected, strict=True):
        assert relative(found, exact) < 0.02 and not torch.equal(found, found.bfloat16().float())


def test_fewer_launches():
    """Of both decoders, norms and additions are those of one."""
    config, counts = CONFIGS["attention"], []
    for options in (STACKED, APART):
        model, plan = build(config, options)
        field, x = plan.field(noise(2, 8)), noise(2, *model.image_shape)
        field(x, 17, True)  # makes the time tables
        with Calls() as calls:
            field(x, 17, True)
        norms_and_sums = ("group_norm", "group_norm_apply", "add_with_stats", "residual_add", "upsample_add")
        of_a_decoder = sum(type(m).__name__ == "ResBlock" for m in model.decoder.shift_output_blocks.modules())
        counts.append([calls.names.count(name) for name in norms_and_sums] + [of_a_decoder])
    (*stacked, blocks_of_one), (*apart, _) = counts
    assert sum(apart) - sum(stacked) > 3 * blocks_of_one


def test_convolutions_side_by_side(monkeypatch):
    """The other half is queued on the side stream, after it has waited and before it is waited for."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    main, side = Stream("main"), Stream("side")

    @contextlib.contextmanager
    def stream(found):
        events.append(f"on {found.name}")
        yield
        events.append("back")

    into = kernels.convolution_into
    monkeypatch.setattr(kernels, "convolution_into", lambda *args: (events.append("convolution"), into(*args)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    model, plan = build(CONFIGS["fashion32"])
    x, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    expected = plan.field(z)(x, 17, True)
    alone, events[:] = len(events), []
    plan._side = side
    found = plan.field(z)(x, 17, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    pair = ["side waits for main", "on side", "convolution", "back", "convolution", "main waits for side"]
    assert alone > 10 and events == pair * (alone // 2)
    events.clear()
    monkeypatch.setattr("pdae_fast.engine.networks.PARALLEL_PIXELS", 2 * 32 * 32 - 1)
    plan.field(z)(x, 17, True)
    assert events == ["convolution"] * alone


def test_a_convolution_into_a_half():
    x, weight = noise(3, 8, 9, 7).contiguous(memory_format=torch.channels_last), noise(6, 8, 3, 3)
    for stride, padding in ((1, 1), (2, 1), (1, 0)):
        expected = torch.nn.functional.conv2d(x, weight, None, stride, padding)
        whole = torch.full((6, *expected.shape[1:]), 7.0).contiguous(memory_format=torch.channels_last)
        kernels.convolution_into(x, weight, whole[3:], stride, padding)
        assert torch.equal(whole[3:], expected) and bool((whole[:3] == 7).all())
    with pytest.raises(ValueError, match="out must be torch.float32"):
        kernels.convolution_into(x, weight, whole[2:], 1, 0)


def test_what_is_not_stacked_is_right():
    """Mixtures, a G that is left out or kept, deep maps that are kept, and priors."""
    model, plan = build(CONFIGS["attention"])
    apart, eager = FusedPlan(model, CPU, torch.float32, APART), Plan(model, CPU, torch.float32)
    x, z = noise(2, *model.image_shape), noise(3, 2, 8, seed=1)
    weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
    found, expected = (p.field(z, weights)(x, 400, True) for p in (plan, eager))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    schedule = build_schedule(model.config.schedule)
    for spec in ("gradient:2", "trunk:2", "deep:2:2", "window:200-700"):
        one, two = (ddim.ddim(p.reusing(Reuse.parse(spec)).field(z[0]), x, schedule, 6) for p in (plan, apart))
        assert relative(one, two) < 1e-4
    prior = tiny_prior()
    found, expected = (p.field()(noise(2, 1, 32, 32), 9, True)[0] for p in (
        FusedPlan(prior, CPU, torch.float32, STACKED), Plan(prior, CPU, torch.float32)
    ))  # fmt: skip
    assert relative(found, expected) < 1e-5


def test_a_step_on_the_device_with_and_without_g():
    """The whole loop of a trajectory, G stopping on the way."""
    model, plan = build(CONFIGS["time-added"])
    x, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    schedule, eager = build_schedule(model.config.schedule), Plan(model, CPU, torch.float32)
    found, expected = (ddim.ddim(p.field(z), x, schedule, 8, stop_percent=0.4) for p in (plan, eager))
    assert relative(found, expected) < 1e-4
    assert plan.evaluations["gradient"] < plan.evaluations["eps"]


def test_decoders_that_differ_run_apart():
    """G is the paper's whatever the prior is: one whose maps are upsampled by a convolution has other layers."""
    model = tiny_pdae(tiny(channel_multiplier=(1, 2), upsample="conv"))
    plan = FusedPlan(model, CPU, torch.float32, STACKED)
    assert plan._stacked is None and plan.options == APART
    x, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    found, expected = (p.field(z)(x, 17, True) for p in (plan, Plan(model, CPU, torch.float32)))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_what_it_needs():
    for change in ({"shared_products": False}, {"folded_biases": False}, {"phase_upsample": True}):
        assert not dataclasses.replace(STACKED, **change).usable_on(CPU, torch.float32).stacked_decoders
    assert not Rewrites.for_device(CPU).stacked_decoders
