"""A small mounted store with an overlay above it, and connections to its socket; without a Nix.

Store paths are published by this process; daemon and metadata process are others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cidfs.local.store import LocalStore
from cidfs.nix.client import Connection
from tests.commands import Store, wait_until
from tests.local.support import package, path_of, publish
from tests.system.forks import Forks, forked_store_in

PATIENCE = 60.0
STORE_DIR = "/nix/store"


def full(name: str) -> str:
    """Return the absolute store path that is meant by a name."""
    return f"{STORE_DIR}/{path_of(name).base_name}"


@dataclass(frozen=True)
class Ground:
    """A mounted store with an overlay above it, and a writer in this process."""

    store: Store
    writer: LocalStore
    folder: Path
    names: Iterator[int]

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    @property
    def merged(self) -> Path:
        return self.folder / "merged/nix/store"

    def at(self, name: str) -> Path:
        """Return where a path is in the overlay."""
        return self.merged / path_of(name).base_name

    def above(self, name: str) -> Path:
        """Return where a path would be in the upper."""
        return self.upper / path_of(name).base_name

    def new(self, name: str = "p") -> str:
        """Return a name that was not used before."""
        return f"{name}-{next(self.names)}"

    def publish(self, name: str, *references: str, deriver: str = "") -> str:
        """Publish a path in which its name stands."""
        deriver = path_of(deriver).base_name if deriver else ""
        publish(self.writer, package(name, references=references, deriver=deriver))
        return name

    def connect(self) -> Told:
        return Told(self.store.state / "nix.sock")

    def mount_overlay(self) -> None:
        self.store.run("overlay", self.merged, "--upper", self.upper, "--work", self.folder / "work")

    def is_seen(self, name: str) -> bool:
        """Say whether a path is in the overlay, with what it should hold."""
        try:
            return (self.at(name) / "name").read_text() == name
        except FileNotFoundError:
            return False

    def is_valid(self, *names: str) -> bool:
        """Say whether all of some paths are valid on a new connection."""
        with self.connect() as connection:
            return all(connection.is_valid(name) for name in names)

    def await_valid(self, *names: str) -> None:
        """Wait until a new connection counts paths as valid; they must be seen then.

        A daemon that has no time is waited for on another connection: what was absent stays so.
        """
        wait_until(lambda: self.is_valid(*names), PATIENCE, f"{names} are valid")
        assert [name for name in names if not self.is_seen(name)] == []

    def is_whited_out(self, name: str) -> bool:
        try:
            info = os.lstat(self.above(name))
        except FileNotFoundError:
            return False
        return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0

    def white_out(self, name: str) -> None:
        os.mknod(self.above(name), stat.S_IFCHR, 0)

    def await_unveiled(self, *names: str) -> None:
        """Wait until nothing hides paths any more."""
        for name in names:
            wait_until(lambda name=name: not self.is_whited_out(name), PATIENCE, f"{name} is not hidden")
            wait_until(lambda name=name: self.is_seen(name), PATIENCE, f"{name} is seen")


class Told:
    """A connection that is asked by the names that tests give to paths."""

    def __init__(self, socket: Path) -> None:
        self.connection = Connection(socket, PATIENCE)

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def close(self) -> None:
        self.connection.close()

    def is_valid(self, name: str) -> bool:
        return self.connection.is_valid(full(name))

    def which(self, *names: str) -> list[str]:
        """Return which of some names are valid, asked in one request."""
        found = set(self.connection.valid_paths(map(full, names)))
        return [name for name in names if full(name) in found]

    def hears_of(self, *names: str) -> list[str]:
        """Return which of some names are told of, in whatever way that can be asked."""
        everything = set(self.connection.all_valid_paths())
        heard = set(self.which(*names))
        for name in names:
            info = self.connection.path_info(full(name))
            by_hash = self.connection.path_from_hash_part(path_of(name).hash_part)
            assert by_hash in ("", full(name))
            answers = [self.is_valid(name), info is not None, by_hash != "", full(name) in everything]
            assert answers == [name in heard] * 4, f"{name}: {answers}"
        return sorted(heard)


@contextlib.contextmanager
def ground_in(folder: Path, forks: Forks) -> Iterator[Ground]:
    """All of it, on a tmpfs of its own; whatever happens, all that is mounted is taken down.

    An upper layer can be on a tmpfs wherever the tests run. The daemons may complain.
    """
    place = folder / "ground"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        with forked_store_in(place, forks) as store:
            (place / "mnt").mkdir()
            (place / "merged/nix/store").mkdir(parents=True)
            store.mount(place / "mnt")
            store.log_expected = True
            with LocalStore.open(store.state, write=True) as writer:
                ground = Ground(store, writer, place, itertools.count())
                ground.mount_overlay()
                try:
                    yield ground
                finally:
                    store.run("umount", "--lazy", ground.merged)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
