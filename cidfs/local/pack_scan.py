"""All packs read into a new index: by their footers, by a scan where there is none or a bad one.

Every copy's place is remembered: of what lies in several places, one that is whole shall count, and when a
collection takes a pack away meanwhile, another copy takes its place. Synchronous; used by one rebuild.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cidfs.errors import CidfsError, FormatError
from cidfs.formats import frames, pack
from cidfs.local.files import disk_errors, sync_folder
from cidfs.local.index import Index, WriteTxn
from cidfs.local.packs import MANIFEST, OWN, PackReader, bad_mark
from cidfs.local.rows import PACK_ID_SIZE, Place
from cidfs.local.state import PACK_KINDS

ROWS_A_TRANSACTION: Final = 20_000


@dataclass
class _Seen:
    """How far a pack was read."""

    path: Path
    sealed: bool
    end: int


def _identity(name: str) -> bytes | None:
    try:
        raw = bytes.fromhex(name)
    except ValueError:
        return None
    return raw if len(raw) == PACK_ID_SIZE and raw.hex() == name else None


def all_packs(root: Path) -> Iterator[tuple[bytes, int, Path]]:
    """Yield identity, kind and path of every pack file of a store."""
    for kind, word in enumerate(PACK_KINDS):
        for folder in sorted((root / "packs" / word).glob("*")):  # a backup may have left empty ones out
            for name in sorted(os.listdir(folder)):
                identity = _identity(name)
                if identity is not None:
                    yield identity, kind, folder / name


class PackScan:
    """The rows of all packs of a store, on their way into an index; problems takes lines for people."""

    def __init__(self, root: Path, problems: list[str], progress: Callable[[str, int], None]) -> None:
        self._root = root
        self._problems = problems
        self._progress = progress
        self._seen: dict[bytes, _Seen] = {}
        self._copies: dict[tuple[str, bytes], list[Place]] = {}  # of what lies in several places
        self._judged: set[tuple[str, bytes]] = set()

    def read_all(self, index: Index) -> None:
        """Read all packs, and judge what lies in several places."""
        packs = list(all_packs(self._root))
        for number, (identity, kind, path) in enumerate(packs):
            self._progress("reading packs", len(packs) - number)
            self._scan(index, identity, kind, path)
        self._judge(index)

    def catch_up(self, index: Index) -> None:
        """Forget packs that went since, and read what was appended. Under the write lock.

        Those with a bad mark are read again: a collection may have given the space of their dead frames back.
        """
        gone = {i for i, seen in self._seen.items() if not seen.path.exists()}
        self._forget(index, gone | {i for i, seen in self._seen.items() if bad_mark(seen.path).exists()})
        for identity, kind, path in list(all_packs(self._root)):
            known = self._seen.get(identity)
            if known is None or (not known.sealed and path.stat().st_size > known.end):
                self._scan(index, identity, kind, path)
        self._judge(index)

    def _scan(self, index: Index, identity: bytes, kind: int, path: Path) -> None:
        """Read the rows of a pack, or what was appended since it was read before."""
        seen = self._seen.get(identity)
        start = seen.end if seen is not None else len(pack.HEADER)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        with disk_errors(path, "read"):
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                sync_folder(path.parent)
                size = os.fstat(fd).st_size
                trusted = not bad_mark(path).exists()  # else its footer may tell of what is not there
                rows = self._footer(fd, path, size) if trusted else None
                sealed = rows is not None or not trusted
                end = size
                if rows is None:
                    rows, end = self._scan_frames(fd, path, start, size, name_gaps=trusted)
                rows = [row for row in rows if row.offset >= start]
            finally:
                os.close(fd)
        self._seen[identity] = _Seen(path, sealed, end)
        wanted = frames.KIND_MANIFEST if kind == MANIFEST else frames.KIND_CHUNK
        database = "manifests" if kind == MANIFEST else "chunks"
        for i in range(0, len(rows), ROWS_A_TRANSACTION):
            with index.write() as txn:
                for row in rows[i : i + ROWS_A_TRANSACTION]:
                    if row.kind == wanted:
                        place = Place(identity, row.offset, row.stored, row.length, kind, row.encoding)
                        self._put(txn, database, row.digest, place)
        with index.write() as txn:
            txn.note_pack(identity, kind, sealed=sealed or size >= pack.ROLL_SIZE)

    def _put(self, txn: WriteTxn, database: str, digest: bytes, place: Place) -> None:
        raw = txn.get(database, digest)
        if raw is None:
            txn.put_place(database, digest, place)
            return
        old = Place.unpack(raw)
        if old != place:
            copies = self._copies.setdefault((database, digest), [old])
            if place not in copies:
                copies.append(place)
                self._judged.discard((database, digest))
            if old.kind != OWN and place.kind == OWN:  # what was made here beats what was fetched
                txn.put_place(database, digest, place)

    def _footer(self, fd: int, path: Path, size: int) -> list[pack.Row] | None:
        try:
            trailer = pack.read_trailer(
                os.pread(fd, pack.TRAILER_SIZE, max(0, size - pack.TRAILER_SIZE)), size
            )
            if trailer is None:
                return None
            offset, length = trailer
            return pack.read_footer(os.pread(fd, length, offset), offset)
        except FormatError as e:
            self._problems.append(f"{path}: {e}; read from its frames instead")
            return None

    def _scan_frames(
        self, fd: int, path: Path, start: int, size: int, *, name_gaps: bool
    ) -> tuple[list[pack.Row], int]:
        rows: list[pack.Row] = []
        end = start
        data = os.pread(fd, max(0, size - start), start)  # nothing, where not even the header was kept
        for found in frames.scan(data):
            if isinstance(found, frames.Gap):
                if not name_gaps:
                    continue
                self._problems.append(
                    f"{path}: bytes {start + found.offset} to {start + found.end} belong to no whole frame"
                )
            else:
                rows.append(pack.row_of(start + found.offset, found.header))
                end = start + found.offset + found.header.size
        return rows, end

    def _judge(self, index: Index) -> None:
        """Of what lies in several places, let one count that is whole: a footer does not tell."""
        reader = PackReader(self._root)
        better: list[tuple[str, bytes, Place]] = []
        for (database, digest), copies in self._copies.items():
            if (database, digest) in self._judged:
                continue
            self._judged.add((database, digest))
            with index.read() as txn:
                raw = txn.get(database, digest)
            if raw is None or not _is_whole(reader, digest, Place.unpack(raw)):
                other = next((p for p in copies if _is_whole(reader, digest, p)), None)
                if other is not None:
                    better.append((database, digest, other))
        for i in range(0, len(better), ROWS_A_TRANSACTION):
            with index.write() as txn:
                for database, digest, place in better[i : i + ROWS_A_TRANSACTION]:
                    txn.put_place(database, digest, place)

    def _forget(self, index: Index, gone: set[bytes]) -> None:
        """Drop the rows of packs that a collection took away meanwhile; other copies are judged anew."""
        if not gone:
            return
        for copies in self._copies.values():
            copies[:] = [place for place in copies if place.pack not in gone]
        with index.write() as txn:
            for database in ("chunks", "manifests"):
                for digest, raw in list(txn.rows(database)):
                    if raw is not None and Place.unpack(raw).pack in gone:
                        txn.drop_place(database, digest)
                        self._judged.discard((database, digest))
            for identity in gone:
                del self._seen[identity]
                txn.drop_pack(identity)


def _is_whole(reader: PackReader, digest: bytes, place: Place) -> bool:
    try:
        reader.read(digest, place)
    except CidfsError:
        return False
    return True
