"""A tree with everything awkward in it, added and mounted once; folders and programs for ordinary users."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import Store, store_in, unmount_left_over
from tests.system.person import Person, make_person
from tests.system.support import Node, awkward_tree, describe, running


@dataclass(frozen=True)
class Mounted:
    """A store with one path that is mounted; nobody adds to it or unmounts it."""

    store: Store
    source: Path
    name: str
    mountpoint: Path
    nodes: dict[bytes, Node]

    @property
    def path(self) -> Path:
        """The store path in the mount."""
        return self.mountpoint / self.name


@pytest.fixture(scope="session")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """The awkward tree, added and mounted with a root that cannot be listed."""
    folder = tmp_path_factory.mktemp("awkward")
    source = awkward_tree(folder / "awkward")
    (folder / "mnt").mkdir()
    with store_in(folder) as store:
        (name,) = store.add(source)
        store.mount(folder / "mnt")
        yield Mounted(store, source, name, folder / "mnt", describe(source))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are for their owner alone."""
    folder = Path(tempfile.mkdtemp(prefix="cidfs-public-"))
    folder.chmod(0o755)
    yield folder
    left = running(folder)
    unmount_left_over(folder)
    shutil.rmtree(folder)
    assert not left, f"processes still run: {left}"


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A folder for what an ordinary user runs where the test run's own Python is out of his reach."""
    folder = Path(tempfile.mkdtemp(prefix="cidfs-programs-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def person(public: Path, programs: Path) -> Person:
    """An ordinary user with a home of his own."""
    return make_person(public, programs)


@pytest.fixture
def fuse_for_all() -> Iterator[None]:
    """Let every user open /dev/fuse, as udev does where it runs; a container's may be for root alone."""
    device = Path("/dev/fuse")
    with open(Path(tempfile.gettempdir()) / "cidfs-dev-fuse.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the test runs of other processes change it too
        mode = stat.S_IMODE(device.stat().st_mode)
        if mode & 0o006 == 0o006 or os.geteuid() != 0:
            yield
            return
        device.chmod(mode | 0o666)
        yield
        device.chmod(mode)


@pytest.fixture
def root() -> None:
    """Let only root run a test."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
