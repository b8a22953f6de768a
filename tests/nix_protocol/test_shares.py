"""How many connections and long requests each user may have at once."""

from __future__ import annotations

import threading

import pytest

from cidfs.nix import shares
from cidfs.nix.shares import Shares


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make limits that are soon reached, and let nobody wait for a place."""
    monkeypatch.setattr(shares, "MAX_OF_ONE_USER", 2)
    monkeypatch.setattr(shares, "MAX_OF_OTHERS", 3)
    monkeypatch.setattr(shares, "MAX_CONNECTIONS", 5)
    monkeypatch.setattr(shares, "PLACE_SECONDS", 0.0)


def test_one_user_cannot_take_what_is_for_all() -> None:
    here = Shares()
    assert [here.take_connection(7) for _ in range(3)] == [True, True, False]
    assert here.take_connection(8)
    assert not here.take_connection(8), "all others together have what they may have"
    assert [here.take_connection(0) for _ in range(3)] == [True, True, False]
    here.give_connection_back(7)
    assert here.take_connection(0)
    assert not here.take_connection(7), "now all are taken"


def test_root_may_have_everything_that_is_free() -> None:
    here = Shares()
    assert [here.take_connection(0) for _ in range(6)] == [True] * 5 + [False]
    assert not here.take_connection(7)
    here.give_connection_back(0)
    assert here.take_connection(7)


def test_a_place_is_waited_for_and_each_user_has_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Shares()
    assert [here.take_place(7) for _ in range(3)] == [True, True, False]
    assert here.take_place(8)
    monkeypatch.setattr(shares, "PLACE_SECONDS", 60.0)
    given: list[bool] = []
    waiting = threading.Thread(target=lambda: given.append(here.take_place(7)))
    waiting.start()
    here.give_place_back(7)
    waiting.join(60)
    assert given == [True]
