"""What the machine under a bench can do at best, what it is, and how much memory something takes."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator

import torch

from pdae_fast import __version__
from pdae_fast.engine.device import describe_device, has_native_bfloat16

from . import ROOT
from .timing import clock, spread

PARENT = "BENCH_PARENT"


def child_environment(**more: str) -> dict[str, str]:
    """For a process that calls `end_with_parent`: it knows this one even where this one is gone before it asks."""
    return {**os.environ, PARENT: str(os.getpid()), **more}


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that dies; also where another one, which it only
    asked to start this one, stands between them."""
    between = os.getppid()
    parent = int(os.environ.pop(PARENT, between))

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while os.getppid() == between:
                os.kill(parent, 0)
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def worth_timing(names: Iterable[str], device: torch.device) -> list[str]:
    """``names`` without those in bfloat16 where ``device`` has no instructions for it: the framework takes minutes."""
    return [name for name in names if "bfloat16" not in name or has_native_bfloat16(device)]


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions on CUDA."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def matmul_peak(device: torch.device, kind: str, size: int | None = None, repeats: int = 7) -> float:
    """FLOP/s of a square matrix product on random data, median of ``repeats`` after two warm-ups. ``kind`` is a dtype's
    name, or "tf32": float32 numbers through the matrix units of a CUDA device."""
    n = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    with tf32(kind == "tf32"):
        times = [clock(lambda: a @ b, device)[0] for _ in range(repeats + 2)]
    return 2 * n**3 / spread(times[2:]).median


def copy_bandwidth(device: torch.device, size: int | None = None, repeats: int = 7) -> float:
    """Bytes/s, read plus written, of a copy much larger than any cache (``size`` bytes): median."""
    size = size or (4 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source), device)[0] for _ in range(repeats + 2)]
    return 2 * size / spread(times[2:]).median


class PeakMemory:
    """``with PeakMemory(device) as memory: ...``: then ``memory.bytes`` is how far the block raised what was in use:
    PyTorch's allocations on CUDA, the process's resident memory on the CPU (None where the system cannot tell)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            _release_freed_memory()
            self.before = _reset_resident_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.before is not None:
            peak = _status("VmHWM")
            self.bytes = None if peak is None else max(0, peak - self.before)


def _status(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def _reset_resident_peak() -> int | None:
    """Resident bytes now, the kernel's high-water mark set back to them; None where that is not possible."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _release_freed_memory() -> None:
    """What earlier contenders freed must not hide what the next one takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit that is checked out, with "+changes" when files differ from it; "unknown" without git."""
    head = _git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, str]:
    """Everything a number has to be read with."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "device": describe_device(device),
        "kind": device.type,
        "pdae_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("triton", "numpy", "xformers"):
        facts[package] = version_of(package) or "none"
    if device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return facts
