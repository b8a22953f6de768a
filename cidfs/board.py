"""The board: a page of memory that the processes of one mount share.

Made by the parent before it forks; each number has one writer, and everybody may read: a number is eight
aligned bytes, which are read and written in one piece. Imports nothing of the project.

    confirmed   daemon   what became whole up to this serial can be seen, in overlays too
    daemon      holder   process of the daemon
    state       holder   STARTING, SERVING, or GONE: there is no daemon any more
    nix         holder   the metadata process; 0 while there is none
    restarts    holder   how often it was started again
    the others  metadata process   what it has done since the mount began
"""

from __future__ import annotations

import mmap
from typing import Final

STARTING: Final = 0
SERVING: Final = 1
GONE: Final = 2

_FIELDS: Final = (
    "confirmed",
    "daemon",
    "state",
    "nix",
    "restarts",
    "connections",
    "connections_total",
    "requests",
    "refused",
    "broken",
    "withheld",
)


class _Number:
    """One number of the board, as an attribute."""

    def __init__(self, position: int) -> None:
        self._position = position

    def __get__(self, board: Board, owner: type[Board]) -> int:
        return board.numbers[self._position]

    def __set__(self, board: Board, value: int) -> None:
        board.numbers[self._position] = value


class Board:
    """The numbers; shared by whoever was forked from the process that made it."""

    confirmed = _Number(0)
    daemon = _Number(1)
    state = _Number(2)
    nix = _Number(3)
    restarts = _Number(4)
    connections = _Number(5)
    connections_total = _Number(6)
    requests = _Number(7)
    refused = _Number(8)
    broken = _Number(9)
    withheld = _Number(10)

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.numbers = memoryview(self._memory).cast("Q")

    def snapshot(self) -> dict[str, int]:
        """Return all numbers by name."""
        return dict(zip(_FIELDS, self.numbers, strict=False))
