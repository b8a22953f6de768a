"""The index on a full disk: an error that says so, never a signal; what can be read goes on being read.

LMDB writes to its lock file through a map, where a page that cannot be had is SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from cidfs.errors import EXIT_CODES, DiskFailed
from cidfs.local.index import LOCK_SIZE, Index
from cidfs.local.rebuild import rebuild
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local.forked import forked
from tests.local.support import contents_of, copy_store, few_urandom, noise, package, prune, publish
from tests.system.support import mount, umount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs: needs root")
FULL: Final = EXIT_CODES[DiskFailed]
PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
    yield folder
    umount("-l", folder)


@pytest.fixture
def store(disk: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store on it with a path in it."""
    monkeypatch.setattr(os, "urandom", few_urandom)
    root = copy_store(empty_store, disk / "store")
    prune(root)
    with LocalStore.open(root, write=True) as opened:
        publish(opened, package("a", {"x": noise("x", 1000)}))
    return root


def fill(disk: Path, room: int) -> None:
    """Leave room for so many pages."""
    with open(disk / "filling", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\1" * PAGE)
        except OSError:
            file.truncate(max(0, file.tell() - room * PAGE))
    there = os.statvfs(disk)
    assert there.f_bavail * there.f_frsize == room * PAGE


def read(root: Path) -> int:
    with LocalStore.open(root) as opened:
        assert contents_of(opened, "a") == {"x": noise("x", 1000)}
        with opened.read() as first, opened.read() as second:
            assert first.number("schema") == second.number("schema") == 1
    return 0


def add(root: Path) -> int:
    with LocalStore.open(root, write=True) as opened:
        publish(opened, package("b", {"y": noise("y", 50_000)}))
    return 0


def make(folder: Path) -> int:
    folder.mkdir()
    Index(folder, 1, write=True, create=True).close()
    return 0


def remake(root: Path) -> int:
    rebuild(StateFolder.open(root), lock_timeout=5)
    return 0


def lock_file(root: Path) -> Path:
    return root / "index" / "1" / "lock.mdb"


def make_holes(root: Path) -> None:
    """Leave the lock file as LMDB by itself makes it: long, and without a page of its own."""
    lock_file(root).write_bytes(b"")
    os.truncate(lock_file(root), LOCK_SIZE)


def test_the_lock_file_has_all_its_pages(store: Path) -> None:
    there = lock_file(store).stat()
    assert there.st_size >= LOCK_SIZE
    assert there.st_blocks * 512 >= there.st_size
    make_holes(store)
    assert forked(partial(read, store)) == (0, "")
    there = lock_file(store).stat()
    assert there.st_blocks * 512 >= there.st_size


def test_reading_goes_on_when_nothing_is_free(disk: Path, store: Path) -> None:
    fill(disk, 0)
    for _ in range(3):
        assert forked(partial(read, store)) == (0, "")


@pytest.mark.parametrize("lock", ["gone", "with holes"])
@pytest.mark.parametrize("room", [0, 1, 5, 16, 17, 30])
def test_a_lock_file_that_finds_no_room(disk: Path, store: Path, lock: str, room: int) -> None:
    if lock == "gone":
        lock_file(store).unlink()
    else:
        make_holes(store)
    fill(disk, room)
    ended = forked(partial(read, store))
    enough = room * PAGE >= LOCK_SIZE
    assert ended.code == (0 if enough else FULL), ended
    if not enough:
        assert ended.said.count("\n") == 1
        assert "lock.mdb" in ended.said
        assert "the disk is full" in ended.said
    (disk / "filling").unlink()
    assert forked(partial(read, store)) == (0, "")


@pytest.mark.parametrize("what", ["add", "make", "rebuild"])
def test_no_room_for_writing(disk: Path, store: Path, what: str) -> None:
    """With every amount of room: from none at all to enough."""
    codes = set()
    for room in [*range(40), 60, 120]:
        for other in (disk / "filling", disk / "new" / "data.mdb", disk / "new" / "lock.mdb"):
            other.unlink(missing_ok=True)
        if (disk / "new").exists():
            (disk / "new").rmdir()
        fill(disk, room)
        match what:
            case "add":
                ended = forked(partial(add, store))
            case "make":
                ended = forked(partial(make, disk / "new"))
            case _:
                ended = forked(partial(remake, store))
        assert ended.code in (0, FULL), (room, ended)
        assert ended.said.count("\n") == (ended.code != 0), (room, ended)
        codes.add(ended.code)
        assert forked(partial(read, store)) == (0, ""), room
        if ended.code == 0:
            break
    assert codes == {0, FULL}
