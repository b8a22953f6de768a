"""What processes that were killed left behind, and nobody will ever look at again.

Found by names and by locks that nobody holds. Synchronous; removing happens under the write lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cidfs.errors import IndexLost
from cidfs.local.files import leads_to, try_flock
from cidfs.local.leases import HOLDER
from cidfs.local.state import NIX_LOCK, NIX_SOCKET, PACK_KINDS, StateFolder

_TEMPORARY = re.compile(r".+\.tmp-\d+-[0-9a-f]+")


def leftovers(state: StateFolder) -> Iterator[Path]:
    """Yield files and folders that are of no use any more.

    Files that are to replace others are made under the write lock alone: where that is held, each one that is
    there was left behind. New packs and rebuilds hold locks of their own.
    """
    for folder in (state.root, state.root / "journal", state.root / "index"):
        yield from (folder / name for name in sorted(_names(folder)) if _TEMPORARY.fullmatch(name))
    yield from _indexes(state)
    for kind in PACK_KINDS:
        for folder in sorted((state.root / "packs" / kind).glob("*")):
            names = _names(folder)
            for name in sorted(names):
                path = folder / name
                gone = name.endswith(".bad") and name.removesuffix(".bad") not in names
                if gone or (name.endswith(".new") and _is_unheld(path)):
                    yield path
    yield from _runs(state.root / "run")
    if _is_unheld(state.root / NIX_LOCK):
        yield from (path for name in (NIX_SOCKET, NIX_LOCK) if os.path.lexists(path := state.root / name))


def drop(path: Path) -> None:
    """Take a leftover away, unless somebody has locked it since: its lock is held until it is gone."""
    with contextlib.suppress(OSError):
        if path.name == NIX_SOCKET:
            _drop_nix_socket(path)
            return
        if path.suffix == ".sock":
            path.unlink()
            return
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if try_flock(fd) and leads_to(path, fd):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        finally:
            os.close(fd)


def _drop_nix_socket(path: Path) -> None:
    """Take the socket for Nix away under the lock that its owner would hold."""
    lock = path.with_name(NIX_LOCK)
    fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if try_flock(fd) and leads_to(lock, fd):
            path.unlink()
    finally:
        os.close(fd)


def size_of(path: Path) -> int:
    """Return the bytes on disk of a file or of all files in a folder."""
    total = 0
    with contextlib.suppress(OSError):
        total += path.lstat().st_blocks * 512
        if path.is_dir():
            total += sum(size_of(child) for child in path.iterdir())
    return total


def _indexes(state: StateFolder) -> Iterator[Path]:
    folder = state.root / "index"
    try:
        current = str(state.current_index())
    except IndexLost:
        return
    for name in sorted(_names(folder)):
        path = folder / name
        if (name.isdigit() and name != current) or (name.startswith("rebuild-") and _is_unheld(path)):
            yield path


def _runs(folder: Path) -> Iterator[Path]:
    """Yield what dead processes left in run/: leases that nobody holds, their sockets, empty logs."""
    names = _names(folder)
    held = {n for n in names if n.endswith(".lease") and not _is_unheld(folder / n)}
    for name in sorted(names):
        path = folder / name
        stem = name.rpartition(".")[0]
        if name.endswith((".lease", ".new")):
            dead = name not in held and _is_unheld(path)
        elif name.endswith(".sock"):
            dead = f"{stem}.lease" not in held
        else:
            # a log is named by the parent of a mount, as the lease that stays as long as one of its processes
            alive = any(lease.startswith(f"{HOLDER}-{stem.removeprefix('mount-')}-") for lease in held)
            dead = name.endswith(".log") and not alive and _is_empty(path)
        if dead:
            yield path


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _is_unheld(path: Path) -> bool:
    """Say whether nobody holds a file's lock, or a folder's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return try_flock(fd, shared=True) and leads_to(path, fd)
    finally:
        os.close(fd)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False
