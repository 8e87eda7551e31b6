"""manifest.json: what a reader refuses, and why."""

import json

import pytest

from pdae_fast.errors import UserError
from pdae_fast.export import manifest


@pytest.fixture
def directory(tmp_path):
    """A complete export as far as the manifest can tell."""
    for name in manifest.GRAPHS["pdae"]:
        (tmp_path / f"{name}.onnx").write_bytes(name.encode() * 100)
    (tmp_path / "step.weights").write_bytes(bytes(5000))
    graphs = {
        name: manifest.graph_entry(tmp_path / f"{name}.onnx", *manifest.signature(name, (1, 8, 8), 4, 6))
        for name in manifest.GRAPHS["pdae"]
    }
    values = {
        "backend": "onnxruntime", "kind": "pdae", "image_shape": [1, 8, 8], "latent_dim": 4, "conditioning_width": 6,
        "dtype": "float32", "steps": 3, "encode_steps": 4, "max_batch": 2, "graphs": graphs,
        "files": {"step.weights": manifest.file_entry(tmp_path / "step.weights")},
    }  # fmt: skip
    manifest.write(tmp_path, values)
    return tmp_path


def edit(directory, change):
    path = directory / manifest.NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_is_written_is_read(directory):
    values = manifest.read(directory)
    assert values["format"] == manifest.FORMAT and values["steps"] == 3
    manifest.check_files(directory, values)
    assert manifest.is_export(directory) and not manifest.is_export(directory / "missing")
    assert values["graphs"]["decode_step"]["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["N", 1, 8, 8]},
        {"name": "conditioning", "dtype": "float32", "shape": ["N", 2, 6]},
        {"name": "step", "dtype": "int64", "shape": [1]},
    ]


def test_digest_is_the_usual_one(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert manifest.file_entry(tmp_path / "file") == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "bytes": 3,
    }


def test_signatures_of_a_prior_have_no_conditioning():
    inputs, outputs = manifest.signature("invert_step", (3, 4, 4), None, None)
    assert [i["name"] for i in inputs] == ["x", "step"] and outputs[0]["name"] == "x_next"
    assert [o["name"] for o in manifest.signature("reconstruct", (3, 4, 4), None, None)[1]] == ["x"]
    with pytest.raises(ValueError, match="no graph"):
        manifest.signature("nothing", (3, 4, 4), 1, 1)


EDITS = [
    (lambda m: m.pop("steps"), "no field 'steps'"),
    (lambda m: m.update(steps="three"), "steps is 'three'"),
    (lambda m: m.update(steps=True), "steps is True"),
    (lambda m: m.update(max_batch=0), "max_batch is 0; expected at least 1"),
    (lambda m: m.update(format="other"), "format 'other'; this version reads"),
    (lambda m: m.update(noise="pink"), "noise 'pink'; expected normal or standardised"),
    (lambda m: m.update(kind="poem"), "kind 'poem'; expected pdae or diffae or prior"),
    (lambda m: m.update(backend="magic"), "made for magic; expected onnxruntime or tensorrt"),
    (lambda m: m.update(image_shape=[1, 8]), r"image_shape is \[1, 8\]"),
    (lambda m: m["graphs"].pop("encoder"), "no graph encoder"),
    (lambda m: m["graphs"]["encoder"].update(file="../secret"), "'encoder' names no file"),
    (lambda m: m["graphs"]["encoder"].pop("sha256"), "'encoder' names no file with its hash"),
    (lambda m: m["files"].update({"../x": {"sha256": "", "bytes": 1}}), "names no file"),
    (lambda m: m["graphs"].update(encoder="encoder.onnx"), "'encoder' names no file"),
    (lambda m: m.update(steps=2), "does not match its own manifest_sha256: edited after the export"),
    (lambda m: m.update(schedule={"kind": "cosine"}), "edited after the export"),
    (lambda m: m.pop("manifest_sha256"), "edited after the export"),
]


@pytest.mark.parametrize(("change", "words"), EDITS, ids=[words for _, words in EDITS])
def test_an_edited_manifest_is_refused(directory, change, words):
    edit(directory, change)
    with pytest.raises(UserError, match=words):
        manifest.read(directory)


def test_directories_that_are_no_exports(directory, tmp_path):
    with pytest.raises(UserError, match="missing: no such directory; expected a directory written by"):
        manifest.read(tmp_path / "missing")
    with pytest.raises(UserError, match="step.weights: a file"):
        manifest.read(directory / "step.weights")
    with pytest.raises(UserError, match="made for onnxruntime; expected tensorrt"):
        manifest.read(directory, backends=["tensorrt"])
    (directory / manifest.NAME).write_text('{"format": ')
    with pytest.raises(UserError, match="not readable JSON"):
        manifest.read(directory)
    (directory / manifest.NAME).write_text("[]")
    with pytest.raises(UserError, match="format None"):
        manifest.read(directory)
    (directory / manifest.NAME).unlink()
    with pytest.raises(UserError, match="half-finished export"):
        manifest.read(directory)


def test_files_are_hashed(directory):
    values = manifest.read(directory)
    (directory / "encoder.onnx").write_bytes(b"ENCODER" + (directory / "encoder.onnx").read_bytes()[7:])
    manifest.check_files(directory, values, graphs=["decode_step"])
    with pytest.raises(UserError, match="encoder.onnx: its SHA-256 is not the one"):
        manifest.check_files(directory, values)
    (directory / "step.weights").write_bytes(bytes(4999))
    with pytest.raises(UserError, match="step.weights: 4999 bytes, but manifest.json says 5000: truncated or edited"):
        manifest.check_files(directory, values, graphs=["decode_step"])
    (directory / "step.weights").unlink()
    with pytest.raises(UserError, match="step.weights: missing"):
        manifest.check_files(directory, values, graphs=[])
