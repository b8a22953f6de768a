"""Removals and collections that die or wait at every step, each in turn, on a disk that loses what it may.

What stays published is whole, what was reported as removed stays away, and others go on meanwhile: who
publishes what is just being collected, who rebuilds, who collects while an ingest is on its way.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cidfs.formats.digest import digest_of
from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.local.children import (
    collect_it,
    crash,
    ingest_groups,
    on_disk,
    publish_groups,
    rebuild_it,
    remove_paths,
    running,
)
from tests.local.disk import Plan
from tests.local.support import (
    Ledger,
    Writers,
    copy_store,
    noise,
    pack_files,
    package,
    path_of,
    publish,
    publish_in,
)
from tests.local.test_crashes import heard, plans, rebuild_now, went_well

STAYS = package("stays", {"a": b"a" * 1000, "b": noise("b", 9000)})
GOES = package("goes", {"b": noise("b", 9000), "x": noise("x", 5000)}, ["goes-too"])
GOES_TOO = package("goes-too", {"y": noise("y", 7000)})
NEW = package("new", {"x": noise("x", 5000), "z": noise("z", 3000)})
ITEMS = (STAYS, GOES, GOES_TOO, NEW)
KNOWN = {item.record.path.name: item for item in ITEMS}
LEAVING = [path_of("goes"), path_of("goes-too")]
EVERY = 1 if Store.long else 5  # one step of so many
WAYS = ["killed", "power", "mixed", "failed sync", "failed sync, power"]


@pytest.fixture
def base(small: Path) -> Path:
    """A store with three paths; two of them have packs of their own, and a part in one that stays."""
    publish_in(small, STAYS, GOES_TOO)
    with LocalStore.open(small, write=True) as store:
        held = Writers.of(store)
        for writer, item in ((held.own, b"own"), (held.manifests, b"manifest")):
            writer.append(digest_of(item), 0, item, len(item))
        publish(store, GOES)
        held.close()
    return small


@pytest.fixture
def dead(base: Path) -> Path:
    """A store in which two of three paths were removed."""
    assert crash(base, Plan(), remove_paths, LEAVING)[0] == 0
    return base


def some(found: Iterator[Plan], way: str) -> Iterator[tuple[int, Plan]]:
    """Leave out steps, but for the ways in which there are few."""
    every = 1 if "sync" in way else EVERY
    for number, plan in enumerate(found):
        if number % every == 0:
            yield number, plan


def collect_now(root: Path) -> None:
    """Collect, without a problem."""
    code, said = crash(root, Plan(), collect_it)
    assert (code, said[0]) == (0, ("collected", []))


def goes_on(ledger: Ledger, root: Path) -> None:
    """What is visible stays so through a collection, a rebuild, and a publication of what was removed."""
    visible = ledger.look(root)
    collect_now(root)
    assert ledger.look(root) == visible
    shutil.rmtree(root / "index")
    rebuild_now(root)
    assert ledger.look(root) == visible
    publish_in(root, NEW, GOES)
    assert {"new", "goes"} <= set(ledger.look(root))
    shutil.rmtree(root)


@pytest.mark.parametrize("way", WAYS)
def test_a_collector_dies_at_any_step(dead: Path, room: Path, way: str) -> None:
    for number, plan in some(plans(room / "lost", way), way):
        here = copy_store(dead, room / f"store-{number}")
        ledger = Ledger.of(KNOWN, dead)
        code, said = crash(here, plan, collect_it)
        assert ledger.look(here).keys() == {"stays"}
        goes_on(ledger, here)
        if went_well(plan, code, said):
            break
    assert number > (30 if plan.kill_at else 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_removal_dies_at_any_step(base: Path, room: Path, way: str) -> None:
    for number, plan in some(plans(room / "lost", way), way):
        here = copy_store(base, room / f"store-{number}")
        ledger = Ledger.of(KNOWN, base)
        code, said = crash(here, plan, remove_paths, LEAVING)
        for name in ("goes", "goes-too"):
            ledger.withdraw(name)
        gone = {name for word in said if word[0] == "removed" for name in word[1]}
        left = ledger.look(here).keys()
        assert not gone & left
        goes_on(ledger, here)
        if went_well(plan, code, said):
            break
    assert number > (6 if plan.kill_at else 1)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_the_power_goes_after_another_went_on_where_a_collector_died(
    dead: Path, room: Path, keep: float
) -> None:
    """What the dead one moved and had not synced is relied on by nobody."""
    memory = str(room / "memory")
    for step in itertools.count(1, EVERY):
        here = copy_store(dead, room / f"store-{step}")
        ledger = Ledger.of(KNOWN, dead)
        code, _ = crash(here, Plan(kill_at=step, memory=memory), collect_it)
        last = Plan(lost=str(room / "lost"), memory=memory, keep=keep, seed=step)
        heard(ledger, crash(here, last, publish_groups, [[NEW, GOES_TOO], [GOES]])[1])
        assert ledger.look(here) == ledger.bases
        assert len(ledger.bases) == 4
        shutil.rmtree(here / "index")
        rebuild_now(here)
        assert ledger.look(here) == ledger.bases
        shutil.rmtree(here)
        if code == 0:
            break
    assert step > 30


def wait_at_each_step(
    base: Path,
    room: Path,
    action: Any,
    args: list[Any],
    others: list[tuple[Any, tuple[Any, ...]]],
    every: int = 1,
) -> None:
    """Let an action wait at each step, each in turn, while others do something; then it goes on."""
    for step in itertools.count(1, every):
        here = copy_store(base, room / f"store-{step}")
        ledger = Ledger.of(KNOWN, base)
        with running(on_disk, here, Plan(pause_at=step), action, args, {}) as child:
            words = [child.hear()]
            while words[-1] != "paused" and words[-1][0] != "steps":
                words.append(child.hear())
            paused = words.pop() == "paused"
            if paused:
                for other, more in others:
                    code, said = crash(here, Plan(), other, *more)
                    heard(ledger, said)
                    assert code == 0 or "LockTimeout" in said[-1], said
                ledger.look(here)
                child.tell()
            assert child.end() == 0, f"step {step}: {child.said()}"
            heard(ledger, [*words, *child.said()])
        ledger.look(here)
        goes_on(ledger, here)
        if not paused:
            break
    assert step > 20


def test_another_publishes_what_is_just_being_collected(dead: Path, room: Path) -> None:
    others = [(publish_groups, ([[NEW], [GOES]], None, 0.02))]
    wait_at_each_step(dead, room, collect_it, [], others, EVERY)


def test_another_rebuilds_while_a_collector_waits(dead: Path, room: Path) -> None:
    wait_at_each_step(dead, room, collect_it, [], [(rebuild_it, (False, 0.02))], EVERY)


def test_another_collects_while_an_ingest_waits(dead: Path, room: Path) -> None:
    """The ingest found chunks that are dead; each of its paths is whole when it is published."""
    wait_at_each_step(dead, room, ingest_groups, [[[NEW], [GOES_TOO, GOES]]], [(collect_it, (0.02,))])


def test_two_collections_while_an_ingest_waits(dead: Path, room: Path) -> None:
    others = [(collect_it, (0.02,)), (collect_it, (0.02,))]
    wait_at_each_step(dead, room, ingest_groups, [[[GOES_TOO, GOES], [NEW]]], others)


def test_nothing_of_the_dead_is_left(dead: Path) -> None:
    """So that these tests test something: there are dead frames, and a collection takes them away."""
    before = [p.stat().st_size for kind in ("own", "manifest") for p in pack_files(dead, kind)]
    collect_now(dead)
    after = [p.stat().st_size for kind in ("own", "manifest") for p in pack_files(dead, kind)]
    assert sum(after) < sum(before) - 11_000
