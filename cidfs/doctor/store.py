"""The state folder: its format, room, locks, index, journal, and what was left behind in it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cidfs.doctor import processes
from cidfs.doctor.findings import FAILURE, OK, WARNING, Finding, times
from cidfs.errors import DiskFailed
from cidfs.local import room
from cidfs.local.files import try_flock
from cidfs.local.journal import Journal
from cidfs.local.leftovers import leftovers, size_of
from cidfs.local.state import DEFAULT_LOCK_TIMEOUT, StateFolder
from cidfs.local.store import LocalStore

LITTLE_ROOM: Final = 256 << 20
ATTEMPTS: Final = 3
LAST_WORDS: Final = 300


def folder(state: StateFolder) -> Iterator[Finding]:
    """Look at the state folder: whose it is, and how much room there is."""
    root = state.root
    owner = (root / "format").stat().st_uid
    if os.geteuid() not in (0, owner):
        what = f"{root}: belongs to user {owner}"
        yield Finding("store", WARNING, what, "run as that user: others may be refused anything")
    elif os.geteuid() == 0 != owner:
        what = f"{root}: belongs to user {owner}, and root would leave files that he cannot use"
        yield Finding("store", WARNING, what, "run as its owner")
    else:
        yield Finding("store", OK, f"{root}: version {state.format.version}, for {state.format.store_dir}")
    free = room.free_bytes(root)
    text = f"{root}: {free >> 20:,} MiB free"
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        what = f"{root}: the file system is mounted read-only: nothing can be added, and nothing mounted"
        yield Finding("room", FAILURE, what, "mount it writable")
    elif room.is_low(root):
        yield Finding("room", FAILURE, f"{text}: the disk is full", "`cidfs remove` and `cidfs gc` make room")
    elif free < LITTLE_ROOM:
        yield Finding("room", WARNING, text, "`cidfs gc` makes room, if something is not needed")
    elif not (root / room.NAME).exists():
        what = f"{root}: the ballast was given up"
        yield Finding("room", WARNING, what, "the next `cidfs add` or `cidfs gc` sets it aside again")
    else:
        yield Finding("room", OK, text)


def locks(state: StateFolder) -> Iterator[Finding]:
    """Look whether somebody holds the write lock, or collects, and cannot go on."""
    for name, what in (("write.lock", "the write lock"), ("gc.lock", "the lock of collections")):
        yield _lock(state.root / name, what)


def _lock(path: Path, what: str) -> Finding:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Finding("lock", OK, f"{what} was never taken")
    except OSError as e:
        return Finding("lock", WARNING, f"{path}: {e.strerror}", "run as the owner of the store")
    try:
        if try_flock(fd, shared=True):
            return Finding("lock", OK, f"{what} is free")
        words = os.pread(fd, 11, 0).split()
        since = max(0.0, time.time() - os.fstat(fd).st_mtime)
    finally:
        os.close(fd)
    pid = int(words[0]) if words and words[0].isdigit() else 0
    holder = f"process {pid} ({processes.command_of(pid)})" if processes.is_alive(pid) else "some process"
    held = f"{path}: {holder} has held {what} for {since:.0f} s"
    if processes.is_stopped(pid):
        advice = f"it is stopped: `kill -CONT {pid}` lets it go on, or end it"
        return Finding("lock", FAILURE, held, advice)
    if since > DEFAULT_LOCK_TIMEOUT and path.name == "write.lock":
        return Finding("lock", WARNING, held, "see whether it goes on; others give up waiting (exit 13)")
    return Finding("lock", OK, held)


def index(root: Path) -> Iterator[Finding]:
    """Look whether the index opens, and whether it is of the same age as the journal.

    Not whether it is right: that is what `verify` says. For a child: a damaged index may end the process.
    """
    with LocalStore.open(root) as store:
        with store.read() as txn:
            before = txn.needed_number("next-serial")
            pending = txn.entries("pending")
            paths = txn.number("count:paths")
        last = _last_serial(store.journal())
        with store.read() as txn:
            after = txn.needed_number("next-serial")
    path = root / "index"
    if last >= after:
        what = f"{path}: the index is older than the journal (serial {after - 1}, not {last})"
        yield Finding("index", FAILURE, what, f"`cidfs --state {root} rebuild`")
    else:
        yield Finding("index", OK, f"{path}: opens; {times(paths, 'store path')}, up to serial {after - 1}")
    if last < before - 1 and not pending:
        what = f"{root}/journal: it ends at serial {last}, and the index at {before - 1}"
        advice = "`cidfs verify` says what is lost; do not rebuild"
        yield Finding("journal", FAILURE, what, advice)
    else:
        yield Finding("journal", OK, f"{root}/journal: can be read; up to serial {last}")


def _last_serial(journal: Journal) -> int:
    for _ in range(ATTEMPTS - 1):
        try:
            return journal.last_serial()
        except DiskFailed:
            continue  # a checkpoint has just taken the place of its files
    return journal.last_serial()


def left_behind(state: StateFolder) -> Iterator[Finding]:
    """Look for rebuilds that did not end; they take up as much as an index."""
    for path in leftovers(state):
        if path.parent == state.root / "index" and path.name.startswith("rebuild-"):
            what = f"{path}: a rebuild that did not end left {size_of(path) >> 20:,} MiB"
            yield Finding("leftover", WARNING, what, "`cidfs gc` frees them")


def logs(state: StateFolder) -> Iterator[Finding]:
    """Look for what the processes of mounts have logged."""
    for path in sorted((state.root / "run").glob("*.log")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as e:
            yield Finding("log", WARNING, f"{path}: {e.strerror}", "run as the owner of the store")
            continue
        if lines:
            what = f"{path}: {times(len(lines), 'line')}; the last one: {lines[-1][:LAST_WORDS]}"
            yield Finding("log", WARNING, what, "read it, and remove it when that is mended")
