"""What stands in the index: the rows of each LMDB database, packed and unpacked.

Pure. Every value ends in 8 bytes of BLAKE3 over database, key and value, so a flipped bit is a missing row
and never a wrong one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from blake3 import blake3

SCHEMA: Final = 1
DATABASES: Final = (
    "meta",
    "paths",
    "records",
    "pending",
    "inodes",
    "manifests",
    "chunks",
    "packs",
    "referrers",
)
LATER: Final = ("realisations", "outputs")  # made with the first row that is put in
PACK_ID_SIZE: Final = 12

_PLACE: Final = struct.Struct("<12sIIIBB")
_PATH: Final = struct.Struct("<QIQQIQI32s32s")
_INODE: Final = struct.Struct("<32sI32s")
_PACK: Final = struct.Struct("<BBQQI")
_U64: Final = struct.Struct("<Q")
_KEY: Final = struct.Struct(">Q")


def seal(database: bytes, key: bytes, value: bytes) -> bytes:
    """Return a value as it is stored: with its check bytes."""
    return value + blake3(b"".join((database, b"\0", key, b"\0", value))).digest(8)


def unseal(database: bytes, key: bytes, stored: bytes) -> bytes | None:
    """Return a stored value without its check bytes, or None when they are wrong."""
    value = stored[:-8]
    if blake3(b"".join((database, b"\0", key, b"\0", value))).digest(8) != stored[-8:]:
        return None
    return value


def number_key(number: int) -> bytes:
    """Return the key of a number: big-endian, so that LMDB sorts it."""
    return _KEY.pack(number)


def key_number(key: bytes) -> int:
    """Return the number of a key."""
    return int(_KEY.unpack(key)[0])


def pack_number(value: int) -> bytes:
    """Return the row of a plain number."""
    return _U64.pack(value)


def unpack_number(row: bytes) -> int:
    """Return the number of a row."""
    return int(_U64.unpack(row)[0])


class Place(NamedTuple):
    """Where a frame lies on this disk. kind: position in state.PACK_KINDS; lengths in bytes."""

    pack: bytes
    offset: int
    stored: int
    length: int
    kind: int
    encoding: int

    def packed(self) -> bytes:
        """Return the row."""
        return _PLACE.pack(*self)

    @classmethod
    def unpack(cls, row: bytes) -> Place:
        """Return the place of a row."""
        return cls._make(_PLACE.unpack(row))


PLACE_SIZE: Final = _PLACE.size


@dataclass(frozen=True, slots=True)
class PathRow:
    """A published path. whole: the serial at which all that it refers to was there, 0 before.

    files and size count its regular files and their bytes; nar_size is that of its NAR.
    """

    base: int
    count: int
    serial: int
    whole: int
    flags: int
    size: int
    files: int
    manifest: bytes
    root_row: bytes
    name: bytes

    def packed(self) -> bytes:
        """Return the row."""
        fixed = _PATH.pack(
            self.base,
            self.count,
            self.serial,
            self.whole,
            self.flags,
            self.size,
            self.files,
            self.manifest,
            self.root_row,
        )
        return fixed + self.name

    @classmethod
    def unpack(cls, row: bytes) -> PathRow:
        """Return the path of a row."""
        base, count, serial, whole, flags, size, files, manifest, root = _PATH.unpack_from(row)
        return cls(base, count, serial, whole, flags, size, files, manifest, root, row[_PATH.size :])


_WHOLE_AT: Final = 20


def head_of_path(row: bytes) -> tuple[int, bytes]:
    """Return of a published path's row when it became whole, and its name: what most look-ups need."""
    return _U64.unpack_from(row, _WHOLE_AT)[0], row[_PATH.size :]


class InodeRow(NamedTuple):
    """Whose inode range this is. hash_part as ASCII."""

    hash_part: bytes
    nodes: int
    manifest: bytes

    def packed(self) -> bytes:
        """Return the row."""
        return _INODE.pack(*self)

    @classmethod
    def unpack(cls, row: bytes) -> InodeRow:
        """Return the range of a row."""
        return cls._make(_INODE.unpack(row))


class RemovedRow(NamedTuple):
    """A path that was removed and whose inode range a mount may still know.

    serial: that of its removal. Stands in `meta` under `removed_key` of its base.
    """

    serial: int
    hash_part: bytes
    name: bytes

    def packed(self) -> bytes:
        """Return the row."""
        return _U64.pack(self.serial) + self.hash_part + self.name

    @classmethod
    def unpack(cls, row: bytes) -> RemovedRow:
        """Return the removed path of a row."""
        return cls(_U64.unpack_from(row)[0], row[8:40], row[40:])


REMOVED: Final = b"removed:"


def removed_key(base: int) -> bytes:
    """Return the key in `meta` of a removed path's inode range."""
    return REMOVED + number_key(base)


class RealisationRow(NamedTuple):
    """A realisation: serial of the entry that it is from, and its canonical bytes."""

    serial: int
    body: bytes

    def packed(self) -> bytes:
        """Return the row."""
        return _U64.pack(self.serial) + self.body

    @classmethod
    def unpack(cls, row: bytes) -> RealisationRow:
        """Return the realisation of a row."""
        return cls(_U64.unpack_from(row)[0], row[8:])


class PackRow(NamedTuple):
    """What the index refers to in a pack: bytes of frames, bytes that they unpack to, how many."""

    kind: int
    sealed: int
    stored: int
    length: int
    frames: int

    def packed(self) -> bytes:
        """Return the row."""
        return _PACK.pack(*self)

    @classmethod
    def unpack(cls, row: bytes) -> PackRow:
        """Return the pack of a row."""
        return cls._make(_PACK.unpack(row))
