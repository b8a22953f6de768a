"""How pyfuse3's loop waits for the next request: it looks a while before it goes to sleep.

Walking a tree, the next request comes some tens of microseconds after the last answer. Going through trio's
scheduler and epoll for each costs more than answering it, and a sleeping process that must be woken costs as
much again. So the loop takes what is there at once, polls the descriptor for up to POLL_SECONDS when nothing
is, and only then waits in trio. It polls only while that pays: not when requests have lately come further
apart, and not where there is one core for everybody.

Owns what stands in pyfuse3 for `trio`, as pyfuse3's own asyncio adapter does. Belongs to the trio thread.
Other tasks of the daemon get their turn after TURNS requests at the latest.
"""

from __future__ import annotations

import os
import select
import time
from types import TracebackType
from typing import Any, Final

import pyfuse3
import trio

POLL_SECONDS: Final = 100e-6
TURNS: Final = 64
MOST_TRUST: Final = 8


class Turn:
    """A lock that its last holder may take again at once; who waits is woken and takes it if it is free.

    So the task that answers without awaiting goes on with the next request, and no other one is switched to.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        self._waiting.unpark()


class _LowLevel:
    """`trio.lowlevel`, but for waiting."""

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self._fd = -1
        self._turns = 0
        self._may_poll = (os.cpu_count() or 1) > 1
        self._trust = MOST_TRUST // 2 if self._may_poll else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return when a descriptor can be read, or is in error."""
        if fd != self._fd or self._poll is None:
            self._poll, self._fd = select.poll(), fd
            self._poll.register(fd, select.POLLIN)
        if self._turns < TURNS:
            self._turns += 1
            if self._poll.poll(0):
                return
            if self._trust > 0:
                began = time.perf_counter()
                while time.perf_counter() - began < POLL_SECONDS:
                    if self._poll.poll(0):
                        self._trust = MOST_TRUST
                        return
                self._trust -= 1
        self._turns = 0
        began = time.perf_counter()
        await trio.lowlevel.wait_readable(fd)
        if self._may_poll and self._trust < MOST_TRUST and time.perf_counter() - began < POLL_SECONDS:
            self._trust += 1


class _Trio:
    """`trio`, but for the lock and the waiting of pyfuse3's loop."""

    Lock = Turn

    def __init__(self) -> None:
        self.lowlevel = _LowLevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def install() -> None:
    """Make pyfuse3's loop wait so."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]  # the module's own import, which no stub names
