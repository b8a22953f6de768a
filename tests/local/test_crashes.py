"""Processes that die, disks that lose what was not synced, syncs that fail: at every step, each in turn.

What was reported as done is there afterwards, at the same inode numbers; nothing is half visible; no inode
range is given out twice; a rebuild shows what the index showed. `disk.py` says what a power loss takes.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cidfs.local.rebuild import rebuild
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.local.children import (
    FAILED,
    crash,
    create_inside,
    lose_index,
    on_disk,
    publish_and_die,
    publish_groups,
    rebuild_it,
    run,
    running,
)
from tests.local.disk import KILLED, Plan
from tests.local.support import Ledger, Package, copy_store, noise, package, publish_in

FIRST = package("first", {"a": b"a" * 1000, "b": noise("b", 3000)})
GROUPS = (
    (
        package("second", {"x": noise("x", 5000), "b": noise("b", 3000)}, ["first"]),
        package("third", None, ["second"]),
    ),
    (package("fourth", {"y": noise("y", 2000), "x": noise("x", 5000)}, ["fourth", "third"]),),
)
LATER = package("later", {"z": noise("z", 3000)})
LAST = package("last", {"z": noise("z", 3000), "w": b"w"})
KNOWN_GROUPS = list(itertools.chain(*GROUPS))
KNOWN = {p.record.path.name: p for p in (FIRST, *KNOWN_GROUPS, LATER, LAST)}


def plans(lost: Path, way: str) -> Iterator[Plan]:
    """Yield a plan for one step after the other; who asks ends it when nothing goes wrong any more."""
    for step in itertools.count(1):
        match way:
            case "killed":
                yield Plan(kill_at=step)
            case "power":
                yield Plan(kill_at=step, lost=str(lost))
            case "mixed":
                yield Plan(kill_at=step, lost=str(lost), keep=0.5, seed=step)
            case "failed sync":
                yield Plan(fail_at=step)
            case "failed sync, power":
                yield Plan(fail_at=step, lost=str(lost))


def went_well(plan: Plan, code: int, said: Sequence[Any]) -> bool:
    """Say whether a process came to its end before its plan came to anything."""
    return code == 0 and not 0 < plan.fail_at <= said[-1][2]


def heard(ledger: Ledger, said: Sequence[Any]) -> None:
    """Enter what a process reported as done."""
    for word in said:
        if word[0] == "done":
            for name, base in word[1].items():
                ledger.promise(name, base)


def publish_now(ledger: Ledger, root: Path, item: Package) -> None:
    """Publish as a process that knows nothing of what was before."""
    for name, row in publish_in(root, item).items():
        ledger.promise(name, row.base)


def rebuild_now(root: Path) -> None:
    rebuild(StateFolder.open(root), lock_timeout=10)


def index_lives_on(ledger: Ledger, root: Path) -> None:
    """The index is intact; another process goes on, then the index is lost."""
    ledger.look(root)
    publish_now(ledger, root, LATER)
    before = ledger.look(root)
    shutil.rmtree(root / "index")
    rebuild_now(root)
    assert ledger.look(root) == before
    publish_now(ledger, root, LAST)
    ledger.look(root)


def index_is_lost(ledger: Ledger, root: Path) -> None:
    """The index is lost at once."""
    ledger.look(root)
    shutil.rmtree(root / "index")
    rebuild_now(root)
    ledger.look(root)
    publish_now(ledger, root, LATER)
    ledger.look(root)


def try_aftermaths(ledger: Ledger, root: Path) -> None:
    for aftermath in (index_lives_on, index_is_lost):
        ours = copy_store(root, root.with_name(f"{root.name}-{aftermath.__name__}"))
        aftermath(Ledger(KNOWN, dict(ledger.bases), dict(ledger.ranges)), ours)
        shutil.rmtree(ours)
    shutil.rmtree(root)


@pytest.fixture
def base(small: Path) -> Path:
    """A store with a path in it, and packs that can be taken over."""
    publish_in(small, FIRST)
    return small


@pytest.mark.parametrize("way", ["killed", "power", "mixed", "failed sync", "failed sync, power"])
def test_a_publisher_dies_at_any_step(base: Path, room: Path, way: str) -> None:
    """In packs and a journal that it takes over from another."""
    publish_at_every_step(base, room, way)


@pytest.mark.parametrize("way", ["power", "failed sync, power"])
def test_the_first_publisher_dies_at_any_step(small: Path, room: Path, way: str) -> None:
    """In packs and a journal that it makes."""
    publish_at_every_step(small, room, way)


def publish_at_every_step(base: Path, room: Path, way: str) -> None:
    for number, plan in enumerate(plans(room / "lost", way)):
        here = copy_store(base, room / f"store-{number}")
        code, said = crash(here, plan, publish_groups, GROUPS, inode_step=2)
        ledger = Ledger.of(KNOWN, base)
        heard(ledger, said)
        if went_well(plan, code, said):
            break
        try_aftermaths(ledger, here)
    assert number > (30 if plan.kill_at else 6)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_the_power_goes_after_another_went_on_where_a_publisher_died(
    base: Path, room: Path, keep: float
) -> None:
    """What the dead one had not synced, and the other relied on, is lost unless that one synced it."""
    memory = str(room / "memory")
    for step in itertools.count(1):
        here = copy_store(base, room / f"store-{step}")
        ledger = Ledger.of(KNOWN, base)
        code, said = crash(here, Plan(kill_at=step, memory=memory), publish_groups, GROUPS, inode_step=2)
        heard(ledger, said)
        ledger.look(here)
        last = Plan(lost=str(room / "lost"), memory=memory, keep=keep, seed=step)
        _, said = crash(here, last, publish_groups, [[LATER], *GROUPS])
        heard(ledger, said)
        assert set(ledger.bases) == {"first", "second", "third", "fourth", "later"}
        assert ledger.look(here) == ledger.bases
        shutil.rmtree(here / "index")
        rebuild_now(here)
        assert ledger.look(here) == ledger.bases
        shutil.rmtree(here)
        if code == 0:
            break
    assert step > 30


@pytest.mark.parametrize(
    "first",
    [
        Plan(kill_before="sync file next-inode"),  # raised, and not synced
        # in a new file, whose name was not synced
        Plan(fail_on="sync file next-inode", kill_before="sync folder ."),
    ],
)
def test_a_limit_that_a_dead_publisher_raised(small: Path, room: Path, first: Plan) -> None:
    """The next one raises it again, synced: only what `meta` says counts as raised."""
    memory = str(room / "memory")
    ledger = Ledger(KNOWN)
    code, _ = crash(small, dataclasses.replace(first, memory=memory), publish_groups, GROUPS)
    assert code == KILLED
    last = Plan(memory=memory, kill_before="write journal", lost=str(room / "lost"))
    code, _ = crash(small, last, publish_groups, [[LATER]])
    assert code == KILLED
    assert set(ledger.look(small)) == {"later"}, "visible, and not reported"
    shutil.rmtree(small / "index")
    rebuild_now(small)
    publish_now(ledger, small, FIRST)
    ledger.look(small)


@pytest.mark.parametrize("kind", ["own", "manifest"])
def test_a_pack_that_only_a_rebuild_knows(small: Path, room: Path, kind: str) -> None:
    """Its maker died before its name was durable; whoever relies on what a rebuild found in it may do so."""
    memory = str(room / "memory")
    ledger = Ledger(KNOWN)
    dies = Plan(memory=memory, kill_before=f"sync folder packs/{kind}")
    assert crash(small, dies, publish_groups, [[FIRST]])[0] == KILLED
    assert crash(small, Plan(memory=memory), rebuild_it)[0] == 0
    _, said = crash(small, Plan(memory=memory, lost=str(room / "lost")), publish_groups, [[FIRST]])
    heard(ledger, said)
    assert set(ledger.look(small)) == {"first"} == set(ledger.bases)


def test_what_only_the_page_cache_has_is_not_found_by_a_rebuild(small: Path, room: Path) -> None:
    """After a failed sync the pages of a pack are clean, and not on the disk."""
    memory = str(room / "memory")
    ledger = Ledger(KNOWN)
    code, said = crash(small, Plan(memory=memory, fail_at=1), publish_groups, [[FIRST]])
    assert (code, said[-1][0]) == (FAILED, "DiskFailed")
    assert crash(small, Plan(memory=memory), rebuild_it)[0] == 0
    _, said = crash(small, Plan(memory=memory, lost=str(room / "lost")), publish_groups, [[FIRST]])
    heard(ledger, said)
    assert set(ledger.look(small)) == {"first"} == set(ledger.bases)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_the_power_goes_after_another_went_on_where_a_rebuild_died(
    base: Path, room: Path, keep: float
) -> None:
    memory = str(room / "memory")
    for step in itertools.count(1):
        here = copy_store(base, room / f"store-{step}")
        ledger = Ledger.of(KNOWN, base)
        code, _ = crash(here, Plan(kill_at=step, memory=memory), rebuild_it)
        last = Plan(lost=str(room / "lost"), memory=memory, keep=keep, seed=step)
        heard(ledger, crash(here, last, publish_groups, GROUPS)[1])
        assert len(ledger.bases) == 4
        assert ledger.look(here) == ledger.bases
        shutil.rmtree(here / "index")
        rebuild_now(here)
        assert ledger.look(here) == ledger.bases
        shutil.rmtree(here)
        if code == 0:
            break
    assert step > 25


@pytest.mark.parametrize("other", ["publishes", "rebuilds"])
def test_another_goes_on_while_a_publisher_waits_at_any_step(base: Path, room: Path, other: str) -> None:
    for step in itertools.count(1):
        here = copy_store(base, room / f"store-{step}")
        ledger = Ledger.of(KNOWN, base)
        with running(
            on_disk, here, Plan(pause_at=step), publish_groups, [GROUPS], {"inode_step": 2}
        ) as child:
            words = [child.hear()]
            while words[-1] != "paused" and words[-1][0] != "steps":
                words.append(child.hear())
            paused = words.pop() == "paused"
            if paused:
                if other == "publishes":
                    again = [[LATER, *GROUPS[1]], GROUPS[0]]
                    code, said = crash(here, Plan(), publish_groups, again, 1, 0.02)
                    heard(ledger, said)
                else:
                    code, said = crash(here, Plan(), rebuild_it, lock_timeout=0.02)
                assert code == 0 or "LockTimeout" in said[-1], said
                ledger.look(here)
                child.tell()
            assert child.end() == 0
            heard(ledger, [*words, *child.said()])
        visible = ledger.look(here)
        assert {"first", "second", "third", "fourth"} <= set(visible)
        shutil.rmtree(here / "index")
        rebuild_now(here)
        assert ledger.look(here) == visible
        shutil.rmtree(here)
        if not paused:
            break
    assert step > 30


@pytest.mark.parametrize("way", ["killed", "power", "mixed", "failed sync"])
@pytest.mark.parametrize("index", ["index intact", "index lost"])
def test_a_rebuild_dies_at_any_step(base: Path, room: Path, way: str, index: str) -> None:
    ledger = Ledger.of(KNOWN, base)
    code, _ = run(publish_and_die, base, GROUPS[0])
    assert code == KILLED
    if index == "index lost":
        heard(ledger, run(publish_groups, base, GROUPS)[1])
    visible = ledger.look(base)
    if index == "index lost":
        shutil.rmtree(base / "index")
        (base / "index").mkdir()
    for number, plan in enumerate(plans(room / "lost", way)):
        here = copy_store(base, room / f"store-{number}")
        code, said = crash(here, plan, rebuild_it)
        if went_well(plan, code, said):
            assert said[0] == ("rebuilt", [])
            break
        if index == "index intact":
            assert ledger.look(here) == visible
        rebuild_now(here)
        assert ledger.look(here) == visible
        try_aftermaths(ledger, here)
    assert number > (25 if plan.kill_at else 6)


@pytest.mark.parametrize("way", ["killed", "power", "mixed", "failed sync"])
def test_a_store_is_made_half(room: Path, way: str) -> None:
    for number, plan in enumerate(plans(room / "lost", way)):
        here = room / f"disk-{number}"
        here.mkdir()
        code, said = crash(here, plan, create_inside)
        with LocalStore.open(here / "state", create=True) as store:
            identity = store.state.format.id
        if said and said[0][0] == "created":
            assert said[0][1] == identity
        ledger = Ledger(KNOWN)
        publish_now(ledger, here / "state", FIRST)
        publish_now(ledger, here / "state", LATER)
        assert ledger.bases["first"] == 16
        ledger.look(here / "state")
        shutil.rmtree(here)
        if went_well(plan, code, said):
            break
    assert number > (15 if plan.kill_at else 5)


@pytest.mark.parametrize("seed", range(60 if Store.long else 6))
def test_deaths_and_rebuilds_in_any_order(small: Path, room: Path, seed: int) -> None:
    """Beside a ledger: processes that publish or rebuild, one after the other, most of which die.

    What one did not sync may be lost when the power goes while a later one runs.
    """
    chance = random.Random(seed)
    memory, lost = str(room / "memory"), str(room / "lost")
    items = [
        package(
            f"p{i}",
            {f"f{j}": noise(f"{chance.randrange(12)}", chance.choice((10, 3000))) for j in range(3)},
            chance.sample([f"p{j}" for j in range(i)], min(i, chance.randrange(3))),
        )
        for i in range(12)
    ]
    ledger = Ledger({p.record.path.name: p for p in items})
    for _ in range(25):
        kill_at = chance.choice((0, chance.randrange(1, 60)))
        fail_at = chance.choice((0, 0, chance.randrange(1, 15)))
        power = chance.random() < 0.3
        plan = Plan(
            kill_at, fail_at, lost if power else "", chance.random(), chance.randrange(1 << 30), memory
        )
        if chance.random() < 0.7:
            chosen = [chance.sample(items, chance.randrange(1, 4)) for _ in range(2)]
            _, said = crash(small, plan, publish_groups, chosen, inode_step=chance.choice((1, 1000)))
        else:
            if chance.random() < 0.4:
                crash(small, Plan(memory=memory), lose_index)
            _, said = crash(small, plan, rebuild_it)
        heard(ledger, said)
        while not (small / "index" / "current").exists():
            _, said = crash(small, Plan(memory=memory), rebuild_it)
            assert said[0][0] == "rebuilt", said
        ledger.look(small)
    visible = ledger.look(small)
    publish_now(ledger, small, items[0])
    shutil.rmtree(small / "index")
    rebuild_now(small)
    assert ledger.look(small) == visible | ledger.bases
