"""A pack: a file header, frames, and, once sealed, a footer that indexes them.

    0    16   header: "cidfs-pack-v1\\n" and two zero bytes
    16        frames (chunk, manifest; a reader skips kinds that it does not know)
    ...       footer frame (kind 3), raw: u32 count, then a row for each frame before it:
                digest 32, offset u64, stored u32, length u32, kind u8, encoding u8, zero u16
    end-32    trailer: offset of the footer frame u64, its size u64, checksum 8 of those 16 bytes, "cidfsEnd"

Pure functions. The footer is an accelerator: a whole scan says the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cidfs.errors import FormatError
from cidfs.formats import frames
from cidfs.formats.chunking import ENCODING_RAW
from cidfs.formats.digest import checksum

HEADER: Final = b"cidfs-pack-v1\n\0\0"
TRAILER_SIZE: Final = 32
_TRAILER: Final = struct.Struct("<QQ")
_TRAILER_MAGIC: Final = b"cidfsEnd"
_ROW: Final = struct.Struct("<32sQIIBBH")
_COUNT: Final = struct.Struct("<I")
ROLL_SIZE: Final = 32 << 20
"""A pack is sealed once it is this long, in bytes."""


@dataclass(frozen=True, slots=True)
class Row:
    """Where one frame lies in its pack."""

    digest: bytes
    offset: int
    stored: int
    length: int
    kind: int
    encoding: int

    @property
    def end(self) -> int:
        """The offset after the frame."""
        return self.offset + frames.HEADER_SIZE + self.stored


def row_of(offset: int, header: frames.Header) -> Row:
    """Return the index row of a frame."""
    return Row(header.digest, offset, header.stored, header.length, header.kind, header.encoding)


def build_footer(rows: Iterable[Row], offset: int) -> bytes:
    """Return footer frame and trailer for a pack whose frames end at offset.

    Raise FormatError for rows that no reader would accept.
    """
    rows = list(rows)
    at = len(HEADER)
    for row in rows:
        at = _check_row(row, at, offset)
    packed = [_ROW.pack(r.digest, r.offset, r.stored, r.length, r.kind, r.encoding, 0) for r in rows]
    frame = frames.build_from(frames.KIND_FOOTER, _COUNT.pack(len(packed)) + b"".join(packed), compress=False)
    place = _TRAILER.pack(offset, len(frame))
    return frame + place + checksum(place) + _TRAILER_MAGIC


def read_trailer(tail: bytes, size: int) -> tuple[int, int] | None:
    """Return offset and size of the footer frame, or None for a pack that is not sealed.

    tail is the last TRAILER_SIZE bytes of a pack of size bytes. A trailer that ends in its magic and is
    otherwise wrong is FormatError.
    """
    if len(tail) != TRAILER_SIZE or tail[24:] != _TRAILER_MAGIC:
        return None
    offset, length = _TRAILER.unpack_from(tail)
    if checksum(tail[:16]) != tail[16:24]:
        raise FormatError("pack: trailer checksum is wrong")
    if offset < len(HEADER) or offset + length != size - TRAILER_SIZE:
        raise FormatError("pack: trailer points outside the pack")
    return offset, length


def read_footer(frame: bytes, offset: int) -> list[Row]:
    """Return the rows of a footer frame that lies at offset; raise FormatError when it is damaged."""
    return list(footer_rows(frame, offset))


def footer_rows(frame: bytes | memoryview, offset: int) -> Iterator[Row]:
    """Yield the rows of a footer frame that lies at offset; raise FormatError when it is damaged."""
    header = frames.read_header(frame)
    if (header.kind, header.encoding, header.size) != (frames.KIND_FOOTER, ENCODING_RAW, len(frame)):
        raise FormatError(f"pack: no footer at offset {offset}")
    data = memoryview(frames.read_data(frame, header))
    if len(data) < _COUNT.size or len(data) != _COUNT.size + _COUNT.unpack_from(data)[0] * _ROW.size:
        raise FormatError("pack: footer's length does not fit its count")
    at = len(HEADER)
    for digest, start, stored, length, kind, encoding, zero in _ROW.iter_unpack(data[_COUNT.size :]):
        row = Row(digest, start, stored, length, kind, encoding)
        if zero:
            raise FormatError(f"pack: footer row with offset {start} has set reserved bytes")
        at = _check_row(row, at, offset)
        yield row


def _check_row(row: Row, start: int, end: int) -> int:
    """Check that a frame lies between two offsets; return where it ends."""
    if row.offset < start or row.end > end:
        raise FormatError(f"pack: footer row with offset {row.offset} overlaps or lies outside")
    if not frames.possible_lengths(row.kind, row.stored, row.length):
        raise FormatError(f"pack: footer row with offset {row.offset} has impossible lengths")
    return row.end
