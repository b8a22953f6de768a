"""Growth while mounted: what is published anew is shown in overlays before anybody hears that it is valid.

The order is the promise: a path is published; an overlay that may remember one of its names as absent is
reconfigured; only then the serial is confirmed on the board, up to which the metadata process calls paths
valid by itself. Also owns what follows a removal: the kernel, and the overlays, forget the names. Belongs to
the trio thread; what blocks runs on worker threads, one piece of growth at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from cidfs.board import Board
from cidfs.errors import CidfsError
from cidfs.local.news import News
from cidfs.local.removal import Removals
from cidfs.local.store import LocalStore
from cidfs.mount.absences import Absences
from cidfs.mount.acts import Link
from cidfs.mount.watch import OverlayWatch

log = logging.getLogger(__name__)


class Growth:
    """Keeps kernel and overlays in step with what is published and removed."""

    def __init__(
        self,
        store: LocalStore,
        absences: Absences,
        watch: OverlayWatch,
        link: Link,
        board: Board,
        forget_names: Callable[[Sequence[bytes]], Awaitable[None]],
    ) -> None:
        self._store = store
        self._absences = absences
        self._watch = watch
        self._link = link
        self._board = board
        self._forget_names = forget_names
        self._news = News(store)
        self._removals = Removals(store)
        self._to_forget: list[bytes] = []  # stays when who asked has gone in between
        self._is_due = False  # whether overlays may still know what kernel and uppers have forgotten
        self._one = trio.Lock()
        self._complaint = ""
        self._veil_complaint = ""
        self.remounts = 0
        self.unveiled = 0
        board.confirmed = self._news.serial

    async def step(self) -> bool:
        """Show what was published and hide what was removed until now; say whether that is done.

        Returns when it is, whoever began it. A failure is logged once and tried again at the next step.
        """
        async with self._one:
            try:
                await self._let_go()
                await self._show()
                self._complaint = ""
            except CidfsError as e:
                if str(e) != self._complaint:
                    self._complaint = str(e)
                    log.warning("new store paths are not shown yet: %s", e)
            return not self._complaint

    async def unveil(self, names: Sequence[str]) -> bool:
        """Take whiteouts of some whole paths out of the uppers; say whether none is left.

        A failure is logged once.
        """
        async with self._one:
            whole = [name for name in names if self._is_whole(name)]
            try:
                if whole and self._watch.standing():
                    outcome = await trio.to_thread.run_sync(self._link.ask, "unveil", whole)
                    self.remounts += bool(outcome.remounted)
                    self.unveiled += outcome.taken
                    await self._remount_if_due()
                self._veil_complaint = ""
            except CidfsError as e:
                self._is_due = True  # some may have been taken out
                if str(e) != self._veil_complaint:
                    self._veil_complaint = str(e)
                    log.warning("whiteouts of published store paths stay: %s", e)
            return not self._veil_complaint

    @property
    def complaint(self) -> str:
        """Why new store paths are not shown at the moment; empty when they are."""
        return self._complaint

    def _is_whole(self, name: str) -> bool:
        row = self._store.find(name[:32].encode())
        return row is not None and row.whole > 0 and row.name == name[33:].encode()

    async def _show(self) -> None:
        fresh = await trio.to_thread.run_sync(self._news.look)
        if fresh is None:
            return
        if self._watch.standing() and (fresh.everything or self._absences.any_of(fresh.names)):
            await self._remount()
        self._news.accept(fresh)
        self._board.confirmed = fresh.serial

    async def _let_go(self) -> None:
        """Let the kernel forget the names of what was removed, and packs go that were unlinked."""
        self._to_forget += await trio.to_thread.run_sync(self._removals.new)
        if self._to_forget:
            self._is_due = True
            await self._forget_names(self._to_forget)
            self._to_forget = []
            self._store.packs.forget_unlinked()
        await self._remount_if_due()

    async def _remount_if_due(self) -> None:
        if self._is_due:
            if self._watch.standing():
                await self._remount()
            self._is_due = False

    async def _remount(self) -> None:
        """Have every overlay forget which names were absent, and which were there."""
        taken = self._absences.take()  # before it: what is absent from here on may stay so
        try:
            await trio.to_thread.run_sync(self._link.ask, "remount")
        except BaseException:
            self._absences.put_back(taken)
            raise
        self.remounts += 1
