"""Work on many items by a thread a core, each thread taking the next item when it is free.

Owns no state. Items may come from a generator: it is asked by one thread at a time. What a check does with
shared state is its own affair. Ends soon after it is cancelled, if checks that take long call `pause`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import trio

from cidfs.engine.ingest import first_error
from cidfs.engine.progress import Steps

T = TypeVar("T")

TURN_SECONDS: Final = 0.1  # as long as a thread works without coming back, at least


async def for_each(items: Iterable[T], check: Callable[[T], object], steps: Steps) -> int:
    """Check all items (none is None) and return how many there were; each is one step. An error ends it."""
    source = iter(items)
    lock = threading.Lock()
    total = 0

    def turn() -> tuple[int, bool]:
        done = 0
        deadline = time.monotonic() + TURN_SECONDS
        while time.monotonic() < deadline:
            with lock:
                item = next(source, None)
            if item is None:
                return done, False
            check(item)
            done += 1
        return done, True

    async def work() -> None:
        nonlocal total
        more = True
        while more:
            done, more = await trio.to_thread.run_sync(turn)
            total += done
            steps.step(done)

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(os.cpu_count() or 1):
                nursery.start_soon(work)
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    return total


async def alone(work: Callable[[], T]) -> T:
    """Do one piece of work on a thread, so that it can be interrupted where it calls `pause`."""
    results: list[T] = []

    async def run() -> None:
        results.append(await trio.to_thread.run_sync(work))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    return results[0]


def pause() -> None:
    """End this thread's work if whoever waits for it was cancelled."""
    trio.from_thread.check_cancelled()
