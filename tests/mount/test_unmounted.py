"""What pyfuse3's loop says at the end of a mount."""

from __future__ import annotations

import errno
from pathlib import Path

import pyfuse3
import pytest

from cidfs.local.store import LocalStore
from cidfs.mount.transport.pyfuse3 import Pyfuse3Transport
from cidfs.mount.view import StoreView


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_an_end_in_the_midst_of_a_read_is_an_end(
    root: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """One unmount in some hundred meets the loop so; it cannot be made to."""
    error: Exception = OSError(errno.ECONNABORTED, "fuse_session_receive_buf failed")
    for _ in range(depth):
        error = ExceptionGroup("nursery", [error])

    async def main(max_tasks: int) -> None:
        raise error

    monkeypatch.setattr(pyfuse3, "main", main)
    with LocalStore.open(root) as store:
        await Pyfuse3Transport(StoreView(store)).serve()


async def test_any_other_end_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(max_tasks: int) -> None:
        raise ExceptionGroup("nursery", [OSError(errno.EIO, "fuse_session_receive_buf failed")])

    monkeypatch.setattr(pyfuse3, "main", main)
    with LocalStore.open(root) as store, pytest.raises(ExceptionGroup):
        await Pyfuse3Transport(StoreView(store)).serve()
