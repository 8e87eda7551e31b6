import dataclasses

import pytest
import torch

from golden_rule import relative
from helpers import TINY, TINY_FULL, images, tiny_pdae, tiny_prior
from pdae_fast import PDAE, Pipeline, Prior, UserError
from pdae_fast.samplers.ddim import ddim
from pdae_fast.samplers.noise import ImageNoise, lerp, slerp


@pytest.fixture(scope="module")
def model():
    return tiny_pdae(TINY_FULL)


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model, "published", steps=4, device="cpu", dtype="float32")


def test_results_do_not_depend_on_the_batch_split(model):
    x0 = images(5)
    whole, split = (Pipeline(model, steps=3, device="cpu", batch_size=b) for b in (5, 2))
    z = whole.encode(x0)
    torch.testing.assert_close(split.encode(x0), z)
    # Random weights make a chaotic field: rounding grows, here to about 1e-5.
    assert relative(split.reconstruct(x0), whole.reconstruct(x0)) < 1e-4
    random = whole.decode(z, seed=3)
    assert relative(split.decode(z, seed=3), random) < 1e-4
    # ... nor on how a caller splits it.
    parts = torch.cat([whole.decode(z[:2], seed=3), whole.decode(z[2:], seed=3, indices=range(2, 5))])
    assert relative(parts, random) < 1e-4
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    one = whole.decode(z, generator=generators[0])
    two = torch.cat([whole.decode(z[:3], generator=generators[1]), whole.decode(z[3:], generator=generators[1])])
    assert relative(two, one) < 1e-4


def test_random_x_T_is_standardised_where_asked_or_where_the_model_says_so(model, pipe):
    x0 = images(3)
    z, x_T = pipe.encode(x0), ImageNoise(5, range(3), (1, 32, 32))()
    unit = (x_T - x_T.mean((2, 3), keepdim=True)) / x_T.std((2, 3), correction=0, keepdim=True)
    asked = Pipeline(model, "published", steps=4, device="cpu", dtype="float32", noise="standardised")
    narrow = tiny_pdae(dataclasses.replace(TINY_FULL, noise="standardised"))
    told = Pipeline(narrow, "published", steps=4, device="cpu", dtype="float32")
    against = Pipeline(narrow, "published", steps=4, device="cpu", dtype="float32", noise="normal")
    for own, expected in ((pipe, x_T), (asked, unit), (told, unit), (against, x_T)):
        torch.testing.assert_close(own.random_x_T(5, range(3)), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(own.decode(z, seed=5), own.decode(z, own.random_x_T(5, range(3))))
        # Only what is drawn: an x_T that is given or inferred stays as it is.
        torch.testing.assert_close(own.decode(z, x_T), pipe.decode(z, x_T))
        torch.testing.assert_close(own.invert(x0, z), pipe.invert(x0, z))
    assert relative(told.decode(z, generator=torch.Generator().manual_seed(1)),
                    pipe.decode(z, generator=torch.Generator().manual_seed(1))) > 1e-3  # fmt: skip
    assert Pipeline(narrow.prior(), steps=4, device="cpu").noise == "standardised"
    assert PDAE.from_prior(narrow.prior(), latent_dim=4).config.noise == "standardised"
    with pytest.raises(UserError, match="noise 'pink' is not known"):
        Pipeline(model, steps=4, device="cpu", noise="pink")


def test_evaluations_are_counted(model):
    pipe = Pipeline(model, steps=4, encode_steps=6, device="cpu")
    pipe.reconstruct(images(3))
    assert pipe.evaluations == {"encoder": 3, "trunk": 30, "eps": 30, "gradient": 30}
    before = pipe.evaluations
    pipe.decode(torch.zeros(2, 16), stop_percent=0.5)
    assert pipe.evaluations["gradient"] - before["gradient"] == 4 and pipe.evaluations["eps"] - before["eps"] == 8


def test_progress_counts_images_and_steps(model):
    ticks = []
    Pipeline(model, "published", steps=4, device="cpu", batch_size=2, progress=ticks.append).reconstruct(images(3))
    assert sum(ticks) == 3 * 8


def test_prior_alone_equals_decoding_without_z(model, pipe):
    x_T = ImageNoise(0, range(2), (1, 32, 32))()
    alone = Pipeline(model.prior(), "published", steps=4, device="cpu")
    torch.testing.assert_close(alone.decode(None, x_T), pipe.decode(None, x_T))
    torch.testing.assert_close(alone.invert(x_T), pipe.invert(x_T))
    torch.testing.assert_close(alone.sample(2), alone.decode(None, x_T))
    assert "gradient" not in alone.evaluations


def test_interpolation_ends_are_the_reconstructions(pipe):
    x0 = images(2)
    for kind in ("latent", "trajectory"):
        x = pipe.interpolate(x0[0], x0[1], [0.0, 0.5, 1.0], kind)
        assert x.shape == (3, 1, 32, 32)
        torch.testing.assert_close(x[[0, 2]], pipe.reconstruct(x0), rtol=1e-3, atol=1e-3)


def test_the_two_interpolations_by_hand(model, pipe):
    x0 = images(2)
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    start, w = slerp(x_T[:1], x_T[1:], torch.tensor([0.3])), torch.tensor([0.3])
    by_codes = pipe.decode(lerp(z[:1], z[1:], w), start)
    torch.testing.assert_close(pipe.interpolate(x0[0], x0[1], [0.3], "latent"), by_codes)

    def mixed(x, t, use_gradient):
        with torch.no_grad():
            t = torch.full((1,), t)
            (eps, g_a), (_, g_b) = model(x, t, z[:1]), model(x, t, z[1:])
        return eps, 0.7 * g_a + 0.3 * g_b

    by_gradients = ddim(mixed, start, pipe.schedule, 4)
    found = pipe.interpolate(x0[0], x0[1], [0.3], "trajectory")
    assert relative(found, by_gradients) < 1e-4
    assert relative(by_codes, by_gradients) > 1e-3  # they are different things


def test_manipulation_moves_z_by_the_stated_amount(model, pipe):
    x0 = images(2)
    z = pipe.encode(x0)
    w = model.classifier.weight[1].detach()
    edited = z + model.latent_std * (1.5 * 16**0.5 * w / w.norm())
    expected = pipe.decode(edited, pipe.invert(x0, z))
    assert relative(pipe.manipulate(x0, "dark", 1.5), expected) < 1e-4
    assert relative(pipe.manipulate(x0, 1, 1.5), expected) < 1e-4
    assert relative(pipe.manipulate(x0, "dark", 0.0), pipe.reconstruct(x0)) < 1e-4


def test_sampling(model, pipe):
    before = pipe.evaluations.get("gradient", 0)
    x = pipe.sample(3, seed=1)
    assert x.shape == (3, 1, 32, 32) and bool(torch.isfinite(x).all())
    # 4 steps with stop_percent 0.3: int(1.2) = 1 step without G.
    assert pipe.evaluations["gradient"] - before == 3 * 3
    z = pipe.sample_latents(3, seed=1)
    # The clamp of z_0 in the normalised space is a quirk of the released code, and an option.
    normalised = (z - model.latent_mean) / model.latent_std
    assert float(normalised.abs().max()) < 1.1
    free = (pipe.sample_latents(3, clamp=False, seed=1) - model.latent_mean) / model.latent_std
    assert float(free.abs().max()) > float(normalised.abs().max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close(model, pipe, dtype):
    x0 = images(1)
    low = Pipeline(model, steps=4, device="cpu", dtype=dtype)
    z = low.encode(x0)
    assert z.dtype == torch.float32 and relative(z, pipe.encode(x0)) < 0.02
    x = low.decode(z, seed=1)
    assert x.dtype == torch.float32 and relative(x, pipe.decode(z, seed=1)) < 0.1
    assert next(model.parameters()).dtype == torch.float32  # the caller's model is left alone


def test_a_fresh_pdae_decodes_like_its_prior():
    prior = tiny_prior()
    pipe = Pipeline(PDAE.from_prior(prior, latent_dim=16, encoder_channel=32).eval(), steps=3, device="cpu")
    z = pipe.encode(images(2))
    torch.testing.assert_close(pipe.decode(z, seed=2), Pipeline(prior, steps=3, device="cpu").decode(count=2, seed=2))


def test_empty_batches(pipe):
    x0 = images(0)
    z = pipe.encode(x0)
    assert z.shape == (0, 16)
    assert pipe.decode(z).shape == pipe.invert(x0, z).shape == (0, 1, 32, 32)


BAD = [
    (lambda p: p.encode(torch.zeros(1, 3, 32, 32)), r"\[B, 1, 32, 32\]"),
    (lambda p: p.encode(torch.zeros(1, 32, 32)), r"\[B, 1, 32, 32\]"),
    (lambda p: p.encode(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)), "floating point"),
    (lambda p: p.encode(torch.full((1, 1, 32, 32), float("nan"))), "NaN"),
    (lambda p: p.invert(images(2), torch.zeros(1, 16)), r"expected \[2, 16\]"),
    (lambda p: p.decode(torch.zeros(1, 7)), r"\[B, 16\]"),
    (lambda p: p.decode(), "none given"),
    (lambda p: p.decode(torch.zeros(1, 16), images(2)), "disagree"),
    (lambda p: p.decode(torch.zeros(1, 16), stop_percent=2), "stop_percent"),
    (lambda p: p.with_recipe(encode_steps=0), "between 1 and 1000"),
    (lambda p: p.interpolate(images(1), images(1), [0.5], "pixels"), "latent or trajectory"),
    (lambda p: p.interpolate(images(2), images(1), [0.5]), "single images"),
    (lambda p: p.manipulate(images(1), "blue", 1.0), "expected one of round, dark"),
    (lambda p: p.sample(0), "at least 1"),
    (lambda p: Pipeline(p.model, steps=0), "between 1 and 1000"),
    (lambda p: Pipeline(p.model, device="cuda:99"), "cuda:99"),
    (lambda p: Pipeline(p.model, device="gpu"), "expected auto"),
    (lambda p: Pipeline(p.model, dtype="int8"), "expected auto"),
    (lambda p: Pipeline(p.model, batch_size=0), "at least 1"),
    (lambda p: Pipeline(torch.nn.Linear(1, 1)), "not Linear"),
    (lambda p: Pipeline(tiny_prior(), device="cpu").encode(images(1)), "prior alone"),
    (lambda p: Pipeline(tiny_pdae(), device="cpu").sample(1), "latent DPM"),
    (lambda p: Pipeline(tiny_pdae(), device="cpu").manipulate(images(1), "dark", 1), "classifier"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_clear_line(pipe, call, words):
    with pytest.raises(UserError, match=words) as error:
        call(pipe)
    assert "\n" not in str(error.value)


def test_save_and_load(tmp_path, model):
    model.save_pretrained(tmp_path / "m")
    again = PDAE.from_pretrained(tmp_path / "m")
    assert again.config == model.config and not again.training
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    model.save_pretrained(tmp_path / "half", torch.float16)
    half = PDAE.from_pretrained(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float32
    assert relative(half.encode(images(1)), model.encode(images(1))) < 2e-3
    # The prior inside is usable from the same directory.
    prior = Prior.from_pretrained(tmp_path / "m")
    assert all(torch.equal(v, prior.state_dict()[k]) for k, v in model.prior().state_dict().items())


def test_loading_the_wrong_thing(tmp_path, model):
    tiny_prior().save_pretrained(tmp_path / "prior")
    with pytest.raises(UserError, match="is a prior"):
        PDAE.from_pretrained(tmp_path / "prior")
    model.save_pretrained(tmp_path / "m")
    other = dataclasses.replace(TINY, latent_dim=8)
    from pdae_fast import config

    (tmp_path / "m" / "config.json").write_text(config.dumps(other))
    with pytest.raises(UserError, match="do not fit") as error:
        PDAE.from_pretrained(tmp_path / "m")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="neither a bundled model"):
        PDAE.from_pretrained("no-such-model")


def test_a_batch_too_large_for_memory(model, pipe, monkeypatch):
    from pdae_fast.engine import plan

    monkeypatch.setattr(plan, "available_memory", lambda device: 8 << 20)
    big = Pipeline(model, steps=2, device="cpu", dtype="float32", batch_size=64)
    big.encode(images(1))  # the batch size counts only as far as there are images
    with pytest.raises(UserError, match=r"64 images at once need about \d+ MiB .* use a batch size of at most \d+"):
        big.encode(images(64))
    monkeypatch.undo()

    def refuse(x0):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(big.plan, "encode", refuse)
    with pytest.raises(UserError, match="2 images at once do not fit the memory of cpu; use a smaller batch size"):
        big.encode(images(2))


def test_auto_dtype_is_bfloat16_for_large_networks_where_the_processor_has_it(model, monkeypatch):
    from pdae_fast.engine import device

    for capabilities, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ):
        device.has_native_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert Pipeline(model, device="cpu").dtype is torch.float32
        monkeypatch.setattr(device, "LARGE_PARAMETERS", 1000)
        assert Pipeline(model, device="cpu").dtype is dtype
        monkeypatch.undo()
    device.has_native_bfloat16.cache_clear()
