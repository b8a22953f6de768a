"""Pack files: who appends where, what a torn end costs, sealing, failed syncs, reading at known places."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path

import pytest

from cidfs.errors import ChunkInvalid, ChunkMissing, DiskFailed
from cidfs.formats import frames, pack
from cidfs.formats.chunking import ENCODING_RAW, encode
from cidfs.formats.digest import digest_of
from cidfs.formats.pack import row_of as frame_row
from cidfs.local import packs as packs_module
from cidfs.local.files import try_flock
from cidfs.local.packs import MANIFEST, OWN, PackReader, PackWriter, pack_path
from cidfs.local.rows import Place
from cidfs.local.store import LocalStore
from tests.local.children import crash, hold_pack, publish_when_full, running
from tests.local.disk import Plan
from tests.local.support import (
    Ledger,
    contents_of,
    flip,
    noise,
    pack_files,
    package,
    publish,
    publish_in,
    row_of,
)


def put(writer: PackWriter, *items: bytes) -> list[Place]:
    """Append frames."""
    return writer.append_many([(digest_of(data), *encode(data), len(data)) for data in items])


def check(root: Path, places: dict[bytes, Place]) -> None:
    """Read every frame at its place."""
    reader = PackReader(root)
    for data, place in places.items():
        assert reader.read(digest_of(data), place) == data


def identity_of(path: Path) -> bytes:
    return bytes.fromhex(path.name)


def open_packs(root: Path) -> list[bytes]:
    """Return the identities of all own packs, as candidates for a writer."""
    return [identity_of(path) for path in pack_files(root, "own")]


def footer_of(path: Path) -> list[pack.Row]:
    """Return the rows of a sealed pack's footer."""
    raw = path.read_bytes()
    trailer = pack.read_trailer(raw[-pack.TRAILER_SIZE :], len(raw))
    assert trailer is not None, "not sealed"
    offset, length = trailer
    return pack.read_footer(raw[offset : offset + length], offset)


def scanned(path: Path) -> list[pack.Row]:
    """Return the rows of the whole frames that a scan finds, footers left out."""
    found = frames.scan(path.read_bytes(), len(pack.HEADER))
    rows = [frame_row(f.offset, f.header) for f in found if isinstance(f, frames.Found)]
    return [row for row in rows if row.kind != frames.KIND_FOOTER]


# --- who appends where


def test_the_next_writer_goes_on_in_an_open_pack(root: Path) -> None:
    places: dict[bytes, Place] = {}
    for i in range(3):
        with LocalStore.open(root, write=True) as store:
            publish(store, package(f"p{i}", {"x": noise(str(i), 500)}))
            places |= {
                noise(str(i), 500): p for d, p in store.places("chunks") if d == digest_of(noise(str(i), 500))
            }
    [own], [manifest] = pack_files(root, "own"), pack_files(root, "manifest")
    assert [p.pack for p in places.values()] == [identity_of(own)] * 3
    assert sorted(p.offset for p in places.values())[0] == len(pack.HEADER)
    assert len(scanned(own)) == len(scanned(manifest)) == 3
    check(root, places)


def test_two_writers_use_two_packs(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("first", {"x": b"first"}))
        [taken] = pack_files(root, "own")
        with running(hold_pack, root, OWN, (digest_of(b"theirs"), b"theirs")) as child:
            theirs = child.hear()
            assert theirs.pack == identity_of(taken)
            publish(store, package("second", {"x": b"second"}))
            place = store.place("chunks", digest_of(b"second"))
            assert place is not None
            assert place.pack != theirs.pack
        check(root, {b"theirs": theirs, b"second": place})
        publish(store, package("third", {"x": b"third"}))
    assert len(pack_files(root, "own")) == 2, "none more: both were free"


def test_a_pack_is_made_under_its_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment can another writer take a pack that its maker is to append to."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        monkeypatch.undo()
        real(source, target)
        other = PackWriter(root, OWN, [identity_of(target)])
        put(other, b"other")
        assert list(other.changed) != [identity_of(target)]
        other.close()

    writer = PackWriter(root, OWN)
    monkeypatch.setattr(os, "link", link)
    put(writer, b"mine")
    assert len(pack_files(root, "own")) == 2
    writer.close()
    assert not list(root.glob("packs/*/*/*.new"))


@pytest.mark.parametrize(
    "what", ["absent", "empty", "too short", "sealed", "long", "bad", "folder", "torn trailer"]
)
def test_what_is_no_open_pack_is_not_taken(root: Path, what: str) -> None:
    identity = b"\1" * 12
    path = pack_path(root, OWN, identity)
    match what:
        case "empty":
            path.touch()
        case "too short":
            path.write_bytes(pack.HEADER[:-1])
        case "sealed":
            path.write_bytes(pack.HEADER + pack.build_footer([], len(pack.HEADER)))
        case "torn trailer":
            raw = bytearray(pack.HEADER + pack.build_footer([], len(pack.HEADER)))
            raw[-20] ^= 1
            path.write_bytes(raw)
        case "long":
            path.touch()
            os.truncate(path, pack.ROLL_SIZE)
        case "bad":
            path.write_bytes(pack.HEADER)
            path.with_name(path.name + ".bad").touch()
        case "folder":
            path.mkdir()
    before = path.read_bytes() if path.is_file() else b""
    writer = PackWriter(root, OWN, [identity])
    [place] = put(writer, b"data")
    assert place.pack != identity
    writer.close()
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_name_that_leads_elsewhere_by_now_is_not_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a collection unlinks a pack between its opening and its lock."""
    writer = PackWriter(root, OWN)
    put(writer, b"old")
    writer.close()
    [path] = pack_files(root, "own")
    real = try_flock

    def unlink_then_lock(fd: int) -> bool:
        monkeypatch.undo()
        path.unlink()
        return real(fd)

    monkeypatch.setattr("cidfs.local.packs.try_flock", unlink_then_lock)
    writer = PackWriter(root, OWN, [identity_of(path)])
    [place] = put(writer, b"new")
    writer.sync()
    writer.close()
    assert place.pack != identity_of(path)
    check(root, {b"new": place})


def test_what_another_appended_before_the_lock_was_given_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PackWriter(root, OWN)
    put(writer, b"first")
    writer.close()
    [path] = pack_files(root, "own")

    def append_then_lock(fd: int) -> bool:
        monkeypatch.undo()
        places[b"theirs"] = append_to(path, b"theirs")
        return try_flock(fd)

    def append_to(path: Path, data: bytes) -> Place:
        other = PackWriter(root, OWN, [identity_of(path)])
        [place] = put(other, data)
        other.close()
        return place

    places: dict[bytes, Place] = {}
    monkeypatch.setattr("cidfs.local.packs.try_flock", append_then_lock)
    writer = PackWriter(root, OWN, [identity_of(path)])
    [places[b"ours"]] = put(writer, b"ours")
    writer.close()
    assert {p.pack for p in places.values()} == {identity_of(path)}
    check(root, places)


# --- torn ends


def test_a_torn_end_is_appended_behind(root: Path) -> None:
    """Whatever a dead writer left of its last frame, all whole frames are found, and none is moved."""
    writer = PackWriter(root, OWN)
    places = dict(zip((b"one", noise("two", 300)), put(writer, b"one", noise("two", 300)), strict=True))
    writer.close()
    [path] = pack_files(root, "own")
    whole = path.read_bytes()
    torn = frames.build_from(frames.KIND_CHUNK, noise("torn", 200))
    for length in (*range(1, 70, 3), len(torn) - 1):
        path.write_bytes(whole + torn[:length])
        writer = PackWriter(root, OWN, [identity_of(path)])
        [place] = put(writer, b"three")
        writer.sync()
        writer.close()
        assert (place.pack, place.offset) == (identity_of(path), len(whole) + length)
        check(root, {**places, b"three": place})
        assert path.read_bytes().startswith(whole + torn[:length])
        assert [row.digest for row in scanned(path)] == [digest_of(d) for d in (*places, b"three")]
    path.write_bytes(whole[:-5])
    writer = PackWriter(root, OWN, [identity_of(path)])
    [place] = put(writer, b"three")
    writer.close()
    assert [row.digest for row in scanned(path)] == [digest_of(d) for d in (b"one", b"three")]
    check(root, {b"one": places[b"one"], b"three": place})


def test_short_writes_are_gone_on_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:9]), offset))
    writer = PackWriter(root, OWN)
    items = [noise(str(i), 100 * i) for i in range(1, 6)]
    places = dict(zip(items, put(writer, *items), strict=True))
    writer.close()
    check(root, places)


def test_what_stood_in_a_pack_before_the_disk_was_full_is_synced(small: Path, room: Path) -> None:
    """A failed append ends with that pack, but what is published from it is on the disk."""
    item = package("small", {"x": noise("x", 3000)})
    large = package("large", {"x": noise("large", 40_000)})
    plan = Plan(lost=str(room / "lost"))
    _, said = crash(small, plan, publish_when_full, item, large)
    assert said[0][0] == "full"
    assert said[1] == ("done", {"small": 16})
    ledger = Ledger({"small": item}, {"small": 16})
    assert ledger.look(small) == {"small": 16}


# --- sealing


def test_a_pack_is_sealed_when_it_is_full(root: Path) -> None:
    assert pack.ROLL_SIZE == 32 << 20
    block = os.urandom(1 << 20)
    items = [i.to_bytes(4, "little") + block[: (256 << 10) - 4] for i in range(130)]
    writer = PackWriter(root, OWN)
    made = [writer.append(digest_of(d), ENCODING_RAW, d, len(d)) for d in items]
    writer.sync()
    first, second = dict.fromkeys(p.pack for p in made)
    assert writer.changed == {first: True, second: False}
    path = pack_path(root, OWN, first)
    assert footer_of(path) == scanned(path)
    assert max(p.offset for p in made if p.pack == first) < pack.ROLL_SIZE <= path.stat().st_size
    writer.close()
    check(root, dict(zip(items, made, strict=True)))
    writer = PackWriter(root, OWN, [first])
    assert put(writer, b"x")[0].pack not in (first, second)
    writer.close()


@pytest.fixture
def low_roll(monkeypatch: pytest.MonkeyPatch) -> int:
    """Packs are sealed at 20 kB."""
    monkeypatch.setattr(pack, "ROLL_SIZE", 20_000)
    return 20_000


def test_a_pack_that_was_taken_over_is_sealed_with_all_its_frames(root: Path, low_roll: int) -> None:
    writer = PackWriter(root, OWN)
    places = {b"before": put(writer, b"before")[0]}
    writer.close()
    [path] = pack_files(root, "own")
    with open(path, "ab") as file:  # two whole frames that nobody synced, and a torn one
        for data in (b"unsynced", noise("also", 50), b"torn"):
            file.write(frames.build_from(frames.KIND_CHUNK, data)[: -1 if data == b"torn" else None])
    writer = PackWriter(root, OWN, [identity_of(path)])
    items = [noise(str(i), 3000) for i in range(12)]
    places |= dict(zip(items, put(writer, *items), strict=True))
    writer.sync()
    assert writer.changed[identity_of(path)] is True
    writer.close()
    rows = footer_of(path)
    assert rows == scanned(path)
    assert {digest_of(b"before"), digest_of(b"unsynced"), digest_of(items[0])} <= {r.digest for r in rows}
    check(root, places)


def test_one_batch_over_several_packs(root: Path, low_roll: int) -> None:
    writer = PackWriter(root, OWN)
    items = [noise(str(i), 2500) for i in range(40)]
    places = dict(zip(items, put(writer, *items), strict=True))
    writer.sync()
    writer.close()
    check(root, places)
    sealed = [p for p in pack_files(root, "own") if p.stat().st_size >= low_roll]
    assert len(sealed) >= 4
    assert all(footer_of(p) == scanned(p) for p in sealed)


def test_a_frame_larger_than_a_pack(root: Path, low_roll: int) -> None:
    writer = PackWriter(root, MANIFEST)
    data = noise("large", 100_000)
    places = {data: put(writer, data)[0], b"next": put(writer, b"next")[0]}
    writer.sync()
    writer.close()
    check(root, places)
    assert len(pack_files(root, "manifest")) == 2


def test_a_torn_footer_costs_nothing(root: Path, low_roll: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [noise(str(i), 3000) for i in range(8)]
    publish_in(root, package("a", {str(i): d for i, d in enumerate(items)}))
    path = next(p for p in pack_files(root, "own") if p.stat().st_size >= low_roll)
    whole = len(scanned(path))
    os.truncate(path, path.stat().st_size - 10)
    with LocalStore.open(root, write=True) as store:
        assert contents_of(store, "a") == {str(i): d for i, d in enumerate(items)}
        publish(store, package("b", {"x": b"more"}))
        place = store.place("chunks", digest_of(b"more"))
        assert place is not None
        assert place.pack != identity_of(path)
    assert len(scanned(path)) == whole


# --- failed syncs


def test_after_a_failed_sync_a_pack_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_in(root, package("before", {"x": noise("before", 500)}))
    [path] = pack_files(root, "own")
    real = os.fdatasync

    def fails(fd: int) -> None:
        if os.path.sameopenfile(fd, ours):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    ours = os.open(path, os.O_RDONLY)
    with monkeypatch.context() as patch, LocalStore.open(root, write=True) as store:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(DiskFailed, match=rf"{path.name}.*Input/output error"):
            publish(store, package("a", {"x": noise("a", 500)}))
        assert store.place("chunks", digest_of(noise("a", 500))) is None
    os.close(ours)
    assert path.with_name(path.name + ".bad").exists()
    size = path.stat().st_size
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a", {"x": noise("a", 500)}))
        assert contents_of(store, "before") == {"x": noise("before", 500)}, "what it held is read"
        assert contents_of(store, "a") == {"x": noise("a", 500)}
        place = store.place("chunks", digest_of(noise("a", 500)))
        assert place is not None
        assert place.pack != identity_of(path), "what was just written is stored again elsewhere"
    assert path.stat().st_size == size


def test_a_failed_sync_that_cannot_even_be_marked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = PackWriter(root, OWN)
    put(writer, b"x")
    monkeypatch.setattr(os, "fdatasync", fails)
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(DiskFailed, match="cannot sync"):
        writer.sync()
    writer.close()


# --- reading


def test_descriptors_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "MAX_OPEN_FILES", 5)
    places: dict[bytes, Place] = {}
    for i in range(40):
        writer = PackWriter(root, OWN)
        places[noise(str(i), 100)] = put(writer, noise(str(i), 100))[0]
        writer.close()
    assert len({p.pack for p in places.values()}) == 40
    reader = PackReader(root)
    wrong: list[bytes] = []

    def read_all(order: list[bytes]) -> None:
        wrong.extend(d for d in order if reader.read(digest_of(d), places[d]) != d)

    items = list(places)
    threads = [threading.Thread(target=read_all, args=(items[i:] + items[:i],)) for i in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    gc.collect()
    links = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdigit() and _open(n)
    ]
    assert len([link for link in links if link.startswith(f"{root}/packs/")]) <= 5


def _open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_every_flipped_byte_is_found(root: Path) -> None:
    writer = PackWriter(root, OWN)
    data = b"some text that compresses well " * 10
    [place] = put(writer, data)
    writer.close()
    [path] = pack_files(root, "own")
    for at in range(place.offset, place.offset + frames.HEADER_SIZE + place.stored):
        flip(path, at, 0x40)
        with pytest.raises(ChunkInvalid, match=path.name):
            PackReader(root).read(digest_of(data), place)
        flip(path, at, 0x40)
    check(root, {data: place})


def test_a_place_that_is_wrong(root: Path) -> None:
    writer = PackWriter(root, OWN)
    one, two = put(writer, b"one", b"two")
    writer.close()
    reader = PackReader(root)
    for wrong in (
        one._replace(offset=one.offset + 1),
        one._replace(stored=one.stored + 1),
        one._replace(length=one.length + 1),
        one._replace(offset=1 << 31),
        two,
    ):
        with pytest.raises(ChunkInvalid):
            reader.read(digest_of(b"one"), wrong)
    with pytest.raises(ChunkMissing, match="gone"):
        reader.read(digest_of(b"one"), one._replace(pack=b"\7" * 12))
    assert reader.read(digest_of(b"one"), one) == b"one"


def test_a_chunk_that_was_moved_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a collection moves it: copied, its row changed, the old pack unlinked."""
    publish_in(root, package("a", {"x": noise("x", 500)}))
    digest = digest_of(noise("x", 500))
    with LocalStore.open(root, write=True) as store:
        assert contents_of(store, "a") == {"x": noise("x", 500)}
        old = store.place("chunks", digest)
        assert old is not None
        writer = PackWriter(root, OWN)
        [new] = put(writer, noise("x", 500))
        writer.sync()
        looks = [old, new]
        with store.transaction() as index, index.write() as txn:
            txn.put_place("chunks", digest, new)
        pack_path(root, OWN, old.pack).unlink()
        store.packs.forget(old.pack)
        real = store.place
        monkeypatch.setattr(
            store, "place", lambda database, digest: looks.pop(0) if looks else real(database, digest)
        )
        assert store.read_chunk(digest) == noise("x", 500), "the first look-up was before the move"
        writer.close()
        assert row_of(store, "a").serial == 1


def test_a_pack_that_was_replaced_is_opened_anew(root: Path) -> None:
    """Damage counts only after a fresh look, through a fresh descriptor."""
    publish_in(root, package("a", {"x": noise("x", 500)}))
    [path] = pack_files(root, "own")
    good = path.read_bytes()
    with LocalStore.open(root) as store:
        flip(path, 100)
        with pytest.raises(ChunkInvalid):
            contents_of(store, "a")
        path.with_name("good").write_bytes(good)
        path.with_name("good").rename(path)
        assert contents_of(store, "a") == {"x": noise("x", 500)}
        path.unlink()
        store.packs.forget(identity_of(path))
        with pytest.raises(ChunkMissing):
            contents_of(store, "a")
