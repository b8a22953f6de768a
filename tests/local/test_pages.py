"""The reader of LMDB's pages: no finding in what LMDB wrote, a finding for every number that is wrong."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import pytest

from cidfs.errors import IndexLost, NotPermitted
from cidfs.local import pages
from cidfs.local.index import Index
from cidfs.local.lmdb_layout import META_SIZE, U64, Wrong, read_metas
from cidfs.local.lmdb_walk import MAX_FINDINGS, Walk
from cidfs.local.rows import number_key
from tests.commands import Store
from tests.local.support import flip

SNAPSHOT, LAST = META_SIZE - 8, META_SIZE - 16


@dataclass
class Environment:
    """An LMDB environment with some databases, and what is in them."""

    folder: Path
    env: lmdb.Environment

    @property
    def file(self) -> Path:
        return self.folder / "data.mdb"

    def page_size(self) -> int:
        return int(self.env.stat()["psize"])


def opened(folder: Path) -> Environment:
    folder.mkdir(exist_ok=True)
    return Environment(folder, lmdb.open(str(folder), map_size=1 << 30, max_dbs=8, sync=False))


def work(here: Environment, seed: int, commits: int) -> Iterator[None]:
    """Put, delete and drop at random, in commits of all sizes; some transactions are given up."""
    chosen = random.Random(seed)
    databases = [here.env.open_db(b"db%d" % i) for i in range(4)]
    longest = chosen.choice([50, 300, 3000, 30_000])
    for _ in range(commits):
        with here.env.begin(write=True) as txn:
            for _ in range(chosen.choice([0, 1, 20, 400])):
                db = chosen.choice(databases)
                key = b"%0*d" % (chosen.choice([4, 32]), chosen.randrange(600))
                if chosen.random() < 0.6:
                    txn.put(key, chosen.randbytes(chosen.randrange(longest)), db=db)
                else:
                    txn.delete(key, db=db)
            if chosen.random() < 0.05:
                txn.drop(chosen.choice(databases), delete=False)
            if chosen.random() < 0.1:
                txn.abort()
        yield


@pytest.mark.parametrize("seed", range(4))
def test_what_lmdb_wrote_is_whole(room: Path, seed: int) -> None:
    here = opened(room / "env")
    for _ in work(here, seed, 400 if Store.long else 25):
        for deep in (True, False, None):
            assert pages.damage(here.folder, deep=deep) == []
    here.env.close()
    pages.check(here.folder)


def test_a_new_index_is_whole(room: Path) -> None:
    (room / "1").mkdir()
    Index(room / "1", 1, write=True, create=True).close()
    assert pages.damage(room / "1") == []


def test_beside_a_writer_nothing_is_found(room: Path) -> None:
    """Each commit overwrites pages of the last but one: what was read meanwhile may be no tree any more."""
    here = opened(room / "env")
    for _ in work(here, 1, 10):
        pass

    def write() -> None:
        for _ in work(here, 2, 1000 if Store.long else 150):
            pass

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    looks = 0
    while writer.is_alive():
        assert pages.damage(here.folder) == []
        looks += 1
    writer.join()
    assert looks > 3


@pytest.fixture
def whole(room: Path) -> Environment:
    """An environment with branches, long rows and freed pages, closed."""
    here = opened(room / "env")
    for _ in work(here, 3, 30):
        pass
    with here.env.begin(write=True) as txn:
        for i in range(2000):
            txn.put(b"%032d" % i, b"value", db=here.env.open_db(b"db1", txn=txn))
    here.env.close()
    assert pages.damage(here.folder) == []
    return here


def test_every_bit_that_matters_in_the_meta_pages_is_checked(whole: Environment) -> None:
    """Those of the snapshot's number above all: else LMDB serves an older tree, whole and out of date."""
    data = whole.file.read_bytes()
    size = os.sysconf("SC_PAGE_SIZE")
    with open(whole.file, "rb") as file:
        metas = read_metas(file.fileno())
    newest = metas.index(max(metas, key=lambda m: m.snapshot))
    free = {*range(8, 10), *range(12, 16), *range(24, 40)}  # padding, bounds, the map's address and size
    trees = {*range(46, 88), *range(94, 136), *range(LAST, LAST + 8)}  # of the older one: nobody uses them
    for page in (0, 1):
        for at in (a for a in range(META_SIZE) if a not in free and (page == newest or a not in trees)):
            for bit in range(8):
                flip(whole.file, page * size + at, 1 << bit)
                assert pages.damage(whole.folder, deep=False), (page, at, bit)
                flip(whole.file, page * size + at, 1 << bit)
    assert whole.file.read_bytes() == data


def test_a_flipped_bit_that_makes_lmdb_serve_an_older_tree(room: Path) -> None:
    """Where the newest snapshot is 6, 10, 14 …: without its second bit, the one before it is the newest."""
    whole = opened(room / "env")
    db = whole.env.open_db(b"db")
    while whole.env.info()["last_txnid"] < 10:
        serial = b"%d" % (whole.env.info()["last_txnid"] + 1)
        with whole.env.begin(write=True) as txn:
            txn.put(b"serial", serial, db=db)
    whole.env.close()
    with open(whole.file, "rb") as file:
        metas = read_metas(file.fileno())
    new = max(metas, key=lambda m: m.snapshot)
    flip(whole.file, metas.index(new) * os.sysconf("SC_PAGE_SIZE") + SNAPSHOT, 2)
    with lmdb.open(str(whole.folder), map_size=1 << 30, max_dbs=8, readonly=True) as env:
        db = env.open_db(b"db", create=False)
        with env.begin() as txn:
            assert txn.get(b"serial", db=db) == b"%d" % (new.snapshot - 1), "not what LMDB does any more"
    (problem,) = pages.damage(whole.folder)
    assert f"snapshot {new.snapshot - 2} is another one than it says" in problem
    with pytest.raises(IndexLost, match=r"env/data.mdb: snapshot .* run `cidfs rebuild`"):
        pages.check(whole.folder)


def test_a_file_that_was_cut_short_is_found_unless_only_free_pages_went(whole: Environment) -> None:
    size = os.sysconf("SC_PAGE_SIZE")
    data = whole.file.read_bytes()
    with open(whole.file, "rb") as file:
        meta = max(read_metas(file.fileno()), key=lambda m: m.snapshot)
        walk = Walk(file.fileno(), meta, deep=True)
        walk.run()
    needed = 1 + max(page for page, user in enumerate(walk.users) if user == 1)
    for count in range(len(data) // size):
        for more in (0, 1, size - 1):
            whole.file.write_bytes(data[: count * size + more])
            for deep in (True, False):
                found = pages.damage(whole.folder, deep=deep)
                assert bool(found) == (count < needed), (count, more, found)


def test_the_last_page_is_no_other(whole: Environment) -> None:
    """A lower one would have LMDB give out pages that are in use."""
    size = os.sysconf("SC_PAGE_SIZE")
    with open(whole.file, "r+b") as file:
        metas = read_metas(file.fileno())
        new = max(metas, key=lambda m: m.snapshot)
        for last in (new.last - 1, new.last + 1, 1, 0, 1 << 40, (1 << 64) - 1):
            os.pwrite(file.fileno(), U64.pack(last), metas.index(new) * size + LAST)
            assert pages.damage(whole.folder, deep=False)


@pytest.mark.parametrize("contents", [b"", b"\0" * 100, b"\0" * 8192, os.urandom(65536)])
def test_what_is_no_index(room: Path, contents: bytes) -> None:
    (room / "data.mdb").write_bytes(contents)
    assert len(pages.damage(room)) == 1
    with open(room / "data.mdb", "rb") as file, pytest.raises(Wrong):
        read_metas(file.fileno())
    assert pages.salvage(room, "pending") == {}


def test_what_cannot_be_read(room: Path) -> None:
    (problem,) = pages.damage(room)
    assert "gone" in problem
    (room / "data.mdb").symlink_to("data.mdb")
    with pytest.raises(Exception, match=r"data\.mdb") as raised:
        pages.damage(room)
    assert not isinstance(raised.value, NotPermitted)


def test_random_bytes_in_any_page_end_with_findings_or_without(whole: Environment) -> None:
    """And with nothing else, in little time: a page may claim anything."""
    data = whole.file.read_bytes()
    chosen = random.Random("garbage")
    size = os.sysconf("SC_PAGE_SIZE")
    found = 0
    for _ in range(2000 if Store.long else 120):
        page = chosen.randrange(len(data) // size)
        at = page * size + chosen.choice([8, 10, 12, 16, chosen.randrange(size)])
        junk = chosen.choice([chosen.randbytes(chosen.choice([1, 2, 8, 64])), b"\xff" * 8, bytes(8)])
        whole.file.write_bytes(data[:at] + junk + data[at + len(junk) :])
        problems = pages.damage(whole.folder)
        assert len(problems) <= MAX_FINDINGS
        found += bool(problems)
        pages.salvage(whole.folder, "db1")
    assert found > 30


def test_rows_are_salvaged_from_what_is_left(room: Path) -> None:
    (room / "1").mkdir()
    index = Index(room / "1", 1, write=True, create=True)
    rows = {number_key(i): b"%d" % i * (1 + i % 700) for i in range(500)}
    with index.write() as txn:
        for key, value in rows.items():
            txn.put("pending", key, value)
    index.close()
    file = room / "1" / "data.mdb"
    data = file.read_bytes()
    assert pages.salvage(room / "1", "pending") == rows
    assert pages.salvage(room / "1", "nothing") == {}
    chosen = random.Random("salvage")
    most = 0
    for _ in range(100):
        at = chosen.randrange(2 * 4096, len(data))
        file.write_bytes(data[:at] + bytes((data[at] ^ 0x40,)) + data[at + 1 :])
        left = pages.salvage(room / "1", "pending")
        assert left.items() <= rows.items()
        most += len(left) >= len(rows) - 60
    assert most > 50
    file.write_bytes(data[: len(data) // 2])
    assert pages.salvage(room / "1", "pending").items() <= rows.items()
