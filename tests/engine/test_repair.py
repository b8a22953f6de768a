"""Repair: what can be had again is, from other packs and from originals; the rest is said to be damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cidfs.engine.findings import Report
from cidfs.engine.ingest import ingest
from cidfs.engine.repair import Repair
from cidfs.engine.sources import Batch, DiskSource, Tree
from cidfs.engine.verify import FULL, Depth, verify
from cidfs.engine.wanted import Wanted
from cidfs.errors import DiskFailed
from cidfs.formats import pack
from cidfs.formats.chunking import encode
from cidfs.formats.digest import digest_of
from cidfs.local.collect import collect
from cidfs.local.packs import OWN, PackWriter, pack_path
from cidfs.local.rebuild import rebuild
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore, PublishedPath
from tests.engine.support import TREE, make, nar_of, stored_nar
from tests.engine.test_ingest import NoSteps
from tests.engine.test_verify import damage, found, place_of, small_packs
from tests.local.support import flip, noise, pack_files, package, publish_in

__all__ = ["small_packs"]
QUICK = Depth(quick=True)


async def mend(
    root: Path, *sources: Path | str, depth: Depth = FULL, only: PublishedPath | None = None
) -> tuple[Report, list[str]]:
    """Verify a store (or a path) and repair it; return the report and what was said."""
    with LocalStore.open(root, write=True) as store:
        report = await verify(store, [only] if only else None, NoSteps(), depth)
        repair = Repair(store, report, NoSteps())
        await repair.run([str(s) for s in sources], whole=only is None, read_chunks=depth.full)
        return report, repair.said


async def add(root: Path, *trees: Path) -> list[PublishedPath]:
    """Add trees as `cidfs add` does."""
    with LocalStore.open(root, write=True) as store:
        outcomes = await ingest(store, [Wanted(DiskSource(str(tree)), name=tree.name) for tree in trees])
        rows = [store.find_path(outcome.path) for outcome in outcomes]
        return [PublishedPath(o.path, row) for o, row in zip(outcomes, rows, strict=True) if row is not None]


def chunks_in(root: Path, published: PublishedPath, file: bytes) -> list[bytes]:
    """Return the digests of a file's chunks."""
    with LocalStore.open(root) as store:
        manifest = store.read_manifest(published.row.manifest)
        index = manifest.resolve(file)
        assert index is not None
        return [span.digest for span in manifest.spans(manifest.node(index))]


def again(root: Path) -> None:
    """Make the index anew."""
    rebuild(StateFolder.open(root), lock_timeout=5)


async def assert_well(root: Path) -> None:
    """Nothing is wrong, and nothing is after a rebuild."""
    assert (await found(root)).problems == []
    again(root)
    assert (await found(root)).problems == []


async def test_nothing_is_touched_where_nothing_is_wrong(root: Path, room: Path) -> None:
    await add(root, make(room / "tree", TREE))
    before = {path: path.read_bytes() for path in (root / "packs").rglob("*") if path.is_file()}
    report, said = await mend(root, room / "tree")
    assert (report.problems, said) == ([], [])
    assert before == {path: path.read_bytes() for path in (root / "packs").rglob("*") if path.is_file()}


async def test_a_full_disk_ends_a_repair_and_is_no_missing_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise("twice", 5000)
    publish_in(root, package("a", {"x": data}))
    store_twice(root, data)
    damage(root, "chunks", digest_of(data))
    before = (await found(root)).problems

    def full(*_: object) -> None:
        raise DiskFailed("packs: cannot write: the disk is full")

    monkeypatch.setattr(PackWriter, "append", full)
    with pytest.raises(DiskFailed, match="full"):
        await mend(root)
    monkeypatch.undo()
    assert (await found(root)).problems == before
    report, _ = await mend(root)
    assert report.left == 0


async def test_a_pack_that_is_gone_is_one_finding_of_one_path_too(root: Path, room: Path) -> None:
    """Its manifest hides that; what shows when that is back counts once."""
    tree = make(room / "tree", TREE)
    [published] = await add(root, tree)
    digests = chunks_in(root, published, b"large")
    assert len(digests) > 3
    os.unlink(place_path(root, digests[0]))
    damage(root, "manifests", published.row.manifest)
    report, _ = await mend(root, tree, only=published)
    assert report.left == 0
    assert report.repaired == len(report.findings) == 2


# --- from what is here


@pytest.mark.parametrize("sealed", [False, True])
async def test_another_copy_in_another_pack_is_taken(
    root: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise("twice", 5000)
    publish_in(root, package("a", {"x": data}))
    if sealed:
        monkeypatch.setattr(pack, "ROLL_SIZE", 4000)
    store_twice(root, data)
    damage(root, "chunks", digest_of(data))
    [other] = [path for path in pack_files(root, "own") if path != place_path(root, digest_of(data))]
    report, _ = await mend(root)
    assert report.left == 0
    assert len(report.problems) == 2
    assert f"; repaired: from another copy, in {other}" in report.problems[0]
    assert report.problems[1].endswith("; repaired")
    await assert_well(root)


def store_twice(root: Path, data: bytes) -> None:
    """Append a chunk that is there once more to another pack, as two adds at once do."""
    with LocalStore.open(root, write=True) as store:
        writer = store.pack_writer(OWN)
        writer._candidates.clear()
        writer.append(digest_of(data), *encode(data), len(data))
        writer.sync()
        store.put_places("chunks", [], writer)
        writer.close()


def place_path(root: Path, digest: bytes) -> Path:
    """Return the pack that a chunk's row points to."""
    place = place_of(root, "chunks", digest)
    return pack_path(root, place.kind, place.pack)


async def test_without_another_copy_it_stays_damaged_and_says_what_would_help(root: Path) -> None:
    publish_in(root, package("a", {"x": noise("x", 900)}), package("b"))
    damage(root, "chunks", digest_of(noise("x", 900)))
    report, _ = await mend(root)
    assert report.left == 2
    assert "not repaired: no other copy is here; name an original with --from" in report.problems[0]
    assert (await found(root)).left == 2


@pytest.mark.parametrize("packs", ["open packs", "sealed packs"])
async def test_what_nothing_needs_is_forgotten(
    root: Path, packs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that adding the same contents stores them anew instead of relying on the damaged copy."""
    if packs == "sealed packs":
        monkeypatch.setattr(pack, "ROLL_SIZE", 500)
    data = noise("unneeded", 900)
    publish_in(root, package("a"))
    with LocalStore.open(root, write=True) as store:
        writer = store.pack_writer(OWN)
        place = writer.append(digest_of(data), *encode(data), len(data))
        writer.sync()
        store.put_places("chunks", [(digest_of(data), place)], writer)
        writer.close()
    damage(root, "chunks", digest_of(data))
    report, _ = await mend(root)
    assert report.left == 0
    assert "forgotten, for nothing needs it" in report.problems[0]
    assert (await found(root)).problems == []
    with LocalStore.open(root, write=True) as store:
        collect(store)  # a footer would say at a rebuild what it said before
    await assert_well(root)
    publish_in(root, package("b", {"x": data}))
    await assert_well(root)


async def test_a_row_that_is_lost_is_for_rebuild(root: Path) -> None:
    data = noise("x", 900)
    publish_in(root, package("a", {"x": data}))
    [path] = pack_files(root, "own")
    with LocalStore.open(root, write=True) as store, store.transaction() as index, index.write() as txn:
        txn.drop_place("chunks", digest_of(data))
    report, _ = await mend(root)
    assert report.left == 2
    assert f"it is in {path}: run `cidfs rebuild`" in report.problems[0]
    again(root)
    assert (await found(root)).problems == []


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("kind", ["own", "manifest"])
async def test_a_pack_with_a_damaged_footer_is_emptied(root: Path, kind: str) -> None:
    publish_in(
        root, *(package(f"p{i}", {f"file-{j}": noise(f"{i}-{j}", 900) for j in range(9)}) for i in range(9))
    )
    with LocalStore.open(root) as store:
        sealed = [pack_path(root, row.kind, i) for i, row in store.pack_rows() if row.sealed]
    path = next(path for path in sealed if path.parts[-3] == kind)
    flip(path, path.stat().st_size - 100)
    report, _ = await mend(root)
    assert report.left == 0
    assert len(report.problems) == 1
    assert "its frames were stored again elsewhere" in report.problems[0]
    assert (await found(root)).problems == []
    path.unlink()
    assert (await found(root)).problems == [], "nothing needs it any more"


# --- from originals


@pytest.mark.parametrize("packs", ["open packs", "sealed packs"])
async def test_a_damaged_chunk_and_manifest_come_back_from_the_original(
    root: Path, room: Path, packs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packs == "sealed packs":
        monkeypatch.setattr(pack, "ROLL_SIZE", 500)
    tree = make(room / "tree", TREE)
    [published] = await add(root, tree)
    files = (b"large", b"bin/tool", b"lib/a-b")
    for file in files:
        damage(root, "chunks", chunks_in(root, published, file)[-1])
    damage(root, "manifests", published.row.manifest)
    assert (await found(root)).left == 5
    report, said = await mend(root, tree)
    assert (report.left, said) == (0, [])
    assert all("repaired" in line for line in report.problems)
    assert sum(f"repaired: from {tree}" in line for line in report.problems) == 4
    with LocalStore.open(root) as store:
        assert stored_nar(store, published.path) == nar_of(TREE)
    await assert_well(root)


async def test_chunks_are_found_wherever_they_lie_below_what_is_named(root: Path, room: Path) -> None:
    trees = [make(room / f"tree-{i}", {b"x": noise(str(i), 70_000), b"y": b"%d" % i}) for i in range(3)]
    paths = await add(root, *trees)
    moved = room / "elsewhere" / "deep"
    moved.parent.mkdir()
    (trees[0] / "x").rename(moved)
    for published in paths:
        damage(root, "chunks", chunks_in(root, published, b"x")[0])
    report, _ = await mend(root, moved, room / "tree-1")
    assert report.left == 2
    assert len([line for line in report.problems if "repaired: from" in line]) == 2
    report, _ = await mend(root, room)
    assert report.left == 0
    await assert_well(root)


async def test_paths_are_found_by_name_in_a_nix_store(root: Path, room: Path) -> None:
    tree = make(room / "tree", TREE)
    other = make(room / "other", {b"o": noise("o", 900)})
    first, second = await add(root, tree, other)
    (room / "root" / "nix" / "store").mkdir(parents=True)
    tree.rename(room / "root" / "nix" / "store" / first.path.base_name)
    damage(root, "manifests", first.row.manifest)
    damage(root, "chunks", chunks_in(root, second, b"o")[0])
    report, _ = await mend(root, room / "root")
    assert report.left == 2
    assert "nor in what --from names" in "".join(report.problems)
    report, _ = await mend(root, room / "root", room)  # other: by its name without the hash part
    assert report.left == 0
    await assert_well(root)


async def test_what_only_resembles_the_original_changes_nothing(root: Path, room: Path) -> None:
    tree = make(room / "tree", {b"x": noise("x", 900), b"y": b"y"})
    [published] = await add(root, tree)
    damage(root, "chunks", chunks_in(root, published, b"x")[0])
    damage(root, "manifests", published.row.manifest)
    (tree / "x").write_bytes(noise("other", 900))
    before = [path.stat().st_size for path in pack_files(root, "own") + pack_files(root, "manifest")]
    report, _ = await mend(root, tree)
    assert report.left == 3
    assert before == [path.stat().st_size for path in pack_files(root, "own") + pack_files(root, "manifest")]


async def test_an_original_that_cannot_be_read_whole_gives_what_it_can(root: Path, room: Path) -> None:
    tree = make(room / "tree", {b"a": b"a", b"x": noise("x", 900)})
    [published] = await add(root, tree)
    damage(root, "chunks", chunks_in(root, published, b"x")[0])
    os.mkfifo(tree / "b")
    report, said = await mend(root, tree)
    assert report.left == 0
    assert len(said) == 1
    assert str(tree / "b") in said[0]


async def test_a_pack_that_is_gone_comes_back_also_after_a_rebuild(root: Path, room: Path) -> None:
    tree = make(room / "tree", TREE)
    [published] = await add(root, tree)
    for rebuilt in (False, True):
        pack_files(root, "own")[0].unlink()
        if rebuilt:
            again(root)
            assert (await found(root)).left
        report, _ = await mend(root, tree)
        assert report.left == 0
        with LocalStore.open(root) as store:
            assert stored_nar(store, published.path) == nar_of(TREE)
    await assert_well(root)


async def test_a_manifest_that_a_rebuild_did_not_find_comes_back(root: Path, room: Path) -> None:
    tree = make(room / "tree", TREE)
    [published] = await add(root, tree)
    pack_files(root, "manifest")[0].unlink()
    report = rebuild(StateFolder.open(root), lock_timeout=5)
    assert report.lost_manifests == 1
    assert (await found(root)).left == 2
    assert (await mend(root, tree))[0].left == 0
    assert (await found(root)).problems == []
    with LocalStore.open(root) as store:
        assert store.find_path(published.path) == published.row, "its size and number of files too"
    again(root)
    assert (await found(root)).problems == []


async def test_one_path_may_be_repaired_alone_and_in_the_quick_form(root: Path, room: Path) -> None:
    trees = [make(room / f"tree-{i}", {b"x": noise(str(i), 900)}) for i in range(2)]
    paths = await add(root, *trees)
    for published in paths:
        damage(root, "chunks", chunks_in(root, published, b"x")[0])
        damage(root, "manifests", published.row.manifest)
    report, _ = await mend(root, *trees, only=paths[0])
    assert report.left == 0
    left = await found(root)
    assert {line.split(":")[0] for line in left.problems if line.startswith("/nix")} == {
        paths[1].path.full("/nix/store")
    }
    report, _ = await mend(root, *trees, depth=QUICK)
    assert report.left == 0
    assert [f.kind for f in (await found(root)).findings] == ["chunk"], "the quick form reads none"
    await mend(root, trees[1])
    await assert_well(root)


async def test_a_repair_that_fails_half_way_is_run_again(
    root: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make(room / "tree", TREE)
    [published] = await add(root, tree)
    digests = chunks_in(root, published, b"large")
    for digest in digests:
        damage(root, "chunks", digest)
    before = (await found(root)).problems
    read = DiskSource.read

    def failing(self: DiskSource, tree: Tree) -> Iterator[Batch]:
        for number, batch in enumerate(read(self, tree)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(DiskSource, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        await mend(root, tree)
    monkeypatch.setattr(DiskSource, "read", read)
    assert (await found(root)).problems == before
    assert (await mend(root, tree))[0].left == 0
    await assert_well(root)
