"""What this machine can run, and why not: `python -m pdae_fast.info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import torch

from . import cli
from .checkpoints import available
from .engine.attention import probe_xformers
from .engine.device import LARGE_PARAMETERS, describe_device, has_native_bfloat16, resolve_device
from .kernels import (
    attention_status,
    float8_obstacle,
    native_status,
    pointwise_status,
    triton_status,
    winograd_status,
)
from .models import PDAE

# Distribution names that provide a backend, and the line that installs it.
BACKENDS = {
    "triton": (("triton",), "pip install 'pdae_fast[gpu]'"),
    "xformers": (("xformers",), "pip install 'pdae_fast[xformers]'"),
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "pip install 'pdae_fast[onnx]'"),
    "openvino": (("openvino",), "pip install 'pdae_fast[openvino]'"),
    "tensorrt": (("tensorrt",), "pip install 'pdae_fast[tensorrt]'"),
    "tensorrt_rtx": (("tensorrt-rtx-cu13", "tensorrt-rtx"), "pip install 'pdae_fast[tensorrt-rtx]'"),
    "tensorboard": (("tensorboard",), "pip install 'pdae_fast[train]'"),
    "yaml": (("pyyaml",), "pip install 'pdae_fast[convert]'"),
}


def _check_triton() -> str | None:
    usable, reason = triton_status()
    return None if usable else reason


def _check_xformers() -> str | None:
    return probe_xformers(torch.device("cuda"), torch.float16, (1, 256, 4, 64))[0]


# Backends that an import does not prove: what runs them once, and says why they do not run.
CHECKS = {"triton": _check_triton, "xformers": _check_xformers}


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def backends() -> list[tuple[str, str, str]]:
    """(name, "usable" or "no", version or the reason) of every optional backend."""
    native = {
        "norms": native_status(), "convolutions": winograd_status(), "1x1 convolutions": pointwise_status(),
        "attention": attention_status(),
    }  # fmt: skip
    rows = [(f"native {name}", "usable" if usable else "no", reason) for name, (usable, reason) in native.items()]
    rows.append(
        ("fp8 kernels", "no", f"--fp8 is emulated: {float8_obstacle() or 'they are off until a GPU has run them'}")
    )
    for module, (names, install) in BACKENDS.items():
        version = _version(names)
        if version is None or importlib.util.find_spec(module) is None:
            rows.append((module, "no", f"not installed: {install}"))
        elif module in CHECKS and torch.cuda.is_available():
            reason = CHECKS[module]()
            rows.append((module, "no" if reason else "usable", reason or version))
        elif module in ("triton", "xformers", "tensorrt", "tensorrt_rtx") and not torch.cuda.is_available():
            rows.append((module, "no", f"{version} is installed, but running it needs a CUDA device"))
        else:
            rows.append((module, "usable", version))
    return rows


def _cuda() -> str:
    if torch.version.cuda is None:
        return "no: this PyTorch is a CPU build"
    if not torch.cuda.is_available():
        return f"no: PyTorch is built for CUDA {torch.version.cuda}, but no usable GPU was found"
    names = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    return f"CUDA {torch.version.cuda}: {names}"


def main(argv: list[str] | None = None) -> None:
    cli.parser("info", "Versions, devices, usable backends and bundled models.").parse_args(argv)
    print(", ".join(f"{name} {version}" for name, version in cli.versions().items()))
    print(f"cpu   {describe_device(torch.device('cpu'))}")
    print(f"cuda  {_cuda()}")
    device = resolve_device("auto")
    large = "bfloat16" if has_native_bfloat16(device) else "float32"
    print(f"auto  device {device}, dtype float32, {large} for networks from {LARGE_PARAMETERS // 10**6} M parameters")
    print()
    print(cli.table(["backend", "state", ""], [[n, s, d] for n, s, d in backends()], left=3))
    print()
    print("bundled models:")
    for name in available():
        model = PDAE.from_pretrained(name)
        channels, size, _ = model.image_shape
        count = sum(p.numel() for p in model.parameters())
        print(f"  {name}: {channels}x{size}x{size}, z {model.config.latent_dim}, {count / 1e6:.1f} M parameters")
    if not available():
        print("  none")


if __name__ == "__main__":
    sys.exit(cli.run(main))
