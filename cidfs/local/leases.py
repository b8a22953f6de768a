"""Leases: who is at work, and since which serial. A locked file in run/ each, which ends with its process.

Taken by who mounts or ingests, before the first look-up: what it may rely on is not collected.
Synchronous; safe in several threads and processes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cidfs.local.files import disk_errors, leads_to, try_flock, write_all

MOUNT: Final = "mount"
HOLDER: Final = "holder"  # of a mount's parent process, which reads nothing
INGEST: Final = "ingest"
UNKNOWN: Final = "unknown"  # of one that cannot be read: it may be anything


class LeaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a process at work says of itself in run/. serial is the next one at the time it began."""

    kind: str
    pid: int
    serial: int
    started: float
    mountpoint: str = ""
    transport: str = ""
    nix_socket: str = ""


class Lease:
    """A flocked file in run/ that says: I began at this serial. Ends with the process at the latest."""

    def __init__(self, path: Path, fd: int, info: LeaseInfo) -> None:
        self.path, self._fd, self.info = path, fd, info

    @property
    def socket_path(self) -> Path:
        """Where this process listens, if it does."""
        return self.path.with_suffix(".sock")

    def release(self) -> None:
        """End the lease."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            os.close(self._fd)
            self._fd = -1


def take(
    folder: Path, kind: str, serial: int, *, mountpoint: str = "", transport: str = "", nix_socket: str = ""
) -> Lease:
    """Say in run/ that this process is at work, since a serial. To be called before its first look-up."""
    info = LeaseInfo(
        kind=kind,
        pid=os.getpid(),
        serial=serial,
        started=time.time(),
        mountpoint=mountpoint,
        transport=transport,
        nix_socket=nix_socket,
    )
    while True:
        path = folder / f"{kind}-{os.getpid()}-{os.urandom(4).hex()}.lease"
        temporary = path.with_suffix(".new")
        with disk_errors(path, "write"):
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            if not (try_flock(fd) and leads_to(temporary, fd)):
                os.close(fd)  # a collection took it for a leftover before it was locked
                continue
            try:
                write_all(fd, msgspec.json.encode(info), 0)
                os.rename(temporary, path)
            except BaseException:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            break
    _drop_dead(folder)
    return Lease(path, fd, info)


def _drop_dead(folder: Path) -> None:
    """Take away what processes that were killed left: leases that nobody holds, and their sockets."""
    for path in folder.glob("*.lease"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if try_flock(fd, shared=True) and leads_to(path, fd):
                    path.with_suffix(".sock").unlink(missing_ok=True)
                    path.unlink()
            finally:
                os.close(fd)


def held(folder: Path) -> list[tuple[Path, LeaseInfo]]:
    """Return the leases whose holders live."""
    found = []
    for path in sorted(folder.glob("*.lease")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            if not try_flock(fd, shared=True) and leads_to(path, fd):
                try:
                    info = msgspec.json.decode(path.read_bytes(), type=LeaseInfo)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    info = LeaseInfo(kind=UNKNOWN, pid=0, serial=0, started=0)
                found.append((path, info))
        except FileNotFoundError:
            continue
        finally:
            os.close(fd)
    return found


def oldest_mount(found: Sequence[tuple[Path, LeaseInfo]]) -> int | None:
    """Return the serial since which the oldest running mount may know paths; None when there is none."""
    return min((info.serial for _, info in found if info.kind in (MOUNT, UNKNOWN)), default=None)


def at_work(found: Sequence[tuple[Path, LeaseInfo]]) -> set[Path]:
    """Return the leases of those who may rely on what they looked up until they end: all but mounts."""
    return {path for path, info in found if info.kind not in (MOUNT, HOLDER)}
