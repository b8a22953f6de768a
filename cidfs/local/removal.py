"""Removing store paths: what goes with them, in which order, and what stands in the way.

Synchronous; the caller's store is open for writing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final

from cidfs.errors import InUse
from cidfs.formats.store_path import StorePath
from cidfs.local import room, tables
from cidfs.local.index import ReadTxn

if TYPE_CHECKING:
    from cidfs.local.store import LocalStore

GROUP: Final = 256
SMALL_GROUP: Final = 16  # where the disk is full


class Removals:
    """What was removed since the last look, however and by whomever: for a mount, whose kernel knows names.

    Belongs to one thread at a time.
    """

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._seen = (0, -1)
        self._known: set[int] = set()
        self.new()

    def new(self) -> list[bytes]:
        """Return the names in the store directory of what was removed since this was asked last."""
        self._store.refresh()
        with self._store.read() as txn:
            seen = (txn.index.number, txn.number("removals"))
            if seen == self._seen:
                return []
            ranges = dict(tables.removed_ranges(txn))
        self._seen = seen
        found = [row.hash_part + b"-" + row.name for base, row in ranges.items() if base not in self._known]
        self._known = set(ranges)
        return found


def remove(
    store: LocalStore,
    wanted: Sequence[StorePath],
    *,
    referrers: bool,
    force: bool,
    on_removed: Callable[[Sequence[StorePath]], None],
) -> list[StorePath]:
    """Take paths out, referrers before what they refer to; return those that were not there.

    With referrers, all that refers to them goes too. Unless forced, raises InUse where something that stays
    refers to one of them; then nothing was taken out. on_removed is told each group once that is durable.
    """
    with store.read() as txn:
        there = {p: None for p in wanted if _is_there(txn, p)}
        ordered = _with_referrers(txn, there, follow=referrers)
        leaving = {p.hash_part for p in ordered}
        if not force:
            _refuse(txn, ordered, leaving)
    size = SMALL_GROUP if room.is_low(store.state.root) else GROUP
    for i in range(0, len(ordered), size):
        group = ordered[i : i + size]

        def act(group: list[StorePath] = group) -> list[StorePath]:
            with store.transaction() as index:
                return store.publisher.remove(index, group, leaving, force=force)

        on_removed(store.with_room(act))
    room.restore(store.state.root)  # what was given up of the ballast, for the collection
    absent = [p for p in dict.fromkeys(wanted) if p not in there]
    if absent:  # perhaps removed by one that died before it was durable: only then it counts as gone
        with store.transaction() as index:
            store.publisher.say_pending(index)
    return absent


def _is_there(txn: ReadTxn, path: StorePath) -> bool:
    row = tables.find_path(txn, path.hash_part.encode())
    return row is not None and row.name == path.name.encode()


def _with_referrers(txn: ReadTxn, paths: Collection[StorePath], *, follow: bool) -> list[StorePath]:
    """Return paths, and if so wanted all that refers to them, each behind those that refer to it."""
    asked = {p.hash_part for p in paths}
    ordered: dict[str, StorePath] = {}
    begun: set[str] = set()
    for path in paths:
        stack = [(path, iter(_referrers(txn, path)))]
        begun.add(path.hash_part)
        while stack:
            here, waiting = stack[-1]
            other = next(waiting, None)
            if other is None:
                stack.pop()
                ordered.setdefault(here.hash_part, here)
            elif other.hash_part not in begun and (follow or other.hash_part in asked):
                begun.add(other.hash_part)
                stack.append((other, iter(_referrers(txn, other))))
    return list(ordered.values())


def _referrers(txn: ReadTxn, path: StorePath) -> list[StorePath]:
    found = []
    for key in tables.referrers(txn, path.hash_part.encode()):
        row = tables.find_path(txn, key)
        if row is not None:
            found.append(StorePath(key.decode(), row.name.decode()))
    return found


def _refuse(txn: ReadTxn, paths: Sequence[StorePath], leaving: set[str]) -> None:
    for path in paths:
        staying = [r for r in _referrers(txn, path) if r.hash_part not in leaving]
        if staying:
            more = len(staying) - 1
            others = f" and {more} more refer to it; remove them" if more else " refers to it; remove that"
            raise InUse(f"{path}: {staying[0]}{others} too (--referrers), or say --force")
