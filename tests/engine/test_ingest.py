"""Ingest: what is published, what is not after a failure, what is stored once, how much is held in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cidfs.engine.ingest import first_error, ingest
from cidfs.engine.progress import Progress
from cidfs.engine.sources import Batch, DiskSource, NarSource, Tree
from cidfs.engine.verify import verify
from cidfs.engine.wanted import Wanted
from cidfs.errors import CidfsError, FormatError, HashMismatch, LockTimeout, SourceError
from cidfs.formats import frames, journal
from cidfs.formats.digest import digest_of
from cidfs.formats.store_path import StorePath, fixed_output_ca, fixed_output_path, parse_base_name
from cidfs.local.publish import Candidate, Published
from cidfs.local.store import LocalStore
from tests.engine.actions import FILES, ingest_and_tell, ingest_beyond_a_limit, ingest_large_file
from tests.engine.support import TREE, Pieces, file_source, make, nar_of, sha256, stored_nar
from tests.local.children import crash, hold_write_lock, run, running
from tests.local.disk import Plan
from tests.local.support import noise, pack_files, package, path_of, publish


class NoSteps:
    """Steps that nobody watches."""

    def begin(self, label: str, total: int) -> None:
        """A stage."""

    def step(self, count: int = 1) -> None:
        """A step."""


def names(store: LocalStore) -> list[str]:
    return sorted(p.path.name for p in store.paths())


def stored_frames(root: Path) -> list[bytes]:
    """Return the digest of every chunk frame in the packs."""
    found = []
    for path in pack_files(root, "own"):
        for item in frames.scan(path.read_bytes(), 16):
            assert isinstance(item, frames.Found)
            if item.header.kind == frames.KIND_CHUNK:
                found.append(item.header.digest)
    return found


def nar_wanted(data: bytes, name: str, *lengths: int) -> Wanted:
    return Wanted(NarSource(Pieces(data, *(lengths or (1 << 20,))), name), name=name)


# --- what is published


async def test_a_tree_comes_out_as_it_went_in(root: Path, room: Path) -> None:
    top = make(room / "tree", TREE)
    with LocalStore.open(root, write=True) as store:
        [outcome] = await ingest(store, [Wanted(DiskSource(str(top)), name="tree")])
        archive = nar_of(TREE)
        assert outcome.path == fixed_output_path(sha256(archive), "tree")
        assert stored_nar(store, outcome.path) == archive
        record = store.record_of(outcome.path.hash_part)
        assert record is not None
        assert (record.nar_hash, record.nar_size) == (sha256(archive), len(archive))
        assert record.ca == fixed_output_ca(sha256(archive))
        assert (await verify(store, None, NoSteps())).problems == []


@pytest.mark.parametrize("tree", [b"", b"one file", ("x", b"#!/bin/sh"), ("l", b"target"), {}])
async def test_a_path_need_not_be_a_directory(root: Path, room: Path, tree: bytes) -> None:
    top = make(room / "top", tree)
    with LocalStore.open(root, write=True) as store:
        [a] = await ingest(store, [Wanted(DiskSource(str(top)), name="a")])
        [b] = await ingest(store, [nar_wanted(nar_of(tree), "a")])
        assert (a.new, b.new, a.path) == (True, False, b.path)
        assert stored_nar(store, a.path) == nar_of(tree)


@pytest.mark.parametrize("lengths", [(1 << 20,), (8,), (1, 100_000, 7)])
async def test_a_nar_gives_what_the_disk_gives(root: Path, room: Path, lengths: tuple[int, ...]) -> None:
    top = make(room / "tree", TREE)
    with LocalStore.open(root, write=True) as store:
        disk, stream = await ingest(
            store,
            [Wanted(DiskSource(str(top)), name="tree"), nar_wanted(nar_of(TREE), "other", *lengths)],
        )
        rows = [store.find_path(o.path) for o in (disk, stream)]
        assert rows[0] is not None
        assert rows[1] is not None
        assert rows[0].manifest == rows[1].manifest, "one CID"
        assert store.totals().manifests == 1
        again = await ingest(store, [nar_wanted(nar_of(TREE), "tree", *lengths)])
        assert [(o.path, o.new) for o in again] == [(disk.path, False)]


def nodes() -> st.SearchStrategy[object]:
    entry_names = st.sampled_from([b"a", b"b", b"a.b", b"A", b"\xff", b"name with spaces"])
    leaves = st.one_of(
        st.binary(max_size=60),
        st.tuples(st.just("x"), st.binary(max_size=9)),
        st.tuples(st.just("l"), st.sampled_from([b"t", b"/abs", b"\xfe"])),
    )
    return st.recursive(leaves, lambda inner: st.dictionaries(entry_names, inner, max_size=4), max_leaves=12)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=nodes())
async def test_any_tree_comes_out_as_it_went_in(root: Path, room: Path, tree: bytes) -> None:
    number = len(os.listdir(room))
    top = make(room / f"tree-{number}", tree)
    with LocalStore.open(root, write=True) as store:
        [a] = await ingest(store, [Wanted(DiskSource(str(top)), name="a")])
        [b] = await ingest(store, [nar_wanted(nar_of(tree), "a", 13)])
        assert (a.path, b.new) == (b.path, False)
        assert stored_nar(store, a.path) == nar_of(tree)


async def test_what_is_known_of_a_path_is_recorded(root: Path) -> None:
    data = nar_of(b"contents")
    wanted = Wanted(
        NarSource(Pieces(data, 9), "x"),
        path=path_of("x"),
        expected_hash=sha256(data),
        expected_size=len(data),
        references=(path_of("b").base_name, path_of("a").base_name, path_of("b").base_name),
        deriver=path_of("x.drv").base_name,
        ca="text:sha256:abc",
        signatures=("k2:b", "k1:a", "k2:b"),
    )
    with LocalStore.open(root, write=True) as store:
        [outcome] = await ingest(store, [wanted])
        assert outcome.path == path_of("x")
        record = store.record_of(outcome.path.hash_part)
        assert record is not None
        assert record.references == tuple(sorted((path_of("a").base_name, path_of("b").base_name)))
        assert (record.deriver, record.ca) == (path_of("x.drv").base_name, "text:sha256:abc")
        assert record.signatures == ("k1:a", "k2:b")


class Unread:
    """A source that must not be read."""

    label = "unread"

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Fail."""
        raise AssertionError("was read")


async def test_what_is_here_already_is_not_read(root: Path) -> None:
    data = nar_of(b"contents")
    known = Wanted(
        Unread(), path=path_of("x"), expected_hash=sha256(data), references=(path_of("r").base_name,)
    )
    with LocalStore.open(root, write=True) as store:
        await ingest(store, [replace(known, source=NarSource(Pieces(data, 9), "x"))])
        row = store.find_path(path_of("x"))
        [a, b] = await ingest(
            store,
            [
                known,
                replace(known, signatures=("k:1",), deriver=path_of("d.drv").base_name),
            ],
        )
        assert [(o.new, o.amended) for o in (a, b)] == [(False, False), (False, True)]
        assert store.find_path(path_of("x")) == row
        record = store.record_of(path_of("x").hash_part)
        assert record is not None
        assert (record.signatures, record.deriver) == (("k:1",), path_of("d.drv").base_name)
        assert record.references == (path_of("r").base_name,)
        with pytest.raises(AssertionError, match="was read"):
            await ingest(store, [replace(known, references=())])


async def test_others_are_told_as_it_goes(root: Path) -> None:
    told: list[str] = []
    labels: list[str] = []
    counted = [0]

    class Told(Progress):
        def path(self, label: str) -> None:
            labels.append(label)

        def bytes(self, count: int) -> None:
            counted[0] += count

    def on_published(outcomes: Sequence[Published]) -> None:
        for outcome in outcomes:
            raw = (root / "journal" / "1").read_bytes()
            entries = [
                e
                for f in frames.scan(raw)
                if isinstance(f, frames.Found)
                for e in journal.decode(f.data).entries
            ]
            assert any(outcome.path.name.encode() in getattr(e, "record", b"") for e in entries), (
                "it is durable"
            )
            told.append(outcome.path.name)

    items = [file_source(f"p{i}", noise(str(i), 1000), b"x" * 500) for i in range(30)]
    with LocalStore.open(root, write=True) as store:
        outcomes = await ingest(store, items, progress=Told(), on_published=on_published)
    assert told == labels == [o.path.name for o in outcomes] == [f"p{i}" for i in range(30)]
    assert counted == [30 * 1500]


# --- what is not published after a failure


def mismatches() -> list[Wanted]:
    data = nar_of(noise("mismatch", 200_000))
    return [
        Wanted(NarSource(Pieces(data, 4096), "m"), path=path_of("m"), expected_hash=bytes(32)),
        Wanted(NarSource(Pieces(data, 4096), "m"), path=path_of("m"), expected_size=len(data) + 1),
        Wanted(NarSource(Pieces(data[:-1], 4096), "m"), path=path_of("m")),
        Wanted(NarSource(Pieces(data + b"\0", 4096), "m"), path=path_of("m")),
        Wanted(NarSource(Pieces(noise("garbage", 9999), 4096), "m"), path=path_of("m")),
        Wanted(DiskSource("/absent/file"), path=path_of("m")),
        file_source("m", noise("m", 3000), noise("mm", 3000), between=fails_at(1)),
        file_source("m", noise("m", 3000), between=fails_at(1)),
    ]


def fails_at(batch: int) -> Callable[[int], None]:
    def between(number: int) -> None:
        if number == batch:
            raise SourceError("m: the source failed")

    return between


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("case", range(8))
async def test_what_failed_leaves_nothing_visible(root: Path, case: int, goes_on: bool) -> None:
    """What was finished before it is published, and what comes later where the caller goes on."""
    told: list[str] = []
    errors: list[CidfsError] = []
    items = [
        file_source("a", b"a", noise("a", 5000)),
        mismatches()[case],
        file_source("b", b"b", noise("m", 3000)),
    ]

    def on_published(outcomes: Sequence[Published]) -> None:
        told.extend(o.path.name for o in outcomes)

    with LocalStore.open(root, write=True) as store:
        if goes_on:
            await ingest(store, items, on_published=on_published, on_failed=errors.append)
            [error] = errors
            assert told == names(store) == ["a", "b"]
            later = next(p.path for p in store.paths() if p.path.name == "b")
            assert stored_nar(store, later) == nar_of(b"b" + noise("m", 3000)), (
                "nothing of the other is in it"
            )
        else:
            with pytest.raises(CidfsError) as raised:
                await ingest(store, items, on_published=on_published)
            error = raised.value
            assert told == names(store) == ["a"]
        assert isinstance(error, HashMismatch | SourceError | FormatError)
        assert (await verify(store, None, NoSteps())).problems == []
        assert os.listdir(root / "run") == []


async def test_an_error_that_is_not_ours_ends_it_as_it_is(root: Path) -> None:
    def between(number: int) -> None:
        raise ZeroDivisionError

    with LocalStore.open(root, write=True) as store:
        with pytest.raises(ZeroDivisionError):
            await ingest(store, [file_source("x", b"x", between=between)])
        assert names(store) == []


async def test_what_no_store_path_can_hold(root: Path, room: Path) -> None:
    make(room / "tree", {b"dir": {b"f": b"x"}})
    os.mkfifo(room / "tree" / "dir" / "pipe")
    with LocalStore.open(root, write=True) as store:
        with pytest.raises(SourceError, match=r"tree/dir/pipe: neither"):
            await ingest(store, [Wanted(DiskSource(str(room / "tree")), name="tree")])
        with pytest.raises(SourceError, match="changed while it was read"):
            await ingest(store, [Wanted(DiskSource("/proc/self/status"), name="status")])
        assert names(store) == []


async def test_a_lock_that_is_not_given(root: Path) -> None:
    with running(hold_write_lock, root) as child:
        assert child.hear() == "held"
        child.kill()
    with LocalStore.open(root, write=True, lock_timeout=0.2) as store:
        with running(hold_write_lock, root) as child:
            assert child.hear() == "held"
            child.stop()
            with pytest.raises(LockTimeout, match="stopped"):
                await ingest(store, [file_source("x", b"x")])
        assert names(store) == []
        await ingest(store, [file_source("x", b"x")])
        assert names(store) == ["x"]


def test_a_disk_that_becomes_full(root: Path) -> None:
    code, said = run(ingest_beyond_a_limit, root)
    assert code == 0
    assert said[0][0] == "DiskFailed"
    assert said[1] == ["a"]
    assert said[2] == ["a", "b", "c"]


@pytest.mark.parametrize("kill_at", [0, *range(1, 50, 6)])
def test_what_was_done_is_there_after_a_power_loss(small: Path, room: Path, kill_at: int) -> None:
    """All that was not synced is lost; what was reported is not."""
    code, said = crash(small, Plan(kill_at=kill_at, lost=str(room / "lost")), ingest_and_tell)
    done = [parse_base_name(name) for word in said if word[0] == "done" for name in word[1]]
    contents = {name: b"".join(batches) for name, batches in FILES}
    if code == 0:
        assert [p.name for p in done] == list(contents)
    with LocalStore.open(small) as store:
        for path in {*done, *(p.path for p in store.paths())}:
            assert stored_nar(store, path) == nar_of(contents[path.name])


async def test_the_places_that_were_noted_are_those_of_the_path(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that goes before the commit is put back, also behind a source that failed half-way."""
    real = LocalStore.publish

    def publish_without_rows(store: LocalStore, group: Sequence[Candidate]) -> list[Published]:
        if "b" in [c.record.path.name for c in group]:
            with store.transaction() as index, index.write() as txn:
                for digest, _ in list(txn.rows("chunks")):
                    txn.drop_place("chunks", digest)
        return real(store, group)

    monkeypatch.setattr(LocalStore, "publish", publish_without_rows)
    items = [
        file_source("a", noise("a", 500), noise("m", 700)),
        file_source("m", noise("m", 700), noise("mm", 900), between=fails_at(2)),
        file_source("b", noise("b", 600), noise("mm", 900)),
    ]
    with LocalStore.open(root, write=True) as store:
        a, b = await ingest(store, items, on_failed=lambda error: None)
        monkeypatch.undo()
        assert stored_nar(store, b.path) == nar_of(noise("b", 600) + noise("mm", 900))
        assert a.new


async def test_a_cancelled_ingest_leaves_nothing(root: Path) -> None:
    reached, go = threading.Event(), threading.Event()

    def between(number: int) -> None:
        if number == 2:
            reached.set()
            go.wait(30)

    with LocalStore.open(root, write=True) as store:
        publish(store, package("before", {"x": b"x"}))
        [own], [manifest] = pack_files(root, "own"), pack_files(root, "manifest")
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                items = [file_source("x", noise("1", 9000), noise("2", 9000), b"3", between=between)]
                await ingest(store, items)
                raise AssertionError("it was not cancelled")

            nursery.start_soon(work)
            await trio.to_thread.run_sync(reached.wait, 30)
            nursery.cancel_scope.cancel()
        go.set()
        assert names(store) == ["before"]
        assert os.listdir(root / "run") == []
        publish(store, package("after", {"y": b"y"}))
        assert (pack_files(root, "own"), pack_files(root, "manifest")) == ([own], [manifest]), (
            "none is locked"
        )
        assert (await verify(store, None, NoSteps())).problems == []


# --- what is stored once, and in what groups


async def test_the_same_contents_are_stored_once(root: Path) -> None:
    """Within a batch, across batches, across paths, across groups and ingests."""
    chunks = [noise(f"c{i}", 3000) for i in range(5)]
    items = [
        file_source(f"p{i}", *[chunks[(i + j) % 5] for j in range(7)], b"tail %d" % (i % 2))
        for i in range(12)
    ]
    with LocalStore.open(root, write=True) as store:
        await ingest(store, items[:8])
        await ingest(store, items[8:])
        assert len(names(store)) == 12
        assert (await verify(store, None, NoSteps())).problems == []
    expected = {digest_of(c) for c in (*chunks, b"tail 0", b"tail 1")}
    assert sorted(stored_frames(root)) == sorted(expected)


async def test_the_same_again_after_its_row_was_committed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that waited for its row when it was looked up, and has it when it is to be written."""
    monkeypatch.setattr("cidfs.engine.ingest.ROWS_A_TRANSACTION", 3)
    chunks = [noise(f"c{i}", 200) for i in range(10)]
    with LocalStore.open(root, write=True) as store:
        items = [file_source(f"p{i}", *(chunks[j % 10] for j in range(i, i + 25))) for i in range(6)]
        await ingest(store, items)
        assert (await verify(store, None, NoSteps())).problems == []
        assert store.totals().chunks == 10
    assert len(stored_frames(root)) == 10


async def test_many_small_paths_are_published_in_groups(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cidfs.engine.ingest.GROUP_SECONDS", 1e9)
    groups: list[int] = []
    items = [file_source(f"p{i}", b"%d" % (i % 7)) for i in range(1000)]
    with LocalStore.open(root, write=True) as store:
        outcomes = await ingest(store, items, on_published=lambda o: groups.append(len(o)))
        assert groups == [256, 256, 256, 232]
        assert [o.path.name for o in outcomes] == [f"p{i}" for i in range(1000)]
        assert store.totals().paths == 1000
        assert store.totals().manifests == 7
    raw = (root / "journal" / "1").read_bytes()
    assert len([f for f in frames.scan(raw) if isinstance(f, frames.Found)]) == 4


async def test_a_group_does_not_wait_for_the_next_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cidfs.engine.ingest.GROUP_SECONDS", 0)
    groups: list[int] = []
    with LocalStore.open(root, write=True) as store:
        items = [file_source(f"p{i}", b"%d" % i) for i in range(5)]
        await ingest(store, items, on_published=lambda o: groups.append(len(o)))
    assert groups == [1] * 5


async def test_a_conflict_is_an_outcome(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("x"))
        data = nar_of(b"other")
        items = [Wanted(NarSource(Pieces(data, 9), "x"), path=path_of("x")), file_source("y", b"y")]
        a, b = await ingest(store, items)
        assert "other contents" in a.conflict
        assert b.new
        assert names(store) == ["x", "y"]


def test_a_large_file_is_streamed(root: Path, room: Path) -> None:
    """A sparse file of 200 MiB with 64 MiB of noise in it: memory does not grow with it."""
    noisy = os.urandom(64 << 20)
    with open(room / "large", "wb") as file:
        file.truncate(200 << 20)
        file.seek(50 << 20)
        file.write(noisy)
    code, [(grown, base_name)] = run(ingest_large_file, root, room / "large")
    assert code == 0
    assert grown < 120 << 20
    with LocalStore.open(root) as store:
        path = StorePath(base_name[:32], base_name[33:])
        row = store.find_path(path)
        assert row is not None
        assert row.size == 200 << 20
        manifest = store.read_manifest(row.manifest)
        spans = list(manifest.spans(manifest.node(0)))
        at = next(s for s in spans if s.end > 70 << 20)
        assert store.read_chunk(at.digest) == noisy[at.start - (50 << 20) : at.end - (50 << 20)]
    (room / "large").unlink()


# --- errors


def test_the_error_that_tells_most() -> None:
    ours, other = SourceError("ours"), ValueError("other")
    group = BaseExceptionGroup("g", [other, BaseExceptionGroup("h", [ours])])
    assert first_error(group) is ours
    assert first_error(BaseExceptionGroup("g", [KeyboardInterrupt(), other])).__class__ is KeyboardInterrupt
    assert first_error(BaseExceptionGroup("g", [other])) is other
