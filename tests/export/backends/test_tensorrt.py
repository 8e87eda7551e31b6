"""The runner's logic on a device that computes on the CPU: against ONNX Runtime, and every way a load can fail."""

import shutil
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fake_device import FakeCuda, Status, fake_tensorrt
from pdae_fast import UserError
from pdae_fast.export import manifest as manifests
from pdae_fast.export.backends.backend import Backend
from pdae_fast.export.backends.cuda import Cuda
from pdae_fast.export.backends.tensorrt import TensorRTBackend
from pdae_fast.export.backends.tensorrt_flavor import file_suffix
from pdae_fast.export.runtime import Session, load_backend
from toy_export import IMAGE, LATENT, STEPS, write_toy

pytest.importorskip("onnxruntime")


def engines_of(source, target, capabilities=("8.9",), profile=(1, 2, 4), **changed):
    """A directory of "engines" for the fake TensorRT: the ONNX files under the names and entries of a build."""
    target.mkdir()
    onnx = manifests.read(source)
    engines = {}
    for capability in capabilities:
        engines[capability] = {}
        for name, entry in onnx["graphs"].items():
            path = target / f"{name}.{file_suffix(capability)}.engine"
            shutil.copyfile(source / entry["file"], path)
            engines[capability][name] = {"file": path.name, **manifests.file_entry(path)}
    graphs = {name: {**entry, **engines[capabilities[0]][name]} for name, entry in onnx["graphs"].items()}
    made = {
        **{k: v for k, v in onnx.items() if k != "format"},
        "backend": "tensorrt",
        "tensorrt_version": "11.4.0",
        "max_batch": profile[2],
        "profile": list(profile),
        "tf32": False,
        "graphs": graphs,
        "engines": engines,
    }
    manifests.write(target, {**made, **changed})
    return target


@pytest.fixture(scope="module")
def onnx_dir(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("export") / "onnx")


@pytest.fixture
def device(monkeypatch):
    """Install a fake CUDA and TensorRT; returns a function that makes them with other traits."""

    def install(cuda=None, **traits):
        cuda = cuda or FakeCuda()
        trt = fake_tensorrt(cuda, **traits)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return cuda, trt

    return install


def open_backend(directory):
    return TensorRTBackend(directory, manifests.read(directory))


class Plain(Backend):
    """ONNX Runtime with the protocol's own loop: one call a step."""

    def __init__(self, directory):
        inner = load_backend(directory, manifests.read(directory), provider="cpu")
        self.name, self.provider, self.run = inner.name, inner.provider, inner.run


def plain_session(directory):
    session = Session(directory, provider="cpu")
    session.backend = Plain(directory)
    return session


def images(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *IMAGE)).astype(np.float32)


def test_session_on_engines_equals_session_on_onnx(tmp_path, onnx_dir, device):
    cuda, _ = device()
    reference = plain_session(onnx_dir)
    tested = Session(engines_of(onnx_dir, tmp_path / "engines"))
    x0 = images(7)  # a batch of 4, then one of 3: other shapes, another capture
    z = tested.encode(x0)
    x_T = tested.invert(x0, z)
    np.testing.assert_allclose(z, reference.encode(x0), atol=1e-6)
    np.testing.assert_allclose(x_T, reference.invert(x0, z), atol=1e-6)
    np.testing.assert_allclose(tested.reconstruct(x0), reference.reconstruct(x0), atol=1e-6)
    np.testing.assert_allclose(tested.decode(z, seed=3), reference.decode(z, seed=3), atol=1e-6)
    assert np.abs(reference.reconstruct(x0) - x0).max() > 0.01, "a network that does nothing tests nothing"
    assert tested.backend.name == "tensorrt" and "8.9" in tested.provider
    tested.backend.close()
    assert not cuda.allocated and not cuda.streams and not cuda.graphs, "everything is given back"


def test_a_loop_runs_one_step_plain_and_replays_the_others(tmp_path, onnx_dir, device):
    cuda, trt = device()
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines"))
    reference = Plain(onnx_dir)
    conditioning = np.random.default_rng(1).standard_normal((2, 2, 4)).astype(np.float32)
    for seed in (1, 2):  # the second call replays what the first has captured
        cuda.log.clear()
        x = images(2, seed)
        before = x.copy()
        found = backend.loop("decode_step", x, conditioning, STEPS["decode_step"])
        np.testing.assert_allclose(
            found, reference.loop("decode_step", x, conditioning, STEPS["decode_step"]), atol=1e-6
        )
        np.testing.assert_array_equal(x, before)
        plain = 1 if seed == 1 else 0
        assert cuda.log.count("cudaGraphLaunch") == STEPS["decode_step"] - plain
        assert cuda.log.count("cudaStreamBeginCapture") == plain
        # Before a capture, and before the result is read.
        assert cuda.log.count("cudaStreamSynchronize") == plain + 1
        assert cuda.log.count("cudaMalloc") == (len(("x", "conditioning", "step", "x_next")) if plain else 0)
    assert [context.runs for context in trt.contexts] == [2 * STEPS["decode_step"]]


def test_many_threads_get_what_one_gets(tmp_path, onnx_dir, device):
    """They share one stream and its buffers, also while the first of them opens the engines."""
    cuda, _ = device()
    directory = engines_of(onnx_dir, tmp_path / "engines")
    inputs = [images(1 + i % 4, seed=i) for i in range(24)]
    alone = Session(directory)
    expected = [(alone.encode(x), alone.reconstruct(x)) for x in inputs]
    alone.backend.close()
    session, start = Session(directory), threading.Barrier(6)

    def run(part):
        start.wait(timeout=30)
        return [(session.encode(x), session.reconstruct(x)) for x in inputs[part::6]]

    with ThreadPoolExecutor(6) as pool:
        for part, found in enumerate(pool.map(run, range(6))):
            for pair, (z, x) in zip(found, expected[part::6], strict=True):
                np.testing.assert_array_equal(pair[0], z)
                np.testing.assert_array_equal(pair[1], x)
    session.backend.close()
    assert not cuda.allocated and not cuda.streams and not cuda.graphs


def test_another_batch_is_captured_anew(tmp_path, onnx_dir, device):
    cuda, _ = device()
    backend, reference = open_backend(engines_of(onnx_dir, tmp_path / "engines")), Plain(onnx_dir)
    for count in (2, 4, 1, 1):
        x, conditioning = images(count, count), np.ones((count, 2, 4), np.float32)
        expected = reference.loop("decode_step", x, conditioning, 4)
        np.testing.assert_allclose(backend.loop("decode_step", x, conditioning, 4), expected, atol=1e-6)
    assert cuda.log.count("cudaStreamBeginCapture") == 3 and len(cuda.graphs) == 1


def test_fewer_steps_and_none(tmp_path, onnx_dir, device):
    device()
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines"))
    reference = Plain(onnx_dir)
    x, conditioning = images(1), np.ones((1, 2, 4), np.float32)
    np.testing.assert_array_equal(backend.loop("invert_step", x, conditioning, 0), x)
    expected = reference.loop("invert_step", x, conditioning, 2)
    np.testing.assert_allclose(backend.loop("invert_step", x, conditioning, 2), expected, atol=1e-6)
    with pytest.raises(UserError, match="5 steps; these engines were built for 4"):
        backend.loop("decode_step", x, conditioning, 5)


def test_a_batch_below_the_profile_is_filled_up_and_one_above_refused(tmp_path, onnx_dir, device):
    device(profile=(2, 4))
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines", profile=(2, 2, 4)))
    reference = Plain(onnx_dir)
    x0 = images(1)
    np.testing.assert_allclose(
        backend.run("encoder", {"x0": x0})["z"], reference.run("encoder", {"x0": x0})["z"], atol=1e-6
    )
    x, conditioning = images(3), np.ones((3, 2, 4), np.float32)
    expected = reference.loop("decode_step", x, conditioning, 4)
    np.testing.assert_allclose(backend.loop("decode_step", x, conditioning, 4), expected, atol=1e-6)
    with pytest.raises(UserError, match="a batch of 5 images; the profile of these engines takes 1 to 4"):
        backend.run("encoder", {"x0": images(5)})
    with pytest.raises(UserError, match=r"conditioning is float32 \[2, 2, 4\]; expected float32 \[3, 2, 4\]"):
        backend.loop("decode_step", x, conditioning[:2], 4)


def test_prior_alone(tmp_path, device):
    source = write_toy(tmp_path / "onnx", kind="prior")
    device()
    tested = Session(engines_of(source, tmp_path / "engines"))
    x0 = images(2)
    np.testing.assert_allclose(tested.reconstruct(x0), plain_session(source).reconstruct(x0), atol=1e-6)


@pytest.mark.parametrize("how", ["asked", "run", "end", "instantiate"])
def test_without_a_cuda_graph_it_says_so_and_computes_the_same(tmp_path, onnx_dir, device, how):
    cuda, _ = device(capturable={"asked": False, "run": "fails"}.get(how))
    if how == "end":
        cuda.fail["cudaStreamEndCapture"] = Status.cudaErrorStreamCaptureInvalidated
    if how == "instantiate":
        cuda.fail["cudaGraphInstantiate"] = Status.cudaErrorLaunchFailure
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines"))
    reference = Plain(onnx_dir)
    x, conditioning = images(2), np.ones((2, 2, 4), np.float32)
    expected = reference.loop("decode_step", x, conditioning, 4)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        found = backend.loop("decode_step", x, conditioning, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(backend.loop("decode_step", x, conditioning, 4), expected, atol=1e-6)
    assert "cudaGraphLaunch" not in cuda.log


def test_every_cuda_error_is_named(tmp_path, onnx_dir, device):
    cuda, _ = device()
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines"))
    x, conditioning = images(1), np.ones((1, 2, 4), np.float32)
    backend.loop("decode_step", x, conditioning, 2)
    for name in ("cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamSynchronize"):
        cuda.fail = {name: Status.cudaErrorLaunchFailure}
        with pytest.raises(RuntimeError, match=rf"{name}: cudaErrorLaunchFailure \(719\)"):
            backend.loop("decode_step", x, conditioning, 2)


def test_too_little_memory_is_one_line(tmp_path, onnx_dir, device):
    device(FakeCuda(limit=1000))
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines"))
    with pytest.raises(UserError, match="GPU has no 0 MiB left; use a smaller MAX"):
        backend.run("encoder", {"x0": images(1)})


def refused(directory, match):
    with pytest.raises(UserError, match=match) as caught:
        Session(directory)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_this_machine_is_one_line(tmp_path, onnx_dir, device):
    directory = engines_of(onnx_dir, tmp_path / "engines", capabilities=("8.9", "12.0"))
    device(version="11.5.0")
    refused(directory, r"built with TensorRT 11\.4\.0, and this machine has 11\.5\.0; an engine runs only with the")
    device(FakeCuda(capability="9.0"))
    refused(directory, r"engines for compute capability 8\.9, 12\.0; this GPU has 9\.0: build with --capability 9\.0")
    device(FakeCuda(devices=0))
    refused(directory, "no NVIDIA GPU is visible")
    cuda, _ = device()
    cuda.fail["cudaGetDeviceCount"] = Status.cudaErrorInsufficientDriver
    refused(directory, r"no usable NVIDIA driver .*cudaErrorInsufficientDriver \(35\)")
    device(FakeCuda(capability="12.0"))
    assert Session(directory).encode(images(1)).shape == (1, LATENT)
    with pytest.raises(UserError, match="run on a GPU only, not on provider 'cpu'"):
        Session(directory, provider="cpu")


def test_missing_packages_are_one_line(tmp_path, onnx_dir, device, monkeypatch):
    directory = engines_of(onnx_dir, tmp_path / "engines")
    device()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    refused(directory, "needs the CUDA bindings .*pip install")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused(directory, r'TensorRT is not installed; install it: pip install "pdae_fast\[tensorrt\]"')


def test_changed_files_are_one_line(tmp_path, onnx_dir, device):
    cuda, _ = device(FakeCuda(capability="12.0"))
    directory = engines_of(onnx_dir, tmp_path / "engines", capabilities=("8.9", "12.0"))
    path = directory / "decode_step.sm120.engine"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    refused(directory, r"decode_step\.sm120\.engine: its SHA-256 is not the one in manifest\.json")
    path.write_bytes(content[:100])
    refused(directory, "100 bytes, but manifest.json says")
    path.unlink()
    refused(directory, r"decode_step\.sm120\.engine: missing")
    (directory / "manifest.json").unlink()
    refused(directory, "half-finished export")
    assert not cuda.allocated and not cuda.streams


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"engines": None}, "states no engines"),
        ({"tensorrt_version": None}, "states no engines, version or profile"),
        ({"engines": {"8.9": {"encoder": {"file": "../x", "sha256": "", "bytes": 0}}}}, "no engine for encoder on 8.9"),
        ({"engines": {"8.9": {}}}, "no engine for encoder"),
    ],
    ids=["no-engines", "no-version", "outside", "empty"],
)
def test_an_edited_manifest_is_one_line(tmp_path, onnx_dir, device, changed, match):
    device()
    refused(engines_of(onnx_dir, tmp_path / "engines", **changed), match)


def test_an_engine_that_is_not_what_the_manifest_says_is_one_line(tmp_path, onnx_dir, device):
    _, trt = device()
    directory = engines_of(onnx_dir, tmp_path / "engines")
    manifest = manifests.read(directory)

    manifest["graphs"]["encoder"]["inputs"][0]["dtype"] = "float16"
    with pytest.raises(UserError, match=r"x0 is float32 \[-1, 1, 8, 8\]; the manifest says float16"):
        TensorRTBackend(directory, manifest).run("encoder", {"x0": images(1)})
    manifest["graphs"]["encoder"]["outputs"][0]["name"] = "code"
    with pytest.raises(UserError, match="has x0, z; the manifest says x0, code"):
        TensorRTBackend(directory, manifest).run("encoder", {"x0": images(1)})

    trt.on_host = ("step",)
    with pytest.raises(UserError, match="step would be read on the host"):
        open_backend(directory).loop("decode_step", images(1), np.ones((1, 2, 4), np.float32), 1)

    (directory / "encoder.sm89.engine").write_bytes(b"garbage")
    manifest = manifests.read(directory)
    manifest["engines"]["8.9"]["encoder"].update(manifests.file_entry(directory / "encoder.sm89.engine"))
    with pytest.raises(UserError, match="cannot be opened here: not an engine"):
        TensorRTBackend(directory, manifest).run("encoder", {"x0": images(1)})


def test_wrong_names_are_one_line(tmp_path, onnx_dir, device):
    device()
    backend = open_backend(engines_of(onnx_dir, tmp_path / "engines"))
    with pytest.raises(UserError, match="encoder takes x0, not image"):
        backend.run("encoder", {"image": images(1)})
    with pytest.raises(UserError, match="no engine for reconstruct; it has encoder, conditioning"):
        backend.run("reconstruct", {"x0": images(1)})


def test_the_real_bindings_say_that_there_is_no_driver():
    pytest.importorskip("cuda.bindings.runtime")
    try:
        Cuda().close()
    except UserError as error:
        assert "driver" in str(error) or "no NVIDIA GPU" in str(error)
