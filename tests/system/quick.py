"""Fixtures for tests of many commands: stores whose commands are forks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Store
from tests.system.forks import Forks, forked_store_in, forking


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """A process to fork commands from."""
    with forking() as here:
        yield here


@pytest.fixture
def store(tmp_path: Path, forks: Forks) -> Iterator[Store]:
    """A store whose commands are quick to start."""
    with forked_store_in(tmp_path, forks) as here:
        yield here
