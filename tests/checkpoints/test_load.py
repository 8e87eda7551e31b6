"""Every foreign format, across network shapes: the configuration is inferred and the outputs are the source's."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from checkpoints import fabricate
from safetensors.torch import save_file

from pdae_fast import PDAE, Prior, UserError, checkpoints, presets
from pdae_fast.checkpoints.attributes import CELEBA
from pdae_fast.config import PriorConfig


def assert_same_pdae(found: PDAE, source: PDAE) -> None:
    """Same outputs of both networks; the U-Net is run at 32 px whatever its image size, to be quick."""
    c, g = source.config, torch.Generator().manual_seed(1)
    x0 = torch.randn(1, *source.image_shape, generator=g)
    x_t, t = torch.randn(2, c.unet.input_channel, 32, 32, generator=g), torch.tensor([3, 700])
    z = torch.randn(2, c.latent_dim, generator=g)
    with torch.no_grad():
        assert torch.equal(found.encode(x0), source.encode(x0))
        for a, b in zip(found(x_t, t, z), source(x_t, t, z), strict=True):
            assert b.abs().mean() > 0.01
            assert torch.equal(a, b)


def assert_same_prior(found: Prior, source: Prior) -> None:
    x_t = torch.randn(2, source.config.unet.input_channel, 32, 32, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(found(x_t, t), source(x_t, t))


def said(configuration) -> dict:
    """The options for what does not follow from the weights."""
    u = configuration.unet
    options = {"use_new_attention_order": u.use_new_attention_order, "dropout": u.dropout}
    return options | ({"num_heads": u.num_heads} if u.head_channel == -1 else {"head_channel": u.head_channel})


@pytest.mark.parametrize("name", fabricate.PDAES)
def test_autoencoder(name, tmp_path):
    source = fabricate.pdae(fabricate.PDAES[name])
    path = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(source))
    found = PDAE.from_pretrained(path, **said(source.config))
    assert found.config == source.config
    assert_same_pdae(found, source)


@pytest.mark.parametrize("name", fabricate.PDAES)
@pytest.mark.parametrize("form", ["pdae", "guided", "diffae"])
def test_prior(name, form, tmp_path):
    c = fabricate.PDAES[name].prior
    if form == "diffae":  # its time embedding is 512 wide whatever the base
        c = dataclasses.replace(c, unet=dataclasses.replace(c.unet, time_channel=512))
    source = fabricate.prior(c)
    write = {"pdae": fabricate.pdae_prior, "diffae": fabricate.diffae, "guided": lambda m: m.unet.state_dict()}
    path = fabricate.save(tmp_path / "p.pt", write[form](source))
    found = Prior.from_pretrained(path, image_size=c.image_size, **said(c))
    assert found.config == c
    assert_same_prior(found, source)


def test_the_prior_inside_an_autoencoder_file(tmp_path):
    source = fabricate.pdae(fabricate.PDAES["rgb32-heads4"])
    path = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(source))
    assert_same_prior(Prior.from_pretrained(path, num_heads=4), source.prior())


def test_heads_matter_and_default_to_one(tmp_path):
    source = fabricate.pdae(fabricate.PDAES["rgb32-heads4"])
    path = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(source))
    loaded = checkpoints.load(path)
    assert (loaded.config.unet.num_heads, loaded.config.unet.use_new_attention_order) == (1, False)
    assert any("1 attention head" in note for note in loaded.notes)
    with pytest.raises(AssertionError):
        assert_same_pdae(PDAE.from_pretrained(path), source)


def test_ema_is_preferred_and_raw_can_be_asked_for(tmp_path):
    source = fabricate.pdae(fabricate.config())
    contents = fabricate.autoencoder(source)
    path = fabricate.save(tmp_path / "a.pt", contents)
    key = "out.2.weight"
    for weights, entry, said_so in (("ema", "ema_decoder", "EMA"), ("raw", "decoder", "raw")):
        loaded = checkpoints.load(path, weights=weights)
        assert torch.equal(loaded.state[f"decoder.{key}"], contents[entry][key])
        assert loaded.weights == said_so
    # Where there is no EMA the raw weights are taken, and that is said.
    path = fabricate.save(tmp_path / "b.pt", {k: v for k, v in contents.items() if not k.startswith("ema_")})
    loaded = checkpoints.load(path)
    assert torch.equal(loaded.state[f"decoder.{key}"], contents["decoder"][key])
    assert any("no EMA" in note for note in loaded.notes)


def test_released_prior_with_ema_only(tmp_path):
    source = fabricate.prior(fabricate.config().prior)
    path = fabricate.save(tmp_path / "p.pt", {"ema_denoise_fn": source.unet.state_dict()})
    assert_same_prior(Prior.from_pretrained(path), source)
    with pytest.raises(UserError, match="only the EMA weights"):
        checkpoints.load(path, weights="raw")


@pytest.mark.parametrize("aliases", ["both", "linear_emb", "cond_layers"])
def test_latent_dpm(aliases, tmp_path):
    source = fabricate.pdae(fabricate.config())
    mlp, contents = fabricate.latent_dpm(source, layers=4, hidden=24)
    if aliases != "both":
        drop = "cond_layers" if aliases == "linear_emb" else "linear_emb"
        for entry in ("latent_denoise_fn", "ema_latent_denoise_fn"):
            contents[entry] = {k: v for k, v in contents[entry].items() if drop not in k}
    found = PDAE.from_pretrained(fabricate.save(tmp_path / "l.pt", contents))
    assert found.config.latent == mlp.config
    assert_same_pdae(found, source)
    z, t = torch.randn(3, 12), torch.tensor([0, 5, 900])
    with torch.no_grad():
        assert torch.equal(found.latent_denoiser(z, t), mlp(z, t))


def test_aliases_that_differ_are_an_error(tmp_path):
    _, contents = fabricate.latent_dpm(fabricate.pdae(fabricate.config()))
    name = "layers.1.cond_layers.1.weight"
    contents["ema_latent_denoise_fn"][name] = contents["ema_latent_denoise_fn"][name] + 1
    with pytest.raises(UserError, match="linear_emb.weight differ"):
        checkpoints.load(fabricate.save(tmp_path / "l.pt", contents))


def test_everything_merges_into_one_pdae(tmp_path):
    source = fabricate.pdae(fabricate.config())
    mlp, latent = fabricate.latent_dpm(source)
    linear, classifier = fabricate.classifier(source)
    stats = fabricate.statistics(source)
    files = {
        name: fabricate.save(tmp_path / f"{name}.pt", contents)
        for name, contents in (("latent", latent), ("classifier", classifier), ("statistics", stats))
    }
    whole = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(source))
    found = PDAE.from_pretrained(whole, attributes="a,b,c", **files)
    assert found.config.attributes == ("a", "b", "c")
    assert torch.equal(found.classifier.weight, linear.weight)
    assert torch.equal(found.latent_mean, stats["mean"])
    assert torch.equal(found.latent_std, stats["std"])
    z, t = torch.randn(3, 12), torch.tensor([0, 5, 900])
    with torch.no_grad():
        assert torch.equal(found.latent_denoiser(z, t), mlp(z, t))
    # The same onto a saved directory, and the latent DPM of another autoencoder is noticed.
    source.save_pretrained(tmp_path / "dir")
    again = checkpoints.load(tmp_path / "dir", **files)
    assert not any("another encoder" in note for note in again.notes)
    assert again.state.keys() == found.state_dict().keys()
    fabricate.pdae(source.config, seed=9).save_pretrained(tmp_path / "other")
    other = checkpoints.load(tmp_path / "other", latent=files["latent"])
    assert any("another encoder" in note for note in other.notes)


def test_attribute_names(tmp_path):
    source = fabricate.pdae(fabricate.config())
    _, forty = fabricate.classifier(source, 40)
    path = fabricate.save(tmp_path / "c.pt", forty)
    assert checkpoints.load(path).config.attributes == CELEBA
    assert (len(CELEBA), CELEBA[0], CELEBA[20], CELEBA[39]) == (40, "5_o_Clock_Shadow", "Male", "Young")
    _, three = fabricate.classifier(source, 3)
    path = fabricate.save(tmp_path / "d.pt", three)
    assert checkpoints.load(path).config.attributes == ("attribute_0", "attribute_1", "attribute_2")
    (tmp_path / "names.txt").write_text("hat\nbeard\n\nyoung\n")
    (tmp_path / "celeba.txt").write_text("202599\nhat beard young\n000001.jpg -1 1 1\n")
    for names in (tmp_path / "names.txt", str(tmp_path / "celeba.txt"), ["hat", "beard", "young"]):
        assert checkpoints.load(path, attributes=names).config.attributes == ("hat", "beard", "young")
    for wrong in ("a,b", "a,b,b"):
        with pytest.raises(UserError, match="3 rows"):
            checkpoints.load(path, attributes=wrong)


def test_encoder_from_a_second_file(tmp_path):
    source, other = fabricate.pdae(fabricate.config()), fabricate.pdae(fabricate.config(), seed=5)
    decoder = fabricate.save(tmp_path / "decoder.pt", {"ema_decoder": source.decoder.state_dict()})
    flat = fabricate.save(tmp_path / "flat.pt", source.decoder.state_dict())
    encoders = (
        fabricate.save(tmp_path / "whole.pt", fabricate.autoencoder(source)),
        fabricate.save(tmp_path / "entry.pt", {"encoder": source.encoder.state_dict()}),
        fabricate.save(tmp_path / "bare.pt", source.encoder.state_dict()),
    )
    for file in (decoder, flat):
        for encoder in encoders:
            assert_same_pdae(PDAE.from_pretrained(file, encoder=encoder), source)
    # It wins over the encoder that the first file has.
    whole = fabricate.save(tmp_path / "other.pt", fabricate.autoencoder(other))
    found = PDAE.from_pretrained(whole, encoder=encoders[0])
    assert torch.equal(found.encoder.state_dict()["encoder.0.weight"], source.encoder.state_dict()["encoder.0.weight"])


@pytest.mark.parametrize("wrapping", ["module.", "_orig_mod.module.", "legacy", "half", "safetensors", "state_dict"])
def test_wrappings(wrapping, tmp_path):
    source = fabricate.pdae(fabricate.config())
    if wrapping == "half":
        source = source.half().float()
    contents, path = fabricate.autoencoder(source), tmp_path / "a.pt"
    if wrapping == "legacy":
        torch.save(contents, path, _use_new_zipfile_serialization=False)
    elif wrapping == "half":
        entries = {k: {n: t.half() for n, t in v.items()} for k, v in contents.items() if "coder" in k}
        torch.save(entries, path)
    elif wrapping == "safetensors":
        path = tmp_path / "a.safetensors"
        nested = {k: v for k, v in contents.items() if "coder" in k}
        save_file({f"{k}.{n}": t.clone() for k, v in nested.items() for n, t in v.items()}, path)
    elif wrapping == "state_dict":
        prior = source.prior()
        state = {f"module.{k}": v for k, v in prior.unet.state_dict().items()}
        fabricate.save(path, {"state_dict": state, "epoch": 3})
        assert_same_prior(Prior.from_pretrained(path), prior)
        return
    else:
        torch.save({k: {wrapping + n: t for n, t in v.items()} for k, v in contents.items() if "coder" in k}, path)
    found = PDAE.from_pretrained(path)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert_same_pdae(found, source)


def test_flat_safetensors(tmp_path):
    source = fabricate.pdae(fabricate.config())
    save_file(source.prior().unet.state_dict(), tmp_path / "prior.safetensors")
    assert_same_prior(Prior.from_pretrained(tmp_path / "prior.safetensors"), source.prior())
    save_file(source.decoder.state_dict(), tmp_path / "decoder.safetensors")
    save_file(source.encoder.state_dict(), tmp_path / "encoder.safetensors")
    found = PDAE.from_pretrained(tmp_path / "decoder.safetensors", encoder=tmp_path / "encoder.safetensors")
    assert_same_pdae(found, source)


@pytest.mark.parametrize(
    ("rates", "levels", "size"),
    [((4,), 3, 64), ((), 2, 64), ((2, 4), 3, 32), ((8, 16, 32), 6, 256), ((1,), 2, 32), ((2,), 2, 32)],
)
def test_image_size_of_a_prior_is_deduced_and_said(rates, levels, size, tmp_path):
    u = fabricate.unet(attention_resolutions=rates, channel_multiplier=(1,) * levels)
    source = fabricate.prior(PriorConfig(image_size=2**levels, unet=u))
    path = fabricate.save(tmp_path / "p.pt", source.unet.state_dict())
    loaded = checkpoints.load(path)
    assert loaded.config.image_size == size
    assert any(f"image size {size}" in note for note in loaded.notes)
    assert checkpoints.load(path, image_size=128).config.image_size == 128


def test_diffae_says_its_own_settings(tmp_path):
    c = fabricate.config(64, channel_multiplier=(1, 1, 2), attention_resolutions=(4,), num_heads=4).prior
    source = fabricate.prior(c)
    settings = {
        "img_size": 64,
        "net_attn": [16],
        "net_beatgans_attn_head": 4,
        "dropout": 0.2,
        "T": 1000,
        "beta_scheduler": "linear",
    }
    path = fabricate.save(tmp_path / "last.ckpt", fabricate.diffae(source, hyper_parameters=settings))
    loaded = checkpoints.load(path)
    assert loaded.notes == []
    assert (loaded.config.image_size, loaded.config.unet.num_heads, loaded.config.unet.dropout) == (64, 4, 0.2)
    assert checkpoints.load(path, num_heads=2).config.unet.num_heads == 2
    wrong = fabricate.diffae(source, hyper_parameters=settings | {"net_attn": [32]})
    with pytest.raises(UserError, match=r"feature-map sizes \[32\]"):
        checkpoints.load(fabricate.save(tmp_path / "wrong.ckpt", wrong))


def test_diffae_attention_is_a_feature_map_size(tmp_path):
    c = fabricate.config(64, channel_multiplier=(1, 1, 2), attention_resolutions=(4,)).prior
    source = fabricate.prior(c)
    path = fabricate.save(tmp_path / "last.ckpt", fabricate.diffae(source))
    tree = fabricate.yaml_tree(c, attention_resolutions=[16])
    assert checkpoints.load(path, config=tree).config == dataclasses.replace(c)
    # The size of the features and the rate give the size of the images.
    del tree["dataset_config"]
    assert checkpoints.load(path, config=tree).config.image_size == 64
    # A configuration in PDAE's own convention holds rates.
    assert checkpoints.load(path, config=fabricate.yaml_tree(c)).config == c
    tree["denoise_fn_config"]["attention_resolutions"] = [8]
    with pytest.raises(UserError, match="feature-map sizes"):
        checkpoints.load(path, config=tree, image_size=64)
    # In a PDAE file 16 is a rate, and wrong.
    pdae = fabricate.save(tmp_path / "p.pt", fabricate.pdae_prior(source))
    with pytest.raises(UserError, match="attention_resolutions"):
        checkpoints.load(pdae, config=fabricate.yaml_tree(c, attention_resolutions=[16]))


def test_diffae_buffers_are_left_out_and_give_the_size(tmp_path):
    c = fabricate.config(128, attention_resolutions=()).prior
    source = fabricate.prior(c)
    contents = fabricate.diffae(source)
    contents["state_dict"] |= {"x_T": torch.randn(2, 3, 128, 128), "conds_mean": torch.zeros(512)}
    loaded = checkpoints.load(fabricate.save(tmp_path / "last.ckpt", contents))
    assert loaded.config.image_size == 128
    assert all(name.startswith("unet.") for name in loaded.state)


def test_golden_layout_of_the_published_code(tmp_path):
    """Names and shapes as the published code writes them for CelebA-64, from its own listing."""
    folder = Path(__file__).parents[1] / "golden"
    keys = {part: json.loads((folder / f"celeba64.{part}_keys.json").read_text()) for part in ("encoder", "decoder")}
    contents = {f"ema_{part}": {k: torch.zeros(1).expand(s) for k, s in keys[part].items()} for part in keys}
    loaded = checkpoints.load(fabricate.save(tmp_path / "a.pt", contents), num_heads=4)
    # A file says nothing of the images.
    assert loaded.config == dataclasses.replace(presets["celeba64"], crop="centre")


def test_saved_directory_takes_no_contradiction(tmp_path):
    fabricate.pdae(fabricate.config(num_heads=2)).save_pretrained(tmp_path / "m")
    assert checkpoints.load(tmp_path / "m", num_heads=2).config.unet.num_heads == 2
    with pytest.raises(UserError, match="num_heads 4 but"):
        checkpoints.load(tmp_path / "m", num_heads=4)
    with pytest.raises(UserError, match="part of a saved model"):
        checkpoints.load(tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="encoder="):
        checkpoints.load(tmp_path / "m", encoder=tmp_path / "e.pt")
    with pytest.raises(TypeError):
        checkpoints.load(tmp_path / "m", heads=4)
