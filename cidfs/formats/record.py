"""The path record: what is known of a store path besides its tree.

One canonical form; what decodes encodes alike.

    body        "cidfsrec1", then, integers little-endian, texts as u16 length and bytes:
                store path (absolute) text · NAR hash (SHA-256) 32 · NAR size u64 · references: u32 count,
                base names sorted bytewise, unique · deriver (base name or empty) text · content address (or
                empty) text · manifest digest 32 · node count u32 · root node's row 32 · required-feature bits
                u64
    signatures  u16 count, texts: Nix's own, sorted, unique
    seals       u16 count, texts: signatures over the body by those who published it, sorted, unique
    hints       u32 count, hash parts (32 characters each) of the closure

The body is what a record's signature covers, behind the domain tag `cidfs-record-1`. Pure; values are frozen.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import msgspec

from cidfs.errors import FormatError
from cidfs.formats.canonical import U16, U32, U64, Reader, signatures, text
from cidfs.formats.chunking import MAXIMUM
from cidfs.formats.manifest import DIRECTORY, MAX_NODES, NODE_SIZE, SYMLINK, decode_node
from cidfs.formats.nar import MAX_FILE, MAX_TARGET
from cidfs.formats.store_path import HASH_PART_LENGTH, StorePath, check_hash_part, parse_base_name

DOMAIN_TAG: Final = b"cidfs-record-1"
MAGIC: Final = b"cidfsrec1"
MAX_SIZE: Final = 64 << 20
KNOWN_FEATURES: Final = 0
_WHAT: Final = "record"  # in errors
_SIZE_AND_COUNT: Final = struct.Struct("<QI")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A store path's metadata. references and deriver are base names; hashes and digests are 32 raw bytes."""

    store_dir: str
    path: StorePath
    nar_hash: bytes
    nar_size: int
    references: tuple[str, ...] = ()
    deriver: str = ""
    ca: str = ""
    manifest: bytes
    node_count: int
    root_row: bytes
    features: int = 0
    signatures: tuple[str, ...] = ()
    seals: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    @property
    def full_path(self) -> str:
        """The absolute store path."""
        return self.path.full(self.store_dir)


def body(record: Record) -> bytes:
    """Return the bytes that a record's signature covers (behind DOMAIN_TAG)."""
    return b"".join(
        (
            MAGIC,
            text(_WHAT, record.full_path),
            record.nar_hash,
            U64.pack(record.nar_size),
            U32.pack(len(record.references)),
            *(text(_WHAT, r) for r in record.references),
            text(_WHAT, record.deriver),
            text(_WHAT, record.ca),
            record.manifest,
            U32.pack(record.node_count),
            record.root_row,
            U64.pack(record.features),
        )
    )


def encode(record: Record, *, hints: bool = True) -> bytes:
    """Return a record's canonical bytes; without its hints when asked to.

    Raise FormatError for a record that decode would refuse: a journal must not hold what nobody can read.
    """
    closure = record.hints if hints else ()
    parts = [body(record)]
    parts.extend(signatures(_WHAT, group) for group in (record.signatures, record.seals))
    parts.append(U32.pack(len(closure)))
    parts.extend(check_hash_part(h).encode() for h in closure)
    whole = b"".join(parts)
    if decode(whole) != msgspec.structs.replace(record, hints=closure):
        raise FormatError(f"record: the one of {record.path} is not in canonical form")
    return whole


def _check_store_dir(store_dir: str) -> str:
    if not store_dir.startswith("/") or any(part in ("", ".", "..") for part in store_dir[1:].split("/")):
        raise FormatError(f"record: {store_dir!r} is not a store directory")
    return store_dir


def _check_root(row: bytes, node_count: int) -> bytes:
    # It answers for the path before its tree is here, so it must be one that a tree can have.
    root = decode_node(row)
    if root.type == DIRECTORY:
        fits = root.size == 0 and root.count < node_count and root.first == (1 if root.count else 0)
        fits = fits and bool(root.count) == (node_count > 1)
    elif root.type == SYMLINK:
        fits = 0 < root.size <= MAX_TARGET and root.first == root.count == 0 and node_count == 1
    else:
        fits = root.count <= root.size <= root.count * MAXIMUM and root.first == 0 and node_count == 1
    if not fits or root.name_offset or root.name_length or root.parent:
        raise FormatError("record: a root node that no tree has")
    return row


def decode(data: bytes) -> Record:
    """Return the record of canonical bytes; raise FormatError for all others."""
    if len(data) > MAX_SIZE:
        raise FormatError(f"record: {len(data)} bytes")
    r = Reader(_WHAT, data)
    if r.take(len(MAGIC)) != MAGIC:
        raise FormatError("record: no magic")
    where = r.text()
    store_dir, slash, base = where.rpartition("/")
    if not slash:
        raise FormatError(f"record: {where!r} is not an absolute store path")
    _check_store_dir(store_dir)
    path = parse_base_name(base)
    nar_hash, nar_size = r.take(32), r.number(U64)
    if nar_size > MAX_FILE:
        raise FormatError(f"record: a NAR of {nar_size} bytes")
    references = r.texts(U32)
    for name in references:
        parse_base_name(name)
    deriver, ca = r.text(), r.text()
    if deriver:
        parse_base_name(deriver)
    manifest, node_count, root_row = r.take(32), r.number(U32), r.take(NODE_SIZE)
    if not 0 < node_count <= MAX_NODES:
        raise FormatError(f"record: {node_count} nodes")
    _check_root(root_row, node_count)
    features = r.number(U64)
    nix_signatures, seals = r.signatures(), r.signatures()
    hints = []
    for _ in range(r.count(U32, HASH_PART_LENGTH)):
        try:
            hints.append(check_hash_part(r.take(HASH_PART_LENGTH).decode("ascii")))
        except UnicodeDecodeError:
            raise FormatError("record: a hint that is no hash part") from None
    r.end()
    return Record(
        store_dir=store_dir,
        path=path,
        nar_hash=nar_hash,
        nar_size=nar_size,
        references=references,
        deriver=deriver,
        ca=ca,
        manifest=manifest,
        node_count=node_count,
        root_row=root_row,
        features=features,
        signatures=nix_signatures,
        seals=seals,
        hints=tuple(hints),
    )


class Facts(NamedTuple):
    """What Nix is told of a path, as it stands in the record: base names and texts in ASCII."""

    nar_hash: bytes
    nar_size: int
    references: list[bytes]
    deriver: bytes
    ca: bytes
    signatures: list[bytes]


def facts_in(data: bytes) -> Facts:
    """Return what Nix is told, of canonical bytes that were decoded before: a tenth of decode's work."""
    u16 = U16.unpack_from
    at = len(MAGIC)
    at += 2 + u16(data, at)[0]
    nar_hash = data[at : at + 32]
    nar_size, count = _SIZE_AND_COUNT.unpack_from(data, at + 32)
    texts: list[bytes] = []
    at += 32 + _SIZE_AND_COUNT.size
    for _ in range(count + 2):
        stop = at + 2 + u16(data, at)[0]
        texts.append(data[at + 2 : stop])
        at = stop
    at += 32 + 4 + NODE_SIZE + 8  # manifest, nodes, root node's row, features
    count = u16(data, at)[0]
    at += 2
    signed: list[bytes] = []
    for _ in range(count):
        stop = at + 2 + u16(data, at)[0]
        signed.append(data[at + 2 : stop])
        at = stop
    ca, deriver = texts.pop(), texts.pop()
    return Facts(nar_hash, nar_size, texts, deriver, ca, signed)


def decode_known(data: bytes) -> Record:
    """Return a record that this version can use; raise FormatError for one that needs more, too."""
    found = decode(data)
    if found.features & ~KNOWN_FEATURES:
        unknown = found.features & ~KNOWN_FEATURES
        raise FormatError(
            f"record: {found.path} needs features {unknown:#x} that this cidfs does not know; use a newer one"
        )
    return found


def merge(old: Record, new: Record) -> Record:
    """Return the old record with the signatures, deriver and content address that only the new one has."""
    return msgspec.structs.replace(
        old,
        signatures=tuple(sorted({*old.signatures, *new.signatures})),
        seals=tuple(sorted({*old.seals, *new.seals})),
        deriver=old.deriver or new.deriver,
        ca=old.ca or new.ca,
    )
