"""`train diffae`, and the networks on its codes."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from golden_rule import fill
from helpers import TINY, image_folder, images, resumed_equals_whole
from pdae_fast import DiffAE, DiffAEConfig, Pipeline, cli, config, presets, train
from pdae_fast.data import Sample
from pdae_fast.schedule import build_schedule
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.arguments import parse
from pdae_fast.training.build import build_model
from pdae_fast.training.objective import simple_loss
from pdae_fast.training.step import StepOptions
from pdae_fast.training.tasks import TASKS

UNET = dataclasses.replace(TINY.unet, norm_groups=8)
TINY_DIFFAE = DiffAEConfig(image_size=32, latent_dim=16, unet=UNET, encoder_multiplier=(1, 1, 2))
SMALL = ("--steps", 3, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


def run(*argv):
    try:
        return cli.run(train.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def trainer(out="out", dropout=0.1, **options):
    unet = dataclasses.replace(UNET, dropout=dropout)
    model = fill(DiffAE(dataclasses.replace(TINY_DIFFAE, unet=unet)))
    data = [Sample(image, f"{i}", None) for i, image in enumerate(images(10))]
    settings = TrainSettings("diffae", "x", steps=6, batch_size=4, lr=1e-3, seed=3)
    return Trainer(
        TASKS["diffae"](model), data, settings, out, quiet=True, save_every=100, options=StepOptions(**options)
    )


@torch.no_grad()
def test_the_loss_is_that_of_eps_given_the_encoders_z():
    model, x0, noise, t = fill(DiffAE(TINY_DIFFAE)).eval(), images(3), images(3, seed=1), torch.tensor([3, 400, 900])
    schedule = build_schedule(TINY_DIFFAE.schedule)
    found = float(simple_loss(model, schedule, x0, t, noise))
    a = torch.tensor(schedule.alpha_bar[t])[:, None, None, None]
    model.double()
    eps = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, model.encode(x0))
    assert found == pytest.approx(float((eps - noise).square().mean()), rel=1e-5)


def test_every_weight_is_trained_and_averaged(tmp_path):
    run = trainer(tmp_path)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    batches = run._batches()
    for _ in range(2):
        run.train_step(batches)
    for name, value in run.model.state_dict().items():
        assert not torch.equal(value, before[name]) and not torch.equal(run.ema.state_dict()[name], value), name


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    resumed_equals_whole(tmp_path, trainer)


def test_options_of_a_step_change_its_rounding_alone(tmp_path):
    def losses(**options):
        run = trainer(tmp_path, dropout=0.0, **options)
        batches = run._batches()
        return [float(run.train_step(batches)) for _ in range(3)]

    every = {"fused_adam": True, "channels_last": True, "checkpointing": True, "fused_norms": True}
    assert losses(**every) == pytest.approx(losses(), rel=2e-4)


def test_from_images_to_a_model_that_samples_and_edits(tmp_path, capsys):
    data, out = image_folder(tmp_path / "images", 12), tmp_path / "diffae"
    (tmp_path / "tiny.json").write_text(config.dumps(TINY_DIFFAE))
    (tmp_path / "table.csv").write_text("\n".join(["name,odd", *(f"{i:02d}.png,{i % 2}" for i in range(12))]) + "\n")
    base = ("--data", data, *SMALL)
    new = ("diffae", *base, "--architecture", tmp_path / "tiny.json", "--out", out, "--sample-every", 3)
    assert run(*new) == 0
    with Image.open(out / "samples" / "0000003.png") as picture:
        picture.load()
    assert DiffAE.from_pretrained(out).config == TINY_DIFFAE
    assert run("latent", *base, "--init-from", out, "--hidden", 32, "--layers", 3, "--out", tmp_path / "latent") == 0
    table = ("--attributes", tmp_path / "table.csv", "--init-from", tmp_path / "latent", "--out", tmp_path / "full")
    assert run("classifier", *base, *table) == 0
    full = DiffAE.from_pretrained(tmp_path / "full")
    assert full.config.attributes == ("odd",) and full.config.latent.hidden == 32
    assert json.loads((tmp_path / "full" / "metrics.json").read_text())["images"] == 1
    pipe = Pipeline(full, steps=2, device="cpu")
    assert torch.isfinite(pipe.sample(1)).all()
    assert torch.isfinite(pipe.manipulate(images(1), "odd", 0.5)).all()
    # Trained further, its codes change: what was trained on them is left out.
    assert run("diffae", *base, "--init-from", tmp_path / "full", "--out", tmp_path / "more") == 0
    assert DiffAE.from_pretrained(tmp_path / "more").config == TINY_DIFFAE
    capsys.readouterr()
    for arguments, words in (
        (["--init-from", out, "--architecture", "fashion32"], "--architecture is for a new Diff-AE"),
        (["--init-from", out, "--latent-dim", 8], "--latent-dim is for a new Diff-AE"),
        (["--num-heads", 2], "--num-heads is for the checkpoint of --init-from"),
        (["--init-from", "fashion32"], "is a PDAE autoencoder; expected a Diff-AE"),
        (["--frozen-bfloat16"], "needs a frozen half, which train diffae does not have"),
    ):
        assert run("diffae", *base, "--out", tmp_path / "none", *arguments) == 2
        printed = capsys.readouterr()
        assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["celeba64", "ffhq128", "avatars64"])
def test_a_preset_makes_the_published_shape(name):
    """Diff-AE's templates: one level more in the encoder, down to 4 x 4; time embedding and z of 512."""
    arguments = ["diffae", "--data", "x", "--out", "y", "--architecture", name]
    with torch.device("meta"):
        found = build_model(parse(arguments)).config
    multiplier = {"celeba64": (1, 2, 4, 8, 8), "ffhq128": (1, 1, 2, 3, 4, 4), "avatars64": (1, 1, 2, 3, 3)}[name]
    assert found.encoder_multiplier == multiplier and found.image_size >> (len(multiplier) - 1) == 4
    assert found.unet == dataclasses.replace(presets[name].unet, time_channel=512) and found.latent_dim == 512
