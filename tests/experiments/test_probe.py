"""`probe` against scikit-learn used directly, brute force and closed forms; what the command leaves and refuses."""

import csv
import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from helpers import TINY_FULL, image_folder, tiny_pdae
from idx_files import idx_bytes
from pdae_fast import PDAE, cli
from pdae_fast.data import open_dataset
from pdae_fast.errors import UserError
from pdae_fast.experiments import estimates
from pdae_fast.experiments import probe as probes
from pdae_fast.experiments.linear import FeatureSet
from pdae_fast.experiments.targets import Targets


def clusters(count, seed, classes=3, features=6):
    """Points around one centre a class, in strongly correlated coordinates."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(9).normal(size=(classes, features)) * 1.2
    mixing = np.random.default_rng(8).normal(size=(features, features)) @ np.diag(0.1 ** np.arange(features))
    return (centres[labels] + random.normal(size=(count, features))) @ mixing + 3, labels


@pytest.fixture(scope="module")
def data():
    (a, y), (b, labels) = clusters(150, 0), clusters(120, 1)
    return FeatureSet("z", a.astype(np.float32), b.astype(np.float32)), y, labels


def test_whitening_whitens_the_training_images_alone(data):
    features, _, _ = data
    white = probes.scale(features, "whiten")
    assert np.cov(white.train.T) == pytest.approx(np.eye(6), abs=1e-6)
    assert white.train.mean(axis=0) == pytest.approx(np.zeros(6), abs=1e-9)
    # One linear map for both parts: it is found again from the training pairs and predicts the test ones.
    design = np.c_[features.train.astype(np.float64), np.ones(len(features.train))]
    mapping, *_ = np.linalg.lstsq(design, white.train, rcond=None)
    test = np.c_[features.test.astype(np.float64), np.ones(len(features.test))]
    assert test @ mapping == pytest.approx(white.test, abs=1e-5)
    standard = probes.scale(features, "standardise")
    scaler = StandardScaler().fit(features.train.astype(np.float64))
    assert standard.test == pytest.approx(scaler.transform(features.test.astype(np.float64)))
    flat = FeatureSet("flat", *(np.c_[x, np.ones(len(x))] for x in features[1:]))
    assert probes.scale(flat, "whiten").train.shape[1] == 6  # a constant is no direction
    with pytest.raises(UserError, match="whiten or standardise"):
        probes.scale(features, "none")


def test_classes_as_scikit_learn_finds_them(data):
    features, y, labels = data
    white = probes.scale(features, "whiten")
    fitted = probes.fit(white, y, 3)
    own = LogisticRegression(C=fitted.C, max_iter=2000).fit(white.train, y)
    right = probes.accuracy(fitted.scores, labels)
    assert right.mean() == own.score(white.test, labels) > 0.6
    assert fitted.scores == pytest.approx(own.predict_log_proba(white.test), abs=1e-6)
    # A class that is not in training is never predicted, and numbers keep their meaning.
    shifted = probes.fit(white, np.where(y == 1, 4, y), 5)
    assert shifted.scores.shape == (120, 5) and np.isneginf(shifted.scores[:, [1, 3]]).all()
    assert (shifted.scores.argmax(axis=1) == np.where(own.predict(white.test) == 1, 4, own.predict(white.test))).all()


def test_the_strength_is_chosen_without_the_test_images(data):
    features, y, _ = data
    white = probes.scale(features, "whiten")
    noise = np.random.default_rng(0).integers(0, 3, len(y))
    assert probes.fit(white, noise, 3).C <= 0.01  # nothing to learn: the strongest penalties win
    assert probes.fit(white, y, 3).C >= 0.01
    other = white._replace(test=np.zeros_like(white.test))
    assert probes.fit(other, y, 3).C == probes.fit(white, y, 3).C
    with pytest.raises(UserError, match="two labels with two training images each"):
        probes.fit(white, np.zeros(len(y), dtype=int), 3)


def test_auroc_and_its_resamples_are_scikit_learns():
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, 60)
    scores = np.round(random.normal(size=60) + labels, 1)  # with ties
    estimate, resampled = probes.bootstrap_auroc(scores, labels, seed=4)
    assert estimate.value == pytest.approx(roc_auc_score(labels, scores))
    weights = estimates.resamples(60, 4)
    for k in (0, 1, 999):
        assert resampled[k] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights[k]))
    assert estimate.low < estimate.value < estimate.high


def test_the_interval_is_the_binomial_one():
    right = np.r_[np.ones(300), np.zeros(100)]
    estimate = probes.bootstrap_mean(right)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert estimate.value == 0.75
    assert (estimate.low, estimate.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_neighbours_are_those_of_brute_force(data):
    features, y, labels = data
    distance = ((features.test[:, None].astype(np.float64) - features.train[None]) ** 2).sum(axis=2)
    expected = np.argsort(distance, axis=1)[:, :4]
    found = probes.neighbours(features, 4)
    rows = np.arange(len(expected))[:, None]
    assert distance[rows, found] == pytest.approx(distance[rows, expected], rel=1e-4)
    precision = probes.agreement(found, y, labels)
    assert precision[7] == np.mean([y[j] == labels[7] for j in found[7]])
    for k in (0, 151):
        with pytest.raises(UserError, match="from 1 to 150"):
            probes.neighbours(features, k)


def test_agreement_and_chance_by_hand():
    train, test = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 1]])
    assert probes.agreement(np.array([[0, 1]]), train, test) == pytest.approx([(0.5 + 1) / 2])
    assert probes.chance(train, test) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert probes.chance(train, np.array([[0, 1]])) == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert probes.chance(np.array([0, 0, 1, 2]), np.array([0, 2])) == pytest.approx((0.5 + 0.25) / 2)


def test_pixel_baselines_have_the_dimension_of_z():
    random = np.random.default_rng(0)
    train, test = (random.random((n, 3, 8, 8), dtype=np.float32) for n in (40, 10))
    pca, small = probes.pixel_features(train, test, 12)
    assert pca.train.shape == (40, 12) and pca.test.shape == (10, 12) and pca.name == "PCA of pixels (12)"
    assert small.train.shape == (40, 12) and small.name == "pixels 2x2x3"
    assert small.test[3, 0] == pytest.approx(test[3, 0, :4, :4].mean(), rel=1e-5)
    pca, small = probes.pixel_features(train[:5], test, 1000)
    assert pca.train.shape == (5, 5) and small.train.shape == (5, 192)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """Two kinds of images that anything can tell apart: bright on top, bright at the bottom."""
    folder = tmp_path_factory.mktemp("idx")
    for seed, (prefix, count) in enumerate((("train", 20), ("t10k", 10))):
        images = np.random.default_rng(seed).integers(0, 60, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 2).astype(np.uint8)
        for i, label in enumerate(labels):
            images[i, 14 * label : 14 * label + 14] += 150
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


def run(*argv):
    return cli.run(probes.main, [str(a) for a in argv])


def test_classes_from_the_command_line(tmp_path, model_dir, idx, capsys):
    arguments = ["--model", model_dir, "--input", idx, "--device", "cpu", "--plan", "eager", "--neighbours", 3]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "20 training and 10 test images" in printed and "own training and test files" in printed
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["name"] for row in report["features"]] == ["z (16)", "PCA of pixels (16)", "pixels 4x4"]
    assert report["features"][2]["accuracy"]["value"] == 1.0  # pixels tell top from bottom
    assert report["retrieval"]["found"]["pixels"]["value"] == 1.0 and report["retrieval"]["chance"] == 0.5
    with open(tmp_path / "out" / "neighbours.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "by", "1", "2", "3"] and len(rows) == 1 + 10 * 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "latents", "metrics.json", "neighbours.csv", "neighbours.png", "probe.png",
    }  # fmt: skip
    # The latents are found again: nothing is encoded the second time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes.common.Pipeline, "encode", None)
        assert run(*arguments, "--out", tmp_path / "out", "--quiet") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["features"] == report["features"]


def test_attributes_and_a_split_by_seed(tmp_path, model_dir, capsys):
    folder = image_folder(tmp_path / "in", 24)
    broken = folder / "05.png"
    broken.write_bytes(broken.read_bytes()[:60])
    lines = [f"{i:02d}.png,{i % 2},{int(i % 3 == 0)},1" for i in range(24) if i != 7]
    (tmp_path / "table.csv").write_text("\n".join(["image,odd,third,always", *lines]))
    arguments = ["--model", model_dir, "--input", folder, "--attributes", tmp_path / "table.csv", "--device", "cpu",
                 "--plan", "eager", "--holdout", 0.4, "--neighbours", 2]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(*arguments, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (report["train_images"], report["test_images"]) == (13, 9)  # 24 less a broken one and one without a row
    assert report["notes"] == ["always: left out, too few images with or without it"]
    for row in report["features"]:
        assert set(row["auroc"]) == {"odd", "third"}
        assert row["mean_auroc"]["value"] == pytest.approx(np.mean([e["value"] for e in row["auroc"].values()]))
    first, second = report["features"][:2]
    gap = first["mean_auroc"]["value"] - second["mean_auroc"]["value"]
    assert second["z_minus_this"]["value"] == pytest.approx(gap)
    assert run(*arguments, "--out", tmp_path / "b", "--columns", "oddly") == 2
    assert "no attribute oddly; there are odd, third, always" in capsys.readouterr().err


def test_other_images_to_test_on_and_the_models_own_classifier(tmp_path, model_dir, capsys):
    """AUROC of its classifier by scikit-learn, from z and the statistics themselves; all of --input is learned."""
    pdae = PDAE.from_pretrained(model_dir)
    assert "round" in pdae.config.attributes
    folders = [image_folder(tmp_path / name, count) for name, count in (("in", 20), ("held", 12))]
    for folder, count in zip(folders, (20, 12), strict=True):
        rows = [f"{i:02d}.png,{i % 2},{int(i % 3 == 0)}" for i in range(count)]
        (folder / "table.csv").write_text("\n".join(["image,round,other", *rows]))
    arguments = ["--model", model_dir, "--device", "cpu", "--plan", "eager", "--neighbours", 2, "--input", folders[0]]
    arguments += ["--attributes", folders[0] / "table.csv", "--test", folders[1]]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "20 training and 12 test images" in printed and f"the test images are those of {folders[1]}" in printed
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    x0 = torch.stack([sample.image for sample in open_dataset(folders[1], 32, 1)])
    with torch.no_grad():
        score = pdae.classifier((pdae.encode(x0) - pdae.latent_mean) / pdae.latent_std)
    own = report["classifier"]
    expected = roc_auc_score(np.arange(12) % 2, score[:, pdae.config.attributes.index("round")])
    assert own["auroc"]["round"]["value"] == own["mean_auroc"]["value"] == pytest.approx(expected)
    assert set(own["auroc"]) == {"round"} and f"the model's own classifier  {expected:.4f} (" in printed
    assert run(*arguments, "--out", tmp_path / "few", "--limit", 9) == 0
    few = json.loads((tmp_path / "few" / "metrics.json").read_text())
    assert (few["train_images"], few["test_images"]) == (9, 9)


def test_classes_of_the_models_own_classifier(tmp_path, idx, capsys):
    """Its argmax over the classes, whatever their order in the model."""
    model = tiny_pdae(dataclasses.replace(TINY_FULL, attributes=("1", "0", "more")))
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--input", idx, "--device", "cpu", "--plan", "eager", "--quiet"]
    assert run(*arguments, "--neighbours", 2, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    dataset = open_dataset(idx, 32, 1, split="test")
    with torch.no_grad():
        z = model.encode(torch.stack([sample.image for sample in dataset]))
        score = model.classifier((z - model.latent_mean) / model.latent_std)
    right = (score[:, 0] > score[:, 1]).long().numpy() == np.arange(10) % 2
    assert report["targets"]["names"] == ["0", "1"]
    assert report["classifier"]["accuracy"]["value"] == pytest.approx(right.mean())


def test_mistakes(tmp_path, model_dir, idx, capsys):
    folder = image_folder(tmp_path / "in", 3)
    (tmp_path / "table.csv").write_text("image,odd\n" + "\n".join(f"{i:02d}.png,{i % 2}" for i in range(12)))
    table = ["--attributes", tmp_path / "table.csv"]
    large = image_folder(tmp_path / "large", 12)
    for arguments, words in (
        (["--input", folder], "no labels: give --attributes FILE"),
        (["--input", folder, *table], "at least 8 labelled images, not 3"),
        (["--input", folder / "00.png", *table], "at least 8 labelled images, not 1"),
        (["--input", folder, *table, "--holdout", 1], "--holdout must be a fraction between 0 and 1"),
        (["--input", idx, "--neighbours", 0], "the number of neighbours must be from 1 to 20"),
        (["--input", idx, "--columns", "odd"], "this data has classes"),
        (["--input", large, *table, "--test", idx], "has no row for any image"),
        (["--input", large, *table, "--test", tmp_path / "none"], "no such input"),
        (["--input", idx, "--test", "bundled:avatars"], "--input has classes 0, 1; --test has attributes"),
        (["--input", idx, "--limit", 1], "at least 8 labelled images, not 1"),
    ):
        base = ["--model", model_dir, "--device", "cpu", "--plan", "eager", "--quiet", "--out", tmp_path / "out"]
        assert run(*base, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error
        assert not (tmp_path / "out" / "metrics.json").exists()
        # What is wrong with labels is said before an image is encoded.
        assert (tmp_path / "out" / "latents").exists() == ("--neighbours" in arguments), arguments
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_targets_in_words():
    classes = Targets("classes", ["a", "b"], np.array([1, 0]), np.arange(2))
    assert classes.of(0) == "b" and classes.positive("a").tolist() == [False, True]
    table = Targets("attributes", ["round", "dark"], np.array([[1, 1], [0, 0]]), np.arange(2))
    assert table.of(0) == "round, dark" and table.of(1) == "none" and table.positive("dark").tolist() == [True, False]
    with pytest.raises(UserError, match="no attribute 'red'; there are round, dark"):
        table.positive("red")
