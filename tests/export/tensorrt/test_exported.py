"""What the exporter writes, as real engines and through the runner: small models, every dtype; the bundled model."""

import sys

import numpy as np
import pytest

from fake_device import FakeCuda, fake_tensorrt
from pdae_fast import PDAE, cli
from pdae_fast.export import manifest as manifests
from pdae_fast.export.__main__ import main
from pdae_fast.export.runtime import Session

DTYPES = {
    "exported": "float32",
    "exported_half": "float16",
    "exported_bfloat16": "bfloat16",
    "exported_prior": "float32",
    "exported_diffae": "float32",
}
CAPABILITIES = ("8.9", "12.0")


@pytest.mark.slow
@pytest.mark.parametrize("fixture", DTYPES)
def test_every_export_builds(tmp_path, request, fixture):
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "pdae_fast[tensorrt-rtx]"')
    source, out = request.getfixturevalue(fixture), tmp_path / "engines"
    command = ["tensorrt", "--flavor", "tensorrt-rtx", "--onnx", str(source), "--out", str(out), "--quiet"]
    assert cli.run(main, [*command, "--capability", "8.9"]) == 0
    made, onnx = manifests.read(out, ["tensorrt-rtx"]), manifests.read(source)
    manifests.check_files(out, made)
    assert list(made["graphs"]) == list(manifests.GRAPHS[onnx["kind"]]) and made["dtype"] == DTYPES[fixture]
    assert made["onnx"]["files"] == {name: entry["sha256"] for name, entry in onnx["files"].items()}
    for entry in made["engines"]["8.9"].values():
        layers = entry["layers"]
        assert set(layers.get("convolution", {})) <= {DTYPES[fixture]}
        for kind in ("normalization", "softmax"):
            assert set(layers.get(kind, {})) <= {"float32"}


@pytest.mark.parametrize("fixture", ["exported", "exported_prior", "exported_diffae"])
def test_runner_on_an_export(tmp_path, request, monkeypatch, x0, fixture):
    source, out = request.getfixturevalue(fixture), tmp_path / "engines"
    cuda = FakeCuda("8.6")
    limit = manifests.read(source)["max_batch"]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(cuda, profile=(1, limit)))
    assert cli.run(main, ["tensorrt", "--onnx", str(source), "--out", str(out), "--quiet", "--verify"]) == 0
    expected = Session(source, provider="cpu").reconstruct(x0)
    np.testing.assert_allclose(Session(out).reconstruct(x0), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_bundled_model_builds(tmp_path, dtype):
    """What CI builds: engines for two capabilities, and what is in them."""
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "pdae_fast[tensorrt-rtx]"')
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx, out = tmp_path / "onnx", tmp_path / "engines"
    assert cli.run(main, ["onnx", "--out", str(onnx), "--dtype", dtype, "--steps", "2", "--quiet"]) == 0
    options = [option for capability in CAPABILITIES for option in ("--capability", capability)]
    build = ["tensorrt", "--flavor", "tensorrt-rtx", "--onnx", str(onnx), "--out", str(out), "--profile", "1,4,16"]
    assert cli.run(main, [*build, *options, "--quiet"]) == 0

    made, source = manifests.read(out, ["tensorrt-rtx"]), manifests.read(onnx)
    manifests.check_files(out, made)
    assert list(made["engines"]) == list(CAPABILITIES) and made["profile"] == [1, 4, 16]
    config = PDAE.from_pretrained("fashion32").config
    image = ["N", *made["image_shape"]]
    step = made["graphs"]["decode_step"]
    assert [(t["name"], t["dtype"], t["shape"]) for t in step["inputs"]] == [
        ("x", "float32", image),
        ("conditioning", "float32", ["N", 2, made["conditioning_width"]]),
        ("step", "int64", [1]),
    ]
    assert made["graphs"]["encoder"]["outputs"] == [
        {"name": "z", "dtype": "float32", "shape": ["N", config.latent_dim]}
    ]
    for capability, engines in made["engines"].items():
        for name, entry in engines.items():
            plan = (out / entry["file"]).read_bytes()
            assert b"accelerators={sm" + capability.replace(".", "").encode() + b" }" in plan
            assert b"tf32=0" in plan and b"stream_capturable=1" in plan
            for tensor in made["graphs"][name]["inputs"] + made["graphs"][name]["outputs"]:
                assert tensor["name"].encode() in plan
            layers = entry["layers"]
            assert set(layers.get("convolution", {})) <= {dtype}
            # Statistics of norms and the softmax of attention stay in float32 whatever the networks compute in.
            assert set(layers.get("normalization", {})) <= {"float32"} and set(layers.get("softmax", {})) <= {"float32"}
        decode = engines["decode_step"]["layers"]
        assert decode["convolution"][dtype] > 50 and decode["normalization"]["float32"] > 50
    # Weights of two bytes make smaller engines than weights of four.
    weights = sum(entry["bytes"] for entry in source["files"].values())
    assert made["graphs"]["decode_step"]["bytes"] > 0.9 * weights
