"""Stores in memory with few folders, as for the tests of the local floor; the recorder; small disks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.local.conftest import empty_store, room, root, small
from tests.local.support import copy_store
from tests.power.material import Material, make_material
from tests.power.runner import Runner, build, runner
from tests.system.support import umount

__all__ = ["empty_store", "room", "root", "small"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorder."""
    return build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="module")
def commands(library: Path) -> Iterator[Runner]:
    """A runner of command lines."""
    with runner(library) as here:
        yield here


@pytest.fixture(scope="module")
def material(commands: Runner, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """What to add and import."""
    folder = tmp_path_factory.mktemp("material")
    return make_material(folder, commands, copy_store(empty_store, folder / "state"))


PAGE = 4096


@dataclass
class SmallDisk:
    """A file system in memory of a few megabytes, and a file that fills it."""

    folder: Path

    def free(self) -> int:
        """Return how many bytes are free."""
        info = os.statvfs(self.folder)
        return info.f_bavail * info.f_frsize

    def fill(self, left: int = 0) -> None:
        """Leave just so many bytes free."""
        with open(self.folder / "filler", "ab") as file:
            more = (self.free() - left) // PAGE * PAGE
            if more > 0:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), more)
            elif more < 0:
                file.truncate(max(0, file.tell() + more))

    def empty(self) -> None:
        """Take the filler away."""
        (self.folder / "filler").unlink(missing_ok=True)


@pytest.fixture(params=["48m"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    """A small disk; only root may mount one."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield SmallDisk(folder)
    umount("-l", folder)  # what hangs and holds it must not keep it
