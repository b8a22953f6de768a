"""Large things in bounded memory: a huge file, a huge directory, a huge tree.

A tenth of the full sizes, which --long takes.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Store, environment
from tests.system.support import PIECE, digest_of, nar_hash, status_bytes

GIB = 1 << 30
MOST_MEMORY = GIB
SAMPLE = 2_000
LONGEST = 3600.0

NOTE_MEMORY = """
import atexit, shutil
atexit.register(shutil.copyfile, "/proc/self/status", {path!r})
"""


def part(full: int) -> int:
    """Return a full size with --long, a tenth of it without."""
    return full if Store.long else full // 10


@pytest.fixture
def folder(store: Store) -> Iterator[Path]:
    """A folder for large things; they go at once, not when pytest tidies up."""
    folder = store.state.parent / "large"
    folder.mkdir()
    yield folder
    for here, _, _ in os.walk(folder, topdown=False):
        with os.scandir(here) as listing:  # in the order of a listing, a disk takes minutes for a million
            entries = sorted(listing, key=lambda entry: entry.inode())
        for entry in entries:
            os.unlink(entry) if entry.is_file() else os.rmdir(entry)
    folder.rmdir()


def peak_of(path: Path) -> int:
    """Return the peak memory in a copy of a process's status, in bytes."""
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def add_in_bounded_memory(store: Store, tree: Path) -> str:
    """Add a tree and return its base name; the process must not take too much memory."""
    noted = store.state.parent / "add-status"
    process = store.start("add", tree, hook=NOTE_MEMORY.format(path=str(noted)))
    lines, _ = store.finish(process, timeout=LONGEST)
    assert peak_of(noted) <= MOST_MEMORY
    return Path(lines[0]).name


def nar_hash_of(store: Store, name: str) -> str:
    """Return the SHA-256 of what `cidfs nar` writes; that process must not take too much memory either."""
    noted = store.state.parent / "nar-status"
    process = store.start("nar", name, hook=NOTE_MEMORY.format(path=str(noted)))
    assert process.stdout is not None
    digest = hashlib.sha256()
    while piece := process.stdout.read(PIECE):
        digest.update(piece)
    assert process.wait() == 0
    assert peak_of(noted) <= MOST_MEMORY
    return digest.hexdigest()


def assert_daemon_small(store: Store) -> None:
    """The daemon must not have taken too much memory up to now."""
    (pid,) = store.daemon_pids()
    assert status_bytes(pid, "VmHWM") <= MOST_MEMORY


def numbered(number: int) -> bytes:
    """Return the contents of a small file; no two are alike."""
    return b"the file of number %d\n" % number


def test_a_huge_sparse_file(store: Store, mountpoint: Path, folder: Path) -> None:
    size = part(10 * GIB)
    dice = random.Random(1)
    blocks = {dice.randrange(size - 300_000): dice.randbytes(dice.randrange(1, 300_000)) for _ in range(20)}
    path = folder / "huge"
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in blocks.items():
            file.seek(offset)
            file.write(data)
    name = add_in_bounded_memory(store, path)
    store.mount(mountpoint)
    assert (mountpoint / name).stat().st_size == size
    with open(mountpoint / name, "rb", buffering=0) as there, open(path, "rb", buffering=0) as here:
        for offset in [*blocks, 0, size - PIECE, size - 1]:
            assert os.pread(there.fileno(), PIECE, offset) == os.pread(here.fileno(), PIECE, offset)
    assert nar_hash_of(store, name) == nar_hash(path)
    assert digest_of(mountpoint / name) == digest_of(path)
    assert_daemon_small(store)
    figures = store.stats()["store"]
    assert figures["logical_bytes"] == size
    assert figures["disk_bytes"] < size // 10


def test_a_directory_of_very_many_entries(store: Store, mountpoint: Path, folder: Path) -> None:
    count = part(100_000)
    tree = folder / "wide"
    tree.mkdir()
    names = [f"{number * 7919 % count:06}-entry" for number in range(count)]
    for number, each in enumerate(names):
        (tree / each).write_bytes(numbered(number))
    name = add_in_bounded_memory(store, tree)
    store.mount(mountpoint)
    with os.scandir(mountpoint / name) as listing:
        listed = {entry.name: entry.inode() for entry in listing}
    assert set(listed) == set(names)
    assert len(set(listed.values())) == count
    for number in random.Random(2).sample(range(count), SAMPLE):
        path = mountpoint / name / names[number]
        assert path.read_bytes() == numbered(number)
        assert path.stat().st_ino == listed[names[number]]
    assert nar_hash_of(store, name) == nar_hash(tree)
    assert_daemon_small(store)


def test_a_tree_of_a_million_files(store: Store, mountpoint: Path, folder: Path) -> None:
    count = part(1_000_000)
    tree = folder / "tree"
    for number in range(count):
        if number % 1000 == 0:
            here = tree / f"{number // 100_000}/{number // 1000:04}"
            here.mkdir(parents=True)
        (here / f"{number}").write_bytes(numbered(number))
    name = add_in_bounded_memory(store, tree)
    store.mount(mountpoint)
    listing = ["find", ".", "-printf", r"%y %m %s %P\n"]
    listings = [
        sorted(
            subprocess.run(
                listing, cwd=where, capture_output=True, check=True, env=environment()
            ).stdout.splitlines()
        )
        for where in (tree, mountpoint / name)
    ]
    canonical = {b"d 755": b"d 555", b"f 644": b"f 444"}
    expected = sorted(
        canonical[line[:5]] + (line[5:] if line[:1] == b"f" else b" 0 " + line.split(b" ", 3)[3])
        for line in listings[0]
    )
    assert listings[1] == expected
    assert len(expected) > count
    for number in random.Random(3).sample(range(count), SAMPLE):
        path = mountpoint / name / f"{number // 100_000}/{number // 1000:04}/{number}"
        assert path.read_bytes() == numbered(number)
    assert_daemon_small(store)
    assert nar_hash_of(store, name) == nar_hash(tree)
    figures = store.stats()["store"]
    assert (figures["files"], figures["chunks"]) == (count, count)
