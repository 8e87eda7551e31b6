"""The runner that needs no PyTorch, against the PyTorch pipeline."""

import copy
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from helpers import TINY, tiny_pdae, tiny_prior
from pdae_fast import PDAE, Pipeline, Recipe, UserError
from pdae_fast.arguments import ImageRangeWarning
from pdae_fast.export.runtime import Session, load_backend, noise

ort = pytest.importorskip("onnxruntime")
STEPS, ENCODE_STEPS, MAX_BATCH = 5, 7, 3


@pytest.fixture(scope="module")
def session(exported):
    return Session(exported, threads=1)


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline(tiny, steps=STEPS, encode_steps=ENCODE_STEPS, device="cpu", dtype="float32", plan="eager")


def relative(a, b):
    b = np.asarray(b, np.float64)
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def test_every_call_agrees_with_the_pipeline(session, pipe, x0):
    x = torch.from_numpy(x0)
    z = pipe.encode(x)
    x_T = pipe.invert(x, z)
    assert relative(session.encode(x0), z) < 1e-5
    assert relative(session.invert(x0, z.numpy()), x_T) < 1e-5
    assert relative(session.decode(z.numpy(), x_T.numpy()), pipe.decode(z, x_T)) < 3e-5
    assert relative(session.reconstruct(x0), pipe.reconstruct(x)) < 1e-4
    assert session.provider == "CPUExecutionProvider"


def test_a_prior_takes_no_z(exported_prior, x0):
    session = Session(exported_prior, threads=1)
    recipe = Recipe(steps=STEPS, encode_steps=ENCODE_STEPS)
    pipe = Pipeline(tiny_prior(), recipe, device="cpu", dtype="float32", plan="eager")
    x_T = pipe.invert(torch.from_numpy(x0))
    assert relative(session.invert(x0), x_T) < 1e-5
    assert relative(session.reconstruct(x0), pipe.decode(x_T=x_T)) < 1e-4
    assert session.decode(count=2, seed=1).shape == (2, 1, 32, 32)
    with pytest.raises(UserError, match="encode needs a PDAE"):
        session.encode(x0)
    with pytest.raises(UserError, match="takes no z"):
        session.decode(np.zeros((1, 16), np.float32))


def test_half_precision_is_near(exported_half, session, x0):
    z = session.encode(x0)
    half = Session(exported_half, threads=1)
    assert 1e-6 < relative(half.encode(x0), z) < 5e-3
    assert 1e-6 < relative(half.decode(z, x0), session.decode(z, x0)) < 2e-2


def test_the_single_file_graph_computes_the_same(exported, session, x0):
    out = session.backend.run("reconstruct", {"x0": x0})
    assert relative(out["x"], session.reconstruct(x0)) < 1e-4
    assert relative(out["z"], session.encode(x0)) < 1e-6
    # One file means one: it loads from a directory that holds nothing else.
    assert json.loads((exported / "manifest.json").read_text())["graphs"]["reconstruct"]["external"] == []


def test_single_file_loads_alone(exported, tmp_path, session, x0):
    shutil.copy(exported / "reconstruct.onnx", tmp_path)
    alone = ort.InferenceSession(str(tmp_path / "reconstruct.onnx"), providers=["CPUExecutionProvider"])
    assert relative(alone.run(["x"], {"x0": x0[:2]})[0], session.reconstruct(x0[:2])) < 1e-4


def test_splitting_a_batch_changes_nothing(exported, session, x0):
    one = Session(exported, threads=1, batch_size=1)
    assert one.batch_size == 1 and session.batch_size == MAX_BATCH < len(x0)
    z = session.encode(x0)
    assert relative(one.encode(x0), z) < 1e-6
    assert relative(one.decode(z, seed=4), session.decode(z, seed=4)) < 1e-4


def test_noise_belongs_to_seed_and_image(session, x0):
    z = session.encode(x0)
    everything = session.decode(z, seed=2)
    assert np.array_equal(noise(2, range(1, 3), (4, 5)), noise(2, range(0, 4), (4, 5))[1:3])
    assert relative(session.decode(z[1:3], seed=2, first=1), everything[1:3]) < 1e-4
    assert relative(session.decode(z, seed=3), everything) > 0.1
    draws = noise(0, range(64), (32, 32))
    assert draws.dtype == np.float32 and abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02
    assert noise(0, range(0), (2, 2)).shape == (0, 2, 2)


def test_noise_as_the_model_says(session, x0, monkeypatch):
    z = session.encode(x0)
    drawn = noise(2, range(len(z)), x0.shape[1:], "standardised").astype(np.float64)
    np.testing.assert_allclose(drawn.mean((2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(drawn.std((2, 3)), 1, rtol=1e-6)
    normal = session.decode(z, seed=2)
    monkeypatch.setitem(session.manifest, "noise", "standardised")
    assert relative(session.decode(z, drawn.astype(np.float32)), session.decode(z, seed=2)) < 1e-6
    assert relative(normal, session.decode(z, seed=2)) > 1e-3
    monkeypatch.delitem(session.manifest, "noise")  # an export from before there was a choice
    assert np.array_equal(session.decode(z, seed=2), normal)


def test_loop_leaves_its_input_alone_and_repeats(session, x0):
    z = session.encode(x0)
    before = x0.copy()
    first = session.invert(x0, z)
    assert np.array_equal(x0, before)
    # Nothing of an earlier run may be left in a buffer, and results must survive the next run.
    kept = first.copy()
    session.invert(x0[::-1].copy(), z)
    assert np.array_equal(first, kept) and np.array_equal(session.invert(x0, z), kept)


def test_loop_is_repeated_run(session, x0):
    conditioning = session.backend.run("conditioning", {"z": session.encode(x0)})["conditioning"]
    x = x0
    for i in range(3):
        step = np.array([i], np.int64)
        x = session.backend.run("decode_step", {"x": x, "conditioning": conditioning, "step": step})["x_next"]
    assert np.array_equal(session.backend.loop("decode_step", x0, conditioning, 3), x)
    super_loop = super(type(session.backend), session.backend).loop
    assert np.array_equal(super_loop("decode_step", x0, conditioning, 3), x)


MISTAKES = [
    (lambda s, x: s.encode(x[0]), r"x0 has shape \[1, 32, 32\]; .* \[N, 1, 32, 32\]"),
    (lambda s, x: s.encode(x[:, :, :16]), r"x0 has shape \[4, 1, 16, 32\]"),
    (lambda s, x: s.encode(x.tolist()), "x0 has shape list"),
    (lambda s, x: s.encode(x.astype(np.uint8)), "x0 has dtype uint8"),
    (lambda s, x: s.encode(x * np.nan), "x0 holds NaN"),
    (lambda s, x: s.invert(x), "z has shape NoneType"),
    (lambda s, x: s.invert(x, np.zeros((2, 16), np.float32)), r"z has shape \[2, 16\]; expected an array \[4, 16\]"),
    (lambda s, x: s.decode(np.zeros((2, 9), np.float32)), r"z has shape \[2, 9\]; expected an array \[N, 16\]"),
    (lambda s, x: s.decode(np.full((2, 16), np.inf)), "z must hold finite"),
    (lambda s, x: s.decode(np.zeros((2, 16)), x), r"disagree on the number of images: \[2, 4\]"),
    (lambda s, x: s.decode(np.zeros((4, 16)), x[:, :, 1:]), "x_T has shape"),
    (lambda s, x: s.backend.run("nothing", {}), "no graph 'nothing'"),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES)
def test_mistakes_are_named(session, x0, call, words):
    with pytest.raises(UserError, match=words):
        call(session, x0)


def test_empty_batch(session):
    nothing = np.empty((0, 1, 32, 32), np.float32)
    assert session.encode(nothing).shape == (0, 16) and session.reconstruct(nothing).shape == nothing.shape


SETTINGS = [
    ({"provider": "magic"}, "provider 'magic' is not known; expected one of auto, cpu, cuda"),
    ({"provider": "cuda"}, "provider 'cuda' is not part of this onnxruntime"),
    ({"provider": "CUDAExecutionProvider"}, "is not part of this onnxruntime"),
    ({"backend": "tensorrt"}, "made for onnxruntime, so backend 'tensorrt' cannot run it"),
    ({"backend": "magic"}, "backend 'magic' cannot run it; expected onnxruntime or openvino"),
    ({"threads": 0}, "threads must be at least 1"),
    ({"batch_size": 4}, "batch size 4: this export takes 1 to 3 images at a time"),
    ({"batch_size": 0}, "batch size 0"),
]


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
@pytest.mark.parametrize(("settings", "words"), SETTINGS, ids=[str(s) for s, _ in SETTINGS])
def test_settings_that_cannot_work(exported, settings, words):
    with pytest.raises(UserError, match=words):
        Session(exported, **settings)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_a_silent_fallback_is_an_error_unless_allowed(exported, monkeypatch, x0):
    """As on a machine whose onnxruntime is built for CUDA and whose driver is missing."""
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    with pytest.raises(UserError, match="asked for CUDAExecutionProvider, but .* CPUExecutionProvider"):
        Session(exported, provider="cuda").encode(x0)
    for options in ({"provider": "cuda", "allow_fallback": True}, {"provider": "auto"}):
        session = Session(exported, threads=1, **options)
        session.reconstruct(x0[:1])
        assert session.provider == "CPUExecutionProvider"


def test_bfloat16_needs_another_provider(exported_bfloat16):
    with pytest.raises(UserError, match="no bfloat16 convolution on the CPU; use provider cuda"):
        Session(exported_bfloat16)


def test_files_that_are_not_those_of_the_manifest(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    data = bytearray((copy / "step.weights").read_bytes())
    data[1000] ^= 1
    (copy / "step.weights").write_bytes(data)
    with pytest.raises(UserError, match="step.weights: its SHA-256 is not the one in manifest.json"):
        Session(copy)
    Session(copy, check_files=False)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="half-finished export"):
        Session(copy)


def test_a_broken_graph_is_one_line(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="encoder.onnx: ONNX Runtime cannot load it") as caught:
        Session(copy, check_files=False).encode(np.zeros((1, 1, 32, 32), np.float32))
    assert "\n" not in str(caught.value)


def test_onnxruntime_missing(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime cannot be imported.*pip install"):
        Session(exported)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "safetensors", "PIL", "tqdm"):
            raise ImportError(f"{name} is blocked in this process")
sys.meta_path.insert(0, Block())
import numpy as np
from pdae_fast.arguments import ImageRangeWarning
from pdae_fast.export.runtime import Session
directory, images, result, task = sys.argv[1:]
session, x0 = Session(directory, threads=1), np.load(images)
np.save(result, session.reconstruct(x0) if task == "reconstruct" else session.decode(session.encode(x0), x0))
assert "torch" not in sys.modules
try:
    import pdae_fast; pdae_fast.PDAE
except ImportError as error:
    assert "blocked" in str(error)
else:
    raise SystemExit("the block does not work")
"""


def without_torch(directory, images, folder, task):
    np.save(folder / "images.npy", images)
    arguments = [sys.executable, "-c", BLOCKED, directory, folder / "images.npy", folder / "result.npy", task]
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "result.npy")


def test_without_torch(exported, pipe, x0, tmp_path):
    """From images taken for x_T: a random network with few steps upward multiplies rounding beyond any tight bound."""
    x = torch.from_numpy(x0)
    expected = pipe.decode(pipe.encode(x), x)
    assert np.abs(without_torch(exported, x0, tmp_path, "decode") - expected.numpy()).max() < 1e-4


@pytest.mark.slow
def test_the_bundled_model_without_torch_after_100_steps(tmp_path):
    pytest.importorskip("onnx")
    from pdae_fast.export.onnx import ExportSettings, export_onnx

    model = PDAE.from_pretrained("fashion32")
    export_onnx(model, tmp_path / "exported", ExportSettings())
    x0 = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = Pipeline(model, "published", device="cpu", dtype="float32", plan="eager").reconstruct(x0)
    found = without_torch(tmp_path / "exported", x0.numpy(), tmp_path, "reconstruct")
    assert np.abs(found - expected.numpy()).max() < 1e-4


def test_openvino_runs_the_same_files(exported, exported_half, exported_bfloat16, session, x0):
    pytest.importorskip("openvino")
    z = session.encode(x0)
    expected = session.decode(z, x0)
    for directory, bound in ((exported, 1e-4), (exported_half, 2e-2), (exported_bfloat16, 0.2)):
        other = Session(directory, "openvino", threads=1)
        assert relative(other.encode(x0), z) < bound
        assert relative(other.decode(z, x0), expected) < bound
        assert other.provider == "OpenVINO CPU"
    with pytest.raises(UserError, match="OpenVINO has no device MAGIC"):
        Session(exported, "openvino", "magic")


def test_load_backend_defaults_to_what_the_directory_was_made_for(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert load_backend(exported, manifest).name == "onnxruntime"
    manifest["backend"] = "tensorrt"
    with pytest.raises(UserError, match="run on a GPU only, not on provider 'cpu'"):
        load_backend(exported, manifest, provider="cpu")


def test_another_image_size_and_head_layout(tmp_path):
    pytest.importorskip("onnx")
    from pdae_fast.export.onnx import ExportSettings, export_onnx

    unet = dataclasses.replace(TINY.unet, input_channel=3, learn_sigma=True, use_new_attention_order=True)
    config = dataclasses.replace(TINY, image_size=64, unet=unet, latent_dim=8)
    model = tiny_pdae(config)
    export_onnx(model, tmp_path / "out", ExportSettings(3, norm="instance", max_batch=1))
    x0 = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = Pipeline(model, "published", steps=3, device="cpu", dtype="float32", plan="eager").reconstruct(x0)
    assert relative(Session(tmp_path / "out", threads=1).reconstruct(x0.numpy()), expected) < 1e-4


def test_many_threads_share_a_session(exported, session, x0):
    inputs = [np.ascontiguousarray(x0[i % 3 :]) for i in range(8)]
    expected = [session.reconstruct(x) for x in inputs]
    fresh = Session(exported, threads=1)  # the graphs are loaded by whoever comes first
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(fresh.reconstruct, inputs))
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_copies_are_opened_anew(exported, session, x0, monkeypatch):
    monkeypatch.chdir(exported.parent)
    first = Session(exported.name, threads=1, batch_size=2)
    copies = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    monkeypatch.chdir("/")
    for other in copies:
        assert other.batch_size == 2 and other.backend is not first.backend
        assert relative(other.encode(x0), session.encode(x0)) < 1e-6


ARGUMENTS = [
    (lambda s, x: s.decode(np.zeros((1, 16)), seed=-1), "seed must be between 0 and 9223372036854775807, not -1"),
    (lambda s, x: s.decode(np.zeros((1, 16)), seed=2**63), "seed must be between"),
    (lambda s, x: s.decode(np.zeros((1, 16)), seed=None), "seed must be a whole number, not None"),
    (lambda s, x: s.decode(np.zeros((1, 16)), seed=1.0), "seed must be a whole number, not 1.0"),
    (lambda s, x: s.decode(np.zeros((1, 16)), first=-1), "first must be at least 0"),
    (lambda s, x: s.decode(np.zeros((1, 16)), count=1.0), "count must be a whole number"),
    (lambda s, x: s.decode(np.zeros((1, 16)), [x[0]]), "x_T has shape list"),
    (lambda s, x: s.encode(x * 127.5 + 127.5), r"images are in \[-1, 1\]: for 0 to 255 pass x / 127.5 - 1"),
    (lambda s, x: Session(s.directory, batch_size=2.0), "batch size must be a whole number"),
    (lambda s, x: Session(s.directory, threads=None, batch_size="2"), "batch size must be a whole number"),
    (lambda s, x: Session(s.directory, threads=1.5), "threads must be a whole number"),
    (lambda s, x: Session(None), "must be a path, not NoneType"),
]


@pytest.mark.parametrize(("call", "words"), ARGUMENTS, ids=[str(i) for i in range(len(ARGUMENTS))])
def test_arguments_are_checked(session, x0, call, words):
    with pytest.raises(UserError, match=words) as error:
        call(session, x0)
    assert "\n" not in str(error.value)


def test_whole_numbers_of_numpy_and_other_ranges(session, x0):
    z = session.encode(x0)
    one = session.decode(z, seed=np.int64(3), first=np.int32(1))
    assert np.array_equal(one, session.decode(z, seed=3, first=1))
    with pytest.warns(ImageRangeWarning, match="for 0 to 1 pass 2"):
        session.encode((x0 + 1) / 2)
