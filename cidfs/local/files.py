"""Small file operations that the rules of durability need, each in one place.

Synchronous; every failure of the disk becomes DiskFailed or NotPermitted with the path in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cidfs.errors import CidfsError, DiskFailed, NotPermitted

_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def mapped(error: OSError, path: Path | str, doing: str) -> CidfsError:
    """Return the error of ours for an OSError while doing something to a path."""
    if error.errno == errno.EROFS:
        return NotPermitted(f"{path}: cannot {doing}: the file system is mounted read-only")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(f"{path}: cannot {doing}: {error.strerror}; run as the owner of the store")
    if error.errno == errno.ENOSPC:
        return DiskFailed(f"{path}: cannot {doing}: the disk is full; free some space and try again")
    return DiskFailed(f"{path}: cannot {doing}: {error.strerror}")


@contextlib.contextmanager
def disk_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turn every OSError of a block into an error of ours."""
    try:
        yield
    except OSError as e:
        raise mapped(e, path, doing) from e


def allocate(fd: int, size: int) -> None:
    """Give the first bytes of a file disk space of their own; raise OSError as the system does.

    Not by posix_fallocate(3): where the file system cannot do it, that writes zeros, over what another
    process may just be writing. There, nothing is done.
    """
    try:
        _fallocate(fd, 0, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable."""
    with disk_errors(path, "sync the folder"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def punch(fd: int, offset: int, size: int) -> None:
    """Give the disk space of a part of a file back: it reads as zeros then.

    Raise OSError as the system does.
    """
    _fallocate(fd, _PUNCH_HOLE, offset, size)


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(size))
    while libc.fallocate64(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of data at an offset; raise OSError as the system does."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def replace_durably(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Give a file new contents: written under a temporary name, synced, renamed, its folder synced."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    with disk_errors(path, "write"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            try:
                offset = 0
                for piece in (data,) if isinstance(data, bytes) else data:
                    write_all(fd, piece, offset)
                    offset += len(piece)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    sync_folder(path.parent)


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Take a flock if nobody holds one that forbids it; say whether it was taken.

    Shared: to look whether another holds it, without being taken for a holder by the next who looks.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def leads_to(path: Path, fd: int) -> bool:
    """Say whether a name still leads to the file behind a descriptor."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
