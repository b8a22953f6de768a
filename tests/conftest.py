"""What all tests share: --long, and a store on disk reached through the real command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Store, store_in


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --long."""
    parser.addoption(
        "--long", action="store_true", help="full sizes: 10 GiB, a million files (about an hour)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep the option where helpers reach it; full sizes may take as long as they need."""
    Store.long = bool(config.getoption("--long"))
    if Store.long:
        config.option.timeout = 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this run left out."""
    if not Store.long:
        terminalreporter.write_line("not run: the full sizes (10 GiB, a million files); --long runs them")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A state folder of its own; what is mounted from it is taken down afterwards, and must be gone."""
    with store_in(tmp_path) as here:
        yield here


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder
