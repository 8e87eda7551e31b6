"""LMDB's file format, read with `pread`.

The library maps the file into memory and follows what it finds there: one flipped bit in the header of a page, and the
process dies with SIGBUS. Here every page number, offset and length is checked before it is used. The layout is that of
data version 1 (lmdb.h, mdb.c) as 64-bit little-endian machines write it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pdae_fast.errors import UserError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE = struct.Struct("<QHHHH")  # number, padding, flags, end of the node offsets, start of the nodes
_META = struct.Struct("<IIQQ 48s 48s QQ")  # magic, version, address, map size, two databases, last page, transaction
_DATABASE = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, pages (branch, leaf, overflow), entries, root
_NODE = struct.Struct("<HHHH")  # a size or page number in the first two or three, flags, key size
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_DIRTY = 0x10  # as it was in the writer's memory
_BIG, _OTHER = 1, 2 | 4  # the value is on pages of its own; is a database, or several values
_EMPTY = 2**64 - 1
_DEEPEST = 32


class DamagedLMDB(UserError):
    """A database whose structure is not what LMDB writes; the text is "path: reason"."""


class Entry(NamedTuple):
    """A key and where in the file its value is; ``page``: the first page that it has for itself, or 0."""

    key: bytes
    offset: int
    size: int
    page: int


class LMDBFile:
    """The main database of an LMDB file, as it was when it was opened; nobody may write to it meanwhile.

    May be used from threads and after a fork, and pickled. Raises UserError for a file that is missing or no LMDB, and
    DamagedLMDB, at once or when it is come across, for one whose structure cannot be.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        self.bytes = os.fstat(self._file).st_size
        if self.bytes == 0:
            raise UserError(f"{path}: the file is empty; expected an LMDB")
        self.page_bytes, self._root, self._depth, self.entries, self._last = self._meta()
        needed = (self._last + 1) * self.page_bytes
        if self.bytes < needed:
            raise DamagedLMDB(f"{path}: truncated, {self.bytes} bytes of {needed}")

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)

    def __reduce__(self) -> tuple:
        return LMDBFile, (self.path,)

    def get(self, key: bytes) -> bytes | None:
        """The value of ``key``; None where there is none."""
        entry = next(self.items(key), None)
        return self.value(entry) if entry is not None and entry.key == key else None

    def value(self, entry: Entry) -> bytes:
        if entry.page:
            number, _, flags, low, high = _PAGE.unpack(self._read(entry.offset - _PAGE.size, _PAGE.size))
            pages = -(-(_PAGE.size + entry.size) // self.page_bytes)
            if (number, flags & ~_DIRTY, low | high << 16) != (entry.page, _OVERFLOW, pages):
                raise self._damaged(f"the header of page {entry.page} cannot be")
        return self._read(entry.offset, entry.size)

    def items(self, start: bytes = b"") -> Iterator[Entry]:
        """The entries from the first key that is not below ``start``, in the order of the keys' bytes."""
        last, found = None, 0
        for entry in () if self._root == _EMPTY else self._below(self._root, start, 1):
            if last is not None and entry.key <= last:
                raise self._damaged(f"the key {entry.key[:40]!r} is out of order")
            last = entry.key
            found += 1
            if entry.size >= 0:
                yield entry
        if not start and found != self.entries:
            raise self._damaged(f"it has {found} keys, but its meta page says {self.entries}")

    # -- pages -----------------------------------------------------------------------------------------------------

    def _meta(self) -> tuple[int, int, int, int, int]:
        """Page size, root, depth, entries and last page of the newer of the two meta pages."""
        first = self._meta_at(0)
        if first is None:
            raise UserError(f"{self.path}: not an LMDB file of a 64-bit little-endian machine; expected an LMDB")
        size = first[0]
        if size < 512 or size > 65536 or size & (size - 1):
            raise self._damaged(f"its page size is {size}")
        found = [meta for meta in (first, self._meta_at(size)) if meta is not None and meta[0] == size]
        if len(found) < 2:
            raise self._damaged("its second meta page is none")
        size, flags, depth, entries, root, last, _ = max(found, key=lambda meta: meta[-1])
        if flags:  # another order of keys, or several values of one
            raise UserError(f"{self.path}: its main database has the flags {flags:#x}; expected plain keys and values")
        placed = (root == _EMPTY and not entries) or (2 <= root <= last and entries)
        if not placed or depth > _DEEPEST or last < 1:
            raise self._damaged("its meta page cannot be")
        return size, root, depth, entries, last

    def _meta_at(self, offset: int) -> tuple[int, int, int, int, int, int, int] | None:
        content = os.pread(self._file, _PAGE.size + _META.size, offset)
        if len(content) < _PAGE.size + _META.size:
            return None
        _, _, page_flags, _, _ = _PAGE.unpack_from(content)
        magic, version, _, _, free, main, last, transaction = _META.unpack_from(content, _PAGE.size)
        if magic != _MAGIC or not page_flags & _META_PAGE:
            return None
        if version != _VERSION:
            raise UserError(f"{self.path}: an LMDB of data version {version}; expected {_VERSION}")
        _, flags, depth, _, _, _, entries, root = _DATABASE.unpack(main)
        return _DATABASE.unpack(free)[0], flags, depth, entries, root, last, transaction

    def _below(self, number: int, start: bytes, depth: int) -> Iterator[Entry]:
        """The entries on page ``number`` and below it."""
        flags, page, offsets = self._page(number)
        if (depth == self._depth) != (flags == _LEAF):
            raise self._damaged(f"page {number} is not where it belongs")
        first = self._first(number, page, offsets, start, flags)
        for i in range(first, len(offsets)):
            low, high, node_flags, key, end = self._node(number, page, offsets[i])
            if flags == _BRANCH:
                yield from self._below(low | high << 16 | node_flags << 32, start if i == first else b"", depth + 1)
                continue
            if node_flags & _OTHER:
                yield Entry(key, 0, -1, 0)  # a named database, not a value
                continue
            yield Entry(key, *self._place(number, page, low | high << 16, node_flags, end))

    def _first(self, number: int, page: bytes, offsets: tuple[int, ...], start: bytes, flags: int) -> int:
        """The place of the first node that may lead to keys from ``start``: binary search."""
        low, high = (1, len(offsets)) if flags == _BRANCH else (0, len(offsets))
        while low < high:
            middle = (low + high) // 2
            key = self._node(number, page, offsets[middle])[3]
            if key <= start if flags == _BRANCH else key < start:
                low = middle + 1
            else:
                high = middle
        return low - 1 if flags == _BRANCH else low  # the first key of a branch page stands for all below the second

    def _page(self, number: int) -> tuple[int, bytes, tuple[int, ...]]:
        """Kind (branch or leaf), bytes and node offsets of a page."""
        if not 2 <= number <= self._last:
            raise self._damaged(f"it names a page {number}")
        page = self._read(number * self.page_bytes, self.page_bytes)
        own, _, flags, lower, upper = _PAGE.unpack_from(page)
        kind = flags & ~_DIRTY
        if own != number or kind not in (_BRANCH, _LEAF) or not _PAGE.size < lower <= upper <= len(page) or lower & 1:
            raise self._damaged(f"the header of page {number} cannot be")
        return kind, page, struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", page, _PAGE.size)

    def _node(self, number: int, page: bytes, offset: int) -> tuple[int, int, int, bytes, int]:
        """The four numbers of a node with its key in place of the last, and where the key ends."""
        begin = offset + _NODE.size
        if begin > len(page):
            raise self._damaged(f"a node of page {number} lies outside of it")
        low, high, flags, length = _NODE.unpack_from(page, offset)
        if begin + length > len(page):
            raise self._damaged(f"a key of page {number} lies outside of it")
        return low, high, flags, page[begin : begin + length], begin + length

    def _place(self, number: int, page: bytes, size: int, flags: int, end: int) -> tuple[int, int, int]:
        """Offset in the file, size and own page of a value."""
        if not flags & _BIG:
            if end + size > len(page):
                raise self._damaged(f"a value of page {number} lies outside of it")
            return number * self.page_bytes + end, size, 0
        if end + 8 > len(page):
            raise self._damaged(f"a value of page {number} lies outside of it")
        first = int.from_bytes(page[end : end + 8], "little")
        offset = first * self.page_bytes + _PAGE.size
        if first < 2 or offset + size > (self._last + 1) * self.page_bytes:
            raise self._damaged(f"a value of page {number} lies outside of the file")
        return offset, size, first

    def _read(self, offset: int, size: int) -> bytes:
        content = b""
        try:
            while len(content) < size:
                more = os.pread(self._file, size - len(content), offset + len(content))
                if not more:
                    break
                content += more
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        if len(content) < size:
            raise self._damaged("it ends too early")
        return content

    def _damaged(self, reason: str) -> DamagedLMDB:
        return DamagedLMDB(f"{self.path}: damaged: {reason}")
