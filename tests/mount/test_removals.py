"""What a daemon does about removed paths, whoever asks and goes again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from cidfs.board import Board
from cidfs.local.store import LocalStore
from cidfs.mount.absences import Absences
from cidfs.mount.growth import Growth


async def test_a_name_is_forgotten_though_who_asked_has_gone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His time is over just when the names are known, and before the kernel is told."""
    forgotten: list[bytes] = []

    async def forget_names(names: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        forgotten.extend(names)

    class NoOverlays:
        def standing(self) -> tuple[()]:
            return ()

    with LocalStore.open(root) as store:
        unused: Any = None
        watch: Any = NoOverlays()
        growth = Growth(store, Absences(), watch, unused, Board(), forget_names)
        with trio.CancelScope() as asking:

            def new() -> list[bytes]:
                trio.from_thread.run_sync(asking.cancel)
                return [b"name"]

            monkeypatch.setattr(growth._removals, "new", new)  # a moment that cannot be hit otherwise
            await growth.step()
        assert asking.cancelled_caught
        assert forgotten == []
        monkeypatch.setattr(growth._removals, "new", list)  # nothing new
        await growth.step()
        assert forgotten == [b"name"]
        await growth.step()
        assert forgotten == [b"name"]
