"""`few_shot` against the objective, simulated probabilities and independent formulas; mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from golden_rule import relative
from helpers import TINY, image_folder, tiny_pdae
from pdae_fast import Pipeline, UserError, cli
from pdae_fast.experiments import few_shot as experiment
from pdae_fast.experiments.image_classifier import predict
from pdae_fast.experiments.targets import Targets


@pytest.fixture
def base(tmp_path, model_dir):
    """Twelve bright and twelve dark images, with a table that says so."""
    random, folder = np.random.default_rng(4), tmp_path / "in"
    folder.mkdir()
    rows = [["image", "bright", "odd"]]
    for i in range(24):
        pixels = random.integers(0, 100, (32, 32), dtype=np.uint8) + np.uint8(150 * (i < 12))
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        rows.append([f"{i:02d}.png", int(i < 12), i % 2])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    words = ["--model", model_dir, "--input", folder, "--device", "cpu", "--batch-size", 8, "--steps", 2]
    return [*words, "--attributes", tmp_path / "labels.csv", "--epochs", 6]


def run(*argv):
    return cli.run(experiment.main, [str(a) for a in argv])


def test_the_classifier_is_the_minimum_of_the_balanced_loss():
    random = np.random.default_rng(0)
    positives, others = random.normal(0.5, 1, (4, 3)), random.normal(0, 1, (20, 3))
    classifier = experiment.fit(positives, others, l2=0.05)
    w = torch.tensor(np.append(classifier.coef_[0], classifier.intercept_), requires_grad=True)

    def logits(x):
        return torch.tensor(x) @ w[:3] + w[3]

    softplus = torch.nn.functional.softplus
    loss = (softplus(-logits(positives)).mean() + softplus(logits(others)).mean()) / 2 + 0.05 / 2 * w[:3].square().sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(gradient.abs().max()) < 1e-5
    # Oversampled to the number of the others, without weights: the same classifier.
    again = experiment.fit(np.repeat(positives, 5, axis=0), others, l2=0.05)
    assert again.coef_ == pytest.approx(classifier.coef_, abs=1e-4)
    p = experiment.probability(classifier, others)
    assert p == pytest.approx(torch.sigmoid(logits(others)).detach().numpy(), abs=1e-9)


def test_acceptance_against_simulated_probabilities():
    random, n = np.random.default_rng(1), 200_000
    for p, expected in ((0.3, 0.0), (0.499, 0.0), (0.5, 0.5), (0.8, 0.8), (1.0, 1.0)):
        kept = experiment.accept(np.full(n, p), random.random(n))
        assert kept.mean() == pytest.approx(expected, abs=0.005)
    # p uniform: a fraction of integral from 1/2 to 1 of p = 3/8 is kept, of mean p (7/24) / (3/8) = 7/9.
    p = random.random(n)
    kept = experiment.accept(p, random.random(n))
    assert kept.mean() == pytest.approx(3 / 8, abs=0.005) and p[kept].mean() == pytest.approx(7 / 9, abs=0.005)


def test_rejection_does_not_depend_on_blocks_and_is_bounded():
    z = torch.arange(5000.0)[:, None]

    def p(z):
        return np.where(z[:, 0].numpy() % 4 < 1, 0.75, 0.4)

    found = [experiment.reject(lambda i, n: z[i : i + n], p, 30, 5000, seed=3, block=b) for b in (7, 256)]
    assert found[0].numbers == found[1].numbers and torch.equal(found[0].z, found[1].z)
    assert found[0].z[:, 0].tolist() == found[0].numbers and all(k % 4 == 0 for k in found[0].numbers)
    assert found[0].drawn < found[1].drawn == 256
    many = experiment.reject(lambda i, n: z[i : i + n], p, 900, 5000)
    assert many.rate == pytest.approx(0.75 / 4, abs=0.02) and many.kept >= len(many.numbers) == 900
    with pytest.raises(UserError, match=r"only \d+ of 40 draws were accepted, 30 were asked for"):
        experiment.reject(lambda i, n: z[i : i + n], p, 30, 40)


def test_draws_are_numbered(model):
    pipe = Pipeline(model, steps=3, device="cpu")
    draws = experiment.Draws(pipe, seed=5)
    expected = pipe.sample_latents(300, seed=5)
    before = pipe.evaluations["latent"]
    torch.testing.assert_close(draws(10, 20), expected[10:30], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draws(250, 50), expected[250:], rtol=1e-4, atol=1e-4)
    draws(0, 512)
    assert pipe.evaluations["latent"] - before == 2 * experiment.BLOCK * 3  # drawn once, in two blocks


def test_who_is_labelled():
    positive = np.arange(40) % 4 == 0  # ten of forty
    pu = experiment.choose(positive, "pu", 3, 100)
    assert positive[pu.positives].all() and len(pu.positives) == 3
    assert len(pu.others) == 37 and positive[pu.others].sum() == 7  # positives nobody knows of
    assert not set(pu.positives) & set(pu.others)
    binary = experiment.choose(positive, "binary", 3, 5)
    assert len(binary.others) == 5 and not positive[binary.others].any()
    assert (binary.positives == pu.positives).all()
    assert (
        experiment.choose(positive, "pu", 3, 9, seed=1).others != experiment.choose(positive, "pu", 3, 9).others
    ).any()
    for arguments, words in (
        ((positive, "pu", 11, 5), "only 10 of the 40 labelled images are positive; 11"),
        ((positive, "one", 1, 5), "pu or binary"),
        ((positive, "pu", 0, 5), "at least 1 positive"),
        ((np.ones(5, bool), "binary", 2, 5), "every labelled image is positive"),
    ):
        with pytest.raises(UserError, match=words):
            experiment.choose(*arguments)


class Bright(torch.nn.Module):
    """Calls bright images class 1."""

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_the_judge_and_its_errors():
    levels = torch.tensor([0.5, 0.4, -0.3, -0.5, -0.6, 0.2])[:, None, None, None].expand(-1, 1, 8, 8)
    truth = np.array([True, True, True, False, False, False])
    judge = experiment.examine(Bright(), 1, levels, truth)
    assert (judge.hit, judge.false_alarm) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert judge.accuracy == pytest.approx(2 / 3)
    assert judge(levels).tolist() == [True, True, False, False, False, True]
    # A share pi of true positives is seen as pi hit + (1 - pi) false_alarm.
    for pi in (0.0, 0.25, 1.0):
        assert judge.corrected(pi * judge.hit + (1 - pi) * judge.false_alarm) == pytest.approx(pi, abs=1e-9)
    assert judge.corrected(0.9) == 1.0
    assert judge._replace(hit=0.3, false_alarm=0.28).corrected(0.3) is None
    with pytest.raises(UserError, match="all alike"):
        experiment.examine(Bright(), 1, levels[:3], truth[:3])


@pytest.mark.parametrize(("hits", "count"), [(0, 20), (7, 20), (20, 20)])
def test_interval_is_wilsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert experiment.interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_questions_and_default_names():
    classes = Targets("classes", ["a", "b", "c", "d"], np.array([0, 1, 1, 3, 3, 3]), np.arange(6))
    asked = experiment.question(classes, "d")
    assert asked.labels is classes.values and asked[1:] == (4, 3)
    assert experiment.default_names(classes, 2) == ["b", "d"]
    with pytest.raises(UserError, match="none of a, b, c, d has 4 positive"):
        experiment.default_names(classes, 4)
    attributes = Targets("attributes", ["x", "y"], np.array([[1, 0], [1, 1]], np.uint8), np.arange(2))
    asked = experiment.question(attributes, "y")
    assert asked.labels.tolist() == [0, 1] and asked[1:] == (2, 1)
    assert experiment.default_names(attributes, 1) == ["y"]  # every image has x


def test_the_command(tmp_path, base, model, capsys):
    out = tmp_path / "out"
    argv = ["--out", out, "--name", "bright", "--positives", 4, "--count", 5, "--l2", 1, "--seed", 1]
    assert run(*base, *argv) == 0
    report = json.loads((out / "metrics.json").read_text())
    pu, binary = report["rows"]
    assert (pu["setting"], binary["setting"]) == ("pu", "binary")
    assert report["train_images"] == 18 and report["test_images"] == 6
    assert pu["positives"] == 4 and pu["others"] == 14 and binary["others"] == 4
    assert binary["positives_among_others"] == 0 < pu["positives_among_others"]
    assert pu["judge"]["accuracy"] > 0.9  # bright and dark are easily told apart
    assert 0 < pu["acceptance"] <= 1 and pu["drawn"] == experiment.BLOCK
    assert "positive-unlabelled" in capsys.readouterr().out
    # Every image is the decoding of a draw, by its number; the judge's verdict is that of its file.
    pipe = Pipeline(model, steps=2, device="cpu")
    names = sorted(path.stem for path in (out / "images" / "bright-pu").iterdir())
    z = pipe.sample_latents(experiment.BLOCK, seed=1)
    numbers = [int(name) for name in names]
    x = pipe.decode(z[numbers], pipe.random_x_T(1, numbers), 0.3)
    found = torch.stack([_pixels(out / "images" / "bright-pu" / f"{name}.png") for name in names])
    assert relative(found, x.clamp(-1, 1)) < 2e-2
    classifier = experiment.ImageClassifier(1, 2)
    classifier.load_state_dict(torch.load(out / "judges" / "attribute-0.pt", weights_only=True)["state"])
    assert pu["accuracy"] == pytest.approx(float((predict(classifier.eval(), x).argmax(1) == 1).float().mean()))
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] == 3 * 66 - 2


def _pixels(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).float()[None] / 127.5 - 1


BAD = [
    (["--name", "blue"], "no attribute 'blue'; there are bright, odd"),
    (["--positives", 40], "has 40 positive images"),
    (["--name", "odd", "--positives", 40], "odd: only"),
    (["--name", "odd", "--positives", 4, "--negatives", 0], "odd: few-shot needs at least 1 positive and 1"),
    (["--count", 0], "--count must be at least 1"),
    (["--name", "bright", "--positives", 4, "--count", 3, "--max-draws", 1], "bright, positive-unlabelled: only"),
    (["--name", "bright", "--positives", 4, "--l2", 0], "--l2 must be positive"),
    (["--holdout", 2], "--holdout must be a fraction"),
    (["--columns", "nobody"], "no attribute nobody; there are bright, odd"),
]


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_a_mistake_is_one_line(tmp_path, base, capsys, argv, words):
    out = tmp_path / "out"
    assert run(*base, "--out", out, "--quiet", *argv) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not (out / "metrics.json").exists() and not (out / "images").exists()
    # What is wrong with names and labels is said before an image is encoded.
    assert (out / "latents").exists() == any(word in argv for word in ("--max-draws", "--l2"))


def test_no_latent_dpm_and_no_labels(tmp_path, base, model_dir, capsys):
    tiny_pdae(TINY).save_pretrained(tmp_path / "plain")
    assert run(*base, "--model", tmp_path / "plain", "--out", tmp_path / "out") == 2
    assert "needs a latent DPM; this model has none: make one with" in capsys.readouterr().err
    folder = image_folder(tmp_path / "bare", 3)
    assert run("--model", model_dir, "--input", folder, "--out", tmp_path / "out", "--quiet") == 2
    assert "these images have no labels: give --attributes FILE" in capsys.readouterr().err
