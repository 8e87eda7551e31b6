"""Running something in a process that is killed, between two changes of the file system or at any time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

# What a process does to files, but for writing into those that are open.
CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "ftruncate")


class Ended(NamedTuple):
    """Exit status (negative: the signal), changes of the file system that were begun, seconds, and what was printed."""

    status: int
    changes: int
    seconds: float
    out: str
    err: str


def run(function: Callable[[], int], at: int | None = None, after: float | None = None) -> Ended:
    """``function`` in a forked process that dies by SIGKILL before its change number ``at`` of the file system, or
    ``after`` so many seconds, if it lives that long. At every second change it has half written a file."""
    with tempfile.TemporaryDirectory() as folder:
        place, begun = Path(folder), time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(function, at, place)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.perf_counter() - begun
        text = {name: (place / name).read_text() if (place / name).exists() else "" for name in ("out", "err")}
        changes = (place / "changes").stat().st_size if (place / "changes").exists() else 0
    return Ended(status, changes, seconds, text["out"], text["err"])


def _child(function: Callable[[], int], at: int | None, place: Path) -> None:
    status = 1
    try:
        torch.set_num_threads(1)  # threads of the parent are not here
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
        counter = os.open(place / "changes", os.O_WRONLY | os.O_CREAT)
        _count(counter, at)
        with (
            open(1, "w", closefd=False) as out,
            open(2, "w", closefd=False) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = function()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def _count(counter: int, at: int | None) -> None:
    """Count every change in the file ``counter``; die before number ``at``."""
    done = 0

    def counted(real: Callable) -> Callable:
        def change(*arguments: object, **options: object) -> object:
            nonlocal done
            if done == at:
                if real.__name__ == "fsync" and done % 2:
                    with contextlib.suppress(OSError):  # what was written is only half on the disk
                        os.truncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            os.write(counter, b".")
            return real(*arguments, **options)

        change.__name__ = real.__name__
        return change

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    shutil._use_fd_functions = False  # else rmtree has the functions of its own


@contextlib.contextmanager
def held(function: Callable[[], object]) -> Iterator[None]:
    """Another process has called ``function``, and lives until the block ends."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function()
            os.write(told, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1) == b"."
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its bytes, and the empty folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }
