"""The commands on a Diff-AE: those that need z alone run, those that need G say so before anything is written."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from golden_rule import fill
from helpers import TINY_UNET, image_folder
from idx_files import idx_bytes
from pdae_fast import DiffAE, DiffAEConfig, LatentConfig, cli
from pdae_fast.experiments import encode, evaluate, interpolate, manipulate, probe, reconstruct, sample
from pdae_fast.experiments.analyze import command as analyze

CONFIG = DiffAEConfig(
    image_size=32,
    latent_dim=16,
    unet=dataclasses.replace(TINY_UNET, time_channel=64),
    encoder_multiplier=(1, 1, 1),
    latent=LatentConfig(16, 32, 3),
    attributes=("round", "dark"),
    latent_statistics=True,
)


@pytest.fixture(scope="module")
def model():
    own = fill(DiffAE(CONFIG))
    own.latent_mean.copy_(torch.linspace(-0.5, 0.5, 16)), own.latent_std.copy_(torch.linspace(0.5, 1.5, 16))
    return own


@pytest.fixture
def base(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 4)
    options = ["--model", model_dir, "--input", folder, "--device", "cpu", "--out", tmp_path / "out", "--quiet"]
    return [str(option) for option in options]


def report(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


RECIPE = ["--preset", "diffae", "--steps", "4", "--encode-steps", "5"]
RUNS = {
    "reconstruct": (reconstruct.main, RECIPE),
    "interpolate": (interpolate.main, [*RECIPE, "--points", "3"]),
    "manipulate": (manipulate.main, [*RECIPE, "--attribute", "dark"]),
    "sample": (sample.main, [*RECIPE, "--count", "3", "--latent-steps", "10"]),
    "encode": (encode.main, [*RECIPE, "--with-x-T"]),
    "inversion": (lambda argv: analyze.main(["inversion", *argv]), ["--ways", "random", "diffae", "--points", "3"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_needs_no_g_runs(name, base, tmp_path, capsys):
    main, options = RUNS[name]
    assert cli.run(main, [*base, *options]) == 0, capsys.readouterr().err
    assert any((tmp_path / "out").iterdir())
    if name == "interpolate":
        assert {row["kind"] for row in report(tmp_path)["rows"]} == {"latent"}
    if name == "sample":
        found = report(tmp_path)
        assert (found["latent_steps"], found["latent_clamp"]) == (10, False)


def test_evaluate_leaves_the_prior_out(base, tmp_path):
    assert cli.run(evaluate.main, [*base, "--steps", "3"]) == 0
    assert [row["mode"] for row in report(tmp_path)["rows"]] == ["inferred", "random"]


REFUSED = {
    "reconstruct": (reconstruct.main, ["--modes", "prior"], "--modes prior needs a prior and its G"),
    "evaluate": (evaluate.main, ["--modes", "inferred", "prior"], "--modes prior needs"),
    "interpolate": (interpolate.main, ["--kinds", "trajectory"], "--kinds trajectory needs"),
    "compare": (interpolate.main, ["--compare"], "--compare needs"),
    "sample": (sample.main, ["--prior-only"], "--prior-only needs"),
    **{
        kind: (lambda argv, kind=kind: analyze.main([kind, *argv]), [], f"analyze {kind} needs a prior and its G")
        for kind in ("gap", "one-step", "shift", "loss", "critical-stage")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_g_says_so(name, base, tmp_path, capsys):
    main, options, words = REFUSED[name]
    if name == "critical-stage":
        options = ["--attribute", "dark"]
    assert cli.run(main, [*base, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_probe(tmp_path, base):
    folder = tmp_path / "labelled"
    folder.mkdir()
    for prefix in ("train", "t10k"):
        labels = (np.arange(8) % 2).astype(np.uint8)
        images = (labels[:, None, None] * 150).repeat(28, 1).repeat(28, 2)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert cli.run(probe.main, [*base, "--input", str(folder), "--neighbours", "1"]) == 0
    assert report(tmp_path)["features"][0]["name"] == "z (16)"
