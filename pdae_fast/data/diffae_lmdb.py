"""Diff-AE's LMDB files: encoded images under the keys `{size}-{index}`, read only."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from weakref import WeakValueDictionary

from pdae_fast.data.preprocess import WHITE, check_target, load_image
from pdae_fast.data.sample import BrokenImage, Sample
from pdae_fast.errors import UserError

INSTALL = 'pip install "pdae_fast[data]"'
EXPECTED = "expected a database as Diff-AE writes it, with keys like '256-00012' and 'length'"
_KEY = re.compile(rb"(\d+|None)-(\d+)")
_FOREIGN = 1000  # other keys that are passed over in search of an image


class DiffAELMDB:
    """Images in a Diff-AE LMDB (its FFHQ, CelebA-HQ, CelebA, horse and bedroom files) as a map-style dataset.

    path: the folder with `data.mdb`, or the database itself where it is a single file. It is never written to,
    not even a lock file, so a read-only disk will do; nobody may write to it meanwhile.
    stored: the size under whose keys to look, as written there: "256", or "None" for images that were stored
    without resizing. By default the smallest that is at least `size`, else the largest ("None" counts as
    larger than any).
    size, channels, background: see `load_image`.

    How many images there are is what the key `length` says; without it (a conversion that was stopped) the
    highest index counts. `names[i]` is the key, such as "256-00012" (five digits for FFHQ and CelebA-HQ, seven for
    the others). `dataset[i]` is a Sample with label None; it raises BrokenImage for a record that is missing or no
    image. The dataset may be indexed from threads, pickled, and used by forked and spawned loader workers.
    The constructor raises UserError when `lmdb` is not installed (with the line to install it) and for a path that is
    not such a database, is damaged, or holds no images of the stored size.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: int,
        channels: int = 3,
        background: Sequence[int] = WHITE,
        stored: str | int | None = None,
    ) -> None:
        self.size = size
        self.channels = channels
        self.background = check_target(size, channels, background)
        self.path = os.fspath(path)
        self._database = _open(self.path)
        with self._database.begin() as transaction:
            digits = self._database.guard(_stored_sizes, transaction)
            self.stored = self._choose(digits, None if stored is None else str(stored))
            count = self._database.guard(_count, transaction, self.stored, self.path)
        width = digits[self.stored]
        self.names = [f"{self.stored}-{i:0{width}d}" for i in range(count)]

    def _choose(self, found: dict[str, int], wanted: str | None) -> str:
        if not found:
            raise UserError(f"{self.path}: no images; {EXPECTED}")
        order = sorted(found, key=_pixels)
        if wanted is not None and wanted not in found:
            raise UserError(f"{self.path}: no images stored as size {wanted}; there are {', '.join(order)}")
        return wanted or next((name for name in order if _pixels(name) >= self.size), order[-1])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        where = f"{self.path}: {name}"
        with self._database.begin() as transaction:
            content = self._database.guard(transaction.get, name.encode())
        if content is None:
            raise BrokenImage(where, "no such record")
        return Sample(load_image(where, self.size, self.channels, self.background, content), name, None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_database": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._database = _open(self.path)


class _Database:
    """An open environment, shared by all datasets of a file: LMDB forbids opening one twice in a process."""

    def __init__(self, path: str) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise UserError(f"reading {path} needs the package lmdb, which is not installed: {INSTALL}") from error
        self._lmdb = lmdb
        self.path = path
        self._lock = threading.Lock()
        self._reopen()

    def begin(self):
        """A read transaction; its snapshot is the file as it is, since nobody writes."""
        if self._process != os.getpid():
            with self._lock:
                if self._process != os.getpid():  # an environment must not be used across a fork
                    self._environment.close()
                    self._reopen()
        return self.guard(self._environment.begin)

    def guard(self, function, *arguments):
        """Call `function`; LMDB's errors become UserErrors that name the file."""
        try:
            return function(*arguments)
        except self._lmdb.Error as error:
            raise UserError(f"cannot read {self.path}: {_reason(error, self.path)}; {EXPECTED}") from error

    def _reopen(self) -> None:
        whole = os.path.isdir(self.path)
        file = os.path.join(self.path, "data.mdb") if whole else self.path
        # LMDB's own message for these is "Bad file descriptor".
        if not os.path.isfile(file):
            raise UserError(f"{self.path}: {'no data.mdb in it' if whole else 'no such file or folder'}; {EXPECTED}")
        if os.path.getsize(file) == 0:
            raise UserError(f"{file}: the file is empty; {EXPECTED}")
        self._environment = self.guard(
            # Readers of images ask for pages in any order: reading ahead would fetch what nobody wants.
            lambda: self._lmdb.open(
                self.path, subdir=whole, readonly=True, lock=False, create=False, readahead=False, meminit=False
            )
        )
        needed = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
        if os.path.getsize(file) < needed:  # reading past the end of a mapped file would kill the process
            self._environment.close()
            raise UserError(f"{file}: truncated, {os.path.getsize(file)} bytes of {needed}")
        self._process = os.getpid()


_opened: WeakValueDictionary[str, _Database] = WeakValueDictionary()
_opening = threading.Lock()


def _open(path: str) -> _Database:
    real = os.path.realpath(path)
    with _opening:
        database = _opened.get(real)
        if database is None:
            database = _opened[real] = _Database(path)
        return database


def _stored_sizes(transaction) -> dict[str, int]:
    """Each stored size and how many digits its first index has. Jumps from size to size: there may be
    millions of keys."""
    found: dict[str, int] = {}
    foreign = 0
    cursor = transaction.cursor()
    more = cursor.first()
    while more and foreign < _FOREIGN:
        match = _KEY.fullmatch(cursor.key())
        if match:
            found[match[1].decode()] = len(match[2])
            more = cursor.set_range(match[1] + b".")  # "." follows "-"
        else:
            foreign += 1
            more = cursor.next()
    return found


def _count(transaction, stored: str, path: str) -> int:
    length = transaction.get(b"length")
    if length is not None:
        if not length.isdigit() or int(length) == 0:
            raise UserError(f"{path}: the key 'length' holds {length[:20]!r}, expected the number of images")
        return int(length)
    # Keys are in the order of their text, which is not that of their numbers once they outgrow their zeros.
    prefix, last = stored.encode() + b"-", -1
    cursor = transaction.cursor()
    cursor.set_range(prefix)
    for key in cursor.iternext(values=False):
        if not key.startswith(prefix):
            break
        if match := _KEY.fullmatch(key):
            last = max(last, int(match[2]))
    return last + 1


def _pixels(stored: str) -> float:
    return float("inf") if stored == "None" else int(stored)


def _reason(error: Exception, path: str) -> str:
    return " ".join(str(error).removeprefix(f"{path}: ").split())
