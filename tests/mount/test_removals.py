"""What a daemon does about removed paths, whoever asks and goes again."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from cidfs.daemon import MountPlan, _Daemon
from cidfs.local.store import LocalStore


async def test_a_name_is_forgotten_though_who_asked_has_gone(root: Path) -> None:
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

            daemon._removals.new = new  # type: ignore[method-assign]  # a moment that cannot be hit otherwise
            await daemon._let_go()
        assert asking.cancelled_caught
        assert forgotten == []
        daemon._removals.new = list  # type: ignore[method-assign]  # nothing new
        await daemon._let_go()
        assert forgotten == [b"name"]
        await daemon._let_go()
        assert forgotten == [b"name"]
