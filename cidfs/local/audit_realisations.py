"""The realisations of the index held against the journal, and their rows against each other.

What the journal says is taken entry by entry, as the rest of it is read, and judged under the write lock.
Synchronous, changes nothing; of the entries it keeps those that the index did not say alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cidfs.errors import FormatError
from cidfs.formats import journal, realisation
from cidfs.formats.digest import checksum
from cidfs.local import tables
from cidfs.local.index import ReadTxn
from cidfs.local.notes import Note
from cidfs.local.rows import RealisationRow
from cidfs.local.store import LocalStore

REBUILD: Final = "run `cidfs rebuild`"

Check = Callable[[ReadTxn, bytes, bytes | None], Iterable[Note]]
Walk = Callable[[LocalStore, str, Check], Iterator[Note]]


@dataclass(frozen=True, slots=True)
class _Said:
    """What an entry says that the index did not say alike."""

    serial: int
    id: str
    hash_part: bytes
    check: bytes


class SaidRealisations:
    """What the journal says of realisations, as far as the index does not say the same."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._said: dict[bytes, _Said] = {}  # by key: the latest
        self._unsaid: dict[str, int] = {}  # realisations of the index whose serial was not met

    def take(self, entry: journal.Realisation) -> None:
        """Compare an entry with the index as it is now."""
        found = realisation.decode(entry.body)
        key = realisation.key_of(found.id)
        if self._row(key) == (entry.serial, entry.body):
            return
        before = self._said.get(key)
        if before is None or before.serial < entry.serial:
            hash_part = found.store_path.hash_part.encode()
            self._said[key] = _Said(entry.serial, found.id, hash_part, checksum(entry.body))

    def look_at_index(self, next_serial: int, met: Callable[[int], bool]) -> None:
        """Note the realisations whose serial the journal did not say."""
        for serial, found in self._store.realisations():
            if serial < next_serial and not met(serial):
                self._unsaid[found.id] = serial

    def judge(self, met: Callable[[int], bool]) -> Iterator[Note]:
        """Say what differs; under the lock, when all was read."""
        for key, said in self._said.items():
            row, path = self._row(key), self._store.find(said.hash_part)
            if row is None:
                if path is not None and path.serial < said.serial:  # else it went with its path
                    text = f"in the journal and not in the index; {REBUILD}"
                    yield Note("index", said.id, said.id, text)
            elif row.serial < said.serial:
                text = f"serial {row.serial} in the index, and {said.serial} in the journal; {REBUILD}"
                yield Note("index", said.id, said.id, text)
            elif row.serial == said.serial and checksum(row.body) != said.check:
                text = f"index and journal say different things of it; {REBUILD}"
                yield Note("index", said.id, said.id, text)
        for identity, serial in self._unsaid.items():
            row = self._row(realisation.key_of(identity))
            if row is not None and row.serial == serial and not met(serial):
                text = f"in the index and not in the journal; {REBUILD}"
                yield Note("journal", identity, identity, text)

    def _row(self, key: bytes) -> RealisationRow | None:
        raw = self._store.current().get("realisations", key)
        return RealisationRow.unpack(raw) if raw is not None else None


def realisation_notes(store: LocalStore, walk: Walk) -> Iterator[Note]:
    """Check of each realisation that its path is published and known to have it, and the other way round."""
    yield from walk(store, "realisations", _check_realisation)
    with store.read() as txn:
        differ = txn.entries("outputs") != txn.entries("realisations")
    if differ:
        yield from walk(store, "outputs", _check_output)


def _check_realisation(txn: ReadTxn, key: bytes, raw: bytes | None) -> Iterator[Note]:
    if raw is None:
        return
    try:
        found = realisation.decode(RealisationRow.unpack(raw).body)
    except FormatError as e:
        text = f"the realisation {key.hex()} is damaged ({e}); {REBUILD}"
        yield Note("index", f"realisations {key.hex()}", str(txn.index.path), text)
        return
    path = found.store_path
    row = tables.find_path(txn, path.hash_part.encode())
    if row is None or row.name != path.name.encode():
        text = f"came to {found.path}, which is not published; {REBUILD}"
        yield Note("index", found.id, found.id, text)
    if realisation.key_of(found.id) != key or txn.get("outputs", path.hash_part.encode() + key) is None:
        yield Note("index", found.id, found.id, f"the index does not find it by its path; {REBUILD}")


def _check_output(txn: ReadTxn, key: bytes, raw: bytes | None) -> Iterator[Note]:
    stored = txn.get("realisations", key[32:])
    known = stored is not None and realisation.decode(RealisationRow.unpack(stored).body)
    if raw is not None and not (known and known.store_path.hash_part.encode() == key[:32]):
        name = f"{key[:32].decode(errors='backslashreplace')} {key[32:].hex()}"
        text = f"no realisation came to {name}, as the index says; {REBUILD}"
        yield Note("index", f"outputs {name}", str(txn.index.path), text)
