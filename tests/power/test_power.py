"""The power goes at each sync of real command lines, and takes what was not synced, or a part of it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Store
from tests.local.support import copy_store, few_urandom
from tests.power.conftest import SmallDisk
from tests.power.judge import Known, Promises, judge, known_in
from tests.power.material import Material
from tests.power.replay import KEPT, VARIANTS, Disk, Op, Variant, contents, read_log, write_out
from tests.power.runner import KILLED, Done, Runner, runner
from tests.power.shares import PROCESSES, in_shares, is_mine

SHARE = 1 if Store.long else 6  # of the moments at which the power goes, one of so many
SMALL_PACK = 100_000
SEEDS = 6 if Store.long else 1  # of each way in which chance decides what is left


@dataclass
class Story:
    """Command lines on one store, one after the other, recorded."""

    commands: Runner
    state: Path
    log: Path
    root: Path  # what is recorded: the state folder, or one above it
    disk: Disk = field(init=False)
    known: dict[str, Known] = field(default_factory=dict)
    promises: Promises = field(default_factory=Promises)
    roll: int = 0  # the size at which packs are sealed

    def __post_init__(self) -> None:
        if self.state.exists():
            self.known = known_in(self.state)
            self.promises.must |= set(self.known)
        self.disk = Disk(self.root)

    def run(self, *words: str | Path, paths: Sequence[str] = (), **more: Any) -> Done:
        """Run a command line, then note what is known of what is there."""
        done = self.play(*words, paths=paths, **more)
        if (self.state / "index" / "current").exists():
            self.known = known_in(self.state, before=self.known)
        return done

    def play(
        self, *words: str | Path, paths: Sequence[str] = (), by: Runner | None = None, **more: Any
    ) -> Done:
        """Run a command line to its end; paths are those that it brings or takes."""
        mark = {"command": words[0], "begins": True, "paths": list(paths)}
        done = (by or self.commands).run(
            self.state, *words, root=self.root, log=self.log, mark=mark, roll=self.roll, **more
        )
        if done.code == 0:
            text = json.dumps({**mark, "begins": False}).encode()
            with open(self.log, "ab") as file:
                file.write(struct.pack("<IIQqIIII", Op.MARK, 0, 0, 0, 0, len(text), 0, 0) + text)
        return done


def judge_share(
    pipe: Connection, part: int, parts: int, told: Path, room: Path, since: int, reports: bool, few: bool
) -> None:
    """Judge one share of the moments of a story at which the power may go."""
    os.urandom = few_urandom
    told_us: tuple[Disk, Path, str, dict[str, Known], Promises] = pickle.loads(told.read_bytes())
    disk, log, inner, known, promises = told_us
    states, seen = 0, set()
    for point, event in enumerate(read_log(log)):
        promises.hear(event)
        disk.apply(event)
        report = event.op == Op.OUT or (event.op == Op.MARK and not event.mark()["begins"])
        sync = not reports and (event.op == Op.SYNC or event.durable)
        mine = is_mine(point, part, parts) if sync else report and point % PROCESSES == part
        for variant, seed in ways(few) if mine and point >= since else ():
            left = disk.left(variant, point * 1000 + seed)
            key = state_key(left, promises)
            if key in seen:
                continue
            seen.add(key)
            pipe.send(
                f"the power goes at record {point} ({event}), {variant.name}, seed {point * 1000 + seed}"
            )

            def make(left: dict[str, bytes | None] = left) -> Path:
                shutil.rmtree(room / f"store-{part}", ignore_errors=True)
                return write_out(left, room / f"store-{part}").joinpath(inner)

            judge(make, known, promises.copy(), -1 if report else states)
            states += 1
        disk.settle(event)
    pipe.send(states)


def state_key(left: dict[str, bytes | None], promises: Promises) -> bytes:
    """Return a digest of a state and of what is promised of it."""
    digest = hashlib.blake2b(repr((sorted(promises.must), sorted(promises.may))).encode())
    for name, data in sorted(left.items()):
        digest.update(f"{name}\0{-1 if data is None else len(data)}\0".encode())
        digest.update(data or b"")
    return digest.digest()


def ways(few: bool) -> list[tuple[Variant, int]]:
    """Return what may be left of what was not synced, and seeds for what is left to chance."""
    variants = VARIANTS[::3] if few and not Store.long else VARIANTS
    return [(v, seed) for v in variants for seed in range(SEEDS if {v.names, v.data} - {0, 1} else 1)]


def judge_story(story: Story, room: Path, *, since: int = 0, reports: bool = False, few: bool = False) -> int:
    """Judge what a power loss leaves of a story, from a record on; return how many states that were.

    With reports, only when something was reported or a command ends, else at each sync too. With few, not all
    that may be left is tried in a short run.
    """
    compare_with_folder(story)
    told = room / "told"
    inner = str(story.state.relative_to(story.root))
    told.write_bytes(pickle.dumps((story.disk, story.log, inner, story.known, story.promises)))
    return in_shares(judge_share, 1 if reports else SHARE, told, room, since, reports, few)


def compare_with_folder(story: Story) -> None:
    """Fail unless the record, replayed with nothing lost, gives the folder as it is: it has all calls."""
    disk = pickle.loads(pickle.dumps(story.disk))
    for event in read_log(story.log):
        disk.apply(event)
        disk.settle(event)
    left, there = disk.left(KEPT, 0), contents(story.root)
    assert {n for n in {*left, *there} if left.get(n, 0) != there.get(n, 0)} == set()


@pytest.fixture
def story(small: Path, room: Path, commands: Runner, material: Material) -> Story:
    """A store with two paths in it; what follows is recorded."""
    commands.run(small, "add", material.source("alpha"), material.source("beta")).good()
    return Story(commands, small, room / "log", small)


def test_power_goes_while_paths_are_added(story: Story, room: Path, material: Material) -> None:
    new = material.source("gamma"), material.source("delta")
    story.run("add", *new, paths=material.of("gamma", "delta")).good()
    story.run("add", material.source("alpha"), paths=material.of("alpha")).good()
    assert judge_story(story, room) >= 100 // SHARE


def test_power_goes_while_paths_are_imported(story: Story, room: Path, material: Material) -> None:
    """Into packs that are sealed on the way."""
    story.roll = SMALL_PACK
    story.run("import", "-", "--name", "piped", stdin=material.nar, paths=material.of("piped")).good()
    there = material.of("top", "base")
    story.run("import", there[0], "--from", material.nix_root, paths=there).good()
    assert judge_story(story, room) >= 100 // SHARE


def test_power_goes_during_a_rebuild(story: Story, room: Path, material: Material) -> None:
    """Of an index that is well, and of one that knows what the journal does not."""
    story.run("rebuild").good()
    other = Story(story.commands, copy_store(story.state, room / "other"), room / "other-log", room / "other")
    other.run("add", material.source("gamma")).good()
    calls = [event for event in read_log(other.log) if event.op != Op.MARK]
    journal = next(i for i, event in enumerate(calls) if event.op == Op.SYNC and "journal/" in event.first)
    added = story.run("add", material.source("gamma"), paths=material.of("gamma"), kill_at=journal)
    assert added.code == KILLED
    assert material.paths["gamma"] in story.known, "it was to be killed between commit and journal"
    story.run("rebuild").good()
    assert judge_story(story, room) >= 100 // SHARE


@pytest.mark.parametrize("sealed", [False, True])
def test_power_goes_during_removal_and_collection(
    story: Story, room: Path, material: Material, sealed: bool
) -> None:
    """Of frames in open packs, and in packs that are sealed."""
    story.roll = SMALL_PACK if sealed else 0
    story.run("add", material.source("gamma"), paths=material.of("gamma")).good()
    story.run("remove", *material.of("beta"), paths=material.of("beta")).good()
    story.run("gc").good()
    story.run("add", material.source("beta"), paths=material.of("beta")).good()
    story.run("remove", *material.of("alpha", "gamma"), paths=material.of("alpha", "gamma")).good()
    story.run("gc").good()
    assert judge_story(story, room, few=True) >= 100 // SHARE


@pytest.mark.parametrize("disk", ["7m"], indirect=True)
def test_power_goes_while_a_full_disk_is_collected(
    small: Path, room: Path, disk: SmallDisk, commands: Runner, material: Material
) -> None:
    """There is no room for copies: what is dead is taken out of packs in place."""
    here = copy_store(small, disk.folder / "state")
    commands.run(here, "add", *map(material.source, ("alpha", "beta", "gamma")), roll=SMALL_PACK).good()
    story = Story(commands, here, room / "log", here)
    story.run("remove", *material.of("beta"), paths=material.of("beta")).good()
    story.run("gc").good()
    assert any(event.op == Op.HOLE for event in read_log(story.log))
    story.run("add", material.source("beta"), paths=material.of("beta")).good()
    assert judge_story(story, room, few=True) >= 60 // SHARE


def test_power_goes_while_a_store_is_made(room: Path, commands: Runner, material: Material) -> None:
    """In a folder whose parents are made with it."""
    disk = room / "disk"
    disk.mkdir()
    state = disk / "not" / "there" / "state"
    story = Story(commands, state, room / "log", disk)
    story.run("add", material.source("alpha"), paths=material.of("alpha")).good()
    assert judge_story(story, room, few=True) >= 12 // SHARE


@pytest.mark.parametrize("next_command", ["add", "rebuild", "gc"])
def test_power_goes_after_another_went_on_where_one_was_killed(
    small: Path, room: Path, commands: Runner, material: Material, next_command: str
) -> None:
    """What the killed one had not synced, and the other relied on, is lost unless that one synced it."""
    commands.run(small, "add", material.source("alpha"), material.source("beta")).good()
    new = material.of("gamma")
    whole = commands.run(copy_store(small, room / "whole"), "add", material.source("gamma")).good()
    states, killed, step = 0, 0, 1 if Store.long else 9
    for kill_at in range(1 + len(next_command), whole.calls, step):
        here = copy_store(small, room / f"store-{kill_at}")
        story = Story(commands, here, room / f"log-{kill_at}", here)
        killed += story.run("add", material.source("gamma"), paths=new, kill_at=kill_at).code == KILLED
        since = len(read_log(story.log))
        words = [material.source("gamma")] if next_command == "add" else []
        story.run(next_command, *words, paths=new if words else ()).good()
        states += judge_story(story, room, since=since, reports=True, few=True)
        shutil.rmtree(here)
    assert killed >= whole.calls // step // 2, "hardly an add was killed"
    assert states >= whole.calls // step


def test_power_goes_while_several_are_at_work(
    story: Story, room: Path, library: Path, material: Material
) -> None:
    """Two adds, one of what was removed, and collections: all at once, in one record."""
    story.run("remove", *material.of("beta"), paths=material.of("beta")).good()

    def work(*lines: Sequence[str | Path]) -> None:
        with runner(library) as other:
            for words in lines:
                paths = material.of(*(Path(word).name for word in words[1:]))
                story.play(*words, paths=paths, by=other).good()

    with ThreadPoolExecutor() as pool:
        done = [
            pool.submit(work, ["add", material.source("gamma")], ["add", material.source("beta")]),
            pool.submit(work, ["add", material.source("delta"), material.source("epsilon")]),
            pool.submit(work, ["gc"], ["gc"]),
        ]
    for each in done:
        each.result()
    story.known = known_in(story.state, before=story.known)
    assert judge_story(story, room, few=True) >= 60 // SHARE
