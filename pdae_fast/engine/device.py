"""What "auto" means for devices and dtypes, and clear errors for what cannot run."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

import torch

from ..errors import UserError

LARGE_PARAMETERS = 16_000_000  # the paper's networks have 116 M and more, the bundled one 4 M
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the current CUDA device, else the CPU. A CUDA device comes back with its index: "cuda" is the current
    one. UserError when the device asked for is not usable."""
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device {device!r} is not known; expected auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            reason = "this PyTorch is a CPU build" if torch.version.cuda is None else "no usable GPU was found"
            raise UserError(f"device {device!r} cannot be used: {reason}; use --device cpu")
        if resolved.index is None:
            # "cuda" and "cuda:0" are not equal, and some calls take no device without an index.
            try:
                return torch.device("cuda", torch.cuda.current_device())
            except RuntimeError as error:  # the first call to the driver
                if in_forked_process(error):
                    raise UserError(f"{device} cannot be used in a forked process; start it by spawn") from None
                raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if resolved.index >= torch.cuda.device_count():
            raise UserError(f"device {device!r} does not exist; there are {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, parameters: int) -> torch.dtype:
    """What ``dtype`` means on ``device`` for a model of so many parameters.

    "auto" is bfloat16 where the device multiplies it natively and the networks are large, else float32, the reference:
    a small network is quick enough not to be rounded unasked. UserError for a dtype that ``device`` cannot compute in.
    """
    if dtype == "auto":
        native = parameters >= LARGE_PARAMETERS and has_native_bfloat16(device)
        return torch.bfloat16 if native else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise UserError(f"dtype {dtype!r} is not known; expected auto, {', '.join(DTYPES)}")
    if resolved is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"bfloat16 is not supported by {torch.cuda.get_device_name(device)}; use float16 or float32")
    return resolved


def _cpuinfo(key: str) -> str:
    """The first line of Linux's /proc/cpuinfo that starts with ``key``, its value; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return ""


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags").split()


@functools.cache
def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run on instructions of their own here; elsewhere it is converted, and slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.11
        return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(native) and torch.backends.mkldnn.is_available()


def note_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """A line on stderr where ``dtype`` is slower on ``device`` than float32."""
    on_gpu, has_onednn = device.type == "cuda", torch.backends.mkldnn.is_available()
    native = {
        torch.bfloat16: has_native_bfloat16(device),
        torch.float16: on_gpu or has_onednn and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if not native.get(dtype, True):
        name = str(dtype).removeprefix("torch.")
        print(f"note: {name} is slow on {describe_device(device)}: float32 is faster", file=sys.stderr)


def has_amx() -> bool:
    """Whether this processor multiplies tiles of bfloat16: several times as fast as its vectors do."""
    return "amx_bf16" in _cpu_flags()


def describe_device(device: torch.device) -> str:
    """A name for reports: the GPU's, or the processor's with its vectors and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    vectors = torch.backends.cpu.get_cpu_capability() + " and bfloat16" * has_native_bfloat16(device)
    return f"{_cpuinfo('model name') or 'CPU'}, {vectors}, {torch.get_num_threads()} threads"


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the CPU (where PyTorch has no class for it) or on CUDA."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _reserved_and_idle(device: torch.device) -> int:
    """Bytes that PyTorch has reserved and lent to nobody: free to it, if to no other process. What captured graphs hold
    is idle only in between."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for segment in torch.cuda.memory_snapshot():
        of_graphs = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        if of_graphs and segment["device"] == device.index:
            idle -= segment["total_size"] - segment["allocated_size"]
    return max(0, idle)


def available_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _reserved_and_idle(device)
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 << 30


_LAUNCHING = threading.RLock()
_last_stream: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def one_at_a_time(device: torch.device) -> Iterator[None]:
    """On the GPU ``device``, with no other thread launching, and after what was launched before on other streams."""
    with _LAUNCHING, torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        last = _last_stream.get(stream.device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        _last_stream[stream.device] = stream
        yield


def in_forked_process(error: BaseException) -> bool:
    """Whether ``error`` says that CUDA was used before the process was forked."""
    return "forked subprocess" in str(error)
