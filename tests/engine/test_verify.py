"""Verification: what is damaged is named, with what it touches; what is not is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cidfs.engine.findings import FINDINGS_SHOWN, Report
from cidfs.engine.verify import FULL, Depth, Sample, verify
from cidfs.formats import frames, journal, pack, record
from cidfs.formats.digest import cid_text, digest_of
from cidfs.formats.manifest import Manifest
from cidfs.local.collect import collect
from cidfs.local.index import WriteTxn
from cidfs.local.journal import Journal
from cidfs.local.packs import OWN, pack_path
from cidfs.local.rows import InodeRow, PackRow, PathRow, Place, number_key
from cidfs.local.store import LocalStore
from tests.engine.test_ingest import NoSteps
from tests.local.support import CHUNK, flip, key_of, noise, pack_files, package, path_of, publish_in, row_of

QUICK = Depth(quick=True)
BIG = noise("big", 3 * CHUNK)
SHARED = noise("shared", 5000)


@pytest.fixture
def filled(root: Path) -> Path:
    """Return a store with four paths: two share a file, two refer to another, all is whole."""
    publish_in(root, package("a", {"big": BIG, "shared": SHARED}), package("b", {"too": SHARED}, ["a", "b"]))
    publish_in(root, package("c", {"own": noise("c", 900)}, ["b"]), package("d"))
    return root


async def found(root: Path, depth: Depth = FULL, *names: str) -> Report:
    """Verify a store, or some of its paths."""
    with LocalStore.open(root) as store:
        chosen = [p for p in store.paths() if p.path.name in names] if names else None
        return await verify(store, chosen, NoSteps(), depth)


def full(name: str) -> str:
    """Return a path's name as verify says it."""
    return path_of(name).full("/nix/store")


def place_of(root: Path, database: str, digest: bytes) -> Place:
    """Return where something lies."""
    with LocalStore.open(root) as store:
        place = store.place(database, digest)
        assert place is not None
        return place


def damage(root: Path, database: str, digest: bytes, *, at: int = frames.HEADER_SIZE) -> Path:
    """Flip a bit of a stored frame and return its pack."""
    place = place_of(root, database, digest)
    path = pack_path(root, place.kind, place.pack)
    flip(path, place.offset + at)
    return path


def change(root: Path, act: Callable[[WriteTxn], object]) -> None:
    """Change rows of the index as no command would."""
    with LocalStore.open(root, write=True) as store, store.transaction() as index, index.write() as txn:
        act(txn)


def append(path: Path, data: bytes) -> None:
    """Write behind the end of a file."""
    with open(path, "ab") as file:
        file.write(data)


# --- what is well


@pytest.mark.parametrize("depth", [FULL, QUICK, Depth(sample=Sample(2, 0, 1)), Depth(sample=Sample(0, 1, 1))])
async def test_nothing_is_found_where_nothing_is_wrong(filled: Path, depth: Depth) -> None:
    report = await found(filled, depth)
    assert (report.problems, report.left, report.paths) == ([], 0, 4)
    assert report.chunks == {0: 0, 2: 2, 1: 6}[depth.sample.count or 1 if depth.sample else 0]
    assert (report.frames, report.packs) == ((10, 2) if depth.full else (0, 0))


async def test_an_empty_store_is_well(root: Path) -> None:
    assert (await found(root)).problems == []


async def test_what_a_killed_writer_left_is_no_damage(filled: Path) -> None:
    torn = frames.build_from(frames.KIND_CHUNK, noise("torn", 9000))
    entry = journal.encode([journal.Removal(9, 9, "a" * 32)])
    for kind in ("own", "manifest"):
        append(pack_files(filled, kind)[0], torn + torn[:5000])
    append(filled / "journal" / "1", entry[:-1])
    (filled / "packs" / "own" / "00" / f"00{'0' * 22}.new").write_bytes(pack.HEADER)
    for depth in (FULL, QUICK):
        assert (await found(filled, depth)).problems == []


# --- damaged frames


@pytest.mark.parametrize("at", [0, 5, 9, 20, 50, frames.HEADER_SIZE, frames.HEADER_SIZE + 4000])
async def test_a_damaged_chunk_is_named_with_all_that_it_touches(filled: Path, at: int) -> None:
    digest = digest_of(SHARED)
    path = damage(filled, "chunks", digest, at=at)
    report = await found(filled)
    chunk, *paths = report.problems
    assert chunk.startswith(f"{path}: ")
    assert chunk.endswith(f": chunk {cid_text(digest)}")
    assert sorted(paths) == sorted(
        [
            f"{full('a')}: chunk {cid_text(digest)} is damaged: in shared",
            f"{full('b')}: chunk {cid_text(digest)} is damaged: in too",
        ]
    )
    [finding] = report.findings
    assert (finding.kind, finding.what, finding.where) == ("chunk", cid_text(digest), str(path))
    assert sorted(finding.paths) == sorted([f"{full('a')}/shared", f"{full('b')}/too"])
    assert report.left == 3
    assert (await found(filled, FULL, "b")).left == 2
    assert (await found(filled, FULL, "c", "d")).problems == []


async def test_the_quick_form_reads_no_chunk(filled: Path) -> None:
    damage(filled, "chunks", digest_of(SHARED))
    assert (await found(filled, QUICK)).problems == []
    assert (await found(filled, QUICK, "a")).problems == []
    sample = Depth(sample=Sample(0, 1.0, 7))
    assert (await found(filled, sample)).problems == (await found(filled)).problems


async def test_the_same_seed_reads_the_same_chunks(filled: Path) -> None:
    digest = digest_of(SHARED)
    damage(filled, "chunks", digest)
    for sample in (Sample(1, 0, 3), Sample(0, 0.4, 3)):
        hits = [
            seed
            for seed in range(12)
            if (await found(filled, Depth(sample=Sample(sample.count, sample.share, seed)))).left
        ]
        assert 0 < len(hits) < 12
        again = [
            seed
            for seed in range(12)
            if (await found(filled, Depth(sample=Sample(sample.count, sample.share, seed)))).left
        ]
        assert again == hits


@pytest.mark.parametrize("depth", [FULL, QUICK])
async def test_a_damaged_manifest_is_named_with_its_path(filled: Path, depth: Depth) -> None:
    with LocalStore.open(filled) as store:
        digest = row_of(store, "c").manifest
    path = damage(filled, "manifests", digest)
    report = await found(filled, depth)
    assert len(report.problems) == 2
    assert report.problems[0].startswith(f"{path}: ")
    assert report.problems[0].endswith(f": manifest {cid_text(digest)}")
    assert report.problems[1] == f"{full('c')}: its manifest {cid_text(digest)} is damaged"


@pytest.mark.parametrize("depth", [FULL, QUICK])
async def test_a_pack_that_is_gone_is_one_line_and_its_paths(filled: Path, depth: Depth) -> None:
    [path] = pack_files(filled, "own")
    path.unlink()
    report = await found(filled, depth)
    assert report.problems[0] == f"{path}: the pack is gone"
    assert [finding.kind for finding in report.findings] == ["pack"]
    for name in "abcd":
        assert any(line.startswith(f"{full(name)}: chunk ") for line in report.problems)
    assert len(report.problems) == 1 + 4 + 1 + 1 + 1  # of a, three chunks of one file and one of another


@pytest.mark.parametrize("depth", [FULL, QUICK])
async def test_a_pack_that_was_cut_short(filled: Path, depth: Depth) -> None:
    place = place_of(filled, "chunks", digest_of(b"d"))
    path = pack_path(filled, place.kind, place.pack)
    os.truncate(path, place.offset + 20)
    report = await found(filled, depth)
    assert [line.startswith(f"{path}: ") for line in report.problems] == [True, False]
    assert report.problems[1].startswith(full("d"))


async def test_many_damaged_chunks_are_counted(root: Path) -> None:
    names = [f"{i:04}" for i in range(FINDINGS_SHOWN + 234)]
    publish_in(root, package("many", {name: name.encode() for name in names}))
    [path] = pack_files(root, "own")
    data = bytearray(path.read_bytes())
    for name in names:
        place = data.find(name.encode())
        data[place] ^= 0x80
    path.write_bytes(data)
    report = await found(root)
    assert len(report.problems) == FINDINGS_SHOWN + 1 + 10 + 1
    assert report.problems[FINDINGS_SHOWN] == "and 234 more chunks"
    assert (
        report.problems[-1] == f"{full('many')}: {FINDINGS_SHOWN + 234 - 10:,} more of its chunks are damaged"
    )


# --- packs


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("at", [-1, -9, -20, -40, -100])
async def test_a_damaged_footer_is_named(filled: Path, at: int) -> None:
    with LocalStore.open(filled) as store:
        sealed = [pack_path(filled, row.kind, identity) for identity, row in store.pack_rows() if row.sealed]
    assert len(sealed) >= 3
    path = next(path for path in sealed if path.parts[-3] == "own")
    flip(path, path.stat().st_size + at)
    report = await found(filled)
    [line] = report.problems
    assert line.startswith(f"{path}: ")


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seal packs early."""
    monkeypatch.setattr(pack, "ROLL_SIZE", 4000)


@pytest.mark.usefixtures("small_packs")
async def test_a_pack_whose_writer_died_while_he_sealed_it_is_no_damage(root: Path) -> None:
    publish_in(root, package("a", {"x": noise("x", 5000)}))
    [path] = pack_files(root, "own")
    with LocalStore.open(root) as store:
        [(identity, row)] = [(i, r) for i, r in store.pack_rows() if r.kind == OWN]
    os.truncate(path, path.stat().st_size - 40)
    change(root, lambda txn: txn.put("packs", identity, row._replace(sealed=0).packed()))
    assert (await found(root)).problems == []


async def test_the_first_bytes_of_a_pack_count(filled: Path) -> None:
    [path] = pack_files(filled, "own")
    flip(path, 3)
    assert (await found(filled)).problems == [f"{path}: does not begin as a pack does"]


# --- the index


async def test_a_path_that_goes_while_it_is_read_is_no_damage(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is read, and then it and all its chunks are removed and collected."""
    with LocalStore.open(filled, write=True) as store:
        read = store.read_manifest
        wanted = row_of(store, "c").manifest

        def read_and_remove(digest: bytes) -> Manifest:
            manifest = read(digest)
            if digest == wanted and store.find_path(path_of("c")):
                store.remove([path_of("c")])
                assert collect(store).dead_chunks
            return manifest

        monkeypatch.setattr(store, "read_manifest", read_and_remove)
        report = await verify(store, None, NoSteps())
    assert not report.ledger.findings


async def test_a_lost_chunk_row_is_named_with_its_path(filled: Path) -> None:
    digest = digest_of(SHARED)
    change(filled, lambda txn: txn.drop_place("chunks", digest))
    for depth in (FULL, QUICK):
        report = await found(filled, depth)
        assert [f.kind for f in report.findings] == ["chunk"]
        assert "no row; run `cidfs rebuild`" in report.problems[0]
        assert {line.split(":")[0] for line in report.problems[1:]} == {full("a"), full("b")}


def _lose(database: str, key: bytes) -> Callable[[WriteTxn], object]:
    return lambda txn: txn.delete(database, key)


def _whole(whole: int) -> Callable[[WriteTxn], object]:
    def act(txn: WriteTxn) -> None:
        row = PathRow.unpack(txn.get("paths", key_of("c")) or b"")
        values = [getattr(row, name) for name in PathRow.__dataclass_fields__]
        values[3] = whole
        txn.put("paths", key_of("c"), PathRow(*values).packed())

    return act


def _overlap(txn: WriteTxn) -> None:
    txn.put("inodes", number_key(17), InodeRow(b"x" * 32, 5, b"m" * 32).packed())


def _other_sums(txn: WriteTxn) -> None:
    key, raw = next(iter(txn.rows("packs")))
    txn.put("packs", key, PackRow.unpack(raw or b"")._replace(stored=1).packed())


def _damaged_row(txn: WriteTxn) -> None:
    txn.raw.put(b"a" * 32, b"wrong", db=txn.index.db["referrers"])
    txn.put("referrers", b"b" * 64, b"")


DIFFERENCES = {
    "a path": (_lose("paths", key_of("d")), "in the journal and not in the index"),
    "a record": (_lose("records", key_of("c")), "its record is lost from the index"),
    "a referrer": (_lose("referrers", key_of("b") + key_of("c")), "does not say that it refers to"),
    "a referrer too many": (
        lambda t: t.put("referrers", key_of("d") + key_of("c"), b""),
        "does not refer to",
    ),
    "an inode range": (_lose("inodes", number_key(16)), "inode numbers are lost"),
    "ranges that overlap": (_overlap, "are given twice"),
    "the next inode": (lambda txn: txn.put_number("next-base", 17), "the next inode number is 17"),
    "not whole": (_whole(0), "not whole and is"),
    "a pack's sums": (_other_sums, "or other sums"),
    "a damaged row": (_damaged_row, "a row of referrers is damaged"),
    "a serial": (lambda txn: txn.put_number("next-serial", 4), "is at serial 4, and the index at 3"),
    "more serials": (lambda txn: txn.put_number("next-serial", 8), "serials 5 to 7 are in no whole frame"),
}


@pytest.mark.parametrize("which", DIFFERENCES)
@pytest.mark.parametrize("depth", [FULL, QUICK])
async def test_what_is_wrong_in_the_index_is_named(filled: Path, which: str, depth: Depth) -> None:
    act, text = DIFFERENCES[which]
    change(filled, act)
    report = await found(filled, depth)
    assert any(text in line for line in report.problems), report.problems
    assert report.left


async def test_a_path_that_is_not_whole_and_said_to_be(root: Path) -> None:
    publish_in(root, package("c", None, ["b"]))
    assert (await found(root)).problems == []
    change(root, _whole(1))
    [line] = (await found(root)).problems
    assert line.startswith(f"{full('c')}: the index says that it is whole and something that it refers to is")


async def test_another_record_than_the_journals_is_named(filled: Path) -> None:
    other = package("c", {"own": noise("c", 900)}, ["b"], deriver=path_of("deriver").base_name).record
    change(filled, lambda txn: txn.put("records", key_of("c"), record.encode(other, hints=False)))
    assert any("have different records" in line for line in (await found(filled, QUICK)).problems)
    publish_in(filled, package("d", None, signatures=["k:1"]))
    assert len((await found(filled, QUICK)).problems) == 1, "an amendment is no difference"


@pytest.mark.parametrize("at", [0, 10, 60, 100])
async def test_a_damaged_journal_is_named(filled: Path, at: int) -> None:
    flip(filled / "journal" / "1", at)
    report = await found(filled, QUICK)
    assert any("serials 1 to 2 are in no whole frame" in line for line in report.problems)
    assert {finding.kind for finding in report.findings} == {"journal"}


async def test_a_damaged_inode_limit_is_named(filled: Path) -> None:
    slots = (filled / "next-inode").read_bytes()
    assert (await found(filled, QUICK)).problems == []
    flip(filled / "next-inode", 4096 + 3)  # the second slot is the later one
    [line] = (await found(filled, QUICK)).problems
    assert line.startswith(f"{filled}/next-inode: below the numbers that were given out")
    flip(filled / "next-inode", 12)
    [line] = (await found(filled, QUICK)).problems
    assert line.startswith(f"{filled}/next-inode: both slots are damaged")
    (filled / "next-inode").write_bytes(slots)
    assert (await found(filled, QUICK)).problems == []


async def test_a_checkpoint_is_compared_too(filled: Path) -> None:
    replay = Journal(filled / "journal").replay()
    Journal(filled / "journal").write_checkpoint(
        [e for e in replay.entries.values() if isinstance(e, journal.Publication)], 5, replay.next_base
    )
    publish_in(filled, package("e"))
    assert (await found(filled)).problems == []
    [path] = (filled / "journal").iterdir()
    flip(path, path.stat().st_size // 2)
    assert any("serials 1 to 4 are in no whole" in line for line in (await found(filled)).problems)


async def test_damaged_pages_stop_before_the_rows(filled: Path) -> None:
    data = filled / "index" / "1" / "data.mdb"
    with LocalStore.open(filled) as store:
        os.truncate(data, data.stat().st_size - 4096)
        report = await verify(store, None, NoSteps(), QUICK)
    assert report.paths == 0
    assert all("run `cidfs rebuild`" in line for line in report.problems)
    assert report.problems
