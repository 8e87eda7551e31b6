"""Features of images against hooks on the modules, in every plan."""

import dataclasses

import pytest
import torch

from flavours import BASE, FLAVOURS, PREDICTIONS
from golden_rule import fill, relative
from helpers import ON_DEVICE, TINY, images, tiny_pdae, tiny_prior
from pdae_fast import DiffAE, DiffAEConfig, PDAEConfig, Pipeline, Prior, UNetConfig, UserError
from pdae_fast.engine import build_plan
from pdae_fast.engine.cost import network_costs
from pdae_fast.engine.features import level_shapes
from pdae_fast.schedule import build_schedule

CPU = torch.device("cpu")
TIMES = [0, 7, 40]
DIFFAE = DiffAEConfig(32, latent_dim=16, unet=TINY.unet, encoder_multiplier=(1, 1, 2))


def hooked(unet, run):
    """Outputs of the middle block and of all output blocks while ``run()`` calls ``unet``."""
    found = []
    blocks = [unet.middle_block, *unet.output_blocks]
    handles = [block.register_forward_hook(lambda *call: found.append(call[2].float())) for block in blocks]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def close(maps, expected, bound=1e-5):
    assert len(maps.levels) <= len(expected)
    for found, wanted in zip(maps.levels, expected, strict=False):
        assert found.shape == wanted.shape and found.dtype is torch.float32
        assert relative(found, wanted) < bound


@pytest.mark.parametrize("flavour", [*FLAVOURS, *PREDICTIONS])
def test_features_are_what_the_modules_compute(flavour):
    changes = {**BASE, **FLAVOURS.get(flavour, {})}
    prior = fill(Prior(PDAEConfig(32, unet=UNetConfig(**changes), **PREDICTIONS.get(flavour, {})).prior))
    x, t = images(3, prior.config, seed=2), torch.tensor(TIMES)
    expected = hooked(prior.unet, lambda: prior(x, t))
    assert [tuple(v.shape[1:]) for v in expected] == level_shapes(prior.unet, 32)
    for plan, options in (("eager", None), ("fused", None), ("fused", ON_DEVICE)):
        built = build_plan(prior, CPU, torch.float32, plan, options=options)
        close(built.features(x, TIMES, len(expected) - 1), expected)
        close(built.features(x[1:2], 7), [v[1:2] for v in expected])


def test_nothing_after_the_last_map_runs_and_what_runs_is_counted():
    prior = tiny_prior()
    plan = build_plan(prior, CPU, torch.float32, "eager")
    ran = hooked(plan.unet, lambda: plan.features(images(2), 5, 1))
    assert len(ran) == 2
    fused = build_plan(prior, CPU, torch.float32, "fused")
    fused.features(images(2), 5, 1), fused.features(images(3), 5)
    assert fused.counts() == {"trunk": 5, "eps_until_1": 2, "eps_until_0": 3}
    costs = network_costs(prior.config)
    whole = 5 * sum(costs.trunk) + 5 * costs.eps[0] + 2 * costs.eps[1]
    assert fused.equivalents() == pytest.approx(whole / costs.full)


@pytest.mark.parametrize("plan", ["eager", "fused"])
def test_a_diffae_is_encoded_first_and_a_class_is_told(plan):
    model = fill(DiffAE(DIFFAE))
    x, t = images(3, model.config), torch.tensor(TIMES)
    expected = hooked(model.unet, lambda: model(x, t, model.encode(x)))
    pipe = Pipeline(model, plan=plan, device="cpu", dtype="float32", batch_size=2)
    close(pipe.features(x, TIMES, outputs=1), expected)

    classes = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, num_classes=4))
    model, x = tiny_pdae(classes), images(3, classes)
    pipe = Pipeline(model, plan=plan, device="cpu", dtype="float32", batch_size=2, label=2)
    for y, labels in ((None, torch.full((3,), 2)), ([0, 3, 1], torch.tensor([0, 3, 1]))):
        features = hooked(model.decoder, lambda labels=labels: model.decoder.decode(model.decoder.trunk(x, t, labels)))
        close(pipe.features(x, TIMES, outputs=2, y=y), features)


def test_noised_images_are_the_same_however_they_are_split():
    prior, x, t = tiny_prior(), images(3), torch.tensor(TIMES)
    pipe = Pipeline(prior, device="cpu", dtype="float32", batch_size=2)
    whole = pipe.features(x, TIMES, noised=True, seed=4)
    alone = pipe.features(x[2:], 40, noised=True, seed=4, indices=[2])
    assert relative(alone.middle, whole.middle[2:]) < 1e-5
    assert relative(pipe.features(x, TIMES, noised=True, seed=5).middle, whole.middle) > 1e-3
    # Of the noise that is in x_t: x_t - sqrt(alpha_bar) x0 is normal and belongs to a seed and an image.
    seen = []
    plan, real = pipe.plan, pipe.plan.features
    plan.features = lambda x, *rest: (seen.append(x), real(x, *rest))[1]
    pipe.features(x, TIMES, noised=True, seed=4)
    alpha_bar = torch.tensor(build_schedule(prior.config.schedule).alpha_bar)[t][:, None, None, None]
    noise = (torch.cat(seen) - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    assert noise.std(dim=(1, 2, 3)).sub(1).abs().max() < 0.1 and noise.mean().abs() < 0.1


def test_bfloat16_is_as_near_as_the_modules_in_bfloat16():
    prior = tiny_prior()
    x, t = images(4), [0, 3, 20, 90]
    expected = hooked(prior.unet, lambda: prior(x, torch.tensor(t)))
    plans = [build_plan(prior, CPU, torch.bfloat16, name) for name in ("fused", "eager")]
    for fused, eager, wanted in zip(*(p.features(x, t, 3).levels for p in plans), expected, strict=False):
        assert relative(fused, wanted) < min(2e-2, 1.5 * relative(eager, wanted))


def test_pooled_maps_lie_side_by_side_and_are_ordinary():
    pipe = Pipeline(tiny_pdae(), device="cpu", dtype="float32", batch_size=2)
    maps = pipe.features(images(3), outputs=2)
    pooled = maps.pooled()
    assert pooled.shape == (3, sum(level.shape[1] for level in maps.levels), 1, 1)
    C = maps.middle.shape[1]
    torch.testing.assert_close(pooled[:, :C, 0, 0], maps.middle.mean(dim=(2, 3)))
    quarters = maps.outputs[0].unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5))
    torch.testing.assert_close(maps.pooled(2)[:, C : C + quarters.shape[1]], quarters)
    assert not maps.middle.is_inference() and len(maps) == 3
    none = pipe.features(images(0), outputs=2)
    assert [v.shape[1:] for v in none.levels] == [v.shape[1:] for v in maps.levels] and len(none) == 0


@pytest.mark.parametrize(
    "given, said",
    [
        ({"t": 1000}, "t must be between 0 and 999, not 1000"),
        ({"t": -1}, "t must be between 0 and 999, not -1"),
        ({"t": 0.5}, "t must be a whole number"),
        ({"t": [1, 2]}, "t has 2 values; expected one, or one for each of 3 images"),
        ({"outputs": 5}, "outputs must be between 0 and 4, not 5"),
        ({"noised": True, "seed": -1}, "seed"),
        ({"indices": [0]}, "indices has 1 values; expected 3"),
        ({"y": [0, 1, 2]}, "not class-conditional"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(given, said):
    pipe = Pipeline(tiny_pdae(), device="cpu", dtype="float32")
    with pytest.raises(UserError, match=said) as error:
        pipe.features(images(3), **given)
    assert "\n" not in str(error.value) and not pipe.evaluations


def test_maps_stay_as_they_are_when_the_plan_uses_its_memory_again(monkeypatch):
    plan = build_plan(tiny_prior(), CPU, torch.float32, "fused")
    buffer = torch.zeros(2, 4, 8, 8)
    monkeypatch.setattr(plan, "_levels", lambda *_: (buffer.fill_(k) for k in range(9)))
    maps = plan.features(images(2), 5, 2)
    assert [level.unique().tolist() for level in maps.levels] == [[0], [1], [2]]
