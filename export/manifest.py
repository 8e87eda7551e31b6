"""manifest.json: what an exported directory holds, and the only thing that says it is complete.

An exported directory holds the graphs (or engines), files they refer to (shared weights), and this manifest, which is
written last: a directory without one is half-finished. Every other file is listed with its size and SHA-256.

Graphs of ``kind`` "pdae" or "diffae" (a "prior" has only the last two, without the input ``conditioning``):

    encoder       x0 [N, C, H, W]                                                 -> z [N, D]
    conditioning  z [N, D]                                                        -> conditioning [N, 2, M]
    decode_step   x [N, C, H, W], conditioning [N, 2, M], step int64 [1]          -> x_next [N, C, H, W]
    invert_step   x [N, C, H, W], conditioning [N, 2, M], step int64 [1]          -> x_next [N, C, H, W]
    reconstruct   x0 [N, C, H, W] (optional, the loops inside)                    -> x [N, C, H, W], z [N, D]
    features      x [N, C, H, W], t int64 [N] (optional; of a diffae also         -> middle [N, ...], output_1 ...
                  conditioning [N, 2, M])

All tensors are float32 but ``t``, the time of every image, and ``step``, which runs 0, 1, ... in order of execution:
``steps`` of them decode, ``encode_steps`` of them invert. This module imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import NOISES
from ..errors import UserError
from ..files import atomic_write
from ..limits import MAX_SIZE, MAX_TIMESTEPS, brief, is_int, parse_json, read_text

FORMAT = "pdae_fast-export-1"
NAME = "manifest.json"
DIGEST = "manifest_sha256"
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
GRAPHS = {
    "pdae": ("encoder", "conditioning", "decode_step", "invert_step"),
    "diffae": ("encoder", "conditioning", "decode_step", "invert_step"),
    "prior": ("decode_step", "invert_step"),
}
RECONSTRUCT, FEATURES = "reconstruct", "features"
DTYPES = ("float32", "float16", "bfloat16")
# Values of one image, and of its conditioning: 8192 x 8192 in colour.
MAX_IMAGE = 2**28
MAX_TENSORS = 256  # of a graph: the maps of a large network's blocks
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
# Others that some reader relies on where they are there.
_OPTIONAL = {
    "noise": str,
    "features": list,
    "schedule": dict,
    "versions": dict,
    "tensorrt_version": str,
    "engines": dict,
    "profile": list,
    "tf32": bool,
    "onnx": dict,
}
_COUNTS = {"steps": MAX_TIMESTEPS, "encode_steps": MAX_TIMESTEPS, "max_batch": MAX_SIZE}
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    """Inputs and outputs that ``graph`` has by the table above; ``latent_dim`` and ``width`` None for a prior. Those of
    ``features`` are `feature_signature`."""
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


def feature_signature(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of ``features``; the manifest's field of that name lists [C, h, w] of every map."""
    image, t = ("N", *manifest["image_shape"]), tensor_entry("t", "int64", ("N",))
    inputs = [tensor_entry("x", "float32", image), t]
    if manifest["kind"] == "diffae":
        inputs.append(tensor_entry("conditioning", "float32", ("N", 2, manifest["conditioning_width"])))
    names = ("middle", *(f"output_{i}" for i in range(1, len(manifest[FEATURES]))))
    maps = zip(names, manifest[FEATURES], strict=True)
    return inputs, [tensor_entry(name, "float32", ("N", *shape)) for name, shape in maps]


def graphs_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The graphs of one evaluation that an export holds."""
    return (*GRAPHS[manifest["kind"]], *((FEATURES,) if manifest.get(FEATURES) else ()))


def graph_path(directory: str | Path, manifest: dict[str, Any], graph: str) -> Path:
    """Where the file of ``graph`` is; UserError when there is no such graph."""
    if graph not in manifest["graphs"]:
        raise UserError(f"{directory}: no graph {graph!r} in this export")
    return Path(directory) / manifest["graphs"][graph]["file"]


def names_file(entry: Any, name: str | None = None) -> bool:
    """Whether ``entry`` names a file (``name``, where that is given and it says nothing else), its hash and its size.

    A manifest must not lead a reader out of its own directory.
    """
    if not isinstance(entry, dict):
        return False
    file, sha256 = entry.get("file", name), entry.get("sha256")
    return (
        isinstance(file, str)
        and _FILE.fullmatch(file) is not None
        and (name is None or file == name)
        and isinstance(sha256, str)
        and _SHA256.fullmatch(sha256) is not None
        and is_int(entry.get("bytes"), 0, math.inf)
    )


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
    text = read_text(path, "what an export wrote; export once more")
    try:
        manifest = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON ({error}); export once more") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {brief(found)}; this version reads {FORMAT!r}")
    _check_fields(manifest, path)
    if manifest["backend"] not in backends:
        raise UserError(f"{directory}: made for {brief(manifest['backend'])[1:-1]}; expected {' or '.join(backends)}")
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


def check_signatures(directory: str | Path, manifest: dict[str, Any]) -> None:
    """UserError unless the graphs have the inputs and outputs of the table above."""
    sizes = (manifest["image_shape"], manifest["latent_dim"], manifest["conditioning_width"])
    for graph in graphs_of(manifest):
        entry = manifest["graphs"][graph]
        expected = feature_signature(manifest) if graph == FEATURES else signature(graph, *sizes)
        if (entry["inputs"], entry["outputs"]) != expected:
            raise UserError(
                f"{Path(directory) / NAME}: the inputs and outputs of {graph} are not those of a {manifest['kind']} "
                "with its image_shape, latent_dim and conditioning_width; export once more"
            )


def _check_fields(manifest: dict[str, Any], path: Path) -> None:
    for name, kind in (
        _FIELDS | {name: kind for name, kind in _OPTIONAL.items() if manifest.get(name) is not None}
    ).items():
        if name not in manifest:
            raise UserError(f"{path}: no field {name!r}; edited after the export? export once more")
        value = manifest[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path}: {name} is {brief(value)}, which no export writes; export once more")
    kind = manifest["kind"]
    for name, known in (("kind", tuple(GRAPHS)), ("dtype", DTYPES), ("noise", NOISES)):
        if manifest.get(name, known[0]) not in known:
            raise UserError(f"{path}: {name} {brief(manifest[name])}; expected {' or '.join(known)}")
    if any(
        not isinstance(s, list) or len(s) != 3 or not all(is_int(v, 1, MAX_SIZE) for v in s) for s in _maps(manifest)
    ):
        raise UserError(f"{path}: features is {brief(manifest[FEATURES])}; expected [C, h, w] of every map")
    missing = [name for name in graphs_of(manifest) if name not in manifest["graphs"]]
    if missing:
        raise UserError(f"{path}: no graph {', '.join(missing)}; export once more")
    shape = manifest["image_shape"]
    if len(shape) != 3 or not all(is_int(v, 1, MAX_SIZE) for v in shape) or math.prod(shape) > MAX_IMAGE:
        raise UserError(f"{path}: image_shape is {brief(shape)}; expected [C, H, W], at most {MAX_IMAGE} values")
    for name, most in (("latent_dim", MAX_SIZE), ("conditioning_width", MAX_IMAGE)):
        value = manifest[name]
        if value is not None if kind == "prior" else not is_int(value, 1, most):
            expected = "null of a prior" if kind == "prior" else f"1 to {most}"
            raise UserError(f"{path}: {name} is {brief(value)}; expected {expected}")
    for name, most in _COUNTS.items():
        if manifest[name] < 1:
            raise UserError(f"{path}: {name} is {brief(manifest[name])}; expected at least 1")
        if manifest[name] > most:
            raise UserError(f"{path}: {name} is {brief(manifest[name])}; expected at most {most}")
    if not is_int((manifest.get("schedule") or {}).get("timesteps", 1), 1, MAX_TIMESTEPS):
        raise UserError(f"{path}: timesteps is {brief(manifest['schedule']['timesteps'])}; expected 1 or more")
    for steps, times in (("steps", "decode_times"), ("encode_steps", "invert_times")):
        found = (manifest.get("schedule") or {}).get(times)
        if found is not None and (not isinstance(found, list) or len(found) != manifest[steps] + 1):
            raise UserError(
                f"{path}: {steps} is {manifest[steps]}, but {times} are not as many and one; export once more"
            )
    for name, entry in manifest["graphs"].items():
        if not names_file(entry) or not all(_is_signature(entry.get(side)) for side in ("inputs", "outputs")):
            raise UserError(
                f"{path}: the entry of {brief(name)} names no file with its hash and size, or no inputs and outputs; "
                "export once more"
            )
    for name, entry in manifest["files"].items():
        if not names_file(entry, name):
            raise UserError(
                f"{path}: the entry of {brief(name)} names no file with its hash and size; export once more"
            )
    _check_engines(manifest, path)


def _maps(manifest: dict[str, Any]) -> list[Any]:
    return manifest.get(FEATURES) or []


def _is_signature(tensors: Any) -> bool:
    """Whether ``tensors`` are :func:`tensor_entry` values: numbers that are known, in shapes that can be made."""
    return (
        isinstance(tensors, list)
        and 1 <= len(tensors) <= MAX_TENSORS
        and all(
            isinstance(tensor, dict)
            and isinstance(tensor.get("name"), str)
            and _FILE.fullmatch(tensor["name"]) is not None
            and isinstance(tensor.get("dtype"), str)
            and tensor["dtype"] in ("int64", *DTYPES)
            and isinstance(tensor.get("shape"), list)
            and 1 <= len(tensor["shape"]) <= 8
            and all(size == "N" or is_int(size, 1, MAX_IMAGE) for size in tensor["shape"])
            and math.prod(size for size in tensor["shape"] if size != "N") <= MAX_IMAGE
            for tensor in tensors
        )
    )


def _check_engines(manifest: dict[str, Any], path: Path) -> None:
    """What a directory of engines says beyond its graphs, where it says it."""
    profile, engines, onnx = (manifest.get(name) for name in ("profile", "engines", "onnx"))
    if profile is not None and not (
        len(profile) == 3 and all(is_int(v, 1, MAX_SIZE) for v in profile) and profile == sorted(profile)
    ):
        raise UserError(f"{path}: profile is {brief(profile)}; expected [fewest, usual, most] images; build once more")
    for capability, entries in (engines or {}).items():
        if re.fullmatch(r"\d{1,3}\.\d", capability) is None or not isinstance(entries, dict):
            raise UserError(f"{path}: the engines of {brief(capability)} are {brief(entries)}; build once more")
    for part, values in (onnx or {}).items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {brief(part)} of onnx is {brief(values)}; build once more")
