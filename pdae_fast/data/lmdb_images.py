"""LMDB files of encoded images: Diff-AE's, with keys `{size}-{index}`, and those with one image under each key, such as
LSUN's; read only."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice

from pdae_fast.data.lmdb_file import DamagedLMDB, LMDBFile
from pdae_fast.data.preprocess import WHITE, check_target, load_image, stored_size
from pdae_fast.data.sample import BrokenImage, Sample
from pdae_fast.errors import UserError

EXPECTED = "expected an encoded image under each key, as LSUN has, or Diff-AE's keys like '256-00012' and 'length'"
_KEY = re.compile(rb"([0-9]{1,9}|None)-([0-9]{1,18})")
_PLAIN = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.=-]*")
_HEX = b"hex-"
_IMAGE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|P[1-6]\s", re.DOTALL)
_FOREIGN = 1000  # other keys or values that are passed over in search of an image


class LMDBImages:
    """Images in an LMDB as a map-style dataset: Diff-AE's FFHQ, CelebA-HQ, CelebA, horse and bedroom files, LSUN's own.

    path: the folder with `data.mdb`, or the database itself where it is a single file. It is never written to, and
    nobody may write to it meanwhile.
    stored: of Diff-AE's keys, the size under which to look, as written there: "256", or "None" for images that were
    stored without resizing. By default the smallest that is at least `size`, else the largest ("None" counts as
    larger than any).
    size, channels, background, crop: see `load_image`.

    Of Diff-AE's keys, how many images there are is what the key `length` says; without it (a conversion that was
    stopped) the highest index counts. `names[i]` is the key, such as "256-00012" (five digits for FFHQ and CelebA-HQ,
    seven for the others). Of all other files every key is an image, in the order of the keys, and its name the key
    ("hex-" and its bytes where that is not fit for a file's name). `dataset[i]` is a Sample with label None; it raises
    BrokenImage for a record that is missing, damaged or no image. The dataset may be indexed from threads, pickled, and
    used by forked and spawned loader workers.
    The constructor raises UserError for a path that is not such a database, is damaged, or holds no images of the
    stored size.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: int,
        channels: int = 3,
        background: Sequence[int] = WHITE,
        stored: str | int | None = None,
        crop: str = "centre",
    ) -> None:
        self.size = size
        self.channels = channels
        self.background = check_target(size, channels, background, crop)
        self.crop = crop
        self.path = os.fspath(path)
        self._database = LMDBFile(_file_of(self.path))
        digits = _stored_sizes(self._database)
        if digits or stored is not None or not _holds_images(self._database):
            self.stored = self._choose(digits, None if stored is None else str(stored))
            count = _count(self._database, self.stored, self.path)
            self.names = [f"{self.stored}-{i:0{digits[self.stored]}d}" for i in range(count)]
        else:
            self.stored = None
            self.names = [_name_of(entry.key) for entry in self._database.items()]

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
        image = load_image(where, self.size, self.channels, self.background, self._content(name), self.crop)
        return Sample(image, name, None)

    def first_size(self) -> tuple[int, int] | None:
        """Width and height of the first image; None where it cannot be read."""
        try:
            return stored_size(self.path, self._content(self.names[0]))
        except BrokenImage:
            return None

    def _content(self, name: str) -> bytes:
        where = f"{self.path}: {name}"
        try:
            content = self._database.get(_key_of(name))
        except DamagedLMDB as error:
            raise BrokenImage(where, str(error).removeprefix(f"{self._database.path}: ")) from error
        if content is None:
            raise BrokenImage(where, "no such record")
        return content


def _file_of(path: str) -> str:
    whole = os.path.isdir(path)
    file = os.path.join(path, "data.mdb") if whole else path
    if not os.path.isfile(file):
        raise UserError(f"{path}: {'no data.mdb in it' if whole else 'no such file or folder'}; {EXPECTED}")
    return file


def _stored_sizes(database: LMDBFile) -> dict[str, int]:
    """Each stored size of Diff-AE's keys and how many digits its first index has; empty for other keys. Jumps from
    size to size: there may be millions of keys."""
    found: dict[str, int] = {}
    foreign, start = 0, b""
    while foreign < _FOREIGN and (entry := next(database.items(start), None)) is not None:
        if match := _KEY.fullmatch(entry.key):
            found[match[1].decode()] = len(match[2])
            start = match[1] + b"."  # "." follows "-"
        else:
            foreign += 1
            start = entry.key + b"\0"
    return found


def _holds_images(database: LMDBFile) -> bool:
    """Whether one of the first values begins as an image does."""
    return any(_IMAGE.match(database.value(entry)) for entry in islice(database.items(), _FOREIGN))


def _count(database: LMDBFile, stored: str, path: str) -> int:
    length = database.get(b"length")
    if length is not None:
        if not re.fullmatch(rb"[0-9]{1,18}", length) or int(length) == 0:
            raise UserError(f"{path}: the key 'length' holds {length[:20]!r}, expected the number of images")
        return int(length)
    # Keys are in the order of their text, which is not that of their numbers once they outgrow their zeros.
    prefix, last = stored.encode() + b"-", -1
    for entry in database.items(prefix):
        if not entry.key.startswith(prefix):
            break
        if match := _KEY.fullmatch(entry.key):
            last = max(last, int(match[2]))
    return last + 1


def _name_of(key: bytes) -> str:
    """``key`` as a name that is fit for a file: itself, or "hex-" and its bytes."""
    return key.decode() if _PLAIN.fullmatch(key) and not key.startswith(_HEX) else _HEX.decode() + key.hex()


def _key_of(name: str) -> bytes:
    return bytes.fromhex(name[len(_HEX) :]) if name.encode().startswith(_HEX) else name.encode()


def _pixels(stored: str) -> float:
    return float("inf") if stored == "None" else int(stored)
