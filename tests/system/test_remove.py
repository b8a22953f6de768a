"""`cidfs remove`: what goes, what it refuses, and what running mounts show of it."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.commands import Store, wait_until
from tests.system.model_support import base_name, publish
from tests.system.quick import forks, store
from tests.system.support import describe, error_of, inodes, make_files, mount, noise, umount

__all__ = ["forks", "store"]

NONE = "0" * 32 + "-none"


def tree(store: Store, name: str) -> Path:
    """Make a small tree beside the store."""
    files = {b"plain": name.encode(), b"sub/large": noise(name, 200_000), b"none/": b""}
    return make_files(store.state.parent / name, files)


def absent(*paths: Path) -> bool:
    """Say whether none of some paths can be looked up."""
    return {error_of(partial(os.lstat, p)) for p in paths} == {"ENOENT"}


def chain(store: Store, length: int) -> list[str]:
    """Publish paths of which each refers to itself and to the one before it."""
    source = make_files(store.state.parent / "link", {b"file": b"x"})
    names = [base_name(f"link {i}", f"link-{i}") for i in range(length)]
    return publish(store, *((source, n, [n, *names[max(0, i - 1) : i]]) for i, n in enumerate(names)))


def full(*names: str) -> list[str]:
    """Return whole store paths."""
    return [f"/nix/store/{name}" for name in names]


def test_a_removed_path_is_gone_and_the_others_are_whole(store: Store, mountpoint: Path) -> None:
    trees = [tree(store, name) for name in ("a", "b", "c", "d")]
    names = store.add(*trees)
    store.mount(mountpoint)
    assert describe(mountpoint / names[0]) == describe(trees[0])
    done = store.run("remove", *full(names[0]), names[2])  # a whole path, and a base name
    assert done.stdout.decode().splitlines() == full(names[0], names[2])
    assert done.stderr == b""
    assert "not in the store" in store.error("nar", names[0], code=4)
    assert absent(mountpoint / names[0], mountpoint / names[2])
    assert describe(mountpoint / names[1]) == describe(trees[1])

    shutil.rmtree(store.state / "index")  # the journal knows it too
    store.run("rebuild")
    assert store.lines("ls") == sorted(full(names[1], names[3]))
    assert absent(mountpoint / names[0])
    store.run("verify")


def test_what_others_refer_to_is_refused(store: Store, mountpoint: Path) -> None:
    first, second, third = chain(store, 3)
    (other,) = store.add(tree(store, "other"))
    store.mount(mountpoint, "--list-root")
    for asked in ([first, third], [other, second, first]):
        line = store.error("remove", *asked, code=9)
        assert (second if third in asked else third) in line
        assert "--referrers" in line
        assert "--force" in line
        assert len(os.listdir(mountpoint)) == 5  # not even what nobody refers to has gone
    assert store.lines("remove", second, third) == full(third, second)  # so that nothing dangles in between
    assert store.lines("remove", first) == full(first)  # it refers to itself
    chain(store, 3)
    assert store.lines("remove", "--force", second) == full(second)
    assert describe(mountpoint / third) == describe(mountpoint / first)
    assert absent(mountpoint / second)
    store.run("verify")
    chain(store, 3)
    assert store.lines("remove", "--referrers", second) == full(third, second)
    assert set(os.listdir(mountpoint)) == {".links", first, other}


def test_a_long_chain_goes_from_its_end(store: Store) -> None:
    names = chain(store, 600)  # more than one transaction takes
    assert store.lines("remove", "--referrers", names[0]) == full(*reversed(names))
    assert store.lines("ls") == []


def test_what_is_not_there_is_said_and_the_others_go(store: Store) -> None:
    names = store.add(tree(store, "a"), tree(store, "b"))
    other = names[0].replace("-a", "-other-name")  # the hash part alone is no path
    line = store.error("remove", other, other, code=4)
    assert line.endswith(f"/nix/store/{other}: not in the store at {store.state}")
    done = store.run("remove", other, names[0], names[0], NONE, code=4)
    assert done.stdout.decode().splitlines() == full(names[0])
    assert b"(and 1 more): not in the store" in done.stderr
    for word in ("/etc/passwd", f"/nix/store/{names[1]}/plain", ""):
        assert store.run("remove", names[1], word, code=2).stdout == b""
    assert store.lines("ls") == full(names[1])


def test_names_go_at_once_and_what_is_open_goes_on(store: Store, mountpoint: Path) -> None:
    source, stays = tree(store, "a"), tree(store, "b")
    name, other = store.add(source, stays)
    second = store.state.parent / "second"
    second.mkdir()
    mounts = [store.mount(mountpoint), store.mount(second, "--list-root")]
    before = inodes(mountpoint / name)
    assert all(describe(m / n) == describe(t) for m in mounts for n, t in ((name, source), (other, stays)))
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open(mountpoint / name / "plain", "rb", buffering=0))
        large = opened.enter_context(open(second / name / "sub/large", "rb"))
        mapped = opened.enter_context(mmap.mmap(large.fileno(), 0, prot=mmap.PROT_READ))
        fd = os.open(second / name, os.O_PATH | os.O_DIRECTORY)
        opened.callback(os.close, fd)
        folder = os.fsencode(f"/proc/self/fd/{fd}/.")

        store.run("remove", name)
        assert absent(*(m / name / p for m in mounts for p in ("", "plain", "sub/large")))
        assert sorted(os.listdir(second)) == sorted([".links", other])
        store.run("gc")
        assert file.read() == b"a"
        assert describe(folder) == describe(source)
        assert mapped[:] == noise("a", 200_000)
        assert os.fstat(file.fileno()).st_ino == before[b"/plain"]

        assert store.add(source) == [name]
        for m in mounts:
            assert describe(m / name) == describe(source)
            after = inodes(m / name)
            assert after.keys() == before.keys()
            assert not set(after.values()) & set(before.values())
        assert os.stat(folder).st_ino == before[b""]
        assert describe(folder) == describe(source)


def test_names_go_at_once_after_a_rebuild_too(store: Store, mountpoint: Path) -> None:
    (name,) = store.add(tree(store, "a"))
    store.mount(mountpoint)
    assert (mountpoint / name / "plain").read_bytes() == b"a"
    store.run("rebuild")
    store.run("remove", name)
    assert absent(mountpoint / name)


def test_a_stopped_daemon_keeps_nobody_waiting(store: Store, mountpoint: Path) -> None:
    names = store.add(tree(store, "a"), tree(store, "b"))
    second = store.state.parent / "second"
    second.mkdir()
    store.mount(mountpoint)
    (stopped,) = store.daemon_pids()
    store.mount(second)
    for name in names:
        os.lstat(mountpoint / name)
        os.lstat(second / name)
    os.kill(stopped, signal.SIGSTOP)
    try:
        store.run("remove", names[0], timeout=30)
        assert absent(second / names[0])
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: absent(mountpoint / names[0]))
    assert (mountpoint / names[1] / "plain").read_bytes() == b"b"


def test_two_that_remove_the_same_remove_it_once(store: Store) -> None:
    names = store.add(*(tree(store, name) for name in "abcd"))
    both = [store.start("remove", *order) for order in (names, names[::-1])]
    printed = []
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode in (0, 4), err.decode()
        printed += out.decode().splitlines()
    assert sorted(printed) == sorted(full(*names))
    assert store.lines("ls") == []


# --- overlays


@contextlib.contextmanager
def overlay(folder: Path, lower: Path | str) -> Iterator[str]:
    """Mount an overlay on a folder for a while; return its mount point."""
    for name in ("merged", "upper", "work"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    options = f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work"
    mount("-t", "overlay", "-o", options, "none", folder / "merged")
    try:
        yield str(folder / "merged")
    finally:
        umount(folder / "merged")


@pytest.mark.usefixtures("root")
def test_nothing_goes_from_under_an_overlay(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    names = store.add(tree(store, "a"), tree(store, "b"))
    store.mount(mountpoint)
    (folder / "bound").mkdir()
    mount("--bind", mountpoint, folder / "bound")
    for lower in (mountpoint / names[0], folder / "bound", mountpoint):
        with overlay(folder, lower) as merged:
            for asked in ([names[0]], ["--referrers", NONE]):
                line = store.error("remove", *asked, code=9)
                assert merged in line
                assert "--force" in line
            assert (mountpoint / names[0] / "plain").read_bytes() == b"a"
            if lower == mountpoint:
                assert store.lines("remove", "--force", names[0]) == full(names[0])
                assert absent(mountpoint / names[0])
    umount(folder / "bound")
    assert store.lines("remove", names[1]) == full(names[1])


@pytest.mark.usefixtures("root")
def test_an_overlay_on_another_store_is_none_of_its_business(store: Store, mountpoint: Path) -> None:
    (name,) = store.add(tree(store, "a"))
    other = Store(store.state.parent / "other-state")
    other.mount(mountpoint)
    try:
        with overlay(store.state.parent, mountpoint):
            assert store.lines("remove", name) == full(name)
    finally:
        assert other.end() == []


@pytest.mark.usefixtures("root")
def test_a_store_by_another_name_is_the_same_store(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    (name,) = store.add(tree(store, "a"))
    (folder / "alias").symlink_to("state")
    (folder / "way").symlink_to(mountpoint)
    alias = Store(folder / "alias")
    store.mount(mountpoint)
    with overlay(folder, folder / "way") as merged:
        for either in (store, alias):
            assert merged in either.error("remove", name, code=9)
    assert alias.lines("remove", name) == full(name)
