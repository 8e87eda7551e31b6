"""Opening a file that somebody else wrote: plain values and tensors come out, nothing in it is run."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import unpickle
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
_CHUNK = 2**22
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_file(path: Path) -> Mapping[str, Any] | list[Any] | tuple[Any, ...]:
    """The mapping, or list of mappings, that a checkpoint file holds; tensors stay on the CPU, mapped from the file
    where possible.

    Of a PyTorch file only tensors and plain values are read, see :mod:`.unpickle`. Raises UserError with one line that
    says what the file is when it is missing, empty, damaged, of another type, or holds something else.
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
        return read_safetensors(path)
    if head.startswith(_ZIP):
        contents = _read_zip(path)
    elif head.startswith(_PICKLE):
        contents = _read_torch(path, mapped=False)
    else:
        raise UserError(f"{path}: {_describe(head, path)}; {EXPECTED}")
    if isinstance(contents, unpickle.Inert):
        raise UserError(
            f"{path}: holds one pickled object, {unpickle.describe(contents)}; expected its state_dict: where you "
            "trust the file, load it with the code it comes from and torch.save(model.state_dict(), ...)"
        )
    if not isinstance(contents, dict) and not (isinstance(contents, list | tuple) and _mappings(contents)):
        raise UserError(f"{path}: holds one {type(contents).__name__}; expected a mapping of names to tensors")
    return contents


def _mappings(contents: list[Any] | tuple[Any, ...]) -> bool:
    return any(isinstance(part, dict) for part in contents)


def _beside_config(path: Path) -> bool:
    own = path.suffix == ".safetensors" or path.name == CONFIG_NAME
    return own and path.stem in ("model", "config") and (path.parent / CONFIG_NAME).is_file()


def _read_zip(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated: it starts like a PyTorch checkpoint but its end is missing; {EXPECTED}")
    try:
        archive = zipfile.ZipFile(path)
    # A damaged directory of the archive fails in several ways, and some of its fields are sizes and names.
    except Exception as error:
        raise _damaged(path, error) from None
    with archive:
        members = archive.infolist()
        names = [member.filename.rpartition("/")[2] for member in members]
        if "constants.pkl" in names:
            raise UserError(f"{path}: a TorchScript or exported program; {EXPECTED} with its state_dict")
        if "data.pkl" not in names:
            kind = "a NumPy archive" if any(name.endswith(".npy") for name in names) else "a zip archive"
            raise UserError(f"{path}: {kind}; {EXPECTED}")
        for member in members:
            _check_sum(archive, member, path)
    return _read_torch(path, mapped=True)


def _check_sum(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Read ``member`` through once: torch maps it without looking at its check sum, and bad weights look like others.

    Where torch.save was told to compute no check sums they are 0.
    """
    if member.CRC == 0:
        return
    try:
        with archive.open(member) as stream:
            while stream.read(_CHUNK):
                pass
    # A damaged header fails in several ways, one of them in the decompressor.
    except Exception as error:
        name = member.filename.rpartition("/")[2]
        raise UserError(f"{path}: damaged: its part {name} is not as it was written ({error}); {EXPECTED}") from None


def _read_torch(path: Path, mapped: bool) -> Any:
    if os.environ.get(_FORCED, "").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"{path}: {_FORCED} is set, with which torch takes no unpickler but its own; unset it (this one runs "
            "nothing either)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return unpickle.load(path, mapped)
    # A damaged stream makes an unpickler fail in any way there is.
    except Exception as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    text = re.split(r"(?<=[a-z])\. |; |, consider", " ".join(str(error).split()))[0][:120]
    reason = f" ({text})" if text else ""
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
