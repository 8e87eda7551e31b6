"""`sample` against single calls, brute force and closed forms; the Frechet distance; mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from golden_rule import relative
from helpers import TINY, image_folder, images, tiny_pdae
from pdae_fast import Pipeline, cli
from pdae_fast.data import open_dataset
from pdae_fast.experiments import sample as experiment
from pdae_fast.experiments.frechet import FrechetDistance


@pytest.fixture
def base(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 6)
    return ["--model", model_dir, "--input", folder, "--device", "cpu", "--batch-size", 2, "--steps", 4]


def run(*argv):
    return cli.run(experiment.main, [str(a) for a in argv])


def test_blocks_are_one_call(model):
    whole, split = (Pipeline(model, steps=4, device="cpu", batch_size=b) for b in (8, 2))
    expected = whole.sample(5, seed=3, latent_steps=6)
    blocks = list(experiment.sample(split, 5, seed=3, latent_steps=6))
    assert [block.first for block in blocks] == [0, 2, 4]
    assert relative(torch.cat([block.images for block in blocks]), expected) < 1e-4
    # int(0.3 x 4) = 1 step without G.
    assert split.evaluations["gradient"] == 5 * 3 and split.evaluations["trunk"] == 5 * 4
    assert split.evaluations["latent"] == 5 * 6
    prior = torch.cat([block.images for block in experiment.sample_prior(split, 3, seed=3)])
    assert relative(prior, whole.decode(count=3, seed=3)) < 1e-4 and split.evaluations["gradient"] == 5 * 3


def test_nearest_by_brute_force():
    x, reference = images(3) * 1.5, images(5, seed=1)
    reference[4] = x[1].clamp(-1, 1)
    distance, place = experiment.nearest(x, reference)
    a, b = (x.clamp(-1, 1).numpy() + 1) / 2, (reference.numpy() + 1) / 2
    brute = np.array([[np.sqrt(np.mean((p.astype(np.float64) - q) ** 2)) for q in b] for p in a])
    assert place.tolist() == brute.argmin(axis=1).tolist() and int(place[1]) == 4
    assert distance.numpy() == pytest.approx(brute.min(axis=1), abs=1e-6) and float(distance[1]) < 1e-6
    between = [brute_distance(a[i], a[j]) for i in range(3) for j in range(i)]
    assert experiment.diversity(x) == pytest.approx(np.mean(between), rel=1e-6)
    assert experiment.diversity(x[:1]) is None


def brute_distance(p, q):
    return np.sqrt(np.mean((p.astype(np.float64) - q) ** 2))


def test_entropy_and_rates():
    logits = torch.tensor([0.0, 100.0, -100.0, float(np.log(3))])
    expected = [1.0, 0.0, 0.0, -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))]
    assert experiment.entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)
    reference = experiment.Reference(images(4), images(2, seed=2), "")
    own = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    control = torch.tensor([[-1.0, -1.0], [-1.0, 1.0]])
    found = experiment.figures(images(2, seed=3), reference, (own, control))
    assert found["rates_differ"] == pytest.approx((1 + 0) / 2)
    assert found["entropy"] == pytest.approx(float(experiment.entropy(torch.tensor(1.0))))
    distance = experiment.nearest(images(2, seed=3), reference.images)[0]
    assert found["nearest"] == pytest.approx(float(distance.min()))  # the lower of two is their median
    assert found["nearest_smallest"] == pytest.approx(float(distance.min()))


def test_the_command(tmp_path, base, capsys):
    torch.jit.trace(_Features(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).save(str(tmp_path / "features.pt"))
    out = tmp_path / "out"
    argv = ["--out", out, "--count", 5, "--prior-only", "--seed", 2, "--fid", base[3], "--fid-network"]
    assert run(*base, *argv, tmp_path / "features.pt") == 0
    report = json.loads((out / "metrics.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["latent", "prior", "data"]
    latent, prior, data = report["rows"]
    assert [row["network_evaluations_per_image"].get("gradient", 0) for row in (latent, prior)] == [3, 0]
    assert report["reference"] == {"images": 3, "control": 3, "how": "every second image, against the others"}
    dataset = open_dataset(base[3], 32, 1)
    x0 = torch.stack([dataset[i].image for i in range(6)])
    assert data["nearest"] == pytest.approx(float(experiment.nearest(x0[1::2], x0[::2])[0].median()))
    assert data["rates_differ"] == 0
    pipe = Pipeline(experiment.common.PDAE.from_pretrained(base[1]), steps=4, device="cpu")
    x = pipe.sample(5, seed=2)
    assert latent["diversity"] == pytest.approx(experiment.diversity(x), rel=1e-3)
    network = experiment.FeatureNetwork(tmp_path / "features.pt", torch.device("cpu"))
    expected = FrechetDistance([network(x0).numpy()])(iter([network(x).numpy()]))
    assert latent["fid"] == pytest.approx(expected, rel=1e-2)
    for name in ("latent", "prior"):
        assert len(list((out / "images" / name).glob("*.png"))) == 5
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] == 3 * 66 - 2
    assert "prior alone" in capsys.readouterr().out


class _Features(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=(2, 3))[:, :1] / 255


BAD = [
    (["--count", 0], "at least 1"),
    (["--stop-percent", 1.5], "stop_percent must be a number between 0 and 1"),
    (["--latent-steps", 2000], "between 1 and 1000"),
    (["--fid", "somewhere"], "go together"),
    (["--limit", 3], "at least 4 images; the input has 3"),
    (["--model", "plain"], "needs a latent DPM; this model has none: make one with"),
]


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_a_mistake_is_one_line(tmp_path, base, capsys, argv, words):
    out = tmp_path / "out"
    if "plain" in argv:
        tiny_pdae(TINY).save_pretrained(tmp_path / "plain")
        argv = ["--model", tmp_path / "plain"]
    assert run(*base, "--out", out, *argv) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not out.exists()
