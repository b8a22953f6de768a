"""Room on a disk that is full: the ballast, a file that is given up so that removing can begin.

LMDB writes new pages even to delete, so without it a full disk could not be freed. Only what makes room may
let it go. Synchronous; the functions are safe in several processes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

BALLAST: Final = 2 << 20
LEAST: Final = 256 << 10  # less would be of no use
NAME: Final = "ballast"
LOW: Final = 8 << 20  # with less than this free, transactions are kept small


def free_bytes(root: Path) -> int:
    """Return how many bytes an ordinary user can still write to the disk of a folder."""
    info = os.statvfs(root)
    return info.f_bavail * info.f_frsize


def is_low(root: Path) -> bool:
    """Say whether the disk is full, or nearly so."""
    return free_bytes(root) < LOW


def release(root: Path) -> bool:
    """Give the ballast up; say whether there was one."""
    try:
        os.unlink(root / NAME)
    except OSError:
        return False
    return True


def restore(root: Path) -> None:
    """Set the ballast aside, or as much of it as half of the room that is left can take."""
    path = root / NAME
    with contextlib.suppress(OSError):  # it is a precaution: without room for it, all else goes on
        there = path.stat().st_size if path.exists() else 0
        size = there + min(BALLAST - there, free_bytes(root) // 2)
        if size <= there or size < LEAST:
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.ftruncate(fd, there)
        finally:
            os.close(fd)
