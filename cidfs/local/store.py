"""LocalStore: the only face of this floor. Look up, read, put frames, publish.

Reading works while others write, and beside a rebuild: who reads notices within a second that another index
counts. Every look-up is one synchronous call in a transaction of its own. Writing methods belong to one
thread; they take the store's write lock, with a deadline, for as long as one transaction and one sync of the
journal last.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from cidfs.errors import (
    ChunkInvalid,
    ChunkMissing,
    CidfsError,
    DiskFailed,
    IndexLost,
    LockTimeout,
    StoreAbsent,
)
from cidfs.formats import record
from cidfs.formats.digest import cid_text
from cidfs.formats.manifest import Manifest
from cidfs.formats.store_path import DEFAULT_STORE_DIR, StorePath
from cidfs.local import removal, room, tables
from cidfs.local.files import sync_folder
from cidfs.local.index import Index, ReadTxn, WriteTxn
from cidfs.local.journal import Journal
from cidfs.local.leases import Lease
from cidfs.local.packs import CACHE, PackReader, PackWriter
from cidfs.local.publish import Candidate, Published, Publisher
from cidfs.local.rows import (
    PACK_ID_SIZE,
    InodeRow,
    PackRow,
    PathRow,
    Place,
    key_number,
    number_key,
)
from cidfs.local.state import DEFAULT_LOCK_TIMEOUT, FIRST_INODE, StateFolder
from cidfs.local.totals import Totals, count

T = TypeVar("T")

POLL_SECONDS: Final = 0.5
CLOSE_SECONDS: Final = 1.0
PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class PublishedPath:
    """A published path as a look-up finds it."""

    path: StorePath
    row: PathRow


class LocalStore:
    """One store on this disk."""

    def __init__(
        self, state: StateFolder, *, write: bool, lock_timeout: float = DEFAULT_LOCK_TIMEOUT
    ) -> None:
        self.state = state
        self.lock_timeout = lock_timeout
        self._write = write
        self.packs = PackReader(state.root)
        self._publisher = Publisher(state)
        self._swap = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._checked = 0.0
        self._folder_known: set[int] = set()
        if write:
            with state.write_lock(lock_timeout):
                self._index = self._open_current()
        else:
            self._index = self._open_current()

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        write: bool = False,
        create: bool = False,
        store_dir: str = DEFAULT_STORE_DIR,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
    ) -> LocalStore:
        """Open the store in a folder; with create, make one where none is."""
        if not create:
            return cls(StateFolder.open(root), write=write, lock_timeout=lock_timeout)
        state = StateFolder.create(root, store_dir, lock_timeout=lock_timeout)
        if not (root / "format").exists():
            with state.write_lock(lock_timeout):
                if not (root / "format").exists():
                    shutil.rmtree(root / "index" / "1", ignore_errors=True)  # half made, by one that failed
                    (root / "index" / "1").mkdir()
                    Index(root / "index" / "1", 1, write=True, create=True).close()
                    sync_folder(root / "index" / "1")
                    state.switch_index(1)
                    state.finish_creation()
                    room.restore(root)
        state = StateFolder.open(root)  # perhaps another process made it meanwhile
        if state.format.store_dir != store_dir:
            raise StoreAbsent(f"{root}: a store for {state.format.store_dir}, not for {store_dir}")
        return cls(state, write=write, lock_timeout=lock_timeout)

    @property
    def store_dir(self) -> str:
        """The store directory that the paths of this store are in, usually /nix/store."""
        return self.state.format.store_dir

    def close(self) -> None:
        """Close the index. Nothing may use this object any more."""
        if self._write:
            with contextlib.suppress(CidfsError), self.transaction(CLOSE_SECONDS) as index:
                self._publisher.settle(index)
        self._index.close()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the current index

    def _open_current(self) -> Index:
        for attempt in range(20):
            self._stamp = self.state.index_stamp()
            number = self.state.current_index()
            path = self.state.root / "index" / str(number)
            if path.is_dir():
                try:
                    return Index(path, number, write=self._write)
                except IndexLost:
                    if self.state.index_stamp() == self._stamp:
                        raise
            elif self.state.index_stamp() == self._stamp:
                break
            time.sleep(0.01 * attempt)  # a rebuild is switching just now
        raise IndexLost(
            f"{self.state.root}/index: the index is gone; run `cidfs --state {self.state.root} rebuild`"
        )

    def current(self) -> Index:
        """Return the index that counts now, as far as was looked within the last half second."""
        now = time.monotonic()
        if now - self._checked > POLL_SECONDS:
            self._checked = now
            self.refresh()
        return self._index

    def refresh(self) -> bool:
        """Look whether another index counts now, and use it; say whether it did.

        An index that is gone altogether leaves the old one in use: its file is still mapped here.
        """
        with self._swap:
            stamp = self.state.index_stamp()
            if stamp == self._stamp or stamp is None:
                return False
            before = self._stamp
            # opening for writing takes LMDB's lock: only under the write lock can nobody hold that for ever
            lock = self.state.write_lock(0) if self._write else contextlib.nullcontext()
            try:
                with lock:
                    # the old environment closes with the last transaction that uses it
                    self._index = self._open_current()
            except (IndexLost, LockTimeout):
                self._stamp = before
                return False
            return True

    def read(self) -> AbstractContextManager[ReadTxn]:
        """Open a read transaction on the index that counts now, for one synchronous block."""
        return self.current().read()

    # --- look-ups

    def journal(self) -> Journal:
        """Return the journal, for reading."""
        return Journal(self.state.root / "journal")

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
                self.packs.forget(
                    place.pack
                )  # perhaps moved by a collection: a fresh look before it counts as damage
        self.refresh()
        place = self.place(database, digest)
        if place is None:
            raise ChunkMissing(
                f"{cid_text(digest)}: not in {self.state.root}; `cidfs verify` says what it touches"
            )
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

    def totals(self) -> Totals:
        """Count what the store holds."""
        return count(self)

    def next_base(self) -> int:
        """Return the inode base that the next publication gets."""
        with self.read() as txn:
            return max(FIRST_INODE, txn.number("next-base"))

    def free_dead_readers(self) -> int:
        """Free the reader slots of processes that died; they would keep old pages from being used again."""
        return int(self.current().env.reader_check())

    def lease(self, kind: str, *, mountpoint: str = "", transport: str = "") -> Lease:
        """Say that this process is at work from now on; before its first look-up."""
        with self.read() as txn:
            serial = max(1, txn.number("next-serial"))
        return self.state.take_lease(kind, serial, mountpoint=mountpoint, transport=transport)

    # --- writing

    @property
    def publisher(self) -> Publisher:
        """What this process knows of the journal; for who holds `transaction`."""
        return self._publisher

    def pack_writer(self, kind: int, *, without: Collection[bytes] = ()) -> PackWriter:
        """Return a writer of packs of a kind that takes over an open one where it can, of all but some."""
        with self.read() as txn:
            listed = txn.get("meta", b"open:%d" % kind) or b""
        packs = [listed[i : i + PACK_ID_SIZE] for i in range(0, len(listed), PACK_ID_SIZE)]
        return PackWriter(self.state.root, kind, [p for p in packs if p not in without])

    @contextlib.contextmanager
    def transaction(self, timeout: float | None = None) -> Iterator[Index]:
        """Hold the write lock, with the index that counts now and a schema that we know."""
        with self.state.write_lock(self.lock_timeout if timeout is None else timeout):
            StateFolder.open(self.state.root)  # a long ingest may span an upgrade
            if self.state.index_stamp() != self._stamp:
                with self._swap:
                    self._index = self._open_current()
            if self._index.number not in self._folder_known:
                sync_folder(self.state.root / "index")  # whoever switched it may have died before doing so
                self._folder_known.add(self._index.number)
            self._index.check_schema()
            yield self._index

    def put_places(self, database: str, rows: Sequence[tuple[bytes, Place]], writer: PackWriter) -> None:
        """Commit the rows of frames that are synced.

        A digest that has a row keeps it, but for what was fetched and is now made here.
        """
        with self.transaction() as index, index.write() as txn:
            for digest, place in rows:
                old = txn.get(database, digest)
                if old is None or (Place.unpack(old).kind == CACHE and place.kind != CACHE):
                    txn.put_place(database, digest, place)
            self.note_packs(txn, writer)

    @staticmethod
    def note_packs(txn: WriteTxn, writer: PackWriter) -> None:
        """Remember which packs of a writer can still be appended to."""
        for identity, sealed in writer.changed.items():
            txn.note_pack(identity, writer.kind, sealed=sealed)
        writer.changed.clear()

    def with_room(self, act: Callable[[], T]) -> T:
        """Do what frees space in the end; on a full disk a second time, without the ballast."""
        try:
            return act()
        except DiskFailed:
            if not room.release(self.state.root):
                raise
        with self.state.write_lock(self.lock_timeout), self._swap:
            self._index.close()  # LMDB refuses all work after some failures
            self._index = self._open_current()
        return act()

    def remove(
        self,
        paths: Sequence[StorePath],
        *,
        referrers: bool = False,
        force: bool = False,
        on_removed: Callable[[Sequence[StorePath]], None] = lambda gone: None,
    ) -> list[StorePath]:
        """Take paths out; return those that were not there. See `removal.remove`."""
        return removal.remove(self, paths, referrers=referrers, force=force, on_removed=on_removed)

    def publish(self, group: Sequence[Candidate]) -> list[Published]:
        """Publish a group of paths in one transaction, references before referrers.

        When this returns, all of it is visible and durable, in LMDB and in the journal. A path that is
        published with the same contents is left as it is (signatures that it lacked are added); with others
        it is reported as a conflict and the rest goes on.
        """
        with self.transaction() as index:
            return self._publisher.publish(index, group)

    def pack_rows(self) -> Iterator[tuple[bytes, PackRow]]:
        """Yield identity and row of all packs."""
        for page in self._pages("packs"):
            for key, raw in page:
                if raw is not None:
                    yield key, PackRow.unpack(raw)


def _store_path(hash_part: bytes, row: PathRow) -> StorePath:
    return StorePath(hash_part.decode(), row.name.decode())
