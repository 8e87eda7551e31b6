"""Read-outs of features against scikit-learn and closed forms; what the sweep finds, leaves and refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import jaccard_score

from helpers import TINY_FULL, tiny_pdae, tiny_prior
from idx_files import idx_bytes
from pdae_fast import Pipeline, UserError, cli
from pdae_fast.experiments import estimates, linear, pixelwise, probe, probe_features
from pdae_fast.experiments.estimates import iou_score, mean_score, resamples
from pdae_fast.experiments.linear import FeatureSet
from pdae_fast.experiments.pixelwise import Discriminant


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# -- read-outs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_the_discriminant_of_pixels_is_fishers(monkeypatch, shrinkage):
    monkeypatch.setattr(pixelwise, "SHRINKAGE", shrinkage)
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(0, 3, (4, 16, 16), generator=generator)
    masks[masks == 2] = 3  # of four kinds one is never seen
    maps = [torch.randn(4, C, 16, 16, generator=generator) * 2 + 5 for C in (3, 2)]
    maps[0] += masks[:, None] * torch.tensor([1.0, 0.3, 0.0])[:, None, None]
    learner = Discriminant(4)
    for rows in (slice(0, 1), slice(1, 4)):  # in any batches
        learner.learn([v[rows] for v in maps], masks[rows])
    for which in ([0], [1], [0, 1]):
        X = torch.cat([maps[i] for i in which], 1).permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
        y = masks.flatten().numpy()
        X = X / X.std(axis=0)  # shrinkage is towards features of one spread
        if shrinkage == 0:
            expected = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y).predict(X)
        else:
            means = np.stack([X[y == k].mean(axis=0) for k in (0, 1, 3)])
            within = sum((X[y == k] - m).T @ (X[y == k] - m) for k, m in zip((0, 1, 3), means, strict=True)) / len(y)
            mixed = (1 - shrinkage) * within + shrinkage * np.trace(within) / len(within) * np.eye(len(within))
            weights = np.linalg.solve(mixed, means.T)
            priors = np.log([np.mean(y == k) for k in (0, 1, 3)])
            scores = X @ weights - 0.5 * np.einsum("kc,ck->k", means, weights) + priors
            expected = np.array([0, 1, 3])[scores.argmax(axis=1)]
        found = learner.solve(which)(maps, 16).flatten().numpy()
        assert (found == expected).mean() > 0.999


def test_a_linear_map_is_enlarged_after_it_is_applied_and_confusions_add_up():
    maps, weights = torch.randn(2, 5, 4, 4), torch.randn(3, 5)
    read = pixelwise.Linear((0,), [weights], torch.tensor([0.3, 0.0, -0.2]), torch.arange(3))
    scores = torch.einsum("kc,bchw->bkhw", weights, pixelwise.enlarged(maps, 12)) + read.bias[:, None, None]
    assert (read([maps], 12) == scores.argmax(1)).float().mean() > 0.999
    masks = torch.randint(0, 3, (2, 12, 12))
    counts = pixelwise.confusion(scores.argmax(1), masks, 3)
    assert counts.shape == (2, 3, 3) and counts.sum(axis=(1, 2)).tolist() == [144, 144]
    assert counts[1, 2, 0] == ((masks[1] == 2) & (scores.argmax(1)[1] == 0)).sum()
    around = pixelwise.patches(torch.arange(50.0).view(1, 2, 5, 5), side=3)
    assert around.shape == (1, 2 * 9 + 2, 5, 5)
    assert around[0, :9, 2, 2].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18] and around[0, -2:, 0, 4].tolist() == [
        -1,
        1,
    ]


def test_mean_iou_is_scikit_learns():
    random = np.random.default_rng(0)
    truth, found = random.integers(0, 3, (2, 8, 30))
    confusions = np.stack(
        [np.bincount(t * 4 + f, minlength=16).reshape(4, 4) for t, f in zip(truth, found, strict=True)]
    )
    score = iou_score(confusions, seed=3)  # the fourth part is in neither
    expected = jaccard_score(truth.ravel(), found.ravel(), average="macro")
    assert score.value == pytest.approx(expected) and score.estimate.low < expected < score.estimate.high
    times = resamples(8, 3)[5].astype(int)
    again = jaccard_score(np.repeat(truth, times, 0).ravel(), np.repeat(found, times, 0).ravel(), average="macro")
    assert score.resampled[5] == pytest.approx(again)
    difference = score - iou_score(confusions, seed=3)
    assert difference.value == 0 and difference.estimate[1:] == (0, 0)
    assert mean_score(np.arange(5.0)).value == 2


def test_ridge_is_scikit_learns_and_chosen_without_the_test_images():
    x, asked = normal(60, 8), normal(20, 8, seed=1)
    points = (x @ normal(8, 6, seed=2) + 0.3 * normal(60, 6, seed=3)).reshape(60, 3, 2) + 7
    found, penalty = linear.ridge(FeatureSet("", x, asked), points)
    unit = ((x - x.mean(axis=0)) ** 2).sum() / 8
    own = Ridge(alpha=penalty * unit).fit(x, points.reshape(60, 6)).predict(asked)
    assert found.reshape(20, 6) == pytest.approx(own, abs=1e-8) and penalty < 1
    other, same = linear.ridge(FeatureSet("", x, asked * 0), points)
    assert same == penalty and other[0].ravel() == pytest.approx(other[7].ravel())
    _, strongest = linear.ridge(FeatureSet("", normal(60, 50, seed=4), asked[:, :1] * np.ones(50)), points)
    assert strongest > penalty  # nothing to learn
    wide, _ = linear.ridge(FeatureSet("", normal(30, 90), normal(4, 90, seed=1)), points[:30])
    assert wide.shape == (4, 3, 2) and np.isfinite(wide).all()
    assert linear.distances(found, found + [3, 4]) == pytest.approx(np.full(20, 5.0))
    with pytest.raises(UserError, match="at least 5 training images, not 4"):
        linear.ridge(FeatureSet("", x[:4], asked), points[:4])


def test_fewer_images_than_dimensions_lose_nothing():
    features = FeatureSet("", normal(40, 300), normal(30, 300, seed=1))
    labels = (features.train[:, 0] > 0).astype(int)
    small = linear.compact(features)
    assert small.train.shape == (40, 40) and small.test.shape == (30, 40)
    whole = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(features.train, labels)
    found = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(small.train, labels)
    assert found.decision_function(small.test) == pytest.approx(whole.decision_function(features.test), abs=1e-5)
    assert linear.compact(features._replace(train=normal(400, 300))).train.shape == (400, 300)


def test_effective_rank_counts_directions():
    q, _ = np.linalg.qr(normal(20, 5))
    centred = np.concatenate([q, -q])  # mean 0
    assert linear.effective_rank(centred) == pytest.approx(5)
    for x in (centred * [3, 1, 0, 0, 0], (centred * [3, 1, 0, 0, 0]) @ normal(5, 90).clip(0, 0) + 0):
        if x.any():
            share = np.array([0.75, 0.25])
            assert linear.effective_rank(x + 2) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert linear.effective_rank(np.ones((6, 3))) == 0
    assert linear.effective_rank(normal(4, 50)) < 3.0001  # four points span three directions


# -- the command ---------------------------------------------------------------------------------------------------

COUNT = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the readers take for avatars: a bright square on noise, whose place is known in every way."""
    folder = tmp_path_factory.mktemp("world") / "squares"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    random, points, attributes = np.random.default_rng(0), [], []
    for k in range(COUNT):
        x, y = random.integers(2, 20, 2)
        image, mask = random.integers(0, 90, (32, 32)).astype(np.uint8), np.zeros((32, 32), np.uint8)
        image[y : y + 10, x : x + 10] += 150
        mask[y : y + 10, x : x + 10] = 1
        Image.fromarray(image).save(folder / "images" / f"{k:06d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{k:06d}.png")
        points.append([f"{k:06d}.png", x + 5, y + 5])
        attributes.append([f"{k:06d}.png", int(x > 10), int(y > 10), 1])
    for name, header, rows in (
        ("landmarks", ["image", "middle_x", "middle_y"], points),
        ("attributes", ["image", "right", "low", "always"], attributes),
    ):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    manifest = {"format": "pdae_fast avatars", "size": 32, "parts": ["ground", "square"], "landmarks": ["middle"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def prior_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "tiny"
    tiny_prior(TINY_FULL).save_pretrained(path)
    return path


def run(*argv):
    return cli.run(probe.main, [str(a) for a in argv])


def found(out):
    return json.loads((out / "metrics.json").read_text())


def test_everything_that_is_known_is_read_from_every_block_and_time(tmp_path, model_dir, world, capsys, monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 100)
    out = tmp_path / "out"
    arguments = ["--model", model_dir, "--input", world, "--device", "cpu", "--plan", "eager", "--out", out]
    arguments += ["--features", "middle", "decoder2", "--times", 300, 0, "--grid", 4, 1, "--noised"]
    assert run(*arguments) == 0
    printed, report = capsys.readouterr().out, found(out)
    assert report["targets"] == ["attributes", "landmarks", "parts"] and report["times"] == [0, 300]
    assert (report["train_images"], report["part_images"], report["test_images"]) == (30, 20, 10)
    assert report["notes"] == ["always: left out, too few images with or without it"]
    rows = {(r["target"], r["features"], r["grid"], r["input"], r["t"]): r for r in report["features"]}
    names, baselines = (
        ("middle", "decoder2", "together"),
        ("z (16)", "PCA of pixels (15)", "pixels 4x4", "pixels 32x32"),
    )
    expected = {(target, name, None, None, None) for target in ("attributes", "landmarks") for name in baselines}
    expected.add(("parts", "7x7 pixels and place", None, None, None))
    for of in ("x0", "x_t"):
        for t in (0, 300):
            expected |= {("parts", name, None, of, t) for name in names}
            for target in ("attributes", "landmarks", "rank"):
                expected |= {(target, name, grid, of, t) for name in names for grid in (1, 4)}
    assert set(rows) == expected
    # A square is found where it is: by maps, by areas, and hardly by what is left of it in the mean.
    assert rows["parts", "together", None, "x0", 0]["value"] > 0.9
    assert rows["landmarks", "together", 4, "x0", 0]["value"] < 1 < rows["landmarks", "middle", 1, "x_t", 300]["value"]
    for key, row in rows.items():
        if key[0] == "rank":
            assert 1 <= row["value"] <= 29
        elif key[4] is not None:
            best = (min if key[0] == "landmarks" else max)(
                r["value"] for k, r in rows.items() if k[0] == key[0] and k[4] is None
            )
            assert row["minus_baseline"]["value"] == pytest.approx(row["value"] - best)
            first = rows[(*key[:4], 0)]["value"]
            assert row["minus_first"]["value"] == pytest.approx(row["value"] - first)
            assert row["low"] <= row["value"] <= row["high"]
    with open(out / "features.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + len(rows)
    assert {p.name for p in out.iterdir()} == {"latents", "metrics.json", "features.csv", "features.png"}
    with Image.open(out / "features.png") as picture:
        assert min(picture.size) > 300
    for words in ("landmarks: mean distance, px", "together 4x4 of x_t", "effective rank", "best: ", "minus itself"):
        assert words in printed
    # The values are those of the pipeline's own features.
    pipe = Pipeline(tiny_pdae(TINY_FULL), device="cpu", plan="eager")
    side = [np.stack([np.asarray(Image.open(world / "images" / f"{k:06d}.png")) for k in range(COUNT)])]
    held = {int(n) for n in _test_names(report, world)}
    x = torch.from_numpy(side[0][:, None] / np.float32(127.5) - 1)
    maps = pipe.features(x, 300, 2)
    train = [k for k in range(COUNT) if k not in held]
    features = maps.outputs[1].mean(dim=(2, 3)).numpy()[train]
    assert rows["rank", "decoder2", 1, "x0", 300]["value"] == pytest.approx(linear.effective_rank(features), rel=1e-4)


def _test_names(report, world):
    from pdae_fast.data.latents import split

    return split(COUNT, 0.25, report["seed"])[1]


def test_a_prior_alone_and_a_few_labels(tmp_path, prior_dir, world):
    out = tmp_path / "out"
    arguments = ["--model", prior_dir, "--input", world, "--device", "cpu", "--plan", "eager", "--quiet"]
    arguments += ["--features", "decoder", "--times", 0, "--grid", 2, "--targets", "landmarks", "--labelled", 12]
    assert run(*arguments, "--out", out) == 0
    report = found(out)
    assert report["train_images"] == 12 and report["part_images"] is None and report["targets"] == ["landmarks"]
    names = {row["features"] for row in report["features"]}
    assert {"decoder1", "decoder4", "together", "pixels 32x32"} <= names and not any("z" in n.split() for n in names)


def test_classes(tmp_path, model_dir):
    folder = tmp_path / "idx"
    folder.mkdir()
    for seed, (prefix, count) in enumerate((("train", 30), ("t10k", 10))):
        images = np.random.default_rng(seed).integers(0, 60, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 2).astype(np.uint8)
        for i, label in enumerate(labels):
            images[i, 14 * label : 14 * label + 14] += 150
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    arguments = ["--model", model_dir, "--input", folder, "--device", "cpu", "--plan", "eager", "--quiet"]
    assert run(*arguments, "--features", "middle", "--times", 0, "--grid", 2, "--out", tmp_path / "out") == 0
    values = {
        row["features"]: row["value"] for row in found(tmp_path / "out")["features"] if row["target"] == "classes"
    }
    assert values["middle"] == values["pixels 32x32"] == 1


def test_mistakes(tmp_path, model_dir, world, capsys):
    same = tmp_path / "same"
    shutil.copytree(world, same)
    (same / "attributes.csv").write_text("image,a,b\n" + "\n".join(f"{k:06d}.png,1,0" for k in range(COUNT)))
    for arguments, words in (
        (["--features", "decoder5"], "--features decoder5: no such block; this network has middle, and decoder1 to"),
        (["--features", "decoder0"], "no such block"),
        (["--times", 3], "--times is of features: say of which blocks"),
        (["--features", "trunk"], "no such block"),
        (["--features", "middle", "--times", 0, 1000], "--times 1000: this model has times from 0 to 999"),
        (["--features", "middle", "--times", -1], "--times -1"),
        (["--features", "middle", "--grid", 64], "--grid 64: the maps of middle are"),
        (["--features", "middle", "--grid", 0], "--grid 0"),
        (["--features", "middle", "--labelled", 0], "--labelled must be at least 1, not 0"),
        (["--features", "middle", "--targets", "classes"], "--targets classes: not known of these images; there are"),
        (["--features", "middle", "--input", "bundled:fashion", "--targets", "parts"], "those of avatars alone are"),
        (["--features", "middle", "--input", same], "all images have the same attributes"),
        (["--features", "middle", "--input", "bundled:avatars"], "masks of 64 x 64 pixels; the model's images are 32"),
        (["--features", "middle", "--input", world / "images"], "no labels: give --attributes FILE"),
    ):  # fmt: skip
        base = ["--model", model_dir, "--device", "cpu", "--plan", "eager", "--quiet", "--out", tmp_path / "out"]
        given = [] if "--input" in arguments else ["--input", world]
        assert run(*base, *given, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error
        # Before anything is encoded.
        assert not (tmp_path / "out" / "latents").exists() and not (tmp_path / "out" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_features_that_would_not_fit_are_refused(tmp_path, model_dir, world, monkeypatch, capsys):
    monkeypatch.setattr(probe_features, "available_memory", lambda device: 1 << 16)
    arguments = ["--model", model_dir, "--input", world, "--device", "cpu", "--plan", "eager", "--quiet"]
    assert run(*arguments, "--features", "decoder", "--out", tmp_path / "out") == 2
    assert "ask for a smaller --grid, fewer --features, or --limit the images" in capsys.readouterr().err
