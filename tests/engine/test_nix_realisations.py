"""Realisations in Nix's database, made by hand: in the tables of Nix up to 2.34, and in that of 2.35."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from cidfs.engine import nix_realisations
from cidfs.engine.nix_db import NixDatabase
from cidfs.engine.nix_realisations import put_all, realisations_in
from cidfs.errors import FormatError, SourceError
from cidfs.formats.realisation import Realisation
from cidfs.local.publish import Realised
from cidfs.local.store import LocalStore
from tests.engine.test_nix_db import fill, full, open_for_nix
from tests.local.support import package, path_of, publish

BY_HASH = """
create table Realisations (
    id integer primary key autoincrement not null,
    drvPath text not null,
    outputName text not null,
    outputPath integer not null,
    signatures text,
    foreign key (outputPath) references ValidPaths(id) on delete cascade
);
create table RealisationsRefs (
    referrer integer not null,
    realisationReference integer,
    foreign key (referrer) references Realisations(id) on delete cascade,
    foreign key (realisationReference) references Realisations(id) on delete restrict
);
"""
"""As in Nix 2.34, `libstore/ca-specific-schema.sql`, of which indexes and a trigger are left out."""
BY_PATH = """
create table BuildTraceV3 (
    id integer primary key autoincrement not null,
    drvPath text not null,
    outputName text not null,
    outputPath text not null,
    signatures text
);
"""
"""As in Nix 2.35."""
HASHES = {name: f"sha256:{index:064x}" for index, name in enumerate(("top", "left", "right", "base"))}
DERIVATION = path_of("top.drv").base_name
EVERYTHING = {path_of(name) for name in ("top", "left", "right", "base", "aside")}


@pytest.fixture
def nix(room: Path) -> Path:
    """The root of a Nix store with some paths."""
    with closing(open_for_nix(room, "wal")) as db:
        fill(db)
    return room


def change(root: Path, *statements: str) -> None:
    with closing(sqlite3.connect(root / "nix/var/nix/db/db.sqlite", isolation_level=None)) as db:
        for statement in statements:
            db.executescript(statement)


def insert(root: Path, name: str, output: str, path: str, signatures: str | None = "") -> None:
    """Register an output by its derivation's hash, as Nix up to 2.34 does."""
    with closing(sqlite3.connect(root / "nix/var/nix/db/db.sqlite", isolation_level=None)) as db:
        db.execute(
            "insert into Realisations (drvPath, outputName, outputPath, signatures)"
            " values (?, ?, (select id from ValidPaths where path = ?), ?)",
            (HASHES[name], output, full(path), signatures),
        )


def trace(root: Path, derivation: str, path: str, signatures: str | None = "") -> None:
    """Register an output by its derivation's base name, as Nix 2.35 does."""
    with closing(sqlite3.connect(root / "nix/var/nix/db/db.sqlite", isolation_level=None)) as db:
        db.execute(
            "insert into BuildTraceV3 (drvPath, outputName, outputPath, signatures) values (?, 'out', ?, ?)",
            (derivation, path, signatures),
        )


def found_in(root: Path, names: Sequence[str] | None = None) -> list[Realisation]:
    chosen = EVERYTHING if names is None else {path_of(name) for name in names}
    with NixDatabase(root, "/nix/store") as db:
        return realisations_in(db, chosen)


def realised(name: str, output: str = "out", **fields: tuple[object, ...]) -> Realisation:
    made = Realisation(id=f"{HASHES[name]}!{output}", path=path_of(name).base_name)
    return msgspec.structs.replace(made, **fields)


def test_a_store_that_never_had_any(nix: Path) -> None:
    assert found_in(nix) == []
    change(nix, BY_HASH, BY_PATH)
    assert found_in(nix) == []


def test_those_by_hash_come_with_signatures_and_what_they_depend_on(nix: Path) -> None:
    change(nix, BY_HASH)
    insert(nix, "base", "out", "base", None)
    insert(nix, "left", "out", "left", "k:2 k:1  k:2")
    insert(nix, "top", "dev", "top")
    change(nix, "insert into RealisationsRefs values (3, 2), (3, 1), (3, 2), (2, null)")
    base, left = (realised(name) for name in ("base", "left"))
    top = realised("top", "dev", dependent=tuple(sorted((each.id, each.path) for each in (base, left))))
    assert found_in(nix) == [base, realised("left", signatures=("k:1", "k:2")), top]


def test_those_by_path_come_too(nix: Path) -> None:
    change(nix, BY_PATH)
    trace(nix, DERIVATION, full("top"), "k:1")
    trace(nix, path_of("gone.drv").base_name, full("no-longer-valid"))
    made = Realisation(id=f"{DERIVATION}!out", path=path_of("top").base_name, signatures=("k:1",))
    assert found_in(nix) == [made]
    change(nix, BY_HASH)
    insert(nix, "top", "out", "top")
    assert found_in(nix) == [realised("top"), made]


def test_only_those_of_the_paths_that_are_asked_for_come(nix: Path) -> None:
    change(nix, BY_HASH)
    for name in ("base", "left", "top"):
        insert(nix, name, "out", name)
    change(nix, "insert into RealisationsRefs values (2, 1), (3, 2)")
    base, left = realised("base"), realised("left")
    assert found_in(nix, ["left"]) == [realised("left", dependent=((base.id, base.path),))]
    assert found_in(nix, ["top", "aside"]) == [realised("top", dependent=((left.id, left.path),))]
    assert found_in(nix, []) == []


@pytest.mark.parametrize(
    ("derivation", "path"),
    [("md5:0", full("top")), (f"/nix/store/{DERIVATION}", full("top")), (DERIVATION, "/other/store/x")],
)
def test_what_is_none_is_refused(nix: Path, derivation: str, path: str) -> None:
    change(nix, BY_PATH)
    trace(nix, derivation, path)
    with pytest.raises(FormatError, match=r"db\.sqlite: "):
        found_in(nix)


def test_a_table_of_another_form_is_refused(nix: Path) -> None:
    change(nix, "create table Realisations (id integer primary key, drv text)")
    with pytest.raises(SourceError, match="cannot be read"):
        found_in(nix)


def test_all_are_put_some_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nix_realisations, "GROUP", 2)
    values = [realised("top", f"o{i}") for i in range(5)] + [realised("left")]
    with LocalStore.open(root, write=True) as store:
        publish(store, package("top"))
        outcomes = list(put_all(store, values))
        assert outcomes == [
            *(Realised(each.id, new=True) for each in values[:5]),
            Realised(values[5].id, new=False, absent=True),
        ]
        assert store.realisations_of(path_of("top")) == values[:5]
