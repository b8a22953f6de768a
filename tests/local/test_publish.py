"""Publishing: what becomes visible, what is refused, what is said again in the journal, who becomes whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cidfs.errors import ChunkMissing, DiskFailed, PathAbsent
from cidfs.formats import frames, journal
from cidfs.formats.digest import digest_of
from cidfs.formats.record import Record
from cidfs.local.audit import journal_differences, lost_rows
from cidfs.local.journal import Journal
from cidfs.local.packs import CACHE, OWN, pack_path
from cidfs.local.publish import Candidate
from cidfs.local.rebuild import rebuild
from cidfs.local.rows import PLACE_SIZE, Place
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local.children import publish_and_die, publish_groups, rebuild_it, run, running
from tests.local.disk import KILLED
from tests.local.support import (
    Ledger,
    Package,
    Writers,
    append,
    candidates,
    contents_of,
    copy_store,
    noise,
    pack_files,
    package,
    path_of,
    publish,
    publish_in,
    row_of,
    rows_in,
)


def journal_serials(root: Path) -> list[list[int]]:
    """Return the serials of each frame in the journal, in the order in which they stand there."""
    found = []
    for path in sorted((root / "journal").iterdir(), key=lambda p: int(p.name)):
        for item in frames.scan(path.read_bytes()):
            assert isinstance(item, frames.Found)
            entries = journal.decode(item.data).entries
            found.append([e.serial for e in entries if not isinstance(e, journal.Checkpoint)])
    return found


def pending(root: Path) -> int:
    return len(rows_in(root)["pending"])


def whole_of(store: LocalStore, name: str) -> int:
    return row_of(store, name).whole


def record_of(store: LocalStore, name: str) -> Record:
    found = store.record_of(path_of(name).hash_part)
    assert found is not None
    return found


def rebuilt(root: Path) -> None:
    """Lose the index and make it anew."""
    shutil.rmtree(root / "index")
    assert rebuild(StateFolder.open(root), lock_timeout=5).problems == []


# --- what becomes visible


def test_a_published_path(root: Path) -> None:
    item = package(
        "a", {"x": noise("x", 200_000), "y": b"", "z": b"z"}, ["a", "b"], deriver=path_of("d.drv").base_name
    )
    with LocalStore.open(root, write=True) as store:
        [outcome] = publish(store, item)
        assert (outcome.new, outcome.amended, outcome.conflict) == (True, False, "")
        row = row_of(store, "a")
        assert (row.base, row.count, row.serial, row.size, row.files) == (16, 4, 1, 200_001, 3)
        assert store.find(b"0" * 32) is None
        assert store.find_path(path_of("a")) == row
        other = path_of("a")
        assert store.find_path(type(other)(other.hash_part, "another-name")) is None
        assert contents_of(store, "a") == {"x": noise("x", 200_000), "y": b"", "z": b"z"}
        assert record_of(store, "a") == item.record
        assert store.referrers(path_of("b").hash_part) == [path_of("a").hash_part]
        assert store.referrers(path_of("a").hash_part) == []
        there = store.range_of(16)
        assert there is not None
        assert there[0] == 16
        assert [store.range_of(inode) for inode in range(17, 20)] == [there] * 3
        assert store.range_of(15) is store.range_of(20) is None
        totals = store.totals()
        assert (totals.paths, totals.nodes, totals.files, totals.logical) == (1, 4, 3, 200_001)
        assert (totals.chunks, totals.manifests, totals.packs, totals.unique) == (5, 1, 2, 200_001)
        assert (totals.next_serial, totals.next_base) == (2, 20)
        assert lost_rows(store) == journal_differences(store) == []


def test_published_again_is_nothing_new(root: Path) -> None:
    first = publish_in(root, package("a", {"x": b"x"}))
    before = (root / "journal" / "1").read_bytes()
    with LocalStore.open(root, write=True) as store:
        [outcome] = publish(store, package("a", {"x": b"x"}))
        assert (outcome.new, outcome.amended, outcome.conflict) == (False, False, "")
        assert row_of(store, "a") == first["a"]
        assert store.totals().next_serial == 2
    assert (root / "journal" / "1").read_bytes() == before


def test_the_first_publication_stays(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a", {"x": b"x"}, ["b"]))
        first, record = row_of(store, "a"), record_of(store, "a")
        same_hash = package("a", {"x": b"x"})
        renamed = Record(
            **{f: getattr(same_hash.record, f) for f in Record.__struct_fields__ if f != "path"},
            path=type(first_path := path_of("a"))(first_path.hash_part, "other"),
        )
        conflicts = {
            "other contents": package("a", {"x": b"y"}, ["b"]),
            "other references": package("a", {"x": b"x"}, ["b", "c"]),
            "is published as": Package(renamed, same_hash.manifest, same_hash.chunks),
        }
        outcomes = publish(store, *conflicts.values(), package("next"), package("a", {"x": b"x"}))
        for (reason, _), outcome in zip(conflicts.items(), outcomes, strict=False):
            assert reason in outcome.conflict
            assert not outcome.new
        assert [o.new for o in outcomes[3:]] == [True, False], "the rest goes on"
        assert outcomes[4].conflict == "", "one that knows no references says nothing of them"
        assert (row_of(store, "a"), record_of(store, "a")) == (first, record)
        assert row_of(store, "next").serial == 2, "a conflict takes no serial"


def test_signatures_and_deriver_are_added(root: Path) -> None:
    deriver = path_of("a.drv").base_name
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a", signatures=["k1:x"]))
        row = row_of(store, "a")
        for item, amended in (
            (package("a", signatures=["k1:x"]), False),
            (package("a", signatures=["k2:y"]), True),
            (package("a"), False),
            (package("a", deriver=deriver, signatures=["k1:x"]), True),
            (package("a", deriver=path_of("other.drv").base_name), False),
        ):
            [outcome] = publish(store, item)
            assert (outcome.new, outcome.amended, outcome.conflict) == (False, amended, "")
        told = record_of(store, "a")
        assert (told.signatures, told.deriver) == (("k1:x", "k2:y"), deriver)
        assert row_of(store, "a") == row
        assert store.totals().next_serial == 4
    rebuilt(root)
    with LocalStore.open(root) as store:
        assert record_of(store, "a") == told
        assert row_of(store, "a") == row


def test_one_group_is_one_frame(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(
            store, package("a"), package("b", None, ["a"]), package("a"), package("a", signatures=["k:x"])
        )
        publish(store, package("c"))
        assert [row_of(store, n).serial for n in "abc"] == [1, 2, 4]
        assert [row_of(store, n).base for n in "abc"] == [16, 18, 20]
    assert journal_serials(root) == [[1, 2, 3], [4]]


def test_a_path_that_was_thought_to_be_here(root: Path) -> None:
    item = package("a")
    with LocalStore.open(root, write=True) as store:
        [made] = candidates(store, item)
        here = Candidate(item.record, made.manifest_place, made.size, made.files, b"", b"", already_here=True)
        with pytest.raises(PathAbsent, match="removed"):
            store.publish([here])
        assert store.find_path(path_of("a")) is None
        store.publish([made])
        assert not store.publish([here])[0].new


# --- who becomes whole


def test_a_path_becomes_whole_when_its_references_are_there(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("top", None, ["middle", "top"]), package("other", None, ["base", "middle"]))
        publish(store, package("middle", None, ["base"]))
        assert [whole_of(store, n) for n in ("top", "other", "middle")] == [0, 0, 0]
        publish(store, package("aside"), package("base"), package("last", None, ["top"]))
        assert whole_of(store, "aside") == 4
        assert {n: whole_of(store, n) for n in ("base", "middle", "top", "other")} == dict.fromkeys(
            ("base", "middle", "top", "other"), 5
        )
        assert whole_of(store, "last") == 6


def test_what_refers_to_itself_alone_is_whole(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(
            store,
            package("self", None, ["self"]),
            package("one", None, ["two"]),
            package("two", None, ["one"]),
        )
        assert [whole_of(store, n) for n in ("self", "one", "two")] == [1, 0, 0], "Nix has no other cycles"


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whole_is_when_the_closure_is_complete(small: Path, data: st.DataObject) -> None:
    """Beside a model, in any order of publication; a rebuild says the same."""
    count = data.draw(st.integers(1, 7))
    references = {
        i: sorted(data.draw(st.sets(st.integers(0, i), max_size=3))) for i in range(count)
    }  # to itself too
    order = data.draw(st.permutations(range(count)))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    root = copy_store(small, small.with_name("copy"))
    items = {i: package(f"n{i}", None, [f"n{j}" for j in references[i]]) for i in range(count)}
    with LocalStore.open(root, write=True) as store:
        rest = list(order)
        for size in sizes:
            if rest:
                publish(store, *(items[i] for i in rest[:size]))
                rest = rest[size:]
        whole: dict[int, int] = {}
        for serial, _ in enumerate(order, 1):
            there = set(order[:serial])
            before = -1
            while before != len(whole):
                before = len(whole)
                for i in there - set(whole):
                    if all(j == i or j in whole for j in references[i]):
                        whole[i] = serial
        assert {i: whole_of(store, f"n{i}") for i in range(count)} == {
            i: whole.get(i, 0) for i in range(count)
        }
    before_rows = rows_in(root)["paths"]
    rebuilt(root)
    assert rows_in(root)["paths"] == before_rows
    shutil.rmtree(root)


# --- places


def test_the_first_place_of_a_chunk_stays(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        writers = Writers.of(store)
        digest = digest_of(b"data")
        first, second = (writers.own.append(digest, 0, b"data", 4) for _ in range(2))
        writers.own.sync()
        store.put_places("chunks", [(digest, first)], writers.own)
        store.put_places("chunks", [(digest, second), (digest, second)], writers.own)
        assert store.place("chunks", digest) == first
        [(_, row)] = store.pack_rows()
        assert (row.frames, row.stored) == (1, 4)
        writers.close()


def test_what_is_made_here_beats_what_was_fetched(root: Path) -> None:
    digest = digest_of(b"data")
    with LocalStore.open(root, write=True) as store:
        cache, own = store.pack_writer(CACHE), store.pack_writer(OWN)
        fetched, made = cache.append(digest, 0, b"data", 4), own.append(digest, 0, b"data", 4)
        cache.sync()
        own.sync()
        store.put_places("chunks", [(digest, fetched)], cache)
        store.put_places("chunks", [(digest, made)], own)
        assert store.place("chunks", digest) == made
        store.put_places("chunks", [(digest, fetched)], cache)
        assert store.place("chunks", digest) == made
        assert sorted((r.kind, r.frames) for _, r in store.pack_rows()) == [(OWN, 1), (CACHE, 0)]
        cache.close()
        own.close()
    rebuilt(root)
    with LocalStore.open(root) as store:
        assert store.place("chunks", digest) == made


def drop_rows(store: LocalStore, *rows: tuple[str, bytes]) -> None:
    """Delete rows, as a collection does that does not know of an ingest's needs."""
    with store.transaction() as index, index.write() as txn:
        for database, digest in rows:
            txn.drop_place(database, digest)


def test_a_row_that_vanished_is_put_back(root: Path) -> None:
    item = package("a", {"x": noise("x", 300), "y": b"y"})
    with LocalStore.open(root, write=True) as store:
        made = candidates(store, item)
        drop_rows(store, ("chunks", digest_of(noise("x", 300))), ("manifests", item.record.manifest))
        with pytest.raises(ChunkMissing):
            store.read_chunk(digest_of(noise("x", 300)))
        store.publish(made)
        assert contents_of(store, "a") == {"x": noise("x", 300), "y": b"y"}
        before = rows_in_open(store)
    rebuilt(root)
    with LocalStore.open(root) as store:
        assert rows_in_open(store) == before


def rows_in_open(store: LocalStore) -> dict[str, object]:
    """Return places and sums."""
    return {
        "chunks": dict(store.places("chunks")),
        "manifests": dict(store.places("manifests")),
        "packs": {k: (r.frames, r.stored, r.length) for k, r in store.pack_rows() if r.frames},
    }


def test_nothing_is_published_whose_pack_is_gone(root: Path) -> None:
    item = package("a", {"x": noise("x", 300)})
    with LocalStore.open(root, write=True) as store:
        made = candidates(store, package("b"), item)
        place = Place.unpack(bytes(made[1].places[:PLACE_SIZE]))
        drop_rows(store, ("chunks", digest_of(noise("x", 300))))
        pack_path(root, place.kind, place.pack).unlink()
        with pytest.raises(ChunkMissing, match="add the path again"):
            store.publish(made)
        assert store.totals().paths == 0
        assert store.totals().next_serial == 1
        publish(store, item)
        assert contents_of(store, "a") == {"x": noise("x", 300)}
    assert journal_serials(root) == [[1]]


def test_a_chunk_is_stored_once(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(
            store,
            package("a", {"x": noise("x", 300), "y": noise("x", 300)}),
            package("b", {"z": noise("x", 300)}),
        )
        publish(store, package("c", {"w": noise("x", 300)}))
        assert store.totals().chunks == 1
    [path] = pack_files(root, "own")
    assert len(list(frames.scan(path.read_bytes(), 16))) == 1


# --- the journal, and what is pending


def test_a_frame_waits_until_it_is_known_to_be_in_the_journal(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a"))
        with store.read() as txn:
            assert len(list(txn.rows("pending"))) == 1
        publish(store, package("b"))
        with store.read() as txn:
            assert [int.from_bytes(k, "big") for k, _ in txn.rows("pending")] == [2]
        publish(store, package("b"))
        with store.read() as txn:
            assert list(txn.rows("pending")) == []
        publish(store, package("c"))
    assert pending(root) == 0, "closing settles it"
    assert journal_serials(root) == [[1], [2], [3]]


def test_what_another_did_not_journal_is_journalled_first(root: Path) -> None:
    for number, group in enumerate(([package("a"), package("b")], [package("c")])):
        assert run(publish_and_die, root, group)[0] == KILLED
        assert pending(root) == number + 1
    assert journal_serials(root) == []
    with LocalStore.open(root) as store:
        assert sorted(p.row.serial for p in store.paths()) == [1, 2, 3]
        assert journal_differences(store) == [], "late is not lost"
    publish_in(root, package("d"))
    assert journal_serials(root) == [[1, 2], [3], [4]]
    assert pending(root) == 0
    before = rows_in(root)["paths"]
    rebuilt(root)
    assert rows_in(root)["paths"] == before


def test_nothing_to_do_is_said_only_when_the_journal_has_it(root: Path) -> None:
    """A publication of another process that died before the journal, found done by this one."""
    item = package("a", {"x": b"x"})
    assert run(publish_and_die, root, [item])[0] == KILLED
    with LocalStore.open(root) as store:
        base = row_of(store, "a").base
    with LocalStore.open(root, write=True) as store:
        assert publish(store, item)[0].new is False
        assert journal_serials(root) == [[1]], "before this returned"
    rebuilt(root)
    with LocalStore.open(root) as store:
        assert row_of(store, "a").base == base


def test_a_conflict_journals_what_is_pending_too(root: Path) -> None:
    assert run(publish_and_die, root, [package("a", {"x": b"x"})])[0] == KILLED
    with LocalStore.open(root, write=True) as store:
        assert publish(store, package("a", {"x": b"y"}))[0].conflict
    assert journal_serials(root) == [[1]]


def test_a_journal_that_fails_is_not_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is visible, as its commit stands; the next one who says anything has journalled it before."""
    real = Journal.append
    fails = [True]

    def append(self: Journal, data: list[bytes]) -> None:
        if fails:
            raise DiskFailed("the journal's disk")
        real(self, data)

    monkeypatch.setattr(Journal, "append", append)
    with LocalStore.open(root, write=True) as store:
        with pytest.raises(DiskFailed):
            publish(store, package("a"))
        assert row_of(store, "a").serial == 1
        with pytest.raises(DiskFailed):
            publish(store, package("a"))
        fails.clear()
        assert publish(store, package("a"))[0].new is False
    assert journal_serials(root) == [[1]]


def test_after_a_rebuild_beside_it_a_writer_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cidfs.local.store.POLL_SECONDS", 1e9)  # only its transactions look
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a"), package("b"))
        writers = Writers.of(store)
        new: dict[bytes, Place] = {}
        candidate = append(store, writers, package("c", {"x": noise("x", 99)}), new)
        writers.own.sync()
        writers.manifests.sync()
        assert run(rebuild_it, root)[0] == 0
        store.put_places("chunks", list(new.items()), writers.own)
        store.put_places(
            "manifests", [(candidate.record.manifest, candidate.manifest_place)], writers.manifests
        )
        store.publish([candidate])
        writers.close()
        publish(store, package("a"))
        assert [row_of(store, n).serial for n in "abc"] == [1, 2, 3]
        assert contents_of(store, "c") == {"x": noise("x", 99)}
        bases = {n: row_of(store, n).base for n in "abc"}
        assert lost_rows(store) == journal_differences(store) == []
    for index in ("the one that counts", "made anew"):
        if index == "made anew":
            rebuilt(root)
        with LocalStore.open(root) as store:
            assert {n: row_of(store, n).base for n in "abc"} == bases


# --- several at once


def test_several_publish_at_once_beside_rebuilds(root: Path) -> None:
    items = [package(f"p{i}", {"x": noise(str(i % 5), 5000), "y": noise(f"y{i}", 300)}) for i in range(24)]
    ledger = Ledger({p.record.path.name: p for p in items})
    orders = [items, items[::-1], items[12:] + items[:12]]
    with (
        running(publish_groups, root, [orders[0][i : i + 2] for i in range(0, 24, 2)]) as a,
        running(publish_groups, root, [[p] for p in orders[1]]) as b,
        running(publish_groups, root, [orders[2][i : i + 6] for i in range(0, 24, 6)]) as c,
    ):
        children = [a, b, c]
        for _ in range(3):
            code, said = run(rebuild_it, root)
            assert (code, said[0][0]) == (0, "rebuilt")
        assert [child.end() for child in children] == [0, 0, 0]
        for child in children:
            for word in child.said():
                for name, base in word[1].items():
                    ledger.promise(name, base)
    assert len(ledger.bases) == 24
    assert ledger.look(root) == ledger.bases
    assert {s for frame in journal_serials(root) for s in frame} == set(range(1, 25))
    with LocalStore.open(root) as store:
        assert lost_rows(store) == journal_differences(store) == []
    rebuilt(root)
    assert ledger.look(root) == ledger.bases


def test_nothing_is_left_in_run(root: Path) -> None:
    publish_in(root, package("a"))
    assert os.listdir(root / "run") == []
