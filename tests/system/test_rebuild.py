"""The index is lost, or made anew: nothing that anyone can see changes, and nobody has to stop for it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from cidfs.local.store import LocalStore
from tests.commands import Store, wait_until
from tests.system.support import describe, inodes, make_files, noise
from tests.system.test_at_once import (
    STOP_IN_THE_TRANSACTION,
    assert_sound,
    overlapping_tree,
    wait_until_stopped,
)

STOP_BETWEEN_THE_STEPS = """
import signal, threading
from cidfs.local.packs import PackWriter
from cidfs.local.store import LocalStore
def stop_once(owner, name, before):
    whole = getattr(owner, name)
    def stopping(self, *args):
        setattr(owner, name, whole)
        result = None if before else whole(self, *args)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return whole(self, *args) if before else result
    setattr(owner, name, stopping)
stop_once(PackWriter, "append_many", False)
stop_once(PackWriter, "sync", False)
stop_once(LocalStore, "put_places", False)
stop_once(LocalStore, "publish", True)
"""
STOPS = 4

STOP_BEFORE_THE_JOURNAL = """
import signal, threading
from cidfs.local.journal import Journal
append = Journal.append
def stop(self, data):
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    append(self, data)
Journal.append = stop
"""


def trees_in(folder: Path, count: int) -> list[Path]:
    """Make a few trees that share contents."""
    return [overlapping_tree(folder, number) for number in range(count)]


def infos(store: Store) -> dict[str, object]:
    """Return all that the index knows of every path: rows with inode numbers and serials, and records."""
    with LocalStore.open(store.state) as opened:
        return {str(p.path): (p.row, opened.record_of(p.path.hash_part)) for p in opened.paths()}


def numbers_in(mountpoint: Path, names: list[str]) -> dict[str, dict[bytes, int]]:
    """Return all inode numbers of some paths."""
    return {name: inodes(mountpoint / name) for name in names}


def test_a_lost_index_is_made_anew_under_a_running_mount(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    trees = trees_in(folder, 4)
    names = store.add(*trees)
    before = infos(store)
    for name in ("before", "after"):
        (folder / name).mkdir()
    store.mount(folder / "before")
    numbers = numbers_in(folder / "before", names)
    store.umount(folder / "before")
    store.mount(mountpoint)
    assert describe(mountpoint / names[0]) == describe(trees[0])

    shutil.rmtree(store.state / "index")
    assert describe(mountpoint / names[1]) == describe(trees[1])
    fresh = make_files(folder / "fresh", {b"file": b"fresh"})
    for command in (("add", fresh), ("ls",), ("mount", folder / "after"), ("verify",), ("stats",)):
        assert "rebuild`" in store.error(*command, code=12)
    assert os.listdir(folder / "after") == []

    store.run("rebuild")
    assert infos(store) == before
    store.mount(folder / "after")
    for mounted in (mountpoint, folder / "after"):  # the first had not seen the last two paths yet
        assert numbers_in(mounted, names) == numbers
        for name, tree in zip(names, trees, strict=True):
            assert describe(mounted / name) == describe(tree)
    (added,) = store.add(fresh)
    for mounted in (mountpoint, folder / "after"):
        wait_until((mounted / added).exists)
        assert describe(mounted / added) == describe(fresh)
    taken = {number for path in numbers.values() for number in path.values()}
    assert not taken & set(inodes(mountpoint / added).values())
    assert_sound(store)


@pytest.mark.parametrize("lost", ["current", "1", "1/data.mdb"])
def test_any_part_of_the_index_that_is_lost_is_made_anew(store: Store, lost: str) -> None:
    folder = store.state.parent
    names = store.add(*(make_files(folder / f"tree-{i}", {b"file": noise(i, 70_000)}) for i in range(3)))
    before = infos(store)
    victim = store.state / "index" / lost
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    assert "rebuild`" in store.error("add", folder / "tree-0", code=12)
    store.run("rebuild")
    assert infos(store) == before
    assert store.add(folder / "tree-0") == names[:1]
    assert_sound(store)


def test_rebuilding_twice_with_nothing_wrong_changes_nothing(store: Store, mountpoint: Path) -> None:
    trees = trees_in(store.state.parent, 2)
    names = store.add(*trees)
    before = infos(store)
    figures = store.stats()["store"]
    store.mount(mountpoint)
    numbers = numbers_in(mountpoint, names)
    for _ in range(2):
        done = store.run("rebuild").stderr.decode().splitlines()
        assert len(done) == 1, done
        assert "2 store paths" in done[0]
    assert infos(store) == before
    assert numbers_in(mountpoint, names) == numbers
    now = store.stats()["store"]
    may_differ = {"next_inode", "index_bytes", "disk_bytes", "overall_factor"}
    assert {k: v for k, v in now.items() if k not in may_differ} == {
        k: v for k, v in figures.items() if k not in may_differ
    }
    assert_sound(store)


def test_two_rebuilds_at_once_are_as_good_as_one(store: Store) -> None:
    store.add(*trees_in(store.state.parent, 3))
    before = infos(store)
    for process in [store.start("rebuild") for _ in range(3)]:
        store.finish(process)
    assert infos(store) == before
    assert [p.name for p in (store.state / "index").iterdir() if p.name.startswith("rebuild")] == []
    assert len(list((store.state / "index").iterdir())) == 2
    assert_sound(store)


def test_a_rebuild_at_each_step_of_an_add_loses_nothing(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    trees = trees_in(folder, 3)
    (first,) = store.add(trees[0])
    store.mount(mountpoint)
    adding = store.start("add", *trees[1:], hook=STOP_BETWEEN_THE_STEPS)
    for _ in range(STOPS):
        wait_until_stopped(adding)
        store.run("rebuild")
        adding.send_signal(signal.SIGCONT)
    lines, _ = store.finish(adding)
    names = [first, *(Path(line).name for line in lines)]
    assert len(names) == 3
    for name, tree in zip(names, trees, strict=True):
        wait_until((mountpoint / name).exists)
        assert describe(mountpoint / name) == describe(tree)
    assert_sound(store)


def test_rebuilds_beside_a_big_add_lose_nothing(store: Store) -> None:
    folder = store.state.parent
    trees = [
        make_files(folder / f"big-{i}", {b"%d" % j: noise(100 * i + j, 1 << 20) for j in range(8)})
        for i in range(6)
    ]
    adding = store.start("add", *trees)
    assert adding.stdout is not None
    lines = [adding.stdout.readline().decode().strip()]
    while adding.poll() is None:
        store.run("rebuild")
    lines += store.finish(adding)[0]
    assert sorted(store.lines("ls")) == sorted(lines)
    assert len(lines) == 6
    assert_sound(store)


def test_a_path_that_the_journal_does_not_have_yet_outlives_a_rebuild(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    trees = trees_in(folder, 2)
    store.add(trees[0])
    store.mount(mountpoint)
    (name,) = Store(folder / "other-state").add(trees[1])
    killed = store.start("add", trees[1], hook=STOP_BEFORE_THE_JOURNAL)
    wait_until_stopped(killed)
    numbers = inodes(mountpoint / name)  # the commit is the commit
    assert "stopped)" in store.error("--lock-timeout", "0.2", "rebuild", code=13)
    killed.kill()
    assert store.finish(killed, code=-signal.SIGKILL)[0] == []
    store.run("rebuild")
    (folder / "after").mkdir()
    store.mount(folder / "after")
    assert inodes(folder / "after" / name) == numbers
    assert describe(mountpoint / name) == describe(trees[1])
    assert store.add(trees[1]) == [name]
    assert_sound(store)


def test_an_add_killed_in_its_transaction_leaves_a_store_that_rebuilds(store: Store) -> None:
    trees = trees_in(store.state.parent, 2)
    names = store.add(trees[0])
    killed = store.start("add", trees[1], hook=STOP_IN_THE_TRANSACTION.format(database="paths"))
    wait_until_stopped(killed)
    killed.kill()
    killed.communicate()
    shutil.rmtree(store.state / "index")
    store.run("rebuild")
    assert store.lines("ls") == [f"/nix/store/{name}" for name in names]
    names += store.add(trees[1])
    assert_sound(store)
