"""A mount shows what stands in Nix's own store: no more, no less, nothing else."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import World
from .tool import Cidfs, Mount, mounted, wait_until
from .trees import AWKWARD_NAMES, TREES, Entry, differences, snapshot


def canonical(tree: dict[bytes, Entry]) -> dict[bytes, Entry]:
    """Return a tree with root as its owner, whoever runs the tests and so owns Nix's store."""
    return {path: dataclasses.replace(entry, uid=0, gid=0) for path, entry in tree.items()}


def test_the_root_lists_exactly_what_nix_calls_valid(world: World, mount: Mount) -> None:
    assert mount.names() == {path.rpartition("/")[2] for path in world.infos}


def test_every_path_equals_that_of_nix(world: World, mount: Mount) -> None:
    wrong: dict[str, list[str]] = {}
    for path in world.infos:
        theirs = canonical(snapshot(world.store.real(path)))
        mine = snapshot(mount.path(path), single_links=True)
        if lines := differences(mine, theirs):
            wrong[path] = lines[:10]
    assert wrong == {}


def test_every_path_has_the_attributes_of_a_store_path(world: World, mount: Mount) -> None:
    for path in world.infos:
        for relative, entry in snapshot(mount.path(path), single_links=True).items():
            modes = {"directory": {0o555}, "file": {0o444, 0o555}, "symlink": {0o777}}
            assert entry.mode in modes[entry.kind], (path, relative)
            assert (entry.uid, entry.gid) == (0, 0), (path, relative)
            assert entry.mtime_ns == 1_000_000_000, (path, relative)


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree[:20])
def test_what_was_added_is_what_the_source_holds(world: World, mount: Mount, tree: str) -> None:
    """The source, not Nix's copy: names, kinds, bytes and link targets went through unchanged."""

    def essence(entry: Entry) -> tuple[str, bool, int, bytes, str]:
        runs = entry.kind == "file" and bool(entry.mode & 0o100)
        return entry.kind, runs, entry.size, entry.target, entry.digest

    source = snapshot(world.sources / tree)
    shown = snapshot(mount.path(world.trees[tree]))
    assert {path: essence(entry) for path, entry in shown.items()} == {
        path: essence(entry) for path, entry in source.items()
    }


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_an_awkward_name_can_be_looked_up_without_listing(world: World, mount: Mount, name: bytes) -> None:
    tree = os.fsencode(mount.path(world.trees["names"]))
    with open(tree + b"/dirs/" + name + b"/" + name, "rb") as file:
        assert file.read() == name


def test_a_name_that_is_not_there_is_not_found(world: World, mount: Mount) -> None:
    tree = os.fsencode(mount.path(world.trees["names"]))
    for name in (b"aB", b"latin\xe8", b"nfc-e\xcc\x81", b"x" * 254, b"-r", b"...."):
        with pytest.raises(FileNotFoundError):
            os.lstat(tree + b"/" + name)
    for length in (256, 1024, 5000):
        assert not os.path.lexists(tree + b"/" + b"x" * length)


def test_a_store_path_is_found_by_its_whole_name_only(world: World, mount: Mount) -> None:
    name = world.top.rpartition("/")[2]
    others = (name[:32], name[:-1], f"{name}x", f"{name[:33]}other", "0" * 32 + name[32:], "nonsense")
    for other in others:
        assert not os.path.lexists(mount.at / other)


def test_nix_itself_dumps_the_same_archive_from_the_mount(world: World, mount: Mount) -> None:
    nix = world.store.nix
    wrong = []
    for path, info in world.infos.items():
        archive = nix.run("nix-store", "--dump", mount.path(path))
        hashed = nix.run("nix", "hash", "convert", "--hash-algo", "sha256", "--to", "sri", _sha256(archive))
        if hashed.decode().strip() != info.nar_hash:
            wrong.append(path)
    assert wrong == []


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_reads_at_any_place_give_the_bytes_that_stand_there(world: World, mount: Mount) -> None:
    """Borders of chunks, pages and the file, in no helpful order, each with a descriptor of its own."""
    names = ("noise", "shifted", "hole", "zeros")
    for name in names:
        theirs = (world.store.real(world.trees["big"]) / name).read_bytes()
        places = {0, 1, 4095, 65535, 262143, 262144, len(theirs) // 2, len(theirs) - 5000, len(theirs) - 1}
        for place in sorted(places, key=lambda place: hash((name, place)) & 0xFF):
            for length in (1, 5000, 300_000):
                with open(mount.path(world.trees["big"]) / name, "rb", buffering=0) as file:
                    got = os.pread(file.fileno(), length, place)
                assert got == theirs[place : place + length], (name, place, length)
        with open(mount.path(world.trees["big"]) / name, "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, len(theirs)) == b""
            assert os.pread(file.fileno(), 10, len(theirs) + 1_000_000) == b""


def test_nothing_in_the_mount_can_be_changed(world: World, mount: Mount) -> None:
    tree = mount.path(world.trees["modes"])
    attempts: list[Callable[[], object]] = [
        lambda: (mount.at / "new").write_bytes(b""),
        lambda: (mount.at / "new").mkdir(),
        lambda: (tree / "file-644").open("r+b"),
        lambda: (tree / "file-644").unlink(),
        lambda: (tree / "file-644").rename(tree / "other"),
        lambda: (tree / "file-644").chmod(0o777),
        lambda: os.truncate(tree / "file-644", 0),
        lambda: os.utime(tree / "file-644"),
        lambda: os.link(tree / "file-644", tree / "other"),
        lambda: os.symlink("x", tree / "other"),
        lambda: (tree / "dir-755").rmdir(),
    ]
    refused = "|".join(str(number) for number in (errno.EROFS, errno.EACCES, errno.EPERM))
    for attempt in attempts:
        with pytest.raises(OSError, match=rf"^\[Errno ({refused})\] "):
            attempt()


def test_extended_attributes_are_not_supported_rather_than_absent(world: World, mount: Mount) -> None:
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(mount.path(world.top), "user.any")


def test_an_ordinary_copy_of_the_mount_has_the_same_nar_hash(
    world: World, mount: Mount, tmp_path: Path
) -> None:
    """`cp`, which skips what it takes for holes, still copies every byte."""
    nix = world.store.nix
    for tree in ("big", "names", "symlinks"):
        shown = mount.path(world.trees[tree])
        subprocess.run(["cp", "-a", "--no-preserve=ownership", shown, tmp_path / tree], check=True)
        assert nix.run("nix-store", "--dump", tmp_path / tree) == world.store.dump(world.trees[tree])


def test_the_root_lists_nothing_unless_asked_to(
    world: World, tmp_path: Path, new_cidfs: Callable[[], Cidfs]
) -> None:
    cidfs = new_cidfs()
    cidfs.run("import", "--from", world.store.root, world.top)
    with mounted(cidfs, tmp_path / "mnt") as mount:
        assert mount.names() == set()
        assert os.listdir(mount.at / ".links") == []
        assert (mount.path(world.top) / "Ab").read_bytes() == b"big\n"


def test_what_is_added_while_mounted_appears(
    world: World, tmp_path: Path, new_cidfs: Callable[[], Cidfs]
) -> None:
    """Also where the name had been looked up in vain before."""
    cidfs = new_cidfs()
    with mounted(cidfs, tmp_path / "mnt", "--list-root") as mount:
        assert mount.names() == set()
        shown = mount.path(world.trees["names"])
        assert not os.path.lexists(shown)
        assert cidfs.run("add", world.sources / "names").lines == [world.trees["names"]]
        wait_until("the new path can be looked up", lambda: os.path.lexists(shown))
        assert mount.names() == {shown.name}
        assert differences(snapshot(shown), canonical(snapshot(world.store.real(world.trees["names"])))) == []


@pytest.mark.parametrize("name", ["a b, c\\d\ne=f:g", "\u00fcn\u00ef"])
def test_a_state_folder_and_a_mount_point_may_have_any_name(world: World, tmp_path: Path, name: str) -> None:
    cidfs = Cidfs(tmp_path / name / "state")
    (path,) = cidfs.run("add", world.sources / "executable").lines
    with mounted(cidfs, tmp_path / name / "mnt", "--list-root") as mount:
        assert mount.names() == {path.rpartition("/")[2]}
        assert mount.path(path).read_bytes() == (world.sources / "executable").read_bytes()
