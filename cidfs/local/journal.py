"""The journal on disk: append and sync, read back, checkpoint. Under the store's write lock for writing.

Says again what LMDB has committed. A frame is appended only after the commit that it tells of, so it is never
wrong; it may be late (then it stands in `pending`) or there twice. Synchronous.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from cidfs.errors import FormatError, StoreAbsent
from cidfs.formats import frames, journal
from cidfs.local.files import disk_errors, mapped, replace_durably, sync_folder, write_all

ATTEMPTS: Final = 100
TAIL: Final = 1 << 20  # so many bytes at the journal's end are read to see where it stands


def journal_files(folder: Path) -> list[int]:
    """Return the numbers of the journal files, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        raise StoreAbsent(
            f"{folder}: the folder is gone; restore it from a backup. Where the index is whole, an empty"
            " folder and `cidfs rebuild` will do"
        ) from None
    except OSError as e:
        raise mapped(e, folder, "list") from e
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)


@dataclass
class Replay:
    """What a journal says: entries by serial, and what is missing."""

    entries: dict[int, journal.Entry] = field(default_factory=dict)
    next_serial: int = 1
    next_base: int = 0
    missing: list[int] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


class Journal:
    """The journal of one store, as this process knows it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[int] = set()  # files whose names this process has made durable

    def append(self, data: list[bytes]) -> None:
        """Append frames and make them durable; after a failed sync they go into a new file."""
        numbers = journal_files(self._folder)
        number = numbers[-1] if numbers else 0
        raw = b"".join(data)
        for attempt in (0, 1, 2):
            path = self._folder / str(number)
            fresh = number == 0 or attempt > 0
            if fresh:
                number += 1
                path = self._folder / str(number)
            try:
                fd = os.open(
                    path, os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if fresh else 0), 0o644
                )
                try:
                    write_all(fd, raw, os.fstat(fd).st_size)
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
            except OSError as e:
                if attempt == 2:
                    raise mapped(e, path, "append to the journal") from e
                continue
            if number not in self._known:
                sync_folder(self._folder)
                self._known.add(number)
            return

    def replay(self) -> Replay:
        """Read all frames that count, from the last checkpoint on.

        Raises FormatError for an entry of an unknown kind, and when two different entries have one serial.
        """
        result = Replay()
        found: list[tuple[int, journal.Transaction]] = []
        for number, path, raw in self._contents():
            for item in frames.scan(raw):
                if isinstance(item, frames.Gap):
                    result.damage.append(
                        f"{path}: bytes {item.offset} to {item.end} belong to no whole frame"
                    )
                elif item.header.kind == frames.KIND_JOURNAL:
                    found.append((number, journal.decode(item.data)))
        checkpoint: journal.Checkpoint | None = None
        since = 0
        for number, transaction in found:
            for entry in transaction.entries:
                if isinstance(entry, journal.Checkpoint):
                    checkpoint, since = entry, number
        first = checkpoint.serial if checkpoint else 1
        result.next_base = checkpoint.next_base if checkpoint else 0
        for number, transaction in found:
            if number < since:
                continue
            for entry in transaction.entries:
                if isinstance(entry, journal.Checkpoint):
                    continue
                if entry.serial < first and not transaction.of_checkpoint:
                    continue
                if result.entries.setdefault(entry.serial, entry) != entry:
                    raise FormatError(
                        f"{self._folder}: two entries have serial {entry.serial}; restore it from a backup"
                    )
        top = max((s for s in result.entries), default=0)
        result.next_serial = max(first, top + 1)
        wanted = list(checkpoint.live) if checkpoint else []
        wanted += range(first, result.next_serial)
        result.missing = [s for s in wanted if s not in result.entries]
        return result

    def write_checkpoint(
        self,
        entries: Iterable[journal.Entry],
        next_serial: int,
        next_base: int,
        *,
        serials: Sequence[int] | None = None,
        above: int = 0,
    ) -> int:
        """Write a checkpoint that stands for all that is now in the journal, drop the older files.

        serials are those of the entries, where these are not to be held in memory. Return its number, which
        is higher than `above`.
        """
        if serials is None:
            entries = list(entries)
            serials = [entry.serial for entry in entries]
        old = journal_files(self._folder)
        number = max([above, *old]) + 1
        head = journal.Checkpoint(next_serial, next_base, tuple(sorted(serials)))
        replace_durably(self._folder / str(number), _checkpoint_frames(head, entries))
        self._known.add(number)
        for stale in old:
            with contextlib.suppress(FileNotFoundError), disk_errors(self._folder / str(stale), "remove"):
                os.unlink(self._folder / str(stale))
        return number

    def _contents(self) -> Iterator[tuple[int, Path, bytes]]:
        """Yield number, path and bytes of all files, as they were together at one moment."""
        with contextlib.ExitStack() as stack:
            for attempt in range(ATTEMPTS):
                opened: list[tuple[int, Path, BinaryIO]] = []
                try:
                    for number in journal_files(self._folder):
                        path = self._folder / str(number)
                        opened.append((number, path, stack.enter_context(open(path, "rb"))))
                except FileNotFoundError as e:
                    stack.close()
                    if attempt == ATTEMPTS - 1:
                        raise mapped(e, path, "read") from e
                    continue  # a checkpoint has just taken its place
                except OSError as e:
                    raise mapped(e, path, "read") from e
                break
            for number, path, file in opened:
                with disk_errors(path, "read"):
                    yield number, path, file.read()

    def last_serial(self) -> int:
        """Return the highest serial that stands at the journal's end; 0 where none does."""
        for number in reversed(journal_files(self._folder)):
            path = self._folder / str(number)
            with disk_errors(path, "read"), open(path, "rb") as file:
                last = _last_in(file.read(TAIL))  # a checkpoint's first frame says where it stands
                size = file.seek(0, os.SEEK_END)
                tail, at_end = TAIL, 0
                while tail < size and not at_end:  # a frame may be longer than a tail
                    file.seek(size - tail)
                    at_end = _last_in(file.read())
                    tail *= 4
                if tail >= size and not at_end:
                    file.seek(0)
                    at_end = _last_in(file.read())
            if last or at_end:
                return max(last, at_end)
        return 0


def _last_in(raw: bytes) -> int:
    """Return the highest serial that a part of a journal file tells of; 0 where it has no whole frame."""
    last = 0
    for item in frames.scan(raw):
        if isinstance(item, frames.Found) and item.header.kind == frames.KIND_JOURNAL:
            for entry in journal.decode(item.data).entries:
                beyond = isinstance(entry, journal.Checkpoint)  # its serial is the next one's
                last = max(last, entry.serial - beyond)
    return last


def _checkpoint_frames(head: journal.Checkpoint, entries: Iterable[journal.Entry]) -> Iterator[bytes]:
    yield journal.encode([head], of_checkpoint=True)
    group: list[journal.Entry] = []
    for entry in entries:
        group.append(entry)
        if len(group) == 256:
            yield journal.encode(group, of_checkpoint=True)
            group = []
    if group:
        yield journal.encode(group, of_checkpoint=True)
