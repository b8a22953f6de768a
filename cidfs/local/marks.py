"""Marks: which rows of an index database something still needs, in a few bytes a row.

A row is known by the first 8 bytes of its digest; rows that share them are needed together. One instance
belongs to one thread.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import islice

from cidfs.errors import IndexLost
from cidfs.formats.frames import HEADER_SIZE
from cidfs.local.rows import Place, number_key
from cidfs.local.store import LocalStore


def prefix_of(digest: bytes) -> int:
    """Return the number by which a digest's row is marked."""
    return int.from_bytes(digest[:8], "big")


class Marks:
    """All rows of `chunks` or `manifests` at one moment: where each lies, and whether it is needed."""

    def __init__(self, store: LocalStore, database: str) -> None:
        """Read all rows; raise IndexLost where one is damaged or gone: what it told of would look dead."""
        self.database = database
        self.packs: list[bytes] = []
        self.missing: set[int] = set()  # needed, and without a row
        self._numbers: dict[bytes, int] = {}
        self._prefixes = array("Q")
        self._pack = array("L")
        self._size = array("L")
        with store.read() as txn:
            for key, raw in txn.rows(database):
                if raw is None:
                    raise IndexLost(
                        f"{txn.index.path}: a row of `{database}` is damaged; run `cidfs rebuild`"
                    )
                place = Place.unpack(raw)
                number = self._numbers.get(place.pack)
                if number is None:
                    number = self._numbers[place.pack] = len(self.packs)
                    self.packs.append(place.pack)
                self._prefixes.append(prefix_of(key))
                self._pack.append(number)
                self._size.append(place.stored + HEADER_SIZE)
            noted = txn.number(f"count:{database}")
            if noted != len(self._prefixes):
                raise IndexLost(
                    f"{txn.index.path}: {len(self._prefixes)} rows of `{database}` where {noted} were"
                    " written; run `cidfs rebuild`"
                )
        self._needed = bytearray(len(self._prefixes))

    def __len__(self) -> int:
        return len(self._prefixes)

    def need(self, wanted: Iterable[int], *, new: bool = False) -> None:
        """Mark rows as needed; those that are not there are noted in `missing`, but for new ones."""
        prefixes, needed, end = self._prefixes, self._needed, len(self._prefixes)
        for prefix in wanted:
            at = bisect_left(prefixes, prefix)
            if not new and (at == end or prefixes[at] != prefix):
                self.missing.add(prefix)
            while at < end and prefixes[at] == prefix:
                needed[at] = 1
                at += 1

    def is_needed(self, prefix: int) -> bool:
        """Say whether a row that was there at the start is needed."""
        at = bisect_left(self._prefixes, prefix)
        return at < len(self._prefixes) and self._prefixes[at] == prefix and bool(self._needed[at])

    def live_bytes(self) -> dict[bytes, int]:
        """Return for each pack the bytes of its frames that are needed; 0 for one without any."""
        sums = [0] * len(self.packs)
        for number, size, needed in zip(self._pack, self._size, self._needed, strict=True):
            if needed:
                sums[number] += size
        return dict(zip(self.packs, sums, strict=True))

    def dead(self) -> tuple[int, int]:
        """Return how many rows are not needed, and the bytes of their frames."""
        sizes = [size for size, needed in zip(self._size, self._needed, strict=True) if not needed]
        return len(sizes), sum(sizes)

    def dead_batches(self, size: int) -> Iterator[list[int]]:
        """Yield the rows that are not needed, so many at a time; marks may be set meanwhile."""
        dead = (p for i, p in enumerate(self._prefixes) if not self._needed[i])
        while batch := list(islice(dead, size)):
            yield batch

    def rows_in(self, pack: bytes) -> list[int]:
        """Return the rows that lie in a pack."""
        number = self._numbers.get(pack)
        return [p for p, where in zip(self._prefixes, self._pack, strict=True) if where == number]


def key_of(prefix: int) -> bytes:
    """Return the first possible key of a marked row."""
    return number_key(prefix)
