"""The encoder's warm start: what changes and what does not, what is taken from another PDAE, the command."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from helpers import (
    TINY,
    TINY_FULL,
    Smooth,
    image_folder,
    images,
    needs_sklearn,
    noise,
    resumed_equals_whole,
    tiny_pdae,
    tiny_prior,
)
from pdae_fast import PDAE, Prior, UserError, cli, train
from pdae_fast.data import open_dataset
from pdae_fast.data.latents import Latents, encode_dataset, statistics
from pdae_fast.schedule import build_schedule
from pdae_fast.training import Trainer, TrainSettings, warm_start
from pdae_fast.training.objective import encoder_loss
from pdae_fast.training.target_codes import feature_codes, pca_codes
from pdae_fast.training.tasks import EncoderTask, ImagesWithRows
from pdae_fast.training.warm_start import (
    encoder_task,
    evaluate,
    predicting,
    take_encoder_for_codes,
    take_g,
    take_g_for_codes,
)

D = TINY.latent_dim


def make_latents(z, encoder="codes", images="images"):
    return Latents(z, [f"{i:02d}" for i in range(len(z))], [None] * len(z), *statistics(z), encoder, images, [])


def codes(count, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def trainer(out, task, dataset, **changes):
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-3, "seed": 3, "flip": False, **changes}
    return Trainer(task, dataset, TrainSettings("encoder", "x", **settings), out, log_every=1, quiet=True)


# -- G -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"image_size": 64}, {"unet": dataclasses.replace(TINY.unet, dropout=0.0)}])
def test_g_is_taken_over_and_nothing_else(change):
    model = PDAE.from_prior(tiny_prior(), latent_dim=D, encoder_channel=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = PDAE(dataclasses.replace(TINY, **change))
    for parameter in start.parameters():
        nn.init.normal_(parameter)
    assert take_g(model, start) is None
    trained = tuple(f"decoder.{part}." for part in model.decoder.TRAINED)
    for name, value in model.state_dict().items():
        assert torch.equal(value, (start.state_dict() if name.startswith(trained) else before)[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unet": dataclasses.replace(TINY.unet, base_channel=64)}, "its base_channel is 64, that of the model"),
        ({"unet": dataclasses.replace(TINY.unet, num_heads=1)}, "its num_heads is 1"),
        ({"schedule": dataclasses.replace(TINY.schedule, timesteps=500)}, "its schedule is"),
    ],
)
def test_a_g_that_does_not_fit_is_left(change, words):
    model = tiny_pdae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert words in take_g(model, PDAE(dataclasses.replace(TINY, **change)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [32, 64])
def test_a_g_for_other_codes_does_with_them_what_it_did_with_its_own(size):
    """Of the new codes the known ones are an affine function, so nothing is lost; encoder and prior stay."""
    start = tiny_pdae(dataclasses.replace(TINY, latent_dim=7, image_size=size))
    model = PDAE.from_prior(tiny_prior(), latent_dim=D, encoder_channel=32)
    z = codes(40) * 3 + 1
    known = z @ torch.randn(D, 7, generator=torch.Generator().manual_seed(1)) - 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert take_g_for_codes(model, start, z, known) == pytest.approx(1, abs=1e-6)
    trained = tuple(f"decoder.{part}." for part in model.decoder.TRAINED)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name[:8] == "encoder.")
    assert not any(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n.startswith(trained[2]))
    for decoder in (model.decoder, start.decoder):
        decoder.eval()
    x, t = images(4), torch.tensor([5, 300, 700, 999])
    with torch.no_grad():
        features = model.decoder.trunk(x, t)
        expected = start.decoder.decode_gradient(features, known[:4])
        torch.testing.assert_close(model.decoder.decode_gradient(features, z[:4]), expected, rtol=1e-3, atol=1e-4)


def test_the_map_is_that_of_least_squares():
    """Against numpy's, for codes that explain the known ones in part; one code that never varies has no say."""
    start = tiny_pdae(dataclasses.replace(TINY, latent_dim=3))
    model, z = tiny_pdae(), codes(60)
    z[:, 4] = 0.5
    known = z[:, :3] * 2 + torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    explained = take_g_for_codes(model, start, z, known)
    design = np.c_[z.double().numpy(), np.ones(60)]
    solution = np.linalg.lstsq(design, known.double().numpy(), rcond=None)[0]
    error = known.double().numpy() - design @ solution
    assert explained == pytest.approx(1 - error.var() / known.double().numpy().var(0).mean(), rel=1e-4)
    old, new = start.decoder.label_emb, model.decoder.label_emb
    mapped = torch.from_numpy((design @ solution).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(new(z), old(mapped), rtol=1e-4, atol=1e-4)
    assert not new.weight[:, 4].detach().abs().max() > 1e-6


def test_a_g_for_other_codes_must_be_of_the_same_shape():
    other = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, base_channel=64))
    with pytest.raises(UserError, match="does not fit: its base_channel is 64"):
        take_g_for_codes(tiny_pdae(), PDAE(other), codes(20), codes(20, 1))
    with pytest.raises(UserError, match="do not belong to these models"):
        take_g_for_codes(tiny_pdae(), tiny_pdae(), codes(20), codes(20)[:, :3])


def test_an_encoder_for_other_codes_makes_them():
    """Where the new codes are an affine function of its own; of another width it is left as it was."""
    start, model = tiny_pdae(dataclasses.replace(TINY, latent_dim=7)).eval(), tiny_pdae().eval()
    known = codes(40)[:, :7] * 3 + 1
    slope = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    assert take_encoder_for_codes(model, start, known @ slope - 2, known)
    with torch.no_grad():
        expected = start.encoder(images(4)) @ slope - 2
        torch.testing.assert_close(model.encoder(images(4)), expected, rtol=1e-4, atol=1e-4)
    other = PDAE.from_prior(tiny_prior(), latent_dim=D, encoder_channel=64)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert not take_encoder_for_codes(other, start, known @ slope, known)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


# -- the task ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error():
    x0, z = torch.randn(3, 4), torch.randn(3, 2)
    linear = nn.Linear(4, 2)
    found = x0.double().numpy() @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    expected = ((found - z.double().numpy()) ** 2).sum() / 6
    assert float(encoder_loss(linear, x0, z).detach()) == pytest.approx(expected, rel=1e-5)


def test_every_image_comes_with_its_own_code_and_none_is_in_both_parts():
    data, z = Smooth(), codes(60)
    _, train_part, held = encoder_task(tiny_pdae(), data, make_latents(z), 0.25, seed=1)
    assert len(train_part) == 45 and len(held) == 15
    seen = {}
    for part in (train_part, held):
        for x0, code in (part[i] for i in range(len(part))):
            index = int((data.images == x0.numpy()).all((1, 2)).nonzero()[0][0])
            assert torch.equal(code, z[index])
            seen[index] = seen.get(index, 0) + 1
    assert seen == dict.fromkeys(range(60), 1)
    _, everything, judged = encoder_task(tiny_pdae(), data, make_latents(z), 0)
    assert len(everything) == len(judged) == 60
    with pytest.raises(UserError, match="59 codes for 60 images"):
        encoder_task(tiny_pdae(), data, make_latents(z[:59]))


def test_only_the_encoder_changes(tmp_path):
    model = tiny_pdae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task, dataset, _ = encoder_task(model, Smooth(), make_latents(codes(60)))
    trainer(tmp_path, task, dataset).run()
    after = PDAE.from_pretrained(tmp_path)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("encoder.")}


@needs_sklearn
def test_the_codes_are_learned(tmp_path):
    """On images that were not trained on; a constant would explain nothing of them."""
    data = Smooth(400)
    latents = pca_codes(data, 4, quiet=True)
    model = PDAE.from_prior(tiny_prior(), latent_dim=4, encoder_channel=32)
    task, dataset, held = encoder_task(model, data, latents)
    start = evaluate(model.encoder, held, torch.device("cpu"))
    run = trainer(tmp_path, task, dataset, steps=60, batch_size=32, ema_decay=0.9, lr_schedule="cosine")
    run.run()
    end = evaluate(run.ema, held, torch.device("cpu"))
    assert start["explained_variance"] < 0.1 and end["explained_variance"] > 0.9
    assert min(end["explained_variance_of_dimensions"]) > 0.8


def test_the_explained_variance_is_one_minus_error_over_variance():
    data = Smooth(70)  # more than one batch
    linear = nn.Sequential(nn.Flatten(), nn.Linear(1024, 3))
    z = torch.randn(70, 3) * torch.tensor([1.0, 2.0, 5.0]) + 4
    report = evaluate(linear, ImagesWithRows(data, z, range(70)), torch.device("cpu"))
    with torch.no_grad():
        found = linear(torch.from_numpy(data.images)[:, None]).double().numpy()
    exact = z.double().numpy()
    error, variance = ((found - exact) ** 2).mean(0), exact.var(0)
    np.testing.assert_allclose(report["explained_variance_of_dimensions"], 1 - error / variance, rtol=1e-5)
    assert report["explained_variance"] == pytest.approx(1 - error.sum() / variance.sum(), rel=1e-5)
    assert report["mse"] == pytest.approx(error.mean(), rel=1e-5) and report["images"] == 70
    text = warm_start.summary(report)
    assert f"{report['explained_variance']:.4f}" in text and f"{(1 - error / variance).min():.4f}" in text


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, amp):
    def make(out):
        task, dataset, _ = encoder_task(tiny_pdae(), Smooth(20), make_latents(codes(20)))
        return trainer(out, task, dataset, amp=amp)

    resumed_equals_whole(tmp_path, make)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "others"}, "other target codes"),
        ({"images": "others"}, "other images"),
        ({"decoder": 1.0}, "other decoder weights"),
        ({"holdout": 0.5}, "the data set has 10 images but the saved run saw 18"),
        ({"latent_dim": 24}, "latent_dim is 24, not 16"),
    ],
)
def test_what_changed_is_named_on_resume(tmp_path, change, words):
    def make(encoder="codes", images="images", decoder=0.0, holdout=0.1, latent_dim=D):
        model = tiny_pdae(dataclasses.replace(TINY, latent_dim=latent_dim))
        nn.init.constant_(model.decoder.shift_out[-1].bias, decoder)
        z = torch.randn(20, latent_dim, generator=torch.Generator().manual_seed(0))
        task, dataset, _ = encoder_task(model, Smooth(20), make_latents(z, encoder, images), holdout)
        return trainer(tmp_path, task, dataset)

    make().save()
    make().resume()
    with pytest.raises(UserError, match=words):
        make(**change).resume()


def test_a_batch_is_images_and_codes():
    x0, z = EncoderTask.collate([(torch.zeros(1, 2, 2), torch.ones(3)), (torch.ones(1, 2, 2), torch.zeros(3))])
    assert x0.shape == (2, 1, 2, 2) and z.tolist() == [[1, 1, 1], [0, 0, 0]]


# -- the command -------------------------------------------------------------------------------------------------------

SMALL = ("--steps", 4, "--batch-size", 8, "--log-every", 1, "--device", "cpu")


def run(*argv):
    try:
        return cli.run(train.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def places(tmp_path):
    """A prior of 32 px, and a PDAE of 64 px around another prior of the same U-Net."""
    tiny_prior().save_pretrained(tmp_path / "prior")
    large = tiny_pdae(dataclasses.replace(TINY, image_size=64))
    nn.init.constant_(large.decoder.shift_out[-1].bias, 0.25)
    large.save_pretrained(tmp_path / "large")
    tiny_pdae(dataclasses.replace(TINY, latent_dim=24)).save_pretrained(tmp_path / "wide")
    tiny_pdae().save_pretrained(tmp_path / "same")
    broad = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, base_channel=64))
    PDAE(broad).save_pretrained(tmp_path / "broad")
    (tmp_path / "empty").mkdir()
    image_folder(tmp_path / "images", 30)
    return tmp_path


def command(places, *more):
    base = ("--init-from", places / "prior", "--architecture", places / "same" / "config.json")
    return ("encoder", "--data", places / "images", *base, "--out", places / "out", *SMALL, *more)


@needs_sklearn
def test_a_warm_start_for_pdae(places, capsys):
    assert run(*command(places)) == 0
    printed = capsys.readouterr().out
    report = json.loads((places / "out" / "metrics.json").read_text())
    assert report["part"] == "held out" and report["images"] == 3 and report["step"] == 4
    assert f"{report['explained_variance']:.4f}" in printed and "30 latents: " in printed
    assert json.loads((places / "out" / "train.json").read_text())["target"] == "pca"
    with torch.no_grad():  # the metrics are those of what users load
        encoder = PDAE.from_pretrained(places / "out").encoder
        dataset = open_dataset(places / "images", 32, 1)
        latents = pca_codes(dataset, D, places / "latents", require=True)
        _, _, held = encoder_task(tiny_pdae(), dataset, latents)
        assert evaluate(encoder, held, torch.device("cpu"))["mse"] == pytest.approx(report["mse"], rel=1e-5)
    start = ("--init-from", places / "prior", "--start-from", places / "out")
    shared = ("--data", places / "images", "--architecture", places / "same" / "config.json", *SMALL, "--quiet")
    assert run("pdae", *start, "--out", places / "pdae", *shared) == 0
    config = PDAE.from_pretrained(places / "pdae").config
    assert config == PDAE.from_pretrained(places / "out").config == TINY


def test_from_another_size_and_resumed(places, capsys):
    assert run(*command(places, "--target", places / "large")) == 0
    assert f"G is that of {places / 'large'}" in capsys.readouterr().out
    large, found = PDAE.from_pretrained(places / "large"), PDAE.from_pretrained(places / "out")
    assert found.config == TINY
    for part in found.decoder.TRAINED:
        for name, value in getattr(large.decoder, part).state_dict().items():
            assert torch.equal(getattr(found.decoder, part).state_dict()[name], value)
    # These are the codes, kept where the other tasks keep theirs.
    kept = encode_dataset(large, open_dataset(places / "images", 64, 1), places / "latents", require=True)
    assert len(kept.z) == 30
    weights = (places / "out" / "model.safetensors").read_bytes()
    resume = command(places, "--resume", "--quiet")
    assert run(*resume, "--target", places / "large") == 0
    assert (places / "out" / "model.safetensors").read_bytes() == weights
    nn.init.constant_(large.encoder.encoder[-1].bias, 2.0)
    large.save_pretrained(places / "large")
    capsys.readouterr()
    assert run(*resume, "--target", places / "large") == 2
    assert "other target codes" in capsys.readouterr().err
    assert (places / "out" / "model.safetensors").read_bytes() == weights


@needs_sklearn
def test_codes_of_the_priors_features_with_a_g_that_knew_others(places, capsys):
    start = places / "wide"  # z of 24 dimensions
    arguments = ("--target", "features", "--start-from", start)
    assert run(*command(places, *arguments)) == 0
    printed = capsys.readouterr().out
    assert f"G is that of {start}, by a linear map that explains " in printed
    dataset = open_dataset(places / "images", 32, 1)
    z = feature_codes(tiny_prior().unet, dataset, D, places / "latents", require=True).z
    known = encode_dataset(PDAE.from_pretrained(start), dataset, places / "latents", require=True).z
    expected = tiny_pdae()
    take_g_for_codes(expected, PDAE.from_pretrained(start), z, known)
    found = PDAE.from_pretrained(places / "out").decoder
    for part in found.TRAINED:
        torch.testing.assert_close(getattr(found, part).state_dict(), getattr(expected.decoder, part).state_dict())
    assert run(*command(places, *arguments, "--resume", "--quiet")) == 0
    capsys.readouterr()
    assert run(*command(places, "--target", "features", "--resume", "--quiet")) == 2
    assert "other decoder weights" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["same", "pca"])
def test_codes_that_begin_with_attributes(places, capsys, target):
    """The codes of a model, so that its encoder and G go on with them; and components."""
    if target == "pca":
        pytest.importorskip("sklearn")
    rows = "".join(
        f"{path.name},{i % 2},{i // 3 % 2}\n" for i, path in enumerate(sorted((places / "images").iterdir()))
    )
    (places / "attributes.csv").write_text(f"image,hat,beard\n{rows}")
    chosen = ("--attributes", places / "attributes.csv", "--columns", "beard", "--steps", 1, "--lr", 1e-9)
    options = ("--target", places / "same" if target == "same" else target, *chosen)
    assert run(*command(places, *options)) == 0
    printed = capsys.readouterr().out
    found = PDAE.from_pretrained(places / "out").eval()
    (file,) = (path for path in (places / "latents").iterdir() if str(path) in printed)
    z = torch.load(file)["z"]
    assert torch.equal(z[:, 0].sign(), torch.tensor([1.0 if i // 3 % 2 else -1.0 for i in range(30)]))
    if target == "same":
        assert f"the encoder too, G is that of {places / 'same'}, by a linear map that explains " in printed
        start = PDAE.from_pretrained(places / "same").eval()
        dataset = open_dataset(places / "images", 32, 1)
        x = torch.stack([sample.image for sample in dataset])
        # An encoder through least squares: its error says nothing of what it could not know, nor of its own mean.
        with torch.no_grad():
            error = (z - found.encoder(x)).double()
            design = np.c_[start.encoder(x).double().numpy(), np.ones(30)]
        assert np.abs(design.T @ error.numpy()).max() < 1e-3
    assert run(*command(places, *options, "--resume", "--quiet")) == 0
    (places / "attributes.csv").write_text(f"image,hat,beard\n{rows.replace(',1,0', ',1,1')}")
    capsys.readouterr()
    assert run(*command(places, *options, "--resume", "--quiet")) == 2
    assert "other target codes" in capsys.readouterr().err


def test_a_g_of_another_shape_is_said(places, capsys):
    other = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, channel_multiplier=(1, 2)))
    PDAE(other).save_pretrained(places / "other")
    assert run(*command(places, "--target", places / "other")) == 0
    assert f"G is not taken from {places / 'other'}: its channel_multiplier is (1, 2)" in capsys.readouterr().out
    assert not PDAE.from_pretrained(places / "out").decoder.shift_out[-1].weight.any()  # as it starts: G = 0


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_another_prediction_of_the_same_weights(prediction):
    """The output, which was eps, is v or x0 now; G is what it was."""
    model, x, z = tiny_pdae().eval(), noise(3, *tiny_pdae().image_shape), noise(3, TINY.latent_dim, seed=1)
    t = torch.tensor([3, 40, 90])
    other = predicting(model, prediction).eval()
    assert other.config == dataclasses.replace(TINY, prediction=prediction) and predicting(model, "epsilon") is model
    with torch.no_grad():
        (eps, gradient), (found, same) = model(x, t, z), other(x, t, z)
    alpha_bar = torch.tensor(build_schedule(TINY.schedule).alpha_bar)[t][:, None, None, None]
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    v = eps.double()
    expected = spread * x + signal * v if prediction == "v_prediction" else (x - signal * v) / spread
    assert torch.equal(gradient, same)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_prior_that_predicts_v_from_one_that_predicted_eps(places):
    """And G alone, around it."""
    tiny_pdae(TINY_FULL).save_pretrained(places / "whole")
    base = ("--data", places / "images", *SMALL, "--quiet")
    assert (
        run("prior", *base, "--init-from", places / "prior", "--prediction", "v_prediction", "--out", places / "v") == 0
    )
    prior = Prior.from_pretrained(places / "v")
    assert prior.config == dataclasses.replace(TINY.prior, prediction="v_prediction")
    g = ("--init-from", places / "v", "--start-from", places / "whole", "--freeze-encoder", "--out", places / "g")
    assert run("pdae", *base, *g) == 0
    model = PDAE.from_pretrained(places / "g")
    assert model.config == dataclasses.replace(TINY_FULL, prediction="v_prediction")
    for name, value in prior.unet.state_dict().items():
        assert torch.equal(model.decoder.state_dict()[name], value)


def test_g_alone_keeps_what_sits_on_the_codes(places):
    """--freeze-encoder: codes, latent DPM, classifier and statistics stay; the prior is that of --init-from."""
    before = tiny_pdae(TINY_FULL)
    before.save_pretrained(places / "whole")
    prior = tiny_prior()
    nn.init.normal_(prior.unet.out[-1].weight)  # unlike the prior in `before`
    prior.save_pretrained(places / "other prior")
    start = ("--init-from", places / "other prior", "--start-from", places / "whole", "--freeze-encoder")
    arguments = ("pdae", "--data", places / "images", "--out", places / "out", *start, *SMALL, "--quiet")
    assert run(*arguments) == 0
    after = PDAE.from_pretrained(places / "out")
    assert after.config == TINY_FULL
    own = {f"decoder.{name}": value for name, value in prior.unet.state_dict().items()}
    trained = tuple(f"decoder.{part}." for part in after.decoder.TRAINED)
    for name, value in after.state_dict().items():
        if name.startswith(trained):
            continue
        assert torch.equal(value, own.get(name, before.state_dict()[name])), name
    assert not torch.equal(after.decoder.shift_out[-1].weight, before.decoder.shift_out[-1].weight)
    assert run(*arguments[:-1], "--resume") == 0


MISTAKES_OF_G = [
    (["--freeze-encoder"], "--start-from must give the encoder"),
    (["--freeze-encoder", "--start-from", "{places}/broad"], "broad: its unet is"),
    (["--velocity", "-1"], "--velocity must be a number from 0 up"),
    (["--velocity", "nan"], "--velocity must be a number from 0 up"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES_OF_G, ids=[" ".join(a) for a, _ in MISTAKES_OF_G])
def test_mistakes_with_g_alone(places, capsys, arguments, words):
    base = ("--init-from", places / "prior", "--architecture", places / "same" / "config.json", "--quiet")
    arguments = [a.format(places=places) for a in arguments]
    assert run("pdae", "--data", places / "images", "--out", places / "out", *base, *SMALL, *arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and not (places / "out").exists()


MISTAKES = [
    (["--target", "{places}/wide"], "its latent_dim is 24"),
    (["--target", "/none"], "neither a bundled model"),
    (["--target", "{places}/prior"], "is a prior"),
    (["--target", "{places}/large", "--out", "{places}/large"], "is --target itself"),
    (
        ["--target", "{places}/large", "--start-from", "{places}/same"],
        "brings its own G",
    ),
    (["--start-from", "{places}/broad"], "broad: its base_channel is 64, that of the model to train 32"),
    (["--start-from", "/none"], "neither a bundled model"),
    (["--start-from", "{places}/large", "--out", "{places}/large"], "is --start-from itself"),
    (["--target", "features", "--target-images", "16"], "need at least 17 images, not 16"),
    (["--target-images", "16"], "need at least 17 images, not 16"),
    (["--target-images", "0"], "--target-images must be at least 1"),
    (["--data", "{places}/empty"], "no images"),
    (["--holdout", "1"], "holdout must be a fraction"),
    (["--cached-only"], "no latents of these 30 images"),
    (["--columns", "hat"], "give --attributes FILE"),
    (["--attributes", "/none.csv"], "/none.csv"),
    (["--flip"], "unrecognized arguments: --flip"),
    (["--init-from", ""], "train encoder needs a pre-trained prior"),
]


@needs_sklearn
@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_print_one_line_and_exit_2(places, capsys, arguments, words):
    before = (places / "large" / "model.safetensors").read_bytes()
    assert run(*command(places, "--quiet", *(a.format(places=places) for a in arguments))) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
    assert not (places / "out" / "model.safetensors").exists() and not (places / "latents").exists()
    assert (places / "large" / "model.safetensors").read_bytes() == before


def test_without_scikit_learn(places, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run(*command(places)) == 2
    printed = capsys.readouterr()
    assert "pip install 'pdae_fast[experiments]'" in printed.err and len(printed.err.splitlines()) == 1
    assert not (places / "out").exists()
    assert run(*command(places, "--target", places / "large", "--quiet")) == 0
