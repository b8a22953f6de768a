"""The survey of a collection: what there is, and what of it is needed.

Says what index and journal agree to be published, which inode ranges of removed paths a mount may still know,
and marks what these need. Changes nothing. Synchronous; belongs to one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cidfs.errors import CidfsError, Damaged, IndexLost
from cidfs.formats import frames, journal, realisation, record
from cidfs.local import tables
from cidfs.local.index import Index, ReadTxn
from cidfs.local.leases import oldest_mount
from cidfs.local.marks import Marks, key_of, prefix_of
from cidfs.local.pack_scan import all_packs
from cidfs.local.rows import InodeRow, RemovedRow, key_number, number_key
from cidfs.local.store import LocalStore


@dataclass
class Report:
    """What a collection found and did. Bytes; problems are lines for people."""

    paths: int = 0
    dead_chunks: int = 0
    dead_manifests: int = 0
    dead_bytes: int = 0
    ranges: int = 0
    packs: int = 0
    pack_bytes: int = 0
    sparse: int = 0
    sparse_bytes: int = 0
    held: int = 0
    held_bytes: int = 0
    waiting: int = 0
    waiting_bytes: int = 0
    leftovers: int = 0
    leftover_bytes: int = 0
    entries: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class PackFile:
    """A pack as it was when the collection began."""

    kind: int
    path: Path
    size: int
    occupied: int  # less than its size where there are holes


def pack_file(kind: int, path: Path) -> PackFile:
    """Look at a pack; raise FileNotFoundError."""
    info = path.stat()
    return PackFile(kind, path, info.st_size, min(info.st_size, info.st_blocks * 512))


class _Realised:
    """The realisations that a journal says: of each id the serial, and the hash part that it came to."""

    def __init__(self) -> None:
        self.serials: dict[str, int] = {}
        self.hash_parts: dict[str, str] = {}
        self._of: dict[str, set[str]] = {}

    def put(self, entry: journal.Realisation) -> None:
        found = realisation.decode(entry.body)
        self.serials[found.id] = entry.serial
        self.hash_parts[found.id] = found.store_path.hash_part
        self._of.setdefault(found.store_path.hash_part, set()).add(found.id)

    def drop(self, hash_part: str) -> None:
        """Forget what came to a path that was removed."""
        for identity in self._of.pop(hash_part, ()):
            if self.hash_parts[identity] == hash_part:
                self.serials.pop(identity, None)


class Survey:
    """What a store holds at one moment, and what of it is needed; later publications on request."""

    def __init__(self, store: LocalStore, report: Report, progress: Callable[[str, int], None]) -> None:
        self._store = store
        self._state = store.state
        self._progress = progress
        self.report = report
        self.index = 0  # the number of the index that was looked at
        self._serial = 0  # what was published with a lower one is in the journal
        self._first_new = 0  # what is published has a lower inode base
        self._base = 0  # what is published at or above it was published since it was last looked
        self.needed: dict[int, RemovedRow] = {}  # ranges of removed paths that a mount may still know
        self.unneeded: list[int] = []  # and those that none can
        self.marks: dict[str, Marks] = {}
        self.packs: dict[bytes, PackFile] = {}
        self.garbage = 0  # entries of the journal that a checkpoint would not have

    def list_packs(self) -> None:
        """Note which packs there are and how long they are: one that grows has a writer."""
        for identity, kind, path in all_packs(self._state.root):
            with contextlib.suppress(FileNotFoundError):
                self.packs[identity] = pack_file(kind, path)

    def note(self, index: Index) -> None:
        """Fix the moment of the survey: what is published by now."""
        with index.read() as txn:
            self.index = index.number
            self._serial = txn.needed_number("next-serial")
            self._base = self._first_new = txn.needed_number("next-base")
            removed = tables.removed_ranges(txn)
        oldest = oldest_mount(self._state.leases())
        for base, row in removed:
            if oldest is not None and oldest <= row.serial:
                self.needed[base] = row
            else:
                self.unneeded.append(base)

    def compare(self, pending: bool) -> None:
        """Raise Damaged where index and journal differ in what is published: then nothing may be dropped."""
        self._progress("comparing index and journal", 0)
        ranges = {base for base, _ in self._ranges()}
        said: dict[bytes, tuple[int, int]] = {}
        realised = _Realised()
        for entry in self._said(pending):
            match entry:
                case journal.Publication():
                    key = record.decode(entry.record).path.hash_part.encode()
                    said.setdefault(key, (entry.serial, entry.base))
                case journal.Removal():
                    if said.get(entry.hash_part.encode(), (0, 0))[1] == entry.base:
                        del said[entry.hash_part.encode()]
                        realised.drop(entry.hash_part)
                case journal.Realisation():
                    realised.put(entry)
        live = len(said) + len(realised.serials)
        self.garbage = self.report.entries - live - 2 * len(self.needed)
        self.report.paths = 0
        for published in self._store.paths():
            self.report.paths += 1
            if published.row.serial >= self._serial:
                continue
            if published.row.base not in ranges:
                raise IndexLost(
                    f"{self._state.root}/index: the inode range of {published.path} is lost; run `cidfs"
                    " rebuild`"
                )
            here = (published.row.serial, published.row.base)
            there = said.pop(published.path.hash_part.encode(), None)
            if there != here:
                raise Damaged(
                    f"{published.path}: index and journal say different things of it; nothing is collected:"
                    " see `cidfs verify`"
                )
        later = self._removed_since()
        for key, (_, base) in said.items():
            if base not in later:
                raise Damaged(
                    f"{key.decode()}: published in the journal and not in the index; nothing is collected:"
                    f" run `cidfs --state {self._state.root} rebuild`"
                )
        self._compare_realisations(realised)

    def _compare_realisations(self, said: _Realised) -> None:
        """Raise Damaged where index and journal differ in the realisations: a checkpoint says those alone."""
        for serial, found in self._store.realisations():
            there = said.serials.pop(found.id, 0)
            if serial < self._serial and serial != there:
                raise Damaged(
                    f"{found.id}: index and journal say different things of it; nothing is collected:"
                    " see `cidfs verify`"
                )
        for identity in said.serials:
            row = self._store.find(said.hash_parts[identity].encode())
            if row is not None and row.serial < self._serial:  # else it was removed since
                raise Damaged(
                    f"{identity}: in the journal and not in the index; nothing is collected:"
                    f" run `cidfs --state {self._state.root} rebuild`"
                )

    def _said(self, pending: bool) -> list[journal.Entry]:
        """Return the entries of the journal, if so wanted with those of `pending`, by serial."""
        late: dict[int, journal.Entry] = {}
        if pending:  # first: what leaves it stands in the journal then
            with self._store.read() as txn:
                for _, raw in txn.rows("pending"):
                    if raw is not None:
                        body = frames.read_data(raw, frames.read_header(raw))
                        late.update((e.serial, e) for e in journal.decode(body).entries)
        replay = self._store.journal().replay()
        entries = {s: e for s, e in (late | replay.entries).items() if s < self._serial}
        lost = [s for s in replay.missing if s < self._serial and s not in entries]
        if lost:
            raise Damaged(
                f"{self._state.root}/journal: serial {lost[0]} is lost; nothing is collected:"
                f" run `cidfs --state {self._state.root} rebuild`"
            )
        self.report.entries = len(entries)
        return [entries[s] for s in sorted(entries)]

    def _removed_since(self) -> set[int]:
        """Return the bases of what is removed by now."""
        with self._store.read() as txn:
            return {base for base, _ in tables.removed_ranges(txn)}

    def _ranges(self) -> list[tuple[int, InodeRow]]:
        """Return the inode ranges of all that was published by the moment of the survey, removed or not.

        Raise IndexLost where one is damaged or gone.
        """
        found: list[tuple[int, InodeRow]] = []
        count = 0
        with self._store.read() as txn:
            for key, raw in txn.rows("inodes"):
                if raw is None:
                    raise IndexLost(f"{txn.index.path}: a row of `inodes` is damaged; run `cidfs rebuild`")
                count += 1
                if key_number(key) < self._first_new:
                    found.append((key_number(key), InodeRow.unpack(raw)))
            if count != txn.number("count:inodes"):
                raise IndexLost(f"{txn.index.path}: rows of `inodes` are lost; run `cidfs rebuild`")
        return found

    def mark(self) -> None:
        """Mark what is needed: by what is published, and by what is removed and perhaps known to a mount."""
        self._progress("reading the index", 0)
        self.marks = {name: Marks(self._store, name) for name in ("chunks", "manifests")}
        done: set[bytes] = set()
        unneeded = set(self.unneeded)
        ranges = self._ranges()
        dead: list[int] = []
        for removed in (False, True):  # what is published first: the rest is held for mounts alone
            for number, (base, row) in enumerate(ranges):
                # what was removed since the moment of the survey counts as published: a mount may know it too
                if base not in unneeded and (base in self.needed) == removed:
                    self._need(row, done, removed=removed)
                if number % 100 == 0:
                    self._progress("marking", len(ranges) - number)
            dead.append(sum(marks.dead()[1] for marks in self.marks.values()))
        chunks, manifests = self.marks["chunks"], self.marks["manifests"]
        self.report.dead_chunks, self.report.dead_manifests = chunks.dead()[0], manifests.dead()[0]
        self.report.dead_bytes = dead[1]
        self.report.held, self.report.held_bytes = len(self.needed), dead[0] - dead[1]
        missing = len(chunks.missing) + len(manifests.missing)
        if missing:
            self.report.problems.append(
                f"{missing} chunks of published paths are in no pack that the index knows: see `cidfs verify`"
            )

    def _need(self, row: InodeRow, done: set[bytes], *, removed: bool = False, new: bool = False) -> None:
        """Mark a manifest and its chunks; those of a new publication may have come after the rows."""
        if row.manifest in done:
            return
        try:
            opened = self._store.read_manifest(row.manifest)
        except CidfsError as e:
            path = self._store.find(row.hash_part)
            if removed or path is None:
                return  # nobody can read it any more
            raise Damaged(
                f"{row.hash_part.decode()}-{path.name.decode()}: its manifest cannot be read, so nobody knows"
                f" what it needs ({e});"
                " nothing is collected: `cidfs verify --repair`, or remove it"
            ) from e
        done.add(row.manifest)
        self.marks["manifests"].need((prefix_of(row.manifest),), new=new)
        self.marks["chunks"].need(opened.prefixes(), new=new)

    def mark_new(self, txn: ReadTxn) -> None:
        """Mark what was published since it was last looked. Under the lock, nothing more can come."""
        done: set[bytes] = set()
        for key, raw in txn.rows("inodes", number_key(self._base)):
            if raw is None:
                raise IndexLost(f"{txn.index.path}: a row of `inodes` is damaged; run `cidfs rebuild`")
            self._need(InodeRow.unpack(raw), done, new=True)
            self._base = key_number(key) + 1

    def live_bytes(self) -> dict[bytes, int]:
        """Return for each pack in which a frame is needed the bytes of those."""
        live: dict[bytes, int] = {}
        for marks in self.marks.values():
            for identity, size in marks.live_bytes().items():
                live[identity] = live.get(identity, 0) + size
        return live


def digests_of(txn: ReadTxn, database: str, prefix: int) -> list[bytes]:
    """Return the digests in a database that begin with a prefix."""
    start = key_of(prefix)
    found = []
    for key, _ in txn.rows(database, start):
        if key[:8] != start:
            break
        found.append(key)
    return found
