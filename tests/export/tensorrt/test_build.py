"""Building engines: real ones by TensorRT for RTX, which needs no GPU; the classic flavour on a fake of it."""

import json
import re
import sys

import numpy as np
import onnx
import pytest

from fake_device import FakeCuda, fake_tensorrt
from pdae_fast import UserError, cli
from pdae_fast.export import manifest as manifests
from pdae_fast.export.__main__ import main
from pdae_fast.export.backends.cuda import present_capability
from pdae_fast.export.backends.tensorrt_flavor import FLAVORS, targets
from pdae_fast.export.runtime import Session
from pdae_fast.export.tensorrt.verify import relative_error
from toy_export import graph, write_toy

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    base = tmp_path_factory.mktemp("toys")
    return {dtype: write_toy(base / dtype, dtype) for dtype in ("float32", "float16", "bfloat16")}


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason='needs pip install "pdae_fast[tensorrt-rtx]"')


@pytest.fixture
def classic(monkeypatch):
    cuda = FakeCuda("8.6")
    trt = fake_tensorrt(cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


def export(*argv):
    return cli.run(main, ["tensorrt", *map(str, argv)])


def one_line(capsys):
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text, text
    return text


def build_rtx(source, out, *capabilities, more=()):
    options = [option for capability in capabilities for option in ("--capability", capability)]
    return export("--onnx", source, "--out", out, "--flavor", "tensorrt-rtx", "--quiet", *options, *more)


def check_engines(out, dtype, capabilities):
    """What any directory of RTX engines must hold; returns the manifest."""
    made = manifests.read(out, ["tensorrt-rtx"])
    manifests.check_files(out, made)
    assert list(made["engines"]) == list(capabilities) and made["refittable"] is False and made["files"] == {}
    convolutions = 0
    for capability, engines in made["engines"].items():
        assert list(engines) == list(manifests.GRAPHS["pdae"])
        for entry in engines.values():
            plan = (out / entry["file"]).read_bytes()
            # The engine's own header: what it was built for, and that float32 stays float32.
            assert b"accelerators={sm" + capability.replace(".", "").encode() + b" }" in plan
            assert b"tf32=0" in plan and b"stream_capturable=1" in plan
            found = entry["layers"].get("convolution", {})
            convolutions += found.get(dtype, 0)
            assert set(found) <= {dtype}
    assert convolutions > 0
    assert not list(out.parent.glob(".*.tmp")), "nothing is left beside it"
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_engines_for_two_capabilities(tmp_path, toys, rtx, dtype):
    out = tmp_path / "engines"
    assert build_rtx(toys[dtype], out, "8.9", "12.0", more=["--profile", "1,2,3"]) == 0
    made = check_engines(out, dtype, ["8.9", "12.0"])
    onnx = manifests.read(toys[dtype])
    assert made["tensorrt_version"] == rtx.__version__ and made["versions"]["tensorrt_rtx"] == rtx.__version__
    assert made["profile"] == [1, 2, 3] and made["max_batch"] == 3 and made["dtype"] == dtype
    assert made["onnx"]["graphs"] == {name: entry["sha256"] for name, entry in onnx["graphs"].items()}
    for name, entry in made["graphs"].items():
        assert (entry["inputs"], entry["outputs"]) == (onnx["graphs"][name]["inputs"], onnx["graphs"][name]["outputs"])
    assert made["engines"]["8.9"]["decode_step"]["layers"]["reduce"] == {"float32": 1}, "what the graph casts back"


def test_a_later_build_adds_capabilities_and_keeps_what_is_there(tmp_path, toys, rtx, capsys):
    out = tmp_path / "engines"
    assert build_rtx(toys["float32"], out, "8.9") == 0
    first = manifests.read(out)["engines"]["8.9"]
    assert export("--onnx", toys["float32"], "--out", out, "--flavor", "tensorrt-rtx", "--capability", "8.0") == 0
    assert "already there for 8.9" in capsys.readouterr().out
    both = check_engines(out, "float32", ["8.9", "8.0"])
    assert both["engines"]["8.9"] == first

    # Other settings make other engines, and a damaged one is not kept.
    assert build_rtx(toys["float32"], out, "8.9", more=["--profile", "1,1,2"]) == 0
    assert list(manifests.read(out)["engines"]) == ["8.9"]
    path = out / "encoder.sm89.engine"
    path.write_bytes(path.read_bytes()[:-1])
    assert build_rtx(toys["float32"], out, "8.9", more=["--profile", "1,1,2"]) == 0
    check_engines(out, "float32", ["8.9"])


def test_prior_alone(tmp_path, rtx):
    source, out = write_toy(tmp_path / "onnx", kind="prior"), tmp_path / "engines"
    assert build_rtx(source, out, "8.0") == 0
    assert list(manifests.read(out)["engines"]["8.0"]) == ["decode_step", "invert_step"]


def test_tf32_is_an_option(tmp_path, toys, rtx):
    out = tmp_path / "engines"
    assert build_rtx(toys["float32"], out, "8.9", more=["--tf32"]) == 0
    assert b"tf32=1" in (out / "encoder.sm89.engine").read_bytes() and manifests.read(out)["tf32"] is True


@pytest.mark.parametrize(
    "dtype, capability, more, match",
    [
        ("float32", "9.0", (), r"TensorRT for RTX .* builds for compute capability 7\.5, .*12\.1, not 9\.0"),
        ("float32", "sm89", (), "compute capability 'sm89'; expected a number such as 8.9"),
        ("bfloat16", "7.5", (), "compute capability 7.5 has no bfloat16"),
        ("float32", "8.9", ("--profile", "1,2"), "profile '1,2'; expected three whole numbers"),
        ("float32", "8.9", ("--profile", "2,1,4"), "profile 2,1,4: expected 1 <= MIN <= OPT <= MAX"),
        ("float32", "8.9", ("--profile", "1,1,5"), "was exported for at most 4 images at a time"),
        ("float32", "8.9", ("--timing-cache", "t"), "has no timing cache"),
    ],
)
def test_what_cannot_be_built_is_one_line(tmp_path, toys, rtx, capsys, dtype, capability, more, match):
    out = tmp_path / "engines"
    assert build_rtx(toys[dtype], out, capability, more=more) == 2
    assert re.search(match, one_line(capsys))
    assert not out.exists()


def test_a_wrong_directory_is_one_line(tmp_path, toys, rtx, capsys):
    out = tmp_path / "engines"
    assert build_rtx(tmp_path / "nowhere", out, "8.9") == 2
    assert "nowhere: no such directory" in one_line(capsys)
    assert build_rtx(toys["float32"], toys["float32"], "8.9") == 2
    assert "not empty and not an earlier export; expected a new directory" in one_line(capsys)
    manifests.check_files(toys["float32"], manifests.read(toys["float32"]))
    half = write_toy(tmp_path / "half")
    (half / "manifest.json").unlink()
    assert build_rtx(half, out, "8.9") == 2
    assert "half-finished export" in one_line(capsys)
    (out / "photos").mkdir(parents=True)
    assert build_rtx(toys["float32"], out, "8.9") == 2
    assert "not empty and not an earlier export" in one_line(capsys)
    assert [path.name for path in out.iterdir()] == ["photos"]


def edited(directory, model=None, rehash=True, **entry):
    """The toy with another encoder, or another entry of it, whose hash agrees with the file."""
    write_toy(directory)
    content = json.loads((directory / "manifest.json").read_text())
    path = directory / "encoder.onnx"
    if model is not None:
        path.write_bytes(model)
    content["graphs"]["encoder"].update(manifests.file_entry(path) if rehash else {}, **entry)
    manifests.write(directory, content)
    return directory


def output(name, dtype):
    return [{"name": name, "dtype": dtype, "shape": ["N", 6]}]


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"model": b"not a model", "rehash": False}, "encoder.onnx: 11 bytes, but manifest.json says"),
        ({"model": b"not a model"}, "encoder.onnx: TensorRT for RTX does not read it"),
        ({"model": "float16"}, "its convolutions compute 1 in float16, but the manifest says float32"),
        ({"outputs": output("z", "float16")}, r"z is float32 \[-1, 6\], but the manifest says float16 \[-1, 6\]"),
        ({"outputs": output("code", "float32")}, "outputs are z, but the manifest says code"),
    ],
    ids=["hash", "garbage", "precision", "dtype", "name"],
)
def test_an_edited_export_is_one_line(tmp_path, rtx, capsys, changed, match):
    if changed.get("model") == "float16":
        changed = {"model": graph("encoder", "float16")[0].SerializeToString()}
    out = tmp_path / "engines"
    assert build_rtx(edited(tmp_path / "onnx", **changed), out, "8.9") == 2
    assert re.search(match, one_line(capsys))
    assert not out.exists()


def test_an_operator_that_it_cannot_read_is_named(tmp_path, rtx, capsys):
    model, _, _ = graph("encoder")
    model.graph.node[-1].op_type = "Det"
    assert build_rtx(edited(tmp_path / "onnx", model.SerializeToString()), tmp_path / "engines", "8.9") == 2
    assert "Det" in one_line(capsys)


def no_driver():
    return present_capability()[0] is None


def test_verify_without_a_driver_says_so_and_leaves_the_engines(tmp_path, toys, rtx, capsys):
    if not no_driver():
        pytest.skip("this machine has a driver; see test_engines_run_on_this_gpu")
    out = tmp_path / "engines"
    assert build_rtx(toys["float32"], out, "8.9", more=["--verify"]) == 2
    assert "the engines are complete, but --verify could not compare them here" in one_line(capsys)
    check_engines(out, "float32", ["8.9"])
    with pytest.raises(UserError, match="CUDA bindings|driver"):
        Session(out)
    assert build_rtx(toys["bfloat16"], tmp_path / "low", "8.9", more=["--verify"]) == 2
    assert re.search("could not compare them here: .* has no bfloat16 convolution on the CPU", one_line(capsys))
    assert build_rtx(toys["float32"], tmp_path / "other") == 2
    assert re.search("no GPU here to build for .*; name one with --capability", one_line(capsys))


def test_engines_run_on_this_gpu(tmp_path, toys, rtx):
    capability, reason = present_capability()
    if capability is None:
        pytest.skip(reason)
    if capability not in targets(rtx):
        pytest.skip(f"TensorRT for RTX does not build for {capability}, the GPU of this machine")
    for dtype in ("float32", "float16"):
        assert build_rtx(toys[dtype], tmp_path / dtype, more=["--verify"]) == 0


# -- the classic flavour, on a fake of its package and of CUDA ---------------------------------------------------------


def build_classic(source, out, *more):
    return export("--onnx", source, "--out", out, *more)


def test_classic_builds_for_the_gpu_that_is_here_and_verifies(tmp_path, toys, classic, capsys):
    out = tmp_path / "engines"
    assert build_classic(toys["float32"], out, "--profile", "1,2,4", "--verify") == 0
    made = manifests.read(out, ["tensorrt"])
    assert list(made["engines"]) == ["8.6"] and made["tensorrt_version"] == classic.__version__
    assert [built.tf32 for built in classic.built] == [False] * 4
    assert classic.built[0].shapes == {"x0": ((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))}
    assert classic.built[2].shapes["conditioning"] == ((1, 2, 4), (2, 2, 4), (4, 2, 4))
    assert "step" not in classic.built[2].shapes, "its shape never changes"
    table = capsys.readouterr().out
    for what in ("encoder", "conditioning", "decode_step 0", "decode_step 3", "invert_step 0..2, replayed"):
        assert what in table
    errors = [float(line.split()[-1]) for line in table.splitlines() if re.search(r"\de[-+]\d\d$", line)]
    assert len(errors) == 20 and max(errors) < 1e-5


@pytest.mark.parametrize("name", ["encoder", "conditioning", "decode_step", "invert_step"])
def test_verify_finds_an_engine_that_computes_something_else(tmp_path, toys, classic, capsys, monkeypatch, name):
    original = classic.Builder.build_serialized_network

    def distorted(self, network, config):
        model = onnx.load_from_string(original(self, network, config))
        for weight in model.graph.initializer:
            if model.graph.name == name and weight.name == "w":
                values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
                weight.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
        return model.SerializeToString()

    monkeypatch.setattr(classic.Builder, "build_serialized_network", distorted)
    assert build_classic(toys["float32"], tmp_path / "engines", "--verify", "--quiet") == 2
    text = one_line(capsys)
    assert re.search(rf"too far from ONNX Runtime \(at most 0.0002\): {name}", text)


def test_verify_finds_a_wrong_step_number(tmp_path, toys, classic, capsys, monkeypatch):
    monkeypatch.setattr(np, "arange", lambda *a, **k: np.zeros(a[0], k["dtype"]))  # the table of step numbers
    assert build_classic(toys["float32"], tmp_path / "engines", "--verify", "--quiet") == 2
    assert "replayed" in one_line(capsys)


def test_timing_cache_is_read_extended_and_refused_when_foreign(tmp_path, toys, classic, capsys):
    cache = tmp_path / "timing.cache"
    assert build_classic(toys["float32"], tmp_path / "engines", "--timing-cache", cache, "--quiet") == 0
    assert cache.read_bytes() == b"++++", "one build a graph, each from what the last one measured"
    cache.write_bytes(b"bad")
    assert build_classic(toys["float32"], tmp_path / "other", "--timing-cache", cache, "--quiet") == 2
    assert "timing cache is of another GPU or TensorRT, or damaged" in one_line(capsys)
    assert cache.read_bytes() == b"bad"
    for path, match in (
        (tmp_path, "Is a directory; expected a timing cache"),
        (tmp_path / "no" / "t", "no such directory"),
    ):
        assert build_classic(toys["float32"], tmp_path / "other", "--timing-cache", path) == 2
        assert match in one_line(capsys)


def test_classic_fills_one_directory_from_several_machines(tmp_path, toys, classic, monkeypatch):
    out = tmp_path / "engines"
    assert build_classic(toys["float32"], out, "--quiet") == 0
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda("9.0"))
    assert build_classic(toys["float32"], out, "--quiet") == 0
    assert list(manifests.read(out)["engines"]) == ["8.6", "9.0"]
    assert len(classic.built) == 8


def test_classic_needs_the_gpu_that_the_engine_is_for(tmp_path, toys, classic, capsys, monkeypatch):
    out = tmp_path / "engines"
    assert build_classic(toys["float32"], out, "--capability", "9.0") == 2
    assert re.search(
        "builds engines on the GPU they are for, and this machine has compute capability 8.6, not 9.0", one_line(capsys)
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(devices=0))
    assert build_classic(toys["float32"], out, "--capability", "9.0") == 2
    assert "this machine has no usable GPU, not 9.0" in one_line(capsys)
    assert build_classic(toys["float32"], out) == 2
    assert "no GPU here to build for (no NVIDIA GPU is visible" in one_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("flavor, extra", [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx")])
def test_a_missing_package_is_one_line(tmp_path, toys, capsys, monkeypatch, flavor, extra):
    monkeypatch.setitem(sys.modules, FLAVORS[flavor].module, None)
    out = tmp_path / "engines"
    assert export("--onnx", toys["float32"], "--out", out, "--flavor", flavor, "--capability", "8.9") == 2
    assert f'is not installed; install it: pip install "pdae_fast[{extra}]"' in one_line(capsys)
    assert not out.exists()


def test_errors_of_a_step_are_relative_to_its_move():
    x, move = np.full(4, 10.0, np.float32), np.float32(0.5)
    assert relative_error(x + move + 0.05, x + move, x) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(x + move + 0.05, x + move) == pytest.approx(0.05 / 10.5, rel=1e-4)
    assert relative_error(x + 0.001, x, x) == pytest.approx(0.001 / (0.01 * 10), rel=1e-3)
    assert relative_error(x * np.nan, x, x) == float("inf") and relative_error(x * 0, x * 0) == 0.0
