"""One frame: how a chunk, a manifest or a journal entry lies in a file. Shared by packs and journal.

    offset  size
    0       4     magic  c1 0d f5 a7
    4       1     kind
    5       1     encoding (0 raw, 1 zstd)
    6       2     zero
    8       4     stored length: bytes of data that follow the header
    12      4     length: bytes of the decoded data
    16      32    digest: BLAKE3-256 of the decoded data
    48      8     header checksum: BLAKE3 of the 48 bytes before, cut to 8
    56            data

Pure functions. A scan finds every whole frame again after damage: it goes on from the next magic, so a torn
or damaged frame never costs more than itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cidfs.errors import FormatError
from cidfs.formats.chunking import ENCODING_RAW, MAX_DECODED, MAXIMUM, decode, encode
from cidfs.formats.digest import checksum, digest_of

MAGIC: Final = b"\xc1\x0d\xf5\xa7"
HEADER_SIZE: Final = 56
_HEADER: Final = struct.Struct("<4sBBHII32s")

KIND_CHUNK: Final = 1
KIND_MANIFEST: Final = 2
KIND_FOOTER: Final = 3
KIND_JOURNAL: Final = 16

MAX_MANIFEST: Final = 256 << 20
MAX_LENGTH: Final = {
    KIND_CHUNK: MAXIMUM,
    KIND_MANIFEST: MAX_MANIFEST,
    KIND_FOOTER: 256 << 20,
    KIND_JOURNAL: MAX_DECODED,
}
"""The longest decoded data of each known kind, in bytes; MAX_DECODED for the others."""

MAX_FALSE: Final = 8 << 30
"""How much decoded data of long frames a scan checks in vain, in bytes: some ten seconds of work."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself."""

    kind: int
    encoding: int
    stored: int
    length: int
    digest: bytes

    @property
    def size(self) -> int:
        """The whole frame's size in bytes, header included."""
        return HEADER_SIZE + self.stored


def possible_lengths(kind: int, stored: int, length: int) -> bool:
    """Say whether a frame of a kind can have these lengths, stored and decoded."""
    return stored <= length <= MAX_LENGTH.get(kind, MAX_DECODED)


def build(kind: int, encoding: int, stored: bytes, length: int, digest: bytes) -> bytes:
    """Return a frame around data that is encoded already.

    Raise FormatError for lengths that no reader would accept.
    """
    if not possible_lengths(kind, len(stored), length):
        raise FormatError(f"frame of kind {kind}: {length} bytes, stored as {len(stored)}, do not fit one")
    head = _HEADER.pack(MAGIC, kind, encoding, 0, len(stored), length, digest)
    return b"".join((head, checksum(head), stored))


def build_from(kind: int, data: bytes, *, compress: bool = True) -> bytes:
    """Return a frame around data."""
    encoding, stored = encode(data) if compress else (ENCODING_RAW, data)
    return build(kind, encoding, stored, len(data), digest_of(data))


def read_header(data: bytes | memoryview, offset: int = 0) -> Header:
    """Return the header at an offset; raise FormatError when there is none or its checksum is wrong."""
    head = bytes(data[offset : offset + HEADER_SIZE])
    if len(head) < HEADER_SIZE:
        raise FormatError(
            f"frame: {len(head)} bytes where a header of {HEADER_SIZE} stands, at offset {offset}"
        )
    magic, kind, encoding, zero, stored, length, digest = _HEADER.unpack_from(head)
    if magic != MAGIC:
        raise FormatError(f"frame: no magic at offset {offset}")
    if checksum(head[:48]) != head[48:]:
        raise FormatError(f"frame: header checksum is wrong at offset {offset}")
    if zero or not possible_lengths(kind, stored, length):
        raise FormatError(f"frame: impossible lengths or reserved bytes at offset {offset}")
    return Header(kind, encoding, stored, length, digest)


def read_data(data: bytes | memoryview, header: Header, offset: int = 0) -> bytes:
    """Return the decoded and verified data of the frame at an offset.

    Raise FormatError for anything wrong.
    """
    start = offset + HEADER_SIZE
    stored = memoryview(data)[start : start + header.stored]
    if len(stored) != header.stored:
        raise FormatError(f"frame: cut short at offset {offset}")
    try:
        decoded = decode(header.encoding, stored, header.length)
    except FormatError as e:
        raise FormatError(f"frame at offset {offset}: {e}") from None
    if digest_of(decoded) != header.digest:
        raise FormatError(f"frame: data does not have its digest at offset {offset}")
    return decoded


@dataclass(frozen=True, slots=True)
class Found:
    """A whole frame at an offset, with its decoded data."""

    offset: int
    header: Header
    data: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes that belong to no whole frame."""

    offset: int
    end: int


def scan(data: bytes | memoryview, start: int = 0) -> Iterator[Found | Gap]:
    """Yield every whole frame from an offset on, in order, and a Gap for what lies between them.

    Whole frames of a kind that is not known are skipped silently. They are verified like the others, or the
    stored length of a torn one would hide the frames that follow it. Bytes that are made to look like the
    heads of long frames would make that take for ever: once MAX_FALSE bytes of frames longer than a chunk
    were checked in vain, such frames are passed over.
    """
    false = 0
    raw = bytes(data) if not isinstance(data, bytes) else data
    at = bad = start
    while True:
        at = raw.find(MAGIC, at)
        if at < 0:
            break
        try:
            header = read_header(raw, at)
        except FormatError:
            at += 1
            continue
        long = header.length > MAXIMUM
        if at + header.size > len(raw) or (long and false > MAX_FALSE):
            at += 1
            continue
        try:
            found = Found(at, header, read_data(raw, header, at))
        except FormatError:
            at += 1
            false += header.length if long else 0
            continue
        if bad < at:
            yield Gap(bad, at)
        if header.kind in MAX_LENGTH:
            yield found
        at = bad = at + header.size
    if bad < len(raw):
        yield Gap(bad, len(raw))
