"""What a daemon does about removed paths, whoever asks and goes again."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from cidfs.daemon import MountPlan, _Daemon
from cidfs.local.store import LocalStore


async def test_a_name_is_forgotten_though_who_asked_has_gone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His time is over just when the names are known, and before the kernel is told."""
    forgotten: list[bytes] = []

    class Transport:
        async def forget_names(self, names: Sequence[bytes]) -> None:
            await trio.lowlevel.checkpoint()
            forgotten.extend(names)

    with LocalStore.open(root) as store, socket.socket() as listener:
        plan = MountPlan(root, root, "/nix/store", False, 1)
        unused: Any = None
        transport: Any = Transport()
        daemon = _Daemon(plan, store, transport, "", unused, listener, lambda: None)
        with trio.CancelScope() as asking:

            def new() -> list[bytes]:
                trio.from_thread.run_sync(asking.cancel)
                return [b"name"]

            monkeypatch.setattr(daemon._removals, "new", new)  # a moment that cannot be hit otherwise
            await daemon._let_go()
        assert asking.cancelled_caught
        assert forgotten == []
        monkeypatch.setattr(daemon._removals, "new", list)  # nothing new
        await daemon._let_go()
        assert forgotten == [b"name"]
        await daemon._let_go()
        assert forgotten == [b"name"]
