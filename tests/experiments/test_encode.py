"""`encode`: what is in the file is what direct calls give."""

import json

import numpy as np
import pytest
import torch

from helpers import image_folder
from idx_files import write_set
from pdae_fast import PDAE, Pipeline, cli
from pdae_fast.data import open_dataset
from pdae_fast.experiments import encode as experiment


def run(*argv):
    return cli.run(experiment.main, [str(a) for a in argv])


def direct(model_dir, folder):
    dataset = open_dataset(folder, 32, 1, split="test")
    x0 = torch.stack([dataset[i].image for i in range(len(dataset))])
    pipe = Pipeline(PDAE.from_pretrained(model_dir), "published", steps=2, device="cpu", plan="eager")
    return dataset, x0, pipe


def test_npz_holds_latents_names_and_x_T(tmp_path, model_dir, monkeypatch, capsys):
    folder = image_folder(tmp_path / "in", 5)
    monkeypatch.setattr(experiment, "BLOCK_IMAGES", 2)
    assert run("--model", model_dir, "--input", folder, "--out", tmp_path / "out", "--with-x-T", "--steps", 2,
               "--iterations", 0, "--batch-size", 2, "--device", "cpu", "--plan", "eager") == 0  # fmt: skip
    assert "z [5, 16] and x_T, no labels" in capsys.readouterr().out
    dataset, x0, pipe = direct(model_dir, folder)
    z = pipe.encode(x0)
    with np.load(tmp_path / "out" / "latents.npz") as file:  # without pickle
        assert set(file) == {"names", "z", "x_T", "about"}
        assert file["names"].tolist() == dataset.names
        assert file["z"].dtype == np.float32 and file["z"] == pytest.approx(z.numpy(), rel=1e-4, abs=1e-5)
        assert file["x_T"] == pytest.approx(pipe.invert(x0, z).numpy(), rel=1e-3, abs=1e-4)
        about = json.loads(str(file["about"]))
    assert about["steps"] == 2 and len(about["weights"]) == 16
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["network_evaluations_per_image"]["encoder"] == 1
    assert report["network_evaluations_per_image"]["trunk"] == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"latents.npz", "metrics.json"}


def test_labels_of_classes_and_of_a_table(tmp_path, model_dir):
    idx = write_set(tmp_path / "idx", count=3)
    arguments = ["--model", model_dir, "--device", "cpu", "--quiet", "--plan", "eager"]
    assert run(*arguments, "--input", idx, "--out", tmp_path / "a") == 0
    with np.load(tmp_path / "a" / "latents.npz") as file:
        assert file["labels"].tolist() == [1, 2, 3] and file["label_names"].tolist() == ["0", "1", "2", "3"]
    folder = image_folder(tmp_path / "in", 3)
    table = tmp_path / "attributes.csv"
    table.write_text("image,round,dark\n02.png,1,0\n00.png,-1,1\n")
    assert run(*arguments, "--input", folder, "--attributes", table, "--out", tmp_path / "b") == 0
    with np.load(tmp_path / "b" / "latents.npz") as file:
        # Image 01 has no row.
        assert file["labels"].tolist() == [[0, 1], [-1, -1], [1, 0]] and file["label_names"].tolist() == [
            "round",
            "dark",
        ]


def test_broken_images_leave_no_gap(tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "BLOCK_IMAGES", 1)  # a block of nothing but a broken image
    folder = image_folder(tmp_path / "in", 4)
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:60])
    arguments = ["--model", model_dir, "--input", folder, "--device", "cpu", "--plan", "eager", "--batch-size", 1]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    assert "1 broken images skipped: 01" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "latents.npz") as file:
        assert file["names"].tolist() == ["00", "02", "03"] and file["z"].shape == (3, 16)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    assert run(*arguments, "--out", tmp_path / "none") == 2
    assert "none of the 4 images could be read; the first: 00: " in capsys.readouterr().err


def test_parquet_is_read_back_by_pyarrow(tmp_path, model_dir):
    parquet = pytest.importorskip("pyarrow.parquet")
    idx = write_set(tmp_path / "idx", count=3)
    assert run("--model", model_dir, "--input", idx, "--out", tmp_path / "out", "--format", "parquet", "--with-x-T",
               "--steps", 1, "--batch-size", 2, "--device", "cpu", "--quiet", "--plan", "eager") == 0  # fmt: skip
    table = parquet.read_table(tmp_path / "out" / "latents.parquet")
    dataset, x0, pipe = direct(model_dir, idx)
    assert table["name"].to_pylist() == dataset.names and table["label"].to_pylist() == ["1", "2", "3"]
    z = np.array(table["z"].to_pylist(), np.float32)
    assert z == pytest.approx(pipe.encode(x0).numpy(), rel=1e-4, abs=1e-5)
    assert json.loads(table.schema.field("x_T").metadata[b"shape"]) == [1, 32, 32]
    assert len(table["x_T"][0]) == 1024 and b"weights" in table.schema.metadata[b"pdae_fast"]


def test_without_pyarrow_nothing_is_begun(tmp_path, model_dir, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = image_folder(tmp_path / "in", 1)
    assert run("--model", model_dir, "--input", folder, "--out", tmp_path / "out", "--format", "parquet") == 2
    assert "pip install 'pdae_fast[parquet]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_latent_that_is_not_finite_names_its_image():
    class Bad:
        evaluations: dict = {}

        def encode(self, x):
            return torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])

    block = experiment.Block(0, torch.zeros(2, 1, 2, 2), ["first", "second"], [0, 1], [])
    with pytest.raises(experiment.UserError, match="second: its z holds NaN"):
        experiment.encode(Bad(), block)
