"""The model repository: its configurations, and what its pipelines and client compute, on a server in one process."""

import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import fake_triton
import hostile
from pdae_fast import UserError, cli
from pdae_fast.export import manifest as manifests
from pdae_fast.export.__main__ import main
from pdae_fast.export.backends.backend import Backend
from pdae_fast.export.runtime import Session, load_backend
from pdae_fast.export.serving import client as serving_client
from pdae_fast.export.serving.pbtxt import Word, dumps
from toy_export import IMAGE, STEPS, write_toy

pytest.importorskip("onnxruntime")
GRAPHS = ("encoder", "conditioning", "decode_step", "invert_step")
PIPELINES = ("reconstruct", "invert", "decode")


@pytest.fixture(scope="module")
def onnx_dir(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("export") / "onnx")


@pytest.fixture(scope="module")
def written(onnx_dir):
    out = onnx_dir.parent / "serving"
    assert serve("--onnx", onnx_dir, "--out", out, "--quiet") == 0
    return out


class Plain(Backend):
    """ONNX Runtime with the protocol's own loop: one call a step."""

    def __init__(self, directory):
        inner = load_backend(directory, manifests.read(directory), provider="cpu")
        self.name, self.provider, self.run = inner.name, inner.provider, inner.run


@pytest.fixture(scope="module")
def session(onnx_dir):
    session = Session(onnx_dir, provider="cpu")
    session.backend = Plain(onnx_dir)
    return session


def serve(*argv):
    return cli.run(main, ["serving", *map(str, argv)])


def one_line(capsys):
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text, text
    return text


def images(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *IMAGE)).astype(np.float32)


def schema():
    """The server's own protobuf schema, from the one file of tritonclient that needs nothing but protobuf."""
    pytest.importorskip("google.protobuf", reason='needs pip install "pdae_fast[serving]"')
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip('needs pip install "pdae_fast[serving]"')
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(message):
    """A parsed protobuf in the form of `fake_triton.parse`."""
    from google.protobuf.json_format import MessageToDict

    found = MessageToDict(message, preserving_proto_field_name=True)
    for name in ("parameters", "cc_model_filenames"):
        if name in found:
            found[name] = [{"key": key, "value": value} for key, value in found[name].items()]
    return json.loads(json.dumps(found), parse_int=int)


def numbers_as_text(value):
    """int64 fields are text in protobuf's JSON form."""
    if isinstance(value, dict):
        return {k: numbers_as_text(v) for k, v in value.items() if not (k == "max_batch_size" and v == 0)}
    if isinstance(value, list):
        return [numbers_as_text(v) for v in value]
    return str(value)


def test_every_configuration_fits_the_schema_of_the_server(written):
    from google.protobuf import text_format

    module = schema()
    folders = sorted((written / "models").iterdir())
    assert [folder.name for folder in folders] == sorted(f"pdae_{name}" for name in (*GRAPHS, *PIPELINES))
    for folder in folders:
        text = (folder / "config.pbtxt").read_text()
        parsed = text_format.Parse(text, module.ModelConfig())
        in_order = {"parameters": lambda e: e["key"], "cc_model_filenames": lambda e: e["key"]}
        ours, theirs = fake_triton.parse(text), plain(parsed)
        for name, key in in_order.items():
            for side in (ours, theirs):
                if name in side:
                    side[name].sort(key=key)
        assert numbers_as_text(ours) == numbers_as_text(theirs), "both parsers read the same"


def test_the_schema_and_the_strict_parser_refuse_what_is_wrong():
    from google.protobuf import text_format

    module = schema()
    for text in ('nam: "x"', "max_batch_size: many", 'name: "x', "input { dims: [ 1 }", 'name: "a" name: "b" }'):
        with pytest.raises((text_format.ParseError, ValueError)):
            text_format.Parse(text, module.ModelConfig())
    for text in ("max_batch_size", 'name: "x', "input { dims: [ 1 }", 'name: "a" name: "b"', "name: }", "= 1"):
        with pytest.raises((ValueError, IndexError)):
            fake_triton.parse(text)


def test_text_form():
    text = dumps(
        {"name": 'a"b\\', "flag": True, "kind": Word("KIND_GPU"), "empty": {}, "list": [1, -1], "map{}": {"k": "v"}}
    )
    assert text.splitlines() == [
        'name: "a\\"b\\\\"', "flag: true", "kind: KIND_GPU", "empty { }", "list: [ 1, -1 ]", "map {", '  key: "k"',
        '  value: "v"', "}",
    ]  # fmt: skip
    with pytest.raises(TypeError):
        dumps({"name": 1.5})


def test_requests_at_different_steps_are_never_merged(written):
    """The server merges along the first dimension of every input, which the step number does not have."""
    configs = fake_triton.Server(written / "models").configs
    for name in ("encoder", "conditioning", *PIPELINES):
        assert configs[f"pdae_{name}"]["max_batch_size"] == 4 and "dynamic_batching" in configs[f"pdae_{name}"]
    for name in ("decode_step", "invert_step"):
        config = configs[f"pdae_{name}"]
        assert config["max_batch_size"] == 0 and "dynamic_batching" not in config
        assert {t["name"]: t["dims"] for t in config["input"]}["step"] == [1]
        assert {t["name"]: t["dims"] for t in config["input"]}["x"] == [-1, *IMAGE]


@pytest.mark.parametrize("on_gpu", [False, True], ids=["host", "gpu"])
def test_pipelines_compute_what_the_runtime_computes(written, session, monkeypatch, on_gpu):
    server = fake_triton.Server(written / "models", on_gpu=on_gpu)
    x0 = images(3)
    z = session.encode(x0)
    x_T = session.invert(x0, z)

    (found,) = server.call(server.pipeline("pdae_reconstruct", monkeypatch), "pdae_reconstruct", {"x0": x0})
    np.testing.assert_array_equal(found["x"], session.reconstruct(x0))
    steps = [(f"pdae_{g}", i) for g in ("invert_step", "decode_step") for i in range(STEPS[g])]
    assert [entry for entry in server.log if entry[1] is not None] == steps
    assert sum(name == "pdae_encoder" for name, _ in server.log) == 1

    (found,) = server.call(server.pipeline("pdae_invert", monkeypatch), "pdae_invert", {"x0": x0})
    np.testing.assert_array_equal(found["z"], z)
    np.testing.assert_array_equal(found["x_T"], x_T)
    model = server.pipeline("pdae_decode", monkeypatch)
    (found,) = server.call(model, "pdae_decode", {"x_T": x_T, "z": z})
    np.testing.assert_array_equal(found["x"], session.decode(z, x_T))


def test_merged_requests_run_one_loop_and_each_gets_its_rows(written, session, monkeypatch):
    server = fake_triton.Server(written / "models")
    model = server.pipeline("pdae_reconstruct", monkeypatch)
    first, second, third = images(1, 1), images(2, 2), images(1, 3)
    found = server.call(model, "pdae_reconstruct", {"x0": first}, {"x0": second}, {"x0": third})
    for response, x0 in zip(found, (first, second, third), strict=True):
        assert response["x"].shape == x0.shape
        np.testing.assert_allclose(response["x"], session.reconstruct(x0), atol=1e-6)
    assert sum(step is not None for _, step in server.log) == sum(STEPS.values()), "one loop for all three"


def test_an_error_inside_reaches_every_merged_request(written, monkeypatch):
    server = fake_triton.Server(written / "models")
    model = server.pipeline("pdae_reconstruct", monkeypatch)
    del server.configs["pdae_invert_step"]
    found = server.call(model, "pdae_reconstruct", {"x0": images(1)}, {"x0": images(2)})
    assert found == ["reconstruct: invert_step: no model pdae_invert_step"] * 2


def test_prior_alone(tmp_path, monkeypatch):
    source, out = write_toy(tmp_path / "onnx", kind="prior"), tmp_path / "serving"
    assert serve("--onnx", source, "--out", out, "--name", "prior.v2", "--device", "cpu", "--quiet") == 0
    server = fake_triton.Server(out / "models")
    assert server.configs["prior.v2_decode_step"]["instance_group"] == [{"kind": "KIND_CPU", "count": 1}]
    assert [t["name"] for t in server.configs["prior.v2_decode"]["input"]] == ["x_T"]
    session = Session(source, provider="cpu")
    session.backend = Plain(source)
    x0 = images(2)
    for task, given, name, expected in (
        ("reconstruct", {"x0": x0}, "x", session.reconstruct(x0)),
        ("invert", {"x0": x0}, "x_T", session.invert(x0)),
        ("decode", {"x_T": x0}, "x", session.decode(x_T=x0)),
    ):
        (found,) = server.call(server.pipeline(f"prior.v2_{task}", monkeypatch), f"prior.v2_{task}", given)
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize("fixture", ["exported", "exported_diffae"])
def test_what_the_exporter_writes_is_served(tmp_path, request, fixture, x0, monkeypatch):
    exported, out = request.getfixturevalue(fixture), tmp_path / "serving"
    assert serve("--onnx", exported, "--out", out, "--quiet") == 0
    assert (out / "models/pdae_decode_step/1/step.weights").is_file(), "weights that both steps share"
    server = fake_triton.Server(out / "models")
    limit = manifests.read(exported)["max_batch"]
    (found,) = server.call(server.pipeline("pdae_reconstruct", monkeypatch), "pdae_reconstruct", {"x0": x0[:limit]})
    session = Session(exported, provider="cpu")
    z = session.encode(x0[:limit])
    np.testing.assert_allclose(found["x"], session.reconstruct(x0[:limit]), atol=1e-5)
    given = {"x_T": session.invert(x0[:limit], z), "z": z[::-1].copy()}
    (edited,) = server.call(server.pipeline("pdae_decode", monkeypatch), "pdae_decode", given)
    np.testing.assert_allclose(edited["x"], session.decode(given["z"], given["x_T"]), atol=1e-5)
    assert np.abs(edited["x"] - found["x"]).max() > 1e-3, "z is read"


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.fixture
def http(written, monkeypatch):
    """tritonclient.http with the server behind it."""
    server = fake_triton.Server(written / "models")

    class Input:
        def __init__(self, name, shape, kind):
            self.name, self.shape, self.kind = name, shape, kind

        def set_data_from_numpy(self, array):
            assert list(array.shape) == self.shape and {"FP32": "float32", "INT64": "int64"}[self.kind] == array.dtype
            self.array = array

    class Connection:
        def __init__(self, url):
            self.url = url

        def get_model_config(self, name):
            config = dict(server.configs[name])
            config["parameters"] = {entry["key"]: entry["value"] for entry in config["parameters"]}
            return config

        def infer(self, name, inputs, outputs):
            tensors = {t.name: t.array for t in inputs}
            refusal = server.check(name, tensors)
            assert refusal is None, refusal
            if name in server.sessions:
                results = server.compute(name, tensors)
            else:
                (results,) = server.call(server.pipeline(name, monkeypatch), name, tensors)
            return types.SimpleNamespace(as_numpy=lambda n: results[n] if n in outputs else None)

    module = types.ModuleType("tritonclient.http")
    module.InferenceServerClient, module.InferInput, module.InferRequestedOutput = Connection, Input, str
    package = types.ModuleType("tritonclient")
    package.http = module
    monkeypatch.setitem(sys.modules, "tritonclient", package)
    monkeypatch.setitem(sys.modules, "tritonclient.http", module)
    return server


def test_client_by_pipelines_and_by_steps(http, session):
    client = serving_client.Client()
    x0 = images(2)
    z = client.encode(x0)
    np.testing.assert_array_equal(z, session.encode(x0))
    latents = client.invert(x0)
    np.testing.assert_array_equal(latents["z"], z)
    np.testing.assert_array_equal(client.decode(**latents), session.reconstruct(x0))
    np.testing.assert_array_equal(client.reconstruct(x0), session.reconstruct(x0))
    np.testing.assert_array_equal(client.reconstruct_by_steps(x0), session.reconstruct(x0))


@pytest.mark.parametrize("more", [(), ("--loop",)])
def test_client_as_a_command_splits_what_is_too_much(tmp_path, written, http, session, more):
    x0 = images(5)  # the server takes 4
    np.save(tmp_path / "x0.npy", x0)
    spec = importlib.util.spec_from_file_location("client", written / "client.py")
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    client.main(["reconstruct", str(tmp_path / "x0.npy"), str(tmp_path / "x.npy"), *more])
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), session.reconstruct(x0), atol=1e-6)


# -- engines, files, mistakes ------------------------------------------------------------------------------------------


def engines(directory, onnx_dir, *capabilities, **changed):
    """A directory as `export tensorrt` writes it; its "engines" are the ONNX files."""
    directory.mkdir()
    onnx = manifests.read(onnx_dir)
    made = {}
    for capability in capabilities:
        made[capability] = {}
        for name, entry in onnx["graphs"].items():
            path = directory / f"{name}.sm{capability.replace('.', '')}.engine"
            path.write_bytes((onnx_dir / entry["file"]).read_bytes())
            made[capability][name] = {"file": path.name, **manifests.file_entry(path)}
    first = made[capabilities[0]]
    content = {
        **{k: v for k, v in onnx.items() if k != "format"},
        "backend": "tensorrt",
        "tensorrt_version": "11.4.0",
        "max_batch": 3,
        "profile": [1, 2, 3],
        "tf32": False,
        "onnx": {"graphs": {name: entry["sha256"] for name, entry in onnx["graphs"].items()}, "files": {}},
        "graphs": {name: {**entry, **first[name]} for name, entry in onnx["graphs"].items()},
        "engines": made,
    }
    manifests.write(directory, {**content, **changed})
    return directory


def test_engines_of_several_gpus_in_one_repository(tmp_path, onnx_dir, session, monkeypatch, capsys):
    first = engines(tmp_path / "a", onnx_dir, "8.9", "9.0")
    second = engines(tmp_path / "b", onnx_dir, "12.0")
    out = tmp_path / "serving"
    assert serve("--onnx", onnx_dir, "--engine", first, "--engine", second, "--out", out) == 0
    assert "a server with TensorRT 11.4.0" in capsys.readouterr().out
    for capability in ("8.9", "9.0", "12.0"):
        server = fake_triton.Server(out / "models", capability)
        config = server.configs["pdae_decode_step"]
        assert config["backend"] == "tensorrt" and len(config["cc_model_filenames"]) == 3
        assert server.configs["pdae_encoder"]["max_batch_size"] == 3, "the engines' profile is the narrower one"
        model = server.pipeline("pdae_reconstruct", monkeypatch)
        x0 = images(2)
        (found,) = server.call(model, "pdae_reconstruct", {"x0": x0})
        np.testing.assert_array_equal(found["x"], session.reconstruct(x0))
    assert sorted(p.name for p in (out / "models" / "pdae_encoder" / "1").iterdir()) == [
        "model.sm120.plan", "model.sm89.plan", "model.sm90.plan",
    ]  # fmt: skip
    assert json.loads((out / "serving.json").read_text())["tensorrt_version"] == "11.4.0"


def test_shared_weights_travel_with_the_graphs_that_refer_to_them(tmp_path):
    onnx = pytest.importorskip("onnx")
    source = write_toy(tmp_path / "onnx")
    content = json.loads((source / "manifest.json").read_text())
    path = source / "decode_step.onnx"
    model = onnx.load(path)
    for weight in model.graph.initializer:  # only raw bytes can move out
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path, save_as_external_data=True, location="step.weights", size_threshold=100)
    content["graphs"]["decode_step"].update(manifests.file_entry(path))
    content["files"]["step.weights"] = manifests.file_entry(source / "step.weights")
    manifests.write(source, content)
    out = tmp_path / "serving"
    assert serve("--onnx", source, "--out", out, "--quiet") == 0
    assert (out / "models/pdae_decode_step/1/step.weights").is_file()
    assert (source / "step.weights").stat().st_size > 100
    for other in ("encoder", "invert_step"):
        assert not (out / f"models/pdae_{other}/1/step.weights").exists()
    fake_triton.Server(out / "models")


def test_index_lists_every_file_and_a_repository_is_replaced_whole(tmp_path, onnx_dir, capsys):
    out = tmp_path / "serving"
    assert serve("--onnx", onnx_dir, "--out", out, "--name", "first", "--quiet") == 0
    assert serve("--onnx", onnx_dir, "--out", out, "--name", "second", "--queue-delay", 0, "--pipelines", 3) == 0
    assert "second_reconstruct" in capsys.readouterr().out
    index = json.loads((out / "serving.json").read_text())
    present = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"serving.json"}
    assert set(index["files"]) == present and not any("first" in name for name in present)
    for name, entry in index["files"].items():
        assert manifests.file_entry(out / name) == entry
    config = fake_triton.Server(out / "models").configs["second_decode"]
    assert config["instance_group"] == [{"kind": "KIND_CPU", "count": 3}]
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 0}


@pytest.mark.parametrize(
    "options, match",
    [
        (["--name", "a/b"], "name 'a/b'; expected letters"),
        (["--instances", "0"], "--instances 0; expected at least 1"),
        (["--pipelines", "-1"], "--pipelines -1; expected at least 1"),
        (["--queue-delay", "-5"], "--queue-delay -5; expected microseconds"),
        (["--engine", "nowhere"], "nowhere: no such directory"),
        (["--engine", "nowhere", "--device", "cpu"], "TensorRT engines run on a GPU only"),
    ],
)
def test_bad_options_are_one_line(tmp_path, onnx_dir, capsys, options, match):
    out = tmp_path / "serving"
    assert serve("--onnx", onnx_dir, "--out", out, *options) == 2
    assert match in one_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"backend": "tensorrt-rtx"}, "engines of TensorRT for RTX, which the server's TensorRT backend does not load"),
        ({"onnx": {"graphs": {}, "files": {}}}, "built from other ONNX graphs than those given"),
        ({"profile": [2, 2, 3]}, r"profile \[2, 2, 3\]; a server gets single images, so build with MIN 1"),
        ({"engines": {}}, "lists no engines"),
        ({"engines": {"8.9": {}}}, "no engine for encoder on 8.9"),
    ],
    ids=["rtx", "other-graphs", "minimum", "none", "incomplete"],
)
def test_engines_that_cannot_be_served_are_one_line(tmp_path, onnx_dir, capsys, changed, match):
    made, out = engines(tmp_path / "engines", onnx_dir, "8.9", **changed), tmp_path / "serving"
    assert serve("--onnx", onnx_dir, "--engine", made, "--out", out) == 2
    assert re.search(match, one_line(capsys))
    assert not out.exists()


def test_other_mistakes_are_one_line(tmp_path, onnx_dir, capsys):
    out = tmp_path / "serving"
    first, second = engines(tmp_path / "a", onnx_dir, "8.9"), engines(tmp_path / "b", onnx_dir, "8.9")
    assert serve("--onnx", onnx_dir, "--engine", first, "--engine", second, "--out", out) == 2
    assert "a second set of engines for compute capability 8.9" in one_line(capsys)
    third = engines(tmp_path / "c", onnx_dir, "9.0", tensorrt_version="11.5.0")
    assert serve("--onnx", onnx_dir, "--engine", first, "--engine", third, "--out", out) == 2
    assert "engines of TensorRT 11.4.0 and 11.5.0; a server has one version" in one_line(capsys)
    (first / "encoder.sm89.engine").write_bytes(b"")
    assert serve("--onnx", onnx_dir, "--engine", first, "--out", out) == 2
    assert "encoder.sm89.engine: 0 bytes, but manifest.json says" in one_line(capsys)
    source = write_toy(tmp_path / "bfloat16", "bfloat16")
    assert serve("--onnx", source, "--out", out, "--device", "cpu") == 2
    assert "no bfloat16 convolution on the CPU" in one_line(capsys)
    (source / "manifest.json").unlink()
    assert serve("--onnx", source, "--out", out) == 2
    assert "half-finished export" in one_line(capsys)
    assert not out.exists()
    out.mkdir()
    (out / "photo.png").touch()
    assert serve("--onnx", onnx_dir, "--out", out) == 2
    assert "not empty and not an earlier export" in one_line(capsys)
    assert [path.name for path in out.iterdir()] == ["photo.png"]


@hostile.quick(60)
@hypothesis.given(data=st.data())
def test_any_signed_manifest_is_run_and_served_or_one_line(tmp_path, onnx_dir, data):
    """What a reader believes is only what it has checked: with the right digest anything may stand in a manifest."""
    source, made = tmp_path / "onnx", tmp_path / "made"
    if not source.exists():
        shutil.copytree(onnx_dir, source)
        engines(made, onnx_dir, "8.9")
    for directory, original in ((source, onnx_dir / "manifest.json"), (made, tmp_path / "whole.json")):
        if not original.exists():
            shutil.copy(made / "manifest.json", original)
        content = data.draw(hostile.mutated(json.loads(original.read_text())))
        if isinstance(content, dict):
            content["manifest_sha256"] = manifests._own_digest(content)
        (directory / "manifest.json").write_text(json.dumps(content))
    out = tmp_path / "serving"
    x0 = images(2)
    for job in (
        lambda: Session(source, provider="cpu").reconstruct(x0),
        lambda: main(["serving", "--onnx", str(onnx_dir), "--engine", str(made), "--out", str(out), "--quiet"]),
        lambda: main(["serving", "--onnx", str(source), "--out", str(out), "--quiet"]),
    ):
        try:
            job()
        except UserError as error:
            assert len(str(error)) < 600
