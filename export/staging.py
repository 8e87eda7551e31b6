"""A directory written whole or not at all: filled beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import claim_place, claims, make_folder, naming, unfinished_name
from . import manifest


def check_target(out: str | Path, replaceable: Callable[[Path], bool] = manifest.is_export) -> Path:
    """``out`` as an absolute path, links followed; UserError unless it is new, empty, or may be replaced.

    Call it before the work begins: what cannot be written should not cost minutes first.
    """
    path = Path(os.path.realpath(Path(out).expanduser()))
    if path.exists() and not path.is_dir():
        raise UserError(f"{out}: a file; expected a directory to write into")
    if path.is_dir() and any(path.iterdir()) and not replaceable(path):
        raise UserError(f"{out}: not empty and not an earlier export; expected a new directory")
    return path


@contextmanager
def staged_directory(out: str | Path, replaceable: Callable[[Path], bool] = manifest.is_export) -> Iterator[Path]:
    """Yield an empty directory beside ``out``; when the block ends without an error it takes the place of ``out``.

    On any exception, KeyboardInterrupt included, it is removed and ``out`` stays as it was. What a killed process left
    is removed at the next start. An earlier export at ``out`` (by ``replaceable``) is replaced; anything else there is
    a UserError, and so is another process that writes there.
    """
    with claims():
        target = check_target(out, replaceable)
        make_folder(target.parent)
        claim_place(target)
        with naming(out):
            yield from _filled(target, out, replaceable)


def _filled(target: Path, out: str | Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    staging = target.parent / unfinished_name(target.name)
    try:
        staging.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        yield staging
        for path in staging.rglob("*"):
            _sync(path)
        _sync(staging)
        _take_place(staging, check_target(target, replaceable), out)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, target: Path, out: str | Path) -> None:
    """Rename ``staging`` to ``target``; what was there steps aside first and comes back when that fails."""
    aside = staging.with_suffix(".old")
    try:
        if target.is_dir():
            os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            if aside.is_dir():
                os.rename(aside, target)
            raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make ``path`` survive a power cut; some file systems cannot sync, and then nothing is lost."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
