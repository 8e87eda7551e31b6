"""What the manifest and the terminal say of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoints, cli
from ..models import PDAE, Prior
from ..schedule import build_schedule
from . import manifest as manifests
from .graphs import conditioning_width

if TYPE_CHECKING:
    from .onnx import Settings


def source(name: str) -> dict[str, Any]:
    """The model's name without its folder, and the hash of its weights' file."""
    bundled = name in checkpoints.available()
    path = checkpoints.directory.BUNDLED / name if bundled else Path(name).expanduser().resolve()
    file = path / checkpoints.directory.WEIGHTS_NAME if path.is_dir() else path
    return {"name": path.name, "file": file.name, **manifests.file_entry(file)}


def describe(
    model: PDAE | Prior, settings: Settings, encode_steps: int, source: dict[str, Any] | None
) -> dict[str, Any]:
    """The manifest as far as it is known before anything is written."""
    import onnx
    import onnxruntime
    import onnxscript

    schedule = build_schedule(model.config.schedule)
    decode, invert = schedule.timesteps(settings.steps), schedule.timesteps(encode_steps)
    pdae = isinstance(model, PDAE)
    return {
        "backend": "onnxruntime",
        "kind": "pdae" if pdae else "prior",
        "image_shape": list(model.image_shape),
        "latent_dim": model.config.latent_dim if pdae else None,
        "conditioning_width": conditioning_width(model),
        "noise": model.config.noise,
        "dtype": settings.dtype,
        # Rounding to whole time points can merge some: 1000 steps asked for are 999 to run.
        "steps": len(decode) - 1,
        "encode_steps": len(invert) - 1,
        "requested_steps": settings.steps,
        "requested_encode_steps": encode_steps,
        "opset": settings.opset,
        "norm": settings.norm,
        "max_batch": settings.max_batch,
        "schedule": {
            **dataclasses.asdict(model.config.schedule),
            "decode_times": decode[::-1].tolist(),
            "invert_times": invert.tolist(),
        },
        "model": source or {"name": type(model).__name__},
        "versions": {
            **cli.versions(),
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "graphs": {},
        "files": {},
    }


def entry(directory: Path, graph: str, manifest: dict[str, Any], external: list[str]) -> dict[str, Any]:
    path = directory / f"{graph}.onnx"
    signature = manifests.signature(
        graph, manifest["image_shape"], manifest["latent_dim"], manifest["conditioning_width"]
    )
    return {**manifests.graph_entry(path, *signature), "external": external}


def summary(out: str, manifest: dict[str, Any], model: PDAE | Prior, seconds: float) -> str:
    rows = []
    for name, entry in manifest["graphs"].items():
        errors = manifest["parity"][name]
        rows.append(
            [name, entry["file"], _size(entry["bytes"]), f"{errors['relative_error']:.1e}", f"{errors['bound']:.0e}"]
        )
    rows += [["", name, _size(entry["bytes"]), "", ""] for name, entry in manifest["files"].items()]
    lines = [cli.table(["graph", "file", "size", "error", "allowed"], rows, left=2)]
    if "all_steps" in manifest["parity"]:
        errors = manifest["parity"]["all_steps"]
        lines.append(
            f"verified: a whole reconstruction differs from the model's by {errors['relative_error']:.1e} (relative)"
        )
    if "note" in manifest["parity"]:
        lines.append(f"errors {manifest['parity']['note']}")
    lines += [f"assumed about the model: {note}" for note in model.notes]
    lines.append(
        f"wrote {out}: {manifest['kind']}, {manifest['encode_steps']} steps up and {manifest['steps']} down, "
        f"{manifest['dtype']}, opset {manifest['opset']}, at most {manifest['max_batch']} images at a time, "
        f"in {seconds:.0f} s"
    )
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
