"""What a real Nix is tried on: a store that was built and imported, its mount, and overlays on that.

Everything of a lab lies on a tmpfs of its own, which an upper layer can be on wherever the tests run.
"""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from urllib.parse import unquote

from tests.system.forks import Forks

from .real_nix import ChrootStore, Nix, one
from .tool import TIMEOUT, Cidfs, Mount, mount_points, mounted, wait_until

PATIENCE = 60.0
SLOW = "the daemon does not answer"  # in time: on a machine with much else to do


class ForkedCidfs(Cidfs):
    """A cidfs whose commands are forks, one after the other."""

    def __init__(self, state: Path, forks: Forks) -> None:
        super().__init__(state)
        self._forks = forks
        self._one_at_a_time = threading.Lock()

    def execute(
        self, arguments: tuple[str | bytes | Path, ...], stdin: bytes | None, cwd: Path | None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        assert cwd is None, "a fork is where it is"
        words = ["--state", str(self.state), *map(os.fsdecode, arguments)]
        with self._one_at_a_time:
            return self._forks.run(words, stdin or b"", TIMEOUT)


class OverlayStore(ChrootStore):
    """Nix's local-overlay store on a mount, by the store URI that `cidfs overlay` printed."""

    def __init__(self, nix: Nix, at: Path, uri: str) -> None:
        super().__init__(nix, at / "merged", uri)
        self.upper = at / "upper"

    def above(self, path: str) -> Path:
        """Return where a store path is in the upper layer, when it is there."""
        return self.upper / path.rpartition("/")[2]

    def is_above(self, path: str) -> bool:
        """Say whether anything is in a store path's place in the upper layer."""
        return os.path.lexists(self.above(path))

    def written(self) -> set[str]:
        """Return the names in the upper layer, apart from Nix's own `.links`."""
        return set(os.listdir(self.upper)) - {".links"}

    def whiteouts(self) -> list[Path]:
        return [path for path in self.upper.rglob("*") if stat.S_ISCHR(path.lstat().st_mode)]

    def collect(self) -> None:
        """Collect all garbage: three times, as Nix keeps some of what came to be below after it was built.

        It stops at what is referred to from below by what its own database has forgotten a moment before.
        """
        for _ in range(3):
            self.run("nix-store", "--gc")

    def hooked(self, record: Path) -> OverlayStore:
        """Return this store with a remount hook that also writes down what it is called with."""
        before, key, hook = self.address.partition("remount-hook=")
        hook = unquote(hook)
        assert os.access(hook, os.X_OK), f"no hook in {self.address}"
        wrapper = record.with_suffix(".hook")
        wrapper.write_text(f'#!/bin/sh\necho "$@" >> {record}\nexec "{hook}" "$@"\n')
        wrapper.chmod(0o755)
        record.touch()
        other = copy(self)
        other.address = f"{before}{key}{wrapper}"
        return other


@dataclass(frozen=True)
class Lab:
    """A Nix, a chroot store that it built, and a mount that shows all paths of it.

    What tests add stays: each has its own seeds. Nobody removes anything from the mount or takes it down.
    """

    nix: Nix
    store: ChrootStore
    cidfs: Cidfs
    mount: Mount
    outputs: tuple[str, ...]
    ca_outputs: tuple[str, ...]
    at: Path
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def socket(self) -> Path:
        return self.cidfs.state / "nix.sock"

    def output(self, name: str) -> str:
        """Return the path of an output of `everything` that was built with the seed 1."""
        return one(self.outputs, f"-{name}-1")

    @property
    def remote(self) -> str:
        """Return the store URI of the socket alone, for which Nix reads the files in the mount."""
        return f"unix://{self.socket}?real={self.mount.at}"

    def is_shown(self, path: str) -> bool:
        """Say whether the mount has a store path."""
        return os.path.lexists(self.mount.path(path))

    def import_(self, *paths: str) -> None:
        """Import paths of the chroot store with their closures, and wait until Nix may rely on them."""
        self.cidfs.run("import", "--from", self.store.root, *paths)
        self._await_valid(*paths)

    def add(self, source: Path) -> str:
        """Add a file to what is below, wait until Nix may rely on it, and return its path."""
        (path,) = self.cidfs.run("add", source).lines
        self._await_valid(path)
        return path

    def _await_valid(self, *paths: str) -> None:
        command = ["nix", "path-info", "--store", self.remote, *paths]
        wait_until("the new paths are valid", lambda: self.nix.attempt(*command).returncode == 0, PATIENCE)

    @contextmanager
    def overlay(self) -> Iterator[OverlayStore]:
        """Mount an overlay with an empty upper layer, and a Nix store with an empty database on it."""
        at = self.at / f"overlay-{next(self._numbers)}"
        with overlay_on(self.mount, at) as uri:
            yield OverlayStore(self.nix, at, uri)


@contextmanager
def overlay_on(mount: Mount, at: Path) -> Iterator[str]:
    """Mount an overlay at AT/merged/nix/store with its upper layer in AT/upper, and give its store URI."""
    merged = at / "merged" / "nix" / "store"
    merged.mkdir(parents=True)
    layers = ("--upper", at / "upper", "--work", at / "work")
    done = mount.cidfs.run("overlay", merged, *layers, "--mount", mount.at)
    try:
        (uri,) = done.lines
        yield uri
    finally:
        mount.cidfs.run("umount", merged)
    assert mount_points(at) == []


@contextmanager
def ground_at(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs; nothing may be left on it in the end.

    Its mounts are shared: each Nix takes a copy of all mounts, which would keep what is unmounted here going.
    """
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "--make-shared", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        # the last process of a mount gives its lease back a moment before it has ended
        umount = partial(subprocess.run, ["umount", folder], capture_output=True, check=False)
        wait_until(f"{folder} is unmounted", lambda: umount().returncode == 0, PATIENCE)


@contextmanager
def lab_in(at: Path, nix: Nix, forks: Forks) -> Iterator[Lab]:
    """Build, import and mount in a folder; all is taken down afterwards, and no daemon may have logged."""
    with ground_at(at / "ground") as ground:
        store = ChrootStore(nix, ground / "root")
        outputs = store.build("everything")
        ca_outputs = store.build("everything", seed="ca", ca=True)
        cidfs = ForkedCidfs(ground / "state", forks)
        cidfs.run("import", "--all", "--from", store.root)
        with mounted(cidfs, ground / "mnt") as mount:
            yield Lab(nix, store, cidfs, mount, tuple(outputs), tuple(ca_outputs), ground)
        assert_quiet(cidfs)


def assert_quiet(cidfs: Cidfs) -> None:
    """Fail when a daemon has logged anything but that it was slow."""
    logs = (cidfs.state / "run").glob("*.log")
    logged = [line for log in logs for line in log.read_text().splitlines() if SLOW not in line]
    assert logged == [], "a daemon has logged something"
