"""Removing and collecting: what goes, what stays, and what others may do meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from cidfs.errors import ChunkMissing, Damaged, IndexLost, InUse, LockTimeout
from cidfs.formats import pack
from cidfs.formats.digest import digest_of
from cidfs.local import room as room_of
from cidfs.local import tables
from cidfs.local.audit import journal_differences, lost_rows
from cidfs.local.collect import collect
from cidfs.local.packs import OWN
from cidfs.local.rebuild import rebuild
from cidfs.local.removal import Removals
from cidfs.local.rows import PathRow
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from cidfs.local.survey import Report
from tests.local.support import (
    Ledger,
    Package,
    candidates,
    contents_of,
    copy_store,
    flip,
    key_of,
    noise,
    pack_files,
    package,
    path_of,
    publish_in,
    row_of,
    rows_in,
)

SHARED = noise("shared", 5000)
KEPT = package("kept", {"a": SHARED, "b": b"kept"})
GONE = package("gone", {"a": SHARED, "c": noise("gone", 9000)}, ["kept"])


def remove_in(root: Path, *names: str, referrers: bool = False, force: bool = False) -> list[str]:
    """Remove paths in a store that is opened for just that; return the names of those that went."""
    gone: list[str] = []
    with LocalStore.open(root, write=True) as store:
        store.remove(
            [path_of(n) for n in names],
            referrers=referrers,
            force=force,
            on_removed=lambda paths: gone.extend(p.name for p in paths),
        )
    return gone


def collect_in(root: Path, *, dry_run: bool = False, at: Callable[[str, int], None] | None = None) -> Report:
    with LocalStore.open(root, write=not dry_run) as store:
        return collect(store, dry_run=dry_run, progress=at or (lambda label, left: None))


def rebuild_in(root: Path) -> None:
    report = rebuild(StateFolder.open(root), lock_timeout=5)
    assert not report.problems


def is_sound(root: Path) -> None:
    """Hold the index against journal, counts and packs."""
    with LocalStore.open(root, write=True) as store:
        assert lost_rows(store) == []
        assert journal_differences(store) == []
        for database in ("chunks", "manifests"):
            for digest, place in store.places(database):
                store.packs.read(digest, place)


def whole(root: Path, name: str) -> int:
    with LocalStore.open(root) as store:
        return row_of(store, name).whole


# --- removing


def test_a_removed_path_is_gone_and_its_references_stay(root: Path) -> None:
    publish_in(root, KEPT, GONE)
    with LocalStore.open(root, write=True) as store:
        watching = Removals(store)
        assert watching.new() == []
        assert store.remove([path_of("gone"), path_of("absent")]) == [path_of("absent")]
        assert watching.new() == [path_of("gone").base_name.encode()]
        assert watching.new() == []
        assert store.find(key_of("gone")) is None
        assert store.referrers(path_of("kept").hash_part) == []
        assert contents_of(store, "kept")["a"] == SHARED
    is_sound(root)


def test_what_is_referred_to_stays_unless_forced(root: Path) -> None:
    publish_in(root, package("a"), package("b", None, ["a"]), package("c", None, ["b", "c"]))
    with pytest.raises(InUse, match=r"-a: .*-b refers to it"):
        remove_in(root, "a")
    with pytest.raises(InUse):
        remove_in(root, "a", "b")
    before = whole(root, "c")
    assert before > 0
    assert remove_in(root, "a", force=True) == ["a"]
    assert whole(root, "b") == whole(root, "c") == 0, "valid means the whole closure"
    publish_in(root, package("a"))
    assert whole(root, "c") == whole(root, "b") == whole(root, "a") > before
    rows = rows_in(root)
    rebuild_in(root)
    assert rows_in(root)["paths"] == rows["paths"]


def test_referrers_go_first(root: Path) -> None:
    publish_in(root, package("a"), package("b", None, ["a"]), package("c", None, ["b", "c"]), package("d"))
    assert remove_in(root, "a", referrers=True) == ["c", "b", "a"]
    assert remove_in(root, "a", "d") == ["d"], "what is not there hinders nobody"
    is_sound(root)


def test_a_path_comes_back_at_other_inode_numbers(root: Path) -> None:
    first = publish_in(root, KEPT)["kept"]
    remove_in(root, "kept")
    second = publish_in(root, KEPT)["kept"]
    assert second.base >= first.base + first.count
    assert second.serial > first.serial
    is_sound(root)


def test_an_index_older_than_the_journal_is_not_written_to(root: Path, room: Path) -> None:
    publish_in(root, KEPT)
    copy_store(root / "index", room / "old")
    publish_in(root, GONE)
    shutil.rmtree(root / "index")
    copy_store(room / "old", root / "index")
    for act in (
        lambda: publish_in(root, package("x")),
        lambda: remove_in(root, "kept"),
        lambda: collect_in(root),
    ):
        with pytest.raises(IndexLost, match="older than the journal"):
            act()
    rebuild_in(root)
    assert publish_in(root, package("x"))["x"].serial == 3
    is_sound(root)


# --- collecting


def test_what_nobody_needs_goes(root: Path) -> None:
    ledger = Ledger({p.record.path.name: p for p in (KEPT, GONE)})
    publish_in(root, KEPT, GONE)
    ledger.look(root)
    assert collect_in(root).dead_chunks == 0
    remove_in(root, "gone")
    told = collect_in(root, dry_run=True)
    done = collect_in(root)
    assert (told.dead_chunks, told.dead_bytes) == (done.dead_chunks, done.dead_bytes)
    assert done.dead_chunks == 1
    assert done.dead_manifests == 1
    assert ledger.look(root).keys() == {"kept"}
    assert sum(p.stat().st_size for p in pack_files(root, "own")) < 7000
    is_sound(root)
    again = collect_in(root)
    assert (again.dead_chunks, again.packs, again.sparse, again.leftovers) == (0, 0, 0, 0)


def test_an_empty_store(root: Path) -> None:
    assert collect_in(root) == Report()
    publish_in(root, KEPT)
    remove_in(root, "kept")
    assert collect_in(root).packs == 2
    assert not pack_files(root, "own")
    assert not pack_files(root, "manifest")
    rebuild_in(root)
    is_sound(root)


def test_a_dry_run_changes_nothing(root: Path, room: Path) -> None:
    publish_in(root, KEPT, GONE)
    remove_in(root, "gone")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "lock.mdb"}
    report = collect_in(root, dry_run=True)
    assert report.dead_chunks
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "lock.mdb"} == before


@pytest.mark.parametrize("again", [False, True], ids=["", "rebuilt"])
def test_a_mount_older_than_the_removal_keeps_what_it_knows(root: Path, again: bool) -> None:
    base = publish_in(root, KEPT, GONE)["gone"].base
    state = StateFolder.open(root)
    mount = state.take_lease("mount", 3)
    remove_in(root, "gone")
    later = state.take_lease("mount", 4)
    report = collect_in(root)
    assert report.held == 1
    assert report.held_bytes > 9000
    if again:
        shutil.rmtree(root / "index")
        rebuild_in(root)
        shutil.rmtree(root / "index")  # from the checkpoint of the first
        rebuild_in(root)
        collect_in(root)
    with LocalStore.open(root) as store:
        found = store.range_of(base)
        assert found is not None
        manifest = store.read_manifest(found[1].manifest)
        for i in range(manifest.chunk_count):
            store.read_chunk(manifest.chunk(i)[0])
    mount.release()
    assert collect_in(root).ranges == 1
    with LocalStore.open(root) as store:
        assert store.range_of(base) is None
        with pytest.raises(ChunkMissing):
            store.read_chunk(digest_of(noise("gone", 9000)))
    later.release()
    rebuild_in(root)
    is_sound(root)


def test_what_a_running_ingest_found_comes_back(root: Path) -> None:
    publish_in(root, GONE, KEPT)
    remove_in(root, "gone", "kept", force=True)
    with LocalStore.open(root, write=True) as store:
        lease = store.lease("ingest")
        made = candidates(store, KEPT)  # it finds all that it needs; nothing refers to that
        report = collect(store)
        assert report.waiting == 2
        assert report.packs == 0
        assert [p for p in store.places("chunks")] == []
        (outcome,) = store.publish(made)
        assert outcome.new
        assert contents_of(store, "kept")["a"] == SHARED
        lease.release()
        collect(store)
        assert contents_of(store, "kept")["a"] == SHARED
    is_sound(root)


def test_a_pack_that_somebody_appends_to_stays(root: Path) -> None:
    publish_in(root, KEPT)
    remove_in(root, "kept")
    with LocalStore.open(root, write=True) as store:
        writer = store.pack_writer(OWN)
        place = writer.append(digest_of(b"new"), 0, b"new", 3)
        collect(store)
        writer.sync()
        writer.close()
        store.put_places("chunks", [(digest_of(b"new"), place)], writer)
        assert store.read_chunk(digest_of(b"new")) == b"new"


def test_a_pack_that_could_not_be_synced_is_copied(root: Path) -> None:
    publish_in(root, KEPT)
    (old,) = pack_files(root, "own")
    old.with_name(old.name + ".bad").touch()
    assert collect_in(root).sparse == 1
    (new,) = pack_files(root, "own")
    assert new != old
    assert not list((root / "packs").rglob("*.bad"))
    is_sound(root)


def test_sparse_packs_are_copied_and_others_are_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "ROLL_SIZE", 20_000)
    items = [package(f"p{i}", {f"f{j}": noise(f"{i}-{j}", 2000) for j in range(4)}) for i in range(12)]
    publish_in(root, *items)
    before = pack_files(root, "own")
    remove_in(root, *(f"p{i}" for i in range(6)))
    report = collect_in(root)
    after = pack_files(root, "own")
    assert report.packs >= 1
    assert report.sparse >= 1
    assert set(before) & set(after), "a pack in which all is needed is left alone"
    size = sum(p.stat().st_size for p in after)
    assert size < 6 * 4 * 2000 * 4 / 3 + 5000
    with LocalStore.open(root) as store:
        for item in items[6:]:
            assert len(contents_of(store, item.record.path.name)) == 4
    is_sound(root)
    rebuild_in(root)
    is_sound(root)


def test_without_room_for_a_copy_the_space_is_given_back_in_place(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "ROLL_SIZE", 100_000)
    items = [package(f"p{i}", {f"f{j}": noise(f"{i}-{j}", 9000) for j in range(4)}) for i in range(6)]
    publish_in(root, *items)
    before = sum(p.stat().st_blocks for p in pack_files(root, "own")) * 512
    remove_in(root, "p0", "p2", "p4")
    monkeypatch.setattr(room_of, "free_bytes", lambda folder: 0)
    report = collect_in(root)
    assert report.problems == []
    after = sum(p.stat().st_blocks for p in pack_files(root, "own")) * 512
    assert after < before * 0.7
    assert report.sparse_bytes >= before - after
    left = [item for item in items if item.record.path.name in ("p1", "p3", "p5")]
    for _ in range(2):  # also from a new index: the footers tell of frames that are holes now
        with LocalStore.open(root) as store:
            for item in left:
                assert len(contents_of(store, item.record.path.name)) == 4
            assert len(list(store.places("chunks"))) == 12
        is_sound(root)
        shutil.rmtree(root / "index")
        rebuild_in(root)
    publish_in(root, items[0])
    with LocalStore.open(root) as store:
        assert len(contents_of(store, "p0")) == 4, "what is a hole now is stored again"
    monkeypatch.undo()
    assert collect_in(root).sparse > 0, "with room, they are copied"
    assert not list((root / "packs").rglob("*.bad"))
    is_sound(root)


def test_a_copy_without_room_leaves_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_in(root, KEPT, GONE)
    remove_in(root, "gone")
    before = pack_files(root, "own")
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if "/packs/own/" in os.readlink(f"/proc/self/fd/{fd}") and len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    report = collect_in(root)
    assert any("could not be copied" in line for line in report.problems)
    assert pack_files(root, "own") == before
    is_sound(root)
    monkeypatch.undo()
    assert collect_in(root).sparse == 1
    is_sound(root)


def test_the_journal_forgets(root: Path) -> None:
    publish_in(root, *(package(f"p{i}") for i in range(100)))
    remove_in(root, *(f"p{i}" for i in range(90)))
    size = sum(p.stat().st_size for p in (root / "journal").iterdir())
    collect_in(root)
    assert sum(p.stat().st_size for p in (root / "journal").iterdir()) < size / 4
    is_sound(root)
    before = rows_in(root)["paths"]
    shutil.rmtree(root / "index")
    rebuild_in(root)
    assert rows_in(root)["paths"] == before
    assert publish_in(root, package("next"))["next"].serial == 191


# --- others at work meanwhile


def steps_of(root: Path) -> int:
    """Return how many steps a collection tells of."""
    seen: list[str] = []
    collect_in(root, at=lambda label, left: seen.append(label))
    return len(seen)


def _publish_dead(root: Path) -> Package:
    """Publish what needs just those chunks that are being collected."""
    item = package("again", {"c": noise("gone", 9000), "a": SHARED}, ["kept"])
    publish_in(root, item)
    return item


def _rebuild(root: Path) -> None:
    rebuild_in(root)


def _remove(root: Path) -> None:
    remove_in(root, "kept", force=True)


class Other:
    """Another process, begun before any index is open in this one, that acts at one step of a collection."""

    def __init__(self, act: Callable[[Path], object], root: Path, step: int) -> None:
        self._left = step
        self.done = False
        waiting, self._go = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._go)
                if os.read(waiting, 1):
                    act(root)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(waiting)

    def at(self, label: str, left: int) -> None:
        """Act when it is time."""
        self._left -= 1
        if self._left == -1:
            os.write(self._go, b"x")
            os.close(self._go)
            assert os.waitpid(self._child, 0)[1] == 0, label
            self.done = True


@pytest.mark.parametrize("act", [_publish_dead, _rebuild, _remove])
def test_others_at_any_step_of_a_collection(small: Path, room: Path, act: Callable[[Path], object]) -> None:
    publish_in(small, KEPT, GONE, package("third", {"x": noise("third", 3000)}))
    remove_in(small, "gone")
    count = steps_of(copy_store(small, room / "count"))
    assert count > 6
    for step in range(count):
        root = copy_store(small, room / str(step))
        other = Other(act, root, step)
        collect_in(root, at=other.at)
        assert other.done
        with LocalStore.open(root) as store:
            assert contents_of(store, "third")["x"] == noise("third", 3000)
            if act is not _remove:
                assert contents_of(store, "kept")["a"] == SHARED
            if act is _publish_dead:
                assert contents_of(store, "again")["c"] == noise("gone", 9000)
        is_sound(root)
        collect_in(root)
        is_sound(root)
        shutil.rmtree(root)


def test_one_collection_at_a_time(root: Path) -> None:
    with (
        LocalStore.open(root, write=True, lock_timeout=0.05) as store,
        store.state.collector_lock(1),
        pytest.raises(LockTimeout, match=r"gc\.lock"),
    ):
        collect(store)


# --- damage


def test_nothing_is_collected_where_index_and_journal_differ(root: Path) -> None:
    publish_in(root, KEPT, GONE)
    with LocalStore.open(root, write=True) as store, store.transaction() as index, index.write() as txn:
        txn.delete("paths", key_of("gone"))
    before = [p.read_bytes() for p in pack_files(root, "own")]
    with pytest.raises(Damaged, match="published in the journal and not in the index"):
        collect_in(root)
    assert [p.read_bytes() for p in pack_files(root, "own")] == before
    rebuild_in(root)
    collect_in(root)
    is_sound(root)


def test_nothing_is_collected_where_a_path_has_another_place_in_the_journal(root: Path) -> None:
    publish_in(root, KEPT, GONE)
    with LocalStore.open(root, write=True) as store, store.transaction() as index, index.write() as txn:
        row = tables.find_path(txn, key_of("gone"))
        assert row is not None
        fields = {name: getattr(row, name) for name in PathRow.__slots__}
        txn.put("paths", key_of("gone"), PathRow(**{**fields, "serial": 1}).packed())
    with pytest.raises(Damaged, match="say different things"):
        collect_in(root)


@pytest.mark.parametrize("database", ["chunks", "manifests"])
@pytest.mark.parametrize("noted", [True, False])
def test_a_lost_row_costs_no_pack(root: Path, database: str, noted: bool) -> None:
    publish_in(root, KEPT)
    with LocalStore.open(root, write=True) as store, store.transaction() as index, index.write() as txn:
        for digest, _ in list(txn.rows(database)):
            txn.drop_place(database, digest)
        if not noted:  # the count stays: as a damaged tree would
            txn.settle()
            txn.put_number(f"count:{database}", 2)
            txn._touched.clear()
    kind = {"chunks": "own", "manifests": "manifest"}[database]
    if noted and database == "chunks":
        assert "run `cidfs rebuild`" in collect_in(root).problems[-1]
    else:
        with pytest.raises(Damaged if noted else IndexLost):
            collect_in(root)
    assert len(pack_files(root, kind)) == 1
    rebuild_in(root)
    assert collect_in(root).problems == []
    with LocalStore.open(root) as store:
        assert contents_of(store, "kept")["a"] == SHARED


def test_a_path_without_its_manifest_stops_collecting_until_it_is_removed(root: Path) -> None:
    publish_in(root, KEPT)
    publish_in(root, package("third", {"x": noise("third", 3000)}))
    (manifests,) = pack_files(root, "manifest")
    with LocalStore.open(root) as store:
        place = store.place("manifests", row_of(store, "kept").manifest)
        assert place is not None
        flip(manifests, place.offset + 70)
    with pytest.raises(Damaged, match=r"kept: its manifest cannot be read"):
        collect_in(root)
    remove_in(root, "kept")
    collect_in(root)
    is_sound(root)


def test_a_damaged_frame_is_not_copied(root: Path) -> None:
    publish_in(root, KEPT, GONE)
    remove_in(root, "gone")
    (own,) = pack_files(root, "own")
    with LocalStore.open(root) as store:
        place = store.place("chunks", digest_of(SHARED))
        assert place is not None
    flip(own, place.offset + 60)
    report = collect_in(root)
    assert any(str(own) in line for line in report.problems)
    assert own in pack_files(root, "own"), "what is left of it may still be repaired"


# --- leftovers and room


def test_leftovers_go(root: Path) -> None:
    publish_in(root, KEPT)
    litter = [
        root / "packs" / "own" / "00" / "000000000000000000000000.new",
        root / "packs" / "own" / "00" / "000000000000000000000000.bad",
        root / "journal" / "2.tmp-123-0badcafe",
        root / "next-inode.tmp-123-0badcafe",
        root / "index" / "current.tmp-123-0badcafe",
        root / "index" / "rebuild-123-0badcafe" / "data.mdb",
        root / "index" / "77" / "data.mdb",
        root / "run" / "mount-4194305.log",
        root / "run" / "ingest-4194305-0badcafe.lease",
        root / "run" / "ingest-4194305-0badcafe.sock",
        root / "run" / "mount-4194305-0badcafe.new",
    ]
    for path in litter:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if path.suffix == ".log" else b"left")
    said = root / "run" / "mount-4194306.log"
    said.write_text("what a daemon said before it died\n")
    (root / "journal" / "3.tmp").write_text("not ours")
    assert collect_in(root, dry_run=True).leftovers == len(litter)
    assert all(p.exists() for p in litter)
    assert collect_in(root).leftovers == len(litter)
    assert not [p for p in litter if p.exists()]
    assert not (root / "index" / "rebuild-123-0badcafe").exists()
    assert said.exists()
    assert (root / "journal" / "3.tmp").exists()
    is_sound(root)


def test_the_ballast_goes_on_a_full_disk_and_comes_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_in(root, KEPT)
    room_of.restore(root)
    assert (root / "ballast").stat().st_blocks * 512 >= room_of.BALLAST
    monkeypatch.setattr(room_of, "free_bytes", lambda folder: 0)
    collect_in(root)
    assert not (root / "ballast").exists()
    monkeypatch.undo()
    collect_in(root)
    assert (root / "ballast").stat().st_size == room_of.BALLAST
    (root / "ballast").unlink()
    monkeypatch.setattr(room_of, "free_bytes", lambda folder: room_of.BALLAST)
    room_of.restore(root)
    assert (root / "ballast").stat().st_size == room_of.BALLAST // 2, "half of what is left"
