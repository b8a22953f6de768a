"""The pyfuse3 transport: libfuse requests in, StoreView's answers out.

Thin: what the file system is stands in StoreView. Every handler is wrapped, for an exception that left one
would end the mount: errors of ours go through the errno table, all others are logged and EIO. A Miss is run
on a thread and the question asked again. pyfuse3 keeps its session in globals: one mount a process.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FUSEError,
    InodeT,
    ReaddirToken,
    StatvfsData,
)

from cidfs.errors import CidfsError, PathAbsent, errno_of
from cidfs.mount.metrics import Latencies
from cidfs.mount.transport import polling
from cidfs.mount.view import ROOT, Attributes, Miss, StoreView

log = logging.getLogger(__name__)

FOREVER: Final = 86400 * 365
MAX_MISSES: Final = 8  # threads that load what is not in memory; far below max_tasks, so that hits go on
MAX_TASKS: Final = 99
GONE: Final = "fuse_reply_* failed with No such file or directory"
KINDS: Final = ("lookup", "getattr", "readlink", "open", "read", "opendir", "readdir", "statfs")

P = ParamSpec("P")
T = TypeVar("T")


def _guarded(
    kind: str,
) -> Callable[
    [Callable[Concatenate[Pyfuse3Transport, P], T]],
    Callable[Concatenate[Pyfuse3Transport, P], Coroutine[Any, Any, T]],
]:
    """Make a handler of a synchronous method: Miss, errors, and counting."""

    def wrap(
        method: Callable[Concatenate[Pyfuse3Transport, P], T],
    ) -> Callable[Concatenate[Pyfuse3Transport, P], Coroutine[Any, Any, T]]:
        async def handle(self: Pyfuse3Transport, /, *args: P.args, **kwargs: P.kwargs) -> T:
            start = time.perf_counter_ns()
            latencies = self.latencies[kind]
            try:
                while True:
                    try:
                        return method(self, *args, **kwargs)
                    except Miss as miss:
                        await trio.to_thread.run_sync(miss.job, limiter=self.misses)
            except PathAbsent:
                raise FUSEError(errno.ENOENT) from None
            except CidfsError as e:
                latencies.errors += 1
                code = errno_of(e)
                if code == errno.EIO:
                    log.error("%s: %s", kind, e)
                raise FUSEError(code) from None
            except Exception:
                latencies.errors += 1
                log.exception("%s failed in a way that was not foreseen", kind)
                raise FUSEError(errno.EIO) from None
            finally:
                latencies.record(time.perf_counter_ns() - start)

        return handle

    return wrap


def _matters(entry: logging.LogRecord) -> bool:
    """Whether what pyfuse3 logs is worth a line: not that a request had gone before it was answered."""
    return GONE not in entry.getMessage()


class Pyfuse3Transport(pyfuse3.Operations):
    """A StoreView as pyfuse3 wants it."""

    enable_writeback_cache = False

    def __init__(self, view: StoreView) -> None:
        super().__init__()
        logging.getLogger("pyfuse3").addFilter(_matters)  # an interrupted one, or one of a mount that ended
        self.view = view
        self.latencies = {kind: Latencies() for kind in KINDS}
        self.misses = trio.CapacityLimiter(MAX_MISSES)
        self.answering = trio.Event()  # the kernel's first message was answered

    def mount(self, mountpoint: str, options: set[str]) -> None:
        """Mount; raise RuntimeError as pyfuse3 does. Before trio runs, and before any thread starts."""
        pyfuse3.init(self, mountpoint, set(pyfuse3.default_options) | options)

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted or stop() is called."""
        polling.install()
        try:
            await pyfuse3.main(max_tasks=MAX_TASKS)
        except* ConnectionAbortedError:
            # After the end the kernel answers ENODEV, which libfuse knows; but ECONNABORTED to who was just
            # taking a request then (the RELEASE of the last file, say). Libfuse writes a line about it.
            log.info("unmounted while a request was being read")

    def stop(self) -> None:
        """Make serve() return soon."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Give the session back, without unmounting: that is the mount session's business."""
        pyfuse3.close(unmount=False)

    async def forget_names(self, names: Sequence[bytes]) -> None:
        """Let the kernel forget names in the root; who has one of them open keeps what it has.

        On a thread: a request that waits for this loop may hold what the kernel needs for it.
        """

        def forget() -> None:
            for name in names:
                try:
                    pyfuse3.invalidate_entry(InodeT(ROOT), FileNameT(name))
                except OSError as e:
                    if e.errno != errno.ENOENT:  # it knew nothing of it
                        log.warning("a name cannot be taken out of the kernel's memory: %s", e)

        await trio.to_thread.run_sync(forget, abandon_on_cancel=True)

    def init(self) -> None:
        """Take INIT; the library answers it before any task runs that waits for the event."""
        self.answering.set()

    # --- requests; a file handle is the inode number, for read and readdir are not told it

    @_guarded("lookup")
    def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: object = None) -> EntryAttributes:
        """Answer LOOKUP. Absence is not cached: names may be published at any time."""
        return _entry(self.view.lookup(parent_inode, name))

    @_guarded("getattr")
    def getattr(self, inode: InodeT, ctx: object = None) -> EntryAttributes:
        """Answer GETATTR."""
        return _entry(self.view.attributes(inode))

    @_guarded("readlink")
    def readlink(self, inode: InodeT, ctx: object = None) -> FileNameT:
        """Answer READLINK."""
        return self.view.target(inode)

    @_guarded("opendir")
    def opendir(self, inode: InodeT, ctx: object = None) -> FileHandleT:
        """Answer OPENDIR."""
        self.view.check_directory(inode)
        return inode

    @_guarded("readdir")
    def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Answer READDIRPLUS."""
        for entry in self.view.listing(fh, start_id):
            if not pyfuse3.readdir_reply(token, entry.name, _entry(entry.attributes), entry.next):
                break

    @_guarded("open")
    def open(self, inode: InodeT, flags: int, ctx: object = None) -> FileInfo:
        """Answer OPEN; the page cache is kept, for contents never change."""
        self.view.open(inode)
        return FileInfo(fh=inode, keep_cache=True)

    @_guarded("read")
    def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Answer READ."""
        pieces = self.view.read(fh, off, size)
        return cast(bytes, pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    @_guarded("statfs")
    def statfs(self, ctx: object = None) -> StatvfsData:
        """Answer STATFS: what the store holds, and that nothing can be written."""
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_namemax = 255
        answer.f_files = self.view.node_limit
        return answer

    async def forget(self, inode_list: object) -> None:
        """Ignore FORGET: inode numbers are computed."""

    async def release(self, fh: FileHandleT) -> None:
        """Ignore RELEASE: handles are inode numbers."""

    async def releasedir(self, fh: FileHandleT) -> None:
        """Ignore RELEASEDIR."""


def _entry(attributes: Attributes) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = attributes.inode
    entry.st_mode = attributes.mode
    entry.st_size = attributes.size
    entry.st_blocks = (attributes.size + 511) >> 9
    entry.st_blksize = 4096
    entry.st_nlink = 1
    entry.st_uid = entry.st_gid = 0
    entry.st_mtime_ns = entry.st_atime_ns = entry.st_ctime_ns = 1_000_000_000
    entry.entry_timeout = 0 if attributes.fleeting else FOREVER
    entry.attr_timeout = FOREVER
    return entry
