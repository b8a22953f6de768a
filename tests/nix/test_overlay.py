"""A real overlayfs stands on the mount: what is written lands above, and the mount stays what it was."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import World
from .lab import ground_at, overlay_on
from .tool import Mount
from .trees import TREES, differences, snapshot


@dataclass(frozen=True)
class Overlay:
    """An overlay on the session's mount; nobody builds in it."""

    at: Path

    @property
    def merged(self) -> Path:
        return self.at / "merged" / "nix" / "store"

    @property
    def upper(self) -> Path:
        return self.at / "upper"

    def path(self, store_path: str) -> Path:
        return self.merged / store_path.rpartition("/")[2]


@pytest.fixture
def overlay(root: None, mount: Mount, tmp_path: Path) -> Iterator[Overlay]:
    with ground_at(tmp_path.resolve() / "ground") as ground, overlay_on(mount, ground / "overlay"):
        yield Overlay(ground / "overlay")


def test_an_overlay_shows_what_the_mount_shows(world: World, mount: Mount, overlay: Overlay) -> None:
    for tree in TREES:
        path = world.trees[tree]
        assert differences(snapshot(overlay.path(path)), snapshot(mount.path(path))) == [], tree
    assert mount.names() <= set(os.listdir(overlay.merged))
    assert list(overlay.upper.iterdir()) == []


def test_changes_above_leave_the_mount_as_it_was(world: World, mount: Mount, overlay: Overlay) -> None:
    changed = [world.trees[name] for name in ("names", "big", "modes", "symlinks", "file", "link", "empties")]
    before = {path: snapshot(mount.path(path)) for path in changed}
    names = mount.names()

    new = overlay.merged / "new"
    new.write_bytes(b"new above")
    assert new.read_bytes() == b"new above"

    big = overlay.path(world.trees["big"])
    noise = (mount.path(world.trees["big"]) / "noise").read_bytes()
    with (big / "noise").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"changed")
    assert (big / "noise").read_bytes() == noise[:1_000_000] + b"changed" + noise[1_000_007:]
    with (big / "text").open("ab") as file:
        file.write(b"one line more\n")
    assert (big / "text").read_bytes().endswith(b"text\none line more\n")

    tree = overlay.path(world.trees["names"])
    for name in (b"latin\xe9", b"new\nline", b"x" * 255):
        os.unlink(os.fsencode(tree) + b"/" + name)
        assert not os.path.lexists(os.fsencode(tree) + b"/" + name)
    shutil.rmtree(os.fsencode(tree) + b"/dirs")
    (tree / "dirs").mkdir()
    assert os.listdir(tree / "dirs") == []
    (tree / "Ab").rename(tree / "Abc")
    assert not os.path.lexists(tree / "Ab")
    assert (tree / "Abc").read_bytes() == (mount.path(world.trees["names"]) / "Ab").read_bytes()

    modes = overlay.path(world.trees["modes"])
    (modes / "file-444").chmod(0o600)
    os.utime(modes / "file-444", (5, 5))
    changed_status = (modes / "file-444").stat()
    assert (stat.S_IMODE(changed_status.st_mode), changed_status.st_mtime) == (0o600, 5)
    os.link(modes / "file-600", modes / "linked")
    assert (modes / "linked").stat().st_nlink == 2

    for whole in ("symlinks", "empties"):
        shutil.rmtree(overlay.path(world.trees[whole]))
    for single in ("file", "link"):
        overlay.path(world.trees[single]).unlink()
        assert not os.path.lexists(overlay.path(world.trees[single]))
    overlay.path(world.trees["file"]).write_bytes(b"another")
    assert overlay.path(world.trees["file"]).read_bytes() == b"another"

    assert {path: snapshot(mount.path(path)) for path in changed} == before
    assert mount.names() == names


def test_a_program_runs_through_the_overlay(world: World, overlay: Overlay) -> None:
    done = subprocess.run([overlay.path(world.trees["executable"])], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"top level\n")
