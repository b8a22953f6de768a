"""What a mount shows: just what was added, in Nix's canonical form, and new paths at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.commands import Store
from tests.system.conftest import Mounted
from tests.system.support import (
    DEPTH,
    LONG_NAME,
    LONG_TARGET,
    below,
    describe,
    error_of,
    inodes,
    make_files,
    mount_lines,
)

UNKNOWN = "ffffffffffffffffffffffffffffffff-unknown"


def test_every_name_type_size_target_and_byte_is_as_the_source(awkward: Mounted) -> None:
    assert describe(awkward.path) == awkward.nodes


def test_the_tree_that_was_compared_holds_all_that_is_awkward(awkward: Mounted) -> None:
    names = set(awkward.nodes)
    assert {b"/not-utf8-\xff\xfe\xe9", b"/new\nline", b"/" + LONG_NAME, b"/Case", b"/case", b"/CASE"} <= names
    assert b"/d" * DEPTH + b"/bottom" in names
    assert awkward.nodes[b"/empty"].size == 0
    assert awkward.nodes[b"/long link"].target == LONG_TARGET
    assert len(LONG_TARGET) == 1000
    assert not os.path.exists(awkward.source / "dangling")


def test_attributes_are_nixs_canonical_ones(awkward: Mounted) -> None:
    canonical = {
        stat.S_IFDIR | 0o555,
        stat.S_IFREG | 0o444,
        stat.S_IFREG | 0o555,
        stat.S_IFLNK | 0o777,
    }
    seen = set()
    for path, info in below(awkward.path):
        seen.add(info.st_mode)
        times = {info.st_mtime_ns, info.st_atime_ns, info.st_ctime_ns}
        assert (times, info.st_uid, info.st_gid, info.st_nlink) == ({10**9}, 0, 0, 1), path
    assert seen == canonical


def test_inode_numbers_are_unique_and_the_same_in_listings(awkward: Mounted) -> None:
    numbers = inodes(awkward.path)
    assert len(set(numbers.values())) == len(numbers) == len(awkward.nodes)
    with os.scandir(awkward.path / "many") as listing:
        listed = {os.fsencode(entry.name): entry.inode() for entry in listing}
    assert listed == {name: numbers[b"/many/" + name] for name in listed}
    assert len(listed) == 3000


def test_a_listing_can_be_read_in_parts_and_again(awkward: Mounted) -> None:
    folder = os.open(awkward.path / "many", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(folder) as listing:
            first = [next(listing).name for _ in range(10)]
        again = os.listdir(folder)
    finally:
        os.close(folder)
    assert again[:10] == first
    assert sorted(again) == [f"{i:05d}" for i in range(3000)]


def test_parts_of_files_are_read_at_any_offset(awkward: Mounted) -> None:
    whole = (awkward.source / "many chunks").read_bytes()
    fd = os.open(awkward.path / "many chunks", os.O_RDONLY)
    try:
        for offset in (0, 1, 4095, 4096, 65535, 1 << 20, len(whole) - 1, len(whole), len(whole) + 1, 1 << 40):
            for size in (1, 4096, 100_000, 2 << 20):
                assert os.pread(fd, size, offset) == whole[offset : offset + size]
    finally:
        os.close(fd)


def test_links_is_there_and_empty(awkward: Mounted) -> None:
    links = awkward.mountpoint / ".links"
    assert os.listdir(links) == []
    info = links.lstat()
    assert (info.st_mode, info.st_mtime, info.st_uid, info.st_nlink) == (stat.S_IFDIR | 0o555, 1, 0, 1)
    assert error_of(lambda: os.lstat(links / "any")) == "ENOENT"


def test_the_root_lists_links_alone_unless_asked_to_list_all(store: Store, awkward: Mounted) -> None:
    assert os.listdir(awkward.mountpoint) == [".links"]
    folder = store.state.parent
    trees = [make_files(folder / f"tree-{i}", {b"file": b"%d" % i}) for i in range(3)]
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    names = store.add(*trees[:2])
    store.mount(mountpoint, "--list-root")
    assert sorted(os.listdir(mountpoint)) == sorted([".links", *names])
    names += store.add(trees[2])
    assert sorted(os.listdir(mountpoint)) == sorted([".links", *names])
    with os.scandir(mountpoint) as listing:
        assert {entry.name: entry.inode() for entry in listing if entry.name != ".links"} == {
            name: (mountpoint / name).stat().st_ino for name in names
        }


@pytest.mark.parametrize(
    "name",
    [
        UNKNOWN,
        "x",
        "nothing",
        ".Links",
        "a" * 255,
        "{hash}",
        "{hash}-",
        "{hash}-other",
        "{path}x",
        "{path}/x",
    ],
)
def test_an_unknown_name_is_absent(awkward: Mounted, name: str) -> None:
    text = name.format(hash=awkward.name[:32], path=awkward.name)
    assert error_of(lambda: os.lstat(awkward.mountpoint / text)) == "ENOENT"


def test_extended_attributes_are_not_supported(awkward: Mounted) -> None:
    names = ["user.any", "security.capability"]
    if os.geteuid() == 0:  # the kernel tells nobody else of the trusted ones
        names.append("trusted.overlay.opaque")
    for path in (awkward.mountpoint, awkward.path, awkward.path / "plain"):
        for name in names:
            assert error_of(partial(os.getxattr, path, name)) in ("ENOTSUP", "EOPNOTSUPP", "ENOSYS")


def _writes(path: Path) -> dict[str, Callable[[], object]]:
    file, folder, fresh = path / "plain", path / "many", path / "fresh"
    return {
        "create": lambda: os.open(fresh, os.O_CREAT | os.O_WRONLY),
        "write": lambda: os.open(file, os.O_WRONLY),
        "truncate": lambda: os.truncate(file, 0),
        "unlink": lambda: os.unlink(file),
        "rmdir": lambda: os.rmdir(path / "empty-folder"),
        "mkdir": lambda: os.mkdir(fresh),
        "rename": lambda: os.rename(file, fresh),
        "link": lambda: os.link(file, fresh),
        "symlink": lambda: os.symlink("x", fresh),
        "chmod": lambda: os.chmod(file, 0o600),
        "chown": lambda: os.chown(folder, 1, 1),
        "utime": lambda: os.utime(file),
        "mknod": lambda: os.mkfifo(fresh),
        "setxattr": lambda: os.setxattr(file, "user.any", b"x"),
        "create in the root": lambda: os.mkdir(path.parent / UNKNOWN),
        "remove the path": lambda: os.rename(path, path.parent / UNKNOWN),
    }


@pytest.mark.parametrize("write", _writes(Path()))
def test_nothing_can_be_written(awkward: Mounted, write: str) -> None:
    assert error_of(_writes(awkward.path)[write]) == "EROFS"


def test_operations_on_the_wrong_type_fail_as_on_a_disk(awkward: Mounted) -> None:
    assert error_of(lambda: os.listdir(awkward.path / "plain")) == "ENOTDIR"
    assert error_of(lambda: os.lstat(awkward.path / "plain/x")) == "ENOTDIR"
    assert error_of(lambda: os.readlink(awkward.path / "plain")) == "EINVAL"
    assert error_of(lambda: os.stat(awkward.path / "loop")) == "ELOOP"
    assert error_of(lambda: (awkward.path / "many").read_bytes()) == "EISDIR"
    assert error_of(lambda: (awkward.path / "dangling").read_bytes()) == "ENOENT"


@pytest.mark.usefixtures("root")
def test_the_mount_has_the_options_that_are_promised(awkward: Mounted) -> None:
    (line,) = [m for m in mount_lines() if m[1] == str(awkward.mountpoint)]
    assert line[0] == str(awkward.store.state)
    assert line[2] == "fuse.cidfs"
    assert {"ro", "nosuid", "nodev", "noatime", "allow_other"} <= set(line[3].split(","))


@pytest.mark.usefixtures("root")
def test_the_kernel_reads_ahead_a_megabyte(awkward: Mounted) -> None:
    device = awkward.mountpoint.stat().st_dev
    known = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(known.read_text()) == 1024


def test_statfs_answers(awkward: Mounted) -> None:
    info = os.statvfs(awkward.mountpoint)
    assert (info.f_namemax, info.f_bfree, info.f_bavail) == (255, 0, 0)
    assert info.f_flag & os.ST_RDONLY
    assert info.f_files >= len(awkward.nodes)


def test_a_new_path_appears_at_once_in_a_running_mount(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    tree = make_files(folder / "tree", {b"file": b"new", b"sub/file": b"newer"})
    other = Store(folder / "other-state")
    names = other.add(tree)  # tells the name before it is there
    store.add(make_files(folder / "first", {b"file": b"first"}))
    store.mount(mountpoint)
    inside = mountpoint / names[0] / "file"
    assert error_of(lambda: os.lstat(mountpoint / names[0])) == "ENOENT"
    assert error_of(lambda: inside.read_bytes()) == "ENOENT"
    assert store.add(tree) == names
    assert inside.read_bytes() == b"new"
    assert describe(mountpoint / names[0]) == describe(tree)


def test_a_mount_of_an_empty_store_takes_what_comes_later(store: Store, mountpoint: Path) -> None:
    store.mount(mountpoint)
    assert os.listdir(mountpoint) == [".links"]
    tree = make_files(store.state.parent / "tree", {b"file": b"later"})
    (name,) = store.add(tree)
    assert describe(mountpoint / name) == describe(tree)
