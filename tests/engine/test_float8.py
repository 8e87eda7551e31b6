"""fp8: rounding, scales, what they are refused for, and plans that run it."""

import copy
import dataclasses
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from golden_rule import fill, relative
from helpers import ON_DEVICE, TINY, images, noise, tiny_pdae, tiny_prior
from pdae_fast import DiffAE, DiffAEConfig, PDAEConfig, Pipeline, UNetConfig, kernels
from pdae_fast.engine import build_plan, float8
from pdae_fast.engine.convolution import WinogradConvolution
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.options import Rewrites
from pdae_fast.engine.plan import Plan
from pdae_fast.errors import UserError
from pdae_fast.experiments.calibrate import calibrate
from pdae_fast.models import unet_of
from pdae_fast.models.layers import ResBlock

CPU = torch.device("cpu")


def code(bits):
    """The value of an e4m3 code: a sign, four bits of exponent (bias 7) and three of mantissa, no infinities."""
    exponent, mantissa = bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if bits & 128 else value


CODES = np.array([code(bits) for bits in range(127)])  # from 0 to 448, ascending


def e4m3(x):
    """float64 array -> the nearest code, the even one of two, of at most 448."""
    size = np.minimum(np.abs(x), CODES[-1])
    above = np.clip(np.searchsorted(CODES, size), 1, len(CODES) - 1)
    low, high = size - CODES[above - 1], CODES[above] - size
    down = (low < high) | ((low == high) & (above % 2 == 1))
    return np.sign(x) * np.where(down, CODES[above - 1], CODES[above])


def power_of_two(largest):
    """The smallest that brings ``largest`` to at most 448."""
    return next(2.0**k for k in itertools.count(-60) if largest <= 448 * 2.0**k)


def rounded64(x, largest):
    """float64 tensor, by the codes above; of float32 values, as everywhere."""
    scale = power_of_two(largest)
    return torch.from_numpy(e4m3(x.float().double().numpy() / scale) * scale)


@pytest.fixture(scope="module")
def model():
    unet = UNetConfig(
        input_channel=1, base_channel=32, channel_multiplier=(1, 2), num_residual_blocks_of_a_block=1,
        attention_resolutions=(2,),
    )  # fmt: skip
    return tiny_pdae(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet))


@pytest.fixture(scope="module")
def scales(model):
    plan = Plan(model, CPU, torch.float32)
    with float8.watched(plan.unet) as largest:
        outputs(plan, model)
    return float8.calibration(model, largest)


def outputs(plan, model, count=2, t=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.image_shape, generator=generator)
    z = torch.randn(2, model.config.latent_dim, generator=generator)
    return torch.cat(plan.field(z[:count])(x[:count], t, True))


def test_rounding_is_that_of_e4m3():
    assert len(set(CODES)) == 127 and CODES[-1] == 448 and CODES[1] == 2.0**-9 and math.isnan(code(127))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(every, [code(bits) for bits in range(256)], equal_nan=True)
    middles = (CODES[1:] + CODES[:-1]) / 2
    random = np.random.default_rng(0)
    values = random.standard_normal(4096) * 2.0 ** random.integers(-12, 10, 4096)
    values = np.concatenate([CODES, middles, np.nextafter(middles, 0, dtype=np.float32), values]).astype(np.float32)
    values = np.concatenate([values, -values])
    for scale in (1.0, 2.0**-7, 2.0**5):
        found = float8.rounded(torch.from_numpy(values * np.float32(scale)), scale)
        assert np.array_equal(found.double().numpy(), e4m3(values.astype(np.float64)) * scale)


def test_what_is_too_large_becomes_448_and_NaN_stays():
    x = torch.tensor([449.0, 464.0, 480.0, 1e30, float("inf"), -float("inf"), float("nan")])
    found = float8.rounded(x, 1.0)
    assert found[:-1].tolist() == [448.0] * 5 + [-448.0] and bool(found[-1].isnan())
    assert float8.rounded(x, 0.5)[0] == 224


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_values_are_numbers_of_every_dtype(dtype):
    """So that what is computed in it is computed of fp8 values."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = float8.rounded(x, 2.0**-6)
    assert found.dtype is dtype
    assert np.array_equal(found.double().numpy(), e4m3(x.double().numpy() * 64) / 64)


def test_scales_are_the_smallest_powers_of_two():
    for largest in (448.0, 447.9, 448.1, 224.0, 225.0, 1.0, 0.013, 300.0, 1e5, 896.0):
        assert float(float8.scale_for(torch.tensor(largest))) == power_of_two(np.float32(largest))
    assert float(float8.scale_for(torch.zeros(()))) == power_of_two(1e-6)  # a layer that has read nothing


@pytest.mark.parametrize("upsample", [False, True])
def test_a_convolution_is_one_of_rounded_values(upsample):
    random = torch.Generator().manual_seed(2)
    layer = nn.Conv2d(32, 48, 3, padding=1)
    # Channels of very different sizes, whose scales are their own.
    layer.weight.data = torch.randn(48, 32, 3, 3, generator=random) * torch.logspace(-3, 2, 48)[:, None, None, None]
    x = torch.randn(2, 32, 16, 16, generator=random).mul_(3).contiguous(memory_format=torch.channels_last)
    weight = torch.stack([rounded64(w, float(w.abs().max())) for w in layer.weight.detach()])
    map64 = rounded64(x, 9.0)
    if upsample:
        map64 = F.interpolate(map64, scale_factor=2, mode="nearest")
    expected = F.conv2d(map64, weight, layer.bias.detach().double(), padding=1)
    eight = float8.Float8Conv2d(layer, 9.0)
    runs = [lambda x: eight(F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x)]
    if kernels.winograd_status()[0]:
        own = WinogradConvolution(eight.weight.detach(), eight.bias.detach(), upsample)
        runs.append(float8.reading(eight, own))
    for run in runs:
        found = run(x).detach().double()
        # Every channel apart: each has a scale.
        apart, size = (v.square().sum((0, 2, 3)).sqrt() for v in (found - expected, expected))
        assert float((apart / size).max()) < 1e-5
    exact = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert upsample or 1e-3 < relative(eight(x), exact) < 0.1


def test_which_layers(model):
    layers = float8.float8_layers(model.decoder)
    assert all(layer.kernel_size == (3, 3) and layer.stride == (1, 1) for layer in layers.values())
    every = {name: m for name, m in model.decoder.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3}
    assert set(every) - set(layers) == {"input_blocks.0.0", "out.2", "shift_out.2"}


def independent(model, largest):
    """float64 modules whose weights are rounded, and whose maps are by hooks."""
    model = copy.deepcopy(model).double().eval()
    for name, layer in float8.float8_layers(unet_of(model)).items():
        layer.weight.data = torch.stack([rounded64(w, float(w.abs().max())) for w in layer.weight.detach()])
        layer.register_forward_pre_hook(lambda _, arguments, top=largest[name]: (rounded64(arguments[0], top),))
    return model


def test_a_step_is_one_of_rounded_values(model, scales):
    """In float64, where no value is near enough to the middle of two codes to fall to the other side."""
    plan = build_plan(model, CPU, torch.float64, "eager", fp8=scales)
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, *model.image_shape, generator=generator), torch.randn(2, 8, generator=generator)
    t = torch.full((2,), 400)
    with torch.no_grad():
        truth = independent(model, scales["largest"])
        features = truth.decoder.trunk(x.double(), t)
        expected = torch.cat([truth.decoder.decode_eps(features), truth.decoder.decode_gradient(features, z.double())])
    found = torch.cat(plan.field(z.double())(x.double(), 400, True))
    exact = outputs(Plan(model, CPU, torch.float64), model)
    assert relative(found, expected) < 1e-5 < 1e-3 < relative(found, exact) < 0.1


@pytest.fixture(scope="module")
def diffae():
    unet = UNetConfig(
        input_channel=1, base_channel=32, channel_multiplier=(1, 2), num_residual_blocks_of_a_block=1,
        attention_resolutions=(2,), time_channel=32,
    )  # fmt: skip
    model = fill(DiffAE(DiffAEConfig(32, 8, unet, (1, 2))))
    pipe = Pipeline(model, device="cpu", dtype="float32", plan="eager", steps=2)
    return model, float8.calibration(model, calibrate(pipe, images(2), range(2)))


def test_a_step_of_a_diffae_is_one_of_rounded_values(diffae):
    """Calibrated as the command does it."""
    model, scales = diffae
    x, z, t = noise(2, 1, 32, 32).double(), noise(2, 8, seed=1).double(), torch.full((2,), 400)
    with torch.no_grad():
        expected, exact = independent(model, scales["largest"])(x, t, z), copy.deepcopy(model).double()(x, t, z)
    found, gradient = build_plan(model, CPU, torch.float64, "eager", fp8=scales).field(z)(x, 400, True)
    assert gradient is None and relative(found, expected) < 1e-5 < 1e-3 < relative(found, exact) < 0.1


@pytest.fixture
def smooth(monkeypatch):
    """Something smooth in the place of rounding, whose steps turn the last bit of a value into fp8's error."""
    monkeypatch.setattr(float8, "rounded", lambda x, scale: (x / scale / 50).tanh() * 50 * scale)


OPTIONS = {"default": None, "framework": Rewrites(), "plain": Rewrites(packed_weights=False), "cuda": ON_DEVICE}
CODED = dataclasses.replace(ON_DEVICE, float8=True)
STACKED = dataclasses.replace(ON_DEVICE, shared_products=True, stacked_decoders=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_fused_plan_rounds_what_the_modules_round(model, scales, options, smooth):
    eight = float8.in_float8(model, scales)
    expected = outputs(Plan(eight, CPU, torch.float32), model)
    found = outputs(FusedPlan(eight, CPU, torch.float32, options), model)
    assert relative(found, expected) < 1e-4
    assert relative(found, outputs(Plan(model, CPU, torch.float32), model)) > 1e-3


def smooth_codes(x, scale):
    """What stands for rounding in `smooth`, before it is multiplied by the scale again."""
    return (x / scale / 50).tanh() * 50


@pytest.fixture
def coded(monkeypatch):
    """Codes that are no codes but as smooth as above; of weights, which are rounded already, what they stand for."""
    monkeypatch.setattr(float8, "rounded", lambda x, scale: smooth_codes(x, scale) * scale)
    monkeypatch.setattr(kernels, "float8_codes", lambda x, scale: x / scale)
    monkeypatch.setattr(kernels.float8, "float8_codes", smooth_codes)


@pytest.mark.parametrize("share", [True, False])
def test_a_plan_by_codes_multiplies_what_the_modules_round(model, scales, monkeypatch, coded, share):
    """Its norms and convolutions by torch's operators."""
    eight = float8.in_float8(model, scales)
    expected = outputs(Plan(eight, CPU, torch.float32), model)
    made = []
    monkeypatch.setattr(float8, "CodedConvolution", lambda *a, cls=float8.CodedConvolution: made.append(a) or cls(*a))
    plan = FusedPlan(eight, CPU, torch.float32, dataclasses.replace(CODED, shared_statistics=share))
    plan._cache = 0  # every skip's statistics are computed apart
    assert relative(outputs(plan, model), expected) < 1e-4
    pooled = sum(b.resample == "down" for b in model.decoder.modules() if isinstance(b, ResBlock))
    assert pooled and len(made) == len(float8.float8_layers(model.decoder)) - pooled
    assert {upsample for _, upsample in made} == {True, False}


@pytest.mark.parametrize("options", [ON_DEVICE, CODED, None], ids=["emulated", "codes", "default"])
def test_the_fused_plan_of_a_diffae_rounds_what_the_modules_round(diffae, coded, options):
    model, scales = diffae
    eight, x, z = float8.in_float8(model, scales), noise(2, 1, 32, 32), noise(2, 8, seed=1)
    expected, found, exact = (
        plan.field(z)(x, 400, True)[0]
        for plan in (
            Plan(eight, CPU, torch.float32), FusedPlan(eight, CPU, torch.float32, options),
            Plan(model, CPU, torch.float32),
        )
    )  # fmt: skip
    assert relative(found, expected) < 1e-4 < 1e-3 < relative(found, exact)


@pytest.mark.parametrize("by_codes", [False, True], ids=["emulated", "codes"])
@pytest.mark.parametrize("B", [1, 2])
def test_stacked_decoders_round_as_each_does(model, scales, coded, by_codes, B):
    """By its own scales: here those of G are eight times as large."""
    largest = {name: size * (8 if "shift" in name else 1) for name, size in scales["largest"].items()}
    eight = float8.in_float8(model, float8.calibration(model, largest))
    stacked, apart = (
        FusedPlan(eight, CPU, torch.float32, dataclasses.replace(STACKED, float8=by_codes, stacked_decoders=both))
        for both in (True, False)
    )
    assert stacked.options.stacked_decoders and stacked._stacked is not None and apart._stacked is None
    expected = outputs(apart, model, B)
    assert relative(outputs(stacked, model, B), expected) < 1e-5
    one = outputs(FusedPlan(float8.in_float8(model, scales), CPU, torch.float32, apart.options), model, B)
    assert relative(one, expected) > 1e-3  # a scale that is another's shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_by_codes_loses_what_emulation_loses(model, scales, dtype):
    exact = outputs(Plan(model, CPU, torch.float64), model)
    eight = float8.in_float8(model, scales)
    coded, emulated = (FusedPlan(eight, CPU, dtype, options) for options in (CODED, ON_DEVICE))
    assert coded.options.float8 and not emulated.options.float8 and not Rewrites.for_device(CPU).float8
    assert relative(outputs(coded, model), exact) < 1.5 * relative(outputs(emulated, model), exact) < 0.3
    # Without layers that round it changes nothing.
    assert torch.equal(*(outputs(FusedPlan(model, CPU, dtype, o), model) for o in (CODED, ON_DEVICE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_plan_loses_what_the_modules_lose(model, scales, dtype):
    exact = outputs(Plan(model, CPU, torch.float64), model)
    loss = [relative(outputs(build_plan(model, CPU, dtype, n, fp8=scales), model), exact) for n in ("eager", "fused")]
    without = relative(outputs(build_plan(model, CPU, dtype), model), exact)
    assert without < loss[1] < 1.5 * loss[0] < 0.3


def test_it_is_off_by_default_and_leaves_the_model_alone(model, scales):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = Pipeline(model, device="cpu", dtype="float32")
    expected = outputs(plain.plan, model)
    eight = Pipeline(model, device="cpu", dtype="float32", fp8=scales)
    assert not torch.equal(outputs(eight.plan, model), expected)
    assert not any(isinstance(layer, float8.Float8Conv2d) for layer in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(Pipeline(model, device="cpu", dtype="float32").plan, model), expected)
    assert "fp8" not in plain.plan.describe()


@pytest.mark.parametrize("plan", ["eager", "fused"])
def test_whoever_runs_it_says_so(model, scales, plan):
    pipe = Pipeline(model, device="cpu", dtype="float32", plan=plan, fp8=scales, steps=2)
    others = [pipe, copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), pipe.with_recipe("fast")]
    count = len(float8.float8_layers(model.decoder))
    expected = outputs(pipe.plan, model)
    for other in others:
        assert other.plan.describe()["fp8"] == f"{count} convolutions of rounded values, emulated"
        assert torch.equal(outputs(other.plan, model), expected)


def test_results_do_not_depend_on_the_batch(model, scales, smooth):
    """No scale is a batch's."""
    x0 = images(3, model.config)
    found = [
        Pipeline(model, device="cpu", dtype="float32", fp8=scales, batch_size=size, steps=3).decode(
            torch.linspace(-1, 1, 24).view(3, 8), x0
        )
        for size in (1, 3)
    ]
    assert relative(*found) < 1e-4


def test_a_prior_alone(tmp_path):
    prior = tiny_prior()
    plan = Plan(prior, CPU, torch.float32)
    with float8.watched(plan.unet) as largest:
        plan.field()(images(2), 100, False)
    pipe = Pipeline(prior, device="cpu", fp8=float8.calibration(prior, largest), steps=2)
    assert "fp8" in pipe.plan.describe() and torch.isfinite(pipe.decode(None, images(1))).all()


def test_what_is_watched_is_what_the_layers_read(model):
    plan = Plan(model, CPU, torch.float32)
    with float8.watched(plan.unet) as largest:
        outputs(plan, model), outputs(plan, model, t=900)
    assert set(largest) == set(float8.float8_layers(model.decoder))
    first = plan.unet.input_blocks[1][0]
    x = torch.randn(2, *model.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read = F.silu(first.in_layers[0](plan.unet.input_blocks[0][0](x)))
    assert largest["input_blocks.1.0.in_layers.2"] == pytest.approx(float(read.abs().max()), rel=1e-6)
    before = dict(largest)
    outputs(plan, model, t=10)
    assert largest == before  # the hooks are gone


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_scales_of_another_model(model, scales):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.out[2].bias[0] += 1e-3
    for stranger in (other, tiny_pdae(TINY)):
        with pytest.raises(UserError, match=r"scales of other weights; calibrate this model"):
            Pipeline(stranger, device="cpu", fp8=scales)
    # What sits on top of the U-Net does not matter.
    with torch.no_grad():
        other.decoder.out[2].bias[0] = model.decoder.out[2].bias[0]
        next(other.encoder.parameters()).add_(1)
    Pipeline(other, device="cpu", fp8=scales)


def damaged(scales, **changes):
    largest = {**scales["largest"], **changes.pop("largest", {})}
    return {**scales, "largest": {k: v for k, v in largest.items() if v is not None}, **changes}


FIRST = "input_blocks.1.0.in_layers.2"
BAD = {
    "not a mapping": (lambda s: [1, 2], "not a calibration"),
    "another file": (lambda s: {"format": "pdae_fast-latents-1"}, "not a calibration"),
    "a layer is missing": (lambda s: damaged(s, largest={FIRST: None}), "not the layers of this model"),
    "a layer too many": (lambda s: damaged(s, largest={"out.2": 1.0}), "not the layers of this model"),
    "no layers": (lambda s: {**s, "largest": [1.0]}, "not the layers of this model"),
    "negative": (lambda s: damaged(s, largest={FIRST: -1.0}), f"{FIRST} is -1.0; expected a number from 0"),
    "NaN": (lambda s: damaged(s, largest={FIRST: math.nan}), f"{FIRST} is nan"),
    "infinite": (lambda s: damaged(s, largest={FIRST: math.inf}), f"{FIRST} is inf"),
    "text": (lambda s: damaged(s, largest={FIRST: "3\n4"}), f"{FIRST} is '3"),
    "true": (lambda s: damaged(s, largest={FIRST: True}), f"{FIRST} is True"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_scales_are_one_line(model, scales, tmp_path, name):
    make, words = BAD[name]
    path = tmp_path / "fp8.json"
    path.write_text(json.dumps(make(scales)))
    for given, where in ((make(scales), "fp8"), (path, str(path)), (str(path), str(path))):
        with pytest.raises(UserError) as error:
            Pipeline(model, device="cpu", fp8=given)
        assert words in str(error.value) and len(str(error.value).splitlines()) == 1
        assert str(error.value).startswith(f"{where}: ") or not isinstance(given, (dict, str))


def test_files_that_cannot_be_read(model, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    for name, words in (("bad.json", "not a JSON file"), ("binary", "not a text file"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=words):
            Pipeline(model, device="cpu", fp8=tmp_path / name)


def test_a_model_without_weights(scales):
    with pytest.raises(UserError, match="no weights"):
        Pipeline(tiny_pdae(TINY).to("meta"), device="cpu", dtype="float32", fp8=scales)
