"""The socket that Nix connects to, on disk: made for everybody, locked, and taken away in the end.

A lock beside it says whose it is; processes forked afterwards hold it too, so that it is free when the last
of them has gone. A socket that was left by killed processes is replaced, and nothing else is. Synchronous;
waits for nobody.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from cidfs.control import SocketAddress
from cidfs.errors import MountFailed, MountPointBusy
from cidfs.local.files import try_flock

BACKLOG: Final = 512


class NixListener:
    """A listening socket, and its place."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o111)  # whoever reaches it may connect: everything is only read
        try:
            with SocketAddress(path) as address:
                self.socket.bind(address)
            self.socket.listen(BACKLOG)
        except OSError:
            self.socket.close()
            raise
        finally:
            os.umask(before)

    @classmethod
    def open(cls, path: Path) -> NixListener | None:
        """Listen at a path; None where another mount does.

        Raise MountPointBusy where something else is, MountFailed where it cannot be.
        """
        lock = -1
        try:
            lock = _lock_beside(path)
            if lock < 0:
                return None
            _take_away_stale(path)
            return cls(path, lock)
        except BaseException as e:
            if lock >= 0:
                _unlock(path, lock)
            if isinstance(e, OSError):
                raise MountFailed(
                    f"{path}: cannot listen there: {e.strerror or e}; choose another --nix-socket"
                ) from e
            raise

    def close(self) -> None:
        """Take it away: nobody is answered any more."""
        self.socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        _unlock(self.path, self._lock)


def _lock_name(path: Path) -> str:
    return f"{path}.lock"


def _lock_beside(path: Path) -> int:
    """Return a descriptor of a socket's lock file, locked; -1 where another process has it."""
    name = _lock_name(path)
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_flock(fd):
            os.close(fd)
            return -1
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(name)):
                return fd
        os.close(fd)  # who had it before took the file away


def _unlock(path: Path, lock: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(_lock_name(path))
    os.close(lock)


def _take_away_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise MountPointBusy(f"{path}: what is there is no socket; choose another --nix-socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            with SocketAddress(path) as address:
                probe.connect(address)
        except ConnectionRefusedError:  # by nobody
            os.unlink(path)
            return
        except OSError:
            pass  # somebody is there, and is busy or of another kind
    raise MountPointBusy(f"{path}: another process listens there; choose another --nix-socket")
