"""Every error that cidfs raises on purpose, with the errno and the exit code that it maps to.

Owns the two tables of the project: error to errno (what a program that reads through the mount gets) and
error to exit code (what a script that calls `cidfs` gets). Imports nothing of the project; safe everywhere.
"""

from __future__ import annotations

import errno


class CidfsError(Exception):
    """An expected failure. Its text is one line: what, which path, what to do."""


class FormatError(CidfsError):
    """Stored or received bytes are not what their format says; the text names what and where."""


class ProtocolError(FormatError):
    """A peer said what the protocol does not have; nothing more can be read from it."""


class RemoteRefused(CidfsError):
    """A peer answered with an error; the text is what it said."""


class ChunkMissing(CidfsError):
    """A chunk or a manifest is not stored here."""


class ChunkInvalid(CidfsError):
    """A stored chunk or manifest does not have the digest that it is stored under."""


class PathAbsent(CidfsError):
    """A store path is not published in this store, or has no such file inside."""


class StaleInode(CidfsError):
    """An inode number belongs to no publication of this store."""


class WrongType(CidfsError):
    """A node is not of the type that the operation needs."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class UsageError(CidfsError):
    """The command line or the settings say something that cannot be done."""


class StoreAbsent(CidfsError):
    """The state folder holds no store, or a part of it is gone."""


class StoreVersion(CidfsError):
    """The store was made by another version of cidfs than this one can use."""


class IndexLost(CidfsError):
    """The index is gone or damaged; packs and journal can say it all again (`cidfs rebuild`)."""


class LockTimeout(CidfsError):
    """Another process held a lock of the store until the deadline."""


class Conflict(CidfsError):
    """A store path is published with other contents; the first publication stays."""


class InUse(CidfsError):
    """A store path cannot be removed, for something needs it."""


class HashMismatch(CidfsError):
    """The contents that were read do not have the NAR hash that they should have."""


class NotTrusted(CidfsError):
    """No trusted key has signed what was offered from outside."""


class SourceError(CidfsError):
    """What is to be added cannot be read, or holds something that a store path cannot."""


class MountFailed(CidfsError):
    """The mount did not come up, or could not be taken down."""


class MountPointAbsent(MountFailed):
    """The mount point does not exist or is no directory."""


class MountPointBusy(MountFailed):
    """Something is mounted there already, or is still in use."""


class NotPermitted(CidfsError):
    """The operating system does not let this user do it."""


class DiskFailed(CidfsError):
    """Writing or syncing the store failed (full or broken disk)."""


class Damaged(CidfsError):
    """What is stored is not what was stored; `verify` has named it."""


class JournalLoss(CidfsError):
    """The journal lacks serials that it once held."""


class Unhealthy(CidfsError):
    """Something around a store is not as it must be; `doctor` has named it."""


EXIT_CODES: dict[type[CidfsError], int] = {
    CidfsError: 1,
    UsageError: 2,
    SourceError: 3,
    PathAbsent: 4,
    HashMismatch: 5,
    Conflict: 6,
    FormatError: 7,
    NotTrusted: 8,
    InUse: 9,
    StoreAbsent: 10,
    StoreVersion: 11,
    IndexLost: 12,
    LockTimeout: 13,
    NotPermitted: 14,
    DiskFailed: 15,
    Damaged: 16,
    JournalLoss: 17,
    ChunkMissing: 18,
    ChunkInvalid: 18,
    Unhealthy: 19,
    MountFailed: 20,
    MountPointAbsent: 21,
    MountPointBusy: 22,
}
"""Exit code of `cidfs` for each error; a subclass that is not listed has its parent's."""

_ERRNO: dict[type[CidfsError], int] = {
    PathAbsent: errno.ENOENT,
    StaleInode: errno.ESTALE,
}


def exit_code(error: BaseException) -> int:
    """Return the exit code of `cidfs` for an error (1 for what is not listed)."""
    for kind in type(error).__mro__:
        if kind in EXIT_CODES:
            return EXIT_CODES[kind]
    return 1


def errno_of(error: CidfsError) -> int:
    """Return the errno that a reader of the mount gets for an error; EIO for what is not listed."""
    if isinstance(error, WrongType):
        return error.code
    for kind in type(error).__mro__:
        if kind in _ERRNO:
            return _ERRNO[kind]
    return errno.EIO
