"""The LMDB index: environment, named databases, checked rows, transactions.

Derived from packs and journal, and the one place that decides what is published. A read transaction lives
within one call and hands out copies alone; a write transaction is begun and committed by one function on one
thread, under the store's write lock. Opened read-only by who only reads: opening databases for writing takes
LMDB's own lock, which a stopped process would never give back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import lmdb

from cidfs.errors import CidfsError, DiskFailed, IndexLost, NotPermitted, StoreVersion
from cidfs.local import pages
from cidfs.local.files import allocate, disk_errors
from cidfs.local.rows import (
    DATABASES,
    LATER,
    PACK_ID_SIZE,
    SCHEMA,
    PackRow,
    Place,
    pack_number,
    seal,
    unpack_number,
    unseal,
)
from cidfs.local.state import FIRST_INODE

MAP_SIZE: Final = 128 << 30
MAX_READERS: Final = 1024
LOCK_SIZE: Final = (MAX_READERS + 3) * 64  # a cache line for each reader, and three for what is common
MAX_OPEN_PACKS: Final = 32  # remembered for each kind; older ones just stay short


def _open_environment(path: Path, *, write: bool, sync: bool) -> lmdb.Environment:
    size = MAP_SIZE
    while True:
        try:
            return lmdb.open(
                os.fsencode(path),
                map_size=size,
                max_dbs=32,
                max_readers=MAX_READERS,
                max_spare_txns=4,
                readonly=not write,
                create=write,
                sync=sync,
                metasync=sync,
            )
        except (MemoryError, lmdb.MemoryError):
            if size <= 1 << 30:
                raise
            size //= 2  # a limit on address space
        except lmdb.Error as e:
            if "Permission denied" in str(e):
                raise NotPermitted(f"{path}: permission denied; run as the owner of the store") from e
            if "already open" in str(e):  # as a rule of LMDB, never twice in one process
                raise CidfsError(f"{path}: the index is open in this process already") from e
            raise _not_opened(path, e) from e


def _not_opened(path: Path, error: lmdb.Error) -> CidfsError:
    if "No space left" in str(error):
        return DiskFailed(
            f"{path}: the index cannot be opened: the disk is full; free some space and try again"
        )
    return IndexLost(f"{path}: the index cannot be opened ({error}); run `cidfs rebuild`")


_DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.CursorFullError,
    lmdb.PageFullError,
    lmdb.InvalidError,
)  # what LMDB calls pages that cannot be
_OPEN: Final[weakref.WeakValueDictionary[str, Index]] = weakref.WeakValueDictionary()


def _allocate_lock_file(path: Path) -> None:
    """Give the lock file of an index the disk space that it claims.

    LMDB maps it and writes to it by way of that: where the disk is full, a hole in it kills the process.
    """
    lock = path / "lock.mdb"
    if os.path.realpath(path) in _OPEN:
        return  # closing a descriptor of it here would end the locks that LMDB holds on it
    with contextlib.suppress(FileNotFoundError):
        there = os.stat(lock)
        if there.st_size >= LOCK_SIZE and there.st_blocks * 512 >= there.st_size:
            return
    with disk_errors(lock, "make"):
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError as e:  # its folder: a rebuild has switched just now
            raise IndexLost(f"{path}: the index is gone; run `cidfs rebuild`") from e
        except OSError as e:
            if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return  # LMDB says what it makes of that
            raise
        try:
            allocate(fd, LOCK_SIZE)
        finally:
            os.close(fd)


class Index:
    """One LMDB environment. `number` is its name in index/."""

    def __init__(
        self, path: Path, number: int, *, write: bool, create: bool = False, sync: bool = True
    ) -> None:
        self.path = path
        self.number = number
        self.damaged_rows = 0
        self._read_only = not write
        self._opening = threading.Lock()
        if not create:
            pages.check(path)
        _allocate_lock_file(path)
        self.env = _open_environment(path, write=write, sync=sync)
        self._name = os.path.realpath(path)
        _OPEN[self._name] = self
        try:
            self.env.reader_check()
            # never changed, but replaced: a transaction knows those alone that were open when it began
            self.db: dict[str, Any] = {
                name: self.env.open_db(name.encode(), create=create) for name in DATABASES
            }
            self.open_later()
        except lmdb.Error as e:
            if create:
                raise DiskFailed(f"{path}: an index cannot be made ({e}); is the disk full?") from e
            raise _not_opened(path, e) from e
        if create:
            with self.write() as txn:
                txn.put_number("next-serial", 1)
                txn.put_number("next-base", FIRST_INODE)
                txn.put_number("schema", SCHEMA)
        self.check_schema()

    def later_made(self) -> list[str]:
        """Return the databases of LATER that were made, by another process, and are not open here."""
        if len(self.db) == len(DATABASES) + len(LATER):
            return []
        try:
            with self.env.begin(buffers=False) as raw:
                return [name for name in LATER if name not in self.db and raw.get(name.encode()) is not None]
        except lmdb.Error as e:
            raise self._unreadable(e) from e

    def open_later(self) -> None:
        """Open them. Of an index for writing, under the write lock: it takes LMDB's own lock there."""
        with self._opening:
            for name in self.later_made():
                try:
                    self.db = {**self.db, name: self.env.open_db(name.encode(), create=False)}
                except lmdb.Error as e:
                    raise self._unreadable(e) from e

    def check_schema(self) -> None:
        """Raise StoreVersion for an index of another schema, IndexLost when it does not say."""
        with self.read() as txn:
            schema = txn.number("schema")
        if schema == 0:
            raise IndexLost(f"{self.path}: the index does not say its version; run `cidfs rebuild`")
        if schema != SCHEMA:
            raise StoreVersion(
                f"{self.path}: an index of schema {schema}, and this cidfs knows {SCHEMA}:"
                " use the cidfs that wrote it"
            )

    @contextlib.contextmanager
    def read(self) -> Iterator[ReadTxn]:
        """Open a read transaction for one synchronous block."""
        if self._read_only and self.later_made():
            self.open_later()
        db = self.db
        try:
            with self.env.begin(buffers=False) as raw:
                yield ReadTxn(self, raw, db)
        except lmdb.Error as e:
            raise self._unreadable(e) from e

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTxn]:
        """Open a write transaction; it commits at the end of the block, or not at all.

        Under the write lock.
        """
        try:
            with self.env.begin(write=True, buffers=False) as raw:
                txn = WriteTxn(self, raw)
                yield txn
                txn.settle()
            self.db = txn.db
        except _DAMAGE as e:
            raise IndexLost(f"{self.path}: the index is damaged ({e}); run `cidfs rebuild`") from e
        except lmdb.Error as e:
            raise DiskFailed(f"{self.path}: cannot write the index ({e}); is the disk full?") from e

    def get(self, database: str, key: bytes) -> bytes | None:
        """Return one checked row in a transaction of its own, or None. The fast path of every look-up."""
        if database in LATER:
            with self.read() as txn:
                return txn.get(database, key)
        try:
            with self.env.begin(buffers=False) as raw:
                stored = raw.get(key, db=self.db[database])
        except lmdb.Error as e:
            raise self._unreadable(e) from e
        if stored is None:
            return None
        value = unseal(database.encode(), key, stored)
        if value is None:
            self.damaged_rows += 1
        return value

    def _unreadable(self, error: lmdb.Error) -> CidfsError:
        if isinstance(error, lmdb.PanicError):  # LMDB refuses all work after a write that failed half way
            return DiskFailed(f"{self.path}: an earlier write of the index failed; is the disk full?")
        return IndexLost(f"{self.path}: the index cannot be read ({error}); run `cidfs rebuild`")

    def sync(self) -> None:
        """Make all commits durable, of an index that was opened without that."""
        try:
            self.env.sync(True)
        except lmdb.Error as e:
            raise DiskFailed(f"{self.path}: cannot write the index ({e}); is the disk full?") from e

    def close(self) -> None:
        """Close the environment; nothing may use it any more."""
        _OPEN.pop(self._name, None)
        self.env.close()


class ReadTxn:
    """Checked reads in one transaction. db: the databases that it knows; one of LATER may be missing."""

    def __init__(self, index: Index, raw: Any, db: dict[str, Any]) -> None:
        self.index = index
        self.raw = raw
        self.db = db

    def get(self, database: str, key: bytes) -> bytes | None:
        """Return a row, or None when it is absent or damaged."""
        if self._is_absent(database):
            return None
        stored = self.raw.get(key, db=self.db[database])
        if stored is None:
            return None
        value = unseal(database.encode(), key, stored)
        if value is None:
            self.index.damaged_rows += 1
        return value

    def _is_absent(self, database: str) -> bool:
        return database not in self.db and database in LATER

    def number(self, name: str) -> int:
        """Return a number of `meta`; 0 when it is not there."""
        row = self.get("meta", name.encode())
        return unpack_number(row) if row is not None else 0

    def needed_number(self, name: str) -> int:
        """Return a number of `meta` that every index has; raise IndexLost when it is damaged or gone."""
        row = self.get("meta", name.encode())
        if row is None:
            raise IndexLost(f"{self.index.path}: its `{name}` is lost; run `cidfs rebuild`")
        return unpack_number(row)

    def rows(
        self, database: str, start: bytes = b"", *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes | None]]:
        """Yield key and row from the first key that is not below start; None for a damaged row.

        Reversed: from the last key that is not above start.
        """
        if self._is_absent(database):
            return
        name = database.encode()
        with self.raw.cursor(db=self.db[database]) as cursor:
            if reverse:
                if not cursor.set_range(start):
                    found = cursor.last()
                else:
                    found = cursor.key() == start or cursor.prev()
                items = cursor.iterprev() if found else iter(())
            else:
                found = cursor.set_range(start) if start else cursor.first()
                items = cursor.iternext() if found else iter(())
            for key, stored in items:
                value = unseal(name, key, stored)
                if value is None:
                    self.index.damaged_rows += 1
                yield key, value

    def entries(self, database: str) -> int:
        """Return how many rows a database has."""
        if self._is_absent(database):
            return 0
        return int(self.raw.stat(self.db[database])["entries"])


class WriteTxn(ReadTxn):
    """Checked reads and writes in one transaction; keeps the counts in `meta` and the packs' sums right."""

    def __init__(self, index: Index, raw: Any) -> None:
        super().__init__(index, raw, index.db)
        for name in LATER:
            if name not in self.db and raw.get(name.encode()) is not None:
                self.db = {**self.db, name: index.env.open_db(name.encode(), txn=raw)}
        self._touched: set[str] = set()
        self._packs: dict[bytes, list[int]] = {}

    def put(self, database: str, key: bytes, value: bytes) -> None:
        """Write a row."""
        self._touched.add(database)
        if self._is_absent(database):
            made = self.index.env.open_db(database.encode(), txn=self.raw)
            self.db = {**self.db, database: made}
        self.raw.put(key, seal(database.encode(), key, value), db=self.db[database])

    def delete(self, database: str, key: bytes) -> None:
        """Delete a row if it is there."""
        if self._is_absent(database):
            return
        self._touched.add(database)
        self.raw.delete(key, db=self.db[database])

    def put_number(self, name: str, value: int) -> None:
        """Write a number of `meta`."""
        self.raw.put(name.encode(), seal(b"meta", name.encode(), pack_number(value)), db=self.db["meta"])

    def put_place(self, database: str, digest: bytes, place: Place) -> None:
        """Say where a chunk or a manifest lies, and count it for its pack."""
        old = self.get(database, digest)
        if old is not None:
            self._count(Place.unpack(old), -1)
        self._count(place, 1)
        self.put(database, digest, place.packed())

    def drop_place(self, database: str, digest: bytes) -> None:
        """Forget where a chunk or a manifest lies."""
        old = self.get(database, digest)
        if old is not None:
            self._count(Place.unpack(old), -1)
            self.delete(database, digest)

    def _count(self, place: Place, sign: int) -> None:
        delta = self._packs.setdefault(place.pack, [place.kind, 0, 0, 0])
        delta[1] += sign * place.stored
        delta[2] += sign * place.length
        delta[3] += sign

    def note_pack(self, pack: bytes, kind: int, *, sealed: bool) -> None:
        """Remember whether a pack can still be appended to."""
        row = self.get("packs", pack)
        old = PackRow.unpack(row) if row is not None else PackRow(kind, 0, 0, 0, 0)
        self.put("packs", pack, old._replace(sealed=int(sealed)).packed())
        key = b"open:%d" % kind
        listed = self.get("meta", key) or b""
        packs = [listed[i : i + PACK_ID_SIZE] for i in range(0, len(listed), PACK_ID_SIZE)]
        if pack in packs and sealed:
            packs.remove(pack)
        elif pack not in packs and not sealed:
            packs.append(pack)
        self.put("meta", key, b"".join(packs[-MAX_OPEN_PACKS:]))

    def drop_pack(self, pack: bytes) -> None:
        """Forget a pack of which no place is left."""
        self._packs.pop(pack, None)
        self.delete("packs", pack)

    def settle(self) -> None:
        """Bring the counts up to date; the last act before the commit."""
        for pack, (kind, stored, length, frames) in self._packs.items():
            row = self.get("packs", pack)
            old = PackRow.unpack(row) if row is not None else PackRow(kind, 0, 0, 0, 0)
            new = old._replace(  # not below zero, where the old sums were lost
                stored=max(0, old.stored + stored),
                length=max(0, old.length + length),
                frames=max(0, old.frames + frames),
            )
            self.put("packs", pack, new.packed())
        for name in sorted(self._touched - {"meta"}):
            self.put_number(f"count:{name}", self.entries(name))
