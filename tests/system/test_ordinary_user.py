"""Somebody who is not root: adds to a store of his own, mounts it and takes it down again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cidfs.errors import Unhealthy, exit_code
from tests.commands import Store, wait_until
from tests.system.person import Person
from tests.system.support import (
    alive,
    awkward_tree,
    describe,
    error_of,
    inodes,
    make_files,
    mount_lines,
    mounted,
    noise,
)

WALK = """
import json, sys
from tests.system.support import describe
print(json.dumps({k.decode("latin-1"): [n[0], n[1], n[2].decode("latin-1"), n[3]]
                  for k, n in describe(sys.argv[1]).items()}))
"""


def walk(person: Person, path: Path) -> dict[bytes, tuple[int, int, bytes, str]]:
    """Return what describe() sees when this user runs it."""
    done = person.run(*person.python, "-c", WALK, path)
    assert done.returncode == 0, done.stderr.decode()
    return {
        k.encode("latin-1"): (n[0], n[1], n[2].encode("latin-1"), n[3])
        for k, n in json.loads(done.stdout).items()
    }


@pytest.mark.usefixtures("fuse_for_all")
def test_an_ordinary_user_adds_mounts_reads_and_unmounts(person: Person, public: Path) -> None:
    tree = awkward_tree(public / "tree")
    for path in (tree / "plain", tree / "many"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    mountpoint = person.home / "mnt"
    done = person.run("mkdir", mountpoint)
    assert done.returncode == 0
    (line,) = person.cidfs("add", tree)  # into the state folder in the home
    name = Path(line).name
    state = person.home / ".local/state/cidfs"
    assert (state / "format").is_file()
    assert person.cidfs("ls") == [line]

    person.cidfs("mount", "--list-root", mountpoint)
    (found,) = mounted(mountpoint)
    assert found[2] == "fuse.cidfs"
    assert {"ro", "nosuid", "nodev"} <= set(found[3].split(","))
    expected = {path: tuple(node) for path, node in describe(tree).items()}
    assert walk(person, mountpoint / name) == expected
    stats = json.loads("\n".join(person.cidfs("stats", "--json")))
    assert stats["daemon"]["mountpoint"] == str(mountpoint)
    pid = stats["daemon"]["pid"]
    assert os.stat(f"/proc/{pid}").st_uid == person.uid
    later = make_files(public / "later", {b"file": b"later"})
    (line,) = person.cidfs("add", later)
    assert person.run("cat", mountpoint / Path(line).name / "file").stdout == b"later"
    if os.geteuid() == 0 and "allow_other" not in found[3]:
        assert error_of(lambda: os.listdir(mountpoint)) == "EACCES"  # his alone

    (busy,) = person.cidfs("mount", mountpoint, code=22)
    assert str(state) in busy
    person.cidfs("umount", mountpoint)
    assert mounted(mountpoint) == []
    wait_until(lambda: not alive(pid))
    assert [path.suffix for path in (state / "run").iterdir()] == []
    (line,) = person.cidfs("umount", mountpoint, code=21)
    assert str(mountpoint) in line


@pytest.mark.usefixtures("fuse_for_all")
def test_an_ordinary_users_store_is_rebuilt_and_verified(person: Person, public: Path) -> None:
    tree = make_files(public / "tree", {b"file": noise(1, 100_000), b"sub/other": b"x"})
    state = person.home / "elsewhere"
    mountpoint = person.home / "mnt"
    person.run("mkdir", mountpoint)
    (line,) = person.cidfs("--state", state, "add", tree)
    person.cidfs("--state", state, "mount", mountpoint)
    (pid,) = (int(path.name.split("-")[1]) for path in (state / "run").glob("mount-*.lease"))
    before = walk(person, mountpoint / Path(line).name)
    person.run("rm", "-r", state / "index")
    (refusal,) = person.cidfs("--state", state, "add", tree, code=12)
    assert "rebuild" in refusal
    person.cidfs("--state", state, "rebuild")
    person.cidfs("--state", state, "verify")
    assert walk(person, mountpoint / Path(line).name) == before
    fusermount = person.run("fusermount3", "-u", mountpoint)  # without cidfs's help
    assert fusermount.returncode == 0, fusermount.stderr.decode()
    wait_until(lambda: not alive(pid))
    wait_until(lambda: all(path.suffix == ".log" for path in (state / "run").iterdir()), 60)
    assert str(mountpoint) not in [m[1] for m in mount_lines()]
    assert inodes(mountpoint).keys() == {b""}


@pytest.mark.usefixtures("fuse_for_all")
def test_an_ordinary_user_has_his_store_examined_but_not_roots(
    person: Person, public: Path, store: Store
) -> None:
    tree = make_files(public / "tree", {b"file": b"x"})
    mountpoint = person.home / "mnt"
    person.run("mkdir", mountpoint)
    person.cidfs("add", tree)
    person.cidfs("mount", mountpoint)
    lines = person.cidfs("doctor")
    assert f"ok       mount: {mountpoint}: answers" in lines
    assert not [line for line in lines if line.startswith("failure")]
    person.cidfs("umount", mountpoint)
    if os.geteuid() == 0:
        store.add(tree)
        shutil.move(store.state, public / "of root")
        (public / "of root" / "format").chmod(0o600)
        (complaint,) = person.cidfs("--state", public / "of root", "doctor", code=exit_code(Unhealthy()))
        assert "1 failure" in complaint
