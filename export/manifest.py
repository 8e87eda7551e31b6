"""manifest.json: what an exported directory holds, and the only thing that says it is complete.

An exported directory holds the graphs (or engines), files they refer to (shared weights), and this manifest, which is
written last: a directory without one is half-finished. Every other file is listed with its size and SHA-256.

Graphs of ``kind`` "pdae" or "diffae" (a "prior" has only the last two, without the input ``conditioning``):

    encoder       x0 [N, C, H, W]                                                 -> z [N, D]
    conditioning  z [N, D]                                                        -> conditioning [N, 2, M]
    decode_step   x [N, C, H, W], conditioning [N, 2, M], step int64 [1]          -> x_next [N, C, H, W]
    invert_step   x [N, C, H, W], conditioning [N, 2, M], step int64 [1]          -> x_next [N, C, H, W]
    reconstruct   x0 [N, C, H, W] (optional, the loops inside)                    -> x [N, C, H, W], z [N, D]

All tensors are float32 but ``step``, which runs 0, 1, ... in order of execution: ``steps`` of them decode,
``encode_steps`` of them invert. This module imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import NOISES
from ..errors import UserError
from ..files import atomic_write

FORMAT = "pdae_fast-export-1"
NAME = "manifest.json"
DIGEST = "manifest_sha256"
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
GRAPHS = {
    "pdae": ("encoder", "conditioning", "decode_step", "invert_step"),
    "diffae": ("encoder", "conditioning", "decode_step", "invert_step"),
    "prior": ("decode_step", "invert_step"),
}
RECONSTRUCT = "reconstruct"
# Fields that every reader relies on, with their types; more may be there.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "backend": str,
    "kind": str,
    "image_shape": list,
    "latent_dim": (int, type(None)),
    "conditioning_width": (int, type(None)),
    "dtype": str,
    "steps": int,
    "encode_steps": int,
    "max_batch": int,
    "graphs": dict,
    "files": dict,
}


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        state = hashlib.sha256()
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def file_entry(path: str | Path) -> dict[str, Any]:
    """What the manifest says of one file: its SHA-256 and its size in bytes."""
    return {"sha256": digest(path), "bytes": Path(path).stat().st_size}


def tensor_entry(name: str, dtype: str, shape: Sequence[int | str]) -> dict[str, Any]:
    """One input or output; ``dtype`` in numpy's words, dynamic dimensions by name ("N")."""
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def dims(shape: Iterable[int | str]) -> list[int]:
    """A shape of the manifest as libraries write it: dynamic dimensions as -1."""
    return [size if isinstance(size, int) else -1 for size in shape]


def graph_entry(path: str | Path, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of one graph; ``inputs`` and ``outputs`` are :func:`tensor_entry` values."""
    return {"file": Path(path).name, **file_entry(path), "inputs": inputs, "outputs": outputs}


def signature(
    graph: str, image_shape: Sequence[int], latent_dim: int | None, width: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs that ``graph`` has by the table above; ``latent_dim`` and ``width`` None for a prior."""
    image = ("N", *image_shape)
    if graph == "encoder":
        return [tensor_entry("x0", "float32", image)], [tensor_entry("z", "float32", ("N", latent_dim))]
    conditioning = [tensor_entry("conditioning", "float32", ("N", 2, width))]
    if graph == "conditioning":
        return [tensor_entry("z", "float32", ("N", latent_dim))], conditioning
    if graph == RECONSTRUCT:
        z = [] if latent_dim is None else [tensor_entry("z", "float32", ("N", latent_dim))]
        return [tensor_entry("x0", "float32", image)], [tensor_entry("x", "float32", image), *z]
    if graph not in ("decode_step", "invert_step"):
        raise ValueError(f"no graph is called {graph!r}")
    step = tensor_entry("step", "int64", (1,))
    inputs = [tensor_entry("x", "float32", image), *(conditioning if width is not None else []), step]
    return inputs, [tensor_entry("x_next", "float32", image)]


def graph_path(directory: str | Path, manifest: dict[str, Any], graph: str) -> Path:
    """Where the file of ``graph`` is; UserError when there is no such graph."""
    if graph not in manifest["graphs"]:
        raise UserError(f"{directory}: no graph {graph!r} in this export")
    return Path(directory) / manifest["graphs"][graph]["file"]


def names_file(entry: Any, name: str | None = None) -> bool:
    """Whether ``entry`` names a file (``name`` where it does not say), its hash and its size.

    A manifest must not lead a reader out of its own directory.
    """
    file = entry.get("file", name) if isinstance(entry, dict) else None
    return isinstance(file, str) and Path(file).name == file and {"sha256", "bytes"} <= set(entry)


def write(directory: str | Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest``, with its format and its own digest; call it when all other files are in place."""
    content = {**manifest, "format": FORMAT}
    content[DIGEST] = _own_digest(content)
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(Path(directory) / NAME, "w") as file:
        file.write(text + "\n")


def read(directory: str | Path, backends: Iterable[str] = BACKENDS) -> dict[str, Any]:
    """The manifest of an exported directory; files are not hashed yet (see :func:`check_files`).

    Raises UserError for a directory that is missing, half-finished, not an export, of another format, or made for a
    backend that is not among ``backends``.
    """
    directory, backends = Path(directory), tuple(backends)
    if not directory.is_dir():
        what = "a file" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {what}; expected a directory written by python -m pdae_fast.export")
    path = directory / NAME
    if not path.is_file():
        raise UserError(
            f"{directory}: no {NAME} in it, so it is a half-finished export or none at all; export once more"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); export once more") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r}; this version reads {FORMAT!r}")
    _check_fields(manifest, path)
    if manifest["backend"] not in backends:
        raise UserError(f"{directory}: made for {manifest['backend']}; expected {' or '.join(backends)}")
    if manifest.get(DIGEST) != _own_digest(manifest):
        raise UserError(
            f"{path}: its content does not match its own {DIGEST}: edited after the export; export once more"
        )
    return manifest


def _own_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything the manifest says but this."""
    content = {name: value for name, value in manifest.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_export(directory: str | Path) -> bool:
    """Whether ``directory`` holds a complete export of any backend, readable by this version."""
    try:
        read(directory)
    except UserError:
        return False
    return True


def check_files(directory: str | Path, manifest: dict[str, Any], graphs: Iterable[str] | None = None) -> None:
    """Raise UserError unless every listed file is there with its recorded size and SHA-256.

    ``graphs``: only the files of these graphs and the shared ones; None: everything.
    """
    directory = Path(directory)
    chosen = manifest["graphs"] if graphs is None else {name: manifest["graphs"][name] for name in graphs}
    entries = {entry["file"]: entry for entry in chosen.values()} | manifest["files"]
    for name, entry in entries.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though {NAME} lists it; export once more")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, but {NAME} says {entry['bytes']}: truncated or edited after "
                "the export; export once more"
            )
        if digest(path) != entry["sha256"]:
            raise UserError(f"{path}: its SHA-256 is not the one in {NAME}: edited after the export; export once more")


def _check_fields(manifest: dict[str, Any], path: Path) -> None:
    for name, kind in _FIELDS.items():
        if name not in manifest:
            raise UserError(f"{path}: no field {name!r}; edited after the export? export once more")
        value = manifest[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {name} is {value!r}, which no export writes; export once more")
    if manifest["kind"] not in GRAPHS:
        raise UserError(f"{path}: kind {manifest['kind']!r}; expected {' or '.join(GRAPHS)}")
    missing = [name for name in GRAPHS[manifest["kind"]] if name not in manifest["graphs"]]
    if missing:
        raise UserError(f"{path}: no graph {', '.join(missing)}; export once more")
    if manifest.get("noise", NOISES[0]) not in NOISES:
        raise UserError(f"{path}: noise {manifest['noise']!r}; expected {' or '.join(NOISES)}")
    shape = manifest["image_shape"]
    if len(shape) != 3 or not all(isinstance(v, int) and v > 0 for v in shape):
        raise UserError(f"{path}: image_shape is {shape!r}; expected [C, H, W]")
    for name in ("steps", "encode_steps", "max_batch"):
        if manifest[name] < 1:
            raise UserError(f"{path}: {name} is {manifest[name]}; expected at least 1")
    for name, entry in [*manifest["graphs"].items(), *manifest["files"].items()]:
        if not names_file(entry, name):
            raise UserError(f"{path}: the entry of {name!r} names no file with its hash and size; export once more")
