"""Journal entries: what a transaction committed, in a form that can say it all again.

A journal file is a row of frames (kind 16). Each frame holds what one transaction did, under one checksum:

    u32 count of entries, u8 flags (bit 0: these entries belong to the checkpoint of this file), then of each
    entry u8 kind, u64 serial, u32 length, payload

    kind 1  publication   u64 inode base, u32 node count,
                          u32 flags (bit 0: fetched, else own; bit 1: to be mirrored), record
    kind 2  amendment     u64 inode base of the publication, record
    kind 3  removal       u64 inode base of the publication, hash part 32
    kind 4  realisation   the realisation's canonical form
    kind 5  checkpoint    u64 next serial, u64 next base,
                          u32 count, serials (u64 each) of the entries that it keeps

Records stand without their hints. An unknown kind refuses the store:
FormatError. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cidfs.errors import FormatError
from cidfs.formats import frames
from cidfs.formats.store_path import HASH_PART_LENGTH, check_hash_part

FLAG_FETCHED: Final = 1
FLAG_TO_MIRROR: Final = 2
_KNOWN_FLAGS: Final = FLAG_FETCHED | FLAG_TO_MIRROR
_COUNT: Final = struct.Struct("<IB")
_ENTRY: Final = struct.Struct("<BQI")
_PUBLICATION: Final = struct.Struct("<QII")
_BASE: Final = struct.Struct("<Q")
_CHECKPOINT: Final = struct.Struct("<QQI")


@dataclass(frozen=True, slots=True)
class Publication:
    """A store path became visible. record holds the record's bytes, not decoded."""

    serial: int
    base: int
    count: int
    flags: int
    record: bytes


@dataclass(frozen=True, slots=True)
class Amendment:
    """A published path has another record under the same manifest and base."""

    serial: int
    base: int
    record: bytes


@dataclass(frozen=True, slots=True)
class Removal:
    """A published path is gone."""

    serial: int
    base: int
    hash_part: str


@dataclass(frozen=True, slots=True)
class Realisation:
    """An output of a derivation came to a store path that is published; of one id, the last entry counts.

    body holds the canonical bytes, not decoded.
    """

    serial: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything below next_serial stands in this file; live are the serials of its entries."""

    serial: int
    next_base: int
    live: tuple[int, ...]


Entry = Publication | Amendment | Removal | Realisation | Checkpoint


@dataclass(frozen=True, slots=True)
class Transaction:
    """The entries of one frame."""

    entries: tuple[Entry, ...]
    of_checkpoint: bool = False


def _encode_entry(entry: Entry) -> bytes:
    match entry:
        case Publication():
            if entry.flags & ~_KNOWN_FLAGS:
                raise FormatError(f"journal: unknown flags {entry.flags:#x}")
            kind, payload = 1, _PUBLICATION.pack(entry.base, entry.count, entry.flags) + entry.record
        case Amendment():
            kind, payload = 2, _BASE.pack(entry.base) + entry.record
        case Removal():
            kind, payload = 3, _BASE.pack(entry.base) + check_hash_part(entry.hash_part).encode()
        case Realisation():
            kind, payload = 4, entry.body
        case Checkpoint():
            live = struct.pack(f"<{len(entry.live)}Q", *entry.live)
            kind, payload = 5, _CHECKPOINT.pack(entry.serial, entry.next_base, len(entry.live)) + live
    return _ENTRY.pack(kind, entry.serial, len(payload)) + payload


def encode(entries: Sequence[Entry], *, of_checkpoint: bool = False) -> bytes:
    """Return the frame of one transaction."""
    body = _COUNT.pack(len(entries), int(of_checkpoint)) + b"".join(_encode_entry(e) for e in entries)
    return frames.build_from(frames.KIND_JOURNAL, body)


def decode(body: bytes) -> Transaction:
    """Return the transaction of a frame's decoded data.

    Raise FormatError for what this version does not know.
    """
    if len(body) < _COUNT.size:
        raise FormatError("journal: a frame that is too short")
    count, flags = _COUNT.unpack_from(body)
    if flags > 1:
        raise FormatError(f"journal: unknown flags {flags:#x}; a newer cidfs wrote this store")
    at = _COUNT.size
    entries: list[Entry] = []
    for _ in range(count):
        if at + _ENTRY.size > len(body):
            raise FormatError("journal: an entry that is cut short")
        kind, serial, length = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        payload = body[at : at + length]
        if len(payload) != length:
            raise FormatError("journal: an entry that is cut short")
        at += length
        entries.append(_decode_entry(kind, serial, payload))
    if at != len(body):
        raise FormatError("journal: bytes after the last entry")
    return Transaction(tuple(entries), bool(flags & 1))


def _decode_entry(kind: int, serial: int, payload: bytes) -> Entry:
    try:
        if kind == 1:
            base, count, flags = _PUBLICATION.unpack_from(payload)
            if flags & ~_KNOWN_FLAGS:
                raise FormatError(f"journal: unknown flags {flags:#x}; a newer cidfs wrote this store")
            return Publication(serial, base, count, flags, payload[_PUBLICATION.size :])
        if kind == 2:
            return Amendment(serial, _BASE.unpack_from(payload)[0], payload[_BASE.size :])
        if kind == 3:
            if len(payload) != _BASE.size + HASH_PART_LENGTH:
                raise FormatError("journal: a removal of wrong length")
            hash_part = check_hash_part(payload[_BASE.size :].decode("ascii"))
            return Removal(serial, _BASE.unpack_from(payload)[0], hash_part)
        if kind == 4:
            return Realisation(serial, payload)
        if kind == 5:
            next_serial, next_base, count = _CHECKPOINT.unpack_from(payload)
            if next_serial != serial or len(payload) != _CHECKPOINT.size + 8 * count:
                raise FormatError("journal: a checkpoint of wrong length")
            live = struct.unpack_from(f"<{count}Q", payload, _CHECKPOINT.size)
            return Checkpoint(serial, next_base, live)
    except (struct.error, UnicodeDecodeError):
        raise FormatError(f"journal: an entry of kind {kind} that is cut short") from None
    raise FormatError(f"journal: unknown entry kind {kind}; a newer cidfs wrote this store")
