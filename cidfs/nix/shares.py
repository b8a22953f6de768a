"""Who may have how much of the metadata process: connections, and requests that take much memory.

Others than root never take up all of it, and one of them never what is for all of them. Nothing here is
logged or answered. Any thread may call.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

MAX_CONNECTIONS: Final = 1000
MAX_OF_OTHERS: Final = 900  # than root
MAX_OF_ONE_USER: Final = 250
LARGE_OF_ONE_USER: Final = 2
PLACE_SECONDS: Final = 60.0
ROOT: Final = 0


class Shares:
    """What is taken, by user."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._connections: Counter[int] = Counter()
        self._places: Counter[int] = Counter()

    def take_connection(self, user: int) -> bool:
        """Take a connection for a user; say whether he may have it."""
        with self._changed:
            mine, all_of_it = self._connections[user], self._connections.total()
            others = all_of_it - self._connections[ROOT]
            if all_of_it >= MAX_CONNECTIONS:
                return False
            if user != ROOT and (others >= MAX_OF_OTHERS or mine >= MAX_OF_ONE_USER):
                return False
            self._connections[user] += 1
            return True

    def give_connection_back(self, user: int) -> None:
        """End what `take_connection` began."""
        with self._changed:
            _less(self._connections, user)

    def take_place(self, user: int) -> bool:
        """Wait until a user may have one more request that takes much memory; say whether he may."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._places[user] < LARGE_OF_ONE_USER, PLACE_SECONDS):
                return False
            self._places[user] += 1
            return True

    def give_place_back(self, user: int) -> None:
        """End what `take_place` began."""
        with self._changed:
            _less(self._places, user)
            self._changed.notify_all()


def _less(counter: Counter[int], user: int) -> None:
    counter[user] -= 1
    if not counter[user]:
        del counter[user]
