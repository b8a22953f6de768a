"""A plain folder as an object store: each object is a file below it.

Reads only. Symlinks are followed, as whoever laid the folder out meant them; a key never leads out by itself.
What is no regular file is refused without waiting for it. May be used by several tasks and threads at once.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import trio

from cidfs.errors import FormatError, SourceError

DEADLINE: Final = 30.0
_T = TypeVar("_T")


class FileReader:
    """A file that is being read."""

    def __init__(self, fd: int, size: int, shown: str) -> None:
        self._fd = fd
        self._shown = shown
        self.size = size

    def read(self, count: int) -> bytes:
        """Return the next bytes, up to count of them; b"" at the end."""
        try:
            return os.read(self._fd, count)
        except OSError as e:
            raise SourceError(f"{self._shown}: {e.strerror}") from e


class Directory:
    """The files below a folder."""

    def __init__(self, root: Path, deadline: float = DEADLINE) -> None:
        self._root = root
        self._deadline = deadline

    @property
    def url(self) -> str:
        """The folder as a URL."""
        return self._root.as_uri().rstrip("/")

    async def get(self, key: str, limit: int) -> bytes | None:
        """Return a whole file, None when there is none."""
        return await self._in_time(key, lambda: self._get(key, limit))

    async def names(self, folder: str = "") -> list[str]:
        """Return the names right in a folder."""
        return await self._in_time(folder, lambda: self._names(folder))

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[FileReader]:
        """Open a file to read it in pieces."""
        shown = f"{self.url}/{key}"
        try:
            fd = self._opened(key)
        except OSError as e:
            raise SourceError(f"{shown}: {e.strerror}") from e
        try:
            yield FileReader(fd, os.fstat(fd).st_size, shown)
        finally:
            os.close(fd)

    async def _in_time(self, key: str, work: Callable[[], _T]) -> _T:
        shown = f"{self.url}/{key}".rstrip("/")
        try:
            with trio.fail_after(self._deadline):
                return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        except trio.TooSlowError:
            raise SourceError(f"{shown}: no answer within {self._deadline:g} s") from None
        except OSError as e:
            raise SourceError(f"{shown}: {e.strerror}") from e

    def _get(self, key: str, limit: int) -> bytes | None:
        try:
            fd = self._opened(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with open(fd, "rb", buffering=0) as file:
            data = bytearray()
            while len(data) <= limit and (piece := file.read(limit + 1 - len(data))):
                data += piece
        if len(data) > limit:
            raise FormatError(f"{self.url}/{key}: more than {limit} bytes")
        return bytes(data)

    def _names(self, folder: str) -> list[str]:
        return os.listdir(self._path(folder) if folder else self._root)

    def _opened(self, key: str) -> int:
        fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SourceError(f"{self.url}/{key}: not a regular file")
        return fd

    def _path(self, key: str) -> Path:
        if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
            raise FormatError(f"{key!r} does not name a file below {self.url}")
        return self._root / key
