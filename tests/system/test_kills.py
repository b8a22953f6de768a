"""Command lines that are killed at each of their calls in turn, and at random moments beside a running mount.

The store opens, nothing half is visible, verification finds nothing, the same command succeeds afterwards,
and a collection finds and frees what was left behind.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.commands import Store
from tests.local.conftest import empty_store, room, root, small
from tests.local.support import copy_store, few_urandom
from tests.power.conftest import SmallDisk, commands, disk, library, material
from tests.power.judge import (
    DEAD_SHARE,
    SLACK,
    Known,
    Promises,
    is_tidy,
    known_in,
    look,
    rebuild_in,
    size_of,
)
from tests.power.material import Material
from tests.power.runner import KILLED, Runner, runner
from tests.power.shares import in_shares, is_mine
from tests.system.support import describe, make_files, noise

__all__ = ["commands", "disk", "empty_store", "library", "material", "room", "root", "small"]

ONE_OF = 1 if Store.long else 10  # of the calls at which a command is killed
ROUNDS = 30 if Store.long else 3


@dataclass
class Scene:
    """A command on a store, and what may be visible when it is killed."""

    state: Path
    words: list[str]
    paths: list[str]
    stdin: str = os.devnull
    known: dict[str, Known] = field(default_factory=dict)
    promises: Promises = field(default_factory=Promises)
    size: int = 0  # of the store when nobody was killed, collected

    def play(self, commands: Runner, here: Path) -> None:
        """Note what there is before the command, after it, and after a collection."""
        self.known = known_in(self.state)
        self.promises.must |= set(self.known)
        commands.run(here, *self.words, stdin=Path(self.stdin)).good()
        self.known = known_in(here, before=self.known)
        commands.run(here, "gc").good()
        self.size = size_of(here)

    def goes_on(self, commands: Runner, here: Path, out: list[str]) -> tuple[Promises, dict[str, int]]:
        """Check what the command left that ended early and said `out`; now it succeeds, and so does gc.

        Return what is promised then, and base by path.
        """
        promises, words = self.promises.copy(), self.words
        promises.begin(words[0], self.paths)
        promises.done(words[0], [line for line in out if line.startswith("/nix/store/")])
        before = look(here, self.known, promises)
        if words[0] == "remove":
            words = ["remove", *(p for p in self.paths if p in before)]
        if len(words) > 1 or words[0] != "remove":
            commands.run(here, *words, stdin=Path(self.stdin)).good()
        promises.done(words[0], self.paths)
        after = look(here, self.known, promises, verified=False)
        assert all(after[p] == base for p, base in before.items() if p in after)
        commands.run(here, "gc").good()
        assert look(here, self.known, promises) == after
        is_tidy(here)
        return promises, after


def kill_share(pipe: Connection, part: int, parts: int, library: Path, room: Path, scene: Scene) -> None:
    """Kill the command of a scene at a share of its calls, before them and in the middle of their bytes."""
    os.urandom = few_urandom
    with runner(library) as commands:
        here = copy_store(scene.state, room / f"store-{part}")
        calls = commands.run(here, *scene.words, stdin=Path(scene.stdin)).calls
        shutil.rmtree(here)
        cases = [(n, tear) for n in range(1, calls + 1) for tear in (False, True)]
        mine = [case for case in cases if is_mine(case, part, parts)]
        killed = 0
        for kill_at, tear in mine:
            pipe.send(f"{scene.words} is killed at call {kill_at}{', in the middle of it' * tear}")
            here = copy_store(scene.state, room / f"store-{part}")
            killed += kill_once(commands, scene, here, kill_at, tear)
            shutil.rmtree(here)
    assert killed * 2 >= len(mine), "hardly a command was killed"
    pipe.send(len(mine))


def kill_once(commands: Runner, scene: Scene, here: Path, kill_at: int, tear: bool) -> bool:
    """Kill a command at one call, and check all that follows; say whether it was killed."""
    done = commands.run(here, *scene.words, stdin=Path(scene.stdin), kill_at=kill_at, tear=tear)
    if done.code != KILLED:  # it took another way: nothing to append, or one pack less
        done.good()
    promises, after = scene.goes_on(commands, here, done.out)
    assert size_of(here) <= scene.size * DEAD_SHARE + SLACK
    shutil.rmtree(here / "index")
    rebuild_in(here)
    assert look(here, scene.known, promises, verified=False) == after
    return done.code == KILLED


@pytest.fixture
def base(small: Path, commands: Runner, material: Material) -> Path:
    """A store with three paths in it, one of which was removed; nothing was collected."""
    commands.run(small, "add", *(material.source(n) for n in ("alpha", "beta", "delta"))).good()
    commands.run(small, "remove", *material.of("beta")).good()
    return small


def scenes(name: str, state: Path, material: Material) -> Scene:
    """Return a command and what it brings or takes."""
    match name:
        case "add":
            new = ("gamma", "beta", "alpha")
            return Scene(state, ["add", *(str(material.source(n)) for n in new)], material.of(*new))
        case "import":
            paths = material.of("top", "base")
            return Scene(state, ["import", paths[0], "--from", str(material.nix_root)], paths)
        case "import of a NAR":
            words = ["import", "-", "--name", "piped"]
            return Scene(state, words, material.of("piped"), str(material.nar))
        case "remove":
            paths = material.of("alpha", "delta")
            return Scene(state, ["remove", *paths], paths)
    return Scene(state, [name], [])


@pytest.mark.parametrize("name", ["add", "import", "import of a NAR", "remove", "gc", "rebuild"])
def test_killed_at_any_call(
    base: Path,
    room: Path,
    commands: Runner,
    library: Path,
    material: Material,
    name: str,
) -> None:
    scene = scenes(name, base, material)
    scene.play(commands, copy_store(base, room / "whole"))
    assert in_shares(kill_share, ONE_OF, library, room, scene) >= 20 // ONE_OF


@pytest.mark.parametrize("disk", ["8m"], indirect=True)
def test_killed_while_a_full_disk_is_collected(
    base: Path, disk: SmallDisk, commands: Runner, library: Path, material: Material
) -> None:
    """There is no room for copies: what is dead is taken out of packs in place."""
    scene = scenes("gc", base, material)
    scene.play(commands, copy_store(base, disk.folder / "whole"))
    shutil.rmtree(disk.folder / "whole")
    assert in_shares(kill_share, ONE_OF, library, disk.folder, scene) >= 20 // ONE_OF


class Reader(threading.Thread):
    """Reads store paths through a mount, over and over, and keeps the first thing that is wrong."""

    def __init__(self, trees: dict[Path, Path]) -> None:
        super().__init__(daemon=True)
        self._expected = {path: describe(source) for path, source in trees.items()}
        self._ended = threading.Event()
        self.turns, self.wrong = 0, ""

    def run(self) -> None:
        """Read until told to stop."""
        while not self._ended.is_set() and not self.wrong:
            for path, nodes in self._expected.items():
                try:
                    if describe(path) != nodes:
                        self.wrong = f"{path}: not what it was"
                except OSError as e:
                    self.wrong = str(e)
            self.turns += 1

    def end(self) -> None:
        """Stop reading, and fail if anything was wrong."""
        self._ended.set()
        self.join(60)
        assert not self.is_alive(), "a read through the mount does not end"
        assert not self.wrong
        assert self.turns > 1


def test_killed_at_random_moments_beside_a_mount(store: Store, tmp_path: Path, mountpoint: Path) -> None:
    """Processes of their own, one killed after the other; whoever reads through the mount sees nothing."""
    trees = [
        make_files(
            tmp_path / f"tree-{i}",
            {
                b"own": noise(f"own {i}", 800_000),
                b"shared/a": noise("shared", 400_000),
                b"shared/b": noise(f"b {i % 3}", 200_000),
                **{b"small/%d" % j: b"%d %d" % (i % 2, j) for j in range(50)},
            },
        )
        for i in range(6)
    ]
    paths = dict(zip(store.lines("add", *trees), trees, strict=True))
    known = {path: Known(k.nar_hash, frozenset()) for path, k in known_in(store.state).items()}
    kept, others = list(paths)[:2], list(paths)[2:]
    store.mount(mountpoint)
    reader = Reader({mountpoint / Path(path).name: paths[path] for path in kept})
    reader.start()
    chance = random.Random(1)
    promises = Promises(set(paths), set())
    try:
        for _ in range(ROUNDS):
            taken = chance.sample(others, 2)
            for words, touched in (
                (["remove", *taken], taken),
                (["gc"], []),
                (["add", *(str(paths[p]) for p in taken)], taken),
                (["rebuild"], []),
            ):
                promises.begin(words[0], touched)
                there = look(store.state, known, promises)
                if words[0] == "remove":
                    words = ["remove", *(p for p in taken if p in there)]
                kill_at_random(store, words, chance)
                look(store.state, known, promises)
        for words in (["gc"], ["rebuild"], ["add", *map(str, trees)], ["gc"]):
            store.run(*words)
        promises.done("add", paths)
        look(store.state, known, promises)
    finally:
        reader.end()
    store.umount(mountpoint)
    store.run("gc")
    is_tidy(store.state)
    assert set(look(store.state, known, promises)) == set(paths)


def kill_at_random(store: Store, words: list[str], chance: random.Random) -> None:
    """Kill a command after some time, most of which it needs to begin at all."""
    if len(words) == 1 and words[0] == "remove":
        return
    process = store.start(*words)
    began = time.monotonic()
    try:
        process.wait(chance.uniform(0.2, 0.8))
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    assert process.returncode in (0, -9), f"{words}: {process.returncode} after {time.monotonic() - began} s"
