"""What can be added, what cannot, and what is printed."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from cidfs.formats import nar
from cidfs.local.store import LocalStore
from tests.commands import Store, wait_until
from tests.system.person import Person
from tests.system.support import describe, make_files, nar_hash, noise
from tests.system.test_at_once import assert_sound, wait_until_stopped

APPEND_WHILE_IT_IS_READ = """
import os, sys
from cidfs.engine import sources
class Appending:
    def __getattr__(self, name):
        return getattr(os, name)
    @staticmethod
    def fstat(fd):
        info = os.fstat(fd)
        with open({path!r}, "r+b") as file:
            file.seek(0, 2)
            file.{change}
        return info
sources.os = Appending()
"""


def published(store: Store) -> list[str]:
    """Return the base names of the paths that the store holds."""
    with LocalStore.open(store.state) as opened:
        return [path.path.base_name for path in opened.paths()]


def test_a_file_a_link_and_an_executable_are_store_paths(store: Store, mountpoint: Path) -> None:
    folder = make_files(store.state.parent / "things", {b"file": b"contents", b"program": b"#!/bin/sh\n"})
    os.chmod(folder / "program", 0o700)
    os.symlink("nowhere", folder / "link")
    (folder / "empty").touch()
    (folder / "nothing").mkdir()
    things = sorted(folder.iterdir())
    names = store.add(*things)
    assert [name[33:] for name in names] == ["empty", "file", "link", "nothing", "program"]
    store.mount(mountpoint)
    for name, thing in zip(names, things, strict=True):
        assert describe(mountpoint / name) == describe(thing)
    assert os.access(mountpoint / names[4], os.X_OK)
    assert os.readlink(mountpoint / names[2]) == "nowhere"
    assert_sound(store)


def test_paths_are_printed_in_the_order_given_and_an_old_one_again(store: Store) -> None:
    folder = store.state.parent
    trees = [make_files(folder / f"tree-{i}", {b"file": b"%d" % i}) for i in range(3)]
    names = store.add(*trees)
    figures = store.stats()["store"]
    assert store.add(*reversed(trees)) == names[::-1]
    assert store.add(trees[1], trees[1]) == [names[1], names[1]]
    assert store.stats()["store"] == figures


def test_one_tree_under_two_names_is_two_paths_and_one_content(store: Store) -> None:
    tree = make_files(store.state.parent / "tree", {b"file": noise(1, 200_000)})
    (first,) = store.add(tree)
    (second,) = store.add(tree, name="other-name_1.0+x=y?")
    assert second[33:] == "other-name_1.0+x=y?"
    assert first[:32] != second[:32]
    figures = store.stats()["store"]
    assert (figures["paths"], figures["manifests"], figures["unique_bytes"]) == (2, 1, 200_000)
    assert figures["logical_bytes"] == 400_000


def test_three_hundred_paths_in_one_add(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    trees = [make_files(folder / f"t{i:03}", {b"file": b"%d" % i, b"same": b"same"}) for i in range(300)]
    store.mount(mountpoint)
    names = store.add(*trees)
    assert [name[33:] for name in names] == [tree.name for tree in trees]
    assert len(set(names)) == 300
    for name, tree in zip(names, trees, strict=True):
        assert describe(mountpoint / name) == describe(tree)
    assert store.stats()["store"]["next_serial"] == 301
    assert_sound(store)


@pytest.mark.parametrize(
    "name",
    ["", "..", ".-x", "a/b", "ä b\n", "x" * 212],
)
def test_a_name_that_a_store_path_cannot_have_is_refused(store: Store, name: str) -> None:
    folder = store.state.parent / "odd name!"
    folder.mkdir()
    line = store.error("add", folder, "--name", name, code=2)
    assert "name" in line
    assert not store.state.exists()


def test_a_folder_whose_name_will_not_do_needs_another(store: Store) -> None:
    folder = store.state.parent / "odd name!"
    folder.mkdir()
    assert "--name" in store.error("add", folder, code=2)
    assert "--name" in store.error("add", folder, folder, "--name", "even", code=2)
    (name,) = store.add(folder, name="even")
    assert name[33:] == "even"


def test_the_name_of_a_folder_is_its_own_however_it_is_reached(store: Store) -> None:
    folder = make_files(store.state.parent / "tree", {b"sub/file": b"x"})
    names = store.add(folder, folder / ".", folder / "sub" / "..", Path(f"{folder}/"))
    assert len(set(names)) == 1
    assert names[0][33:] == "tree"


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_a_store_path_cannot_hold_publishes_nothing(store: Store, kind: str) -> None:
    good = make_files(store.state.parent / "good", {b"file": b"x"})
    folder = make_files(store.state.parent / "tree", {b"a": noise(1, 50_000), b"z": b"z"})
    if kind == "fifo":
        os.mkfifo(folder / "odd")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "odd"))
    elif os.geteuid() == 0:
        os.mknod(folder / "odd", 0o20600, os.makedev(1, 3))
    else:
        pytest.skip("only root makes devices")
    line = store.error("add", folder, code=3)
    assert str(folder / "odd") in line
    assert published(store) == []
    # what came before it in one command is there and was printed; it and what follows are not
    done = store.run("add", good, folder, good, code=3)
    assert done.stdout.decode().splitlines() == [f"/nix/store/{name}" for name in published(store)]
    assert len(published(store)) == 1
    assert_sound(store)


def test_what_is_not_there_is_named(store: Store) -> None:
    absent = store.state.parent / "absent"
    assert str(absent) in store.error("add", absent, code=3)
    assert not store.state.exists()


@pytest.mark.usefixtures("root")
def test_an_unreadable_file_is_named_and_nothing_is_published(person: Person, public: Path) -> None:
    tree = make_files(public / "tree", {b"a/file": b"fine", b"b/secret": b"mine"})
    os.chmod(tree / "b/secret", 0o600)
    state = person.home / "state"
    (line,) = person.cidfs("--state", state, "add", tree, code=3)
    assert line.startswith("cidfs: ")
    assert str(tree / "b/secret") in line
    assert person.cidfs("--state", state, "ls") == []
    os.chmod(tree / "b/secret", 0o644)
    os.chmod(tree / "a", 0o700)
    (line,) = person.cidfs("--state", state, "add", tree, code=3)
    assert str(tree / "a") in line
    os.chmod(tree / "a", 0o755)
    (name,) = person.cidfs("--state", state, "add", tree)
    assert person.cidfs("--state", state, "ls") == [name]


@pytest.mark.parametrize("path", ["/sys/kernel/uevent_seqnum", "/proc/version"])
def test_a_file_that_is_not_as_long_as_it_says_is_refused(store: Store, path: str) -> None:
    # the first claims a page and has a few bytes, the second claims to be empty
    line = store.error("add", path, code=3)
    assert "changed while it was read" in line
    assert path in line
    assert published(store) == []


@pytest.mark.parametrize("size", [1000, 100_000, 5 << 20])
@pytest.mark.parametrize("change", ["write(b'x')", "truncate(999)"])
def test_a_file_that_changes_its_size_while_it_is_read_is_refused(
    store: Store, size: int, change: str
) -> None:
    tree = make_files(store.state.parent / "tree", {b"file": noise(1, size), b"sub/other": b"x"})
    hook = APPEND_WHILE_IT_IS_READ.format(path=str(tree / "file"), change=change)
    _, errors = store.finish(store.start("add", tree, hook=hook), code=3)
    (line,) = errors
    assert line.startswith(f"cidfs: {tree}/file: changed while it was read")
    assert published(store) == []


def test_an_interrupted_add_says_so_and_leaves_a_sound_store(store: Store) -> None:
    folder = store.state.parent
    tree = make_files(folder / "tree", {b"file": noise(1, 3 << 20)})
    hook = """
import signal, threading
from cidfs.local.packs import PackWriter
whole = PackWriter.append_many
def stopping(self, items):
    PackWriter.append_many = whole
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    return whole(self, items)
PackWriter.append_many = stopping
"""
    adding = store.start("add", tree, hook=hook)
    wait_until_stopped(adding)
    adding.send_signal(signal.SIGINT)
    adding.send_signal(signal.SIGCONT)
    lines, errors = store.finish(adding, code=130)
    assert lines == []
    assert len(errors) == 1, errors
    assert "interrupted" in errors[0]
    assert published(store) == []
    assert len(store.add(tree)) == 1
    assert_sound(store)


def test_a_nar_that_does_not_come_can_be_interrupted(store: Store, tmp_path: Path) -> None:
    """Standard input stays open, with nothing or little in it: Ctrl-C ends the command, and not its end."""
    store.add(make_files(tmp_path / "other", {b"x": b"x"}))
    waiting = store.start("import", "-", "--name", "x", stdin=subprocess.PIPE)
    assert waiting.stdin is not None
    waiting.stdin.write(nar.HEADER[:20])
    wait_until(lambda: any((store.state / "run").glob("ingest-*.lease")))
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(20) == 130
    _, errors = store.finish(waiting, code=130)
    assert len(errors) == 1, errors
    assert "interrupted" in errors[0]


def test_a_tree_deeper_than_a_path_can_be_long_is_refused_or_whole(store: Store) -> None:
    top = store.state.parent / "deep"
    top.mkdir()
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    line = store.error("add", top, code=3)
    assert "name too long" in line
    assert published(store) == []


def test_the_nar_hash_is_that_of_a_writer_of_our_own(store: Store) -> None:
    tree = make_files(store.state.parent / "tree", {b"a/b": noise(1, 100_000), b"c": b"", b"d/": b""})
    os.chmod(tree / "c", 0o755)
    os.symlink("c", tree / "e")
    (name,) = store.add(tree)
    raw = store.run("nar", name).stdout
    assert len(raw) % 8 == 0
    assert store.run("import", "-", "--name", "tree", stdin=raw).stdout.decode() == f"/nix/store/{name}\n"
    assert hashlib.sha256(raw).hexdigest() == nar_hash(tree)
