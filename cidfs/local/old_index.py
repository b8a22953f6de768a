"""What the index that still counts knows and the journal may not: asked by a rebuild, under the write lock.

Opened only if all its pages are right, for a read of a damaged one can end the process. Of one that is not,
single rows are read without LMDB where they have their check bytes. One that cannot be had at all says
nothing: then the journal is all there is. Synchronous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from cidfs.errors import CidfsError, IndexLost
from cidfs.formats import journal
from cidfs.local import pages, tables
from cidfs.local.index import Index, ReadTxn
from cidfs.local.rows import RemovedRow, number_key, unpack_number
from cidfs.local.state import StateFolder

T = TypeVar("T")


class OldIndex:
    """What an index in use says; without an Index, what could be salvaged of it."""

    def __init__(self, index: Index | None, pending: list[bytes], next_serial: int, next_base: int) -> None:
        self._index = index
        self.pending = pending
        self.next_serial = next_serial
        self.next_base = next_base

    def publications(self) -> list[journal.Publication] | None:
        """Return what is published, as the journal would say it; None where a row of it is lost."""
        return self._ask(tables.publications)

    def realisations(self) -> list[journal.Realisation]:
        """Return the realisations whose rows are whole, as the journal would say them."""
        return self._ask(lambda txn: list(tables.iterate_realisations(txn))) or []

    def removed_ranges(self) -> list[tuple[int, RemovedRow, bytes]]:
        """Return inode base and rows of the removed paths that a mount may still know."""
        return self._ask(_removed_ranges) or []

    def _ask(self, question: Callable[[ReadTxn], T]) -> T | None:
        if self._index is None:
            return None
        try:
            with self._index.read() as txn:
                return question(txn)
        except IndexLost:
            return None


@contextlib.contextmanager
def old_index(state: StateFolder) -> Iterator[OldIndex]:
    """Open the index that counts, as far as it can be read.

    One of another schema is refused (StoreVersion), for what its version keeps in it is not known here.
    """
    try:
        number = state.current_index()
        folder = state.root / "index" / str(number)
    except IndexLost:
        yield OldIndex(None, [], 0, 0)
        return
    try:
        pages.check(folder, deep=True)
        index = Index(folder, number, write=False)
    except IndexLost:
        pending: dict[bytes, bytes] = {}
        meta: dict[bytes, bytes] = {}
        with contextlib.suppress(CidfsError):  # the file is gone, or the disk cannot read it
            pending, meta = pages.salvage(folder, "pending"), pages.salvage(folder, "meta")
        yield OldIndex(None, [pending[key] for key in sorted(pending)], *_numbers(meta))
        return
    try:
        with index.read() as txn:
            frames = [raw for _, raw in txn.rows("pending") if raw is not None]
            numbers = txn.number("next-serial"), txn.number("next-base")
        yield OldIndex(index, frames, *numbers)
    finally:
        index.close()


def _numbers(meta: dict[bytes, bytes]) -> tuple[int, int]:
    found = (meta.get(name) for name in (b"next-serial", b"next-base"))
    serial, base = (unpack_number(row) if row is not None and len(row) == 8 else 0 for row in found)
    return serial, base


def _removed_ranges(txn: ReadTxn) -> list[tuple[int, RemovedRow, bytes]]:
    found = [(base, row, txn.get("inodes", number_key(base))) for base, row in tables.removed_ranges(txn)]
    return [(base, row, raw) for base, row, raw in found if raw is not None]
