"""The codes that an encoder can be told: principal components of pixels and of the prior's features, another PDAE's."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import TINY, TINY_FULL, Smooth, image_folder, needs_sklearn, tiny_pdae, tiny_prior
from pdae_fast import PDAE, UserError
from pdae_fast.data import BrokenImage, Labels, open_dataset
from pdae_fast.data.latents import Latents, statistics
from pdae_fast.training import target_codes
from pdae_fast.training.target_codes import attributes_first, feature_codes, known_attributes, model_codes, pca_codes

D = TINY.latent_dim


def make_latents(z):
    return Latents(z, [f"{i:02d}" for i in range(len(z))], [None] * len(z), *statistics(z), "codes", "images", [])


def white_components(fitted, flat, dim):
    """Textbook: principal components of ``fitted`` [N, P], as ``flat`` [M, P] has them, over their deviations there."""
    mean = fitted.mean(0)
    _, singular, basis = np.linalg.svd(fitted - mean, full_matrices=False)
    return (flat - mean) @ basis[:dim].T / (singular[:dim] / np.sqrt(len(fitted) - 1))


def up_to_sign(found, expected):
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-3)


# -- principal components of pixels ------------------------------------------------------------------------------------


@needs_sklearn
def test_targets_are_the_whitened_components_by_numpy():
    data = Smooth()
    found = pca_codes(data, D, quiet=True)
    flat = data.images.reshape(len(data), -1).astype(np.float64)
    up_to_sign(found.z.numpy(), white_components(flat, flat, D))
    torch.testing.assert_close(torch.cov(found.z.T.double()), torch.eye(D).double(), atol=1e-4, rtol=0)
    assert found.names == data.names and found.broken == []


@needs_sklearn
def test_some_images_give_the_components_and_all_have_codes():
    data = Smooth()
    found = pca_codes(data, D, count=30, quiet=True).z.numpy()
    flat = data.images.reshape(len(data), -1).astype(np.float64)
    chosen = [int(i * 59 / 29) for i in range(30)]
    up_to_sign(found, white_components(flat[chosen], flat, D))


@needs_sklearn
def test_large_images_are_averaged_down():
    data = Smooth(40, 128)
    data.images *= np.random.default_rng(1).random((128, 128), np.float32)  # so that no pixel is its neighbour
    small = data.images.reshape(40, 64, 2, 64, 2).mean((2, 4)).reshape(40, -1).astype(np.float64)
    up_to_sign(pca_codes(data, D, quiet=True).z.numpy(), white_components(small, small, D))


@needs_sklearn
def test_codes_are_kept_and_found_only_for_the_same_images_and_rule(tmp_path, monkeypatch):
    data = Smooth()
    first = pca_codes(data, D, tmp_path, quiet=True)
    others = [
        pca_codes(data, D - 1, tmp_path, quiet=True),
        pca_codes(data, D, tmp_path, count=50, quiet=True),
        pca_codes(data, D, tmp_path, seed=1, quiet=True),
        pca_codes(Smooth(seed=1), D, tmp_path, quiet=True),
    ]
    assert len({(found.encoder, found.images) for found in [first, *others]}) == 5 == len(list(tmp_path.iterdir()))
    monkeypatch.setattr(target_codes, "_fit", None)
    assert torch.equal(pca_codes(data, D, tmp_path, quiet=True).z, first.z)
    with pytest.raises(UserError, match="no latents of these 61 images by principal components"):
        pca_codes(Smooth(61), D, tmp_path, require=True, quiet=True)


@needs_sklearn
def test_images_that_have_no_such_components(tmp_path):
    with pytest.raises(UserError, match=f"{D} principal components need at least {D + 1} images, not {D}"):
        pca_codes(Smooth(D), D, quiet=True)
    with pytest.raises(UserError, match="vary along 24 directions alone"):
        pca_codes(Smooth(60), 26, quiet=True)
    alike = Smooth()
    alike.images[:] = 0.5
    with pytest.raises(UserError, match="vary along 0 directions alone"):
        pca_codes(alike, D, quiet=True)
    for broken in ("03.png", "09.png"):  # one that the components come from, and one that only has a code
        folder = image_folder(tmp_path / broken, 20)
        (folder / broken).write_bytes(b"x")
        with pytest.raises(BrokenImage, match=broken):
            pca_codes(open_dataset(folder, 32, 1), D, count=18, quiet=True)


# -- principal components of features ----------------------------------------------------------------------------------


def by_hand(unet, x0):
    """What the last block of each resolution puts out at t = 20, by hooks; means of 8 x 8 tiles in float64, each
    resolution divided by the root of its total variance."""
    seen = []
    hooks = [block.register_forward_hook(lambda module, given, out: seen.append(out)) for block in unet.input_blocks]
    with torch.no_grad():
        unet.eval().trunk(x0, torch.full((len(x0),), 20))
    for hook in hooks:
        hook.remove()
    groups = []
    for size in sorted({out.shape[-1] for out in seen}, reverse=True):
        h = [out for out in seen if out.shape[-1] == size][-1].double().numpy()
        tile = max(size // 8, 1)
        h = h.reshape(*h.shape[:2], size // tile, tile, size // tile, tile).mean((3, 5)).reshape(len(h), -1)
        groups.append(h / np.sqrt(h.var(0).sum()))
    assert len(groups) == 2
    return np.concatenate(groups, 1)


@needs_sklearn
@pytest.mark.parametrize("of", [tiny_prior, tiny_pdae])
def test_features_are_those_of_the_frozen_trunk(of):
    data, dim = Smooth(80), 5  # components that are well apart
    model = of()
    unet = model.unet if of is tiny_prior else model.decoder
    found = feature_codes(unet, data, dim, quiet=True)
    flat = by_hand(unet, torch.from_numpy(data.images)[:, None])
    up_to_sign(found.z.numpy(), white_components(flat, flat, dim))
    assert found.names == data.names
    torch.testing.assert_close(torch.cov(found.z.T.double()), torch.eye(dim).double(), atol=1e-4, rtol=0)


@needs_sklearn
def test_some_images_give_the_scale_of_every_resolution_too():
    data, dim = Smooth(80), 5
    unet = tiny_prior().unet
    found = feature_codes(unet, data, dim, count=40, quiet=True).z.numpy()
    chosen = np.linspace(0, 79, 40).astype(int)
    part = by_hand(unet, torch.from_numpy(data.images[chosen])[:, None])
    up_to_sign(found[chosen], white_components(part, part, dim))


@needs_sklearn
def test_features_are_kept_for_this_trunk_alone(tmp_path):
    data, unet = Smooth(), tiny_pdae().decoder
    first = feature_codes(unet, data, 4, tmp_path, quiet=True)
    with torch.no_grad():
        unet.out[-1].weight.add_(1)  # no part of the trunk
    assert feature_codes(unet, data, 4, tmp_path, require=True, quiet=True).encoder == first.encoder
    with torch.no_grad():
        unet.input_blocks[0][0].weight.add_(1)
    with pytest.raises(UserError, match="no latents of these 60 images by principal components"):
        feature_codes(unet, data, 4, tmp_path, require=True, quiet=True)
    assert pca_codes(data, 4, tmp_path, quiet=True).encoder != first.encoder


# -- another PDAE's ----------------------------------------------------------------------------------------------------


def test_another_models_codes_at_its_own_size_and_not_normalised(tmp_path):
    """A PDAE of 64 px sees the files at 64 px, and its statistics have no part in what the encoder is told."""
    folder = image_folder(tmp_path / "images", 5, size=64)
    config = dataclasses.replace(TINY_FULL, image_size=64)
    start = tiny_pdae(config)
    found = model_codes(tiny_pdae(), start, "start", str(folder), device="cpu", quiet=True)
    x0 = [np.asarray(Image.open(folder / f"{i:02d}.png"), np.float32) / 127.5 - 1 for i in range(5)]
    with torch.no_grad():
        torch.testing.assert_close(found.z, start.encode(torch.from_numpy(np.stack(x0))[:, None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_dim": 24}, "--target start: its latent_dim is 24; the model to train has 16"),
        ({"unet": dataclasses.replace(TINY.unet, input_channel=3)}, "--target start: its input_channel is 3"),
    ],
)
def test_a_model_whose_codes_do_not_fit(change, words):
    with pytest.raises(UserError, match=words):
        model_codes(tiny_pdae(), PDAE(dataclasses.replace(TINY, **change)), "start", "/none")


# -- attributes first --------------------------------------------------------------------------------------------------


def known_of(count, columns, seed=0):
    values = torch.randint(0, 2, (count, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Labels(values, [f"a{k}" for k in range(columns)], list(range(count)), [], [])


def mixed_codes(labels, seed=0):
    """Codes in which the attributes are entangled, with variances far apart."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((len(labels.values), D)) * 2.0 ** -np.arange(D)
    z = 3 + (own + labels.values.numpy() @ rng.standard_normal((len(labels.columns), D))) @ rng.standard_normal((D, D))
    return make_latents(torch.from_numpy(z.astype(np.float32)))


def test_attributes_come_first_and_nowhere_else():
    labels = known_of(60, 3)
    latents = mixed_codes(labels)
    found = attributes_first(latents, known_attributes(labels, D))
    values, z, old = (x.double().numpy() for x in (labels.values, found.z, latents.z))
    np.testing.assert_allclose(z[:, :3], (values - values.mean(0)) / values.std(0), rtol=1e-6)
    # What numpy's least squares leave of the codes, and its textbook components.
    design = np.c_[values, np.ones(60)]
    rest = old - design @ np.linalg.lstsq(design, old, rcond=None)[0]
    _, singular, basis = np.linalg.svd(rest, full_matrices=False)
    up_to_sign(z[:, 3:], rest @ basis[: D - 3].T)
    assert np.abs(np.corrcoef(z.T)[:3, 3:]).max() < 1e-5
    assert found.z.shape == old.shape and found.names == latents.names
    torch.testing.assert_close(found.mean, found.z.mean(0), atol=1e-6, rtol=1e-4)


def test_codes_with_attributes_are_kept_and_found_only_for_the_same(tmp_path, monkeypatch):
    labels = known_of(60, 3)
    latents, known = mixed_codes(labels), known_attributes(labels, D)
    first = attributes_first(latents, known, tmp_path)
    others = [
        attributes_first(latents, known_attributes(known_of(60, 3, 1), D), tmp_path),
        attributes_first(latents._replace(encoder="another"), known, tmp_path),
    ]
    assert len({found.encoder for found in [first, *others]}) == 3 == len(list(tmp_path.iterdir()))
    monkeypatch.setattr(target_codes, "statistics", None)
    assert torch.equal(attributes_first(latents, known, tmp_path, require=True).z, first.z)
    with pytest.raises(UserError, match="no latents of these 60 images with their attributes"):
        attributes_first(latents._replace(encoder="a third"), known, tmp_path, require=True)


def test_attributes_that_cannot_begin_codes():
    labels = known_of(60, 3)
    with pytest.raises(UserError, match="1 images have no attributes .*need those of every image"):
        known_attributes(labels._replace(missing=["007.png"]), D)
    with pytest.raises(UserError, match="3 attributes leave no room in codes of 3 dimensions"):
        known_attributes(labels, 3)
    labels.values[:, 1] = 1
    with pytest.raises(UserError, match="the attribute a1 is 1 for every image"):
        known_attributes(labels, D)
