"""Where people stumble: odd names, early Ctrl-C, lazily unmounted daemons, root in another's store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.commands import Store, store_in
from tests.system.support import make_files


def test_a_state_folder_of_any_name(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"blank \xff'\"")
    odd.mkdir()
    (odd / "mnt").mkdir()
    with store_in(odd) as store:
        (name,) = store.add(make_files(odd / "tree", {b"file": b"x" * 5000}))
        store.mount(odd / "mnt")
        assert (odd / "mnt" / name / "file").read_bytes() == b"x" * 5000
        store.run("verify")
        store.run("rebuild")
        assert store.lines("remove", name) == [f"/nix/store/{name}"]
        store.run("gc")


def test_an_interrupt_while_it_starts(store: Store, tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = store.run("ls", code=130, env={"PYTHONPATH": str(tmp_path / "early")})
    assert done.stderr == b"cidfs: interrupted; nothing was begun\n"


def test_a_mount_where_one_was_lazily_taken_down(store: Store, mountpoint: Path) -> None:
    (name,) = store.add(make_files(store.state.parent / "tree", {b"file": b"x" * 5000}))
    store.mount(mountpoint)
    with open(mountpoint / name / "file", "rb") as held:
        store.run("umount", "--lazy", mountpoint)
        store.mounts.remove(mountpoint)
        store.mount(mountpoint)
        assert len(store.daemon_pids()) == 2
        store.umount(mountpoint)  # the first daemon goes on, and is not waited for
        assert len(store.daemon_pids()) == 1
        assert held.read() == b"x" * 5000


@pytest.mark.usefixtures("root")
def test_root_leaves_nothing_in_another_s_store(store: Store) -> None:
    store.add(make_files(store.state.parent / "tree", {b"file": b"x"}))
    os.chown(store.state / "format", 65534, 65534)
    before = sorted(p for p in store.state.rglob("*") if p.is_file())
    for words in (["gc"], ["rebuild"], ["add", str(store.state.parent / "tree")]):
        assert "belongs to" in store.error(*words, code=14)
    assert sorted(p for p in store.state.rglob("*") if p.is_file()) == before
    assert len(store.lines("ls")) == 1


@pytest.mark.parametrize("what", ["gone", "cut", "flipped"])
def test_a_format_file_comes_from_another_store(store: Store, tmp_path: Path, what: str) -> None:
    (name,) = store.add(make_files(tmp_path / "tree", {b"file": b"x"}))
    raw = (store.state / "format").read_bytes()
    match what:
        case "gone":
            (store.state / "format").unlink()
        case "cut":
            (store.state / "format").write_bytes(b"")
        case _:
            (store.state / "format").write_bytes(b"\xff" + raw[1:])
    assert "another store" in store.error("ls", code=10 if what == "gone" else 7)
    other = Store(tmp_path / "other")
    other.add(tmp_path / "tree")
    shutil.copy(other.state / "format", store.state / "format")
    assert store.lines("ls") == [f"/nix/store/{name}"]
    store.run("verify")


def test_a_journal_folder_that_is_gone(store: Store, tmp_path: Path) -> None:
    (name,) = store.add(make_files(tmp_path / "tree", {b"file": b"x"}))
    shutil.rmtree(store.state / "journal")
    assert "an empty folder" in store.error("gc", code=10)
    (store.state / "journal").mkdir()
    store.run("rebuild")
    store.run("verify")
    assert store.lines("ls") == [f"/nix/store/{name}"]
