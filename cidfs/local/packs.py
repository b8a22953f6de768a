"""Pack files: append under a flock, seal, read behind a window.

One writer a pack at a time; readers need no lock, for nothing that was written is ever changed or cut off.
`PackWriter` belongs to one thread; `PackReader` is safe for several.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cidfs.errors import ChunkInvalid, ChunkMissing, DiskFailed, FormatError
from cidfs.formats import frames, pack
from cidfs.local.files import disk_errors, leads_to, mapped, sync_folder, try_flock, write_all
from cidfs.local.rows import PACK_ID_SIZE, Place
from cidfs.local.state import PACK_KINDS

OWN: Final = 0
CACHE: Final = 1
MANIFEST: Final = 2
MAX_OPEN_FILES: Final = 256
MAX_WINDOW: Final = 4 << 20
MIN_WINDOW: Final = 256 << 10


def pack_path(root: Path, kind: int, identity: bytes) -> Path:
    """Return where a pack of a store lies."""
    name = identity.hex()
    return root / "packs" / PACK_KINDS[kind] / name[:2] / name


def bad_mark(path: Path) -> Path:
    """Return the name of the mark beside a pack that says: append nothing, and judge each frame by digest."""
    return path.with_name(f"{path.name}.bad")


def distrust(path: Path) -> None:
    """Mark a pack as bad, durably; raise OSError or DiskFailed."""
    mark = bad_mark(path)
    if not mark.exists():
        mark.touch()
        sync_folder(path.parent)


class SyncFailed(DiskFailed):
    """A pack could not be synced; what was written to it since the last sync may be lost."""

    def __init__(self, message: str, identity: bytes) -> None:
        super().__init__(message)
        self.pack = identity


class _OpenFile:
    """A descriptor that closes when its last user lets go of it."""

    __slots__ = ("ahead", "fd", "window")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.ahead = 0
        self.window = MIN_WINDOW

    def __del__(self) -> None:
        os.close(self.fd)


class PackReader:
    """Read frames at known places; keeps at most MAX_OPEN_FILES descriptors."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: OrderedDict[bytes, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def _open(self, place: Place) -> _OpenFile:
        with self._lock:
            file = self._files.get(place.pack)
            if file is not None:
                self._files.move_to_end(place.pack)
                return file
        path = pack_path(self._root, place.kind, place.pack)
        try:
            file = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise ChunkMissing(f"{path}: the pack is gone") from None
        except OSError as e:
            raise mapped(e, path, "open") from e
        with self._lock:
            self._files[place.pack] = file
            while len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def read_stored(self, digest: bytes, place: Place) -> bytes:
        """Return a whole frame, its header compared with what the index says; data is not verified yet."""
        file = self._open(place)
        size = frames.HEADER_SIZE + place.stored
        start, end = place.offset, place.offset + size
        if not (file.ahead - 2 * file.window <= start and end <= file.ahead - file.window // 2):
            forward = file.ahead - 2 * file.window <= start <= file.ahead
            file.window = min(file.window * 2, MAX_WINDOW) if forward else MIN_WINDOW
            os.posix_fadvise(file.fd, start, file.window, os.POSIX_FADV_WILLNEED)
            file.ahead = start + file.window
        try:
            raw = os.pread(file.fd, size, start)
        except OSError as e:
            raise ChunkInvalid(
                f"{pack_path(self._root, place.kind, place.pack)}: cannot be read at {start}: {e.strerror}"
            ) from e
        try:
            header = frames.read_header(raw)
            if header.digest != digest or header.size != size or header.length != place.length:
                raise FormatError(f"frame: another one than the index says, at offset {start}")
        except FormatError as e:
            raise ChunkInvalid(f"{pack_path(self._root, place.kind, place.pack)}: {e} (+{start})") from None
        return raw

    def read(self, digest: bytes, place: Place) -> bytes:
        """Return the decoded, verified data of a frame; raise ChunkMissing or ChunkInvalid."""
        raw = self.read_stored(digest, place)
        try:
            return frames.read_data(raw, frames.read_header(raw))
        except FormatError as e:
            where = pack_path(self._root, place.kind, place.pack)
            raise ChunkInvalid(f"{where}: {e} (+{place.offset})") from None

    def forget_unlinked(self) -> None:
        """Drop the descriptors of packs that are gone: they would keep the disk from being freed."""
        with self._lock:
            gone = [i for i, file in self._files.items() if os.fstat(file.fd).st_nlink == 0]
            for identity in gone:
                del self._files[identity]

    def forget(self, identity: bytes) -> None:
        """Drop a descriptor, so that the next read opens the pack anew."""
        with self._lock:
            self._files.pop(identity, None)


class _Open:
    """A pack that this process appends to."""

    def __init__(self, path: Path, identity: bytes, fd: int, end: int, *, made_here: bool) -> None:
        self.path, self.identity, self.fd, self.end = path, identity, fd, end
        self.taken_at = end
        self.rows: list[pack.Row] = []
        self.folder_synced = False
        self.made_here = made_here
        self.dirty = made_here
        self.failed: OSError | None = None


class PackWriter:
    """Append frames of one kind; take the youngest open pack or make one, seal each that is full."""

    def __init__(self, root: Path, kind: int, candidates: Iterable[bytes] = ()) -> None:
        """candidates: identities of packs that may still be open, oldest first."""
        self._root, self.kind = root, kind
        self._candidates = list(candidates)
        self._open: _Open | None = None
        self._unsynced: list[_Open] = []
        self.made: list[bytes] = []  # identities of new packs
        self.changed: dict[bytes, bool] = {}  # identity -> sealed, since the last transaction

    def append(self, digest: bytes, encoding: int, stored: bytes, length: int) -> Place:
        """Append one frame and return its place; it counts only after sync()."""
        return self.append_many([(digest, encoding, stored, length)])[0]

    def append_many(self, items: Iterable[tuple[bytes, int, bytes, int]]) -> list[Place]:
        """Append frames (digest, encoding, stored data, length) with few writes and return their places."""
        kind = frames.KIND_MANIFEST if self.kind == MANIFEST else frames.KIND_CHUNK
        places: list[Place] = []
        buffer: list[bytes] = []
        start = offset = 0
        current: _Open | None = None
        for digest, encoding, stored, length in items:
            if current is None:
                current = self._take()
                start = offset = current.end
            buffer.append(frames.build(kind, encoding, stored, length, digest))
            places.append(Place(current.identity, offset, len(stored), length, self.kind, encoding))
            current.rows.append(pack.Row(digest, offset, len(stored), length, kind, encoding))
            offset += len(buffer[-1])
            if offset >= pack.ROLL_SIZE:
                self._write(current, b"".join(buffer), start)
                self._seal(current)
                current, buffer = None, []
        if current is not None:
            self._write(current, b"".join(buffer), start)
        return places

    def _write(self, current: _Open, data: bytes, offset: int) -> None:
        current.dirty = True
        try:
            write_all(current.fd, data, offset)
        except OSError as e:
            # what was torn stays, for nothing is cut off; what stands before it is synced with the rest
            self._open = None
            raise mapped(e, current.path, "append") from e
        current.end = offset + len(data)

    def _drop(self, current: _Open) -> None:
        os.close(current.fd)
        if self._open is current:
            self._open = None
        if current in self._unsynced:
            self._unsynced.remove(current)

    def _take(self) -> _Open:
        if self._open is None:
            while self._candidates and self._open is None:
                self._open = self._try_take(self._candidates.pop())
            if self._open is None:
                self._open = self._make()
                self.made.append(self._open.identity)
            self._unsynced.append(self._open)
            self.changed[self._open.identity] = False
        return self._open

    def _try_take(self, identity: bytes) -> _Open | None:
        path = pack_path(self._root, self.kind, identity)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        taken = _Open(path, identity, fd, os.fstat(fd).st_size, made_here=False)
        try:
            if try_flock(fd) and leads_to(path, fd) and not bad_mark(path).exists():
                taken.end = taken.taken_at = end = os.fstat(fd).st_size
                tail = os.pread(fd, pack.TRAILER_SIZE, max(0, end - pack.TRAILER_SIZE))
                begins = os.pread(fd, len(pack.HEADER), 0) == pack.HEADER  # or the power took that
                if begins and end < pack.ROLL_SIZE and pack.read_trailer(tail, end) is None:
                    sync_folder(path.parent)  # its maker may have died before doing so
                    taken.folder_synced = True
                    return taken
        except (FormatError, OSError):
            pass
        os.close(fd)
        return None

    def _make(self) -> _Open:
        while True:
            identity = os.urandom(PACK_ID_SIZE)
            path = pack_path(self._root, self.kind, identity)
            temporary = path.with_name(f"{path.name}.new")
            with disk_errors(path, "make a pack"):
                if not path.parent.exists():  # restored from a backup that leaves empty folders out
                    path.parent.mkdir(parents=True, exist_ok=True)
                    sync_folder(path.parent.parent)
                    sync_folder(path.parent.parent.parent)
                fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                if try_flock(fd) and leads_to(temporary, fd):
                    break
                os.close(fd)  # a collection took it for a leftover before it was locked
        with disk_errors(path, "make a pack"):
            try:
                write_all(fd, pack.HEADER, 0)
                os.fdatasync(fd)  # what has the name of a pack begins as one
                os.link(temporary, path)
                os.unlink(temporary)
            except BaseException:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        return _Open(path, identity, fd, len(pack.HEADER), made_here=True)

    def _seal(self, current: _Open) -> None:
        self._open = None  # stays locked until sync()
        try:
            os.fdatasync(current.fd)  # a footer that outlived its frames would tell of what is not there
        except OSError as e:
            current.failed = e
            return
        rows: list[pack.Row] = []
        if not current.made_here:
            before = os.pread(current.fd, current.taken_at, 0)
            rows = [
                pack.row_of(f.offset, f.header)
                for f in frames.scan(before, len(pack.HEADER))
                if isinstance(f, frames.Found)
            ]
        self._write(current, pack.build_footer(rows + current.rows, current.end), current.end)
        self.changed[current.identity] = True

    def sync(self) -> None:
        """Make everything appended so far durable; raise SyncFailed and mark the pack when that fails.

        The other packs are still to be synced then: by calling this again.
        """
        for current in list(self._unsynced):
            try:
                if current.failed is not None:
                    raise current.failed
                if current.dirty:
                    os.fdatasync(current.fd)
                    current.dirty = False
            except OSError as e:
                with contextlib.suppress(OSError, DiskFailed):
                    distrust(current.path)
                self._drop(current)
                raise SyncFailed(str(mapped(e, current.path, "sync")), current.identity) from e
            if not current.folder_synced:
                sync_folder(current.path.parent)
                current.folder_synced = True
            if current is not self._open:
                self._unsynced.remove(current)
                os.close(current.fd)

    def close(self) -> None:
        """Let go of the packs; what was not synced may be lost, and nothing refers to it."""
        for current in list(self._unsynced):
            self._drop(current)
        self._open = None
