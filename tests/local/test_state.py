"""The state folder: making it, opening it, the write lock, leases, the inode limit, which index counts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from cidfs.errors import FormatError, IndexLost, LockTimeout, StoreAbsent, StoreVersion
from cidfs.local.leases import at_work, oldest_mount
from cidfs.local.state import FIRST_INODE, StateFolder
from cidfs.local.store import LocalStore
from tests.local.children import create, hold_lease, hold_write_lock, run, running
from tests.local.support import flip, package, publish, publish_in

SECOND_SLOT = 4096


# --- making and opening


def test_several_processes_make_one_store(room: Path) -> None:
    with (
        running(create, room / "s") as a,
        running(create, room / "s") as b,
        running(create, room / "s") as c,
        running(create, room / "s") as d,
    ):
        made = [child.hear() for child in (a, b, c, d)]
    assert len(set(made)) == 1
    assert made[0][0] == "created"


def test_an_opened_store_stays_as_it_is(root: Path) -> None:
    before = (root / "format").read_bytes()
    publish_in(root, package("a"))
    with LocalStore.open(root, create=True) as store:
        assert store.totals().paths == 1
    assert (root / "format").read_bytes() == before


def test_no_store_there(room: Path) -> None:
    for place in (room, room / "absent", room / "absent" / "deeper"):
        with pytest.raises(StoreAbsent, match="no store here"):
            StateFolder.open(place)
    (room / "file").touch()
    with pytest.raises(StoreAbsent):
        StateFolder.open(room / "file")
    assert sorted(os.listdir(room)) == ["file"]


def _change_format(root: Path, **fields: object) -> None:
    form = json.loads((root / "format").read_bytes())
    (root / "format").write_text(json.dumps(form | fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"version": 0, "id": 5}, "version 0"),  # whose other fields nobody can know
        ({"features": ["holes"]}, "holes"),
        ({"chunking": "fastcdc avg=1"}, "fastcdc avg=1"),
    ],
)
def test_a_store_of_another_kind_is_refused(root: Path, fields: dict[str, object], named: str) -> None:
    with LocalStore.open(root, write=True) as store:
        _change_format(root, **fields)
        for attempt in (StateFolder.open, lambda r: LocalStore.open(r, create=True)):
            with pytest.raises(StoreVersion, match=named):
                attempt(root)
        with pytest.raises(StoreVersion, match=named):  # a long ingest may span an upgrade
            publish(store, package("a"))
        assert store.totals().paths == 0


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version": 1}', b"\xff"])
def test_a_damaged_format_is_named(root: Path, text: bytes) -> None:
    (root / "format").write_bytes(text)
    with pytest.raises(FormatError, match="format"):
        StateFolder.open(root)


def test_a_folder_of_somebody_else_is_left_alone(room: Path) -> None:
    (room / "photo.jpg").write_bytes(b"x")
    with pytest.raises(StoreAbsent, match=r"photo\.jpg"):
        LocalStore.open(room, create=True)
    assert not (room / "packs").exists()


def test_a_new_file_system_is_no_foreign_folder(room: Path) -> None:
    (room / "lost+found").mkdir()
    LocalStore.open(room, create=True).close()


def test_a_store_that_lost_its_format_is_not_made_anew(root: Path) -> None:
    publish_in(root, package("a"))
    before = (root / "next-inode").read_bytes()
    (root / "format").rename(root / "format.tmp-backup")
    with pytest.raises(StoreAbsent, match="lost its file `format`"):
        LocalStore.open(root, create=True)
    assert (root / "next-inode").read_bytes() == before
    (root / "format.tmp-backup").rename(root / "format")
    with LocalStore.open(root) as store:
        assert store.totals().paths == 1


def test_a_store_for_another_directory_is_refused(root: Path) -> None:
    with pytest.raises(StoreAbsent, match="/gnu/store"):
        LocalStore.open(root, create=True, store_dir="/gnu/store")


def test_a_folder_that_cannot_be_made(room: Path) -> None:
    (room / "file").touch()
    with pytest.raises(StoreAbsent, match="is not a folder"):
        LocalStore.open(room / "file" / "store", create=True)


# --- the write lock


def test_who_holds_the_write_lock_is_named(root: Path) -> None:
    with running(hold_write_lock, root) as child:
        assert child.hear() == "held"
        start = time.monotonic()
        with pytest.raises(LockTimeout, match=rf"process {child.pid} \(.*\) held it for 0\.2 s"):
            LocalStore.open(root, write=True, lock_timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 10
        child.stop()
        with pytest.raises(LockTimeout, match=r"stopped\) held it"):
            LocalStore.open(root, write=True, lock_timeout=0.1)
    LocalStore.open(root, write=True, lock_timeout=5).close()  # it was killed


def test_a_write_lock_of_nobody_known(root: Path) -> None:
    state = StateFolder.open(root)
    fd = os.open(root / "write.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for text in (b"", b"garbage\n", b"-5\n", b"999999999\n"):
        os.ftruncate(fd, 0)
        os.pwrite(fd, text, 0)
        with pytest.raises(LockTimeout, match="another process held it"), state.write_lock(0):
            pass
    os.close(fd)


def test_threads_wait_for_each_other(root: Path) -> None:
    state = StateFolder.open(root)
    taken, go = threading.Event(), threading.Event()

    def hold() -> None:
        with state.write_lock(5):
            taken.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(30)
    with pytest.raises(LockTimeout, match="another thread"), state.write_lock(0.05):
        pass
    go.set()
    with state.write_lock(30):
        pass
    thread.join()


def test_a_full_disk_does_not_keep_from_locking(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with StateFolder.open(root).write_lock(1):
        pass


# --- leases


def test_leases_tell_who_is_at_work(root: Path) -> None:
    state = StateFolder.open(root)
    with running(hold_lease, root, "mount") as child:
        path = child.hear()
        [(found, info)] = state.leases()
        assert (found, info.kind, info.pid, info.serial, info.mountpoint) == (
            path,
            "mount",
            child.pid,
            1,
            "/m",
        )
        publish_in(root, package("a"), package("b"))
        with LocalStore.open(root) as store:
            lease = store.lease("ingest")
            assert lease.info.serial == 3
            assert lease.socket_path.name == lease.path.name.replace(".lease", ".sock")
            assert {i.kind for _, i in state.leases()} == {"mount", "ingest"}
            lease.release()
            lease.release()
        child.tell()
        assert child.hear() == "released"
        assert state.leases() == []
        assert not path.exists()


def test_a_dead_one_has_no_lease(root: Path) -> None:
    with running(hold_lease, root, "mount") as child:
        path = child.hear()
    assert path.exists()
    assert StateFolder.open(root).leases() == []


def test_who_looks_at_a_lease_is_not_taken_for_its_holder(root: Path) -> None:
    with running(hold_lease, root, "mount") as child:
        path = child.hear()
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)  # as another who looks does for a moment
    assert StateFolder.open(root).leases() == []
    os.close(fd)


def test_a_lease_that_cannot_be_read_counts_as_one_that_needs_everything(root: Path) -> None:
    state = StateFolder.open(root)
    lease = state.take_lease("mount", 1)
    lease.path.write_bytes(b"\xff{")
    found = state.leases()
    assert [path for path, _ in found] == [lease.path]
    assert oldest_mount(found) == 0
    assert at_work(found) == {lease.path}
    lease.release()
    assert state.leases() == []


# --- the inode limit


def test_the_limit_is_raised_in_turns(root: Path) -> None:
    state = StateFolder.open(root)
    assert state.inode_limit() == FIRST_INODE
    for limit in (100, 200, 300, 1 << 40):
        before = (root / "next-inode").read_bytes()
        old = state.inode_limit()
        state.write_inode_limit(limit)
        assert state.inode_limit() == limit
        after = (root / "next-inode").read_bytes()
        halves = [(before[i : i + 16], after[i : i + 16]) for i in (0, SECOND_SLOT)]
        assert sum(a == b for a, b in halves) == 1, "the slot of the last limit is left alone"
        whole = next(a for a, b in halves if a == b)
        assert int.from_bytes(whole[:8], "little") == old


@pytest.mark.parametrize("at", range(16))
def test_a_damaged_slot_counts_for_nothing(root: Path, at: int) -> None:
    state = StateFolder.open(root)
    for limit in (100, 200):
        state.write_inode_limit(limit)
    raw = (root / "next-inode").read_bytes()
    newer = 0 if int.from_bytes(raw[:8], "little") == 200 else SECOND_SLOT
    flip(root / "next-inode", newer + at, 0x80)
    assert state.inode_limit() == 100
    state.write_inode_limit(300)
    assert state.inode_limit() == 300
    assert int.from_bytes((root / "next-inode").read_bytes()[newer:][:8], "little") == 300, "the damaged one"


@pytest.mark.parametrize("left", [0, 3, 15, 16, SECOND_SLOT, SECOND_SLOT + 15])
def test_a_slot_that_was_cut_short(root: Path, left: int) -> None:
    state = StateFolder.open(root)
    state.write_inode_limit(50)
    (root / "next-inode").write_bytes((root / "next-inode").read_bytes()[:left])
    if left < 16:
        with pytest.raises(FormatError, match="next-inode"):
            state.inode_limit()
    else:
        assert state.inode_limit() in (FIRST_INODE, 50)
    state.write_inode_limit(70)
    assert state.inode_limit() == 70


def test_without_a_whole_slot_nothing_is_published(root: Path) -> None:
    for damage in ("flip", "gone"):
        if damage == "flip":
            for at in (0, SECOND_SLOT):
                with open(root / "next-inode", "r+b") as file:
                    file.seek(at)
                    file.write(b"\xff" * 16)
        else:
            (root / "next-inode").unlink()
        with LocalStore.open(root, write=True) as store:
            with pytest.raises(FormatError, match="accept-loss"):
                publish(store, package("a"))
            assert store.totals().paths == 0


def test_after_a_failed_sync_the_limit_is_in_a_new_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder.open(root)
    state.write_inode_limit(100)
    before = (root / "next-inode").stat().st_ino

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        state.write_inode_limit(200)
    assert (root / "next-inode").stat().st_ino != before
    assert state.inode_limit() == 200
    flip(root / "next-inode", SECOND_SLOT)
    assert state.inode_limit() == 200, "both slots of the new file have it"
    assert not list(root.glob("next-inode.*"))


def test_the_limit_is_never_below_what_was_given_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cidfs.local.publish.INODE_STEP", 3)
    state = StateFolder.open(root)
    with LocalStore.open(root, write=True) as store:
        for i in range(8):
            publish(store, package(f"p{i}", {f"f{j}": b"x" for j in range(i)}))
            assert state.inode_limit() >= store.next_base()
            with store.read() as txn:
                assert txn.number("limit") <= state.inode_limit()


# --- the pointer to the index


@pytest.mark.parametrize("text", [b"", b"1\n", b"1 00\n", b"2 0123456789abcdef\n", b"\xff\xff"])
def test_a_damaged_pointer_is_no_index(root: Path, text: bytes) -> None:
    (root / "index" / "current").write_bytes(text)
    with pytest.raises(IndexLost, match="rebuild"):
        LocalStore.open(root)
    code, [(kind, _)] = run(create, root)
    assert (code, kind) == (3, "IndexLost")


def test_an_index_that_is_gone(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        (root / "index" / "1").rename(root / "index" / "elsewhere")
        with pytest.raises(IndexLost, match="rebuild"):
            LocalStore.open(root)
        (root / "index" / "current").unlink()
        with pytest.raises(IndexLost, match="current"):
            LocalStore.open(root)
        assert store.totals().paths == 0, "who has it open goes on reading"
        with pytest.raises(IndexLost, match="current"):
            publish(store, package("a"))
