"""What processes of their own do for the tests of ingest."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import trio

from cidfs.engine.ingest import ingest
from cidfs.engine.sources import DiskSource
from cidfs.engine.wanted import Wanted
from cidfs.errors import CidfsError
from cidfs.local.publish import Published
from cidfs.local.store import LocalStore
from tests.engine.support import file_source
from tests.local.support import noise

FILES = [(f"f{i}", [noise(f"{i}-{j % 3}", 2000) for j in range(5)]) for i in range(4)]


def _memory() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ingest(store: LocalStore, *wanted: Wanted) -> list[Published]:
    async def work() -> list[Published]:
        return await ingest(store, wanted)

    return trio.run(work)


def ingest_large_file(pipe: Connection, root: Path, file: Path) -> None:
    """Add a file; say by how much memory grew, and the path."""
    with LocalStore.open(root, write=True) as store:
        _ingest(store, file_source("small", b"x" * 100_000))
        before = _memory()
        [outcome] = _ingest(store, Wanted(DiskSource(str(file)), name="large"))
        pipe.send((_memory() - before, outcome.path.base_name))


def ingest_beyond_a_limit(pipe: Connection, root: Path) -> None:
    """Run into a limit of file sizes, as if the disk were full; then go on without it."""

    def names() -> list[str]:
        return sorted(p.path.name for p in store.paths())

    with LocalStore.open(root, write=True) as store:
        _ingest(store, file_source("a", noise("a", 5000)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # more than the index has
        try:
            _ingest(store, file_source("b", *(noise(f"b{i}", 50_000) for i in range(4))))
        except CidfsError as e:
            pipe.send((type(e).__name__, str(e)))
        pipe.send(names())
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        _ingest(store, file_source("b", *(noise(f"b{i}", 50_000) for i in range(4))), file_source("c", b"c"))
        pipe.send(names())


def ingest_and_tell(pipe: Connection, root: Path) -> None:
    """Add several paths; say of each group that it is done."""

    def on_published(outcomes: Sequence[Published]) -> None:
        pipe.send(("done", [o.path.base_name for o in outcomes]))

    async def work() -> None:
        await ingest(
            store, [file_source(name, *batches) for name, batches in FILES], on_published=on_published
        )

    with LocalStore.open(root, write=True) as store:
        trio.run(work)
