"""Look-ups: what a store answers about its paths, inode numbers, chunks and manifests.

Each is one synchronous call in a read transaction of its own; long listings take a transaction a page. Knows
no more of the store than how to read the index that counts, and its packs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cidfs.errors import ChunkInvalid, ChunkMissing
from cidfs.formats import realisation, record
from cidfs.formats.digest import cid_text
from cidfs.formats.manifest import Manifest
from cidfs.formats.realisation import Realisation
from cidfs.formats.store_path import StorePath
from cidfs.local import tables
from cidfs.local.index import Index, ReadTxn
from cidfs.local.packs import PackReader
from cidfs.local.rows import InodeRow, PackRow, PathRow, Place, RealisationRow, key_number, number_key
from cidfs.local.state import FIRST_INODE

PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class PublishedPath:
    """A published path as a look-up finds it."""

    path: StorePath
    row: PathRow


class Lookups(ABC):
    """What can be asked of a store."""

    packs: PackReader

    @property
    @abstractmethod
    def root(self) -> Path:
        """The state folder."""

    @abstractmethod
    def current(self) -> Index:
        """Return the index that counts now, as far as was looked within the last half second."""

    @abstractmethod
    def refresh(self, timeout: float = 0) -> bool:
        """Look whether another index counts now, and use it; say whether it did."""

    def read(self) -> AbstractContextManager[ReadTxn]:
        """Open a read transaction on the index that counts now, for one synchronous block."""
        return self.current().read()

    def find(self, hash_part: bytes) -> PathRow | None:
        """Return the row of the published path with a hash part (32 ASCII bytes), or None."""
        row = self.current().get("paths", hash_part)
        return PathRow.unpack(row) if row is not None else None

    def find_path(self, path: StorePath) -> PathRow | None:
        """Return the row of a store path when it is published under just that name."""
        row = self.find(path.hash_part.encode())
        return row if row is not None and row.name == path.name.encode() else None

    def record_of(self, hash_part: str) -> record.Record | None:
        """Return the record of a published path, without its hints."""
        raw = self.current().get("records", hash_part.encode())
        return record.decode(raw) if raw is not None else None

    def referrers(self, hash_part: str) -> list[str]:
        """Return the hash parts of the published paths that refer to a path."""
        with self.read() as txn:
            return [r.decode() for r in tables.referrers(txn, hash_part.encode())]

    def realisation(self, identity: str) -> Realisation | None:
        """Return what an output came to, by the id that Nix has for it, or None. Its path is published."""
        raw = self.current().get("realisations", realisation.key_of(identity))
        return _realisation(raw) if raw is not None else None

    def realisations_of(self, path: StorePath) -> list[Realisation]:
        """Return the realisations that came to a path, by their ids."""
        with self.read() as txn:
            rows = [txn.get("realisations", key) for key in tables.realised(txn, path.hash_part.encode())]
        found = (_realisation(raw) for raw in rows if raw is not None)
        return sorted((each for each in found if each.store_path == path), key=lambda each: each.id)

    def realisations(self) -> Iterator[tuple[int, Realisation]]:
        """Yield serial and value of all realisations, a page a transaction."""
        for page in self._pages("realisations"):
            for _, raw in page:
                if raw is not None:
                    yield RealisationRow.unpack(raw).serial, _realisation(raw)

    def range_of(self, inode: int) -> tuple[int, InodeRow] | None:
        """Return base and row of the range that an inode number is in, or None."""
        with self.read() as txn:
            for key, raw in txn.rows("inodes", number_key(inode), reverse=True):
                base = key_number(key)
                if raw is None:
                    return None
                row = InodeRow.unpack(raw)
                return (base, row) if base <= inode < base + row.nodes else None
        return None

    def place(self, database: str, digest: bytes) -> Place | None:
        """Return where a chunk (`chunks`) or a manifest (`manifests`) lies, or None."""
        row = self.current().get(database, digest)
        return Place.unpack(row) if row is not None else None

    def chunk_places(self, digests: Sequence[bytes]) -> list[Place | None]:
        """Return the places of several chunks, looked up in one transaction."""
        found: list[Place | None] = []
        with self.read() as txn:
            for digest in digests:
                row = txn.get("chunks", digest)
                found.append(Place.unpack(row) if row is not None else None)
        return found

    def _read(self, database: str, digest: bytes) -> bytes:
        place = self.place(database, digest)
        if place is not None:
            try:
                return self.packs.read(digest, place)
            except (ChunkMissing, ChunkInvalid):
                # perhaps moved by a collection: a fresh look before it counts as damage
                self.packs.forget(place.pack)
        self.refresh()
        place = self.place(database, digest)
        if place is None:
            raise ChunkMissing(f"{cid_text(digest)}: not in {self.root}; `cidfs verify` says what it touches")
        return self.packs.read(digest, place)

    def read_chunk(self, digest: bytes) -> bytes:
        """Return a chunk's verified bytes; raise ChunkMissing or ChunkInvalid."""
        return self._read("chunks", digest)

    def read_manifest(self, digest: bytes) -> Manifest:
        """Return a manifest, its digest verified; raise ChunkMissing, ChunkInvalid or FormatError."""
        return Manifest(self._read("manifests", digest))

    def _pages(self, database: str) -> Iterator[list[tuple[bytes, bytes | None]]]:
        start = b""
        while True:
            page: list[tuple[bytes, bytes | None]] = []
            with self.read() as txn:
                for item in txn.rows(database, start):
                    page.append(item)
                    if len(page) == PAGE:
                        break
            if page:
                yield page
            if len(page) < PAGE:
                return
            start = page[-1][0] + b"\0"

    def paths(self) -> Iterator[PublishedPath]:
        """Yield all published paths in the order of their hash parts, a page a transaction."""
        for page in self._pages("paths"):
            for key, raw in page:
                if raw is not None:
                    row = PathRow.unpack(raw)
                    yield PublishedPath(_store_path(key, row), row)

    def publications(self, start: int) -> Iterator[tuple[int, PublishedPath]]:
        """Yield inode base and path of what is published, by base, from start on."""
        while True:
            page: list[tuple[int, PublishedPath]] = []
            seen = 0
            with self.read() as txn:
                for key, raw in txn.rows("inodes", number_key(start)):
                    seen += 1
                    start = key_number(key) + 1
                    if raw is not None:
                        here = InodeRow.unpack(raw)
                        row = tables.find_path(txn, here.hash_part)
                        if row is not None and row.base == start - 1:
                            page.append((row.base, PublishedPath(_store_path(here.hash_part, row), row)))
                    if seen == PAGE:
                        break
            yield from page
            if seen < PAGE:
                return

    def places(self, database: str) -> Iterator[tuple[bytes, Place]]:
        """Yield digest and place of all chunks or manifests."""
        for page in self._pages(database):
            for key, raw in page:
                if raw is not None:
                    yield key, Place.unpack(raw)

    def next_base(self) -> int:
        """Return the inode base that the next publication gets."""
        with self.read() as txn:
            return max(FIRST_INODE, txn.number("next-base"))

    def pack_rows(self) -> Iterator[tuple[bytes, PackRow]]:
        """Yield identity and row of all packs."""
        for page in self._pages("packs"):
            for key, raw in page:
                if raw is not None:
                    yield key, PackRow.unpack(raw)


def _store_path(hash_part: bytes, row: PathRow) -> StorePath:
    return StorePath(hash_part.decode(), row.name.decode())


def _realisation(raw: bytes) -> Realisation:
    return realisation.decode(RealisationRow.unpack(raw).body)
