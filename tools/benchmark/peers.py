"""The peers: how each takes the corpus in, and how it is mounted. cidfs is one of them.

A peer keeps all its files below one folder. Commands have deadlines (machine.run); a mount is known by its
process or by its name, and `unmount` always takes it away. Nothing here measures.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from benchmark import machine
from benchmark.corpus import Release
from benchmark.machine import BenchError, Usage, run

LONG: Final = 900.0
MOUNT_SECONDS: Final = 60.0
CIDFS: Final = [sys.executable, "-m", "cidfs"]


class Peer:
    """One way to keep the corpus. Subclasses say what differs."""

    name: ClassVar[str]
    program: ClassVar[str] = ""
    mounts: ClassVar[bool] = False
    mount_note: ClassVar[str] = ""
    repeat: ClassVar[bool] = True
    """Whether taking in is measured in every round."""
    share: ClassVar[float] = 1.0
    """How much of the lists is walked and read, where all of it would take too long."""

    def __init__(self, folder: Path, releases: Sequence[Release]) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.point = folder / "mnt"
        self.releases = releases
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Raise BenchError where this peer cannot be."""
        if self.program and shutil.which(self.program) is None:
            raise BenchError(f"{self.program} is not installed")

    def version(self) -> str:
        """Return what the program calls itself."""
        words = {"mksquashfs": ["mksquashfs", "-version"]}
        done = subprocess.run(
            words.get(self.program, [self.program, "--version"]), capture_output=True, text=True, timeout=30
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        return lines[0].strip() if lines else "unknown"

    def prepare(self) -> None:
        """Make an empty store; not measured."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir(parents=True)

    def ingest(self) -> Usage | None:
        """Take in all releases, until they are on the disk; None where that was measured for another peer."""
        raise NotImplementedError

    def finish(self) -> None:
        """Do what mounting needs beside; not measured."""

    def size(self) -> tuple[int, int]:
        """Return the bytes of the store: as listed, and as the disk has them."""
        return machine.sizes(self.store)

    def names(self) -> list[str]:
        """Return each release's folder in the mount, in the order of the releases."""
        return [release.name for release in self.releases]

    @property
    def base(self) -> Path:
        """The folder below which `names` are."""
        return self.point

    def mount(self) -> float:
        """Mount, until a release can be seen; return the seconds."""
        self.point.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        self._mount()
        first = self.point / self.names()[0]
        while not machine.is_mounted(self.point):
            self._check_alive(began)
            time.sleep(0.001)
        while subprocess.run(["stat", first], capture_output=True, timeout=MOUNT_SECONDS).returncode:
            self._check_alive(began)
            time.sleep(0.001)
        return time.monotonic() - began

    def _check_alive(self, began: float) -> None:
        if self.process is not None and self.process.poll() is not None:
            lines = (self.folder / "mount.log").read_text(errors="replace").strip().splitlines()
            raise BenchError(f"{self.name}: the mount ended: {lines[-1] if lines else 'no message'}")
        if time.monotonic() - began > MOUNT_SECONDS:
            raise BenchError(f"{self.name}: not mounted after {MOUNT_SECONDS:.0f} s")

    def _mount(self) -> None:
        raise NotImplementedError

    def _serve(self, command: Sequence[str | Path]) -> None:
        self.process = machine.start(command, self.folder / "mount.log", self.environment)

    def unmount(self) -> None:
        """Take the mount away and end its process."""
        if machine.is_mounted(self.point):
            root = os.geteuid() == 0
            ways = [["umount"], ["umount", "-l"]] if root else [["fusermount3", "-u"], ["fusermount3", "-uz"]]
            for way in ways:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run([*way, self.point], capture_output=True, timeout=20)
                if not machine.is_mounted(self.point):
                    break
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            machine.end(self.process)
            self.process = None

    def _synced(self, command: Sequence[str | Path], cwd: Path | None = None) -> Usage:
        """Run a command, and then what puts the store on the disk: not all programs do."""
        text = f"{shlex.join(str(word) for word in command)} && sync -f {shlex.quote(str(self.store))}"
        return run(["sh", "-c", text], LONG, env=self.environment, cwd=cwd)

    @property
    def _paths(self) -> list[Path]:
        return [release.path for release in self.releases]

    @property
    def _corpus(self) -> Path:
        return self.releases[0].path.parent


class Ext4(Peer):
    """A plain copy on the machine's disk, whatever file system that is."""

    name = "ext4"
    program = "cp"
    mounts = True

    def ingest(self) -> Usage:
        return self._synced(["cp", "-a", *self._paths, self.store])

    @property
    def base(self) -> Path:
        return self.store

    def mount(self) -> float:
        return 0.0

    def unmount(self) -> None:
        pass


class Squashfs(Peer):
    """The kernel's squashfs with zstd, at the level of the others: its own, 15, takes ten times as long."""

    name = "squashfs"
    program = "mksquashfs"
    mounts = True
    repeat = False

    def check(self) -> None:
        super().check()
        if os.geteuid():
            raise BenchError("only root can mount the kernel's squashfs")

    @property
    def image(self) -> Path:
        return self.store / "image.squashfs"

    def ingest(self) -> Usage | None:
        options = ["-comp", "zstd", "-Xcompression-level", "3", "-noappend", "-quiet", "-no-progress"]
        if len(self._paths) == 1:
            options.append("-keep-as-directory")
        return self._synced(["mksquashfs", *self._paths, self.image, *options])

    def _mount(self) -> None:
        run(["mount", "-t", "squashfs", "-o", "loop,ro", self.image, self.point], MOUNT_SECONDS)


class Squashfuse(Squashfs):
    """The same image through FUSE, in C."""

    name = "squashfuse_ll"
    program = "squashfuse_ll"

    def check(self) -> None:
        Peer.check(self)
        if shutil.which("mksquashfs") is None:
            raise BenchError("mksquashfs is not installed")

    def version(self) -> str:
        # it has no option for that; its help begins with it
        done = subprocess.run(["squashfuse_ll"], capture_output=True, text=True, timeout=30)
        return (done.stdout + done.stderr).strip().partition("\n")[0] or "unknown"

    @property
    def image(self) -> Path:
        theirs = self.folder.with_name(Squashfs.name) / "store" / "image.squashfs"
        return theirs if theirs.exists() else super().image

    def prepare(self) -> None:
        super().prepare()
        if self.image.exists():
            (self.store / "image.squashfs").hardlink_to(self.image)

    def ingest(self) -> Usage | None:
        return None if self.image.exists() else super().ingest()

    def _mount(self) -> None:
        self._serve(["squashfuse_ll", "-f", self.image, self.point])


class Casync(Peer):
    """One index for each release into one store, as it is used; one of all of them for the mount."""

    name = "casync"
    program = "casync"
    mounts = True
    share = 0.05  # it walks 800 entries a second

    def ingest(self) -> Usage:
        make = f"casync make --store={shlex.quote(str(self.store / 'chunks.castr'))}"
        script = "\n".join(
            f"{make} {shlex.quote(str(self.store / path.name))}.caidx {shlex.quote(str(path))} || exit"
            for path in self._paths
        )
        return self._synced(["sh", "-c", script])

    def finish(self) -> None:
        together = self.folder / "together"
        shutil.rmtree(together, ignore_errors=True)
        together.mkdir()
        for release in self.releases:
            run(["cp", "-al", release.path, together / release.name], LONG)
        store = f"--store={self.store / 'chunks.castr'}"
        run(["casync", "make", store, self.folder / "all.caidx", together], LONG)

    def _mount(self) -> None:
        store = f"--store={self.store / 'chunks.castr'}"
        self._serve(["casync", "mount", store, self.folder / "all.caidx", self.point])


class Restic(Peer):
    """One backup of all releases, with restic's own compression."""

    name = "restic"
    program = "restic"
    mount_note = "not mounted: its mount is for looking into backups before restoring them"

    def __init__(self, folder: Path, releases: Sequence[Release]) -> None:
        super().__init__(folder, releases)
        self.environment = {"RESTIC_PASSWORD": "none", "RESTIC_CACHE_DIR": str(folder / "cache")}

    def version(self) -> str:
        return run(["restic", "version"], 30).output.splitlines()[0]

    def prepare(self) -> None:
        super().prepare()
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        run(["restic", "-q", "-r", self.store, "init"], 60, env=self.environment)

    def ingest(self) -> Usage:
        words = [path.name for path in self._paths]
        return self._synced(["restic", "-q", "-r", self.store, "backup", *words], cwd=self._corpus)


class Borg(Peer):
    """One archive of all releases, zstd level 3, not encrypted."""

    name = "borg"
    program = "borg"
    mount_note = "not mounted: its mount is for looking into backups before restoring them"

    def __init__(self, folder: Path, releases: Sequence[Release]) -> None:
        super().__init__(folder, releases)
        self.environment = {"BORG_BASE_DIR": str(folder / "base"), "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}

    def prepare(self) -> None:
        super().prepare()
        shutil.rmtree(self.folder / "base", ignore_errors=True)
        run(["borg", "init", "-e", "none", self.store], 60, env=self.environment)

    def ingest(self) -> Usage:
        words = [path.name for path in self._paths]
        archive = f"{self.store}::all"
        return self._synced(["borg", "create", "-C", "zstd,3", archive, *words], cwd=self._corpus)


class Cidfs(Peer):
    """cidfs, from this checkout."""

    name = "cidfs"
    mounts = True

    def __init__(self, folder: Path, releases: Sequence[Release]) -> None:
        super().__init__(folder, releases)
        self._names: list[str] = []

    def version(self) -> str:
        return "cidfs " + run([*CIDFS, "--version"], 30).output.strip().removeprefix("cidfs ")

    def command(self, *words: str | Path) -> list[str | Path]:
        """Return a command line of cidfs on this store."""
        return [*CIDFS, "--state", self.store, *words]

    def prepare(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def ingest(self) -> Usage:
        # its messages, too, are in what `run` gives back
        usage = self._synced(self.command("add", *self._paths))
        found = re.findall(r"^/nix/store/([0-9a-z]{32}-\S+)$", usage.output, re.MULTILINE)
        if len(found) != len(self.releases):
            raise BenchError(f"cidfs add: {len(found)} store paths for {len(self.releases)} releases")
        self._names = found
        return usage

    def size(self) -> tuple[int, int]:
        return machine.sizes(self.store, without=["run"])

    def names(self) -> list[str]:
        return self._names

    def use(self, names: Sequence[str]) -> None:
        """Take a store that is there already, with these paths."""
        self._names = list(names)

    def _mount(self) -> None:
        self._serve(self.command("mount", self.point, "--foreground"))

    def unmount(self) -> None:
        if self.process is not None and machine.is_mounted(self.point):
            with contextlib.suppress(BenchError):
                run(self.command("umount", self.point), 30)
        super().unmount()


ALL: Final[list[type[Peer]]] = [Cidfs, Ext4, Squashfs, Squashfuse, Casync, Restic, Borg]
