"""Realisations of content-addressed derivations come with the paths that are imported from a real Nix."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from cidfs.formats.realisation import Realisation
from cidfs.formats.store_path import parse_base_name
from cidfs.local.store import LocalStore

from .conftest import World
from .real_nix import ChrootStore
from .tool import Cidfs

_KNOWN = """
    select r.id, r.drvPath || '!' || r.outputName, replace(v.path, '/nix/store/', ''), r.signatures
    from Realisations r join ValidPaths v on v.id = r.outputPath
"""


def known_to_nix(database: Path) -> dict[str, Realisation]:
    """Return what Nix's database says, by id."""
    with closing(sqlite3.connect(database)) as db:
        rows = {number: row for number, *row in db.execute(_KNOWN)}
        others = db.execute("select referrer, realisationReference from RealisationsRefs").fetchall()
    return {
        identity: Realisation(
            id=identity,
            path=path,
            signatures=tuple(sorted(signatures.split())),
            dependent=tuple(sorted((rows[b][0], rows[b][1]) for a, b in others if a == number)),
        )
        for number, (identity, path, signatures) in rows.items()
    }


def known_to(cidfs: Cidfs) -> dict[str, Realisation]:
    with LocalStore.open(cidfs.state) as store:
        found = {each.id: each for _, each in store.realisations()}
        assert {identity: store.realisation(identity) for identity in found} == found
    return found


def change(store: ChrootStore, statement: str, *values: str) -> None:
    """Change Nix's database behind its back."""
    with closing(sqlite3.connect(store.database, isolation_level=None)) as db:
        assert db.execute(statement, values).rowcount == 1


def test_all_that_nix_knows_comes(world: World, imported: Cidfs) -> None:
    known = known_to_nix(world.store.database)
    outputs = {path.rpartition("/")[2] for path in world.ca_outputs}
    assert outputs <= {each.path for each in known.values()}
    assert known_to(imported) == known


def test_those_of_a_closure_come_with_it_and_survive_a_rebuild(
    world: World, new_cidfs: Callable[[], Cidfs]
) -> None:
    cidfs = new_cidfs()
    [top] = [path for path in world.ca_outputs if path.endswith("-top-ca")]
    closure = {path.rpartition("/")[2] for path in world.store.closure([top])}
    known = known_to_nix(world.store.database)
    expected = {identity: each for identity, each in known.items() if each.path in closure}
    assert 1 < len(expected) < len(known)
    printed = cidfs.run("import", "--from", world.store.root, top).lines
    assert {line.rpartition("/")[2] for line in printed} == closure, "nothing but paths is printed"
    assert known_to(cidfs) == expected
    of_top = [identity for identity, each in expected.items() if each.path == top.rpartition("/")[2]]
    assert len(of_top) == 2, "of the derivation as it was written, and of the one with its inputs resolved"
    assert cidfs.info(top)["realisations"] == sorted(of_top)
    cidfs.run("rebuild")
    assert known_to(cidfs) == expected
    cidfs.run("verify", "--quick")
    cidfs.run("remove", "--force", top)
    assert known_to(cidfs) == {i: each for i, each in expected.items() if i not in of_top}


def test_a_signature_that_came_later_comes_and_a_contradiction_is_a_conflict(
    new_store: ChrootStore, new_cidfs: Callable[[], Cidfs], world: World
) -> None:
    [leaf] = new_store.build("leaf", ca=True)
    other = new_store.add(world.sources / "file")
    cidfs = new_cidfs()
    cidfs.run("import", "--from", new_store.root, leaf)
    [before] = known_to(cidfs).values()
    assert parse_base_name(before.path).full() == leaf
    change(new_store, "update Realisations set signatures = ?", "b:2 a:1")
    cidfs.run("import", "--from", new_store.root, leaf)
    [signed] = known_to(cidfs).values()
    assert (signed.id, signed.path, signed.signatures) == (before.id, before.path, ("a:1", "b:2"))
    change(
        new_store, "update Realisations set outputPath = (select id from ValidPaths where path = ?)", other
    )
    result = cidfs.attempt("import", "--from", new_store.root, other, "--no-closure")
    assert result.code == 6, str(result)
    assert result.complaints == [
        f"cidfs: {before.id}: came to {before.path}, not to {other.rpartition('/')[2]}; the first stays"
    ]
    assert result.lines == [other]
    assert known_to(cidfs) == {signed.id: signed}
