"""Whether Triton kernels can run here.

Nothing in this file imports Triton when it is itself imported: Triton costs a third of a second, is absent
from CPU-only installations, and must see TRITON_INTERPRET before its first import when the tests ask for the
interpreter.
"""

from __future__ import annotations

import functools
import os

import torch

from ._launch import run

MIN_CAPABILITY = (8, 0)  # the ahead-of-time check (aot.py) holds the kernels to a budget from here up
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Offsets inside one image are 32-bit; image offsets are 64-bit. Grid axes y and z end at 65535.
MAX_IMAGE_ELEMENTS = 2**31 - 2**20  # room for the masked tail of the last tile
MAX_GRID_AXIS = 65535


@functools.cache
def triton_status() -> tuple[bool, str]:
    """(usable, reason): can Triton kernels run on this machine's current CUDA device?

    The first call imports Triton and launches a kernel of one program, because an installed Triton can still
    be unable to run (no C compiler for its launcher, a driver older than its PTX); the answer is kept for the
    life of the process. `reason` is one line for a person, also when usable.

    That first call reads the probe's result back, which a stream that captures a CUDA graph does not allow: call
    this, or any op on a CUDA tensor, before capturing. Each kernel, too, must have run once on arguments of the
    same shapes and dtypes before: compiling and loading it are no part of a graph either.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        return False, "TRITON_INTERPRET is set: kernels would be interpreted on the CPU"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.version.hip is not None:
        return False, "the kernels are built and checked for NVIDIA devices only"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return False, "compute capability {}.{} is below {}.{}".format(*capability, *MIN_CAPABILITY)
    try:
        import triton
    except Exception as error:  # noqa: BLE001 - a broken wheel raises other things than ImportError
        return False, f"triton cannot be imported: {_first_line(error)}"
    try:
        from .add_upsample_triton import upsample_launches

        probe = torch.ones(1, 1, 1, 2, dtype=torch.float32, device="cuda")
        out = torch.empty(1, 1, 2, 4, dtype=torch.float32, device="cuda")
        run(upsample_launches(probe, probe, out))
        if out.flatten().tolist() != [2.0] * 8:
            return False, f"triton {triton.__version__}: the probe kernel returned a wrong result"
    except Exception as error:  # noqa: BLE001 - a compiler, linker or driver may be at fault
        return False, f"triton {triton.__version__}: the probe kernel failed: {_first_line(error)}"
    return True, f"triton {triton.__version__}, {torch.cuda.get_device_name()}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def fallback_reason(*images: torch.Tensor) -> str | None:
    """Why the Triton path cannot take these [B, C, H, W] tensors (same device), or None when it can."""
    for image in images:
        if image.dtype not in KERNEL_DTYPES:
            return f"dtype {image.dtype} has no kernel"
        if image.shape[0] > MAX_GRID_AXIS:
            return f"batch {image.shape[0]} exceeds the grid"
        if image.numel() == 0:
            return "empty tensor"
        if image.numel() // image.shape[0] > MAX_IMAGE_ELEMENTS:
            return "an image is too large for 32-bit offsets"
    usable, reason = triton_status()
    return None if usable else reason
