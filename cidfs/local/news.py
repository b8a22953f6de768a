"""News: what became whole since it was looked last, by whichever process published it.

For a mount, which must show new names in overlays before anybody hears that they are valid. Something becomes
whole at a serial by a publication with that serial: it is that path, or one that refers to it, directly or
not. So the new inode ranges, followed to their referrers, are all there is to look at. Belongs to one thread
at a time; synchronous.
"""

from __future__ import annotations

from dataclasses import dataclass

from cidfs.local import tables
from cidfs.local.index import ReadTxn
from cidfs.local.lookups import Lookups
from cidfs.local.rows import InodeRow, number_key


@dataclass(frozen=True, slots=True)
class Fresh:
    """What became whole up to a serial. names are those in the store directory.

    With everything, nobody can say which names are new: another index counts.
    """

    serial: int
    names: tuple[bytes, ...]
    everything: bool
    seen: tuple[int, int, int]


class News:
    """What became whole since the last look that was accepted."""

    def __init__(self, store: Lookups) -> None:
        self._store = store
        with store.read() as txn:
            self._seen = _moment(txn)

    @property
    def serial(self) -> int:
        """The serial up to which all is known."""
        return self._seen[1]

    def look(self) -> Fresh | None:
        """Return what is new, or None; the same again until it is accepted."""
        self._store.refresh()
        with self._store.read() as txn:
            seen = _moment(txn)
            if seen[:2] == self._seen[:2]:
                return None
            everything = seen[0] != self._seen[0]
            names = () if everything else tuple(self._names(txn))
        return Fresh(seen[1], names, everything, seen)

    def accept(self, fresh: Fresh) -> None:
        """Count what was looked at as known."""
        self._seen = fresh.seen

    def _names(self, txn: ReadTxn) -> list[bytes]:
        _, serial, base = self._seen
        found: dict[bytes, bytes] = {}
        for _, raw in txn.rows("inodes", number_key(base)):
            waiting = [InodeRow.unpack(raw).hash_part] if raw is not None else []
            while waiting:
                here = waiting.pop()
                row = tables.find_path(txn, here) if here not in found else None
                if row is not None and row.whole > serial:
                    found[here] = here + b"-" + row.name
                    waiting += tables.referrers(txn, here)
        return list(found.values())


def _moment(txn: ReadTxn) -> tuple[int, int, int]:
    """Return which index counts, the last serial in it, and its next inode base."""
    return txn.index.number, txn.number("next-serial") - 1, txn.number("next-base")
