"""The modules that are traced, run by PyTorch, against the model they stand for."""

import dataclasses

import pytest
import torch
from torch import nn

from flavours import BASE, FLAVOURS, PREDICTIONS
from golden_rule import relative
from helpers import TINY, images, tiny_pdae, tiny_prior
from pdae_fast import UNetConfig, UserError
from pdae_fast.export.graphs import NORMS, FixedNorm, Norm, build_graphs, conditioning_width
from pdae_fast.samplers.ddim import ddim_step
from pdae_fast.schedule import build_schedule

# Attention in the trunk, three levels, a learned variance, the new layout of heads given by their width.
DEEP = dataclasses.replace(
    TINY,
    unet=UNetConfig(
        input_channel=3,
        base_channel=32,
        channel_multiplier=(1, 2, 2),
        num_residual_blocks_of_a_block=2,
        attention_resolutions=(4,),
        head_channel=16,
        use_new_attention_order=True,
        learn_sigma=True,
        time_channel=48,
    ),
)


def graphs_of(model, form="group", dtype=torch.float32, steps=4, encode_steps=6):
    return build_graphs(model, build_schedule(model.config.schedule), steps, encode_steps, dtype, form)


def expected_step(model, x, z, step):
    times = torch.full((len(x),), step.t)
    with torch.no_grad():
        eps, gradient = (model(x, times), None) if z is None else model(x, times, z)
    return ddim_step(x, eps, gradient, step.alpha_bar, step.alpha_bar_next)


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("config", [TINY, DEEP], ids=["tiny", "deep"])
@torch.no_grad()
def test_every_step_is_that_of_the_model(config, form):
    model = tiny_pdae(config)
    schedule = build_schedule(config.schedule)
    graphs = graphs_of(model, form)
    x0 = images(3, config)
    z = model.encode(x0)
    assert relative(graphs["encoder"](x0), z) < 1e-6
    conditioning = graphs["conditioning"](z)
    assert conditioning.shape == (3, 2, conditioning_width(model))
    for name, trajectory in (("decode_step", schedule.decoding(4)), ("invert_step", schedule.inversion(6))):
        for i, step in enumerate(trajectory):
            out = graphs[name](x0, conditioning, torch.tensor([i]))
            expected = expected_step(model, x0, z, step)
            assert relative(out - x0, expected - x0) < 2e-5
            assert out.dtype == torch.float32 and out.shape == x0.shape
            # The error must not hide behind x: without G the result is somewhere else.
            without = expected_step(model, x0, z * 0, step)
            assert relative(without - x0, expected - x0) > 1e-3


@torch.no_grad()
def test_a_prior_alone():
    prior, schedule = tiny_prior(DEEP), build_schedule(DEEP.schedule)
    graphs = graphs_of(prior)
    assert list(graphs) == ["decode_step", "invert_step"] and conditioning_width(prior) is None
    x = images(2, DEEP)
    out = graphs["invert_step"](x, torch.tensor([2]))
    assert relative(out - x, expected_step(prior, x, None, schedule.inversion(6)[2]) - x) < 2e-5


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("changes", FLAVOURS.values(), ids=FLAVOURS)
@torch.no_grad()
def test_every_flavour(changes, form):
    config = dataclasses.replace(TINY, unet=UNetConfig(**{**BASE, **changes}))
    model = tiny_pdae(config)
    x, z = images(2, config), torch.randn(2, config.latent_dim, generator=torch.Generator().manual_seed(1))
    graphs, step = graphs_of(model, form), build_schedule(config.schedule).decoding(4)[1]
    out = graphs["decode_step"](x, graphs["conditioning"](z), torch.tensor([1]))
    assert relative(out - x, expected_step(model, x, z, step) - x) < 2e-5


@pytest.mark.parametrize("settings", PREDICTIONS.values(), ids=PREDICTIONS)
@torch.no_grad()
def test_every_prediction(settings):
    config = dataclasses.replace(TINY, **settings)
    prior = tiny_prior(config)
    x, schedule = images(2, config), build_schedule(config.schedule)
    graph = graphs_of(prior)["decode_step"]
    for i, step in enumerate(schedule.decoding(4)):
        out = graph(x, torch.tensor([i]))
        # Where little signal is left, x0 is a small difference of x and eps: rounding counts 1 / sqrt(alpha_bar) times.
        bound = 2e-5 * max(1, 0.02 / step.alpha_bar**0.5)
        assert relative(out - x, expected_step(prior, x, None, step) - x) < bound


@torch.no_grad()
def test_a_label_is_part_of_the_graph():
    config = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, num_classes=4, use_scale_shift_norm=False))
    prior, x, schedule = tiny_prior(config), images(2, config), build_schedule(config.schedule)
    found = build_graphs(prior, schedule, 4, 4, torch.float32, "group", label=3)["decode_step"](x, torch.tensor([0]))
    step = schedule.decoding(4)[0]
    eps = prior(x, torch.full((2,), step.t), torch.tensor([3, 3]))
    expected = ddim_step(x, eps, None, step.alpha_bar, step.alpha_bar_next)
    assert relative(found - x, expected - x) < 2e-5
    with pytest.raises(UserError, match="class-conditional"):
        build_graphs(prior, schedule, 4, 4, torch.float32, "group")


@torch.no_grad()
def test_each_image_gets_its_own_conditioning():
    model = tiny_pdae()
    graph = graphs_of(model)["decode_step"]
    conditioning = graphs_of(model)["conditioning"](model.encode(images(2)))
    x, step = images(1).expand(2, -1, -1, -1), torch.tensor([1])
    out = graph(x, conditioning, step)
    assert relative(out[0], out[1]) > 1e-3
    assert relative(graph(x[:1], conditioning[1:], step), out[1:]) < 3e-6


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (1, 32, 1, 3), (3, 96, 16, 16)], ids=str)
@torch.no_grad()
def test_norms_on_biased_inputs_against_float64(form, shape):
    """Both forms, shared and per-image affines, on inputs whose mean is far from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 0.5 - 2.3
    N, C = shape[:2]
    normal = nn.functional.group_norm(x.double(), 32)
    for affine in ((C,), (N, C)):
        multiplier, addend = torch.randn(2, *affine, generator=generator)
        expected = normal * multiplier.double()[..., None, None] + addend.double()[..., None, None]
        assert relative(Norm(nn.GroupNorm(32, C), form)(x, multiplier, addend), expected) < 2e-6
    layer = nn.GroupNorm(32, C)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    half = x.half()
    out = FixedNorm(layer, form)(half)
    # Computed and returned in float32: nothing is lost but what half precision lost before.
    assert out.dtype == torch.float32
    assert relative(out, copy_double(layer)(half.double())) < 2e-6


def copy_double(layer):
    twin = nn.GroupNorm(32, layer.num_channels).double()
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_keeps_norms_and_tables_in_float32(dtype):
    model = tiny_pdae()
    graphs = graphs_of(model, dtype=dtype)
    step = graphs["decode_step"]
    for module in [*step.modules(), *graphs["encoder"].modules()]:
        if isinstance(module, nn.Conv2d):
            assert module.weight.dtype == dtype
        if isinstance(module, FixedNorm):
            assert module.weight.dtype == torch.float32
    assert step.rows.dtype == step.coefficients.dtype == torch.float32
    # Taken from the weights before they were rounded.
    assert torch.equal(step.rows, graphs_of(model)["decode_step"].rows)
    assert {p.dtype for p in graphs["conditioning"].parameters()} == {torch.float32}


def test_the_model_is_left_alone():
    model = tiny_pdae()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graphs_of(model, dtype=torch.float16)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
