"""Rebuild: make the index anew from packs and journal, beside whoever is running.

First without the lock: every pack is synced, dropped from the page cache (its pages may claim what the disk
does not have) and read, into a new index in a folder of its own. Then, under the write lock: what the old
index still knew and the journal did not is appended to the journal, what came since is read, the journal is
replayed by serial, a checkpoint is written, and the pointer is switched. Nothing that anyone can see changes:
names, inode numbers, bytes. Synchronous.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from cidfs.errors import CidfsError, FormatError, IndexLost, JournalLoss
from cidfs.formats import frames, journal, pack, record
from cidfs.formats.manifest import EXECUTABLE, FILE, Manifest
from cidfs.local import tables
from cidfs.local.files import disk_errors, leads_to, sync_folder, try_flock
from cidfs.local.index import Index, ReadTxn, WriteTxn, lengthen
from cidfs.local.journal import Journal, Replay
from cidfs.local.packs import PackReader
from cidfs.local.rows import PACK_ID_SIZE, Place
from cidfs.local.state import FIRST_INODE, PACK_KINDS, StateFolder

T = TypeVar("T")

ROWS_A_TRANSACTION: Final = 20_000
ENTRIES_A_TRANSACTION: Final = 2_000
_MANIFEST_KIND: Final = 2


@dataclass
class Report:
    """What a rebuild found. problems are lines for people; nothing in them was lost by the rebuild."""

    paths: int = 0
    chunks: int = 0
    manifests: int = 0
    packs: int = 0
    problems: list[str] = field(default_factory=list)


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
        for folder in sorted((root / "packs" / word).iterdir()):
            for name in sorted(os.listdir(folder)):
                identity = _identity(name)
                if identity is not None:
                    yield identity, kind, folder / name


class _Rebuild:
    def __init__(self, state: StateFolder, lock_timeout: float, progress: Callable[[str, int], None]) -> None:
        self._state = state
        self._timeout = lock_timeout
        self._progress = progress
        self._report = Report()
        self._seen: dict[bytes, _Seen] = {}
        self._copies: dict[bytes, list[tuple[str, Place]]] = {}  # of digests that lie in several places
        self._journal = Journal(state.root / "journal")
        self._folder = state.root / "index" / f"rebuild-{os.getpid()}-{os.urandom(4).hex()}"

    def run(self, *, accept_loss: bool) -> Report:
        root = self._state.root
        with disk_errors(self._folder, "make"):
            (root / "index").mkdir(exist_ok=True)
        held = self._make_folder()
        try:
            index = Index(self._folder, 0, write=True, create=True, sync=False)
            try:
                self._scan_all(index)
                with self._state.write_lock(self._timeout):
                    StateFolder.open(root)
                    number = self._finish(index, accept_loss)
                    index.sync()
                    index.close()
                    self._switch(number)
            finally:
                with contextlib.suppress(Exception):
                    index.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(held)
        self._report.problems = list(dict.fromkeys(self._report.problems))  # a pack's end is read twice
        return self._report

    def _make_folder(self) -> int:
        """Make the folder of the new index and lock it, so that no collection takes it for a leftover."""
        while True:
            with disk_errors(self._folder, "make"):
                self._folder.mkdir()
                held = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if try_flock(held) and leads_to(self._folder, held):
                return held
            os.close(held)
            self._folder = self._folder.with_name(f"rebuild-{os.getpid()}-{os.urandom(4).hex()}")

    # --- packs

    def _scan_all(self, index: Index) -> None:
        packs = list(all_packs(self._state.root))
        for number, (identity, kind, path) in enumerate(packs):
            self._progress("reading packs", len(packs) - number)
            self._scan(index, identity, kind, path)

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
                rows = self._footer(fd, path, size)
                sealed = rows is not None
                end = size
                if rows is None:
                    rows, end = self._scan_frames(fd, path, start, size)
                rows = [row for row in rows if row.offset >= start]
            finally:
                os.close(fd)
        self._seen[identity] = _Seen(path, sealed, end)
        wanted = frames.KIND_MANIFEST if kind == _MANIFEST_KIND else frames.KIND_CHUNK
        database = "manifests" if kind == _MANIFEST_KIND else "chunks"
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
            copies = self._copies.setdefault(digest, [(database, old)])
            copies.append((database, place))
            if old.kind != 0 and place.kind == 0:  # what was made here beats what was fetched
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
            self._report.problems.append(f"{path}: {e}; read from its frames instead")
            return None

    def _scan_frames(self, fd: int, path: Path, start: int, size: int) -> tuple[list[pack.Row], int]:
        rows: list[pack.Row] = []
        end = start
        data = os.pread(fd, max(0, size - start), start)  # nothing, where not even the header was kept
        for found in frames.scan(data):
            if isinstance(found, frames.Gap):
                self._report.problems.append(
                    f"{path}: bytes {start + found.offset} to {start + found.end} belong to no whole frame"
                )
            else:
                rows.append(pack.row_of(start + found.offset, found.header))
                end = start + found.offset + found.header.size
        return rows, end

    # --- under the lock

    def _finish(self, index: Index, accept_loss: bool) -> int:
        """Bring the new index up to what is true now; return its number."""
        self._append_old_pending()
        for identity, seen in list(self._seen.items()):
            if not seen.path.exists():
                self._forget(index, identity)
        for identity, kind, path in list(all_packs(self._state.root)):
            known = self._seen.get(identity)
            if known is None or (not known.sealed and path.stat().st_size > known.end):
                self._scan(index, identity, kind, path)
        replay = self._journal.replay()
        self._report.problems += replay.damage
        self._fill_gaps(replay)
        if replay.missing and not accept_loss:
            shown = ", ".join(str(s) for s in replay.missing[:10])
            raise JournalLoss(
                f"{self._state.root}/journal: serials {shown} are lost; what they published or removed is not"
                " known any more. Restore the journal from a backup, or go on without with --accept-loss"
            )
        self._report.problems += [f"journal: serial {s} is lost" for s in replay.missing]
        live = self._apply(index, replay)
        try:
            limit = self._state.inode_limit()
        except FormatError as e:
            if not accept_loss:
                raise
            self._report.problems.append(str(e))
            limit = FIRST_INODE
        ends = [e.base + e.count for e in replay.entries.values() if isinstance(e, journal.Publication)]
        next_base = max(limit, replay.next_base, FIRST_INODE, *ends)
        self._state.write_inode_limit(next_base)
        with index.write() as txn:
            txn.put_number("next-serial", replay.next_serial)
            txn.put_number("next-base", next_base)
            txn.put_number("limit", next_base)
            self._report.paths = txn.entries("paths")
            self._report.chunks = txn.entries("chunks")
            self._report.manifests = txn.entries("manifests")
            self._report.packs = txn.entries("packs")
        numbers = [int(name) for name in os.listdir(self._state.root / "index") if name.isdigit()]
        with index.read() as txn:
            removed = dict(tables.removed_ranges(txn))
        oldest = min((i.serial for _, i in self._state.leases() if i.kind == "mount"), default=None)
        remembered = {base for base, row in removed.items() if oldest is not None and oldest <= row.serial}
        return self._journal.write_checkpoint(
            [*live, *tables.ranges_in(replay.entries.values(), remembered)],
            replay.next_serial,
            next_base,
            above=max(numbers, default=0),
        )

    def _ask_old_index(self, question: Callable[[ReadTxn], T]) -> T | None:
        """Return what the index in use says, or None where it cannot be read: the journal is all there is.

        One of another schema is refused, for what its version keeps in it is not known here.
        """
        try:
            number = self._state.current_index()
            folder = self._state.root / "index" / str(number)
            lengthen(folder)
            old = Index(folder, number, write=False)
        except IndexLost:
            return None
        try:
            with old.read() as txn:
                return question(txn)
        except IndexLost:
            return None
        finally:
            old.close()

    def _append_old_pending(self) -> None:
        """Say again what the index in use has committed and the journal may not have."""
        pending = self._ask_old_index(lambda txn: [raw for _, raw in txn.rows("pending") if raw is not None])
        if pending:
            self._journal.append(pending)

    def _fill_gaps(self, replay: Replay) -> None:
        """Take what lost entries of the journal came to from the index in use, if that is whole."""
        next_serial = self._ask_old_index(lambda txn: txn.number("next-serial")) or 0
        next_base = self._ask_old_index(lambda txn: txn.number("next-base")) or 0
        replay.missing += range(replay.next_serial, next_serial)  # lost at the journal's end
        published = self._ask_old_index(tables.publications) if replay.missing else None
        if published is not None and next_serial >= replay.next_serial:
            self._report.problems += [
                f"journal: serial {s} is lost; the index still knew what it came to" for s in replay.missing
            ]
            replay.entries = {entry.serial: entry for entry in published}
            replay.missing = []
            replay.next_base = max(replay.next_base, next_base)
        replay.next_serial = max(replay.next_serial, next_serial)

    def _forget(self, index: Index, identity: bytes) -> None:
        """Drop the rows of a pack that a collection took away meanwhile; another copy takes their place."""
        del self._seen[identity]
        with index.write() as txn:
            for database in ("chunks", "manifests"):
                for digest, raw in list(txn.rows(database)):
                    if raw is None or Place.unpack(raw).pack != identity:
                        continue
                    txn.drop_place(database, digest)
                    for where, place in self._copies.get(digest, []):
                        if where == database and place.pack != identity and place.pack in self._seen:
                            txn.put_place(database, digest, place)
                            break
            txn.drop_pack(identity)

    def _apply(self, index: Index, replay: Replay) -> list[journal.Publication]:
        """Replay the journal into the new index; return what is live, with its latest records."""
        live: dict[str, journal.Publication] = {}
        serials = sorted(replay.entries)
        reader = PackReader(self._state.root)
        for i in range(0, len(serials), ENTRIES_A_TRANSACTION):
            self._progress("replaying the journal", len(serials) - i)
            with index.write() as txn:
                for serial in serials[i : i + ENTRIES_A_TRANSACTION]:
                    self._apply_one(txn, replay.entries[serial], live, reader)
        return sorted(live.values(), key=lambda e: e.serial)

    def _apply_one(
        self,
        txn: WriteTxn,
        entry: journal.Entry,
        live: dict[str, journal.Publication],
        reader: PackReader,
    ) -> None:
        match entry:
            case journal.Publication():
                rec = record.decode(entry.record)
                if rec.path.hash_part in live:
                    return  # the first publication since the last removal counts
                size, files = self._measure(txn, rec, reader)
                tables.put_publication(txn, entry, rec, size=size, files=files)
                live[rec.path.hash_part] = entry
            case journal.Amendment():
                tables.put_amendment(txn, entry)
                hash_part = record.decode(entry.record).path.hash_part
                old = live.get(hash_part)
                if old is not None and old.base == entry.base:
                    live[hash_part] = journal.Publication(
                        old.serial, old.base, old.count, old.flags, entry.record
                    )
            case journal.Removal():
                old = live.get(entry.hash_part)
                if old is not None and old.base == entry.base:
                    tables.drop_publication(txn, entry)
                    del live[entry.hash_part]
            case journal.Checkpoint():
                raise FormatError("journal: a checkpoint among the entries")

    def _measure(self, txn: WriteTxn, rec: record.Record, reader: PackReader) -> tuple[int, int]:
        """Return size and number of the regular files of a path, as its manifest says them."""
        raw = txn.get("manifests", rec.manifest)
        try:
            if raw is None:
                raise IndexLost("its manifest is in no pack")
            manifest = Manifest(reader.read(rec.manifest, Place.unpack(raw)))
        except CidfsError as e:
            self._report.problems.append(f"{rec.path}: {e}; `cidfs verify` says what it touches")
            return 0, 0
        return manifest.total_size, manifest.count_of(FILE) + manifest.count_of(EXECUTABLE)

    def _switch(self, number: int) -> None:
        """Give the new index its name and let it count; take the others away."""
        folder = self._state.root / "index"
        with disk_errors(self._folder, "rename"):
            sync_folder(self._folder)
            os.rename(self._folder, folder / str(number))
        sync_folder(folder)
        self._state.switch_index(number)
        for name in os.listdir(folder):
            if name.isdigit() and int(name) != number:
                shutil.rmtree(folder / name, ignore_errors=True)


def rebuild(
    state: StateFolder,
    *,
    lock_timeout: float,
    accept_loss: bool = False,
    progress: Callable[[str, int], None] = lambda label, left: None,
) -> Report:
    """Make the index of a store anew; raise JournalLoss when the journal has gaps, unless they are accepted.

    progress is told a stage and how many of its steps are left.
    """
    return _Rebuild(state, lock_timeout, progress).run(accept_loss=accept_loss)
