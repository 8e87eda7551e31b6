"""What the exporter writes, as real engines and through the runner: small models, every dtype."""

import sys

import numpy as np
import pytest

from fake_device import FakeCuda, fake_tensorrt
from pdae_fast import cli
from pdae_fast.export import manifest as manifests
from pdae_fast.export.__main__ import main
from pdae_fast.export.runtime import Session

DTYPES = {
    "exported": "float32",
    "exported_half": "float16",
    "exported_bfloat16": "bfloat16",
    "exported_prior": "float32",
}


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


@pytest.mark.parametrize("fixture", ["exported", "exported_prior"])
def test_runner_on_an_export(tmp_path, request, monkeypatch, x0, fixture):
    source, out = request.getfixturevalue(fixture), tmp_path / "engines"
    cuda = FakeCuda("8.6")
    limit = manifests.read(source)["max_batch"]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(cuda, profile=(1, limit)))
    assert cli.run(main, ["tensorrt", "--onnx", str(source), "--out", str(out), "--quiet", "--verify"]) == 0
    expected = Session(source, provider="cpu").reconstruct(x0)
    np.testing.assert_allclose(Session(out).reconstruct(x0), expected, atol=1e-5)
