"""The rows of the index held against each other and against the pack files, without reading a chunk.

Each check sees one moment: it looks up what it needs in the transaction of its page. What changes while pages
are walked (the sums of packs that are being written) is judged only where it stood still. Synchronous,
changes nothing; memory grows with the number of packs alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from cidfs.errors import FormatError
from cidfs.formats import record
from cidfs.formats.digest import cid_text
from cidfs.formats.frames import HEADER_SIZE
from cidfs.formats.pack import HEADER
from cidfs.local import tables
from cidfs.local.audit_realisations import realisation_notes
from cidfs.local.index import ReadTxn
from cidfs.local.notes import Note
from cidfs.local.packs import pack_path
from cidfs.local.rows import InodeRow, PackRow, PathRow, Place, key_number, number_key
from cidfs.local.state import FIRST_INODE
from cidfs.local.store import LocalStore

PAGE: Final = 1000
PLACES: Final = ("manifests", "chunks")
REBUILD: Final = "run `cidfs rebuild`"

OnMisplaced = Callable[[str, bytes, Place, str], None]
Check = Callable[[ReadTxn, bytes, bytes | None], Iterable[Note]]


def _walk(store: LocalStore, database: str, check: Check) -> Iterator[Note]:
    """Check all rows of a database, a page a transaction; name those whose check bytes are wrong."""
    start = b""
    while True:
        notes: list[Note] = []
        seen = 0
        with store.read() as txn:
            where = str(txn.index.path)
            for key, raw in txn.rows(database, start):
                seen += 1
                start = key + b"\0"
                if raw is None:
                    text = f"a row of {database} is damaged ({_key_text(database, key)}); {REBUILD}"
                    notes.append(Note("index", f"{database} {_key_text(database, key)}", where, text))
                notes += check(txn, key, raw)
                if seen == PAGE:
                    break
        yield from notes
        if seen < PAGE:
            return


def _key_text(database: str, key: bytes) -> str:
    if database in ("paths", "records", "referrers", "meta"):
        return key.decode(errors="backslashreplace")
    if database in PLACES:
        return cid_text(key) if len(key) == 32 else key.hex()
    return str(key_number(key)) if len(key) == 8 else key.hex()


def path_notes(store: LocalStore, step: Callable[[int], None] = lambda count: None) -> Iterator[Note]:
    """Check of each path its inode range, its referrers' rows and whether it is whole.

    Then the ranges, and the realisations.
    """
    expected = 0

    def check(txn: ReadTxn, key: bytes, raw: bytes | None) -> Iterator[Note]:
        nonlocal expected
        step(1)
        if raw is None:
            return
        row = PathRow.unpack(raw)
        name = f"{store.store_dir}/{key.decode(errors='replace')}-{row.name.decode(errors='replace')}"
        inodes = txn.get("inodes", number_key(row.base))
        if inodes != InodeRow(key, row.count, row.manifest).packed():
            yield Note("index", name, name, f"its inode numbers are lost from the index; {REBUILD}")
        known = txn.get("records", key)
        try:
            if known is None:
                return  # who reads the path says so
            references = [r[:32].encode() for r in record.decode(known).references]
        except FormatError as e:
            yield Note("index", name, name, f"its record is damaged ({e}); {REBUILD}")
            return
        expected += len(references)
        whole = True
        for reference in references:
            if txn.get("referrers", reference + key) is None:
                text = f"the index does not say that it refers to {reference.decode()}; {REBUILD}"
                yield Note("index", name, name, text)
            if reference != key and whole:
                other = tables.find_path(txn, reference)
                whole = other is not None and other.whole > 0
        if whole != (row.whole > 0):
            wrong = "whole and something that it refers to is not" if row.whole else "not whole and is"
            yield Note("index", name, name, f"the index says that it is {wrong}; {REBUILD}")

    yield from _walk(store, "paths", check)
    with store.read() as txn:
        differ = txn.entries("referrers") != expected
        if txn.entries("paths") != txn.entries("records"):
            text = f"{txn.entries('records')} records of {txn.entries('paths')} store paths; {REBUILD}"
            yield Note("index", "records", str(txn.index.path), text)
    if differ:  # or something was published or removed meanwhile
        yield from _walk(store, "referrers", _check_referrer)
    yield from _range_notes(store)
    yield from realisation_notes(store, _walk)


def _check_referrer(txn: ReadTxn, key: bytes, raw: bytes | None) -> Iterator[Note]:
    if raw is None:
        return
    known = txn.get("records", key[32:])
    try:
        if known is not None and any(r[:32].encode() == key[:32] for r in record.decode(known).references):
            return
    except FormatError:
        return
    pair = key.decode(errors="backslashreplace")
    text = f"{pair[32:]} does not refer to {pair[:32]}, as the index says; {REBUILD}"
    yield Note("index", f"referrers {pair}", str(txn.index.path), text)


def _range_notes(store: LocalStore) -> Iterator[Note]:
    end, last = FIRST_INODE, 0

    def check(txn: ReadTxn, key: bytes, raw: bytes | None) -> Iterator[Note]:
        nonlocal end, last
        if raw is None:
            return
        base = key_number(key)
        if base < end:
            text = f"inode numbers {base} to {end - 1} are given twice, from {last} and from {base} on; "
            yield Note("index", f"inodes {base}", str(txn.index.path), text + REBUILD)
        end, last = max(end, base + InodeRow.unpack(raw).nodes), base

    yield from _walk(store, "inodes", check)
    with store.read() as txn:
        base, limit = txn.number("next-base"), txn.number("limit")
        where = str(txn.index.path)
        if base < end:
            text = f"the next inode number is {base}, and numbers up to {end - 1} are given out; {REBUILD}"
            yield Note("inodes", "next-base", where, text)
        if 0 < limit < base:
            text = f"the limit of inode numbers is {limit}, and the next one is {base}; {REBUILD}"
            yield Note("inodes", "limit", where, text)


def place_notes(
    store: LocalStore,
    on_misplaced: OnMisplaced | None,
    step: Callable[[int], None] = lambda count: None,
) -> Iterator[Note]:
    """Compare the packs' sums with the places of all chunks and manifests.

    on_misplaced is told each row that points where no frame can be, by the size of the pack file.
    """
    before = dict(store.pack_rows())
    sums: dict[bytes, list[int]] = {}
    sizes: dict[bytes, int] = {}

    def check(database: str, txn: ReadTxn, key: bytes, raw: bytes | None) -> tuple[Note, ...]:
        step(1)
        if raw is None:
            return ()
        place = Place.unpack(raw)
        total = sums.get(place.pack)
        if total is None:
            total = sums[place.pack] = [0, 0, 0]
        total[0] += place.stored
        total[1] += place.length
        total[2] += 1
        if on_misplaced is not None:
            end = place.offset + HEADER_SIZE + place.stored
            if place.offset < len(HEADER) or end > sizes.get(place.pack, 0):
                reason = _misplaced(store, place, end, sizes)
                if reason:
                    store.refresh(store.lock_timeout)
                    if store.place(database, key) == place:  # else moved or dropped meanwhile
                        on_misplaced(database, key, place, reason)
        return ()

    for database in PLACES:
        yield from _walk(store, database, functools.partial(check, database))
    yield from _walk(store, "packs", lambda txn, key, raw: ())
    after = dict(store.pack_rows())
    suspects = {
        pack
        for pack in {*sums, *before}
        if before.get(pack) == after.get(pack) and tuple(sums.get(pack, (0, 0, 0))) != _sums(after.get(pack))
    }
    if suspects:
        yield from _judge_sums(store, suspects)


def _misplaced(store: LocalStore, place: Place, end: int, sizes: dict[bytes, int]) -> str:
    """Say why a place cannot be right, after a fresh look at the pack's size; empty when it can."""
    path = pack_path(store.state.root, place.kind, place.pack)
    try:
        sizes[place.pack] = os.stat(path).st_size
    except FileNotFoundError:
        return f"{path}: the pack is gone"
    except OSError as e:
        return f"{path}: cannot be read: {e.strerror}"
    if place.offset < len(HEADER):
        return f"{path}: no frame can be there (+{place.offset})"
    if end > sizes[place.pack]:
        return f"{path}: ends before the frame (+{place.offset})"
    return ""


def _sums(row: PackRow | None) -> tuple[int, int, int]:
    return (row.stored, row.length, row.frames) if row is not None else (0, 0, 0)


def _judge_sums(store: LocalStore, suspects: set[bytes]) -> Iterator[Note]:
    """Count the frames of some packs again, all in one transaction."""
    sums = {pack: [0, 0, 0] for pack in suspects}
    with store.read() as txn:
        for database in PLACES:
            for _, raw in txn.rows(database):
                if raw is not None:
                    place = Place.unpack(raw)
                    if place.pack in sums:
                        total = sums[place.pack]
                        total[0] += place.stored
                        total[1] += place.length
                        total[2] += 1
        for pack, total in sorted(sums.items()):
            raw = txn.get("packs", pack)
            row = PackRow.unpack(raw) if raw is not None else None
            if _sums(row) != tuple(total):
                frames = 0 if row is None else row.frames
                text = (
                    f"the index has {total[2]} frames in pack {pack.hex()} and counts {frames}, or other sums"
                )
                yield Note("index", f"packs {pack.hex()}", str(txn.index.path), f"{text}; {REBUILD}")
