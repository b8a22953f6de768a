"""Collection: free what no published path needs, beside running mounts and ingests.

The order is what makes it safe. Index and journal must agree on what is published. What a publication needs,
and what a mount older than a removal needs, is marked without the lock; under the lock, what was published
since is marked too, and rows of dead frames are dropped. A pack goes only when no row points into it, nobody
writes to it, and every ingest has ended that may have looked it up before its rows went: an ingest puts rows
that went back from the places that it noted. Each step can be the last one: the next collection goes on.
Synchronous; one collection at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Final

from cidfs.errors import DiskFailed, IndexLost
from cidfs.formats import frames, journal
from cidfs.local import leftovers, room, tables
from cidfs.local.files import disk_errors, leads_to, try_flock
from cidfs.local.index import Index
from cidfs.local.leases import at_work
from cidfs.local.marks import prefix_of
from cidfs.local.packs import MANIFEST, bad_mark
from cidfs.local.rows import PackRow, PathRow
from cidfs.local.sparse import SparsePacks
from cidfs.local.store import LocalStore
from cidfs.local.survey import PackFile, Report, Survey, digests_of

ROWS_A_TRANSACTION: Final = 2000
ROWS_WHEN_LOW: Final = 100
RANGES_A_TRANSACTION: Final = 1000
ATTEMPTS: Final = 3  # where a rebuild comes in between
JOURNAL_WASTE: Final = 8  # a checkpoint is written when one entry in so many is of no use any more


class _Switched(Exception):
    """A rebuild made another index count."""


class _Collection:
    def __init__(self, store: LocalStore, report: Report, progress: Callable[[str, int], None]) -> None:
        self._store = store
        self._state = store.state
        self._progress = progress
        self._report = report
        self._survey = Survey(store, report, progress)
        self._sparse = SparsePacks(store, self._survey, report, self._locked, self._drop_packs, progress)

    def estimate(self) -> Report:
        """Count what a collection would free."""
        for path in leftovers.leftovers(self._state):
            self._report.leftovers += 1
            self._report.leftover_bytes += leftovers.size_of(path)
        self._survey.list_packs()
        self._survey.note(self._store.current())
        self._survey.compare(pending=True)
        self._survey.mark()
        self._count()
        return self._report

    def run(self) -> Report:
        self._report.waiting = self._report.waiting_bytes = 0
        self._tidy()
        self._survey.list_packs()
        with self._store.transaction() as index:
            self._store.publisher.say_pending(index)
            self._survey.note(index)
        self._survey.compare(pending=False)
        self._survey.mark()
        self._drop_rows()
        self._drop_ranges()
        self._drop_packs(self._empty_packs())
        self._sparse.copy()
        try:
            self._checkpoint()
        except DiskFailed as e:  # it frees little, and what is freed is freed
            self._report.problems.append(f"the journal keeps its past: {e}")
        return self._report

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Index]:
        """Hold the write lock; raise _Switched when another index counts than the one that was looked at."""
        with self._store.transaction() as index:
            if index.number != self._survey.index:
                raise _Switched
            yield index

    def _tidy(self) -> None:
        """Take away what dead processes left; it needs no room, and makes some."""
        self._progress("looking for leftovers", 0)
        with self._state.write_lock(self._store.lock_timeout):
            for path in leftovers.leftovers(self._state):
                self._report.leftovers += 1
                self._report.leftover_bytes += leftovers.size_of(path)
                leftovers.drop(path)

    # --- dropping

    def _drop_rows(self) -> None:
        """Drop the rows of dead frames, some at a time: others publish in between."""
        size = ROWS_WHEN_LOW if room.is_low(self._state.root) else ROWS_A_TRANSACTION
        for name, marks in self._survey.marks.items():
            left, _ = marks.dead()
            for batch in marks.dead_batches(size):
                self._progress(f"dropping {name}", left)
                left -= len(batch)
                with self._store.read() as txn:
                    self._survey.mark_new(txn)  # most of it without the lock
                with self._locked() as index, index.write() as write:
                    self._survey.mark_new(write)
                    for prefix in batch:
                        if not marks.is_needed(prefix):
                            for digest in digests_of(write, name, prefix):
                                write.drop_place(name, digest)

    def _drop_ranges(self) -> None:
        """Forget inode ranges of removed paths that no mount can know any more."""
        for i in range(0, len(self._survey.unneeded), RANGES_A_TRANSACTION):
            with self._locked() as index, index.write() as txn:
                for base in self._survey.unneeded[i : i + RANGES_A_TRANSACTION]:
                    tables.drop_range(txn, base)
                    self._report.ranges += 1

    def _empty_packs(self) -> list[bytes]:
        """Return the packs in which nothing is needed."""
        live = self._survey.live_bytes()
        return [identity for identity in self._survey.packs if not live.get(identity)]

    def _drop_packs(self, candidates: list[bytes]) -> int:
        """Unlink packs without rows that nobody writes to and no ingest may have looked up; count them."""
        running = at_work(self._state.leases())
        gone = 0
        for number, identity in enumerate(candidates):
            self._progress("removing packs", len(candidates) - number)
            here = self._survey.packs[identity]
            with self._locked() as index:
                if running & at_work(self._state.leases()):
                    self._report.waiting += 1
                    self._report.waiting_bytes += here.occupied
                    continue
                if self._unlink(index, identity, here):
                    gone += 1
                    self._report.packs += 1
                    self._report.pack_bytes += here.occupied
        return gone

    def _unlink(self, index: Index, identity: bytes, here: PackFile) -> bool:
        """Unlink a pack that has no rows, under the write lock and the pack's own."""
        with index.read() as txn:
            raw = txn.get("packs", identity)
        if raw is not None and PackRow.unpack(raw).frames:
            return False
        try:
            fd = os.open(here.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            unused = try_flock(fd) and leads_to(here.path, fd) and os.fstat(fd).st_size == here.size
            if not unused or self._holds_missing(fd, here):
                return False
            with disk_errors(here.path, "remove"):
                os.unlink(here.path)
            bad_mark(here.path).unlink(missing_ok=True)
        finally:
            os.close(fd)
        with index.write() as write:
            write.note_pack(identity, here.kind, sealed=True)  # nobody shall look for it to append to it
            write.drop_pack(identity)
        return True

    def _holds_missing(self, fd: int, here: PackFile) -> bool:
        """Say whether a pack without rows holds a frame that a published path needs: then rows were lost."""
        missing = self._survey.marks["manifests" if here.kind == MANIFEST else "chunks"].missing
        if not missing:
            return False
        for item in frames.scan(os.pread(fd, here.size, 0)):
            if isinstance(item, frames.Found) and prefix_of(item.header.digest) in missing:
                self._report.problems.append(
                    f"{here.path}: holds what the index has lost; run `cidfs rebuild`, then collect again"
                )
                return True
        return False

    # --- the journal's checkpoint

    def _checkpoint(self) -> None:
        """Write the journal anew where much of it tells of what is gone."""
        if self._survey.garbage <= 0 or self._survey.garbage * JOURNAL_WASTE < self._report.entries:
            return
        self._progress("writing the journal anew", 0)
        bases, ranges = self._removed_entries()
        with self._locked() as index:
            self._store.publisher.say_pending(index)
            with index.read() as txn:
                now = {base for base, _ in tables.removed_ranges(txn)}
                # one half may have come to the journal since
                if now != bases or len(ranges) < 2 * len(bases):
                    bases, ranges = self._removed_entries()
                serials = [PathRow.unpack(raw).serial for _, raw in txn.rows("paths") if raw is not None]
                realised = [e.serial for e in tables.iterate_realisations(txn)]
                for name, found in (("paths", serials), ("realisations", realised)):
                    if len(found) != txn.number(f"count:{name}"):
                        raise IndexLost(f"{index.path}: rows of `{name}` are lost; run `cidfs rebuild`")
                entries: Iterator[journal.Entry] = itertools.chain(
                    ranges, tables.iterate_publications(txn), tables.iterate_realisations(txn)
                )
                self._store.publisher.write_checkpoint(
                    index, [*serials, *realised, *(e.serial for e in ranges)], entries
                )

    def _removed_entries(self) -> tuple[set[int], list[journal.Entry]]:
        """Return the ranges that a mount may still know, and what the journal says of them."""
        with self._store.read() as txn:
            bases = {base for base, _ in tables.removed_ranges(txn)}
        return bases, tables.ranges_in(self._store.journal().replay().entries.values(), bases)

    # --- what would be done

    def _count(self) -> None:
        """Count what would go."""
        running = bool(at_work(self._state.leases()))
        self._report.ranges = len(self._survey.unneeded)
        for identity in self._empty_packs():
            size = self._survey.packs[identity].occupied
            if running:
                self._report.waiting += 1
                self._report.waiting_bytes += size
            else:
                self._report.packs += 1
                self._report.pack_bytes += size
        live = self._survey.live_bytes()
        for identity in [] if running else self._sparse.find():
            self._report.sparse += 1
            self._report.sparse_bytes += max(0, self._survey.packs[identity].occupied - live[identity])


def collect(
    store: LocalStore,
    *,
    dry_run: bool = False,
    progress: Callable[[str, int], None] = lambda label, left: None,
) -> Report:
    """Free what nobody needs; with dry_run, only say what would be freed.

    progress is told a stage and how many of its steps are left. Raises Damaged or IndexLost where index and
    journal do not agree on what is published; LockTimeout while another collection runs.
    """
    report = Report()
    if dry_run:
        return _Collection(store, report, progress).estimate()
    root = store.state.root
    with store.state.collector_lock(store.lock_timeout):
        if room.is_low(root):
            room.release(root)
        try:
            for _ in range(ATTEMPTS):
                with contextlib.suppress(_Switched):
                    return store.with_room(lambda: _Collection(store, report, progress).run())
        finally:
            room.restore(root)
    report.problems.append("the index was rebuilt again and again meanwhile: collect again")
    return report
