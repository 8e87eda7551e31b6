"""The cache of a teacher's features: equal to the pipeline's, found only for the same weights, images and settings."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from golden_rule import fill
from helpers import TINY, tiny_pdae, tiny_prior
from pdae_fast import Pipeline, Prior, UserError
from pdae_fast.pipeline import Pipeline as Class
from pdae_fast.training import features as module
from pdae_fast.training.features import ABOUT, FeatureSet, Target, teacher_features
from student_toy import Pictures, truth

MIDDLE = Target("middle", (0, 30))


@pytest.fixture
def prior():
    return tiny_prior()


@pytest.fixture
def counted(monkeypatch):
    calls = []
    real = Class.features
    monkeypatch.setattr(Class, "features", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    return calls


def of(model, target, cache, dataset=None, **options):
    return teacher_features(
        model, dataset or Pictures(), target, cache, batch_size=5, device="cpu", quiet=True, **options
    )


def test_levels_are_those_of_the_pipeline_and_their_statistics_are_right(tmp_path, prior):
    found = of(prior, MIDDLE, tmp_path)
    pipe, x = Pipeline(prior, device="cpu", dtype="float32"), Pictures().pixels
    (level,), ((mean, std),) = found.levels, found.statistics
    assert level.dtype == np.float16 and level.shape[:2] == (12, 2)
    for k, t in enumerate(MIDDLE.times):
        exact = pipe.features(x, t).middle.double()
        np.testing.assert_allclose(level[:, k], exact, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(mean[k], exact.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(std[k], exact.std((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.of(7)[0], torch.from_numpy(np.array(level[7])))


def test_the_decoder_gives_the_last_block_of_every_finer_side_that_is_wanted(tmp_path, prior):
    target = Target("decoder", (4,), (32, 16, 8))
    found = of(prior, target, tmp_path)
    maps = Pipeline(prior, device="cpu", dtype="float32").features(Pictures().pixels, 4, 4)
    sides = [level.shape[-1] for level in maps.levels]
    assert sides == [16, 16, 32, 32, 32] and target.blocks(prior) == [3]
    assert [level.shape[-1] for level in found.levels] == [16, 32]
    np.testing.assert_allclose(found.levels[1][:, 0], maps.outputs[3], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="the student has none of these"):
        of(prior, Target("decoder", (4,), (8,)), tmp_path)


def test_noise_is_that_of_an_image_however_batches_are_cut(tmp_path, prior):
    target = Target("middle", (200,), noised=True, seed=3)
    level = of(prior, target, tmp_path).levels[0]
    pipe = Pipeline(prior, device="cpu", dtype="float32")
    exact = pipe.features(Pictures().pixels, 200, noised=True, seed=3).middle
    np.testing.assert_allclose(level[:, 0], exact, rtol=1e-3, atol=1e-4)
    assert (
        np.abs(level[:, 0] - of(prior, dataclasses.replace(target, noised=False), tmp_path).levels[0][:, 0]).max()
        > 0.01
    )


def test_codes_and_pixels_are_targets_too(tmp_path):
    pdae, x = tiny_pdae(), Pictures().pixels
    codes = of(pdae, Target("z", (0,)), tmp_path)
    assert codes.shapes == [(16, 1, 1)]
    with torch.no_grad():
        np.testing.assert_allclose(codes.levels[0][:, 0, :, 0, 0], pdae.encode(x), rtol=2e-3, atol=1e-3)
    pixels = of(pdae, Target("pixels", (0,), (16, 8)), tmp_path)
    assert pixels.shapes == [(16, 8, 8), (4, 16, 16)]
    back = F.pixel_shuffle(torch.from_numpy(np.array(pixels.levels[0][:, 0])).float(), 4)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


def test_features_of_other_weights_images_or_settings_are_never_used(tmp_path, prior, counted):
    of(prior, MIDDLE, tmp_path)
    made = len(counted)
    first = of(prior, MIDDLE, tmp_path)
    assert len(counted) == made
    other = Prior(TINY.prior)
    other.load_state_dict(prior.state_dict())
    with torch.no_grad():
        next(iter(other.unet.middle_block.parameters())).flatten()[0] += 0.5
    pictures = Pictures()
    pictures.pixels[3, 0, 5, 5] = 0.123
    for model, target, data in (
        (other, MIDDLE, Pictures()),
        (prior, MIDDLE, pictures),
        (prior, dataclasses.replace(MIDDLE, times=(0, 31)), Pictures()),
        (prior, dataclasses.replace(MIDDLE, noised=True), Pictures()),
    ):
        before = len(counted)
        with pytest.raises(UserError, match="no features of these 12 images by this teacher"):
            of(model, target, tmp_path, data, require=True)
        found = of(model, target, tmp_path, data)
        assert len(counted) > before and not np.array_equal(found.levels[0], first.levels[0])
    # The heads of a PDAE on the same prior say nothing of its features: but its weights are other ones.
    assert len(list(tmp_path.glob("features-*"))) == 5


def test_a_damaged_cache_is_made_again(tmp_path, prior, counted, capsys):
    level = np.array(of(prior, MIDDLE, tmp_path).levels[0])
    (path,) = tmp_path.glob("features-*")
    for damage in ("bytes", "about", "file"):
        made = len(counted)
        if damage == "bytes":
            content = bytearray((path / "0.npy").read_bytes())
            content[-7] ^= 1
            (path / "0.npy").write_bytes(content)
        elif damage == "about":
            about = json.loads((path / ABOUT).read_text())
            about["statistics"][0][0][0][0] += 1
            (path / ABOUT).write_text(json.dumps(about))
        else:
            (path / "0.npy").unlink()
        assert np.array_equal(of(prior, MIDDLE, tmp_path).levels[0], level)
        assert len(counted) > made and "damaged" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [path.name]


def test_a_failure_leaves_nothing(tmp_path, prior, monkeypatch):
    monkeypatch.setattr(module, "_levels", lambda *a: iter([[torch.full((5, 32, 16, 16), 1e6)]]))
    with pytest.raises(UserError, match="values beyond float16"):
        of(prior, Target("middle", (0,)), tmp_path)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]


def test_what_the_teacher_does_not_have_is_said_before_it_runs(tmp_path, prior, counted):
    conditional = fill(Prior(dataclasses.replace(TINY.prior, unet=dataclasses.replace(TINY.unet, num_classes=3))))
    for model, target, message in (
        (prior, Target("middle", (0, 1000)), "no time 1000; expected whole numbers from 0 to 999"),
        (prior, Target("z", (0,)), "--target z needs an autoencoder"),
        (prior, Target("top", (0,)), "--target top is not known"),
        (prior, Target("middle", (0,), label=1), "--label is for a class-conditional teacher"),
        (conditional, Target("middle", (0,)), "needs --label K from 0 to 2, not None"),
        (conditional, Target("middle", (0,), label=3), "needs --label K from 0 to 2, not 3"),
    ):
        with pytest.raises(UserError, match=message):
            of(model, target, tmp_path)
    assert not counted and not list(tmp_path.iterdir())
    assert of(conditional, Target("middle", (0,), label=2), tmp_path).shapes == [(32, 16, 16)]


def test_a_policy_is_given_labelled_images_alone(tmp_path, prior):
    known = truth().rows([3, 6])
    data = FeatureSet(Pictures(), of(prior, MIDDLE, tmp_path), known)
    for i in range(12):
        x, levels, shown, told, label = data[i]
        j = i if i in (3, 6) else (3, 6)[i % 2]
        assert torch.equal(x, Pictures().pixels[i]) and torch.equal(levels[0], data.features.of(i)[0])
        assert torch.equal(shown, Pictures().pixels[j]) and torch.equal(told[0], data.features.of(j)[0])
        assert int(label) == j % 3
