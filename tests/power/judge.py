"""What must hold of a store after a kill or a power loss, whatever it interrupted.

It opens; each visible path is whole; what was reported as done is so; verification finds nothing; a rebuild
changes nothing; adding and collecting go on, and free what was left behind.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from cidfs.engine.export import nar_pieces
from cidfs.engine.verify import verify
from cidfs.errors import StoreAbsent
from cidfs.formats.frames import HEADER_SIZE
from cidfs.local.collect import collect
from cidfs.local.rebuild import rebuild
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local.support import noise, package, publish_in
from tests.power.replay import Event, Op

LATER = package("later", {"z": noise("z", 3000)})
LATER_PATH = LATER.record.path.full("/nix/store")
SLACK = 8 << 10  # of files with nothing in them but their headers, and of a short journal
DEAD_SHARE = 4 / 3  # a pack is written anew when a quarter of it is dead
_BRINGS = ("add", "import")


@dataclass(frozen=True)
class Known:
    """What may be seen of a path: its NAR hash, and the inode bases that it ever had."""

    nar_hash: bytes
    bases: frozenset[int]


class Silent:
    """Progress that nobody sees."""

    def begin(self, label: str, total: int) -> None:
        """Say nothing."""

    def step(self, count: int = 1) -> None:
        """Say nothing."""


@dataclass
class Promises:
    """What was reported as done up to a moment: paths that must be there, and paths that may be."""

    must: set[str] = field(default_factory=set)
    may: set[str] = field(default_factory=set)
    _doing: dict[int, str] = field(default_factory=dict)

    def begin(self, command: str, paths: Iterable[str]) -> None:
        """A command begins that brings or takes paths."""
        here = set(paths)
        if command in _BRINGS:
            self.may |= here - self.must
        elif command == "remove":
            self.may |= here & self.must
            self.must -= here

    def done(self, command: str, paths: Iterable[str]) -> None:
        """A command said that it is done with paths."""
        here = set(paths)
        self.may -= here
        if command in _BRINGS:
            self.must |= here

    def hear(self, event: Event) -> None:
        """Take note of marks and of what commands print."""
        if event.op == Op.MARK:
            mark = event.mark()
            self._doing[event.pid] = mark["command"]
            (self.begin if mark["begins"] else self.done)(mark["command"], mark["paths"])
        elif event.op == Op.OUT and event.pid in self._doing:
            self.done(self._doing[event.pid], event.second.decode().split())

    def copy(self) -> Promises:
        """Return the same promises, to be changed."""
        return Promises(set(self.must), set(self.may))


def visible(root: Path) -> dict[str, int]:
    """Return the inode base of each visible path."""
    with LocalStore.open(root) as store:
        return {p.path.full(store.store_dir): p.row.base for p in store.paths()}


def known_in(root: Path, *, before: Mapping[str, Known] | None = None) -> dict[str, Known]:
    """Return what is known of the paths of a store that is well, added to what was known before."""
    found = dict(before or {})
    with LocalStore.open(root) as store:
        for p in store.paths():
            record = store.record_of(p.path.hash_part)
            assert record is not None
            name = p.path.full(store.store_dir)
            old = found[name].bases if name in found else frozenset()
            found[name] = Known(record.nar_hash, old | {p.row.base})
    return found


def problems(root: Path) -> list[str]:
    """Return what verification finds."""
    with LocalStore.open(root) as store:
        return list(trio.run(verify, store, None, Silent()).problems)


def look(
    root: Path, known: Mapping[str, Known], promises: Promises, *, verified: bool = True
) -> dict[str, int]:
    """Check all that is visible, and unless told otherwise, that verification finds nothing.

    Return base by path.
    """
    found: dict[str, int] = {}
    end = 0
    with LocalStore.open(root) as store:
        rows = sorted(store.paths(), key=lambda p: p.row.base)
        for p in rows:
            name = p.path.full(store.store_dir)
            record = store.record_of(p.path.hash_part)
            assert record is not None, f"{name} has no record"
            assert name in known, f"{name} was never added"
            assert record.nar_hash == known[name].nar_hash, f"{name} has another NAR hash"
            digest = hashlib.sha256()
            for piece in nar_pieces(store, store.read_manifest(record.manifest)):
                digest.update(piece)
            assert digest.digest() == record.nar_hash, f"{name} is not what it was"
            if known[name].bases:
                assert p.row.base in known[name].bases, f"{name} is at inode {p.row.base}"
            assert p.row.base >= end, f"the inodes of {name} overlap another's"
            end = p.row.base + p.row.count
            found[name] = p.row.base
    missing, back = promises.must - set(found), set(found) - promises.must - promises.may
    assert not missing, f"reported as done, and gone: {sorted(missing)}"
    assert not back, f"never asked for, or removed: {sorted(back)}"
    wrong = problems(root) if verified else []
    assert not wrong, "verify: " + "; ".join(wrong)
    return found


def rebuild_in(root: Path) -> None:
    """Make the index anew."""
    rebuild(StateFolder.open(root), lock_timeout=10)


def is_rebuilt(root: Path, known: Mapping[str, Known], promises: Promises) -> None:
    """A rebuild beside the index changes nothing; nor does one without it afterwards."""
    before = look(root, known, promises, verified=False)
    rebuild_in(root)
    assert look(root, known, promises) == before, "a rebuild changed what is visible"
    shutil.rmtree(root / "index")
    rebuild_in(root)
    after = look(root, known, promises, verified=False)
    assert after == before, "a rebuild without an index changed what is visible"
    add_later(root, known, promises)


def loses_its_index(root: Path, known: Mapping[str, Known], promises: Promises) -> None:
    """Its index is lost too, at once: what was not reported as done may be as it was before."""
    before = visible(root)
    shutil.rmtree(root / "index")
    rebuild_in(root)
    after = look(root, known, promises)
    assert all(after[p] == base for p, base in before.items() if p in after), (
        "a rebuild changed an inode base"
    )
    add_later(root, known, promises)


def goes_on(root: Path, known: Mapping[str, Known], promises: Promises) -> None:
    """Another path is added, what was left behind is collected, and at last everything is removed."""
    before = look(root, known, promises)
    after = add_later(root, known, promises)
    assert {**after, **before} == after, "an add changed another path"
    collect_in(root)
    everything = with_later(known)
    assert look(root, everything, Promises(set(after))) == after, "a collection changed what is visible"
    is_tidy(root)
    with LocalStore.open(root, write=True) as store:
        store.remove([p.path for p in store.paths()], referrers=True)
    collect_in(root)
    assert visible(root) == {}
    is_tidy(root)
    assert size_of(root) < SLACK, "packs of which nothing is needed are there"


def collect_in(root: Path) -> None:
    """Collect what nobody needs."""
    with LocalStore.open(root, write=True) as store:
        report = collect(store)
        assert not report.problems, report.problems
        assert not report.waiting


def is_tidy(root: Path) -> None:
    """Fail where something is left that a collection should have found, or packs hold much that is dead."""
    assert left_behind(root) == [], left_behind(root)
    with LocalStore.open(root) as store:
        needed = sum(row.stored + row.frames * HEADER_SIZE for _, row in store.pack_rows())
    found = [p.stat() for p in (root / "packs").glob("*/*/*")]
    packs = sum(min(info.st_size, info.st_blocks * 512) for info in found)  # there may be holes
    assert packs <= needed * DEAD_SHARE + SLACK, f"packs of {packs} bytes for frames of {needed}"


def add_later(root: Path, known: Mapping[str, Known], promises: Promises) -> dict[str, int]:
    """Add one more path; return base by path."""
    before = visible(root)
    publish_in(root, LATER)
    found = look(root, with_later(known), Promises({*before, LATER_PATH}))
    assert all(found[LATER_PATH] > base for base in before.values())
    return found


def with_later(known: Mapping[str, Known]) -> dict[str, Known]:
    """Return what is known, and the path that is added later."""
    return {**known, LATER_PATH: Known(LATER.record.nar_hash, frozenset())}


def judge(make: Callable[[], Path], known: Mapping[str, Known], promises: Promises, turn: int) -> None:
    """Check a store and what can follow; make gives it anew, each time in the place of the last one.

    What follows is not all tried each time, but for turns below 0.
    """
    root = make()
    if not (root / "format").exists():
        is_made_again(root, promises)
        return
    goes_on(root, known, promises)
    if turn % 2 or turn < 0:
        loses_its_index(make(), known, promises)
    if turn % 2 == 0 or turn < 0:
        is_rebuilt(make(), known, promises)


def is_made_again(root: Path, promises: Promises) -> None:
    """A store that was not yet one is made by whoever comes next."""
    assert not promises.must, "a store in which something was is no store any more"
    with pytest.raises(StoreAbsent):
        LocalStore.open(root)
    publish_in(root, LATER)
    assert set(visible(root)) == {LATER_PATH}
    assert problems(root) == []


_LEFT = re.compile(r".*(\.new|\.tmp-[^/]*)|index/rebuild-[^/]*|run/.+")


def left_behind(root: Path) -> list[str]:
    """Return the names of what a killed process may leave, and nobody uses."""
    found = []
    for folder, folders, files in os.walk(root):
        where = os.path.relpath(folder, root)
        for name in (*folders, *files):
            path = os.path.normpath(os.path.join(where, name))
            if _LEFT.fullmatch(path) or (name.endswith(".bad") and name.removesuffix(".bad") not in files):
                found.append(path)
    indexes = [n for n in os.listdir(root / "index") if n.isdigit()]
    return sorted(found) + (sorted(indexes) if len(indexes) != 1 else [])


def size_of(root: Path) -> int:
    """Return the bytes of all pack and journal files."""
    return sum(
        p.stat().st_size for part in ("packs", "journal") for p in (root / part).rglob("*") if p.is_file()
    )
