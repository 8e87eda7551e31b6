"""The whole way on foreign ground: a network that diffusers built, trained and saved becomes an autoencoder."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import Later, needs_diffusers
from pdae_fast import PDAE, Prior, cli, train
from pdae_fast.experiments import encode, manipulate, reconstruct

pytestmark = needs_diffusers
diffusers = Later("diffusers")

COUNT, SIZE = 48, 32


def run(command, *argv):
    assert cli.run(command, [*(str(a) for a in argv), "--quiet"]) == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Squares and discs of any colour before any other, with a table that says which; 8 bits each channel."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    rows = ["name,disc,bright"]
    for i in range(COUNT):
        (a, b), r, disc = random.integers(8, 24, 2), random.integers(4, 9), i % 2
        inside = (x - a) ** 2 + (y - b) ** 2 < r * r if disc else (abs(x - a) < r) & (abs(y - b) < r)
        ground, ink = random.integers(0, 256, (2, 3))
        Image.fromarray(np.where(inside[..., None], ink, ground).astype(np.uint8)).save(folder / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{disc},{int(ground.mean() > 127)}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def x0_of(folder):
    pictures = np.stack([np.asarray(Image.open(folder / f"{i:02d}.png")) for i in range(COUNT)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def pretrain(folder, out, prediction, steps=40):
    """A pipeline directory as diffusers' own tutorial leaves it."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIZE,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    beta = {"beta_schedule": "squaredcos_cap_v2"} if prediction == "v_prediction" else {}
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction, **beta)
    optimizer, x0 = torch.optim.AdamW(unet.parameters(), lr=2e-3), x0_of(folder)
    for _ in range(steps):
        batch = x0[torch.randint(0, COUNT, (8,))]
        noise, t = torch.randn_like(batch), torch.randint(0, 1000, (8,))
        target = noise if prediction == "epsilon" else scheduler.get_velocity(batch, noise, t)
        loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(batch, noise, t), t).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    diffusers.DDPMPipeline(unet.eval(), scheduler).save_pretrained(out)
    return unet, scheduler


CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, images):
    """What a network predicts -> (folder, U-Net, scheduler); the folder holds ddpm, as diffusers saved it."""

    @functools.cache
    def make(prediction):
        folder = tmp_path_factory.mktemp(prediction)
        return folder, *pretrain(images, folder / "ddpm", prediction)

    return make


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def adapted(images, pretrained, request):
    """As pretrained; the folder also holds pdae, adapted from ddpm."""
    folder, unet, scheduler = pretrained(request.param)
    argv = ("--init-from", folder / "ddpm", "--data", images, "--out", folder / "pdae", *CPU)
    small = ("--latent-dim", 16, "--encoder-channel", 32, "--steps", 30, "--batch-size", 8, "--lr", 1e-3)
    run(train.main, "pdae", *argv, *small)
    return folder, unet, scheduler


@pytest.mark.slow
def test_the_frozen_prior_is_the_one_that_diffusers_trained(adapted):
    folder, unet, scheduler = adapted
    losses = [json.loads(line)["loss"] for line in (folder / "pdae" / "log.jsonl").read_text().splitlines()]
    assert losses and np.isfinite(losses).all()
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([5, 400, 990])
    model = PDAE.from_pretrained(folder / "pdae")
    with torch.no_grad():
        eps = out = unet(x_t, t).sample
        if scheduler.config.prediction_type == "v_prediction":
            a = scheduler.alphas_cumprod[t][:, None, None, None]
            eps = a.sqrt() * out + (1 - a).sqrt() * x_t
        torch.testing.assert_close(model(x_t, t, torch.zeros(3, 16))[0], eps, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_reconstructs_encodes_and_edits(adapted, images, tmp_path):
    pdae = adapted[0] / "pdae"
    given = ("--model", pdae, "--input", images, *CPU)
    run(reconstruct.main, *given, "--steps", 20, "--limit", 4, "--out", tmp_path / "r")
    found = json.loads((tmp_path / "r" / "metrics.json").read_text())["modes"]
    inferred, random = (found[mode]["mean"]["mse"] for mode in ("inferred", "random"))
    assert inferred < 0.03 and inferred < 0.25 * random, (inferred, random)
    run(encode.main, *given, "--out", tmp_path / "z")
    with np.load(tmp_path / "z" / "latents.npz") as file, torch.no_grad():
        expected = PDAE.from_pretrained(pdae).encode(x0_of(images))
        torch.testing.assert_close(torch.from_numpy(file["z"]), expected, rtol=1e-3, atol=1e-4)
    table = ("--attributes", images / "table.csv", "--data", images, "--steps", 30, "--batch-size", 8)
    run(train.main, "classifier", "--init-from", pdae, "--out", tmp_path / "full", *table, *CPU)
    edit = ("--limit", 2, "--steps", 5, "--attribute", "disc", "--out", tmp_path / "m")
    run(manipulate.main, "--model", tmp_path / "full", *given[2:], *edit)
    assert (tmp_path / "m" / "grid.png").is_file()


@pytest.mark.slow
def test_it_is_exported(adapted, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs pip install 'pdae_fast[onnx]'")
    from pdae_fast.export import __main__ as export

    argv = ("--model", adapted[0] / "pdae", "--out", tmp_path / "onnx", "--steps", 4, "--max-batch", 2, "--verify")
    run(export.main, "onnx", *argv)
    assert json.loads((tmp_path / "onnx" / "manifest.json").read_text())["kind"] == "pdae"


@pytest.mark.slow
def test_a_diffusers_prior_trained_further(tmp_path, images, pretrained):
    """Under its own loss, that of v, which is no larger after it than before."""
    folder, unet, scheduler = pretrained("v_prediction")
    base = ("--init-from", folder / "ddpm", "--data", images, "--batch-size", 8, "--device", "cpu", "--no-flip")
    run(train.main, "prior", *base, "--out", tmp_path / "prior", "--steps", 30, "--lr", 1e-3, "--ema-decay", 0.9)
    tuned = Prior.from_pretrained(tmp_path / "prior")
    assert tuned.config.prediction == "v_prediction"
    torch.manual_seed(1)
    x0 = x0_of(images)
    noise, t = torch.randn_like(x0), torch.randint(0, 1000, (COUNT,))
    x_t, target = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
    with torch.no_grad():
        before = (unet(x_t, t).sample - target).square().mean()
        after = (tuned.unet.decode(tuned.unet.trunk(x_t, t)) - target).square().mean()
    assert 0.3 * before < after < before
