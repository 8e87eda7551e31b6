"""The chunks of a PNG file, which Pillow takes as they are: their checksums, and text that it would refuse."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD, _TAIL = struct.Struct(">I4s"), struct.Struct(">I")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Of all text only this says anything about the pixels: which way is up.
_ORIENTATION = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
_LONGEST = 1 << 20  # bytes of a text, unpacked: Pillow reads no more


def checked(content: bytes) -> tuple[bytes, bool]:
    """``content``, a PNG file, without its texts and colour profile, which have no part in the pixels; and whether it
    ends as it should.

    Raises ValueError, saying what is wrong, for a chunk whose CRC is not that of its bytes (PNG specification, 5.3).
    """
    view, place = memoryview(content), len(SIGNATURE)
    pieces = [view[:place]]
    while True:
        if place + _HEAD.size > len(view):
            return b"".join(pieces), False
        length, kind = _HEAD.unpack_from(view, place)
        end = place + _HEAD.size + length + _TAIL.size
        if end > len(view):
            raise ValueError(f"truncated or damaged: its chunk {_name(kind)} goes beyond the end of the file")
        body = view[place + 4 : end - _TAIL.size]  # the CRC is of the kind and the data
        if zlib.crc32(body) != _TAIL.unpack_from(view, end - _TAIL.size)[0]:
            raise ValueError(f"damaged: the checksum of its chunk {_name(kind)} is wrong")
        if kind != b"iCCP" and (kind not in _TEXT or _says_which_way_is_up(kind, bytes(body[4:]))):
            pieces.append(view[place:end])
        place = end
        if kind == b"IEND":
            return b"".join(pieces), True


def _name(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace")


def _says_which_way_is_up(kind: bytes, data: bytes) -> bool:
    if not data.startswith(_ORIENTATION) or len(data) > _LONGEST:
        return False
    packed = data.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and packed[:1] != b"\1"):
        return True
    try:
        # A zTXt has one byte before the packed text; an iTXt two, a language and a translated keyword.
        packed = packed[1:] if kind == b"zTXt" else packed[2:].split(b"\0", 2)[2]
        return len(zlib.decompressobj().decompress(packed, _LONGEST + 1)) <= _LONGEST
    except (zlib.error, IndexError):
        return False
