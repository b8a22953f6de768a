"""The threads of an ingest: order, errors where they stand in the order, bounds, and an end in every case."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio

from cidfs.engine.lanes import Lanes

SECONDS = 20


async def test_items_are_written_in_the_order_in_which_they_were_read() -> None:
    """Also when a later one is worked on sooner."""
    written: list[int] = []
    second = threading.Event()

    def work(number: int) -> None:
        if number == 1:
            second.set()
        elif number == 0 and lanes_have_two:
            assert second.wait(SECONDS)

    lanes: Lanes[int] = Lanes(work, written.append, 8)
    lanes_have_two = lanes._workers > 1
    await lanes.run(iter(range(500)))
    assert written == list(range(500))


async def test_an_error_of_the_work_comes_when_all_before_it_is_written() -> None:
    written: list[int] = []

    def work(number: int) -> None:
        if number == 30:
            raise ValueError("thirty")

    with trio.fail_after(SECONDS), pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="thirty")):
        await Lanes(work, written.append, 4).run(iter(range(1000)))
    assert written == list(range(30))


@pytest.mark.parametrize("lane", ["read", "write"])
async def test_an_error_of_the_reader_or_the_writer_ends_all(lane: str) -> None:
    def read() -> Iterator[int]:
        yield from range(50)
        if lane == "read":
            raise ValueError("reading")
        yield from range(10_000)

    def write(number: int) -> None:
        if lane == "write" and number == 40:
            raise ValueError("writing")

    with trio.fail_after(SECONDS), pytest.RaisesGroup(pytest.RaisesExc(ValueError, match=f"{lane[:4]}")):
        await Lanes(lambda number: None, write, 4).run(read())


async def test_no_more_is_read_ahead_than_there_may_be() -> None:
    read, most = 0, 0
    written = 0

    def items() -> Iterator[int]:
        nonlocal read, most
        for number in range(300):
            read += 1
            most = max(most, read - written)
            yield number

    def write(number: int) -> None:
        nonlocal written
        written += 1

    await Lanes(lambda number: None, write, 5).run(items())
    assert (read, written) == (300, 300)
    assert most <= 5 + 2  # one that waits for room, one that is being counted


async def test_a_cancelled_run_ends_though_its_reader_waits() -> None:
    """As for standard input that never comes: that thread is left behind, and ends when it can."""
    waits, go, ended = threading.Event(), threading.Event(), threading.Event()
    written: list[int] = []

    def read() -> Iterator[int]:
        yield from range(3)
        waits.set()
        go.wait(SECONDS)
        try:
            yield 3
        finally:
            ended.set()

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Lanes(lambda number: None, written.append, 8).run, read())
            assert await trio.to_thread.run_sync(waits.wait, SECONDS)
            nursery.cancel_scope.cancel()
    go.set()
    assert await trio.to_thread.run_sync(ended.wait, SECONDS)
    assert 3 not in written
