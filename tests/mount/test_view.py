"""StoreView against the tree that went in, asked in any order, however little it may keep."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cidfs.engine.ingest import ingest
from cidfs.engine.sources import NarSource
from cidfs.engine.wanted import Wanted
from cidfs.errors import (
    ChunkInvalid,
    ChunkMissing,
    CidfsError,
    FormatError,
    IndexLost,
    PathAbsent,
    StaleInode,
    WrongType,
    errno_of,
)
from cidfs.formats.store_path import StorePath
from cidfs.local.store import LocalStore
from cidfs.mount import view as view_module
from cidfs.mount.view import LINKS, ROOT, Attributes, Miss, StoreView
from tests.engine.support import TREE, Node, Pieces, nar_of
from tests.local.children import publish_groups, rebuild_it, run
from tests.local.support import flip, noise, pack_files, package, path_of, publish, row_of

T = TypeVar("T")


def answered(ask: Callable[[], T]) -> T:
    """Ask, and where the answer is not in memory, load it and ask again, as a transport does."""
    for _ in range(3):
        try:
            return ask()
        except Miss as miss:
            miss.job()
    raise AssertionError("asked again and again")


def add(store: LocalStore, tree: Node, name: str) -> StorePath:
    """Ingest a tree."""

    async def work() -> StorePath:
        [outcome] = await ingest(store, [Wanted(NarSource(Pieces(nar_of(tree), 1 << 20), name), name=name)])
        return outcome.path

    return trio.run(work)


@pytest.fixture
def store(root: Path) -> Iterator[LocalStore]:
    """A new store, opened for writing."""
    with LocalStore.open(root, write=True) as opened:
        yield opened


def listing(view: StoreView, inode: int, step: int = 3) -> list[tuple[bytes, Attributes]]:
    """List a directory in pieces, each from where the last one ended."""
    found: list[tuple[bytes, Attributes]] = []
    start = 0
    while True:
        piece = [entry for entry, _ in zip(view.listing(inode, start), range(step), strict=False)]
        if not piece:
            return found
        found += [(entry.name, entry.attributes) for entry in piece]
        start = piece[-1].next


def compare(view: StoreView, inode: int, node: Node, seen: set[int]) -> None:
    """Hold everything that the view says of a node against the tree."""
    attributes = answered(lambda: view.attributes(inode))
    assert attributes.inode == inode
    assert inode not in seen
    seen.add(inode)
    match node:
        case bytes() | ("x", bytes()):
            data = node if isinstance(node, bytes) else node[1]
            executable = not isinstance(node, bytes)
            assert attributes.mode == stat.S_IFREG | (0o555 if executable else 0o444)
            assert attributes.size == len(data)
            view.open(inode)
            assert b"".join(view.read(inode, 0, len(data) + 10)) == data
            refuse(view, inode, "lookup", "check_directory", "target")
        case ("l", bytes(target)):
            assert attributes.mode == stat.S_IFLNK | 0o777
            assert attributes.size == len(target)
            assert view.target(inode) == target
            refuse(view, inode, "lookup", "check_directory", "open")
        case _:
            assert isinstance(node, Mapping)
            assert attributes.mode == stat.S_IFDIR | 0o555
            view.check_directory(inode)
            listed = listing(view, inode)
            assert [name for name, _ in listed] == sorted(node)
            for name, child in listed:
                assert view.lookup(inode, name) == child
                compare(view, child.inode, node[name], seen)
            for absent in (b"absent", b"", b"a" * 255, b"\0"):
                with pytest.raises(PathAbsent):
                    view.lookup(inode, absent)
            refuse(view, inode, "target", "open")


def refuse(view: StoreView, inode: int, *ways: str) -> None:
    """What does not fit a node's type is refused with an errno of its own."""
    asks: dict[str, Callable[[], object]] = {
        "lookup": lambda: view.lookup(inode, b"x"),
        "check_directory": lambda: view.check_directory(inode),
        "target": lambda: view.target(inode),
        "open": lambda: view.open(inode),
    }
    for way in ways:
        with pytest.raises(WrongType) as raised:
            asks[way]()
        assert errno_of(raised.value) in (errno.ENOTDIR, errno.EINVAL, errno.EISDIR, errno.ELOOP)


# --- against the tree


def test_a_tree_is_shown_as_it_is(store: LocalStore) -> None:
    path = add(store, TREE, "tree")
    add(store, b"a file", "other")
    view = StoreView(store)
    found = view.lookup(ROOT, path.base_name.encode())
    assert found == view.attributes(found.inode)
    row = store.find_path(path)
    assert row is not None
    seen: set[int] = set()
    compare(view, found.inode, TREE, seen)
    assert seen == set(range(row.base, row.base + row.count))


@pytest.mark.parametrize("tree", [b"", b"contents", ("x", b"#!"), ("l", b"/else/where"), {}])
def test_a_path_need_not_be_a_directory(store: LocalStore, tree: bytes) -> None:
    view = StoreView(store)
    path = add(store, tree, "top")
    compare(view, view.lookup(ROOT, path.base_name.encode()).inode, tree, set())


def trees() -> st.SearchStrategy[Node]:
    names = st.sampled_from([b"a", b"b", b"a.b", b"a-b", b"A", b"\xff", b" "])
    leaves: st.SearchStrategy[Node] = st.one_of(
        st.binary(max_size=60),
        st.tuples(st.just("x"), st.binary(max_size=9)),
        st.tuples(st.just("l"), st.sampled_from([b"t", b"\xfe"])),
    )
    return st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=5), max_leaves=14)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trees())
def test_any_tree_is_shown_as_it_is(store: LocalStore, tree: Node) -> None:
    path = add(store, tree, "tree")
    view = StoreView(store)
    compare(view, view.lookup(ROOT, path.base_name.encode()).inode, tree, set())


LARGE = noise("large", 900_000)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 1_000_000),
    st.one_of(st.integers(0, 300_000), st.sampled_from([0, 1, 4096, 131_072, 1 << 20])),
)
def test_a_read_is_a_slice(store: LocalStore, offset: int, size: int) -> None:
    path = add(store, {b"large": LARGE, b"small": b"x"}, "files")
    view = StoreView(store)
    top = view.lookup(ROOT, path.base_name.encode()).inode
    file = view.lookup(top, b"large").inode
    pieces = view.read(file, offset, size)
    assert b"".join(pieces) == LARGE[offset : offset + size]
    assert view.counters.bytes_read == len(LARGE[offset : offset + size])
    assert view.read(view.lookup(top, b"small").inode, 1, 10) == []


# --- the root


def test_the_root(store: LocalStore) -> None:
    paths = [add(store, b"%d" % i, f"p{i}") for i in range(5)]
    view = StoreView(store)
    assert view.attributes(ROOT).mode == stat.S_IFDIR | 0o755
    assert view.attributes(LINKS).mode == stat.S_IFDIR | 0o555
    assert view.lookup(ROOT, b".links") == view.attributes(LINKS)
    assert listing(view, ROOT) == [(b".links", view.attributes(LINKS))]
    assert listing(view, LINKS) == []
    name = paths[0].base_name.encode()
    for absent in (
        b"",
        b".",
        b"x",
        name[:-1],
        name + b"x",
        name[:32],
        name[:33],
        b"0" * 33,
        name[:32] + b"_" + name[33:],
        path_of("absent").base_name.encode(),
        b"\xff" * 40,
        os.urandom(200),
    ):
        with pytest.raises(PathAbsent):
            view.lookup(ROOT, absent)
    with pytest.raises(PathAbsent):
        view.lookup(LINKS, b"x")
    for inode in (ROOT, LINKS):
        view.check_directory(inode)
        refuse(view, inode, "open", "target")


def test_a_name_that_is_too_long(store: LocalStore) -> None:
    path = add(store, {b"a": b""}, "tree")
    view = StoreView(store)
    top = view.lookup(ROOT, path.base_name.encode()).inode
    for parent in (ROOT, top):
        with pytest.raises(WrongType) as raised:
            view.lookup(parent, b"n" * 256)
        assert errno_of(raised.value) == errno.ENAMETOOLONG


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_the_root_is_listed_where_it_is_asked_for(store: LocalStore, step: int) -> None:
    """Positions stay good while others publish."""
    for i in range(7):
        publish(store, package(f"p{i}"))
    view = StoreView(store, list_root=True)
    found: list[bytes] = []
    start, added = 0, 0
    while piece := [e for e, _ in zip(view.listing(ROOT, start), range(step), strict=False)]:
        found += [e.name for e in piece]
        assert all(view.lookup(ROOT, e.name) == e.attributes for e in piece)
        start = piece[-1].next
        if added < 3:
            publish(store, package(f"later{added}"))
            added += 1
    there = [f"p{i}" for i in range(7)] + [f"later{i}" for i in range(added)]
    expected = [b".links", *(path_of(n).base_name.encode() for n in there)]
    assert found == expected[: len(found)]
    assert len(found) >= 8


# --- inode numbers


def test_a_number_that_belongs_to_nothing(store: LocalStore) -> None:
    publish(store, package("a"), package("b"))
    view = StoreView(store)
    row = row_of(store, "b")
    for inode in (3, 15, row.base + row.count, 1 << 40, (1 << 64) - 1):
        for ask in (view.attributes, view.target, view.open, view.check_directory):
            with pytest.raises((StaleInode, WrongType)) as raised:
                ask(inode)
            assert errno_of(raised.value) in (errno.ESTALE, errno.EINVAL, errno.EISDIR)
        if inode > LINKS:
            with pytest.raises(StaleInode):
                view.lookup(inode, b"x")
            with pytest.raises(StaleInode):
                list(view.listing(inode, 0))
            with pytest.raises(StaleInode):
                view.read(inode, 0, 1)
    assert view.node_limit == row.base + row.count


def test_what_is_published_later_is_seen_by_a_view_that_runs(store: LocalStore) -> None:
    view = StoreView(store)
    name = path_of("a").base_name.encode()
    with pytest.raises(PathAbsent):
        view.lookup(ROOT, name)
    publish(store, package("a", {"x": b"x"}))
    top = view.lookup(ROOT, name).inode
    assert view.read(view.lookup(top, b"x").inode, 0, 9) == [b"x"]


def test_a_view_goes_on_beside_a_rebuild(root: Path) -> None:
    """The numbers that the kernel holds stay what they were."""
    assert run(publish_groups, root, [[package("a", {"x": noise("x", 999)})]])[0] == 0
    with LocalStore.open(root) as store:
        view = StoreView(store)
        top = view.lookup(ROOT, path_of("a").base_name.encode()).inode
        file = view.lookup(top, b"x").inode
        assert run(rebuild_it, root)[0] == 0
        assert run(publish_groups, root, [[package("b", {"y": b"y"})]])[0] == 0
        store.refresh()
        assert b"".join(view.read(file, 0, 1000)) == noise("x", 999)
        later = StoreView(store)
        assert later.lookup(top, b"x").inode == file
        other = later.lookup(ROOT, path_of("b").base_name.encode()).inode
        assert later.read(later.lookup(other, b"y").inode, 0, 9) == [b"y"]


# --- what is kept in memory


def big_tree(seed: int) -> dict[bytes, Node]:
    """A tree whose manifest is larger than what is loaded without a miss."""
    return {b"%d-%s-%06d" % (seed, b"n" * 100, i): b"" for i in range(2200)}


def test_a_large_manifest_is_a_miss(store: LocalStore) -> None:
    path = add(store, big_tree(1), "big")
    small = add(store, {b"a": b""}, "small")
    row = store.find_path(path)
    assert row is not None
    place = store.place("manifests", row.manifest)
    assert place is not None
    assert place.length > view_module.BIG_MANIFEST
    view = StoreView(store)
    top = view.lookup(ROOT, path.base_name.encode())
    assert top.inode == row.base, "the root's row alone says it"
    asks: list[Callable[[], object]] = [
        lambda: view.attributes(row.base + 1),
        lambda: view.lookup(row.base, b"x"),
        lambda: list(view.listing(row.base, 0)),
        lambda: view.open(row.base + 1),
        lambda: view.check_directory(row.base),
        lambda: view.read(row.base + 1, 0, 1),
        lambda: view.target(row.base + 1),
    ]
    for ask in asks:
        with pytest.raises(Miss):
            ask()
    assert view.lookup(ROOT, small.base_name.encode()).mode & 0o555
    with pytest.raises(Miss) as raised:
        view.attributes(row.base + 1)
    thread = threading.Thread(target=raised.value.job)
    thread.start()
    thread.join()
    assert view.attributes(row.base + 1).mode == stat.S_IFREG | 0o444
    assert len(listing(view, row.base, 500)) == 2200
    assert view._loaded == {}, "it is kept once"


def test_two_who_wait_for_one_manifest_keep_it_once(store: LocalStore) -> None:
    row = store.find_path(add(store, big_tree(1), "big"))
    assert row is not None
    view = StoreView(store)
    jobs = []
    for _ in range(2):
        with pytest.raises(Miss) as raised:
            view.attributes(row.base + 1)
        jobs.append(raised.value.job)
    jobs[0]()
    assert view.attributes(row.base + 1).size == 0
    jobs[1]()
    assert view.attributes(row.base + 1).size == 0
    assert view._loaded == {}


def test_little_memory_keeps_answers_right(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MANIFEST_CACHE", 6000)
    monkeypatch.setattr(view_module, "CHUNK_CACHE", 5000)
    trees_by_name: dict[str, dict[bytes, Node]] = {
        f"t{i}": {b"f%d" % j: noise(f"{i}-{j}", 700 + 90 * i) for j in range(4 + i % 5)} for i in range(30)
    }
    tops = {}
    view = StoreView(store)
    for name, tree in trees_by_name.items():
        tops[name] = view.lookup(ROOT, add(store, tree, name).base_name.encode()).inode
    chance = random.Random(1)
    for _ in range(600):
        name = chance.choice(list(tops))
        file = chance.choice(list(trees_by_name[name]))
        data = trees_by_name[name][file]
        assert isinstance(data, bytes)
        inode = view.lookup(tops[name], file).inode
        assert view.attributes(inode).size == len(data)
        offset = chance.randrange(len(data))
        assert b"".join(view.read(inode, offset, 100)) == data[offset : offset + 100]
        held = [p for p in view._published.values()]
        assert view._bases == sorted(p.base for p in held)
        assert view._published_bytes == sum(len(p.manifest) + 600 for p in held) <= 6000 + 1500
        assert view._chunk_bytes == sum(map(len, view._chunks.values())) <= 5000
        assert view.cached_bytes == view._published_bytes + view._chunk_bytes
    counted = view.counters
    assert counted.manifest_reads > 100
    assert counted.chunk_reads > 100
    assert counted.manifest_hits > 0
    assert counted.chunk_hits > 0
    assert counted.damaged == 0


def test_a_manifest_larger_than_the_cache(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One huge tree and its neighbours do not drive each other out."""
    monkeypatch.setattr(view_module, "MANIFEST_CACHE", 1000)
    big = view_inode = 0
    view = StoreView(store)
    big = view.lookup(ROOT, add(store, big_tree(1), "big").base_name.encode()).inode
    small = view.lookup(ROOT, add(store, {b"a": b"x"}, "small").base_name.encode()).inode
    for _ in range(10):
        answered(lambda: view.attributes(big + 5))
        view_inode = answered(lambda: view.lookup(small, b"a")).inode
    assert view.counters.manifest_reads == 2
    assert view.attributes(view_inode).size == 1


def test_a_chunk_is_read_once_while_it_is_kept(store: LocalStore) -> None:
    path = add(store, {b"x": LARGE}, "x")
    view = StoreView(store)
    file = view.lookup(view.lookup(ROOT, path.base_name.encode()).inode, b"x").inode
    for offset in range(0, len(LARGE), 4096):
        assert b"".join(view.read(file, offset, 4096)) == LARGE[offset : offset + 4096]
    chunks = store.totals().chunks
    assert view.counters.chunk_reads == chunks
    assert view.counters.chunk_hits > 200


# --- damage


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_chunk_is_an_error_for_its_bytes_alone(root: Path, store: LocalStore, damage: str) -> None:
    publish(store, package("a", {"x": noise("x", 1000), "y": noise("y", 1000)}))
    view = StoreView(store)
    top = view.lookup(ROOT, path_of("a").base_name.encode()).inode
    x, y = (view.lookup(top, name).inode for name in (b"x", b"y"))
    [path] = pack_files(root, "own")
    if damage == "flipped":
        flip(path, 16 + 56 + 500)
    else:
        path.unlink()
    with pytest.raises((ChunkInvalid, ChunkMissing)) as raised:
        view.read(x, 0, 10)
    assert errno_of(raised.value) == errno.EIO
    assert view.counters.damaged == 1
    if damage == "flipped":
        assert b"".join(view.read(y, 0, 1000)) == noise("y", 1000)
    assert view.attributes(x).size == 1000


def test_a_damaged_manifest_is_an_error_for_its_path_alone(root: Path, store: LocalStore) -> None:
    publish(store, package("a", {"x": b"x"}))
    publish(store, package("b", {"y": b"y"}))
    [path] = pack_files(root, "manifest")
    flip(path, 100)
    view = StoreView(store)
    a, b = (view.lookup(ROOT, path_of(n).base_name.encode()).inode for n in "ab")
    for _ in range(2):
        with pytest.raises(CidfsError) as raised:
            view.lookup(a, b"x")
        assert errno_of(raised.value) == errno.EIO
    assert view.lookup(b, b"y").size == 1
    flip(path, 100)
    assert view.lookup(a, b"x").size == 1, "nothing was remembered of it"


def test_a_manifest_that_is_not_the_records(store: LocalStore) -> None:
    """Of another number of nodes, or with chunks of other lengths than it says."""
    publish(store, package("a", {"x": b"x"}), package("b", {"y": noise("y", 100)}))
    view = StoreView(store)
    a = row_of(store, "a")
    with store.transaction() as index, index.write() as txn:
        raw = txn.get("inodes", a.base.to_bytes(8, "big"))
        assert raw is not None
        txn.put("inodes", a.base.to_bytes(8, "big"), raw[:32] + (9).to_bytes(4, "little") + raw[36:])
    with pytest.raises(FormatError, match="nodes"):
        view.attributes(a.base)
    b = row_of(store, "b")
    view._chunks[next(d for d, p in store.places("chunks") if p.length == 100)] = b"short"
    with pytest.raises(FormatError, match="has 5 bytes"):
        view.read(b.base + 1, 0, 10)


# --- under an overlay


def test_a_path_that_is_not_whole_is_fleeting_and_under_an_overlay_absent(root: Path) -> None:
    above = False
    with LocalStore.open(root, write=True) as store:
        view = StoreView(store, list_root=True, under_overlay=lambda: above)
        publish(store, package("top", references=["leaf"]), package("alone"))
        top, alone = (path_of(name).base_name.encode() for name in ("top", "alone"))
        assert view.lookup(ROOT, top).fleeting
        assert not view.lookup(ROOT, alone).fleeting
        assert {entry.name for entry in view.listing(ROOT, 0)} == {b".links", top, alone}
        above = True
        with pytest.raises(PathAbsent):
            view.lookup(ROOT, top)
        assert view.absences.any_of([top])
        assert not view.absences.any_of([alone])
        assert view.lookup(ROOT, alone).inode == row_of(store, "alone").base
        assert {entry.name for entry in view.listing(ROOT, 0)} == {b".links", alone}
        publish(store, package("leaf"))
        assert not view.lookup(ROOT, top).fleeting


def test_under_an_overlay_a_failing_index_makes_names_absent_and_says_so_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    above = False

    def fail(hash_part: bytes) -> None:
        raise IndexLost("the index cannot be read")

    with LocalStore.open(root) as store:
        view = StoreView(store, under_overlay=lambda: above)
        monkeypatch.setattr(store, "find", fail)
        name = path_of("any").base_name.encode()
        with pytest.raises(IndexLost):
            view.lookup(ROOT, name)
        above = True
        for _ in range(3):
            with pytest.raises(PathAbsent):
                view.lookup(ROOT, name)
        assert view.counters.root_failures == 3
        assert len(caplog.records) == 1
        assert view.lookup(ROOT, b".links").inode == LINKS
