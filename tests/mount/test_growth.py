"""Growth: the order of publish, remount and confirm, whatever fails in between. Overlays are pretended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cidfs.board import Board
from cidfs.errors import CidfsError
from cidfs.local.store import LocalStore
from cidfs.mount import absences as absences_module
from cidfs.mount.absences import Absences
from cidfs.mount.acts import Outcome
from cidfs.mount.growth import Growth
from tests.local.support import package, path_of, publish


class Overlays:
    """Overlays above a mount, and a parent that reconfigures them; what it is asked is noted."""

    def __init__(self, board: Board, standing: bool = True) -> None:
        self.board = board
        self.above = ("overlay",) if standing else ()
        self.asked: list[tuple[str, tuple[str, ...], int]] = []
        self.failure = ""
        self.taken = 0

    def standing(self) -> tuple[str, ...]:
        return self.above

    def ask(self, do: str, names: Sequence[str] = ()) -> Outcome:
        self.asked.append((do, tuple(names), self.board.confirmed))
        if self.failure:
            raise CidfsError(self.failure)
        return Outcome(1, remounted=1, taken=self.taken)


class Scene:
    """A growth over a store, with pretended overlays."""

    def __init__(self, store: LocalStore, *, standing: bool = True) -> None:
        self.board = Board()
        self.absences = Absences()
        self.overlays = Overlays(self.board, standing)
        self.forgotten: list[bytes] = []
        pretended: Any = self.overlays

        async def forget(names: Sequence[bytes]) -> None:
            self.forgotten += names

        self.growth = Growth(store, self.absences, pretended, pretended, self.board, forget)


def name_of(name: str) -> bytes:
    """Return the name in the root of a path that the tests mean by a name."""
    return path_of(name).base_name.encode()


async def test_a_name_that_was_absent_is_shown_before_its_serial_is_confirmed(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        scene = Scene(store)
        scene.absences.add(name_of("a"))
        await scene.growth.step()
        assert scene.overlays.asked == []
        publish(store, package("a"))
        await scene.growth.step()
        assert scene.overlays.asked == [("remount", (), 0)]  # with nothing confirmed yet
        assert scene.board.confirmed == 1
        assert (len(scene.absences), scene.growth.remounts) == (0, 1)
        await scene.growth.step()
        assert len(scene.overlays.asked) == 1


async def test_names_that_nobody_looked_up_need_no_remount(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        scene = Scene(store)
        scene.absences.add(name_of("another"))
        publish(store, package("a"))
        await scene.growth.step()
        assert (scene.overlays.asked, scene.board.confirmed) == ([], 1)
        without = Scene(store, standing=False)
        without.absences.add(name_of("b"))
        publish(store, package("b"))
        await without.growth.step()
        assert (without.overlays.asked, without.board.confirmed) == ([], 2)


async def test_where_nobody_can_remount_nothing_is_confirmed_and_it_is_tried_again(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalStore.open(root, write=True) as store:
        scene = Scene(store)
        scene.absences.add(name_of("a"))
        scene.overlays.failure = "the parent has gone"
        publish(store, package("a"))
        with caplog.at_level(logging.WARNING):
            await scene.growth.step()
            await scene.growth.step()
        assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
        assert (scene.board.confirmed, scene.growth.complaint) == (0, "the parent has gone")
        assert len(scene.absences) == 1
        scene.overlays.failure = ""
        await scene.growth.step()
        assert (scene.board.confirmed, scene.growth.complaint) == (1, "")


async def test_more_absent_names_than_are_remembered_count_as_any(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absences_module, "MAX_NAMES", 3)
    with LocalStore.open(root, write=True) as store:
        scene = Scene(store)
        for i in range(4):
            scene.absences.add(b"%d" % i)
        assert len(scene.absences) == 3
        publish(store, package("a"))
        await scene.growth.step()
        assert [do for do, _, _ in scene.overlays.asked] == ["remount"]
        publish(store, package("b"))
        await scene.growth.step()
        assert len(scene.overlays.asked) == 1


async def test_overlays_forget_what_was_removed(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a"))
        scene = Scene(store)
        store.remove([path_of("a")])
        scene.overlays.failure = "not now"
        await scene.growth.step()
        assert scene.forgotten == [name_of("a")]
        scene.overlays.failure = ""
        await scene.growth.step()
        assert [do for do, _, _ in scene.overlays.asked] == ["remount", "remount"]
        assert scene.forgotten == [name_of("a")]
        await scene.growth.step()
        assert len(scene.overlays.asked) == 2


async def test_only_whole_paths_are_unveiled(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a"), package("b", references=["lacking"]))
        scene = Scene(store)
        scene.overlays.taken = 1
        names = [name_of(n).decode() for n in ("a", "b", "absent")]
        await scene.growth.unveil([*names, names[0] + "-other", "short"])
        assert [(do, asked) for do, asked, _ in scene.overlays.asked] == [("unveil", (names[0],))]
        assert (scene.growth.unveiled, scene.growth.remounts) == (1, 1)
