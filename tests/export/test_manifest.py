"""manifest.json: what a reader refuses, and why."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostile
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


def sign(directory, values):
    """Write ``values``, whatever they are, with the digest that a reader asks for."""
    if isinstance(values, dict):
        values = {**values, manifest.DIGEST: manifest._own_digest(values)}
    (directory / manifest.NAME).write_text(json.dumps(values))


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


SIGNED = [
    (lambda m: m.update(steps=10**9), "steps is 1000000000; expected at most 100000"),
    (lambda m: m.update(encode_steps=-1), "encode_steps is -1; expected at least 1"),
    (lambda m: m.update(max_batch=2**40), "max_batch is 1099511627776; expected at most"),
    (lambda m: m.update(dtype="float8"), "dtype 'float8'; expected float32"),
    (lambda m: m.update(dtype=["float32"]), r"dtype is \['float32'\], which no export writes"),
    (lambda m: m.update(backend=["onnxruntime"]), "backend is"),
    (lambda m: m.update(noise=["normal"]), "noise is"),
    (lambda m: m.update(image_shape=[2**16] * 3), "image_shape is"),
    (lambda m: m.update(image_shape=[1, True, 8]), "image_shape is"),
    (lambda m: m.update(latent_dim=None), "latent_dim is None; expected 1 to 65536"),
    (lambda m: m.update(latent_dim=2**40), "latent_dim is 1099511627776; expected 1 to"),
    (lambda m: m.update(kind="prior"), "latent_dim is 4; expected null of a prior"),
    (lambda m: m.update(schedule={"decode_times": [0, 1]}), "decode_times are not as many"),
    (lambda m: m.update(schedule=[1]), r"schedule is \[1\]"),
    (lambda m: m.update(versions="1"), "versions is '1'"),
    (lambda m: m.update(profile=[3, 2]), "profile is"),
    (lambda m: m.update(engines={"../x": {}}), "the engines of '../x'"),
    (lambda m: m.update(engines={"8.9": []}), "the engines of '8.9'"),
    (lambda m: m.update(onnx={"graphs": 3}), "'graphs' of onnx is 3"),
    (lambda m: m.update(x=json.loads("[" * 40 + "]" * 40)), "nested deeper than 32"),
    (lambda m: m.update(steps=float("nan")), "steps is nan, which no export writes"),
    (lambda m: m["graphs"]["encoder"].update(file=".."), "'encoder' names no file"),
    (lambda m: m["graphs"]["encoder"].update(file="a\0"), "'encoder' names no file"),
    (lambda m: m["graphs"]["encoder"].update(sha256=1), "'encoder' names no file"),
    (lambda m: m["graphs"]["encoder"].update(bytes="9"), "'encoder' names no file"),
    (lambda m: m["graphs"]["encoder"].update(inputs="x0"), "or no inputs and outputs"),
    (lambda m: m["graphs"]["encoder"]["inputs"][0].update(shape=["N", 2**40]), "or no inputs and outputs"),
    (lambda m: m["graphs"]["encoder"]["inputs"][0].update(dtype="object"), "or no inputs and outputs"),
    (lambda m: m["files"].update({"../x": {"file": "x", **m["files"]["step.weights"]}}), "'../x' names no file"),
]


@pytest.mark.parametrize(("change", "words"), SIGNED, ids=[words for _, words in SIGNED])
def test_a_signed_manifest_of_absurd_values_is_refused(directory, change, words):
    values = json.loads((directory / manifest.NAME).read_text())
    change(values)
    sign(directory, values)
    with pytest.raises(UserError, match=words) as error:
        manifest.read(directory)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_graphs_of_other_sizes_than_the_manifest_says_are_refused(directory):
    edit(directory, lambda m: m.update(latent_dim=5))
    values = json.loads((directory / manifest.NAME).read_text())
    sign(directory, values)
    with pytest.raises(UserError, match="the inputs and outputs of encoder are not those of a pdae"):
        manifest.check_signatures(directory, manifest.read(directory))


def toy_manifest():
    entry = {"sha256": "0" * 64, "bytes": 3}
    graphs = {
        name: {"file": f"{name}.onnx", **entry, "inputs": inputs, "outputs": outputs, "external": []}
        for name in manifest.GRAPHS["pdae"]
        for inputs, outputs in [json.loads(json.dumps(manifest.signature(name, (1, 8, 8), 4, 6)))]
    }
    return {
        "format": manifest.FORMAT, "backend": "tensorrt", "kind": "pdae", "image_shape": [1, 8, 8], "latent_dim": 4,
        "conditioning_width": 6, "dtype": "float32", "steps": 3, "encode_steps": 4, "max_batch": 2, "noise": "normal",
        "graphs": graphs, "files": {"step.weights": entry}, "tensorrt_version": "11.0", "profile": [1, 2, 2],
        "engines": {"8.9": {name: {"file": f"{name}.engine", **entry} for name in graphs}}, "tf32": True,
        "versions": {}, "onnx": {"graphs": dict.fromkeys(graphs, "0" * 64), "files": {}},
        "schedule": {"decode_times": [0, 1, 2, 3], "invert_times": [0, 1, 2, 3, 4]},
    }  # fmt: skip


@hostile.quick(500)
@given(st.one_of(hostile.mutated(toy_manifest()), hostile.values))
def test_any_signed_manifest_is_valid_or_one_line(tmp_path, values):
    try:
        sign(tmp_path, values)
    except UnicodeEncodeError:
        return
    try:
        found = manifest.read(tmp_path)
        assert 1 <= found["steps"] <= 10**5 and 1 <= found["max_batch"] <= 2**16
        assert np.prod(found["image_shape"], dtype=float) <= 2**28
        for name in [*found["files"], *(entry["file"] for entry in found["graphs"].values())]:
            assert (tmp_path / name).resolve().parent == tmp_path.resolve()
        manifest.check_signatures(tmp_path, found)
        manifest.check_files(tmp_path, found)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 500
