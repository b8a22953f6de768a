"""What a power loss may leave: a recorder's log, replayed on a disk that keeps only what was synced for sure.

Durable is: the bytes of a file at its last sync, the names of a folder at its last sync, and what was written
through a descriptor that syncs by itself. All else may be there or not, each name and each block of each
write for itself, in any order; a file may have its new size and zeros. Pure but for reading the folder that
the log begins with, and for writing out what is left.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

_HEAD: Final = struct.Struct("<IIQqIIII")
IGNORED: Final = ("lock.mdb",)  # made anew by whoever opens the index first


class Op(IntEnum):
    """What a record of the log says; as in recorder.c."""

    MARK = 1
    OUT = 2
    CREATE = 3
    WRITE = 4
    SIZE = 5
    SYNC = 6
    MKDIR = 7
    RENAME = 8
    LINK = 9
    UNLINK = 10
    RMDIR = 11
    UNKNOWN = 12
    HOLE = 13


@dataclass(frozen=True, slots=True)
class Event:
    """One call. durable: the bytes were synced by the write itself."""

    op: Op
    pid: int
    inode: int
    offset: int
    durable: bool
    first: str
    second: bytes

    def mark(self) -> Any:
        """Return what a mark says."""
        return json.loads(self.first)

    def __str__(self) -> str:
        """Say it in a few words."""
        words = [self.op.name.lower(), self.first, self.second.decode() if self.op == Op.RENAME else ""]
        if self.op == Op.WRITE:
            words = ["write", str(self.inode), f"{self.offset}+{len(self.second)}", "durable" * self.durable]
        return " ".join(filter(None, words))


def read_log(path: Path) -> list[Event]:
    """Return the events of a log; one that was cut short by a kill is left out."""
    raw, at, events = path.read_bytes(), 0, []
    while at + _HEAD.size <= len(raw):
        op, pid, inode, offset, durable, first, second, _ = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        if at + first + second > len(raw):
            break
        text = os.fsdecode(raw[at : at + first])
        events.append(
            Event(Op(op), pid, inode, offset, bool(durable), text, raw[at + first : at + first + second])
        )
        at += first + second
    return events


@dataclass
class File:
    """A file: what is durable of it, and what was done since: (offset, bytes), or a new size."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)

    def size(self) -> int:
        """Return its size as it is now."""
        size = len(self.durable)
        for change in self.pending:
            size = change if isinstance(change, int) else max(size, change[0] + len(change[1]))
        return size

    def settle(self) -> None:
        """All of it is durable now."""
        for change in self.pending:
            _apply(self.durable, change)
        self.pending.clear()

    def write_through(self, offset: int, data: bytes) -> None:
        """Write bytes that are durable at once, over whatever was pending there."""
        end = offset + len(data)
        kept: list[tuple[int, bytes] | int] = []
        for change in self.pending:
            if isinstance(change, int):
                kept.append(change)
                continue
            start, old = change
            if start < offset:
                kept.append((start, old[: offset - start]))
            if start + len(old) > end:
                after = max(start, end)
                kept.append((after, old[after - start :]))
        self.pending = [c for c in kept if isinstance(c, int) or c[1]]
        _apply(self.durable, (offset, data))


@dataclass
class Folder:
    """A folder: its names now, and at its last sync."""

    durable: dict[str, File | Folder] = field(default_factory=dict)
    names: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """What is left of what was not synced. Shares between 0 and 1; block: how a write may be torn."""

    name: str
    names: float
    data: float
    sizes: bool = False
    block: int = 4096


LOST: Final = Variant("all lost", 0, 0)
KEPT: Final = Variant("all kept", 1, 1)
VARIANTS: Final = (
    LOST,
    Variant("names kept, data lost", 1, 0),
    Variant("names kept, data zeros", 1, 0, sizes=True),
    Variant("names lost, data kept", 0, 1),
    Variant("pages at random", 0.5, 0.5),
    Variant("sectors at random", 0.7, 0.5, sizes=True, block=512),
    Variant("names at random, pages nearly all", 0.5, 0.9),
    KEPT,
)


class Disk:
    """The disk below one folder, event by event."""

    def __init__(self, root: Path) -> None:
        self._inodes: dict[int, File | Folder] = {}
        self.top = self._read(root)

    def _read(self, folder: Path) -> Folder:
        here = Folder()
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                here.names[entry.name] = self._read(Path(entry.path))
            else:
                there = self._inodes[entry.inode()] = File(bytearray(Path(entry.path).read_bytes()))
                here.names[entry.name] = there
        here.durable = dict(here.names)
        self._inodes[folder.stat().st_ino] = here
        return here

    def _folder(self, path: str) -> tuple[Folder, str]:
        *above, name = path.split("/")
        here = self.top
        for part in above:
            there = here.names[part]
            assert isinstance(there, Folder), path
            here = there
        return here, name

    def _file(self, event: Event) -> File:
        file = self._inodes[event.inode]
        assert isinstance(file, File), event
        return file

    def apply(self, event: Event) -> None:
        """Do what an event says; what it syncs is durable only after settle()."""
        match event.op:
            case Op.CREATE | Op.MKDIR:
                folder, name = self._folder(event.first)
                made = File() if event.op == Op.CREATE else Folder()
                folder.names[name] = self._inodes[event.inode] = made
            case Op.WRITE:
                self._file(event).pending.append((event.offset, event.second))
            case Op.HOLE:  # zeros, as far as the file goes
                file = self._file(event)
                length = min(int.from_bytes(event.second, "little"), file.size() - event.offset)
                file.pending.append((event.offset, bytes(max(0, length))))
            case Op.SIZE:
                self._file(event).pending.append(event.offset)
            case Op.UNLINK | Op.RMDIR:
                folder, name = self._folder(event.first)
                del folder.names[name]
            case Op.RENAME | Op.LINK:
                folder, name = self._folder(event.first)
                target, new = self._folder(event.second.decode())
                target.names[new] = folder.names[name]
                if event.op == Op.RENAME:
                    del folder.names[name]
            case Op.UNKNOWN:
                raise AssertionError(f"the recorder cannot follow this call: {event.first} {event.second!r}")

    def settle(self, event: Event) -> None:
        """Make durable what an event syncs."""
        if event.op == Op.SYNC:
            there = self._inodes[event.inode]
            if isinstance(there, File):
                there.settle()
            else:
                there.durable = dict(there.names)
        elif event.op == Op.WRITE and event.durable:
            file = self._file(event)
            assert file.pending.pop() == (event.offset, event.second)
            file.write_through(event.offset, event.second)

    def left(self, variant: Variant, seed: int) -> dict[str, bytes | None]:
        """Return what a power loss leaves now: the bytes of each file by its path, None for a folder."""
        return dict(_left(self.top, "", variant, random.Random(seed)))


def _left(
    folder: Folder, prefix: str, variant: Variant, chance: random.Random
) -> Iterator[tuple[str, bytes | None]]:
    for name in sorted({*folder.durable, *folder.names}):
        there = folder.durable.get(name)
        if folder.names.get(name) is not there and chance.random() < variant.names:
            there = folder.names.get(name)
        if isinstance(there, Folder):
            yield prefix + name, None
            yield from _left(there, f"{prefix}{name}/", variant, chance)
        elif there is not None and name not in IGNORED:
            yield prefix + name, _bytes_left(there, variant, chance)


def _bytes_left(file: File, variant: Variant, chance: random.Random) -> bytes:
    if not file.pending:
        return bytes(file.durable)
    left, size = bytearray(file.durable), len(file.durable)
    for change in file.pending:
        if isinstance(change, int):
            size = change
            if chance.random() < variant.data:
                _apply(left, change)
            continue
        start, data = change
        size = max(size, start + len(data))
        while data:
            head = variant.block - start % variant.block
            if chance.random() < variant.data:
                _apply(left, (start, data[:head]))
            start, data = start + head, data[head:]
    if variant.sizes and len(left) < size:
        left.extend(bytes(size - len(left)))
    return bytes(left)


def _apply(left: bytearray, change: tuple[int, bytes] | int) -> None:
    if isinstance(change, int):
        del left[change:]
        left.extend(bytes(change - len(left)))
        return
    offset, data = change
    if len(left) < offset:
        left.extend(bytes(offset - len(left)))
    left[offset : offset + len(data)] = data


def write_out(left: dict[str, bytes | None], target: Path) -> Path:
    """Make a folder of what is left."""
    target.mkdir()
    for path, data in left.items():
        if data is None:
            (target / path).mkdir()
        else:
            (target / path).write_bytes(data)
    return target


def contents(root: Path) -> dict[str, bytes | None]:
    """Return what is in a folder, as `left` does."""
    found: dict[str, bytes | None] = {}
    for folder, folders, files in os.walk(root):
        where = os.path.relpath(folder, root)
        for name in folders:
            found[os.path.normpath(os.path.join(where, name))] = None
        for name in files:
            if name not in IGNORED:
                found[os.path.normpath(os.path.join(where, name))] = (Path(folder) / name).read_bytes()
    return found
