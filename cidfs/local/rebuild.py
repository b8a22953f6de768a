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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cidfs.errors import CidfsError, FormatError, IndexLost, JournalLoss
from cidfs.formats import journal, record
from cidfs.formats.manifest import EXECUTABLE, FILE, Manifest
from cidfs.local import tables
from cidfs.local.files import disk_errors, leads_to, sync_folder, try_flock
from cidfs.local.index import Index, WriteTxn
from cidfs.local.journal import Journal, Replay
from cidfs.local.leases import oldest_mount
from cidfs.local.old_index import OldIndex, old_index
from cidfs.local.pack_scan import PackScan
from cidfs.local.packs import PackReader
from cidfs.local.rows import Place, RemovedRow, number_key, removed_key
from cidfs.local.state import FIRST_INODE, StateFolder

ENTRIES_A_TRANSACTION: Final = 2_000


@dataclass
class Report:
    """What a rebuild found. problems are lines for people; nothing in them was lost by the rebuild."""

    paths: int = 0
    chunks: int = 0
    manifests: int = 0
    packs: int = 0
    lost_manifests: int = 0  # of published paths
    problems: list[str] = field(default_factory=list)


class _Rebuild:
    def __init__(self, state: StateFolder, lock_timeout: float, progress: Callable[[str, int], None]) -> None:
        self._state = state
        self._timeout = lock_timeout
        self._progress = progress
        self._report = Report()
        self._packs = PackScan(state.root, self._report.problems, progress)
        self._carried: list[tuple[int, RemovedRow, bytes]] = []  # ranges that only the old index knows
        self._removed: set[int] = set()  # bases of what was removed
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
                self._packs.read_all(index)
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

    # --- under the lock

    def _finish(self, index: Index, accept_loss: bool) -> int:
        """Bring the new index up to what is true now; return its number."""
        self._packs.catch_up(index)
        with old_index(self._state) as old:
            if old.pending:  # what it has committed and the journal may not have
                self._journal.append(old.pending)
            replay = self._journal.replay()
            self._report.problems += replay.damage
            self._fill_gaps(replay, old)
        if replay.missing and not accept_loss:
            shown = ", ".join(str(s) for s in replay.missing[:10])
            raise JournalLoss(
                f"{self._state.root}/journal: serials {shown} are lost; what they published or removed is not"
                " known any more. Restore the journal from a backup, or go on without with --accept-loss"
            )
        self._report.problems += [f"journal: serial {s} is lost" for s in replay.missing]
        live = self._apply(index, replay)
        with index.write() as txn:
            for base, row, raw in self._carried:
                txn.put("inodes", number_key(base), raw)
                txn.put("meta", removed_key(base), row.packed())
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
            realised = list(tables.iterate_realisations(txn))
        oldest = oldest_mount(self._state.leases())
        remembered = {base for base, row in removed.items() if oldest is not None and oldest <= row.serial}
        return self._journal.write_checkpoint(
            [*live, *realised, *tables.ranges_in(replay.entries.values(), remembered)],
            replay.next_serial,
            next_base,
            above=max(numbers, default=0),
        )

    def _fill_gaps(self, replay: Replay, old: OldIndex) -> None:
        """Take what lost entries of the journal came to from the index in use, if that is whole."""
        replay.missing += range(replay.next_serial, old.next_serial)  # lost at the journal's end
        published = old.publications() if replay.missing else None
        if published is not None and old.next_serial >= replay.next_serial:
            self._report.problems += [
                f"journal: serial {s} is lost; the index still knew what it came to" for s in replay.missing
            ]
            said = list(replay.entries.values())
            replay.entries = {entry.serial: entry for entry in published}
            # those of the journal too: of a path that has gone since, none is applied
            realised = [e for e in said if isinstance(e, journal.Realisation)]
            replay.entries.update((e.serial, e) for e in (*realised, *old.realisations()))
            self._carried = old.removed_ranges()
            pairs = tables.ranges_in(said, {base for base, _, _ in self._carried})
            replay.entries.update((entry.serial, entry) for entry in pairs)
            replay.missing = []
            replay.next_base = max(replay.next_base, old.next_base)
        replay.next_serial = max(replay.next_serial, old.next_serial)

    def _apply(self, index: Index, replay: Replay) -> list[journal.Publication]:
        """Replay the journal into the new index; return what is live, with its latest records."""
        live: dict[str, journal.Publication] = {}
        serials = sorted(replay.entries)
        self._removed = {e.base for e in replay.entries.values() if isinstance(e, journal.Removal)}
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
                rec = record.decode_known(entry.record)
                if rec.path.hash_part in live:
                    return  # the first publication since the last removal counts
                # of one that was removed, what it needs may have been collected
                gone = entry.base in self._removed
                size, files = (0, 0) if gone else self._measure(txn, rec, reader)
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
            case journal.Realisation():
                tables.put_realisation(txn, entry)
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
            self._report.lost_manifests += 1
            self._report.problems.append(f"{rec.path}: {e}")
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
