"""A student as one ONNX graph, checked against it: `python -m pdae_fast.export onnx --model DIR_OF_A_STUDENT`.

The directory holds student.onnx and a manifest.json that says what goes in and comes out; no runtime of this package is
needed: ``onnxruntime.InferenceSession("DIR/student.onnx").run(None, {"images": x})``.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import cli
from ..engine.device import DTYPES
from ..errors import UserError
from ..files import atomic_write
from ..models import Student
from . import manifest as manifests
from .graphs import FixedNorm, as_dtype, traced
from .staging import staged_directory

FORMAT, NAME = "pdae_fast-student-1", "student"
OUTPUTS = {"classes": "probabilities", "parts": "parts", "points": "points"}


class StudentGraph(nn.Module):
    """images [N, C, S, S] -> what `Student.predict` gives, or without a head the maps, the deepest first."""

    def __init__(self, model: Student, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.config = dtype, model.config
        self.stem = as_dtype(model.trunk.stem, dtype)
        self.levels = nn.ModuleList(
            nn.ModuleList(traced(block, dtype, form) for block in level) for level in model.trunk.levels
        )
        pyramid = model.pyramid
        self.lateral, self.up = (
            nn.ModuleList(as_dtype(layer, dtype) for layer in part) for part in (pyramid.lateral, pyramid.up)
        )
        self.mix = nn.ModuleList(traced(block, dtype, form) for block in pyramid.mix)
        if model.head is not None:
            self.norm, self.read = FixedNorm(model.head.norm, form), as_dtype(model.head.read, dtype)
            if model.config.head == "parts":
                self.norms = nn.ModuleList(FixedNorm(norm, form) for norm, _, _ in model.head.deeper)
                self.deeper = nn.ModuleList(as_dtype(read, dtype) for _, _, read in model.head.deeper)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        h, found = self.stem(images.to(self.dtype)), []
        for level in self.levels:
            for block in level:
                h = block(h)
            found.append(h)
        maps = [found[-1]]
        if self.config.head in (None, "parts"):
            for i in reversed(range(len(self.lateral))):
                up = F.interpolate(self.up[i](maps[-1]), scale_factor=2, mode="nearest")
                maps.append(self.mix[i](self.lateral[i](found[i]) + up))
        if self.config.head is None:
            return tuple(v.float() for v in maps)
        h, side = F.silu(self.norm(maps[-1])).to(self.dtype), self.config.image_size
        if self.config.head == "parts":
            deeper = zip(self.norms, self.deeper, maps[:-1], strict=True)
            read = [self.read(h), *(read(F.silu(norm(m)).to(self.dtype)) for norm, read, m in deeper)]
            return sum(F.interpolate(r.float(), size=(side, side), mode="bilinear") for r in read).argmax(1)
        if self.config.head == "classes":
            return self.read(h.mean((2, 3))).float().softmax(1)
        return (0.5 + self.read(h.flatten(1)).float().unflatten(1, (-1, 2))) * side


def is_student_export(directory: Path) -> bool:
    try:
        found = json.loads((directory / manifests.NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def signature(model: Student) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs, as the manifest lists them."""
    config, side = model.config, model.config.image_size
    inputs = [manifests.tensor_entry("images", "float32", ("N", *model.image_shape))]
    if config.head is None:
        shapes = zip(reversed(config.widths), reversed(config.sizes), strict=True)
        return inputs, [
            manifests.tensor_entry(f"map_{i}", "float32", ("N", w, s, s)) for i, (w, s) in enumerate(shapes)
        ]
    shape = {"classes": (len(config.labels),), "parts": (side, side), "points": (len(config.labels), 2)}[config.head]
    dtype = "int64" if config.head == "parts" else "float32"
    return inputs, [manifests.tensor_entry(OUTPUTS[config.head], dtype, ("N", *shape))]


def export_student(model: Student, out: str | Path, settings: Any, source: dict[str, Any] | None = None) -> dict:
    """Write ``model`` to the directory ``out`` (an earlier export of a student is replaced) and return its manifest.

    settings: ExportSettings, of which dtype, opset and norm are used. Raises UserError for what else is set, and where
    the graph differs from the model by more than its dtype explains.
    """
    from . import _tracing

    for name in ("features", "label"):
        if getattr(settings, name) is not None:
            raise UserError(f"--{name} is for a diffusion model, not for a student")
    for name in ("single_file", "verify"):
        if getattr(settings, name):
            raise UserError(f"--{name.replace('_', '-')} is for a diffusion model, not for a student")
    if settings.dtype == "bfloat16":
        raise UserError("a student is exported in float32 or float16: ONNX Runtime's CPU has no bfloat16 convolution")
    model = model.eval()
    inputs, outputs = signature(model)
    seed = secrets.randbits(32)
    with staged_directory(out, is_student_export) as directory:
        path = directory / f"{NAME}.onnx"
        with torch.no_grad():
            graph = StudentGraph(model, DTYPES[settings.dtype], settings.norm).eval()
        _tracing.save(_tracing.trace(graph, inputs, outputs, settings.opset), path)
        _tracing.check(path)
        manifest = {
            "format": FORMAT,
            "student": dataclasses.asdict(model.config),
            "dtype": settings.dtype,
            "opset": settings.opset,
            "model": source or {"name": type(model).__name__},
            "versions": cli.versions(),
            "parity": {"seed": seed, **_parity(model, path, settings.dtype, seed)},
            "graph": manifests.graph_entry(path, inputs, outputs),
        }
        with atomic_write(directory / manifests.NAME, "w") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _parity(model: Student, path: Path, dtype: str, seed: int) -> dict[str, Any]:
    """Largest relative error of one image and of three; of parts the share of pixels that differ."""
    import onnxruntime

    from ._parity import BOUNDS, refuse

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random, worst = torch.Generator().manual_seed(seed), 0.0
    for count in (1, 3):
        images = torch.rand(count, *model.image_shape, generator=random) * 2 - 1
        found = session.run(None, {"images": images.numpy()})
        known = model.features(images) if model.head is None else [model.predict(images)]
        for a, b in zip(found, known, strict=True):
            a, b = torch.from_numpy(a).double(), b.double()
            error = (a != b).double().mean() if model.config.head == "parts" else (a - b).norm() / b.norm()
            worst = max(worst, float(error)) if bool(torch.isfinite(error)) else float("inf")
    # Pixels between two parts may fall to either by rounding.
    bound = 0.02 if model.config.head == "parts" else BOUNDS[dtype]
    report = {"relative_error": worst, "bound": bound}
    refuse({NAME: report})
    return report
