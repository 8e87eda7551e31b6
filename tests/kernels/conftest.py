"""How the kernel tests run the Triton kernels themselves.

With a CUDA device they are compiled and run on it. Without one they are interpreted on CPU tensors, which
Triton offers only to a process that sets TRITON_INTERPRET before Triton is first imported. So this file,
imported when pytest collects this folder, sets it, imports Triton and the kernel modules, and takes it away
again, and the `launch` fixture sets it for the length of one test: no other test, and no subprocess, ever
sees it.

Where Triton is not installed the tests that need it skip and say so; the CPU implementations are tested
anyway.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

CUDA = torch.cuda.is_available()
KERNEL_MODULES = (
    "group_norm_plan",
    "ddim_update_triton",
    "add_upsample_triton",
    "add_projected_triton",
    "float8_triton",
    "head_convolution_triton",
)


def _prepare() -> str | None:
    """Import the kernels for this process; the reason why they cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if CUDA:
        from pdae_fast.kernels import triton_status

        usable, reason = triton_status()
        return None if usable else reason
    if "triton" in sys.modules:
        return "triton was imported before tests/kernels was collected, without its interpreter"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TRITON_INTERPRET", "1")
        for module in KERNEL_MODULES:
            importlib.import_module(f"pdae_fast.kernels.{module}")
    return None


OBSTACLE = _prepare()


@pytest.fixture(scope="session")
def obstacle():
    """Why the kernels cannot run in this process, or None."""
    return OBSTACLE


@pytest.fixture(scope="session")
def interpreted():
    """True when kernels are interpreted: stores to bfloat16 truncate there instead of rounding."""
    return not CUDA


@pytest.fixture(scope="session")
def device():
    """The device the kernels run on."""
    return torch.device("cuda" if CUDA else "cpu")


def _multiply_bfloat16(monkeypatch):
    """Let the interpreter multiply values of bfloat16, which it keeps as bits: it would multiply those, as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))


@pytest.fixture
def launch(monkeypatch):
    """Run a list of kernel launches and wait for them; skips the test where the kernels cannot run."""
    if OBSTACLE is not None:
        pytest.skip(OBSTACLE)
    from pdae_fast.kernels import triton_status
    from pdae_fast.kernels._launch import run

    if not CUDA:
        triton_status()  # kept for the life of the process: not what it would be below
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        _multiply_bfloat16(monkeypatch)

    def run_and_wait(launches):
        run(launches)
        if CUDA:
            torch.cuda.synchronize()

    return run_and_wait


@pytest.fixture
def cuda(launch, monkeypatch):
    """cuda(module, name): the function an op runs for CUDA tensors, made to use its kernels, not to fall
    back."""

    def implementation(module, name):
        module = importlib.import_module(f"pdae_fast.kernels.{module}")
        monkeypatch.setattr(module, "fallback_reason", lambda *_images: None)
        return getattr(module, f"_{name}_cuda")

    return implementation


def _error(got, truth):
    truth = truth.detach().double().cpu()
    return ((got.detach().double().cpu() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.fixture(scope="session")
def error():
    """RMS(got - truth) / RMS(truth), in float64; NaN when any element was never written."""
    return _error


@pytest.fixture(scope="session")
def assert_no_worse(interpreted):
    """Hold a result to at most twice the framework's own error, both against a float64 truth.

    The floors are a fraction of the dtype's rounding step, for results the framework happens to hit exactly.
    """
    floors = {torch.float32: 3e-7, torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float64: 1e-15}

    def check(got, framework, truth):
        allowed = max(2 * _error(framework, truth), floors[got.dtype])
        if interpreted and got.dtype == torch.bfloat16:
            allowed *= 1.5  # truncation: RMS 0.58 of a step where rounding has 0.29
        measured = _error(got, truth)
        assert measured <= allowed, f"error {measured:.2e}, allowed {allowed:.2e}"

    return check


@pytest.fixture
def image(device):
    """make(shape, dtype, channels_last, mean, std): random images biased as network activations are."""
    generator = torch.Generator().manual_seed(2212)

    def make(shape, dtype=torch.float32, channels_last=False, mean=-2.3, std=0.5):
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return values.to(device).contiguous(memory_format=layout)

    return make


@pytest.fixture
def vector(device):
    """make(*shape): random float32 parameters."""
    generator = torch.Generator().manual_seed(12990)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


@pytest.fixture(scope="session")
def poisoned():
    """make(like, shape): an output full of NaN in the layout and dtype of `like`."""

    def make(like, shape=None, dtype=None):
        last = not like.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        shape = like.shape if shape is None else shape
        out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)
        return out.fill_(float("nan"))

    return make


def pytest_report_header():
    how = OBSTACLE or ("on the GPU" if CUDA else "interpreted on the CPU")
    return f"pdae_fast kernels: {how} (pid {os.getpid()})"


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiled(tmp_path):
    """Runs code in a process in which Triton compiles; the lines that it prints."""

    def run(code: str) -> list[str]:
        pytest.importorskip("triton")
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=inherited)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return run


MARGIN = 4096  # elements, on either side of a buffer


def _guarded(t):
    """A copy of ``t`` between margins of a canary value, and a function that says whether they are untouched."""
    canary = 123.25
    memory = torch.full((t.numel() + 2 * MARGIN,), canary, dtype=t.dtype)
    inner = memory[MARGIN:-MARGIN]
    layout = t.permute(0, 2, 3, 1) if t.ndim == 4 else t
    inner.copy_(layout.reshape(-1))
    found = inner.view(layout.shape)
    found = found.permute(0, 3, 1, 2) if t.ndim == 4 else found
    return found, lambda: bool((memory[:MARGIN] == canary).all() and (memory[-MARGIN:] == canary).all())


@pytest.fixture
def sanitised(tmp_path):
    """Runs code in a process whose native sources are built to end at the first fault; how many it built."""
    from pdae_fast.kernels import _native

    compiler = next(found for found in map(shutil.which, _native.COMPILERS) if found)
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("this compiler has no sanitisers")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"
    environment = {
        **os.environ, "LD_PRELOAD": ":".join(libraries), "CC": f"{compiler} {flags}",
        "XDG_CACHE_HOME": str(tmp_path), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2",
    }  # fmt: skip

    def run(code: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return len(list((tmp_path / "pdae_fast" / "native").glob("*.so")))

    return run


@pytest.fixture
def guarded():
    return _guarded
