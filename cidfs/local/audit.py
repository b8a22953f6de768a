"""The index held against the journal and against its own counts: what verification asks this floor.

Synchronous, changes nothing. The journal is read in pieces and without the lock; what looks like a difference
is judged under the write lock, with what came since. `audit_rows` holds the rows against each other.
"""

from __future__ import annotations

import itertools
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from cidfs.errors import FormatError
from cidfs.formats import frames, journal, record
from cidfs.formats.chunking import MAXIMUM
from cidfs.formats.digest import checksum
from cidfs.local import tables
from cidfs.local.audit_realisations import SaidRealisations
from cidfs.local.files import disk_errors, mapped
from cidfs.local.journal import journal_files
from cidfs.local.notes import Note
from cidfs.local.rows import DATABASES, LATER
from cidfs.local.store import LocalStore

GAPS_SHOWN: Final = 20
ATTEMPTS: Final = 3
_WINDOW: Final = 1 << 20


def lost_rows(store: LocalStore) -> list[str]:
    """Return a line for each database with another number of rows than its last commit noted."""
    return [note.line for note in count_notes(store)]


def count_notes(store: LocalStore) -> list[Note]:
    """Compare the number of rows of each database with what its last commit noted."""
    notes = []
    with store.read() as txn:
        for name in sorted({*DATABASES, *LATER} - {"meta"}):
            noted, there = txn.number(f"count:{name}"), txn.entries(name)
            if noted != there:
                text = f"{name} has {there} rows where {noted} were written; run `cidfs rebuild`"
                notes.append(Note("index", name, str(txn.index.path), text))
    return notes


def journal_differences(store: LocalStore) -> list[str]:
    """Return a line for each difference between index and journal, and for each loss in the journal."""
    return [note.line for note in journal_notes(store)]


def journal_notes(store: LocalStore) -> list[Note]:
    """Compare the index with the journal, and `next-inode` with the index."""
    folder = store.state.root / "journal"
    for attempt in range(ATTEMPTS):
        said = _Said(store)
        try:
            if attempt < ATTEMPTS - 1:
                with store.transaction():  # both at one moment, of the index that counts then
                    cut = _sizes(folder)
                    serial = _next_serial(store)
                said.read(folder, cut)
                said.look_at_index(serial)
            else:
                cut = {}
            with store.transaction():
                now = _sizes(folder)
                if any(number not in now for number in cut):
                    continue  # a checkpoint took the journal's place
                said.read(folder, now)
                if not cut:
                    said.look_at_index(_next_serial(store))
                return [*said.judge(folder), *_inode_notes(store)]
        except FileNotFoundError:
            continue
    return [Note("journal", "", str(folder), "was replaced again and again meanwhile; verify again")]


def _inode_notes(store: LocalStore) -> Iterator[Note]:
    where = f"{store.state.root}/next-inode"
    with store.read() as txn:
        raised = max(txn.number("next-base"), txn.number("limit"))
    try:
        if store.state.inode_limit() < raised:
            text = "below the numbers that were given out; run `cidfs rebuild`"
            yield Note("inodes", "next-inode", where, text)
    except FormatError as e:
        yield Note("inodes", "next-inode", where, str(e).removeprefix(f"{where}: "))


def _sizes(folder: Path) -> dict[int, int]:
    """Return the size of each journal file; nothing that is added later lies within."""
    found = {}
    for number in journal_files(folder):
        with disk_errors(folder / str(number), "read"):
            found[number] = os.stat(folder / str(number)).st_size
    return found


def _next_serial(store: LocalStore) -> int:
    with store.read() as txn:
        return max(1, txn.number("next-serial"))


def frames_of(path: Path, start: int, end: int) -> Iterator[frames.Found | frames.Gap]:
    """Yield the whole frames of a part of a file, and what lies between them, holding one at a time.

    What `frames.scan` gives, for files that may be long. Raise FileNotFoundError, or DiskFailed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise mapped(e, path, "open") from e
    try:
        at = bad = start
        false = 0
        while at < end:
            header = _header_at(fd, at)
            long = header is not None and header.length > MAXIMUM
            if header is None or at + header.size > end or (long and false > frames.MAX_FALSE):
                at = _next_magic(fd, at + 1, end)
                continue
            found = _frame_at(fd, at, header)
            if found is None:
                false += header.length if long else 0
                at = _next_magic(fd, at + 1, end)
                continue
            if bad < at:
                yield frames.Gap(bad, at)
            if found.header.kind in frames.MAX_LENGTH:
                yield found
            at = bad = at + found.header.size
        if bad < end:
            yield frames.Gap(bad, end)
    except OSError as e:
        raise mapped(e, path, "read") from e
    finally:
        os.close(fd)


def _header_at(fd: int, at: int) -> frames.Header | None:
    try:
        return frames.read_header(os.pread(fd, frames.HEADER_SIZE, at))
    except FormatError:
        return None


def _frame_at(fd: int, at: int, header: frames.Header) -> frames.Found | None:
    try:
        return frames.Found(at, header, frames.read_data(os.pread(fd, header.size, at), header))
    except FormatError:
        return None


def _next_magic(fd: int, at: int, end: int) -> int:
    while at < end:
        window = os.pread(fd, min(_WINDOW, end - at), at)
        hit = window.find(frames.MAGIC)
        if hit >= 0:
            return at + hit
        if len(window) < len(frames.MAGIC):
            return end
        at += len(window) - len(frames.MAGIC) + 1
    return end


class _Said:
    """What the journal says, as far as the index does not say the same.

    A few bytes a serial, and some hundred for each path that was removed since the last checkpoint.
    """

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._done: dict[int, int] = {}  # journal file -> how far it was read
        self._met = _Serials()
        self._since = 0
        self._head: journal.Checkpoint | None = None
        self._absent: dict[tuple[str, int], int] = {}  # hash part and base -> serial that published it
        self._gone: set[tuple[str, int]] = set()
        self._records: dict[tuple[str, int], tuple[int, bytes]] = {}  # the latest that are to be compared
        self._unsaid: dict[str, int] = {}  # paths of the index whose serial was not met
        self._realisations = SaidRealisations(store)
        self._gaps: list[str] = []
        self._notes: list[Note] = []

    def read(self, folder: Path, sizes: dict[int, int]) -> None:
        """Read what was not read yet of each file, from the last checkpoint on."""
        if self._head is None:
            for number in sorted(sizes, reverse=True):
                head = _checkpoint_of(folder / str(number), sizes[number])
                if head is not None:
                    self._head, self._since = head, number
                    break
        for number, size in sorted(sizes.items()):
            if number < self._since:
                continue
            for item in frames_of(folder / str(number), self._done.get(number, 0), size):
                if isinstance(item, frames.Gap):
                    self._gaps.append(f"bytes {item.offset} to {item.end} of file {number}")
                elif item.header.kind == frames.KIND_JOURNAL:
                    self._take(journal.decode(item.data))
            self._done[number] = size

    def _take(self, transaction: journal.Transaction) -> None:
        first = self._head.serial if self._head is not None else 1
        for entry in transaction.entries:
            if isinstance(entry, journal.Checkpoint):
                continue
            if entry.serial < first and not transaction.of_checkpoint:
                continue
            old, new = self._met.note(entry)
            if not old:  # what is there twice is the same entry
                self._compare(entry)
            elif old != new:
                text = f"two entries have serial {entry.serial}; restore it from a backup"
                where = str(self._store.state.root / "journal")
                self._notes.append(Note("journal", str(entry.serial), where, text))

    def _compare(self, entry: journal.Entry) -> None:
        if isinstance(entry, journal.Removal):
            self._gone.add((entry.hash_part, entry.base))
        elif isinstance(entry, journal.Realisation):
            self._realisations.take(entry)
        elif isinstance(entry, journal.Publication | journal.Amendment):
            hash_part = record.decode(entry.record).path.hash_part
            key = (hash_part, entry.base)
            published = isinstance(entry, journal.Publication)
            with self._store.read() as txn:
                row, known = tables.find_path(txn, hash_part.encode()), txn.get("records", hash_part.encode())
            if published and (row is None or row.serial != entry.serial):
                self._absent[key] = entry.serial
            if entry.serial > self._records.get(key, (0,))[0] and (not published or known != entry.record):
                self._records[key] = (entry.serial, checksum(entry.record))

    def look_at_index(self, next_serial: int) -> None:
        """Note the paths and realisations that the journal did not say."""
        for published in self._store.paths():
            serial = published.row.serial
            if serial < next_serial and not self._met.has(serial):
                self._unsaid[published.path.hash_part] = serial
        self._realisations.look_at_index(next_serial, self._met.has)

    def judge(self, folder: Path) -> Iterator[Note]:
        """Say what differs; under the lock, when all was read."""
        with self._store.read() as txn:
            pending = [raw for _, raw in txn.rows("pending") if raw is not None]
        for raw in pending:  # committed, and late in the journal: as good as said
            self._take(journal.decode(frames.read_data(raw, frames.read_header(raw))))
        yield from self._notes
        yield from self._lost(str(folder))
        for (hash_part, base), serial in self._absent.items():
            if (hash_part, base) in self._gone:
                continue
            row = self._store.find(hash_part.encode())
            if row is None:
                text = "in the journal and not in the index; run `cidfs rebuild`"
                yield Note("index", hash_part, hash_part, text)
            elif row.serial != serial:
                text = f"published by serial {row.serial}, and by serial {serial} too; run `cidfs rebuild`"
                yield Note("index", hash_part, hash_part, text)
        for hash_part, serial in self._unsaid.items():
            row = self._store.find(hash_part.encode())
            if row is not None and row.serial == serial and not self._met.has(serial):
                text = "in the index and not in the journal; run `cidfs rebuild`"
                yield Note("journal", hash_part, hash_part, text)
        for (hash_part, base), (_, check) in self._records.items():
            with self._store.read() as txn:
                row, known = tables.find_path(txn, hash_part.encode()), txn.get("records", hash_part.encode())
            if row is not None and row.base == base and known is not None and checksum(known) != check:
                text = "index and journal have different records; run `cidfs rebuild`"
                yield Note("index", hash_part, hash_part, text)
        yield from self._realisations.judge(self._met.has)

    def _lost(self, where: str) -> Iterator[Note]:
        """Name the serials that should be there and are not."""
        with self._store.read() as txn:
            next_serial = max(1, txn.number("next-serial"))
        live, first = (self._head.live, self._head.serial) if self._head is not None else ((), 1)
        wanted = itertools.chain(live, range(first, next_serial))
        missing = False
        for low, high in _ranges(s for s in wanted if not self._met.has(s)):
            missing = True
            serials = f"serial {low} is" if low == high else f"serials {low} to {high} are"
            text = f"{serials} in no whole frame; run `cidfs rebuild` while the index still knows them"
            yield Note("journal", str(low), where, text)
        if missing:  # else what belongs to no frame was torn by one who died, and nothing needs it
            for gap in self._gaps[:GAPS_SHOWN]:
                yield Note("journal", "", where, f"{gap} belong to no whole frame")
        if self._met.top >= next_serial:
            text = f"is at serial {self._met.top}, and the index at {next_serial - 1}; run `cidfs rebuild`"
            yield Note("journal", str(self._met.top), where, text)


class _Serials:
    """Which serials were met, and a check of the entry of each: 4 bytes a serial."""

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self.top = 0

    def note(
        self, entry: journal.Publication | journal.Amendment | journal.Removal | journal.Realisation
    ) -> tuple[int, int]:
        """Note an entry; return the check that its serial had before (0 for none) and the one it has now."""
        self.top = max(self.top, entry.serial)
        if isinstance(entry, journal.Realisation):
            check = zlib.crc32(entry.body) | 1
        else:
            contents = entry.hash_part.encode() if isinstance(entry, journal.Removal) else entry.record
            check = zlib.crc32(contents, entry.base & 0xFFFFFFFF) | 1
        page = self._pages.setdefault(entry.serial >> 10, _EMPTY[:])
        old = page[entry.serial & 1023]
        page[entry.serial & 1023] = old or check
        return old, check

    def has(self, serial: int) -> bool:
        """Say whether a serial was met."""
        page = self._pages.get(serial >> 10)
        return page is not None and page[serial & 1023] != 0


_EMPTY: Final = array("I", bytes(4096))


def _checkpoint_of(path: Path, size: int) -> journal.Checkpoint | None:
    """Return the checkpoint that a journal file begins with, or None."""
    for item in frames_of(path, 0, size):
        if isinstance(item, frames.Found) and item.header.kind == frames.KIND_JOURNAL:
            entries = journal.decode(item.data).entries
            return entries[0] if len(entries) == 1 and isinstance(entries[0], journal.Checkpoint) else None
    return None


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last of each run of consecutive numbers."""
    low = high = None
    for number in numbers:
        if low is not None and high is not None and number == high + 1:
            high = number
            continue
        if low is not None and high is not None:
            yield low, high
        low = high = number
    if low is not None and high is not None:
        yield low, high
