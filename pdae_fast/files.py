"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from pdae_fast.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open `path` for writing so that it is either written completely or left as it was.

    Yields a seekable file object on a temporary file in the same folder (its path is `.name`, for writers
    that want a path). When the block ends without an error the file is flushed to disk and renamed over
    `path`; on any exception, KeyboardInterrupt included, it is removed. A symbolic link is followed, so
    the file it points to is replaced and the link stays. The folder must exist (see `make_folder`).

    mode: "wb", or "w" for UTF-8 text with newlines written as they are.
    Raises UserError naming `path` when the system refuses (read-only, disk full, no such folder, `path` is
    a folder or a device). An OSError about some other file, raised inside the block, is passed on.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', not {mode!r}")
    target = os.path.realpath(path)
    # Renaming over /dev/null or a pipe would replace it with a plain file.
    if os.path.lexists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "not a plain file"
        raise UserError(f"cannot write {os.fspath(path)}: it is {kind}")
    folder, name = os.path.split(target)
    # 40 characters keep the temporary name under the limit of 255 bytes whatever the script.
    temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        # Mode "x" through open(), not tempfile: the result keeps the permissions that the umask gives.
        with open(temporary, mode.replace("w", "x"), **({} if "b" in mode else _TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        _discard(temporary)
        if error.errno is None or error.filename not in (None, temporary):
            raise
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror}") from error
    except BaseException:
        _discard(temporary)
        raise
    _sync_folder(folder)


def make_folder(path: str | os.PathLike) -> None:
    """Create the folder `path` and its parents where missing; UserError naming it when that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"cannot create the folder {os.fspath(path)}: a file has this name") from error
    except OSError as error:
        raise UserError(f"cannot create the folder {os.fspath(path)}: {error.strerror}") from error


_TEXT = {"encoding": "utf-8", "newline": ""}


def _discard(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """Make the rename itself survive a power cut; some file systems cannot, and then nothing is lost."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
