"""Verification: what is stored, against itself.

Index against journal, packs and its own rows; every frame; of each path record, manifest and NAR hash. The
quick form reads no chunk, the sample form some. Reads, changes nothing (`repair` does), and may run beside
mounts, adds, removals and collections: what looks damaged is looked at afresh before it counts.

Packs and paths are taken one by one by a thread a core; memory is bounded, whatever the store holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

from blake3 import blake3

from cidfs.engine.findings import Report
from cidfs.engine.progress import Steps
from cidfs.engine.verify_packs import PackCheck, find_damage
from cidfs.engine.verify_paths import PathCheck
from cidfs.engine.workers import alone, for_each, pause
from cidfs.errors import CidfsError
from cidfs.local import pages
from cidfs.local.audit import count_notes, journal_notes
from cidfs.local.audit_rows import path_notes, place_notes
from cidfs.local.notes import Note
from cidfs.local.packs import pack_path
from cidfs.local.rows import Place
from cidfs.local.store import LocalStore, PublishedPath

BATCH: Final = 5000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """A random part of the chunks: so many of them, or that share. The same seed gives the same chunks."""

    count: int
    share: float
    seed: int

    def choose(self, places: Iterable[tuple[bytes, Place]]) -> Iterator[tuple[bytes, Place]]:
        """Yield the chosen ones."""
        key = blake3(b"%d" % self.seed).digest()
        if self.count:
            yield from heapq.nsmallest(self.count, places, key=lambda item: blake3(key + item[0]).digest(8))
            return
        limit = int(self.share * (1 << 64))
        for item in places:
            if int.from_bytes(blake3(key + item[0]).digest(8)) < limit:
                yield item


@dataclass(frozen=True, slots=True)
class Depth:
    """How much is read: everything; no chunk (quick); or, of the chunks, a sample alone."""

    quick: bool = False
    sample: Sample | None = None

    @property
    def full(self) -> bool:
        """Whether every chunk is read."""
        return not self.quick and self.sample is None


FULL: Final = Depth()


async def verify(
    store: LocalStore, paths: Sequence[PublishedPath] | None, steps: Steps, depth: Depth = FULL
) -> Report:
    """Verify some paths (their records, manifests, chunks and NAR hashes), or the whole store."""
    report = Report()
    if paths is None and not await _Whole(store, steps, depth, report).run():
        return report
    steps.begin("store paths", _count(store, "paths") if paths is None else len(paths))
    check = PathCheck(store, report.ledger, read_chunks=depth.full)
    chosen = (published for _, published in store.publications(0)) if paths is None else paths
    report.paths = await for_each(chosen, check.check, steps)
    report.bytes += check.bytes
    return report


def _count(store: LocalStore, *databases: str) -> int:
    with store.read() as txn:
        return sum(txn.entries(name) for name in databases)


def _interruptible(items: Iterable[T]) -> Iterator[T]:
    for number, item in enumerate(items):
        if number % 1000 == 0:
            pause()
        yield item


def _page_notes(store: LocalStore) -> Iterator[Note]:
    with store.read() as txn:  # as long as it is open, no page is written over
        found = pages.damage(txn.index.path, pinned=True)
    for line in found:
        where, _, text = line.partition(": ")
        yield Note("index", "pages", where, f"{text}; run `cidfs rebuild`")


class _Whole:
    """What is verified of the whole store before its paths are."""

    def __init__(self, store: LocalStore, steps: Steps, depth: Depth, report: Report) -> None:
        self._store, self._steps, self._depth, self._report = store, steps, depth, report

    async def run(self) -> bool:
        """Verify all but the paths; False where the index cannot even be walked."""
        store, sample = self._store, self._depth.sample
        await self._audit("index", 1, lambda step: _page_notes(store))
        if self._report.ledger.findings:
            return False
        await self._audit("index", 1, lambda step: count_notes(store))
        await self._audit("journal", 1, lambda step: journal_notes(store))
        await self._audit("rows of store paths", _count(store, "paths"), lambda step: path_notes(store, step))
        told = None if self._depth.full else self._misplaced
        rows = _count(store, "manifests", "chunks")
        await self._audit("rows of chunks", rows, lambda step: place_notes(store, told, step))
        if self._depth.full:
            await PackCheck(store, self._report).run(self._steps)
        elif sample is not None:
            self._steps.begin("chunks", sample.count or round(sample.share * _count(store, "chunks")))
            chosen = sample.choose(_interruptible(store.places("chunks")))
            while batch := await alone(lambda: list(islice(chosen, BATCH))):
                batch.sort(key=lambda item: (item[1].pack, item[1].offset))
                self._report.chunks += await for_each(batch, self._read_one, self._steps)
        return True

    async def _audit(
        self, label: str, total: int, find: Callable[[Callable[[int], None]], Iterable[Note]]
    ) -> None:
        self._steps.begin(label, total)
        waiting = 0

        def step(count: int) -> None:
            nonlocal waiting
            waiting += count
            if waiting >= 1000:
                pause()
                self._steps.step(waiting)
                waiting = 0

        def work() -> None:
            for note in find(step):
                self._report.ledger.add(note.kind, note.what, note.where, note.line)

        await alone(work)

    def _misplaced(self, database: str, digest: bytes, place: Place, reason: str) -> None:
        path = pack_path(self._store.state.root, place.kind, place.pack)
        self._report.ledger.add_bad(database, digest, place, str(path), reason)

    def _read_one(self, item: tuple[bytes, Place]) -> None:
        digest, place = item
        try:
            self._store.packs.read(digest, place)
        except CidfsError:
            find_damage(self._store, self._report.ledger, "chunks", digest)
