"""Writing files whole or not at all, and folders by one process at a time."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from pdae_fast.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open `path` for writing so that it is either written completely or left as it was.

    Yields a seekable file object on a temporary file in the same folder (its path is `.name`, for writers
    that want a path). When the block ends without an error the file is flushed to disk and renamed over
    `path`; on any exception, KeyboardInterrupt included, it is removed; what a killed process left, by
    `clear_unfinished`. A symbolic link is followed, so the file it points to is replaced and the link stays. The
    folder must exist (see `make_folder`).

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
    temporary = os.path.join(folder, unfinished_name(name))
    try:
        # Mode "x" through open(), not tempfile: the result keeps the permissions that the umask gives.
        with open(temporary, mode.replace("w", "x"), **({} if "b" in mode else _TEXT)) as file:
            try_lock(file.fileno())  # tells the file of a living process from one that a kill left
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


def unfinished_name(name: str) -> str:
    """A hidden name for what will be called `name`; `is_unfinished` knows it again."""
    # 40 characters keep it under the limit of 255 bytes whatever the script.
    return f".{name[:40]}.{secrets.token_hex(6)}.tmp"


def is_unfinished(entry: str, name: str | None = None) -> bool:
    """Whether `entry` is a name that `unfinished_name` gave (for `name`), maybe with more before its last part."""
    wanted = ".+" if name is None else re.escape(name[:40])
    return re.fullmatch(rf"\.{wanted}\.[0-9a-f]{{12}}(\.\w+)?\.(tmp|old)", entry) is not None


def clear_unfinished(folder: str | os.PathLike) -> None:
    """Remove the files below `folder` that `atomic_write` began in processes which were killed.

    Hidden folders and links are not entered. Files that a living process writes stay, and what cannot be removed.
    """
    for below, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") and is_unfinished(name):
                _clear(os.path.join(below, name))


def _clear(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if try_lock(descriptor) is not False:
                os.unlink(path)
        finally:
            os.close(descriptor)


# -- one process at a time -------------------------------------------------------------------------------------------

LOCK = ".lock"
_held: dict[str, int] = {}  # locked files by their path, with their descriptors


def claim_folder(folder: str | os.PathLike, work: str = "") -> None:
    """Make `folder` where it is missing and keep other processes from claiming it; clear what a killed one left there.

    The claim ends with `claims` or the process, however that dies. A folder that was made for it and is still empty
    then is removed. To claim a folder again does nothing. work: for `left_by_kill`.
    Raises UserError naming it when another process has it, and when the system refuses to write there. Where a file
    system has no locks a line on stderr says so.
    """
    path, lock = os.path.realpath(folder), _lock_of(folder, inside=True)
    if lock in _held:
        return
    made = [path, *_missing(os.path.dirname(path))] if not os.path.lexists(path) else []
    make_folder(folder)
    try:
        _claim(lock, folder, work)
    except BaseException:
        _unmake(made)
        raise
    _made[lock] = made
    clear_unfinished(path)


def claim_place(path: str | os.PathLike, work: str = "") -> None:
    """`claim_folder` for a file or folder `path` that is filled beside its place (under an `unfinished_name`) and then
    renamed; the folder it is in must exist. What had stepped aside for it when a process was killed comes back."""
    folder, name = os.path.split(os.path.realpath(path))
    lock = _lock_of(path, inside=False)
    if lock in _held:
        return
    _claim(lock, path, work)
    for entry in sorted(os.listdir(folder)):
        left = os.path.join(folder, entry)
        if not is_unfinished(entry, name):
            continue
        if entry.endswith(".old") and not os.path.lexists(path):
            os.rename(left, path)
        elif os.path.isdir(left):
            shutil.rmtree(left, ignore_errors=True)
        else:
            _clear(left)


def left_by_kill(path: str | os.PathLike, work: str, inside: bool = True) -> bool:
    """Whether a process that had claimed `path`, a folder (``inside``) or a place, for this `work` was killed: then
    what is there is what it had written. Ask before claiming it."""
    try:
        with open(_lock_of(path, inside), "rb") as file:
            return file.read(100) == work.encode()
    except OSError:
        return False


def _lock_of(path: str | os.PathLike, inside: bool) -> str:
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, name, LOCK) if inside else os.path.join(folder, f".{name[:40]}{LOCK}")


@contextmanager
def claims() -> Iterator[None]:
    """What is claimed inside the block is given back at its end."""
    before = set(_held)
    try:
        yield
    finally:
        for lock in set(_held) - before:
            # Removed while it is held: whoever has opened it meanwhile sees that it is gone, and makes another.
            _discard(lock)
            os.close(_held.pop(lock))
            _unmake(_made.pop(lock, []))


_made: dict[str, list[str]] = {}  # folders that were made for a claim, the innermost first


def _missing(folder: str) -> list[str]:
    found = []
    while not os.path.lexists(folder):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found


def _unmake(folders: list[str]) -> None:
    with suppress(OSError):  # not empty, which ends it
        for folder in folders:
            os.rmdir(folder)


def _claim(lock: str, what: str | os.PathLike, work: str) -> None:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise UserError(f"cannot write {os.fspath(what)}: {error.strerror}") from error
        free = try_lock(descriptor)
        if free is False:
            os.close(descriptor)
            raise UserError(
                f"another process is writing to {os.fspath(what)}; wait until it ends, or choose another --out"
            )
        if free is None:
            print(f"note: {os.fspath(what)}: no locks here; nothing else may write to it meanwhile", file=sys.stderr)
        with suppress(OSError):  # removed by its last holder just now?
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                _held[lock] = descriptor
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, work.encode())
                return
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Whether this process now has the lock of an open file; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _after_fork() -> None:
    """A child would keep what its parent has claimed when that dies."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _made.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -- the rest --------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Give a system error in the block that names no file, such as "No space left on device", the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror}") from error


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
