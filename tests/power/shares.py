"""Long lists of cases, shared among a few processes; where one dies, its last case is known."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec

import pytest

from tests.local import children

P = ParamSpec("P")
PROCESSES: Final = 2
SECONDS: Final = 0.1
Share = Callable[[int], bool]


def in_shares(
    action: Callable[Concatenate[Any, int, int, P], None], one_of: int, *args: P.args, **kwargs: P.kwargs
) -> int:
    """Run an action in several processes, each with its number and with how many shares there are.

    An action says each case in words before it begins, and at its end how many there were. Only one case of
    `one_of` is done by anybody. Return how many were done.
    """
    parts = PROCESSES * one_of
    workers = [children.start(action, part, parts, *args, **kwargs) for part in range(PROCESSES)]
    try:
        done = sum(_listen(worker) for worker in workers)
        print(f"{done} cases")  # which pytest -rP shows
        return done
    finally:
        for worker in workers:
            worker.kill()
            worker.pipe.close()


def _listen(worker: children.Child) -> int:
    last: object = "before the first case"
    while not isinstance(last, int):
        if worker.pipe.poll(SECONDS):
            with contextlib.suppress(EOFError):
                last = worker.pipe.recv()
                continue
        if not worker.is_alive():
            pytest.fail(f"{last}: exit code {worker.end()}; standard error says more")
    return last


def is_mine(case: object, part: int, parts: int) -> bool:
    """Say whether a case is in a share; neighbours are in different ones."""
    digest = hashlib.sha256(str(case).encode()).digest()
    return int.from_bytes(digest[:4], "big") % parts == part
