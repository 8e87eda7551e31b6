"""What CI builds: engines of the bundled model for two capabilities, in float32 and float16, and what is in them."""

import pytest

from pdae_fast import PDAE, cli
from pdae_fast.export import manifest as manifests
from pdae_fast.export.__main__ import main

pytest.importorskip("tensorrt_rtx", reason='needs pip install "pdae_fast[tensorrt-rtx]"')
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CAPABILITIES = ("8.9", "12.0")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_bundled_model_builds(tmp_path, dtype):
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
