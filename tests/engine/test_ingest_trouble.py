"""Ingests beside collections, and on disks whose syncs fail."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cidfs.engine import ingest as ingest_module
from cidfs.engine.ingest import ingest
from cidfs.errors import DiskFailed
from cidfs.formats import pack
from cidfs.local.collect import collect
from cidfs.local.store import LocalStore
from tests.engine.support import file_source, nar_of, stored_nar
from tests.local.support import noise, pack_files

DATA = [noise(f"piece {i}", 5000) for i in range(12)]


class FailingSyncs:
    """Lets some syncs of packs fail: those with these numbers, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, *numbers: int) -> None:
        self._real, self._kind, self._numbers = os.fdatasync, kind, numbers
        self.count = 0
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        """Fail, or sync."""
        where = os.readlink(f"/proc/self/fd/{fd}")
        begun = os.fstat(fd).st_size > len(pack.HEADER)
        if f"/packs/{self._kind}/" in where and begun:
            self.count += 1
            if self.count in self._numbers:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(fd)


@pytest.mark.parametrize("kind", ["own", "manifest"])
@pytest.mark.parametrize("failing", [(1,), (2,), (1, 2), (2, 3)])
@pytest.mark.parametrize("roll", [pack.ROLL_SIZE, 200], ids=["", "sealed"])
async def test_what_cannot_be_synced_is_stored_again_elsewhere(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, failing: tuple[int, ...], roll: int
) -> None:
    monkeypatch.setattr(pack, "ROLL_SIZE", roll)
    syncs = FailingSyncs(monkeypatch, kind, *failing)
    monkeypatch.setattr(ingest_module, "ROWS_A_TRANSACTION", 4)
    with LocalStore.open(root, write=True) as store:
        outcomes = await ingest(store, [file_source("a", *DATA[:6]), file_source("b", *DATA[3:])])
        assert syncs.count > len(failing)
        bad = {p.name.removesuffix(".bad") for p in (root / "packs").rglob("*.bad")}
        assert len(bad) == len(failing)
        for outcome, pieces in zip(outcomes, (DATA[:6], DATA[3:]), strict=True):
            assert stored_nar(store, outcome.path) == nar_of(b"".join(pieces))
        collect(store)
        assert not bad & {p.name for p in pack_files(root, kind)}, "its rest was copied, and it is gone"
        for outcome, pieces in zip(outcomes, (DATA[:6], DATA[3:]), strict=True):
            assert stored_nar(store, outcome.path) == nar_of(b"".join(pieces))


async def test_a_disk_that_can_sync_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingSyncs(monkeypatch, "own", *range(1, 100))
    with LocalStore.open(root, write=True) as store:
        with pytest.raises(DiskFailed, match="cannot sync"):
            await ingest(store, [file_source("a", *DATA)])
        assert list(store.paths()) == []


@pytest.mark.parametrize("before", range(13))
async def test_a_collection_at_any_moment_of_an_ingest(
    root: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """It takes rows of what nothing needs yet away, and the ingest notices."""
    monkeypatch.setattr(ingest_module, "ROWS_A_TRANSACTION", 1)
    lock = threading.Lock()
    pieces = [*DATA[:4], *DATA[:4], *DATA[2:6]]

    def between(number: int) -> None:
        if number == before:
            with lock:
                assert collect(store).packs == 0

    with LocalStore.open(root, write=True) as store:
        await ingest(store, [file_source("old", *DATA[3:8])])
        (path,) = (p.path for p in store.paths())
        store.remove([path])
        (outcome,) = await ingest(store, [file_source("new", *pieces, between=between)])
        assert stored_nar(store, outcome.path) == nar_of(b"".join(pieces))
        collect(store)
        assert stored_nar(store, outcome.path) == nar_of(b"".join(pieces))
