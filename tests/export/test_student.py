"""A student as an ONNX graph: what it computes, and what its directory says."""

import json

import numpy as np
import pytest
import torch

import student_toy
from helpers import images, tiny_pdae
from pdae_fast import cli

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

from pdae_fast.export import __main__ as command  # noqa: E402
from pdae_fast.export import student as exports  # noqa: E402

HEADS = {
    None: {},
    "classes": {"head": "classes", "labels": ("a", "b", "c")},
    "points": {"head": "points", "labels": ("eye", "nose")},
    "parts": {"head": "parts", "labels": ("sky", "ground")},
}


def run(*argv):
    return cli.run(command.main, [str(a) for a in argv])


@pytest.fixture
def saved(tmp_path):
    def save(head):
        model = student_toy.student(**HEADS[head]).eval()
        with torch.no_grad():  # a norm that is no longer the identity
            for name, value in model.named_parameters():
                if "in_layers.0" in name or name.startswith("head."):
                    value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(tmp_path / "student")
        return model

    return save


@pytest.mark.parametrize("head", HEADS)
def test_the_graph_computes_what_the_student_does(tmp_path, saved, head, capsys):
    model, out = saved(head), tmp_path / "out"
    assert run("onnx", "--model", tmp_path / "student", "--out", out) == 0
    assert "student.onnx, float32, error" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "student.onnx"]
    assert manifest["student"]["head"] == head and manifest["parity"]["relative_error"] < manifest["parity"]["bound"]
    x = images(4)
    session = runtime.InferenceSession(str(out / "student.onnx"))
    found = session.run(None, {"images": x.numpy()})
    expected = model.features(x) if head is None else [model.predict(x)]
    names = [output["name"] for output in manifest["graph"]["outputs"]]
    assert [output.name for output in session.get_outputs()] == names and len(found) == len(expected)
    for a, b, entry in zip(found, expected, manifest["graph"]["outputs"], strict=True):
        assert list(a.shape[1:]) == entry["shape"][1:] and str(a.dtype) == entry["dtype"]
        if head == "parts":
            assert (a == b.numpy()).mean() > 0.999
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path, saved):
    saved("classes")
    out = tmp_path / "out"
    for options in ((), ("--dtype", "float16", "--norm", "instance")):
        assert run("onnx", "--model", tmp_path / "student", "--out", out, *options, "--quiet") == 0
    assert json.loads((out / "manifest.json").read_text())["dtype"] == "float16"
    (tmp_path / "other").mkdir()
    for name, content in (("mine", ""), ("manifest.json", '{"format": "pdae_fast-export-1"}')):
        (tmp_path / "other" / name).write_text(content)
        assert run("onnx", "--model", tmp_path / "student", "--out", tmp_path / "other") == 2
    tiny_pdae().save_pretrained(tmp_path / "pdae")
    assert run("onnx", "--model", tmp_path / "pdae", "--out", out, "--steps", 2) == 2  # that is a student's


def test_what_is_for_a_diffusion_model_is_refused(tmp_path, saved, capsys):
    saved("classes")
    for options, message in (
        (("--label", 1), "--label is for a diffusion model"),
        (("--features", 1), "--features is for a diffusion model"),
        (("--verify",), "--verify is for a diffusion model"),
        (("--single-file",), "--single-file is for a diffusion model"),
        (("--dtype", "bfloat16"), "float32 or float16"),
        (("--prior",), "is a student"),
    ):
        assert run("onnx", "--model", tmp_path / "student", "--out", tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_graph_that_differs_is_not_written(tmp_path, saved, capsys, monkeypatch):
    saved("points")
    monkeypatch.setattr(
        exports.StudentGraph, "forward", lambda self, x: 2 * self.read(x.flatten(1)[:, :1024]).unflatten(1, (-1, 2))
    )
    assert run("onnx", "--model", tmp_path / "student", "--out", tmp_path / "out") == 2
    assert "student differs from the model by" in capsys.readouterr().err and not (tmp_path / "out").exists()
