"""A disk that loses what was not synced, and processes that die at a chosen step.

`Disk` stands between the code and the system in a process of its own: it counts the steps that change
something, ends the process at one of them, lets a chosen sync fail, and on request writes out what a power
loss would have left. What it takes for durable: the bytes of a file that were there at its last good sync
(after a failed one the bytes before it count as clean, and are lost), and the names of a folder at its last
good sync. What was written or named since is kept or lost, name by name and write by write, as a seeded
choice says. LMDB's commits are taken as atomic, and as durable where the environment was opened so.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cidfs.local import index as index_module
from cidfs.local.index import Index, WriteTxn

KILLED = 77
_CALLS = ("fsync", "fdatasync", "pwrite", "posix_fadvise", "open", "rename", "link", "unlink", "mkdir")


@dataclass
class _File:
    """A file: its durable bytes, and what was written since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    data: bytes | None = None  # of LMDB: what its last durable commit left


@dataclass
class Plan:
    """What is to go wrong; nothing by default."""

    kill_at: int = 0  # the step before which the process ends
    fail_at: int = 0  # the sync that fails
    lost: str = ""  # where to write what a power loss leaves, at the end of the process
    keep: float = 0.0  # the share of what was not synced that survives it
    seed: int = 0
    memory: str = ""  # a file that tells the disk of the next process what this one did not sync
    pause_at: int = 0  # the step before which the process waits for others
    kill_before: str = ""  # how the name of the step begins before which it ends
    fail_on: str = ""  # the name of the syncs that fail


class Disk:
    """The disk below one folder."""

    def __init__(self, root: Path, plan: Plan, pause: Callable[[], None]) -> None:
        self.root = root
        self._pause = pause
        self.plan = plan
        self.steps = 0
        self.syncs = 0
        self.log: list[str] = []
        self._files: dict[int, _File] = {}  # by inode number
        self._folders: dict[int, dict[str, int]] = {}  # names at the last sync
        self._real: dict[str, Callable[..., Any]] = {}
        if plan.memory and os.path.exists(plan.memory):
            self._files, self._folders = pickle.loads(Path(plan.memory).read_bytes())
        else:
            self._scan(root)

    # --- steps

    def step(self, label: str) -> None:
        """One more step; the last one when it is the one to be killed at."""
        self.steps += 1
        self.log.append(label)
        if self.steps == self.plan.pause_at:
            self._pause()
        if self.steps == self.plan.kill_at or (
            self.plan.kill_before and label.startswith(self.plan.kill_before)
        ):
            self.end()
            os._exit(KILLED)

    def end(self) -> None:
        """The process ends here, and perhaps all others with it."""
        for name, call in self._real.items():
            setattr(os, name, call)
        if self.plan.lost:
            self._power_off(Path(self.plan.lost))
        elif self.plan.memory:
            Path(self.plan.memory).write_bytes(pickle.dumps((self._files, self._folders)))

    def install(self) -> None:
        """Take the place of the system calls that change something."""
        for name in _CALLS:
            self._real[name] = getattr(os, name)
            setattr(os, name, getattr(self, f"_{name}"))
        settle, write = WriteTxn.settle, Index.write
        opened = index_module._open_environment

        def before_commit(txn: WriteTxn) -> None:
            settle(txn)
            self.step("before commit")

        @contextmanager
        def after_commit(index: Index) -> Iterator[WriteTxn]:
            with write(index) as txn:
                yield txn
            if index.path in synced:
                self._note_lmdb(index.path)
            self.step("after commit")

        synced: set[Path] = set()

        def open_environment(path: Path, *, write: bool, sync: bool) -> Any:
            if sync:
                synced.add(path)
            return opened(path, write=write, sync=sync)

        def sync_index(index: Index) -> None:
            self.step("sync index")
            real_sync(index)
            self._note_lmdb(index.path)

        real_sync = Index.sync
        hooked: Any = Index
        hooked.write, hooked.sync = after_commit, sync_index
        hooked = WriteTxn
        hooked.settle = before_commit
        hooked = index_module
        hooked._open_environment = open_environment

    # --- the calls

    def _ours(self, path: Any) -> bool:
        return os.fsdecode(path).startswith(f"{self.root}/")

    def _sync(self, real: Callable[[int], None], fd: int) -> None:
        info = os.fstat(fd)
        kind = "folder" if stat.S_ISDIR(info.st_mode) else "file"
        where = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.root)
        label = f"sync {kind} {where}"
        self.step(label)
        self.syncs += 1
        file = self._files.get(info.st_ino)
        if self.syncs == self.plan.fail_at or label == self.plan.fail_on:
            if file is not None:
                file.pending.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)
        if stat.S_ISDIR(info.st_mode):
            self._folders[info.st_ino] = self._listing(fd)
        elif file is not None:
            for offset, data in file.pending:
                _apply(file.durable, offset, data)
            file.pending.clear()

    def _fsync(self, fd: int) -> None:
        self._sync(self._real["fsync"], fd)

    def _fdatasync(self, fd: int) -> None:
        self._sync(self._real["fdatasync"], fd)

    def _pwrite(self, fd: int, data: bytes, offset: int) -> int:
        real = self._real["pwrite"]
        where = os.readlink(f"/proc/self/fd/{fd}")
        if not self._ours(where) or where.endswith("/write.lock"):  # what that holds matters to nobody
            return int(real(fd, data, offset))
        half = len(data) // 2
        file = self._files.setdefault(os.fstat(fd).st_ino, _File())
        for start, end in ((0, half), (half, len(data))):
            self.step(f"write {os.path.relpath(where, self.root)}")
            piece = bytes(data[start:end])
            real(fd, piece, offset + start)
            file.pending.append((offset + start, piece))
        return len(data)

    def _posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        self._real["posix_fadvise"](fd, offset, length, advice)
        file = self._files.get(os.fstat(fd).st_ino)
        if advice == os.POSIX_FADV_DONTNEED and file is not None:  # what is clean is read from the disk again
            left = bytearray(file.durable)
            for at, data in file.pending:
                _apply(left, at, data)
            os.ftruncate(fd, 0)
            self._real["pwrite"](fd, left, 0)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT or not self._ours(path):
            return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        new = not os.path.lexists(path)
        if new:
            self.step(f"create {os.path.relpath(path, self.root)}")
        fd = int(self._real["open"](path, flags, mode))
        if new:
            self._begin(os.fstat(fd).st_ino)
        return fd

    def _rename(self, source: Any, target: Any) -> None:
        self.step(f"rename to {os.path.relpath(target, self.root)}")
        self._real["rename"](source, target)

    def _link(self, source: Any, target: Any) -> None:
        self.step(f"link {os.path.relpath(target, self.root)}")
        self._real["link"](source, target)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        where = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else path
        if self._ours(where):
            self.step(f"unlink {os.path.relpath(where, self.root)}")
            number = os.lstat(where).st_ino
            if number not in self._files:
                self._note(number, Path(os.fsdecode(where)).read_bytes())
        self._real["unlink"](path, dir_fd=dir_fd)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if self._ours(path) and "/packs/" not in os.fsdecode(path) and not os.path.isdir(path):
            self.step(f"mkdir {os.path.relpath(path, self.root)}")
        self._real["mkdir"](path, mode)

    # --- what is durable

    def _begin(self, number: int) -> None:
        self._files[number] = _File()

    def _note(self, number: int, data: bytes) -> None:
        self._files.setdefault(number, _File()).data = data

    def _note_lmdb(self, folder: Path) -> None:
        path = folder / "data.mdb"
        self._note(path.stat().st_ino, path.read_bytes())

    def _scan(self, folder: Path) -> None:
        listing: dict[str, int] = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                listing[entry.name] = entry.inode()
                if entry.is_dir(follow_symlinks=False):
                    self._scan(Path(entry.path))
                elif entry.name == "data.mdb":
                    self._note(entry.inode(), Path(entry.path).read_bytes())
                else:
                    self._files[entry.inode()] = _File(bytearray(Path(entry.path).read_bytes()))
        self._folders[folder.stat().st_ino] = listing

    @staticmethod
    def _listing(fd: int) -> dict[str, int]:
        with os.scandir(f"/proc/self/fd/{fd}") as entries:
            return {entry.name: entry.inode() for entry in entries}

    def _power_off(self, target: Path) -> None:
        """Write out what is left after a power loss at this moment."""
        chance = random.Random(self.plan.seed)
        now: dict[int, dict[str, int]] = {}
        for folder, _, _ in os.walk(self.root):
            with os.scandir(folder) as entries:
                now[os.stat(folder).st_ino] = {entry.name: entry.inode() for entry in entries}
        todo = [(self.root.stat().st_ino, target)]
        while todo:
            number, there = todo.pop()
            there.mkdir()
            durable = self._folders.get(number, {})
            current = now.get(number, {})
            for name in sorted({*durable, *current}):
                inode = durable.get(name)
                if inode != current.get(name) and chance.random() < self.plan.keep:
                    inode = current.get(name)
                if inode is None:
                    continue
                if inode in now or inode in self._folders:
                    todo.append((inode, there / name))
                else:
                    (there / name).write_bytes(self._left_of(self._files.get(inode), chance))

    def _left_of(self, file: _File | None, chance: random.Random) -> bytes:
        if file is None:
            return b""
        if file.data is not None:
            return file.data
        left = bytearray(file.durable)
        for offset, data in file.pending:
            if chance.random() < self.plan.keep:
                _apply(left, offset, data)
        return bytes(left)


def _apply(left: bytearray, offset: int, data: bytes) -> None:
    if len(left) < offset:
        left.extend(bytes(offset - len(left)))
    left[offset : offset + len(data)] = data
