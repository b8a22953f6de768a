"""Realisations: put beside their paths, kept by journal and rebuild, gone with their paths."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from cidfs.errors import Damaged, FormatError, IndexLost, JournalLoss
from cidfs.formats import frames, journal, realisation
from cidfs.formats.realisation import Realisation, key_of
from cidfs.local.audit import count_notes, journal_differences, journal_notes, lost_rows
from cidfs.local.audit_rows import path_notes
from cidfs.local.collect import JOURNAL_WASTE, collect
from cidfs.local.publish import Realised
from cidfs.local.rebuild import rebuild
from cidfs.local.rows import LATER, SCHEMA, RealisationRow, seal, unpack_number
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local import children
from tests.local.children import crash, look_up_when_told, put_when_told, run, running
from tests.local.disk import KILLED
from tests.local.support import (
    copy_store,
    flip,
    package,
    path_of,
    publish_in,
    rows_in,
)
from tests.local.support import (
    key_of as path_key,
)
from tests.local.test_crashes import plans, went_well


def realised(name: str, output: str = "out", *signatures: str, dependent: Sequence[str] = ()) -> Realisation:
    """Return the realisation that the tests mean by a path's name."""
    derivation = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    others = (
        (f"sha256:{hashlib.sha256(d.encode()).hexdigest()}!out", path_of(d).base_name) for d in dependent
    )
    return Realisation(
        id=f"{derivation}!{output}",
        path=path_of(name).base_name,
        signatures=signatures,
        dependent=tuple(sorted(others)),
    )


A, B = realised("a"), realised("b", "out", "k:1", dependent=["a"])
BY_PATH = Realisation(id=f"{path_of('a.drv').base_name}!out", path=path_of("a").base_name)
ALL = sorted((A, B, BY_PATH), key=lambda each: key_of(each.id))


def put_in(root: Path, *values: Realisation) -> list[Realised]:
    """Put realisations in a store that is opened for just that."""
    with LocalStore.open(root, write=True) as store:
        return store.put_realisations(values)


def kept_in(root: Path) -> list[Realisation]:
    with LocalStore.open(root) as store:
        found = [each for _, each in store.realisations()]
        assert [store.realisation(each.id) for each in found] == found
        return found


def rebuilt(root: Path, *, lose_index: bool = True, accept_loss: bool = False) -> list[str]:
    """Make the index anew; return the problems."""
    if lose_index:
        shutil.rmtree(root / "index")
    return rebuild(StateFolder.open(root), lock_timeout=5, accept_loss=accept_loss).problems


def remove_in(root: Path, *names: str) -> None:
    with LocalStore.open(root, write=True) as store:
        assert store.remove([path_of(n) for n in names], force=True) == []


def findings(root: Path) -> list[str]:
    """Return what verification says of index and journal."""
    with LocalStore.open(root) as store:
        return [n.line for n in (*count_notes(store), *journal_notes(store), *path_notes(store))]


def put_raw(root: Path, database: str, key: bytes, value: bytes | None) -> None:
    """Change a row behind the store's back."""
    with (
        LocalStore.open(root, write=True) as store,
        store.transaction() as index,
        index.env.begin(write=True) as raw,
    ):
        if value is None:
            assert raw.delete(key, db=index.db[database])
        else:
            raw.put(key, seal(database.encode(), key, value), db=index.db[database])


@pytest.fixture
def two(root: Path) -> Path:
    """A store with two paths and three realisations of them."""
    publish_in(root, package("a"), package("b", None, ["a"]))
    assert [o.new for o in put_in(root, *ALL)] == [True] * 3
    return root


# --- put


def test_a_realisation_is_found_by_its_id_and_by_its_path(two: Path) -> None:
    with LocalStore.open(two) as store:
        assert [store.realisation(each.id) for each in ALL] == ALL
        assert store.realisation(f"{path_of('a.drv').base_name}!dev") is None
        assert store.realisations_of(path_of("a")) == sorted((A, BY_PATH), key=lambda each: each.id)
        assert store.realisations_of(path_of("b")) == [B]
        assert store.realisations_of(path_of("c")) == []
        assert store.realisations_of(type(path_of("a"))(path_of("a").hash_part, "other")) == []
        assert dict(store.realisations()) == dict(zip((3, 4, 5), ALL, strict=True))
        assert store.totals().next_serial == 6
    assert findings(two) == []


def test_what_becomes_of_a_realisation(root: Path) -> None:
    publish_in(root, package("a"), package("b"))
    signed = msgspec.structs.replace(A, signatures=("k:1",))
    elsewhere = msgspec.structs.replace(A, path=path_of("b").base_name)
    assert put_in(root, A, A, realised("c"), elsewhere, signed, realised("b")) == [
        Realised(A.id, new=True),
        Realised(A.id, new=False),
        Realised(realised("c").id, new=False, absent=True),
        Realised(
            A.id, new=False, conflict=f"{A.id}: came to {A.path}, not to {elsewhere.path}; the first stays"
        ),
        Realised(A.id, new=False, merged=True),
        Realised(realised("b").id, new=True),
    ]
    assert kept_in(root) == sorted((signed, realised("b")), key=lambda each: key_of(each.id))
    with LocalStore.open(root) as store:
        assert sorted(serial for serial, _ in store.realisations()) == [4, 5], "the merged one is the last"
    assert put_in(root, A, signed, realised("b")) == [
        Realised(each.id, new=False) for each in (A, signed, realised("b"))
    ]
    assert findings(root) == []


def test_a_hash_part_under_another_name_is_not_its_path(root: Path) -> None:
    publish_in(root, package("a"))
    other = msgspec.structs.replace(A, path=f"{path_of('a').hash_part}-other")
    assert put_in(root, other) == [Realised(other.id, new=False, absent=True)]


def test_one_group_is_one_frame(two: Path) -> None:
    files = sorted((two / "journal").iterdir())
    found = [i for path in files for i in frames.scan(path.read_bytes()) if isinstance(i, frames.Found)]
    entries = [journal.decode(item.data).entries for item in found]
    assert [[e.serial for e in each] for each in entries] == [[1, 2], [3, 4, 5]]
    assert entries[1] == tuple(
        journal.Realisation(serial, realisation.encode(each))
        for serial, each in zip((3, 4, 5), ALL, strict=True)
    )


def test_nothing_new_writes_nothing(two: Path) -> None:
    before = (two / "journal" / "1").read_bytes()
    assert not any(o.new or o.merged for o in put_in(two, *ALL))
    assert put_in(two) == []
    assert (two / "journal" / "1").read_bytes() == before


def test_one_that_is_not_canonical_puts_none_of_its_group(two: Path) -> None:
    bad = msgspec.structs.replace(realised("b", "bad"), signatures=("b", "a"))
    with pytest.raises(FormatError):
        put_in(two, realised("a", "dev"), bad)
    assert kept_in(two) == ALL
    assert findings(two) == []


# --- databases that come later


def test_a_store_without_realisations_has_no_place_for_them(root: Path) -> None:
    """As one that was made before there were any; it is the same version still."""
    publish_in(root, package("a"))
    with LocalStore.open(root, write=True) as store:
        assert not set(store.current().db) & set(LATER)
        assert store.realisation(A.id) is None
        assert store.realisations_of(path_of("a")) == []
        assert list(store.realisations()) == []
        store.put_realisations([realised("c")])
        assert not set(store.current().db) & set(LATER), "nothing was put"
        store.remove([path_of("a")])
    assert findings(root) == []
    rebuilt(root)
    publish_in(root, package("a"))
    put_in(root, A)
    with LocalStore.open(root) as store:
        assert set(LATER) <= set(store.current().db)
        with store.read() as txn:
            assert txn.number("schema") == SCHEMA == 1
            assert [txn.number(f"count:{name}") for name in LATER] == [1, 1]
    assert findings(root) == []


def test_a_transaction_that_fails_makes_no_place(root: Path) -> None:
    publish_in(root, package("a"))
    with LocalStore.open(root, write=True) as store:
        with contextlib.suppress(ZeroDivisionError), store.transaction() as index, index.write() as txn:
            txn.put("realisations", b"k" * 32, b"v")
            assert txn.get("realisations", b"k" * 32) == b"v"
            raise ZeroDivisionError
        assert store.realisation(A.id) is None
        assert store.put_realisations([A]) == [Realised(A.id, new=True)]
        assert store.realisation(A.id) == A


@pytest.mark.parametrize("write", [False, True], ids=["reader", "writer"])
def test_who_has_an_index_open_sees_the_first_realisation(root: Path, write: bool) -> None:
    publish_in(root, package("a"))
    with running(look_up_when_told, root, write) as child:
        assert child.hear() == "open"
        child.tell(A.id)
        assert child.hear() is None
        put_in(root, A)
        child.tell(A.id)
        assert child.hear() == A
        child.tell()
        assert child.end() == 0


def test_who_has_an_index_open_for_writing_puts_beside_the_first(root: Path) -> None:
    publish_in(root, package("a"), package("b"))
    elsewhere = msgspec.structs.replace(A, path=path_of("b").base_name)
    with running(put_when_told, root, elsewhere) as child:
        assert child.hear() == "open"
        put_in(root, A)
        child.tell()
        [outcome] = child.hear()
        assert outcome.conflict
        assert child.end() == 0
    assert kept_in(root) == [A]


def test_a_read_transaction_that_is_older_than_the_first_sees_none(root: Path) -> None:
    publish_in(root, package("a"))
    with LocalStore.open(root) as store, store.read() as txn:
        assert run(children.put_realisations, root, [[A]])[0] == 0
        assert store.realisation(A.id) == A
        assert txn.get("realisations", key_of(A.id)) is None
        assert list(txn.rows("outputs")) == []
        assert txn.entries("realisations") == 0


# --- with their paths


def test_a_realisation_goes_with_its_path(two: Path) -> None:
    remove_in(two, "a")
    assert kept_in(two) == [B]
    with LocalStore.open(two) as store:
        assert store.realisations_of(path_of("a")) == []
    publish_in(two, package("a"))
    assert kept_in(two) == [B], "it does not come back with the path"
    assert put_in(two, A) == [Realised(A.id, new=True)]
    assert findings(two) == []
    before = kept_in(two)
    rebuilt(two)
    assert kept_in(two) == before == [each for each in ALL if each is not BY_PATH]


def test_an_output_may_come_to_another_path_when_the_first_is_gone(two: Path) -> None:
    elsewhere = msgspec.structs.replace(A, path=path_of("b").base_name)
    assert put_in(two, elsewhere)[0].conflict
    remove_in(two, "a")
    assert put_in(two, elsewhere) == [Realised(A.id, new=True)]
    rebuilt(two)
    assert kept_in(two) == sorted((B, elsewhere), key=lambda each: key_of(each.id))
    remove_in(two, "b")
    assert kept_in(two) == []
    assert findings(two) == []


# --- the journal


@pytest.mark.parametrize("index", ["index there", "index lost"])
def test_a_rebuild_gives_every_row_again(two: Path, index: str) -> None:
    put_in(two, msgspec.structs.replace(A, signatures=("k:2",)))
    remove_in(two, "b")
    publish_in(two, package("b", None, ["a"]))
    put_in(two, B)
    before = rows_in(two)
    for _ in range(2):  # the second time from a checkpoint
        assert rebuilt(two, lose_index=index == "index lost") == []
        after = rows_in(two)
        assert {name: after[name] for name in LATER} == {name: before[name] for name in LATER}
        for name in LATER:
            key = f"count:{name}".encode()
            counted = after["meta"][key]
            assert counted == before["meta"][key]
            assert counted is not None
            assert unpack_number(counted) == len(after[name]) == 3
    assert findings(two) == []


def test_what_was_committed_and_is_not_in_the_journal_is_said_by_the_next(root: Path) -> None:
    publish_in(root, package("a"))
    assert run(children.put_and_die, root, [A])[0] == KILLED
    assert kept_in(root) == [A]
    assert [len(rows_in(root)["pending"]), findings(root)] == [1, []]
    publish_in(root, package("b"))
    rebuilt(root)
    assert kept_in(root) == [A]


def test_a_lost_entry_is_a_gap_that_a_whole_index_fills(two: Path) -> None:
    publish_in(two, package("c"))
    path = two / "journal" / "1"
    flip(path, [i.offset for i in frames.scan(path.read_bytes())][1] + 60)
    assert any("serials 3 to 5 are in no whole frame" in line for line in findings(two))
    lost = copy_store(two, two.with_name("lost"))
    assert sum("the index still knew" in line for line in rebuilt(two, lose_index=False)) == 3
    assert kept_in(two) == ALL
    rebuilt(two)
    assert kept_in(two) == ALL
    with pytest.raises(JournalLoss, match="serials 3, 4, 5 are lost"):
        rebuilt(lost)
    rebuilt(lost, accept_loss=True)
    assert kept_in(lost) == []
    assert [o.new for o in put_in(lost, *ALL)] == [True] * 3
    assert findings(lost) == []


def test_what_an_index_lost_the_journal_says_where_gaps_are_filled(two: Path) -> None:
    """And what came to a path that has gone since does not come back."""
    remove_in(two, "a")
    publish_in(two, package("a"))
    put_in(two, A)
    path = two / "journal" / "1"
    flip(path, next(i.offset for i in frames.scan(path.read_bytes())) + 60)
    put_raw(two, "realisations", key_of(B.id), None)
    assert sum("the index still knew" in line for line in rebuilt(two, lose_index=False)) == 2
    assert kept_in(two) == [each for each in ALL if each is not BY_PATH]
    assert findings(two) == []


def test_a_collection_keeps_them_in_its_checkpoint(two: Path) -> None:
    names = [f"p{i}" for i in range(2 * JOURNAL_WASTE)]
    publish_in(two, *(package(name) for name in names))
    put_in(two, *(realised(name) for name in names), msgspec.structs.replace(A, signatures=("k:9",)))
    remove_in(two, *names)
    before = kept_in(two)
    assert len(before) == 3
    with LocalStore.open(two) as store:
        assert collect(store, dry_run=True).problems == []
    with LocalStore.open(two, write=True) as store:
        assert collect(store).problems == []
        replay = store.journal().replay()
        assert replay.missing == []
        kinds = [type(replay.entries[serial]) for serial in sorted(replay.entries)]
        assert kinds == [journal.Publication] * 2 + [journal.Realisation] * 3
        assert store.put_realisations(before) == [Realised(each.id, new=False) for each in before]
    assert [kept_in(two), findings(two)] == [before, []]
    rebuilt(two)
    assert [kept_in(two), findings(two)] == [before, []]


def test_only_merged_and_removed_ones_are_waste(two: Path) -> None:
    """What is live is none: a collection writes no checkpoint for it."""
    publish_in(two, package("c"))
    put_in(two, *(realised("c", f"o{i}") for i in range(20)))
    with LocalStore.open(two, write=True) as store:
        collect(store)
    assert os.listdir(two / "journal") == ["1"]
    for i in range(8):
        put_in(two, msgspec.structs.replace(A, signatures=(f"k:{i}",)))
    with LocalStore.open(two, write=True) as store:
        collect(store)
    assert os.listdir(two / "journal") == ["2"]
    assert len(kept_in(two)) == 23


# --- damage


@pytest.mark.parametrize("how", ["gone", "other", "older", "not in the journal"])
def test_an_index_that_differs_is_found_and_nothing_is_collected(two: Path, how: str) -> None:
    key, row = key_of(A.id), RealisationRow(5, realisation.encode(A))
    [serial] = [s for s, each in _serials(two) if each == A]
    other = realisation.encode(msgspec.structs.replace(A, signatures=("x:1",)))
    match how:
        case "gone":
            put_raw(two, "realisations", key, None)
            text = f"{A.id}: in the journal and not in the index; run `cidfs rebuild`"
        case "other":
            put_raw(two, "realisations", key, RealisationRow(serial, other).packed())
            text = f"{A.id}: index and journal say different things of it; run `cidfs rebuild`"
        case "older":
            put_raw(two, "realisations", key, row._replace(serial=1).packed())
            text = f"{A.id}: serial 1 in the index, and {serial} in the journal; run `cidfs rebuild`"
        case "not in the journal":
            more = realised("b", "more")
            with (
                LocalStore.open(two, write=True) as store,
                store.transaction() as index,
                index.write() as txn,
            ):
                txn.put("realisations", key_of(more.id), RealisationRow(6, realisation.encode(more)).packed())
                txn.put("outputs", path_key("b") + key_of(more.id), b"")
                txn.put_number("next-serial", 7)
            text = f"{more.id}: in the index and not in the journal; run `cidfs rebuild`"
    assert text in findings(two)
    if how != "other":
        with pytest.raises((Damaged, IndexLost)), LocalStore.open(two, write=True) as store:
            collect(store)
    if how != "not in the journal":
        assert rebuilt(two) == []
        assert [kept_in(two), findings(two)] == [ALL, []]


def test_a_flipped_bit_is_a_missing_row_that_is_named(two: Path) -> None:
    key = key_of(B.id)
    with (
        LocalStore.open(two, write=True) as store,
        store.transaction() as index,
        index.env.begin(write=True) as raw,
    ):
        stored = raw.get(key, db=index.db["realisations"])
        assert stored is not None
        raw.put(key, bytes((stored[0] ^ 1, *stored[1:])), db=index.db["realisations"])
    with LocalStore.open(two) as store:
        assert store.realisation(B.id) is None
        assert store.realisations_of(path_of("b")) == []
    found = findings(two)
    assert any(f"a row of realisations is damaged ({key.hex()})" in line for line in found)
    assert f"{B.id}: in the journal and not in the index; run `cidfs rebuild`" in found
    assert rebuilt(two) == []
    assert kept_in(two) == ALL


def test_rows_that_do_not_fit_each_other_are_found(two: Path) -> None:
    pair = path_key("a") + key_of(A.id)
    put_raw(two, "outputs", pair, None)
    put_raw(two, "outputs", path_key("b") + key_of(A.id), b"")
    put_raw(two, "outputs", path_key("b") + bytes(32), b"")
    found = findings(two)
    assert f"{A.id}: the index does not find it by its path; run `cidfs rebuild`" in found
    assert sum("no realisation came to" in line for line in found) == 2
    with LocalStore.open(two) as store:
        assert store.realisations_of(path_of("b")) == [B], "what came to another path is not shown"
    rebuilt(two)
    assert findings(two) == []
    put_raw(two, "paths", path_key("b"), None)
    assert f"{B.id}: came to {B.path}, which is not published; run `cidfs rebuild`" in findings(two)


def test_a_database_that_is_gone_altogether_is_found(two: Path) -> None:
    with (
        LocalStore.open(two, write=True) as store,
        store.transaction() as index,
        index.env.begin(write=True) as raw,
    ):
        raw.drop(index.db["realisations"], delete=True)
    with LocalStore.open(two) as store:
        assert any("realisations has 0 rows where 3 were written" in line for line in lost_rows(store))
        assert len(journal_differences(store)) == 3
    rebuilt(two)
    assert [kept_in(two), findings(two)] == [ALL, []]


# --- every step


@pytest.mark.parametrize("way", ["killed", "power", "mixed", "failed sync", "failed sync, power"])
def test_a_put_dies_at_any_step(small: Path, room: Path, way: str) -> None:
    """What was reported as done is there afterwards; a group is there whole or not at all."""
    publish_in(small, package("a"), package("b", None, ["a"]))
    groups = [[A, BY_PATH], [msgspec.structs.replace(A, signatures=("k:1",)), B]]
    states = [{}, *({each.id: each for each in found} for found in (groups[0], [*groups[0], *groups[1]]))]
    for number, plan in enumerate(plans(room / "lost", way)):
        here = copy_store(small, room / f"store-{number}")
        code, said = crash(here, plan, children.put_realisations, groups)
        done = sum(word[0] == "put" for word in said)
        if went_well(plan, code, said):
            assert done == 2
            break
        for lose_index in (False, True):
            ours = copy_store(here, room / f"store-{number}-{lose_index}")
            if not lose_index:  # another goes on first
                put_in(ours, realised("b", "later"))
                assert findings(ours) == []
            seen = {each.id: each for each in kept_in(ours)}
            rebuilt(ours)
            left = {each.id: each for each in kept_in(ours)}
            if not lose_index:
                assert left == seen
                del left[realised("b", "later").id]
            assert left in states[done:]
            assert findings(ours) == []
            shutil.rmtree(ours)
        shutil.rmtree(here)
    assert number > (12 if plan.kill_at else 2)


def _serials(root: Path) -> list[tuple[int, Realisation]]:
    with LocalStore.open(root) as store:
        return list(store.realisations())
