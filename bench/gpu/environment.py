"""Phase "environment": what is here, what is missing, and the machine's two ceilings."""

from __future__ import annotations

import importlib.util
import subprocess
from typing import Any

import torch

from bench.machine import copy_bandwidth, describe, matmul_peak
from pdae_fast.kernels import triton_status

from .cases import Cases, Context, Skip

# All that the script assumes, and what it does without.
NEEDED = {"torch": "everything", "numpy": "everything", "safetensors": "everything", "PIL": "the quality phase",
          "tqdm": "everything"}  # fmt: skip
OPTIONAL = {"triton": "the kernels", "pytest": "the kernels' own tests", "xformers": "one attention backend"}


def cases(context: Context) -> Cases:
    yield "versions", lambda: {"status": "INFO", **describe(context.device)}
    yield "packages", _packages
    yield "triton", lambda: _triton(context)
    yield "device", lambda: _device(context)
    kinds = ("bfloat16", "float16", "tf32", "float32") if context.cuda else ("bfloat16", "float32")
    size = 512 if context.quick else None
    for kind in kinds:
        yield f"matmul {kind}", lambda kind=kind: _rate("FLOP/s", matmul_peak(context.device, kind, size))
    yield "copy", lambda: _rate("B/s", copy_bandwidth(context.device, 16 << 20 if context.quick else None))


def _rate(unit: str, value: float) -> dict[str, Any]:
    return {"status": "INFO", "table": "peak", "rate": value, "unit": unit}


def _packages() -> list[dict[str, Any]]:
    rows = []
    for package, use in (NEEDED | OPTIONAL).items():
        if importlib.util.find_spec(package) is None:
            status = "FAIL" if package in NEEDED else "SKIP"
            rows.append({"status": status, "reason": f"{package} is not installed; without it: {use} cannot run"})
    return rows or [{"status": "PASS"}]


def _triton(context: Context) -> dict[str, Any]:
    usable, reason = triton_status()
    if not context.cuda:
        raise Skip(reason)
    return {"status": "PASS" if usable else "FAIL", "reason": reason}


def _device(context: Context) -> dict[str, Any]:
    if not context.cuda:
        raise Skip("no CUDA device")
    properties = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        state = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        state = f"nvidia-smi: {error}"
    return {
        "status": "INFO",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver, clocks, power, temperature": state,
    }
