"""Nix's database, made by hand after its schema 10.

What is read of it, and what is said when it cannot be.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from cidfs.engine.nix_db import NixDatabase
from cidfs.errors import CidfsError, FormatError, PathAbsent, SourceError
from cidfs.formats.digest import nix32_encode
from tests.local.support import path_of

SCHEMA = """
create table if not exists ValidPaths (
    id               integer primary key autoincrement not null,
    path             text unique not null,
    hash             text not null,
    registrationTime integer not null,
    deriver          text,
    narSize          integer,
    ultimate         integer,
    sigs             text,
    ca               text
);
create table if not exists Refs (
    referrer  integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
create index if not exists IndexReferrer on Refs(referrer);
create index if not exists IndexReference on Refs(reference);
"""
"""As in Nix 2.34, `libstore/schema.sql`, of which the derivation outputs and a trigger are left out."""
HASH = bytes(range(32))
References = Mapping[str, Sequence[str]]
GRAPH: References = {
    "top": ["left", "right", "top"],
    "left": ["base"],
    "right": ["left", "base"],
    "base": ["base"],
    "aside": [],
}


def full(name: str, store_dir: str = "/nix/store") -> str:
    return path_of(name).full(store_dir)


def insert(db: sqlite3.Connection, name: str, references: Sequence[str] = (), **columns: object) -> None:
    """Make a path valid, as Nix does."""
    row = {"path": full(name), "hash": "sha256:" + HASH.hex(), "registrationTime": 1, **columns}
    marks = ", ".join("?" * len(row))
    db.execute(f"insert into ValidPaths ({', '.join(row)}) values ({marks})", tuple(row.values()))
    for reference in references:
        db.execute(
            "insert into Refs select a.id, b.id from ValidPaths a, ValidPaths b"
            " where a.path = ? and b.path = ?",
            (full(name), full(reference)),
        )


def open_for_nix(root: Path, journal_mode: str) -> sqlite3.Connection:
    """Open the database as Nix has it open."""
    folder = root / "nix/var/nix/db"
    folder.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(folder / "db.sqlite", isolation_level=None)
    db.execute(f"pragma main.journal_mode = {journal_mode}")
    db.execute("pragma main.wal_autocheckpoint = 0")
    db.executescript(SCHEMA)
    return db


def fill(db: sqlite3.Connection, graph: References = GRAPH) -> None:
    for name in graph:
        insert(db, name)
    for name, references in graph.items():
        for reference in references:
            db.execute(
                "insert into Refs select a.id, b.id from ValidPaths a, ValidPaths b"
                " where a.path = ? and b.path = ?",
                (full(name), full(reference)),
            )


@pytest.fixture(params=["wal", "truncate"])
def journal_mode(request: pytest.FixtureRequest) -> str:
    """How Nix keeps its database: with a write-ahead log, or without (`use-sqlite-wal`)."""
    return str(request.param)


@pytest.fixture
def nix(room: Path, journal_mode: str) -> Path:
    """The root of a Nix store with a graph of paths, that nobody has open."""
    with closing(open_for_nix(room, journal_mode)) as db:
        fill(db)
    return room


def ordered(root: Path, *names: str, closure: bool) -> list[str]:
    with NixDatabase(root, "/nix/store") as db:
        return [v.path.name for v in db.ordered([path_of(n) for n in names], closure=closure)]


# --- what is read


def test_what_is_known_of_a_path(nix: Path) -> None:
    with closing(sqlite3.connect(nix / "nix/var/nix/db/db.sqlite", isolation_level=None)) as db:
        insert(
            db,
            "full",
            ["left", "full"],
            deriver=full("full.drv"),
            narSize=12345,
            ultimate=1,
            sigs="cache.example-1:abc other:def",
            ca="fixed:r:sha256:" + nix32_encode(HASH),
        )
        insert(db, "bare", hash="sha256:" + nix32_encode(HASH))
    with NixDatabase(nix, "/nix/store") as nix_db:
        known = nix_db.info(path_of("full"))
        assert known.path == path_of("full")
        assert (known.nar_hash, known.nar_size) == (HASH, 12345)
        assert known.references == tuple(sorted((path_of("left").base_name, path_of("full").base_name)))
        assert known.deriver == path_of("full.drv").base_name
        assert known.signatures == ("cache.example-1:abc", "other:def")
        assert known.ca == "fixed:r:sha256:" + nix32_encode(HASH)
        bare = nix_db.info(path_of("bare"))
        assert (bare.nar_hash, bare.nar_size, bare.references) == (HASH, None, ())
        assert (bare.deriver, bare.signatures, bare.ca) == ("", (), "")
        assert nix_db.physical(path_of("full")) == nix / "nix/store" / path_of("full").base_name
        everything = [*GRAPH, "full", "bare"]
        assert sorted(p.name for p in nix_db.all_paths()) == sorted(everything)


def test_references_come_before_referrers(nix: Path) -> None:
    order = ordered(nix, "top", closure=True)
    assert sorted(order) == ["base", "left", "right", "top"]
    assert [order.index(n) for n in ("base", "left", "right", "top")] == [0, 1, 2, 3]
    assert ordered(nix, "aside", "right", "base", closure=True) == ["aside", "base", "left", "right"]
    assert ordered(nix, "right", "base", "aside", closure=False) == ["base", "right", "aside"]
    assert ordered(nix, "right", "left", closure=False) == ["left", "right"]
    assert ordered(nix, "top", "top", closure=False) == ["top"]
    assert ordered(nix, closure=True) == []


def test_a_long_chain(room: Path) -> None:
    with closing(open_for_nix(room, "wal")) as db:
        fill(db, {f"n{i}": [f"n{i - 1}"] if i else [] for i in range(3000)})
    assert ordered(room, "n2999", closure=True) == [f"n{i}" for i in range(3000)]


def test_a_path_that_is_not_valid_there(nix: Path) -> None:
    for closure in (True, False):
        with pytest.raises(PathAbsent, match=path_of("absent").base_name):
            ordered(nix, "aside", "absent", closure=closure)
    with NixDatabase(nix, "/nix/store") as db, pytest.raises(PathAbsent, match="not a valid path"):
        db.info(type(path_of("top"))(path_of("top").hash_part, "another-name"))


def test_a_store_in_another_directory(room: Path) -> None:
    folder = room / "gnu/var/nix/db"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "db.sqlite", isolation_level=None)) as db:
        db.executescript(SCHEMA)
        insert(db, "x", path=full("x", "/gnu/store"))
    with NixDatabase(room, "/gnu/store") as nix_db:
        assert nix_db.info(path_of("x")).path == path_of("x")
        assert nix_db.physical(path_of("x")) == room / "gnu/store" / path_of("x").base_name


# --- beside a running Nix


def test_one_state_of_it_while_nix_goes_on(room: Path) -> None:
    """With a write-ahead log that nobody has written back."""
    with closing(open_for_nix(room, "wal")) as db:
        fill(db)
        assert (room / "nix/var/nix/db/db.sqlite-wal").stat().st_size > 0
        with NixDatabase(room, "/nix/store") as ours:
            insert(db, "later", ["top"])
            db.execute(
                "delete from Refs where referrer in (select id from ValidPaths where path = ?)",
                (full("top"),),
            )
            with pytest.raises(PathAbsent):
                ours.info(path_of("later"))
            assert len(ours.info(path_of("top")).references) == 3
        with NixDatabase(room, "/nix/store") as ours:
            assert ours.info(path_of("later")).references == (path_of("top").base_name,)
            assert ours.info(path_of("top")).references == ()


def test_while_nix_is_in_a_transaction(room: Path) -> None:
    with closing(open_for_nix(room, "wal")) as db:
        fill(db)
        db.execute("begin immediate")
        insert(db, "half")
        with NixDatabase(room, "/nix/store") as ours:
            assert ours.info(path_of("top"))
            with pytest.raises(PathAbsent):
                ours.info(path_of("half"))
        db.execute("commit")


def test_nothing_is_written_there(nix: Path, journal_mode: str) -> None:
    folder = nix / "nix/var/nix/db"
    before = (folder / "db.sqlite").read_bytes()
    with NixDatabase(nix, "/nix/store") as db:
        db.info(path_of("top"))
    assert (folder / "db.sqlite").read_bytes() == before
    assert set(os.listdir(folder)) <= {f"db.sqlite{suffix}" for suffix in ("", "-wal", "-shm", "-journal")}


# --- where nothing can be written beside it


def _as_nobody(folder: str, names: Sequence[str], answer: multiprocessing.SimpleQueue[object]) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        with NixDatabase(Path(folder), "/nix/store") as db:
            found = [v.path.name for v in db.ordered([path_of(n) for n in names], closure=True)]
        answer.put((found, [p for p in os.listdir("/tmp") if p.startswith("cidfs-nix-db-")]))
    except CidfsError as e:
        answer.put(str(e))


def test_a_folder_that_cannot_be_written(room: Path, journal_mode: str) -> None:
    """A log that was not written back is read too; what was copied is taken away again."""
    with closing(open_for_nix(room, journal_mode)) as db:
        fill(db)
        other = room / "copy"
        folder = other / "nix/var/nix/db"
        folder.mkdir(parents=True)
        for name in ("db.sqlite", "db.sqlite-wal"):  # as Nix, killed, leaves them
            source = room / "nix/var/nix/db" / name
            if source.exists():
                shutil.copyfile(source, folder / name)
    room.chmod(0o755)
    for path in (folder, folder.parent, folder.parent.parent, folder.parent.parent.parent):
        path.chmod(0o555)
    for path in folder.iterdir():
        path.chmod(0o444)
    context = multiprocessing.get_context("forkserver")
    answer = context.SimpleQueue()
    process = context.Process(target=_as_nobody, args=(str(other), ["top"], answer))
    process.start()
    process.join(60)
    assert answer.get() == (["base", "left", "right", "top"], [])
    answer.close()
    for path in (folder, folder.parent, folder.parent.parent, folder.parent.parent.parent):
        path.chmod(0o755)


# --- what cannot be read


def test_no_nix_store_there(room: Path) -> None:
    with pytest.raises(SourceError, match=r"no Nix store here.*db\.sqlite is not there"):
        NixDatabase(room, "/nix/store")


@pytest.mark.parametrize("contents", [b"", b"SQLite format 3\0 and no more", os.urandom(9000), b"x"])
def test_what_is_no_database(room: Path, contents: bytes) -> None:
    folder = room / "nix/var/nix/db"
    folder.mkdir(parents=True)
    (folder / "db.sqlite").write_bytes(contents)
    with pytest.raises(SourceError, match=r"db\.sqlite: cannot be read as Nix's database"):
        NixDatabase(room, "/nix/store")


def test_a_database_of_something_else(room: Path) -> None:
    folder = room / "nix/var/nix/db"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "db.sqlite")) as db:
        db.execute("create table ValidPaths (id integer, something text)")
    with NixDatabase(room, "/nix/store") as ours:
        with pytest.raises(SourceError, match="no such column"):
            ours.info(path_of("x"))
        with pytest.raises(SourceError, match="no such column"):
            list(ours.all_paths())


def test_a_damaged_table(room: Path) -> None:
    with closing(open_for_nix(room, "truncate")) as db:
        fill(db, {f"n{i}": [] for i in range(500)})
    path = room / "nix/var/nix/db/db.sqlite"
    raw = bytearray(path.read_bytes())
    for page in range(10, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 2000] = b"\xff" * 2000
    path.write_bytes(raw)

    def read() -> None:
        with NixDatabase(room, "/nix/store") as ours:
            list(ours.all_paths())

    with pytest.raises(SourceError, match=r"db\.sqlite: cannot be read"):
        read()


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"hash": "md5:abc"}, "SHA-256"),
        ({"hash": "sha256:" + "0" * 63}, "SHA-256"),
        ({"deriver": "/nix/store/short"}, "short"),
        ({"deriver": "/elsewhere/" + path_of("d").base_name}, "elsewhere"),
    ],
)
def test_a_row_that_makes_no_sense(nix: Path, columns: dict[str, object], named: str) -> None:
    with closing(sqlite3.connect(nix / "nix/var/nix/db/db.sqlite", isolation_level=None)) as db:
        insert(db, "odd", (), **columns)
    with (
        NixDatabase(nix, "/nix/store") as ours,
        pytest.raises(FormatError, match=rf"db\.sqlite.*odd.*{named}"),
    ):
        ours.info(path_of("odd"))
