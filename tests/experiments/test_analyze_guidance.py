"""Classifier guidance against exact gradients, the shared trajectories of the critical stage, and its classifiers."""

import csv
import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from helpers import TINY, image_folder
from idx_files import idx_bytes
from pdae_fast import ScheduleConfig, UserError, analyze, cli
from pdae_fast.experiments import image_classifier
from pdae_fast.experiments.analyze import critical_stage
from pdae_fast.experiments.analyze.critical_stage import Stage
from pdae_fast.samplers import ddim
from pdae_fast.schedule import build_schedule

CONFIG = TINY

SCHEDULE = build_schedule(ScheduleConfig())
MEANS, SPREAD = torch.tensor([[-0.6, 0.2], [0.5, -0.3]], dtype=torch.float64), 0.1


def mixture(x, t):
    """log p_t(x, y) [B, 2] of two Gaussians of equal weight, diffused to t."""
    bar = float(SCHEDULE.alpha_bar[t])
    variance = bar * SPREAD**2 + 1 - bar
    distance = (x[:, None] - bar**0.5 * MEANS).square().sum(2)
    return -distance / (2 * variance) - math.log(2 * math.pi * variance) - math.log(2)


def exact_field(x, t, use_gradient):
    """eps = -sqrt(1 - alpha_bar) grad log p_t(x)."""
    bar = float(SCHEDULE.alpha_bar[t])
    weight = mixture(x, t).softmax(1)
    variance = bar * SPREAD**2 + 1 - bar
    score = (weight[:, :, None] * (bar**0.5 * MEANS - x[:, None])).sum(1) / variance
    return -((1 - bar) ** 0.5) * score, None


def log_posterior(y):
    return lambda x, t: mixture(x, t).log_softmax(1)[:, y]


def noise(count):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("y", [0, 1])
def test_guided_samples_are_those_of_the_class(y):
    x_T = noise(400)
    free = ddim.ddim(exact_field, x_T, SCHEDULE, 200, clamp=None)
    share = float(((free - MEANS[0]).norm(dim=1) < (free - MEANS[1]).norm(dim=1)).double().mean())
    assert 0.4 < share < 0.6
    led = ddim.ddim(ddim.guided(exact_field, log_posterior(y)), x_T, SCHEDULE, 200, clamp=None)
    # p_t(x) p_t(y | x) is the class's own Gaussian: its probability flow is known in closed form.
    bar = SCHEDULE.alpha_bar[[0, -1]]
    scale = np.sqrt((bar[0] * SPREAD**2 + 1 - bar[0]) / (bar[1] * SPREAD**2 + 1 - bar[1]))
    exact = bar[0] ** 0.5 * MEANS[y] + scale * (x_T - bar[1] ** 0.5 * MEANS[y])
    assert float((led - exact).abs().max()) < 0.03  # a first-order method
    assert float((led.mean(0) - MEANS[y]).abs().max()) < 0.03


def test_guidance_is_the_formula_of_the_paper():
    x, t = noise(5), 600
    bar = float(SCHEDULE.alpha_bar[t])
    eps, gradient = ddim.guided(exact_field, log_posterior(1), scale=2.5)(x, t, True)
    point = x.clone().requires_grad_(True)
    (ascent,) = torch.autograd.grad(log_posterior(1)(point, t).sum(), point)
    expected = exact_field(x, t, True)[0] - (1 - bar) ** 0.5 * 2.5 * ascent
    torch.testing.assert_close(ddim.shifted_eps(eps, gradient, bar), expected)
    assert ddim.guided(exact_field, log_posterior(1))(x, t, False)[1] is None

    def with_g(x, t, use_gradient):
        return exact_field(x, t, use_gradient)[0], torch.ones_like(x) if use_gradient else None

    torch.testing.assert_close(ddim.guided(with_g, log_posterior(1), 2.5)(x, t, True)[1], gradient + 1)


def test_guidance_takes_what_inference_mode_hands_out():
    network = torch.nn.Linear(2, 2).double()
    with torch.inference_mode():
        x = noise(3) * 1
        _, gradient = ddim.guided(exact_field, lambda x, t: network(x)[:, 0])(x, 10, True)
    torch.testing.assert_close(gradient.clone(), network.weight[0].detach().expand(3, 2))


# -- stages --------------------------------------------------------------------------------------------------------


def test_stages_share_trajectories_and_change_nothing():
    x_T, count = noise(3), 4
    trajectory = SCHEDULE.decoding(20)
    parts = critical_stage.stages_of(trajectory, 1000, count)
    assert sum(map(len, parts)) == 20 and all(250 * k <= s.t < 250 * (k + 1) for k in range(count) for s in parts[k])
    calls = []
    log_prob = log_posterior(0)
    found = {
        (low, high): x
        for low, high, x in critical_stage.guided_stages(
            exact_field, log_prob, x_T, SCHEDULE, parts, scale=3, clamp=None, progress=lambda: calls.append(1)
        )
    }
    assert set(found) == {(0, 0), *combinations(range(count + 1), 2)}
    assert len(calls) == critical_stage.evaluations(parts)
    led = ddim.guided(exact_field, log_prob, 3)
    for (low, high), x in found.items():
        steps = tuple(s._replace(use_gradient=250 * low <= s.t < 250 * high) for s in trajectory)
        torch.testing.assert_close(x, ddim.integrate(led, x_T, steps, clamp=None), rtol=0, atol=0)
    assert not torch.allclose(found[0, 4], found[0, 0])


def test_a_stage_needs_a_step():
    with pytest.raises(UserError, match="3 steps leave one of the 5 stages empty"):
        critical_stage.stages_of(SCHEDULE.decoding(3), 1000, 5)


def test_the_shortest_stage():
    stages = [
        Stage(0, 0, 0.1, 0),
        Stage(0, 1000, 0.95, 0),
        Stage(400, 800, 0.9, 0),
        Stage(200, 600, 0.92, 0),
        Stage(0, 200, 0.1, 0),
    ]
    assert critical_stage.shortest(stages, 0.9) == stages[3]
    assert critical_stage.shortest(stages, 0.93) == stages[1]
    assert critical_stage.shortest(stages, 0.99) is None
    assert critical_stage.shortest(stages, 0.05) == stages[3]  # what is no better than no guidance is not enough


# -- classifiers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shades():
    """Noise images 48 that are dark (class 0) or bright (class 1)."""
    labels = torch.arange(48) % 2
    x = 0.2 * torch.randn(48, 1, 32, 32, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1) - 0.5
    return x.clamp(-1, 1), labels


def test_classifiers_learn_with_and_without_noise(shades, tmp_path):
    x, labels = shades
    judge = image_classifier.train_classifier(x, labels, 2, seed=1, epochs=8, batch_size=8)
    assert float((image_classifier.predict(judge, x).argmax(1) == labels).float().mean()) == 1
    guide = image_classifier.train_classifier(x, labels, 2, seed=1, schedule=SCHEDULE, epochs=8, batch_size=8)
    right = [image_classifier.accuracy_at(guide, SCHEDULE, x, labels, t, 0) for t in (0, 300, 999)]
    assert right[0] == 1 and right[1] > 0.9 and right[2] < 0.8
    for model, t in ((judge, torch.zeros(1, dtype=torch.int64)), (guide, None)):
        with pytest.raises(ValueError, match="needs t"):
            model(x[:1], t)


def test_a_classifier_is_trained_once(shades, tmp_path):
    x, labels = shades
    path, seen = tmp_path / "sub" / "judge.pt", []

    def train(labels=labels, **settings):
        return image_classifier.cached_classifier(path, x, labels, 2, epochs=1, **settings).state_dict()

    first = train()
    stamp = path.stat().st_mtime_ns
    again = train(advance=seen.append)
    assert seen == [48] and path.stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    other = train(labels=1 - labels)
    assert path.stat().st_mtime_ns != stamp and not torch.equal(first["last.weight"], other["last.weight"])
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(train(labels=1 - labels)["last.weight"], other["last.weight"])
    with pytest.raises(UserError, match="at least two classes"):
        image_classifier.train_classifier(x, torch.zeros_like(labels), 2)


class Brightness(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([-mean, mean], 1)


def test_a_users_classifier(shades, tmp_path):
    x, labels = shades
    torch.jit.script(Brightness()).save(str(tmp_path / "judge.ts"))
    judge = image_classifier.UserClassifier(tmp_path / "judge.ts", "--judge", 2, False)
    assert float((image_classifier.predict(judge, x).argmax(1) == labels).float().mean()) == 1
    with pytest.raises(UserError, match=r"--judge .* returns \[48, 2\]; expected logits \[48, 3\]"):
        image_classifier.predict(image_classifier.UserClassifier(tmp_path / "judge.ts", "--judge", 3, False), x)
    with pytest.raises(UserError, match=r"--guide .* cannot run on \[2, 1, 32, 32\] and t"):
        image_classifier.UserClassifier(tmp_path / "judge.ts", "--guide", 2, True)(x[:2], torch.zeros(2).long())
    (tmp_path / "no.ts").write_bytes(b"nothing")
    for name, line in (("no.ts", "not a TorchScript file"), ("none.ts", "no such file")):
        with pytest.raises(UserError, match=line):
            image_classifier.UserClassifier(tmp_path / name, "--judge", 2, False)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Twelve training and nine test images of three classes, as IDX files."""
    folder = tmp_path_factory.mktemp("idx")
    for seed, (prefix, count) in enumerate((("train", 12), ("t10k", 9))):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 28, 28)).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes((np.arange(count) % 3).astype(np.uint8)))
    return folder


def command(model_dir, data, out, *more):
    arguments = ["critical-stage", "--model", model_dir, "--input", data, "--out", out, "--device", "cpu",
                 "--steps", 4, "--stages", 2, "--count", 4, "--epochs", 1, "--batch-size", 3, *more]  # fmt: skip
    return cli.run(analyze.main, [str(a) for a in arguments])


def test_critical_stage_as_a_command(model_dir, classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(model_dir, classes, out, "--accuracy", 0.01) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["samples"] == 4 and report["classes"] == ["0", "1", "2"] and report["images"] == 12
    assert {(s["low"], s["high"]) for s in report["stages"]} == {(0, 0), (0, 500), (500, 1000), (0, 1000)}
    # Two steps in each stage: 4 unguided, 4 + 2 guided, 2 below each of the stages that end at 500.
    assert report["network_evaluations_per_image"]["trunk"] == 12
    assert "gradient" not in report["network_evaluations_per_image"]
    with open(out / "stages.csv") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert {p.name for p in out.iterdir()} == {
        "grid.png", "guide.pt", "heat_map.png", "judge.pt", "latents", "metrics.json", "stages.csv",
    }  # fmt: skip
    stamp = (out / "guide.pt").stat().st_mtime_ns
    assert command(model_dir, classes, out, "--accuracy", 0.01, "--quiet") == 0
    assert (out / "guide.pt").stat().st_mtime_ns == stamp
    assert json.loads((out / "metrics.json").read_text())["stages"] == report["stages"]


def test_critical_stage_by_an_attribute(model_dir, tmp_path):
    folder = image_folder(tmp_path / "in", 16)
    table = tmp_path / "a.csv"
    table.write_text("image,round,rare\n" + "".join(f"{i:02d}.png,{i % 2},{int(i == 0)}\n" for i in range(16)))
    out = tmp_path / "out"
    assert command(model_dir, folder, out, "--attributes", table, "--quiet") == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["classes"] == ["not round", "round"] and report["images"] == 12  # a quarter is held out


def test_an_unknown_attribute_before_an_image_is_encoded(model_dir, tmp_path, capsys):
    folder = image_folder(tmp_path / "in", 16)
    (tmp_path / "a.csv").write_text("image,round\n" + "".join(f"{i:02d}.png,{i % 2}\n" for i in range(16)))
    arguments = ["--attributes", tmp_path / "a.csv", "--attribute", "square", "--quiet"]
    assert command(model_dir, folder, tmp_path / "out", *arguments) == 2
    assert "no attribute 'square'; there are round" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, line",
    [
        (["--count", 0], "must be at least 1"),
        (["--stages", 0], "--stages from 1 to 100"),
        (["--stages", 5], "4 steps leave one of the 5 stages empty"),
        (["--attribute", "round"], "this data has classes"),
        (["--judge", "nothing.ts"], "--judge nothing.ts: no such file"),
    ],
)
def test_mistakes_are_one_line(more, line, model_dir, classes, tmp_path, capsys):
    assert command(model_dir, classes, tmp_path / "out", *more, "--quiet") == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "latents").exists() or "--judge" in more
    assert not (tmp_path / "out" / "guide.pt").exists()  # nor is one classifier trained before the other is opened


def test_images_without_labels(model_dir, tmp_path, capsys):
    assert command(model_dir, image_folder(tmp_path / "in", 4), tmp_path / "out") == 2
    assert "these images have no labels: give --attributes FILE" in capsys.readouterr().err
