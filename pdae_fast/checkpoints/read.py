"""Opening a file that somebody else wrote: plain values and tensors come out, nothing in it is run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from ..errors import UserError
from .directory import CONFIG_NAME, read_safetensors

EXPECTED = "expected a PyTorch or safetensors checkpoint"

# First bytes of what is passed by mistake most often.
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (fetch it with `git lfs pull`)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"\xfd7zXZ", "an xz archive (unpack it first)"),
    (b"%PDF", "a PDF"),
    (b"GGUF", "a GGUF file"),
)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that a checkpoint file holds; tensors stay on the CPU, mapped from the file where possible.

    PyTorch files are read with ``weights_only=True``. Raises UserError with one line that says what the file is when
    it is missing, empty, cut short, of another type, not a mapping, or needs more than plain values and tensors.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a plain file; {EXPECTED}")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {EXPECTED}") from None
    if not head:
        raise UserError(f"{path}: empty file; {EXPECTED}")
    if _beside_config(path):
        raise UserError(f"{path}: part of a saved model; give its directory, {path.parent}")
    # A safetensors file starts with the length of its JSON header, whatever bytes that makes.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return nest(read_safetensors(path))
    if head.startswith(_ZIP):
        contents = _read_zip(path)
    elif head.startswith(_PICKLE):
        contents = _read_torch(path, mapped=False)
    else:
        raise UserError(f"{path}: {_describe(head, path)}; {EXPECTED}")
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds one {type(contents).__name__}; expected a mapping of names to tensors")
    return contents


def nest(flat: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Undo the flattening that .safetensors needs: ``ema_decoder.out.0.weight`` goes back under ``ema_decoder``."""
    entries = "denoise_fn", "encoder", "decoder", "latent_denoise_fn", "classifier"
    entries += tuple(f"ema_{name}" for name in entries)
    # A bare encoder's own names start with "encoder." too; its first tensor is encoder.0.weight.
    if "encoder.0.weight" in flat or not any(name.startswith(tuple(f"{e}." for e in entries)) for name in flat):
        return dict(flat)
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        entry, _, rest = name.partition(".")
        if entry in entries and rest:
            nested.setdefault(entry, {})[rest] = tensor
        else:
            nested[name] = tensor
    return nested


def _beside_config(path: Path) -> bool:
    own = path.suffix == ".safetensors" or path.name == CONFIG_NAME
    return own and path.stem in ("model", "config") and (path.parent / CONFIG_NAME).is_file()


def _read_zip(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated: it starts like a PyTorch checkpoint but its end is missing; {EXPECTED}")
    with zipfile.ZipFile(path) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        raise UserError(f"{path}: a TorchScript or exported program; {EXPECTED} with its state_dict")
    if "data.pkl" not in names:
        kind = "a NumPy archive" if any(name.endswith(".npy") for name in names) else "a zip archive"
        raise UserError(f"{path}: {kind}; {EXPECTED}")
    return _read_torch(path, mapped=True)


def _read_torch(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        offending = _unsafe_globals(path, str(error))
        if not offending:
            raise _damaged(path, error) from None
        raise UserError(
            f"{path}: refused, it holds {offending}: unpickling that could run code, so only tensors and plain values "
            "are read (weights_only). Where you trust the file, re-save its state_dicts alone with torch.save"
        ) from None
    # A damaged stream makes an unpickler fail in any way there is.
    except Exception as error:
        raise _damaged(path, error) from None


def _unsafe_globals(path: Path, message: str) -> str:
    """Names of what a refused file wants to import, or an empty string when that was not the reason."""
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:
        names = []
    if not names:
        names = re.findall(r"GLOBAL ([\w.]+)|class ([\w.]+)|REDUCE for ([\w.]+)", message)
        names = sorted({name for match in names for name in match if name})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _damaged(path: Path, error: Exception) -> UserError:
    text = re.split(r"(?<=[a-z])\. |; |, consider", " ".join(str(error).split()))[0][:120]
    # What weights_only says in general tells nothing about this file.
    reason = f" ({text})" if text and not text.startswith("Weights only") else ""
    return UserError(f"{path}: truncated or damaged{reason}; {EXPECTED}")


def _describe(head: bytes, path: Path) -> str:
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP image"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that failed?)"
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):
        config = path.suffix.lower() in (".yml", ".yaml", ".json")
        return "a configuration, not weights (it goes with --config or config=)" if config else "a text file"
    return "not a checkpoint"
