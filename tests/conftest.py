"""What all tests share: --long, and a store on disk reached through the real command line."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Store, store_in

CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_PRIVATE = 0x40000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --long."""
    parser.addoption(
        "--long", action="store_true", help="full sizes: 10 GiB, a million files (about an hour)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep the option where helpers reach it; full sizes may take as long as they need."""
    Store.long = bool(config.getoption("--long"))
    part_mounts()
    if Store.long:
        config.option.timeout = 0


def part_mounts() -> None:
    """Give this process a mount namespace of its own, where it may.

    Tests run side by side, and Nix copies all mounts that it sees into namespaces of its own: it would keep
    what another test has mounted, and so its daemon, for as long as it runs.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) == 0:
            libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)


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
