"""Ingest: sources in, published store paths out.

One pipeline for any number of paths (the threads are those of `lanes`). One reads and hashes the NAR; others
digest, look up and compress; one appends to packs, in order, syncs groups of finished paths and publishes
them. What the caller is told, he is told on the trio thread.

    reader ──batches──► encoders (one a core) ──in order──► writer ──groups──► LocalStore.publish
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
import trio

from cidfs.engine.lanes import Lanes
from cidfs.engine.progress import Progress
from cidfs.engine.sources import Batch, Data, Tree
from cidfs.engine.wanted import Wanted
from cidfs.errors import CidfsError, HashMismatch
from cidfs.formats import frames
from cidfs.formats.chunking import encode
from cidfs.formats.digest import digest_of, sha256_text
from cidfs.formats.manifest import EXECUTABLE, FILE, Manifest
from cidfs.formats.record import Record
from cidfs.formats.store_path import fixed_output_ca, fixed_output_path
from cidfs.local.leases import INGEST
from cidfs.local.packs import CACHE, MANIFEST, OWN, PackWriter, SyncFailed
from cidfs.local.publish import Candidate, Published
from cidfs.local.rows import Place
from cidfs.local.store import LocalStore

GROUP_PATHS: Final = 256
GROUP_CHUNKS: Final = 200_000
GROUP_SECONDS: Final = 0.2
ROWS_A_TRANSACTION: Final = 2000
BATCHES_AHEAD: Final = 32  # as much as is read while a pack is synced
TELL_SECONDS: Final = 0.1
MANIFEST_LEVEL: Final = 9
SYNC_ATTEMPTS: Final = 3


Encoded = list[tuple[bytes, Place | None, int, Data, int]]


@dataclass(slots=True)
class _Slot:
    """A batch on its way.

    last marks the end of its tree, failure that the reader stopped there, known a path that is published with
    the same contents.
    """

    wanted: Wanted
    tree: Tree
    batch: Batch
    last: bool = False
    failure: CidfsError | None = None
    known: Candidate | None = None
    encoded: Encoded = field(default_factory=list)


class _Ingest:
    def __init__(
        self,
        store: LocalStore,
        progress: Progress,
        on_published: Callable[[Sequence[Published]], None],
        on_failed: Callable[[CidfsError], None] | None,
    ) -> None:
        self._store = store
        self._on_failed = on_failed
        self._progress = progress
        self._on_published = on_published
        self._own = store.pack_writer(OWN)
        self._manifests = store.pack_writer(MANIFEST)
        self._new_chunks: dict[bytes, Place] = {}  # appended here, without a row yet
        self._new_manifests: dict[bytes, Place] = {}
        self._ready: list[Candidate] = []
        self._ready_chunks = 0
        self._first_ready = 0.0
        self._places: bytearray = bytearray()  # of the tree that is being written
        self._untold = 0
        self._told = 0.0
        self.outcomes: list[Published] = []

    async def run(self, wanted: Iterable[Wanted]) -> None:
        lanes = Lanes(self._encode, self._write, BATCHES_AHEAD)
        try:
            await lanes.run(self._read(wanted))
            await trio.to_thread.run_sync(self._flush)
            self._progress.bytes(self._untold)
        finally:
            self._own.close()
            self._manifests.close()

    # --- reading

    def _read(self, wanted: Iterable[Wanted]) -> Iterator[_Slot]:
        for item in wanted:
            trio.from_thread.run_sync(self._progress.path, item.source.label)
            known = self._known(item)
            if known is not None:
                yield _Slot(item, Tree(), [], known=known)
                continue
            tree = Tree()
            slot: _Slot | None = None
            try:
                for batch in item.source.read(tree):
                    if slot is not None:
                        yield slot
                    slot = _Slot(item, tree, batch)
            except CidfsError as e:
                if slot is not None:
                    yield slot
                yield _Slot(item, tree, [], failure=e)
                if self._on_failed is None:
                    return
            else:
                if slot is not None:
                    slot.last = True
                    yield slot

    def _known(self, wanted: Wanted) -> Candidate | None:
        """Return the candidate for a path that is published with the same contents, or None."""
        if wanted.path is None or wanted.expected_hash is None:
            return None
        row = self._store.find_path(wanted.path)
        known = self._store.record_of(wanted.path.hash_part) if row is not None else None
        if row is None or known is None or not wanted.same_as(known):
            return None
        place = self._store.place("manifests", known.manifest)
        if place is None:
            return None
        told = msgspec.structs.replace(
            known, signatures=tuple(sorted(set(wanted.signatures))), deriver=wanted.deriver, ca=wanted.ca
        )
        return Candidate(told, place, row.size, row.files, b"", b"", already_here=True)

    # --- digesting and compressing

    def _encode(self, slot: _Slot) -> None:
        slot.encoded = self._encode_batch(slot.batch)
        slot.batch = []

    def _encode_batch(self, batch: Batch) -> Encoded:
        digests = [digest_of(data) for data in batch]
        encoded: Encoded = []
        seen: set[bytes] = set()
        for data, digest, place in zip(batch, digests, self._store.chunk_places(digests), strict=True):
            if place is not None and place.kind == CACHE:
                place = None  # what is made here never depends on a cache pack
            if place is None and digest not in seen and digest not in self._new_chunks:
                seen.add(digest)
                encoding, stored = encode(data)
                encoded.append((digest, None, encoding, stored, len(data)))
            else:  # should its row go meanwhile (nothing needs it yet), the data is needed again
                encoded.append((digest, place, -1, data if place is None else b"", len(data)))
        return encoded

    # --- writing and publishing

    def _write(self, slot: _Slot) -> None:
        if slot.failure is not None:
            self._places = bytearray()
            self._fail(slot.failure)
            return
        if slot.known is not None:
            self._add_ready(slot.known)
        else:
            self._store_batch(slot)
            self._tell(sum(item[4] for item in slot.encoded))
            slot.encoded = []
            if slot.last:
                try:
                    candidate = self._finish(slot.wanted, slot.tree)
                except CidfsError as e:
                    self._fail(e)
                    return
                self._add_ready(candidate)
        if self._group_is_full():
            self._flush()
        elif len(self._new_chunks) >= ROWS_A_TRANSACTION:
            self._commit_rows()

    def _tell(self, count: int) -> None:
        """Tell the progress, not more often than someone can see."""
        self._untold += count
        if (now := time.monotonic()) - self._told >= TELL_SECONDS:
            trio.from_thread.run_sync(self._progress.bytes, self._untold)
            self._told, self._untold = now, 0

    def _fail(self, error: CidfsError) -> None:
        """Publish what was finished before; then report the error and go on, or end with it."""
        self._flush()
        if self._on_failed is None:
            raise error
        trio.from_thread.run_sync(self._on_failed, error)

    def _add_ready(self, candidate: Candidate) -> None:
        self._first_ready = self._first_ready if self._ready else time.monotonic()
        self._ready.append(candidate)
        self._ready_chunks += len(candidate.digests) // 32

    def _group_is_full(self) -> bool:
        return bool(self._ready) and (
            len(self._ready) >= GROUP_PATHS
            or self._ready_chunks >= GROUP_CHUNKS
            or time.monotonic() - self._first_ready >= GROUP_SECONDS
        )

    def _store_batch(self, slot: _Slot) -> None:
        """Append what is new, in order, and note the place of every chunk."""
        unsure = [d for d, place, *_ in slot.encoded if place is None]
        here = dict(zip(unsure, self._store.chunk_places(unsure), strict=True))
        new: list[tuple[bytes, int, bytes, int]] = []
        waiting: set[bytes] = set()
        for digest, place, encoding, stored, length in slot.encoded:
            if place is not None or digest in self._new_chunks or digest in waiting:
                continue
            found = here[digest]
            if found is not None and found.kind != CACHE:
                continue
            if encoding < 0:  # it was in another batch, got its row, and a collection dropped that
                encoding, stored = encode(stored)
            waiting.add(digest)
            new.append((digest, encoding, bytes(stored), length))
        if new:
            for item, place in zip(new, self._own.append_many(new), strict=True):
                self._new_chunks[item[0]] = place
        for digest, place, _, _, _ in slot.encoded:
            chosen = place or self._new_chunks.get(digest) or here[digest]
            assert chosen is not None
            slot.tree.builder.digests += digest
            self._places += chosen.packed()

    def _finish(self, wanted: Wanted, tree: Tree) -> Candidate:
        """Check the NAR hash, encode the manifest and append it."""
        places, self._places = self._places, bytearray()
        label = wanted.path.base_name if wanted.path else wanted.source.label
        nar_hash = tree.nar_hash
        if wanted.expected_hash is not None and wanted.expected_hash != nar_hash:
            raise HashMismatch(
                f"{label}: its contents have NAR hash {sha256_text(nar_hash)} where"
                f" {sha256_text(wanted.expected_hash)} is expected; nothing of it is published"
            )
        if wanted.expected_size is not None and wanted.expected_size != tree.nar_size:
            raise HashMismatch(
                f"{label}: its NAR has {tree.nar_size} bytes where {wanted.expected_size} are expected;"
                " nothing of it is published"
            )
        raw = tree.builder.encode()
        manifest = Manifest(raw)
        digest = digest_of(raw)
        place = self._new_manifests.get(digest) or self._store.place("manifests", digest)
        if place is None:
            place = self._new_manifests[digest] = self._manifests.append(
                digest, *encode(raw, MANIFEST_LEVEL), len(raw)
            )
        path, ca = wanted.path, wanted.ca
        of_contents = fixed_output_path(
            nar_hash, path.name if path is not None else wanted.name, self._store.store_dir
        )
        if path is None or (path == of_contents and not ca):
            path, ca = of_contents, fixed_output_ca(nar_hash)
        rec = Record(
            store_dir=self._store.store_dir,
            path=path,
            nar_hash=nar_hash,
            nar_size=tree.nar_size,
            references=tuple(sorted(set(wanted.references))),
            deriver=wanted.deriver,
            ca=ca,
            manifest=digest,
            node_count=manifest.node_count,
            root_row=manifest.row(0),
            signatures=tuple(sorted(set(wanted.signatures))),
        )
        files = manifest.count_of(FILE) + manifest.count_of(EXECUTABLE)
        return Candidate(rec, place, manifest.total_size, files, tree.builder.digests, places)

    def _commit_rows(self) -> None:
        """Make what was appended durable, then give it rows."""
        self._sync(self._own, self._new_chunks)
        self._sync(self._manifests, self._new_manifests)
        for database, new, writer in (
            ("chunks", self._new_chunks, self._own),
            ("manifests", self._new_manifests, self._manifests),
        ):
            rows = list(new.items())
            for i in range(0, len(rows), ROWS_A_TRANSACTION):
                self._store.put_places(database, rows[i : i + ROWS_A_TRANSACTION], writer)
            new.clear()

    def _sync(self, writer: PackWriter, new: dict[bytes, Place]) -> None:
        """Sync packs; what stands in one that cannot be synced is read, judged and stored again elsewhere."""
        for _ in range(SYNC_ATTEMPTS):
            try:
                writer.sync()
                return
            except SyncFailed as e:
                for digest, place in list(new.items()):
                    if place.pack == e.pack:
                        new[digest] = self._store_again(writer, digest, place)
        writer.sync()

    def _store_again(self, writer: PackWriter, digest: bytes, old: Place) -> Place:
        stored = self._store.packs.read_stored(digest, old)
        frames.read_data(stored, frames.read_header(stored))  # by digest: it may be all that is left
        new = writer.append(digest, old.encoding, stored[frames.HEADER_SIZE :], old.length)
        for places in (self._places, *(c.places for c in self._ready)):
            if isinstance(places, bytearray):
                places[:] = places.replace(old.packed(), new.packed())
        self._ready = [replace(c, manifest_place=new) if c.manifest_place == old else c for c in self._ready]
        return new

    def _flush(self) -> None:
        """Publish the finished paths."""
        if self._ready:
            self._commit_rows()
            ready, self._ready, self._ready_chunks = self._ready, [], 0
            outcomes = self._store.publish(ready)
            self.outcomes += outcomes
            trio.from_thread.run_sync(self._on_published, outcomes)


async def ingest(
    store: LocalStore,
    wanted: Iterable[Wanted],
    *,
    progress: Progress | None = None,
    on_published: Callable[[Sequence[Published]], None] | None = None,
    on_failed: Callable[[CidfsError], None] | None = None,
) -> list[Published]:
    """Ingest sources and publish them, references before referrers if they come in that order.

    on_published is told each group once it is durable. Returns the outcomes in the order given. An error ends
    it: what was finished before it is published, nothing of what failed is.
    """
    lease = await trio.to_thread.run_sync(store.lease, INGEST)
    work = _Ingest(store, progress or Progress(), on_published or (lambda outcomes: None), on_failed)
    try:
        await work.run(wanted)
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    finally:
        lease.release()
    return work.outcomes


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one error of a nursery's group that tells most.

    Ours before others, others before cancellation.
    """
    flat: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        here = todo.pop()
        if isinstance(here, BaseExceptionGroup):
            todo.extend(here.exceptions)
        else:
            flat.append(here)
    flat.sort(
        key=lambda e: (isinstance(e, trio.Cancelled), not isinstance(e, KeyboardInterrupt | CidfsError))
    )
    return flat[0]
