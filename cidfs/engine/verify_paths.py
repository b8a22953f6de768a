"""The paths' part of verification: record, manifest, the chunks that it names, the NAR hash.

What shared chunks unpack to is kept for a while: paths come in the order of their publication, and neighbours
share most. Safe for several threads.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left
from collections import OrderedDict
from typing import Final

from cidfs.engine.export import nar_pieces
from cidfs.engine.findings import Bad, Ledger
from cidfs.engine.verify_packs import find_damage
from cidfs.engine.workers import pause
from cidfs.errors import ChunkInvalid, ChunkMissing, CidfsError, FormatError
from cidfs.formats.digest import cid_text, sha256_text
from cidfs.formats.manifest import EXECUTABLE, FILE, Manifest
from cidfs.formats.record import Record
from cidfs.local.store import LocalStore, PublishedPath

CACHE_BYTES: Final = 64 << 20
ENTRY_BYTES: Final = 300  # what keeping a chunk takes, its bytes aside
LOOK_UPS: Final = 1000
CHUNKS_NAMED: Final = 10  # of one store path
FILES_NAMED: Final = 3  # of one chunk in one store path
PAUSE_BYTES: Final = 8 << 20


class _Wrong(Exception):
    """A store path that is not as it should be, other than by a damaged chunk."""


class PathCheck:
    """Checks published paths, one at a time on each thread."""

    def __init__(self, store: LocalStore, ledger: Ledger, *, read_chunks: bool) -> None:
        self._store, self._ledger, self._read_chunks = store, ledger, read_chunks
        self._decoded = _Decoded(store)
        self._lock = threading.Lock()
        self.bytes = 0

    def check(self, published: PublishedPath) -> bool:
        """Check one path; say whether all of it is right. One that was removed meanwhile is."""
        found = _Found(published, published.path.full(self._store.store_dir))
        try:
            self._check(found)
        except _Wrong as e:
            found.wrong.append(str(e))
        if found.wrong or found.bad:
            if not self._is_there(published):
                return True
            found.report(self._ledger)
        return not found.wrong and not found.bad

    def _is_there(self, published: PublishedPath) -> bool:
        """Whether a path is published still, and was not removed and published again."""
        self._store.refresh(self._store.lock_timeout)
        row = self._store.find_path(published.path)
        return row is not None and row.base == published.row.base

    def _check(self, found: _Found) -> None:
        store, row = self._store, found.published.row
        record = self._record(found.published)
        if (row.manifest, row.count, row.root_row) != (record.manifest, record.node_count, record.root_row):
            raise _Wrong("index and record differ; run `cidfs rebuild`")
        try:
            manifest = store.read_manifest(record.manifest)
        except (ChunkMissing, ChunkInvalid):
            found.add_manifest(self._find_damage(found, "manifests", record.manifest))
            return
        except CidfsError as e:
            raise _Wrong(str(e)) from None
        try:
            manifest.validate()
        except FormatError as e:
            raise _Wrong(str(e)) from None
        if (manifest.node_count, manifest.row(0)) != (record.node_count, record.root_row):
            raise _Wrong("manifest and record differ")
        files = manifest.count_of(FILE) + manifest.count_of(EXECUTABLE)
        if (row.size, row.files) != (manifest.total_size, files):
            found.wrong.append("the index counts other files or bytes than it has; run `cidfs rebuild`")
        self._check_chunks(found, manifest)
        if self._read_chunks and not found.bad:
            self._check_nar(found, manifest, record)

    def _record(self, published: PublishedPath) -> Record:
        try:
            record = self._store.record_of(published.path.hash_part)
        except FormatError as e:
            raise _Wrong(f"its record is damaged ({e}); run `cidfs rebuild`") from None
        if record is None:
            raise _Wrong("its record is lost from the index; run `cidfs rebuild`")
        if record.path != published.path:
            raise _Wrong(f"its record is that of {record.path}; run `cidfs rebuild`")
        return record

    def _check_chunks(self, found: _Found, manifest: Manifest) -> None:
        """Find the chunks that are known to be damaged, or have no row."""
        bad: dict[bytes, Bad] = {}
        rows: dict[int, bytes] = {}
        known = self._ledger.bad["chunks"]
        for start in range(0, manifest.chunk_count, LOOK_UPS):
            pause()
            stop = min(start + LOOK_UPS, manifest.chunk_count)
            digests = [manifest.chunk(i)[0] for i in range(start, stop)]
            for i, (digest, place) in enumerate(zip(digests, self._store.chunk_places(digests), strict=True)):
                if digest in known:
                    bad[digest] = known[digest]
                elif place is None and digest not in bad:
                    damaged = self._find_damage(found, "chunks", digest)
                    if damaged is not None:
                        bad[digest] = damaged
                if digest in bad:
                    rows[start + i] = digest
        found.add_chunks(manifest, bad, rows)

    def _check_nar(self, found: _Found, manifest: Manifest, record: Record) -> None:
        digest, size, told = hashlib.sha256(), 0, 0
        try:
            for piece in nar_pieces(self._decoded, manifest):
                digest.update(piece)
                size += len(piece)
                if size - told > PAUSE_BYTES:
                    told = size
                    pause()
        except (ChunkMissing, ChunkInvalid):
            self._read_each(found, manifest)
            if found.bad:
                return
            raise _Wrong("changed while it was verified; verify again") from None
        with self._lock:
            self.bytes += size
        if (digest.digest(), size) != (record.nar_hash, record.nar_size):
            is_now, was = sha256_text(digest.digest()), sha256_text(record.nar_hash)
            raise _Wrong(f"its NAR hash is {is_now} where {was} is recorded")

    def _read_each(self, found: _Found, manifest: Manifest) -> None:
        """Read each chunk by itself, to name all that cannot be read."""
        bad: dict[bytes, Bad] = {}
        rows: dict[int, bytes] = {}
        for i in range(manifest.chunk_count):
            digest = manifest.chunk(i)[0]
            if digest not in bad:
                if i % 64 == 0:
                    pause()
                try:
                    self._decoded.read_chunk(digest)
                except CidfsError:
                    damaged = self._find_damage(found, "chunks", digest)
                    if damaged is not None:
                        bad[digest] = damaged
            if digest in bad:
                rows[i] = digest
        found.add_chunks(manifest, bad, rows)

    def _find_damage(self, found: _Found, database: str, digest: bytes) -> Bad | None:
        damaged = find_damage(self._store, self._ledger, database, digest)
        if damaged is None and self._store.place(database, digest) is None:
            if not self._is_there(found.published):  # asked after the row: what is published has rows
                raise _Wrong("removed while it was verified")
            with self._store.read() as txn:
                where = str(txn.index.path)
            line = f"{where}: no row; run `cidfs rebuild`, which finds it if it is in a pack"
            damaged = self._ledger.add_bad(database, digest, None, where, line)
        return damaged


class _Found:
    """What is wrong with one path."""

    def __init__(self, published: PublishedPath, name: str) -> None:
        self.published, self.name = published, name
        self.wrong: list[str] = []
        self.bad: list[tuple[Bad, str, list[str], int]] = []  # a line, files, how many more files

    def add_manifest(self, bad: Bad | None) -> None:
        """Take a manifest that cannot be read."""
        if bad is None:
            raise _Wrong("changed while it was verified; verify again")
        self.bad.append((bad, f"its manifest {cid_text(bad.digest)} is damaged", [], 0))

    def add_chunks(self, manifest: Manifest, bad: dict[bytes, Bad], rows: dict[int, bytes]) -> None:
        """Take damaged chunks; rows are those of the manifest's chunk table that have them."""
        if not bad:
            return
        files = _files_with(manifest, rows)
        for digest, one in bad.items():
            named, more = files[digest]
            where = ", ".join(named) + (f" and {more} more files" if more else "") if any(named) else ""
            line = f"chunk {cid_text(digest)} is damaged" + (f": in {where}" if where else "")
            self.bad.append((one, line, named, more))

    def report(self, ledger: Ledger) -> None:
        """Put all of it into the ledger."""
        path = self.published.path
        for text in self.wrong:
            ledger.add("path", self.name, self.name, f"{self.name}: {text}")
        for number, (bad, line, files, more) in enumerate(self.bad):
            ledger.touch(path, self.name, bad, files, more)
            if number < CHUNKS_NAMED:
                ledger.add_line(path, f"{self.name}: {line}")
        if len(self.bad) > CHUNKS_NAMED:
            ledger.add_line(
                path, f"{self.name}: {len(self.bad) - CHUNKS_NAMED:,} more of its chunks are damaged"
            )


def _files_with(manifest: Manifest, rows: dict[int, bytes]) -> dict[bytes, tuple[list[str], int]]:
    """Return for each digest the first files that have it, and how many more there are."""
    named: dict[bytes, list[str]] = {digest: [] for digest in rows.values()}
    more = dict.fromkeys(named, 0)
    ordered = sorted(rows)
    for index in range(manifest.node_count):
        node = manifest.node(index)
        if not node.is_file or not node.count:
            continue
        at = bisect_left(ordered, node.first)
        here: set[bytes] = set()
        while at < len(ordered) and ordered[at] < node.first + node.count:
            here.add(rows[ordered[at]])
            at += 1
        for digest in here:
            if len(named[digest]) < FILES_NAMED:
                named[digest].append(_shown(manifest.path(index)))
            else:
                more[digest] += 1
    return {digest: (named[digest], more[digest]) for digest in named}


def _shown(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Decoded:
    """Chunks as they were last read, up to CACHE_BYTES of them."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def read_chunk(self, digest: bytes) -> bytes:
        """Return a chunk's verified bytes."""
        with self._lock:
            data = self._chunks.get(digest)
            if data is not None:
                self._chunks.move_to_end(digest)
                return data
        data = self._store.read_chunk(digest)
        with self._lock:
            if digest not in self._chunks:
                self._chunks[digest] = data
                self._size += len(data) + ENTRY_BYTES
                while self._size > CACHE_BYTES:
                    self._size -= len(self._chunks.popitem(last=False)[1]) + ENTRY_BYTES
        return data
