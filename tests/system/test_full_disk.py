"""A disk that is full at any point: one line of error, nothing lost, and removing makes room at once."""

from __future__ import annotations

import os
import shutil
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cidfs.errors import DiskFailed, exit_code
from cidfs.local.room import restore
from tests.commands import Store, store_in
from tests.local.conftest import empty_store, room, root, small
from tests.local.support import copy_store, few_urandom
from tests.power.conftest import SmallDisk, commands, disk, library, material
from tests.power.judge import is_tidy, look
from tests.power.material import Material
from tests.power.runner import Runner, runner
from tests.power.shares import in_shares, is_mine
from tests.system.support import describe, make_files, noise
from tests.system.test_kills import Scene, base, scenes

__all__ = ["base", "commands", "disk", "empty_store", "library", "material", "room", "root", "small"]

FULL = exit_code(DiskFailed(""))
ONE_OF = 1 if Store.long else 10  # of the calls from which on the disk is full
STEP = 4 << 10 if Store.long else 96 << 10  # from one amount of free space to the next


@pytest.mark.parametrize("name", ["add", "import", "remove", "gc", "rebuild"])
def test_little_room_is_left(
    base: Path, disk: SmallDisk, commands: Runner, material: Material, name: str
) -> None:
    """None, a page, a few more: the command ends well or with one line, and a removal makes room."""
    scene = scenes(name, base, material)
    scene.play(commands, copy_store(base, base.with_name("whole")))
    failed = left = 0
    while left == 0 or failed:
        disk.empty()
        here = copy_store(base, disk.folder / "state")
        restore(here)  # the ballast, that small stores of these tests do without
        disk.fill(left)
        failed = run_when_full(commands, scene, here)
        shutil.rmtree(here)
        left += STEP
        assert left < 8 << 20
    assert left > STEP or name in ("remove", "gc"), "the disk was never full"


def run_when_full(commands: Runner, scene: Scene, here: Path) -> int:
    """Run the command of a scene, then make room on the disk, which nobody else does; return its code."""
    promises = scene.promises.copy()
    promises.begin(scene.words[0], scene.paths)
    done = commands.run(here, *scene.words, stdin=Path(scene.stdin))
    if done.code:
        line = done.failed(FULL)
        assert "full" in line, line
        assert scene.words[0] not in ("remove", "gc"), f"there was a ballast: {line}"
    promises.done(scene.words[0], [line for line in done.out if line.startswith("/nix/store/")])
    there = look(here, scene.known, promises)
    for victim in sorted(there)[:1]:
        commands.run(here, "remove", victim).good()
        promises.begin("remove", [victim])
        promises.done("remove", [victim])
        del there[victim]
    commands.run(here, "gc").good()
    assert look(here, scene.known, promises) == there
    is_tidy(here)
    return done.code


@pytest.mark.parametrize("disk", ["192m"], indirect=True)
def test_full_again_and_again_below_a_mount(disk: SmallDisk, tmp_path: Path) -> None:
    """What is here can be read all the time, removal and collection work each time, and then adding does."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    trees = [tree_of(tmp_path, i) for i in range(12 if Store.long else 4)]
    expected = {tree.name: describe(tree) for tree in trees}

    def is_whole() -> None:
        for name in here:
            assert describe(mountpoint / name) == expected[name[33:]]

    with store_in(disk.folder) as store:
        here = store.add(*trees[:2])
        store.mount(mountpoint)
        for tree in trees[2:]:
            disk.fill()
            assert "full" in store.error("add", tree, code=FULL)
            is_whole()
            store.error("rebuild", code=FULL)
            is_whole()
            gone = here.pop(0)
            store.run("remove", gone)
            store.run("gc")
            is_whole()
            assert not (mountpoint / gone).exists()
            store.umount(mountpoint)  # till then, what was removed can be read on by who has it open
            store.mount(mountpoint)
            store.run("gc")
            here += store.add(tree)
            is_whole()
        store.umount(mountpoint)
        disk.empty()
        store.run("verify")


def tree_of(folder: Path, number: int) -> Path:
    """Make a tree, each a little smaller than the one before."""
    size = 1_500_000 - 60_000 * number
    files = {b"a": noise(f"a{number}", size), b"b/c": noise(f"c{number}", 700_000), b"d": noise("d", 100_000)}
    return make_files(folder / f"tree-{number}", files)


def full_share(pipe: Connection, part: int, parts: int, library: Path, room: Path, scene: Scene) -> None:
    """Let the disk be full from a share of a command's calls on, in each way."""
    os.urandom = few_urandom
    with runner(library) as commands:
        here = copy_store(scene.state, room / f"store-{part}")
        calls = commands.run(here, *scene.words, stdin=Path(scene.stdin)).calls
        shutil.rmtree(here)
        cases = [(n, tear, mode) for n in range(1, calls + 1) for tear in (False, True) for mode in (1, 2)]
        mine = [case for case in cases if is_mine(case, part, parts)]
        failed = 0
        for full_at, tear, mode in mine:
            pipe.send(
                f"{scene.words}: full from call {full_at} on, mode {mode}{', with a torn write' * tear}"
            )
            here = copy_store(scene.state, room / f"store-{part}")
            stdin = Path(scene.stdin)
            done = commands.run(here, *scene.words, stdin=stdin, full_at=full_at, tear=tear, mode=mode)
            if done.code:
                done.failed(FULL)
                failed += 1
            scene.goes_on(commands, here, done.out)
            shutil.rmtree(here)
    assert failed or scene.words[0] in ("remove", "gc"), "the disk was never full"
    pipe.send(len(mine))


@pytest.mark.parametrize("name", ["add", "import", "remove", "gc", "rebuild"])
def test_full_from_any_call_on(
    base: Path, room: Path, commands: Runner, library: Path, material: Material, name: str
) -> None:
    """Files cannot grow any more, or nothing can be written or synced at all; later there is room again."""
    scene = scenes(name, base, material)
    scene.play(commands, copy_store(base, room / "whole"))
    assert in_shares(full_share, ONE_OF, library, room, scene) >= 40 // ONE_OF
