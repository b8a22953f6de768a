"""Three kinds of threads in a row: one reads, some work, one writes; items stay in order from end to end.

    read ──► work, one a core ──► write, in the order in which they were read

Owns the threads and what lies between them, and knows nothing of what the items are. Threads stay at their
work from the first item to the last, for each hand-over through trio costs a tenth of a millisecond. An error
in any of them ends all. A cancelled reader is left behind if it waits in a system call (for standard input,
say); the others end with the item that they are at.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

import trio

T = TypeVar("T")

MOST_WORKERS: Final = 16


class _Item(Generic[T]):
    """An item on its way; done is held until it was worked on."""

    __slots__ = ("done", "error", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Lanes(Generic[T]):
    """One run of items through the three."""

    def __init__(self, work: Callable[[T], object], write: Callable[[T], object], ahead: int) -> None:
        """ahead: how many items may be between the reader and the end of their writing."""
        self._work = work
        self._write = write
        self._room = threading.Semaphore(ahead)
        self._workers = max(1, min(os.cpu_count() or 1, MOST_WORKERS))
        self._to_work: SimpleQueue[_Item[T] | None] = SimpleQueue()
        self._to_write: SimpleQueue[_Item[T] | None] = SimpleQueue()
        self._stopping = False

    async def run(self, items: Iterator[T]) -> None:
        """Take all items through; return when the last one is written."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            nursery.start_soon(partial(trio.to_thread.run_sync, self._read, items, abandon_on_cancel=True))
            for _ in range(self._workers):
                nursery.start_soon(trio.to_thread.run_sync, self._work_all)
            nursery.start_soon(self._write_to_the_end, nursery.cancel_scope)
            # and wait here: Ctrl-C reaches a task that waits for a nursery, not one that waits for a thread

    async def _write_to_the_end(self, everything: trio.CancelScope) -> None:
        await trio.to_thread.run_sync(self._write_all)
        everything.cancel()

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._stopping = True
            self._room.release()
            self._end()

    def _end(self) -> None:
        self._to_write.put(None)
        for _ in range(self._workers):
            self._to_work.put(None)

    def _read(self, items: Iterator[T]) -> None:
        for value in items:
            self._room.acquire()
            if self._stopping:
                return
            item = _Item(value)
            self._to_write.put(item)
            self._to_work.put(item)
        self._end()

    def _work_all(self) -> None:
        while (item := self._to_work.get()) is not None:
            try:
                if not self._stopping:
                    self._work(item.value)
            except BaseException as e:
                item.error = e  # raised where it stands in the order
            item.done.release()

    def _write_all(self) -> None:
        while (item := self._to_write.get()) is not None and not self._stopping:
            item.done.acquire()
            if item.error is not None:
                raise item.error
            if not self._stopping:
                self._write(item.value)
            self._room.release()
