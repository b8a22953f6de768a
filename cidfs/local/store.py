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
from pathlib import Path
from typing import Final, TypeVar

from cidfs.errors import (
    CidfsError,
    DiskFailed,
    IndexLost,
    LockTimeout,
    StoreAbsent,
)
from cidfs.formats.realisation import Realisation
from cidfs.formats.store_path import DEFAULT_STORE_DIR, StorePath
from cidfs.local import removal, room
from cidfs.local.files import sync_folder
from cidfs.local.index import Index, WriteTxn
from cidfs.local.journal import Journal
from cidfs.local.leases import Lease
from cidfs.local.lookups import Lookups, PublishedPath
from cidfs.local.packs import CACHE, PackReader, PackWriter
from cidfs.local.publish import Candidate, Published, Publisher, Realised
from cidfs.local.rows import (
    PACK_ID_SIZE,
    Place,
)
from cidfs.local.state import DEFAULT_LOCK_TIMEOUT, StateFolder
from cidfs.local.totals import Totals, count

__all__ = ["LocalStore", "PublishedPath"]

T = TypeVar("T")

POLL_SECONDS: Final = 0.5
CLOSE_SECONDS: Final = 1.0


class LocalStore(Lookups):
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
    def root(self) -> Path:
        """The state folder."""
        return self.state.root

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

    def refresh(self, timeout: float = 0) -> bool:
        """Look whether another index counts now, and use it; say whether it did.

        An index that is gone altogether leaves the old one in use: its file is still mapped here. So does a
        store that was opened for writing and whose write lock is not had within timeout seconds; it does not
        see a database that another process made, either.
        """
        with self._swap:
            stamp = self.state.index_stamp()
            same = stamp in (self._stamp, None)
            if same and not (self._write and stamp is not None and self._index.later_made()):
                return False
        # opening for writing takes LMDB's lock: only under the write lock can nobody hold that for ever
        lock = self.state.write_lock(timeout) if self._write else contextlib.nullcontext()
        try:
            with lock, self._swap:
                before = self._stamp
                if self.state.index_stamp() == before:
                    self._index.open_later()
                    return not same  # another thread was quicker
                try:
                    # the old environment closes with the last transaction that uses it
                    self._index = self._open_current()
                except IndexLost:
                    self._stamp = before
                    return False
        except LockTimeout:
            return False
        return True

    def journal(self) -> Journal:
        """Return the journal, for reading."""
        return Journal(self.state.root / "journal")

    def totals(self) -> Totals:
        """Count what the store holds."""
        return count(self)

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
            with self._swap:
                if self.state.index_stamp() != self._stamp:
                    self._index = self._open_current()
            if self._index.number not in self._folder_known:
                sync_folder(self.state.root / "index")  # whoever switched it may have died before doing so
                self._folder_known.add(self._index.number)
            self._index.check_schema()
            self._index.open_later()
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

    def put_realisations(self, group: Sequence[Realisation]) -> list[Realised]:
        """Put realisations of published paths in one transaction.

        When this returns, they are visible and durable, in LMDB and in the journal. One that is there keeps
        its path and gets what it lacks (signatures); one that contradicts it is reported as a conflict, one
        whose path is not published as absent, and the rest goes on.
        """
        with self.transaction() as index:
            return self._publisher.put_realisations(index, group)
