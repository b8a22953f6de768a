"""Bits flipped in live pages of the index: no wrong value, no death without a word, and rebuild mends it.

Each place is tried in processes of their own, with a deadline: one reads every row and looks for what is
lost, one publishes, one rebuilds. Small indexes are read whole when they are opened; so that what large ones
do is seen too, half of the places are tried with only the upper pages looked at.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from cidfs.errors import EXIT_CODES, IndexLost
from cidfs.local import pages
from cidfs.local.audit import journal_differences, lost_rows
from cidfs.local.lmdb_layout import HEADER, META_SIZE, read_metas
from cidfs.local.lmdb_walk import Walk
from cidfs.local.rebuild import rebuild
from cidfs.local.rows import DATABASES
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.local.forked import Ended, forked
from tests.local.support import (
    Package,
    Rows,
    contents_of,
    copy_store,
    few_urandom,
    noise,
    package,
    prune,
    publish,
    row_of,
    rows_in,
)

WRONG: Final = 90
UNNOTICED: Final = 91
LOST: Final = EXIT_CODES[IndexLost]
COUNTED: Final = ("paths", "records", "inodes", "manifests", "chunks", "referrers")


@dataclass(frozen=True)
class Sample:
    """A store, its data file, and what all of it says."""

    root: Path
    data: bytes
    rows: Rows
    packages: dict[str, Package]
    bases: dict[str, int]
    live: list[int]  # pages

    @property
    def file(self) -> Path:
        return self.root / "index" / "1" / "data.mdb"


def packages() -> Iterator[list[Package]]:
    """Yield groups of paths that give every kind of page: branches, rows too long for a page, many freed."""
    for group in range(6):
        names = [f"package-{group}-{i}" for i in range(30)]
        yield [
            package(
                name,
                {f"file {i}": noise(f"{name} {i}", 40) for i in range(6)},
                (names[0], *(f"elsewhere-{i}" for i in range(120 if n % 10 == 1 else 2))),
            )
            for n, name in enumerate(names)
        ]


@pytest.fixture(scope="module")
def sample(empty_store: Path) -> Iterator[Sample]:
    """A store that was published in several times."""
    room = Path(str(empty_store) + "-damage")
    root = copy_store(empty_store, room)
    known: dict[str, Package] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "urandom", few_urandom)
        prune(root)
        for group in packages():
            with LocalStore.open(root, write=True) as store:
                publish(store, *group)
                known |= {p.record.path.name: p for p in group}
                bases = {name: row_of(store, name).base for name in known}
    file = root / "index" / "1" / "data.mdb"
    with open(file, "rb") as opened:
        meta = max(read_metas(opened.fileno()), key=lambda m: m.snapshot)
        walk = Walk(opened.fileno(), meta, deep=True)
        walk.run()
    assert not walk.found
    live = [page for page, user in enumerate(walk.users) if user == 1]
    assert meta.last < pages.DEEP_PAGES
    yield Sample(root, file.read_bytes(), rows_in(root), known, bases, live)
    shutil.rmtree(root)


def places(sample: Sample, count: int, seed: str) -> list[tuple[int, int]]:
    """Choose offsets in live pages, and a bit each: anywhere, and as often where LMDB's own numbers stand."""
    chosen = random.Random(seed)
    size = len(sample.data) // max(1, len(sample.data) // 4096)
    found = []
    for i in range(count):
        page = chosen.choice(sample.live if i % 8 else [0, 1])
        dense = META_SIZE if page < 2 else HEADER + 24
        found.append((page * size + chosen.randrange(dense if i % 2 else size), 1 << chosen.randrange(8)))
    return found


@contextlib.contextmanager
def damaged(sample: Sample, at: int, mask: int) -> Iterator[None]:
    """Have a bit of the index flipped."""
    data = sample.data[:at] + bytes((sample.data[at] ^ mask,)) + sample.data[at + 1 :]
    sample.file.write_bytes(data)
    try:
        yield
    finally:
        sample.file.write_bytes(sample.data)


def look(sample: Sample) -> int:
    """Read every row in every way; say whether one is wrong, or one is lost and nobody would notice."""
    with LocalStore.open(sample.root) as store:
        index = store.current()
        lost = 0
        for name in DATABASES:
            rows = sample.rows[name]
            for key, value in rows.items():
                got = index.get(name, key)
                if got is not None and got != value:
                    return WRONG
                lost += got is None
            with index.read() as txn:
                met = dict(txn.rows(name))
            if any(value is not None and rows.get(key) != value for key, value in met.items()):
                return WRONG
            lost += len(rows.keys() - met.keys())
        found = index.damaged_rows or lost_rows(store) or pages.damage(index.path)
        return UNNOTICED if lost and not found else 0


def add(sample: Sample, root: Path) -> int:
    """Publish, and look whether what was there still is what it was."""
    new = package("new", {"file": noise("new", 100)})
    with LocalStore.open(root, write=True) as store:
        end = max(base + sample.packages[name].record.node_count for name, base in sample.bases.items())
        publish(store, new)
        if row_of(store, "new").base < end:
            return WRONG
        index = store.current()
        for name in COUNTED:
            for key, value in sample.rows[name].items():
                if index.get(name, key) not in (value, None):
                    return WRONG
    return 0


def mend(sample: Sample, root: Path) -> int:
    """Rebuild; all must be there as before."""
    rebuild(StateFolder.open(root), lock_timeout=5)
    with LocalStore.open(root) as store:
        if {p.path.name: p.row.base for p in store.paths() if p.path.name != "new"} != sample.bases:
            return WRONG
        for name in list(sample.bases)[::20]:
            files = contents_of(store, name)
            if b"".join(files[f] for f in sorted(files)) != b"".join(sample.packages[name].chunks):
                return WRONG
    return 0


def judged(ended: Ended, *codes: int) -> int:
    """Check that it ended with one of some exit codes, and with one line if that says that it failed."""
    assert ended.code in (0, *codes), ended
    assert ended.said.count("\n") == (ended.code != 0), ended
    assert ended.code != LOST or "rebuild`" in ended.said, ended
    return ended.code


@pytest.mark.parametrize("deep", [True, False], ids=["all pages looked at", "upper pages looked at"])
def test_bits_flipped_in_live_pages(sample: Sample, deep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "DEEP_PAGES", pages.DEEP_PAGES if deep else 0)
    monkeypatch.setattr(os, "urandom", few_urandom)
    count = 500 if Store.long else 50
    refused = unharmed = 0
    for number, (at, mask) in enumerate(places(sample, count, f"places {deep}")):
        with damaged(sample, at, mask):
            code = judged(forked(partial(look, sample)), LOST)
            refused += code == LOST
            unharmed += code == 0
            if number % 4 == 0:
                other = copy_store(sample.root, sample.root.with_name("copy"))
                try:
                    judged(forked(partial(add, sample, other)), LOST)
                    judged(forked(partial(mend, sample, other)))
                finally:
                    shutil.rmtree(other)
    assert refused > count // 10, "hardly a flip was noticed: were they in live pages?"
    assert unharmed > count // 10, "hardly a flip left the index usable: were they spread?"


def test_an_older_index_that_was_copied_back_publishes_nothing(root: Path) -> None:
    """It is whole, and would give out again what the journal says was given out since."""
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a"))
    file = root / "index" / "1" / "data.mdb"
    older = file.read_bytes()
    with LocalStore.open(root, write=True) as store:
        publish(store, package("b"))
        given = row_of(store, "b")
    file.write_bytes(older)
    before = sorted((root / "journal").iterdir())[-1].read_bytes()

    def add() -> int:
        with LocalStore.open(root, write=True) as opened:
            publish(opened, package("c"))
        return 0

    ended = forked(add)
    assert judged(ended, LOST) == LOST
    assert "older than the journal" in ended.said
    assert sorted((root / "journal").iterdir())[-1].read_bytes() == before
    with LocalStore.open(root) as store:
        assert any("in the journal and not in the index" in line for line in journal_differences(store))
    rebuild(StateFolder.open(root), lock_timeout=5)
    with LocalStore.open(root, write=True) as store:
        assert row_of(store, "b").base == given.base
        publish(store, package("c"))
        assert row_of(store, "c").base >= given.base + given.count
        assert row_of(store, "c").serial > given.serial
