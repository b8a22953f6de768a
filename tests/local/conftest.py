"""Where the stores of these tests lie: in memory, for they have a thousand folders each."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.support import copy_store, few_urandom, prune

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store without anything in it, to be copied: making one takes longer."""
    from cidfs.local.store import LocalStore

    with tempfile.TemporaryDirectory(prefix="cidfs-test-", dir=_where()) as folder:
        LocalStore.open(Path(folder) / "store", create=True).close()
        (Path(folder) / "store" / "ballast").unlink(missing_ok=True)  # megabytes, copied for each test
        yield Path(folder) / "store"


@pytest.fixture
def room() -> Iterator[Path]:
    """An empty folder of this test."""
    folder = Path(tempfile.mkdtemp(prefix="cidfs-test-", dir=_where()))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def root(room: Path, empty_store: Path) -> Path:
    """A new, empty store."""
    return copy_store(empty_store, room / "store")


@pytest.fixture
def small(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new, empty store with few folders, for tests that copy it again and again."""
    monkeypatch.setattr(os, "urandom", few_urandom)
    prune(root)
    return root


def _where() -> Path | None:
    """Return a folder in memory where there is one with room enough (a container's has 64 MiB), else None."""
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return None
    there = os.statvfs(MEMORY)
    return MEMORY if there.f_bavail * there.f_frsize > 1 << 30 else None
