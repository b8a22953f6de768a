"""Rebuild: the same rows from packs and journal, whatever is damaged, missing, double or being written."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cidfs.errors import CidfsError, FormatError, JournalLoss, LockTimeout
from cidfs.formats import frames, journal, pack
from cidfs.formats.digest import digest_of
from cidfs.local import tables
from cidfs.local.audit import journal_differences, lost_rows
from cidfs.local.audit_rows import place_notes
from cidfs.local.collect import collect
from cidfs.local.journal import Journal, journal_files
from cidfs.local.packs import MANIFEST, OWN, PackWriter
from cidfs.local.rebuild import Report, rebuild
from cidfs.local.rows import PackRow, number_key, unpack_number
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local.children import (
    hold_write_lock,
    publish_and_die,
    publish_groups,
    rebuild_it,
    run,
    running,
)
from tests.local.support import (
    Ledger,
    Rows,
    contents_of,
    flip,
    noise,
    pack_files,
    package,
    path_of,
    publish,
    publish_in,
    row_of,
    rows_in,
)

Rebuilder = Callable[..., Report]


def rebuild_now(
    root: Path, *, accept_loss: bool = False, progress: Callable[[str, int], None] | None = None
) -> Report:
    state = StateFolder.open(root)
    return rebuild(state, lock_timeout=5, accept_loss=accept_loss, progress=progress or (lambda a, b: None))


def lose_index(root: Path) -> None:
    shutil.rmtree(root / "index")


def comparable(rows: Rows) -> Rows:
    """Return what a rebuild must give again.

    Not: which packs may be appended to, packs that nothing refers to, how far inode numbers were given out.
    """
    found = {name: dict(each) for name, each in rows.items() if name != "meta"}
    packs = {k: PackRow.unpack(v) for k, v in found["packs"].items() if v is not None}
    found["packs"] = {k: r._replace(sealed=0).packed() for k, r in packs.items() if r.frames}
    found["meta"] = {
        k: v for k, v in rows["meta"].items() if k in (b"schema", b"next-serial") or b"count:" in k
    }
    del found["meta"][b"count:packs"]
    found["meta"].pop(b"count:pending", None)
    return found


def remove_by_hand(root: Path, *names: str) -> None:
    """Remove published paths as a later version will: rows, and an entry in the journal."""
    with LocalStore.open(root, write=True) as store:
        for name in names:
            with store.transaction() as index, index.write() as txn:
                serial = txn.needed_number("next-serial")
                entry = journal.Removal(serial, row_of(store, name).base, path_of(name).hash_part)
                tables.drop_publication(txn, entry)
                txn.put_number("next-serial", serial + 1)
                txn.put("pending", number_key(serial), journal.encode([entry]))
        publish(store, package("after-a-removal"))


@pytest.fixture
def low_roll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs are sealed at 20 kB."""
    monkeypatch.setattr(pack, "ROLL_SIZE", 20_000)


def fill(root: Path) -> None:
    """Publish a hundred paths, of several kinds."""
    with LocalStore.open(root, write=True) as store:
        publish(store, package("big", {f"f{i}": noise(f"big{i}", 7000) for i in range(12)}))
        publish(
            store, package("base"), package("self", None, ["self"]), package("early", None, ["late", "base"])
        )
        publish(store, package("empty", {}), package("many", {f"f{i}": b"same" for i in range(300)}))
        for i in range(8):
            items = [package(f"p{i}-{j}", {"x": noise(f"{i}{j}", 900)}, [f"p{i}-{j - 1}"]) for j in range(10)]
            publish(store, *items)
        publish(store, package("late", None, ["base"]), package("base", signatures=["k:1"]))
        publish(store, package("base", signatures=["k:2"], deriver=path_of("d.drv").base_name))


# --- the same again


@pytest.mark.usefixtures("low_roll")
@pytest.mark.parametrize("index", ["index there", "index lost"])
def test_every_row_is_the_same(root: Path, index: str) -> None:
    fill(root)
    for kind in ("own", "manifest"):  # a torn end
        with open(pack_files(root, kind)[0], "ab") as file:
            file.write(frames.build_from(frames.KIND_CHUNK, b"torn")[:-1])
    fill_more = {"y": noise("more", 400)}
    publish_in(root, package("more", fill_more, ["early"]))
    before = rows_in(root)
    for _ in range(2):  # the second time from a checkpoint
        if index == "index lost":
            lose_index(root)
        report = rebuild_now(root)
        after = rows_in(root)
        assert comparable(after) == comparable(before)
        assert (report.paths, report.chunks) == (len(before["paths"]), len(before["chunks"]))
        assert report.manifests == len(before["manifests"])
        assert len(report.problems) <= 2
        assert all("belong to no whole frame" in line for line in report.problems)
    with LocalStore.open(root) as store:
        assert contents_of(store, "more") == fill_more
        assert lost_rows(store) == journal_differences(store) == []
        assert sum(row.sealed for _, row in store.pack_rows()) >= 4


def test_a_store_with_nothing_in_it(root: Path) -> None:
    before = rows_in(root)
    report = rebuild_now(root)
    assert (report.paths, report.chunks, report.packs, report.problems) == (0, 0, 0, [])
    assert rows_in(root)["paths"] == before["paths"] == {}
    assert publish_in(root, package("a"))["a"].serial == 1


def test_inode_numbers_go_on_from_the_limit(root: Path) -> None:
    """What was given out and is not known any more is not given out again."""
    publish_in(root, package("a"))
    assert run(publish_and_die, root, [package("lost", {f"f{i}": b"" for i in range(50)})])[0] != 0
    with LocalStore.open(root) as store:
        lost = row_of(store, "lost")
    limit = StateFolder.open(root).inode_limit()
    lose_index(root)
    rebuild_now(root)
    with LocalStore.open(root) as store:
        assert store.find_path(path_of("lost")) is None
        assert store.next_base() == limit
        assert store.range_of(lost.base) is None
    b = publish_in(root, package("b"))["b"]
    assert b.base == limit >= lost.base + lost.count
    assert StateFolder.open(root).inode_limit() > limit


def test_only_one_index_and_one_journal_file_are_left(root: Path) -> None:
    fill(root)
    rebuild_now(root)
    assert sorted(os.listdir(root / "index")) == ["2", "current"]
    assert os.listdir(root / "journal") == ["2"]


def test_what_another_did_not_journal_is_kept(root: Path) -> None:
    assert run(publish_and_die, root, [package("a", {"x": b"x"})])[0] != 0
    before = rows_in(root)
    rebuild_now(root)
    assert rows_in(root)["paths"] == before["paths"]
    assert rows_in(root)["pending"] == {}


# --- amendments and removals


@pytest.mark.parametrize("index", ["index there", "index lost"])
def test_what_was_removed_stays_removed(root: Path, index: str) -> None:
    publish_in(root, package("a"), package("b", None, ["a"]), package("c"))
    old = publish_in(root, package("c", signatures=["k:1"]))["c"]
    remove_by_hand(root, "c", "b")
    before = rows_in(root)
    assert set(before["inodes"]) >= {number_key(old.base)}
    if index == "index lost":
        lose_index(root)
    rebuild_now(root)
    assert comparable(rows_in(root)) == comparable(before)
    with LocalStore.open(root) as store:
        assert store.find_path(path_of("c")) is None
        assert store.referrers(path_of("a").hash_part) == []
        assert store.range_of(old.base) is not None, "the kernel may still know its numbers"
    again = publish_in(root, package("c"))["c"]
    assert again.base != old.base
    lose_index(root)
    rebuild_now(root)
    with LocalStore.open(root) as store:
        assert row_of(store, "c") == again
        told = store.record_of(path_of("c").hash_part)
        assert told is not None
        assert told.signatures == (), "an amendment of what was removed is none of what came later"


def test_the_first_publication_since_a_removal_counts(root: Path) -> None:
    """As when the key of a path was lost from the index, and it was published again."""
    first = publish_in(root, package("a", {"x": b"x"}))["a"]
    with LocalStore.open(root, write=True) as store:
        with store.transaction() as index, index.env.begin(write=True) as raw:
            raw.delete(path_of("a").hash_part.encode(), db=index.db["paths"])
        assert lost_rows(store)
        publish(store, package("a", {"x": b"x"}))
        second = row_of(store, "a")
        assert second.base != first.base
        publish(store, package("a", {"x": b"x"}, signatures=["k:1"]))
    rebuild_now(root)
    with LocalStore.open(root) as store:
        assert row_of(store, "a") == first
        assert store.range_of(second.base) is None
        told = store.record_of(path_of("a").hash_part)
        assert told is not None
        assert told.signatures == (), "the amendment was of the other publication"
        assert store.next_base() >= second.base + second.count


# --- losses


def lose_frame(root: Path, serial: int) -> None:
    """Damage the journal's frame with a serial."""
    path = root / "journal" / "1"
    for item in frames.scan(path.read_bytes()):
        if isinstance(item, frames.Found):
            entries = journal.decode(item.data).entries
            if serial in [e.serial for e in entries]:
                flip(path, item.offset + 60)
                return
    raise AssertionError(serial)


@pytest.mark.parametrize("serial", [1, 2])
def test_a_gap_is_refused_and_passed_only_when_told_to(root: Path, serial: int) -> None:
    bases = {n: publish_in(root, package(n))[n].base for n in ("a", "b", "c")}
    lose_frame(root, serial)
    lose_index(root)
    with pytest.raises(JournalLoss, match=rf"serials {serial} are lost.*accept-loss"):
        rebuild_now(root)
    report = rebuild_now(root, accept_loss=True)
    lost = "abc"[serial - 1]
    assert f"journal: serial {serial} is lost" in report.problems
    with LocalStore.open(root) as store:
        assert {p.path.name: p.row.base for p in store.paths()} == {
            n: b for n, b in bases.items() if n != lost
        }
        assert store.totals().next_serial == 4
    rebuild_now(root)  # the checkpoint has no gap
    publish_in(root, package(lost))
    lose_index(root)
    rebuild_now(root)
    Ledger({n: package(n) for n in "abc"}, {n: b for n, b in bases.items() if n != lost}).look(root)


@pytest.mark.parametrize("serial", [1, 2, 3])
def test_what_the_journal_lost_a_whole_index_says_again(root: Path, serial: int) -> None:
    bases = {n: publish_in(root, package(n))[n].base for n in ("a", "b", "c")}
    before = comparable(rows_in(root))
    lose_frame(root, serial)
    report = rebuild_now(root)
    assert any(f"serial {serial} is lost; the index still knew" in line for line in report.problems)
    assert comparable(rows_in(root)) == before
    lose_index(root)
    rebuild_now(root)  # the checkpoint says it now
    Ledger({n: package(n) for n in "abc"}, bases).look(root)


@pytest.mark.parametrize("serial", [1, 2])
def test_an_index_that_lost_a_row_says_nothing_again(root: Path, serial: int) -> None:
    for name in ("a", "b"):
        publish_in(root, package(name))
    lose_frame(root, serial)
    key = package("b").record.path.hash_part.encode()
    with (
        LocalStore.open(root, write=True) as store,
        store.transaction() as index,
        index.env.begin(write=True) as raw,
    ):
        raw.delete(key, db=index.db["paths"])
    with pytest.raises(JournalLoss, match=rf"serials {serial} are lost"):
        rebuild_now(root)


def test_an_index_that_is_ahead_of_a_journal_from_a_backup(root: Path) -> None:
    publish_in(root, package("a"))
    backup = (root / "journal" / "1").read_bytes()
    rebuild_now(root)
    rebuild_now(root)
    publish_in(root, package("b"))
    (root / "journal" / "3").unlink()
    (root / "journal" / "1").write_bytes(backup)
    assert any("serial 2 is lost; the index still knew" in line for line in rebuild_now(root).problems)
    assert (root / "index" / "current").read_bytes().startswith(b"4 "), "a number that no index had"
    with LocalStore.open(root) as store:
        assert sorted(p.path.name for p in store.paths()) == ["a", "b"]


def test_both_slots_of_the_limit_are_damaged(root: Path) -> None:
    item = publish_in(root, package("a"))["a"]
    for damage in (lambda p: p.write_bytes(b"\xff" * 8192), Path.unlink):
        damage(root / "next-inode")
        with pytest.raises(FormatError, match="accept-loss"):
            rebuild_now(root)
        assert any("next-inode" in line for line in rebuild_now(root, accept_loss=True).problems)
        with LocalStore.open(root) as store:
            assert store.next_base() == StateFolder.open(root).inode_limit() >= item.base + item.count
    publish_in(root, package("b"))


# --- packs that are damaged, missing, double


@pytest.mark.usefixtures("low_roll")
@pytest.mark.parametrize("damage", ["footer", "trailer", "magic", "cut"])
def test_a_damaged_footer_is_scanned_past(root: Path, damage: str) -> None:
    fill(root)
    before = rows_in(root)
    for path in pack_files(root, "own"):
        size = path.stat().st_size
        if size < 20_000:
            continue
        match damage:
            case "footer":
                flip(path, size - 100)
            case "trailer":
                flip(path, size - 30)
            case "magic":
                flip(path, size - 1)
            case "cut":
                os.truncate(path, size - 40)
    lose_index(root)
    report = rebuild_now(root)
    assert comparable(rows_in(root)) == comparable(before)
    assert len(report.problems) == len(set(report.problems)) > 0
    with LocalStore.open(root, write=True) as store:
        publish(store, package("further", {"x": noise("further", 300)}))
        place = store.place("chunks", digest_of(noise("further", 300)))
        assert place is not None
        assert (root / "packs/own" / place.pack.hex()[:2] / place.pack.hex()).stat().st_size < 20_000


@pytest.mark.parametrize("length", [0, 1, 15, 16])
def test_a_pack_of_which_little_more_than_its_name_is_left(root: Path, length: int) -> None:
    item = publish_in(root, package("a"))["a"]
    (root / "packs/own/07" / ("07" * 12)).write_bytes(pack.HEADER[:length])
    rebuild_now(root)
    with LocalStore.open(root) as store:
        assert row_of(store, "a") == item


def test_strange_files_among_the_packs(root: Path) -> None:
    publish_in(root, package("a"))
    before = rows_in(root)
    [path] = pack_files(root, "own")
    for name in (f"{path.name}.bad", "00" * 12 + ".new", "notes.txt", path.name.upper() + "0"):
        (path.parent / name).write_bytes(path.read_bytes())
    rebuild_now(root)
    assert comparable(rows_in(root)) == comparable(before), "one that is marked bad is read"


def test_a_pack_that_is_gone(root: Path) -> None:
    publish_in(root, package("a", {"x": noise("x", 300)}))
    row = publish_in(root, package("b", {"y": noise("y", 300)}))["b"]
    [own] = pack_files(root, "own")
    own.unlink()
    lose_index(root)
    assert rebuild_now(root).chunks == 0
    with LocalStore.open(root) as store:
        assert row_of(store, "b") == row, "published stays published"
        with pytest.raises(CidfsError):
            contents_of(store, "b")
    publish_in(root, package("c", {"y": noise("y", 300)}))
    with LocalStore.open(root) as store:
        assert contents_of(store, "b") == {"y": noise("y", 300)}, "whole again by the same chunk"


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_manifest_is_named(root: Path, damage: str) -> None:
    row = publish_in(root, package("a", {"x": b"x" * 50}))["a"]
    [path] = pack_files(root, "manifest")
    if damage == "gone":
        path.unlink()
    else:
        flip(path, 100)
    lose_index(root)
    report = rebuild_now(root)
    assert any(str(path_of("a")) in line for line in report.problems)
    with LocalStore.open(root) as store:
        found = row_of(store, "a")
        assert (found.base, found.count, found.manifest, found.whole) == (
            row.base,
            row.count,
            row.manifest,
            1,
        )
        assert store.range_of(row.base) is not None
    publish_in(root, package("b", {"x": b"x" * 50}))  # the same tree brings it back
    with LocalStore.open(root) as store:
        assert contents_of(store, "a") == {"x": b"x" * 50}


def double(root: Path, data: bytes) -> None:
    """Store a chunk once more, in a pack of its own."""
    writer = PackWriter(root, OWN)
    writer.append(digest_of(data), 0, data, len(data))
    writer.sync()
    writer.close()


def test_a_chunk_that_lies_in_two_packs(root: Path) -> None:
    publish_in(root, package("a", {"x": noise("x", 300)}))
    for _ in range(3):
        double(root, noise("x", 300))
    lose_index(root)
    report = rebuild_now(root)
    assert (report.chunks, report.packs) == (1, 5)
    with LocalStore.open(root) as store:
        assert contents_of(store, "a") == {"x": noise("x", 300)}
        assert sum(r.frames for _, r in store.pack_rows() if r.kind == OWN) == 1
        assert sum(r.frames for _, r in store.pack_rows() if r.kind == MANIFEST) == 1


# --- beside others


def test_a_pack_that_goes_while_it_runs(root: Path) -> None:
    """As a collection unlinks it: what lies in another one is found there."""
    publish_in(root, package("a", {"x": noise("x", 300)}))
    for i in range(4):
        double(root, noise("x", 300))
        double(root, noise(f"alone {i}", 100))
    gone: list[Path] = []

    def progress(stage: str, left: int) -> None:
        if stage == "reading packs" and left == 1:  # all own ones were read
            gone.extend(pack_files(root, "own")[:-1])
            for path in gone:
                path.unlink()
        elif stage == "reading packs" and left > 1:
            assert not gone

    keep = pack_files(root, "own")[-1]
    with open(keep, "ab") as file:
        file.write(frames.build_from(frames.KIND_CHUNK, noise("x", 300)))
    rebuild_now(root, progress=progress)
    with LocalStore.open(root) as store:
        assert contents_of(store, "a") == {"x": noise("x", 300)}
        rows = {k: r.frames for k, r in store.pack_rows() if r.kind == OWN}
        assert set(rows) == {bytes.fromhex(keep.name)}
        assert {p.pack for _, p in store.places("chunks")} == set(rows)
        assert lost_rows(store) == []


@pytest.mark.usefixtures("low_roll")
def test_what_is_published_while_it_runs_is_in_it(root: Path) -> None:
    publish_in(root, package("a", {"x": noise("x", 15_000)}))
    publish_in(root, package("aa", {"x": noise("xx", 300)}))

    def progress(stage: str, left: int) -> None:
        if stage == "reading packs" and left == 1:
            items = [[package(f"b{i}", {"y": noise(f"y{i}", 9000)}, ["a"])] for i in range(3)]
            assert run(publish_groups, root, items)[0] == 0
            assert run(publish_and_die, root, [package("c", {"z": b"z"})])[0] != 0

    before_rows = rows_in(root)
    report = rebuild_now(root, progress=progress)
    assert len(before_rows["paths"]) == 2
    assert (report.paths, report.problems) == (6, [])
    known = {n: package(n, {"y": noise(f"y{n[1]}", 9000)}, ["a"]) for n in ("b0", "b1", "b2")}
    known |= {"a": package("a", {"x": noise("x", 15_000)}), "aa": package("aa", {"x": noise("xx", 300)})}
    assert len(Ledger({**known, "c": package("c", {"z": b"z"})}).look(root)) == 6


def test_two_rebuilds_at_once(root: Path) -> None:
    fill(root)
    before = rows_in(root)
    with running(rebuild_it, root) as a, running(rebuild_it, root) as b:
        assert [a.hear(), b.hear()] == [("rebuilt", []), ("rebuilt", [])]
        assert [a.end(), b.end()] == [0, 0]
    assert comparable(rows_in(root)) == comparable(before)
    assert len(os.listdir(root / "index")) == 2


def test_a_lock_that_is_not_given(root: Path) -> None:
    publish_in(root, package("a"))
    with running(hold_write_lock, root) as child:
        assert child.hear() == "held"
        with pytest.raises(LockTimeout, match=str(child.pid)):
            rebuild(StateFolder.open(root), lock_timeout=0.1)
    assert sorted(os.listdir(root / "index")) == ["1", "current"]


@pytest.fixture
def replaced(root: Path) -> Iterator[LocalStore]:
    """Return a store that does not know yet that its index was rebuilt, and has changed since."""
    publish_in(root, package("a", {"x": noise("x", 9000)}), package("b"))
    with LocalStore.open(root) as store:
        assert store.find_path(path_of("a"))
        store._checked = math.inf  # else it may have looked just by chance
        assert run(rebuild_it, root)[0] == 0
        publish_in(root, package("c"))
        with LocalStore.open(root, write=True) as other:
            other.remove([path_of("a")])
            collect(other)
            assert other.find_path(path_of("a")) is None
        yield store


def test_the_journal_is_compared_with_the_index_that_counts(replaced: LocalStore) -> None:
    assert journal_differences(replaced) == []
    assert replaced.find_path(path_of("c"))


def test_places_of_a_replaced_index_are_no_damage(replaced: LocalStore) -> None:
    misplaced: list[object] = []
    notes = list(place_notes(replaced, lambda *what: misplaced.append(what)))
    assert (notes, misplaced) == ([], [])


def test_it_does_not_pass_over_an_index_that_is_open_in_its_own_process(root: Path) -> None:
    """For that may know what the journal does not."""
    assert run(publish_and_die, root, [package("a")])[0] != 0
    with LocalStore.open(root), pytest.raises(CidfsError, match="open in this process"):
        rebuild_now(root)
    assert rebuild_now(root).paths == 1


# --- an index that is damaged


@pytest.mark.parametrize("size", [0, 100, 5000, 8192, 12_288, 16_384, 20_000])
def test_an_index_that_was_cut_short(root: Path, size: int) -> None:
    fill(root)
    before = comparable(rows_in(root))
    os.truncate(root / "index" / "1" / "data.mdb", size)
    code, said = run(rebuild_it, root)
    assert (code, said) == (0, [("rebuilt", [])])
    assert comparable(rows_in(root)) == before


def test_the_entries_of_a_damaged_pending_row_are_said_again_from_the_other_rows(root: Path) -> None:
    assert run(publish_and_die, root, [package("a")])[0] != 0
    with LocalStore.open(root, write=True) as store:
        with store.transaction() as index, index.env.begin(write=True) as raw:
            raw.put(number_key(1), b"\0" * 99, db=index.db["pending"])
        assert journal_differences(store)
    assert any("serial 1 is lost; the index still knew" in line for line in rebuild_now(root).problems)


def test_the_next_serial_is_that_of_the_journal(root: Path) -> None:
    fill(root)
    expected = unpack_number(rows_in(root)["meta"][b"next-serial"] or b"")
    lose_index(root)
    rebuild_now(root)
    assert Journal(root / "journal").replay().next_serial == expected
    assert journal_files(root / "journal") == [2]
