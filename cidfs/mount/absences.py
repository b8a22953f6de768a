"""Which names of the root were looked up and were not there: an overlay above goes on believing that.

Bounded; when more names come than are remembered, any name counts as one that was absent. Belongs to one
thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MAX_NAMES: Final = 50_000


class Absences:
    """A set of names, of which only hashes are kept: a name too many costs a remount."""

    def __init__(self) -> None:
        self._names: set[int] = set()
        self._full = False

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: bytes) -> None:
        """Remember that a name was absent."""
        if len(self._names) < MAX_NAMES:
            self._names.add(hash(name))
        else:
            self._full = True

    def any_of(self, names: Iterable[bytes]) -> bool:
        """Say whether one of some names may have been absent."""
        return self._full or any(hash(name) in self._names for name in names)

    def take(self) -> tuple[set[int], bool]:
        """Return all that is remembered and begin anew."""
        taken = self._names, self._full
        self._names, self._full = set(), False
        return taken

    def put_back(self, taken: tuple[set[int], bool]) -> None:
        """Remember again what was taken."""
        names, full = taken
        self._names |= names
        self._full |= full
