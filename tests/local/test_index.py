"""The LMDB index: checked rows, counts, transactions, opening it beside others and with little memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cidfs.errors import CidfsError, IndexLost, LockTimeout, StoreVersion
from cidfs.local.audit import lost_rows
from cidfs.local.index import Index, WriteTxn
from cidfs.local.rebuild import rebuild
from cidfs.local.rows import DATABASES, PackRow, Place, seal, unseal
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local.children import (
    hold_write_lock,
    publish_groups,
    rebuild_it,
    refresh_when_told,
    run,
    running,
    with_little_memory,
)
from tests.local.support import (
    all_rows,
    contents_of,
    key_of,
    noise,
    package,
    path_of,
    publish,
    publish_in,
    row_of,
)

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def index(room: Path) -> Any:
    """A new index."""
    (room / "index").mkdir()
    made = Index(room / "index", 1, write=True, create=True)
    yield made
    made.close()


def put_raw(index: Index, database: str, key: bytes, stored: bytes | None) -> None:
    """Put or delete something in LMDB past all checks, as a damaged page would."""
    with index.env.begin(write=True) as raw:
        if stored is None:
            raw.delete(key, db=index.db[database])
        else:
            raw.put(key, stored, db=index.db[database])


def get_raw(index: Index, database: str, key: bytes) -> bytes:
    with index.env.begin() as raw:
        found: Any = raw.get(key, db=index.db[database])
        return bytes(found)


# --- checked rows


def test_a_flipped_bit_is_never_served(root: Path) -> None:
    publish_in(root, package("a", {"x": b"x"}, ["b"]), package("b"))
    state = StateFolder.open(root)
    index = Index(root / "index" / "1", 1, write=True)
    rows = {name: next(iter(found.items())) for name, found in all_rows(index).items() if found}
    assert set(rows) == set(DATABASES) - {"pending"}
    expected = 0
    for database, (key, value) in rows.items():
        stored = get_raw(index, database, key)
        assert index.get(database, key) == value
        for at in range(len(stored)):
            put_raw(index, database, key, stored[:at] + bytes((stored[at] ^ 0x10,)) + stored[at + 1 :])
            assert index.get(database, key) is None
            with index.read() as txn:
                assert txn.get(database, key) is None
                assert dict(txn.rows(database))[key] is None
            expected += 3
        for shorter in range(min(len(stored), 9)):
            put_raw(index, database, key, stored[:shorter])
            assert index.get(database, key) is None
            expected += 1
        put_raw(index, database, key, stored)
        assert index.get(database, key) == value
    assert index.damaged_rows == expected
    index.close()
    assert state.format.version == 1


def test_a_row_of_another_key_or_database_is_never_served(index: Index) -> None:
    with index.write() as txn:
        for key in (b"k1", b"k2"):
            txn.put("chunks", key, b"of " + key)
        txn.put("manifests", b"k1", b"a manifest")
    put_raw(index, "chunks", b"k1", get_raw(index, "chunks", b"k2"))
    assert index.get("chunks", b"k1") is None
    put_raw(index, "chunks", b"k1", get_raw(index, "manifests", b"k1"))
    assert index.get("chunks", b"k1") is None
    assert index.get("chunks", b"k2") == b"of k2"


@given(st.binary(max_size=40), st.binary(min_size=1, max_size=40), st.binary(max_size=40))
def test_seal_and_unseal(database: bytes, key: bytes, value: bytes) -> None:
    stored = seal(database, key, value)
    assert unseal(database, key, stored) == value
    assert unseal(database, key + b"x", stored) is None
    assert unseal(database + b"x", key, stored) is None


def test_what_is_damaged_is_as_if_it_were_not_there(root: Path) -> None:
    publish_in(root, package("a", {"x": b"x" * 100}), package("b"))
    with LocalStore.open(root, write=True) as store:
        index = store.current()
        for database, key in (("paths", key_of("a")), ("records", key_of("b"))):
            put_raw(index, database, key, b"\0" * 20)
        assert store.find_path(path_of("a")) is None
        assert [p.path.name for p in store.paths()] == ["b"]
        assert store.record_of(path_of("b").hash_part) is None
        assert store.totals().damaged_rows > 0
        with pytest.raises(IndexLost, match="record is lost"):
            publish(store, package("b"))
    rebuild(StateFolder.open(root), lock_timeout=5)
    with LocalStore.open(root) as store:
        assert contents_of(store, "a") == {"x": b"x" * 100}
        assert store.record_of(path_of("b").hash_part) == package("b").record


def test_a_lost_key_is_counted(root: Path) -> None:
    publish_in(root, package("a", {"x": b"x"}, ["b"]), package("b"))
    with LocalStore.open(root) as store:
        assert lost_rows(store) == []
    for database in ("paths", "records", "inodes", "manifests", "chunks", "packs", "referrers"):
        index = Index(root / "index" / "1", 1, write=True)
        with index.read() as txn:
            key, value = next(iter(txn.rows(database)))
        assert value is not None
        put_raw(index, database, key, None)
        index.close()
        with LocalStore.open(root) as store:
            [line] = lost_rows(store)
            assert f": {database} has " in line
        index = Index(root / "index" / "1", 1, write=True)
        put_raw(index, database, key, seal(database.encode(), key, value))
        put_raw(index, "meta", f"count:{database}".encode(), b"damaged")
        index.close()
        with LocalStore.open(root) as store:
            assert lost_rows(store)
        index = Index(root / "index" / "1", 1, write=True)
        with index.write() as txn:
            txn.put(database, key, value)
        index.close()


@pytest.mark.parametrize("name", ["next-serial", "next-base"])
@pytest.mark.parametrize("how", ["damaged", "lost"])
def test_without_its_numbers_nothing_is_published(root: Path, name: str, how: str) -> None:
    """Or numbers that were given out would be given out again."""
    publish_in(root, package("a"))
    with LocalStore.open(root, write=True) as store:
        put_raw(store.current(), "meta", name.encode(), b"\0" * 16 if how == "damaged" else None)
        with pytest.raises(IndexLost, match=rf"{name}.*rebuild"):
            publish(store, package("b"))
        assert store.find_path(path_of("b")) is None
    rebuild(StateFolder.open(root), lock_timeout=5)
    with LocalStore.open(root, write=True) as store:
        publish(store, package("b"))
        a, b = row_of(store, "a"), row_of(store, "b")
        assert (a.serial, b.serial) == (1, 2)
        assert a.base + a.count <= b.base


# --- transactions


def test_no_view_escapes(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, *(package(f"p{i}", {"x": noise(str(i), 100)}) for i in range(50)))
        index = store.current()
        with index.read() as txn:
            kept = {(d, k): v for d in DATABASES for k, v in txn.rows(d)}
            kept |= {(d, k): txn.get(d, k) for d, k in kept}
            one = index.get("paths", key_of("p7"))
        copies = {(d, bytes(bytearray(k))): bytes(bytearray(v or b"")) for (d, k), v in kept.items()}
        publish(store, *(package(f"q{i}", {"x": noise(f"q{i}", 100)}) for i in range(300)))
        assert all(type(k) is bytes and type(v) is bytes for (_, k), v in kept.items())
        assert type(one) is bytes
        assert kept == copies


def test_a_transaction_that_fails_leaves_nothing(index: Index) -> None:
    def half() -> None:
        with index.write() as txn:
            txn.put("chunks", b"k", b"v")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert index.get("chunks", b"k") is None
    with index.read() as txn:
        assert txn.number("count:chunks") == txn.entries("chunks") == 0


@EXAMPLES
@given(
    st.sets(st.binary(min_size=1, max_size=3), max_size=12),
    st.one_of(st.just(b""), st.binary(min_size=1, max_size=3)),
)
def test_rows_from_a_key_on(index: Index, keys: set[bytes], start: bytes) -> None:
    with index.write() as txn:
        for key, _ in list(txn.rows("referrers")):
            txn.delete("referrers", key)
        for key in keys:
            txn.put("referrers", key, b"")
        assert [k for k, _ in txn.rows("referrers", start)] == sorted(k for k in keys if k >= start)
        if start:
            backwards = [k for k, _ in txn.rows("referrers", start, reverse=True)]
            assert backwards == sorted((k for k in keys if k <= start), reverse=True)
    with index.read() as reading:
        assert reading.number("count:referrers") == len(keys)


@EXAMPLES
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(1, 100), st.booleans()), max_size=8
        ),
        max_size=6,
    )
)
def test_the_sums_of_packs(index: Index, commits: list[list[tuple[int, int, int, bool]]]) -> None:
    """Beside a model: which chunk lies in which pack."""

    def clear(txn: WriteTxn) -> None:
        for database in ("chunks", "packs"):
            for key, _ in list(txn.rows(database)):
                txn.delete(database, key)

    with index.write() as txn:
        clear(txn)
    model: dict[bytes, Place] = {}
    for commit in commits:
        with index.write() as txn:
            for chunk, pack, size, put in commit:
                digest = bytes((chunk,)) * 32
                if put:
                    model[digest] = Place(bytes((pack,)) * 12, 16, size, 2 * size, 0, 1)
                    txn.put_place("chunks", digest, model[digest])
                else:
                    model.pop(digest, None)
                    txn.drop_place("chunks", digest)
    sums: dict[bytes, list[int]] = defaultdict(lambda: [0, 0, 0])
    for place in model.values():
        sums[place.pack] = [
            a + b for a, b in zip(sums[place.pack], (place.stored, place.length, 1), strict=True)
        ]
    with index.read() as reading:
        found = {k: PackRow.unpack(v) for k, v in reading.rows("packs") if v is not None}
        assert {k: [r.stored, r.length, r.frames] for k, r in found.items() if r.frames} == sums
        assert all(r.stored == r.length == 0 for r in found.values() if not r.frames)
        assert reading.number("count:chunks") == len(model)


def test_many_read_at_once(index: Index) -> None:
    with contextlib.ExitStack() as stack:
        txns = [stack.enter_context(index.read()) for _ in range(500)]
        assert {txn.number("schema") for txn in txns} == {1}


# --- opening


def test_reading_needs_no_lock_of_a_writer(root: Path) -> None:
    publish_in(root, package("a"))
    with running(hold_write_lock, root) as child:
        assert child.hear() == "held"
        child.stop()
        with LocalStore.open(root) as store:
            assert row_of(store, "a").serial == 1
            assert store.totals().paths == 1
            with store.read() as txn:
                assert txn.number("held") == 0
        with pytest.raises(LockTimeout):
            LocalStore.open(root, write=True, lock_timeout=0.1)


def test_who_writes_takes_a_new_index_only_when_nobody_holds_the_lock(root: Path) -> None:
    """A look-up of a writer beside a stopped one must not wait for it."""
    publish_in(root, package("a"))
    with running(refresh_when_told, root) as writer:
        assert writer.hear() == "open"
        assert run(rebuild_it, root)[0] == 0
        with running(hold_write_lock, root) as child:
            assert child.hear() == "held"
            child.stop()
            writer.tell("a")
            assert writer.hear() == (False, 1)
        for expected in (True, False):
            writer.tell("a")
            assert writer.hear() == (expected, 1)


def maps_of(root: Path) -> list[str]:
    """Return which index files of a store this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if str(root) in line and "data.mdb" in line})


def test_a_new_index_takes_the_place_of_the_old_one(root: Path) -> None:
    publish_in(root, package("a", {"x": b"x" * 500}))
    with (
        LocalStore.open(root) as store,
        LocalStore.open(root.with_name("other"), create=True, write=True) as other,
    ):
        publish(other, package("o"))
        for number in (2, 3, 4):
            assert run(rebuild_it, root)[0] == 0
            assert contents_of(store, "a") == {"x": b"x" * 500}
            store.refresh()
            assert contents_of(store, "a") == {"x": b"x" * 500}
            assert maps_of(root) == [f"{root}/index/{number}/data.mdb"]
            assert run(publish_groups, root, [[package(f"p{number}")]])[0] == 0
            assert row_of(store, f"p{number}").serial == number
        assert row_of(other, "o").serial == 1
        assert store.free_dead_readers() == 0


def test_a_new_index_is_noticed_by_itself(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_in(root, package("a"))
    with LocalStore.open(root) as store:
        assert run(rebuild_it, root)[0] == 0
        assert run(publish_groups, root, [[package("b")]])[0] == 0
        store._checked -= 1.0  # the time that passes between two looks
        assert row_of(store, "b").serial == 2


def test_it_is_opened_once_in_a_process(root: Path) -> None:
    with LocalStore.open(root), pytest.raises(CidfsError, match="open in this process already"):
        LocalStore.open(root)


def test_little_address_space_is_enough(root: Path) -> None:
    assert run(with_little_memory, root, package("a"))[1] == [("done", 1)]


@pytest.mark.parametrize("damage", ["empty", "garbage", "absent", "no databases", "no schema", "schema 9"])
def test_an_index_that_cannot_be_used(root: Path, damage: str) -> None:
    publish_in(root, package("a"))
    file = root / "index" / "1" / "data.mdb"
    match damage:
        case "empty":
            file.write_bytes(b"")
        case "garbage":
            file.write_bytes(noise("garbage", 65536))
        case "absent":
            file.unlink()
        case "no databases":
            (root / "index" / "other").mkdir()
            lmdb.open(str(root / "index" / "other")).close()
            (root / "index" / "other" / "data.mdb").rename(file)
        case _:
            index = Index(root / "index" / "1", 1, write=True)
            if damage == "no schema":
                put_raw(index, "meta", b"schema", None)
            else:
                with index.write() as txn:
                    txn.put_number("schema", 9)
            index.close()
    error = StoreVersion if damage == "schema 9" else IndexLost
    for write in (False, True):
        with pytest.raises(error, match=r"index/1.*(rebuild|cidfs that wrote it)"):
            LocalStore.open(root, write=write)
    if error is IndexLost:
        rebuild(StateFolder.open(root), lock_timeout=5)
        with LocalStore.open(root) as store:
            assert row_of(store, "a").serial == 1
