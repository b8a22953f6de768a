"""A real overlayfs stands on the mount: what is written lands above, and the mount stays what it was."""

from __future__ import annotations

import os
import select
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import World
from .real_nix import CLOSURE, ChrootStore
from .tool import Cidfs, Mount, mounted
from .trees import TREES, differences, snapshot

_SETUP = """
mount -t tmpfs tmpfs "$1"
mkdir -p "$1/upper" "$1/work" "$1/merged/nix/store"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/merged/nix/store"
echo ready
exec cat
"""


@dataclass(frozen=True)
class Overlay:
    """An overlay in a mount namespace of its own; `view` is where this process sees that namespace."""

    namespace: int
    at: Path

    @property
    def view(self) -> Path:
        return Path(f"/proc/{self.namespace}/root{self.at}")

    @property
    def merged(self) -> Path:
        return self.view / "merged" / "nix" / "store"

    @property
    def upper(self) -> Path:
        return self.view / "upper"

    def path(self, store_path: str) -> Path:
        return self.merged / store_path.rpartition("/")[2]

    @property
    def enter(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.namespace), "--mount")

    def whiteouts(self) -> list[Path]:
        return [path for path in self.upper.rglob("*") if stat.S_ISCHR(path.lstat().st_mode)]


@contextmanager
def _overlay(mount: Mount, at: Path) -> Iterator[Overlay]:
    at.mkdir()
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _SETUP, "sh", at, mount.at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with keeper:
        assert keeper.stdout is not None
        try:
            assert select.select([keeper.stdout], [], [], 30)[0], "the overlay was not mounted in time"
            assert keeper.stdout.readline() == b"ready\n"
            yield Overlay(keeper.pid, at)
        finally:
            keeper.kill()


@pytest.fixture
def overlay(mount: Mount, tmp_path: Path) -> Iterator[Overlay]:
    with _overlay(mount, tmp_path.resolve() / "overlay") as overlay:
        yield overlay


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


@dataclass(frozen=True)
class LocalOverlay:
    """Nix's local-overlay store: the mount below, with a copy of the database that goes with it."""

    overlay: Overlay
    store: ChrootStore
    uri: str

    def nix(self, *arguments: str | Path) -> str:
        name, *rest = arguments
        command = (name, "--store", self.uri, *rest) if name != "nix" else (name, *rest, "--store", self.uri)
        return self.store.nix.run(*command, within=self.overlay.enter).decode().strip()

    def build(self, seed: str) -> list[str]:
        options: list[str | Path] = [
            "--no-out-link",
            "-Q",
            "--arg",
            "tools",
            self.store.tools,
            "--argstr",
            "seed",
            seed,
        ]
        return self.nix("nix-build", CLOSURE, "-A", "everything", *options).split()


@pytest.fixture
def local_overlay(world: World, new_cidfs: Callable[[], Cidfs], tmp_path: Path) -> Iterator[LocalOverlay]:
    """Mount without a listed root, as an overlay wants it."""
    at = tmp_path.resolve()
    lower = at / "lower"
    (lower / "nix/var/nix/db").mkdir(parents=True)
    with (
        closing(sqlite3.connect(world.store.database)) as source,
        closing(sqlite3.connect(lower / "nix/var/nix/db/db.sqlite")) as copy,
    ):
        source.backup(copy)
        copy.execute("pragma journal_mode = delete")
    shutil.copy(world.store.database.with_name("schema"), lower / "nix/var/nix/db/schema")
    cidfs = new_cidfs()
    cidfs.run("import", "--all", "--from", world.store.root)
    with mounted(cidfs, lower / "nix/store") as mount, _overlay(mount, at / "overlay") as overlay:
        hook = at / "remount"
        hook.write_text('#!/bin/sh\nLIBMOUNT_FORCE_MOUNT2=always exec mount -o remount "$1"\n')
        hook.chmod(0o755)
        uri = (
            f"local-overlay://?root={overlay.at}/merged&lower-store={lower}%3Fread-only%3Dtrue"
            f"&upper-layer={overlay.at}/upper&remount-hook={hook}"
        )
        yield LocalOverlay(overlay, world.store, uri)


def test_nix_builds_verifies_and_collects_above_the_mount(world: World, local_overlay: LocalOverlay) -> None:
    nix, upper = local_overlay.nix, local_overlay.overlay.upper
    assert nix("nix", "path-info", world.top) == world.top
    assert nix("nix-store", "--query", "--requisites", world.top).split() == world.store.closure([world.top])
    assert local_overlay.build("1") == list(world.outputs)
    assert list(upper.iterdir()) == [], "what is below was built again"

    built = local_overlay.build("above")
    assert {path.rpartition("/")[2] for path in built} <= set(os.listdir(upper))
    nix("nix-store", "--verify", "--check-contents")

    (top,) = (path for path in built if path.endswith("-top-above"))
    nix("nix-store", "--delete", top)
    assert not os.path.lexists(upper / top.rpartition("/")[2])
    nix("nix-store", "--gc")
    assert [name for name in os.listdir(upper) if name != ".links"] == []
    assert local_overlay.overlay.whiteouts() == []
    assert nix("nix", "path-info", world.top) == world.top
