"""`python -m pdae_fast.export onnx`: what it writes, and what a mistake prints."""

import collections
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from flavours import BASE, FLAVOURS, GOOGLE, PREDICTIONS
from golden_rule import fill
from helpers import TINY_FULL, images, tiny_pdae, tiny_prior
from pdae_fast import DiffAE, Pipeline, UNetConfig, UserError, cli
from pdae_fast.config import DiffAEConfig
from pdae_fast.export import manifest as manifests

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from pdae_fast.export import __main__ as command  # noqa: E402
from pdae_fast.export import _parity  # noqa: E402
from pdae_fast.export.onnx import ExportSettings, export_onnx  # noqa: E402
from pdae_fast.export.runtime import Session  # noqa: E402


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pdae(TINY_FULL).save_pretrained(path)
    return path


def run(*argv):
    return cli.run(command.main, [str(a) for a in argv])


def operators(path):
    return collections.Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_the_command_writes_a_checked_export(tmp_path, model_dir, capsys):
    out = tmp_path / "out"
    assert run("onnx", "--model", model_dir, "--out", out, "--steps", 1000, "--encode-steps", 3, "--opset", 22,
               "--max-batch", 2, "--prior") == 0  # fmt: skip
    values = manifests.read(out)
    manifests.check_files(out, values)
    # 1000 steps asked for are 999: rounding merges two time points.
    assert values["steps"] == 999 and values["encode_steps"] == 3 and values["max_batch"] == 2
    assert values["schedule"]["decode_times"] == list(range(999, -1, -1))
    assert values["schedule"]["invert_times"] == [0, 333, 666, 999]
    assert values["opset"] == 22 and values["dtype"] == "float32" and values["kind"] == "prior"
    assert values["model"] == {
        "name": "tiny", "file": "model.safetensors", **manifests.file_entry(model_dir / "model.safetensors")
    }  # fmt: skip
    assert {"torch", "onnx", "onnxscript", "onnxruntime", "pdae_fast", "python"} <= values["versions"].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    printed = capsys.readouterr().out
    assert "decode_step.onnx" in printed and "opset 22" in printed and "error" in printed


@pytest.mark.parametrize(
    ("changes", "settings", "label"),
    [
        (GOOGLE, {}, None),
        (FLAVOURS["improved"], PREDICTIONS["v"], None),
        ({**FLAVOURS["course"], "num_classes": 4}, {}, 2),
    ],
    ids=["google", "improved-v", "course-classes"],
)
def test_flavours_are_compared_with_their_modules(tmp_path, changes, settings, label):
    config = dataclasses.replace(TINY_FULL, unet=UNetConfig(**{**BASE, **changes}), **settings)
    manifest = export_onnx(tiny_pdae(config), tmp_path / "out", ExportSettings(steps=4, label=label))
    assert manifest["label"] == label
    for name in ("conditioning", "decode_step", "invert_step"):
        assert manifest["parity"][name]["relative_error"] < 1e-4
    for wrong in (None, 4) if label is not None else (1,):
        with pytest.raises(UserError, match="class-conditional"):
            export_onnx(tiny_pdae(config), tmp_path / "other", ExportSettings(steps=4, label=wrong))
    assert not (tmp_path / "other").exists()


def test_a_diffae_is_compared_with_its_modules(tmp_path):
    config = DiffAEConfig(
        image_size=32, latent_dim=16, encoder_multiplier=(1, 1, 2), unet=UNetConfig(**BASE), schedule=TINY_FULL.schedule
    )
    model, out = fill(DiffAE(config)), tmp_path / "out"
    manifest = export_onnx(model, out, ExportSettings(steps=3, single_file=True, verify=True))
    assert manifest["kind"] == "diffae" and set(manifest["graphs"]) == {*manifests.GRAPHS["pdae"], "reconstruct"}
    for name in ("encoder", "conditioning", "decode_step", "invert_step"):
        assert manifest["parity"][name]["relative_error"] < 1e-4
    session, x0 = Session(out), images(2, config)
    z = session.encode(x0.numpy())
    assert np.allclose(z, model.encode(x0).detach().numpy(), atol=1e-5)
    pipe = Pipeline(model, "published", steps=3, device="cpu", dtype="float32")
    x_T = pipe.invert(x0, torch.from_numpy(z)).numpy()
    assert np.abs(session.decode(z, x_T) - pipe.decode(torch.from_numpy(z), torch.from_numpy(x_T)).numpy()).max() < 1e-3
    # z is read by every block.
    assert np.abs(session.decode(z[::-1].copy(), x_T) - session.decode(z, x_T)).max() > 1e-2


def test_every_graph_was_compared(exported):
    values = manifests.read(exported)
    for name in (*manifests.GRAPHS["pdae"], "reconstruct", "all_steps"):
        errors = values["parity"][name]
        assert 0 < errors["relative_error"] <= errors["bound"] < 1e-2 and errors["max_abs_error"] > 0
    assert set(values["graphs"]) == {*manifests.GRAPHS["pdae"], "reconstruct"}


@pytest.mark.parametrize("fixture", ["exported", "exported_half", "exported_bfloat16", "exported_prior"])
def test_graphs_are_plain_onnx_with_the_signature_of_the_manifest(request, fixture):
    out = request.getfixturevalue(fixture)
    values = manifests.read(out)
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
    for entry in values["graphs"].values():
        onnx.checker.check_model(str(out / entry["file"]), full_check=True)
        model = onnx.load(out / entry["file"], load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", values["opset"])]
        assert not model.functions and all(node.domain == "" for node in model.graph.node)
        for listed, found in ((entry["inputs"], model.graph.input), (entry["outputs"], model.graph.output)):
            described = [
                {
                    "name": v.name,
                    "dtype": names[v.type.tensor_type.elem_type],
                    "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
                }
                for v in found
            ]
            assert described == listed


def test_one_node_for_a_group_norm(exported, exported_half, tiny):
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in tiny.decoder.modules())
    group, instance = operators(exported / "decode_step.onnx"), operators(exported_half / "decode_step.onnx")
    assert group["GroupNormalization"] == norms and "InstanceNormalization" not in group
    # Both decoders begin with a norm of the same map; without an affine of its own it is computed once.
    assert instance["InstanceNormalization"] == norms - 1 and "GroupNormalization" not in instance
    # Time embedding and projections of z are gone: what is left of products is attention, two a block.
    attention = sum(type(m).__name__ == "AttentionBlock" for m in tiny.decoder.modules())
    assert group["MatMul"] == 2 * attention and group["Gemm"] == group["Sin"] == group["Cos"] == 0


@pytest.mark.parametrize("fixture", ["exported_half", "exported_bfloat16"])
def test_norms_and_softmax_are_float32_in_half_exports(request, fixture):
    out = request.getfixturevalue(fixture)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(out / "decode_step.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.output]}
    types |= {t.name: t.data_type for t in inferred.graph.initializer}
    half = {"exported_half": onnx.TensorProto.FLOAT16, "exported_bfloat16": onnx.TensorProto.BFLOAT16}[fixture]
    seen = collections.Counter()
    for node in inferred.graph.node:
        kind = node.op_type
        if kind in ("GroupNormalization", "InstanceNormalization", "Softmax", "Sigmoid", "Clip"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
            seen[kind] += 1
        if kind in ("Conv", "MatMul"):
            assert types[node.output[0]] == half, node.name
            seen[kind] += 1
    assert seen["Conv"] > 10 and seen["Softmax"] == 2 and seen["Sigmoid"] > 10 and seen["Clip"] == 1


def test_weights_are_written_once_and_only_once(exported, tiny):
    parameters = sum(p.numel() for p in tiny.decoder.parameters()) * 4
    shared = (exported / "step.weights").stat().st_size
    both = sum((exported / f"{name}.onnx").stat().st_size for name in ("decode_step", "invert_step"))
    assert 0.6 * parameters < shared < 1.2 * parameters
    assert both < 0.5 * shared
    # The loops of the single file share them too.
    assert (exported / "reconstruct.onnx").stat().st_size < 1.5 * parameters


def test_nothing_of_this_machine_is_in_the_files(exported):
    for path in exported.iterdir():
        data = path.read_bytes()
        for words in (b"site-packages", b"graphs.py", str(exported.parent).encode(), b"stack_trace"):
            assert words not in data, f"{words} in {path.name}"


def test_bfloat16_says_how_it_was_checked(exported_bfloat16):
    values = manifests.read(exported_bfloat16)
    assert values["opset"] == 22 and "no bfloat16 convolution" in values["parity"]["note"]
    assert 1e-4 < values["parity"]["decode_step"]["relative_error"] < 0.1
    assert values["parity"]["conditioning"]["relative_error"] < 1e-5


def test_the_widened_copy_still_rounds(tmp_path):
    """What stands in for bfloat16 must not quietly compute in float32."""
    import onnxruntime

    from pdae_fast.export._tracing import widened

    helper, T = onnx.helper, onnx.TensorProto
    weight = helper.make_tensor("w", T.BFLOAT16, [1], [1.2345678])
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=T.BFLOAT16),
        helper.make_node("Mul", ["narrow", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=T.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", T.FLOAT, [1])], [value("y", T.FLOAT, [1])], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(
        widened(tmp_path / "m.onnx").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.array([1.001], np.float32)})
    rounded = torch.tensor([1.001]).bfloat16().float() * torch.tensor([1.2345678]).bfloat16().float()
    assert found[0] == rounded.item() != np.float32(1.001) * np.float32(1.2345678)


def test_too_large_an_error_leaves_nothing(tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setitem(_parity.BOUNDS, "float32", 1e-12)
    out = tmp_path / "out"
    assert run("onnx", "--model", model_dir, "--out", out, "--steps", 2, "--prior", "--quiet") == 2
    error = capsys.readouterr().err
    assert "differs from the model by" in error and "nothing was written" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_is_caught(tmp_path, monkeypatch):
    """A mistake of half a per cent in one decoder, as a wrong rewrite would make."""
    from pdae_fast.export import onnx as module

    build = module.build_graphs

    def slightly_wrong(*arguments):
        graphs = build(*arguments)
        graphs["invert_step"].networks.eps.head.weight.mul_(1.005)
        return graphs

    monkeypatch.setattr(module, "build_graphs", slightly_wrong)
    with pytest.raises(UserError, match="_step differs from the model by"):
        export_onnx(tiny_prior(), tmp_path / "out", ExportSettings(2))
    assert list(tmp_path.iterdir()) == []


def test_nan_is_no_parity():
    worst = _parity._Worst(1.0)
    worst.add(np.array([np.nan]), torch.ones(1))
    with pytest.raises(UserError, match="differs from the model by inf"):
        _parity.refuse({"graph": worst.report()})


MISTAKES = [
    (["--opset", "18"], "opset 18 cannot be exported in float32; expected 21, 22, 23"),
    (["--opset", "21", "--dtype", "bfloat16"], "opset 21 cannot be exported in bfloat16; expected 22, 23"),
    (["--dtype", "int8"], "dtype 'int8' cannot be exported; expected float32"),
    (["--norm", "batch"], "norm 'batch' is not known; expected group or instance"),
    (["--max-batch", "0"], "max batch must be at least 1"),
    (["--steps", "0"], "steps must be between 1 and 1000, not 0"),
    (["--encode-steps", "1001"], "steps must be between 1 and 1000, not 1001"),
    (["--model", "nothing-here"], "neither a bundled model"),
    (["--out", "{taken}"], "not empty and not an earlier export"),
    (["--out", "{file}"], "a file; expected a directory"),
    (["--nonsense"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_print_one_line_and_exit_2(tmp_path, model_dir, capsys, arguments, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    places = {"taken": tmp_path / "taken", "file": tmp_path / "taken" / "file"}
    given = [a.format(**places) for a in arguments]
    try:
        status = run("onnx", "--model", model_dir, "--out", tmp_path / "out", *given)
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_onnx_missing(tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run("onnx", "--model", model_dir, "--out", tmp_path / "out") == 2
    assert "onnxscript cannot be imported" in (error := capsys.readouterr().err) and "pip install" in error


@pytest.mark.parametrize("arguments", [[], ["opera"], ["--steps"]], ids=str)
def test_the_dispatcher_names_its_commands(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and "expected onnx, tensorrt, serving" in capsys.readouterr().err


def test_the_dispatcher_helps_without_loading_anything():
    code = (
        "import sys; sys.argv = ['export', '--help']; from pdae_fast.export.__main__ import main; main();"
        "assert not {'torch', 'onnx', 'tensorrt'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "onnx" in done.stdout, done.stderr


def test_an_earlier_export_is_replaced(tmp_path, exported_prior):
    out = tmp_path / "out"
    out.mkdir()
    values = json.loads((exported_prior / "manifest.json").read_text())
    for path in exported_prior.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    export_onnx(tiny_prior(), out, ExportSettings(2, max_batch=1))
    again = manifests.read(out)
    manifests.check_files(out, again)
    assert again["steps"] == 2 != values["steps"] and [p.name for p in tmp_path.iterdir()] == ["out"]
    # The same weights make the same file, whatever else differs.
    assert again["files"] == values["files"]


def test_a_model_in_training_or_half_precision_is_exported_as_its_reference(tmp_path):
    model = tiny_prior().train().half()
    values = export_onnx(model, tmp_path / "out", ExportSettings(2, max_batch=1))
    assert values["parity"]["decode_step"]["relative_error"] < 1e-4
    # The caller's model is not touched.
    assert model.training and next(model.parameters()).dtype == torch.float16
