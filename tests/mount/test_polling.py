"""How the loop of a mount waits: what is there is taken at once, and nobody else is kept from running."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from cidfs.mount.transport import polling

SECONDS = 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe."""
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


async def test_what_is_there_is_taken_without_a_switch(pipe: tuple[int, int]) -> None:
    """And after so many of those, all others have had their turn."""
    os.write(pipe[1], b"x")
    level = polling._LowLevel()
    others: list[int] = []

    async def other() -> None:
        while True:
            others.append(0)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(polling.TURNS):
            await level.wait_readable(pipe[0])
        assert others == []
        for _ in range(20 * (polling.TURNS + 1)):  # trio tosses a coin for who comes first
            await level.wait_readable(pipe[0])
        assert others != []
        nursery.cancel_scope.cancel()


async def test_it_sleeps_until_something_comes(pipe: tuple[int, int]) -> None:
    level = polling._LowLevel()
    order: list[str] = []

    async def wait() -> None:
        await level.wait_readable(pipe[0])
        order.append("read")

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            order.append("write")
            os.write(pipe[1], b"x")
    assert order == ["write", "read"]


async def test_polling_in_vain_stops(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    level = polling._LowLevel()
    for _ in range(polling.MOST_TRUST):
        with trio.move_on_after(0):
            await level.wait_readable(pipe[0])
    assert level._trust == 0
    os.write(pipe[1], b"x")
    await level.wait_readable(pipe[0])


async def test_nobody_polls_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert polling._LowLevel()._trust == 0


async def test_a_turn_is_one_task_s_and_goes_to_who_waits() -> None:
    turn = polling.Turn()
    inside: list[int] = []
    done: list[int] = []

    async def work(number: int) -> None:
        for _ in range(20):
            async with turn:
                inside.append(number)
                assert len(inside) == 1
                await trio.lowlevel.checkpoint()
                inside.pop()
        done.append(number)

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(work, number)
    assert sorted(done) == list(range(5))
