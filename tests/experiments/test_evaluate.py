"""`evaluate` against direct calls and independent metrics; interruptions; several processes; mistakes."""

import csv
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance

from helpers import TINY_FULL, image_folder, tiny_pdae
from pdae_fast import Pipeline, cli, reconstruct
from pdae_fast.data import open_dataset
from pdae_fast.experiments import evaluate as experiment
from pdae_fast.experiments import perceptual
from pdae_fast.samplers import RECIPES, Recipe


@pytest.fixture
def base(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 5)
    return ["--model", model_dir, "--input", folder, "--device", "cpu", "--batch-size", 2, "--plan", "eager"]


def run(main, *argv):
    return cli.run(main, [str(a) for a in argv])


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_that_of_direct_calls(tmp_path, model_dir, base, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setitem(RECIPES, "fast", Recipe(steps=3, spacing="quadratic", iterations=2))
    assert run(experiment.main, *base, "--out", out, "--steps", 2, "--iterations", 0, "--preset", "fast",
               "--modes", "inferred", "random", "--seed", 3) == 0  # fmt: skip
    printed = capsys.readouterr().out
    report = json.loads((out / "metrics.json").read_text())
    assert [row["label"] for row in report["rows"]] == [
        "inferred x_T, 2+2", "random x_T, 2", "inferred x_T, fast", "random x_T, fast",
    ]  # fmt: skip
    assert [row["network_evaluations_per_image"]["trunk"] for row in report["rows"]] == [4, 2, 10, 3]
    assert report["images"] == 5 and report["broken"] == [] and report["preset"] == ["fast"]
    assert set(report["not_available"]) <= {"lpips", "st_lpips"}
    for name in report["not_available"]:
        assert f"{experiment.TITLES[name]}: not available" in printed
    dataset = open_dataset(base[3], 32, 1)
    x0 = torch.stack([dataset[i].image for i in range(5)])
    model = experiment.common.PDAE.from_pretrained(model_dir)
    pipe = Pipeline(model, "published", steps=2, device="cpu", plan="eager", batch_size=5)
    decoded = [pipe.reconstruct(x0), pipe.decode(pipe.encode(x0), pipe.random_x_T(3, range(5)))]
    per_image = rows_of(out / "per_image.csv")
    assert [row["image"] for row in per_image[::4]] == dataset.names
    for k, x in enumerate(decoded):
        expected = [float(peak_signal_noise_ratio((x[i] + 1) / 2, (x0[i] + 1) / 2, data_range=1.0)) for i in range(5)]
        assert [float(row["psnr"]) for row in per_image[k::4]] == pytest.approx(expected, rel=1e-4)
        mean = report["rows"][k]["mean"]
        assert mean["psnr"] == pytest.approx(np.mean(expected), rel=1e-4)
        assert mean["mse"] == pytest.approx(float((((x - x0) / 2) ** 2).mean()), rel=1e-4)
        error = np.std(expected, ddof=1) / 5**0.5
        assert report["rows"][k]["standard_error"]["psnr"] == pytest.approx(error, rel=1e-3)
    table = rows_of(out / "table.csv")
    assert [float(row["mse"]) for row in table] == [row["mean"]["mse"] for row in report["rows"]]
    assert (out / "grid.png").stat().st_size > 0 and not (out / "parts").exists()


def test_an_interrupted_evaluation_continues(tmp_path, base, monkeypatch):
    arguments = [*base, "--steps", 1, "--modes", "random", "prior"]
    assert run(experiment.main, *arguments, "--out", tmp_path / "whole", "--quiet") == 0
    calls = []
    original = experiment.common.autoencode

    def stop(pipe, mode, x0, indices, *rest):
        calls.append((mode, tuple(indices)))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(pipe, mode, x0, indices, *rest)

    monkeypatch.setattr(experiment.common, "autoencode", stop)
    out = tmp_path / "out"
    assert run(experiment.main, *arguments, "--out", out, "--quiet") == 130
    assert not (out / "per_image.csv").exists()
    assert run(experiment.main, *arguments, "--out", out, "--quiet") == 0
    # Block 0 was finished, block 1 was not, so it is done again from its start.
    assert calls[4:] == [("random", (2, 3)), ("prior", (2, 3)), ("random", (4,)), ("prior", (4,))]
    for name in ("per_image.csv", "grid.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_changed_settings_of_an_unfinished_run_are_refused(tmp_path, base, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.common, "autoencode", stop)
    assert run(experiment.main, *base, "--out", tmp_path / "out", "--steps", 1) == 130
    capsys.readouterr()
    assert run(experiment.main, *base, "--out", tmp_path / "out", "--steps", 2) == 2
    error = capsys.readouterr().err
    assert "steps 1, now 2" in error and len(error.splitlines()) == 1


class _Features(torch.nn.Module):
    def forward(self, x):
        assert x.dtype == torch.uint8
        return torch.nn.functional.avg_pool2d(x.float() / 255, 16).flatten(1)


def test_frechet_distance_is_torchmetrics_own(tmp_path, model_dir, base):
    network = tmp_path / "features.pt"
    torch.jit.script(_Features()).save(str(network))
    reference = image_folder(tmp_path / "reference", 4)
    out = tmp_path / "out"
    assert run(experiment.main, *base, "--out", out, "--steps", 1, "--modes", "random", "--fid", reference,
               "--fid-network", network, "--quiet") == 0  # fmt: skip
    report = json.loads((out / "metrics.json").read_text())
    pipe = Pipeline(experiment.common.PDAE.from_pretrained(model_dir), steps=1, device="cpu", plan="eager")
    metric = FrechetInceptionDistance(feature=_Features(), input_img_size=(3, 32, 32))
    for folder, real in ((reference, True), (base[3], False)):
        dataset = open_dataset(folder, 32, 1)
        x = torch.stack([dataset[i].image for i in range(len(dataset))])
        x = x if real else pipe.decode(pipe.encode(x), pipe.random_x_T(0, range(len(x))))
        metric.update(((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).expand(-1, 3, -1, -1), real=real)
    assert report["rows"][0]["fid"] == pytest.approx(float(metric.compute()), rel=1e-3, abs=1e-6)
    assert report["fid"]["images"] == 4 and not (out / "fid").exists()


class _FakeLPIPS(torch.nn.Module):
    """Shaped as the package's: a trunk in slices whose parts keep AlexNet's numbers, then one number for a pair."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert net == "alex" and pnet_rand and not verbose  # anything else would download
        self.net = torch.nn.Module()
        self.net.slice1 = torch.nn.Sequential()
        self.net.slice1.add_module("0", torch.nn.Conv2d(3, 2, 3))
        self.net.slice2 = torch.nn.Sequential()
        self.net.slice2.add_module("3", torch.nn.Conv2d(2, 2, 3))

    def forward(self, a, b):
        return (self.net.slice2(self.net.slice1(a - b)) ** 2).mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_runs_on_local_weights_or_says_why_not(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(perceptual.NotAvailable, match="lpips cannot be imported"):
        perceptual.lpips(cpu)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=_FakeLPIPS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(perceptual.NotAvailable, match="--alexnet FILE"):
        perceptual.lpips(cpu)
    torch.manual_seed(1)
    layers = {"0": torch.nn.Conv2d(3, 2, 3), "3": torch.nn.Conv2d(2, 2, 3)}
    weights = {f"features.{i}.{k}": v for i, layer in layers.items() for k, v in layer.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / perceptual.ALEXNET_FILES[1])
    a, b = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = (layers["3"](layers["0"]((a - b).expand(-1, 3, -1, -1))) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(perceptual.lpips(cpu)(a, b), expected.double(), rtol=1e-6)
    for other in ({"features.0.weight": torch.zeros(2)}, {**weights, "features.3.bias": torch.zeros(5)}):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(perceptual.UserError, match="does not hold torchvision's AlexNet"):
            perceptual.lpips(cpu, tmp_path / "other.pth")


MISTAKES = [
    (["--steps", "0"], "steps must be between 1 and 1000"),
    (["--steps", "3", "2000"], "steps must be between 1 and 1000"),
    (["--preset", "fast", "--encode-steps", "5"], "leave out --encode-steps"),
    (["--fid", "x"], "--fid and --fid-network go together"),
    (["--fid", "{in}", "--fid-network", "{in}/00.png"], "not a TorchScript file"),
    (["--fid", "{in}", "--fid-network", "nowhere.pt"], "no such file"),
    (["--fid", "nowhere", "--fid-network", "{in}/00.png"], "no such input: nowhere"),
    (["--alexnet", "nowhere.pth"], "nowhere.pth"),
    (["--input", "bundled:faces"], "no bundled data bundled:faces; there is bundled:"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes(tmp_path, base, capsys, monkeypatch, arguments, words):
    if "--alexnet" in arguments:
        monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=_FakeLPIPS))
    arguments = [a.format(**{"in": base[3]}) for a in arguments]
    assert run(experiment.main, *base, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "reconstruct"])
def test_two_processes_find_what_one_finds(tmp_path, base, command):
    broken = base[3] / "01.png"
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = [str(a) for a in [*base, "--steps", 1, "--modes", "inferred", "random"]]
    main = {"evaluate": experiment.main, "reconstruct": reconstruct.main}[command]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: sums over other numbers of threads round differently
    try:
        assert run(main, *arguments, "--out", tmp_path / "one") == 0
    finally:
        torch.set_num_threads(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", f"pdae_fast.{command}"]
    done = subprocess.run([*torchrun, *arguments, "--out", str(tmp_path / "two")], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("decoded from") == 1  # one table, not two
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [b["name"] for b in two["broken"]] == ["01"] and two["images"] == 4
    files = {"evaluate": ["per_image.csv", "grid.png"], "reconstruct": ["grid.png", "images/random/03.png"]}[command]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for key in ("per_image", "broken"):
        assert one.get(key) == two.get(key)


def test_only_the_first_images_are_kept_for_the_grid(monkeypatch):
    monkeypatch.setattr(experiment, "GRID_IMAGES", 3)
    pipe = Pipeline(tiny_pdae(TINY_FULL), steps=1, device="cpu", plan="eager")
    setting = experiment.Case("prior", Recipe(1))
    x0 = torch.zeros(2, 1, 32, 32)
    for indices, kept in (([2, 3], 1), ([4, 5], 0)):
        block = experiment.Block(0, x0, ["a", "b"], indices, [])
        values, arrays = experiment.evaluate(pipe, [setting], block, experiment.METRICS)
        assert len(values["cases"][0]["quality"]["mse"]) == 2
        assert {name: array.shape[:2] for name, array in arrays.items()} == ({"shown": (1, kept)} if kept else {})
