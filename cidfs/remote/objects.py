"""What a store of named objects can do for those who read from it.

A key is relative, its parts separated by `/`. Small things are asked for from trio, and each such call has a
deadline. Large objects are read in pieces by whoever consumes them, on that worker thread.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Reader(Protocol):
    """An object that is being read. Blocking: for worker threads, one at a time."""

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        ...

    def read(self, count: int) -> bytes:
        """Return the next bytes, up to count of them; b"" at the end. Raise SourceError."""
        ...


class ObjectStore(Protocol):
    """Named objects; nobody changes them meanwhile, or whoever reads them finds out by their hashes."""

    @property
    def url(self) -> str:
        """Where it is, for messages; without a slash at the end."""
        ...

    async def get(self, key: str, limit: int) -> bytes | None:
        """Return a whole object, None when there is none.

        Raise FormatError for one of more than limit bytes, SourceError when it cannot be read in time.
        """
        ...

    async def names(self, folder: str = "") -> list[str]:
        """Return the names right in a folder, in any order; raise SourceError when it cannot be read."""
        ...

    def open(self, key: str) -> AbstractContextManager[Reader]:
        """Open an object to read it in pieces. Blocking: for worker threads.

        Raise SourceError when it is not there or cannot be read.
        """
        ...
