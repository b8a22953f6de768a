"""Publishing and removing: the transaction that changes what is visible, and the journal that says it again.

The order is the promise: frames are synced in packs and have rows; one LMDB commit shows name, metadata and
inode range together; then, still under the write lock, the journal has it too, and only then it is "done".
Owns what this process knows of the journal; belongs to one thread, which holds the write lock. Synchronous.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cidfs.errors import ChunkMissing, IndexLost, InUse, PathAbsent
from cidfs.formats import journal, realisation, record
from cidfs.formats.digest import cid_text
from cidfs.formats.store_path import StorePath
from cidfs.local import tables
from cidfs.local.index import Index, WriteTxn
from cidfs.local.journal import Journal
from cidfs.local.packs import pack_path
from cidfs.local.rows import PLACE_SIZE, PathRow, Place, RealisationRow, key_number, number_key
from cidfs.local.state import StateFolder

INODE_STEP: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A path that is ready to be published: its frames are synced in packs, and these are their places.

    digests and places run side by side (32 and PLACE_SIZE bytes each), one for each chunk of the manifest.
    One that is already_here brings no frames: only what its record says may be new.
    """

    record: record.Record
    manifest_place: Place
    size: int
    files: int
    digests: bytes | bytearray
    places: bytes | bytearray
    flags: int = 0
    already_here: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a candidate."""

    path: StorePath
    new: bool
    amended: bool = False
    conflict: str = ""


@dataclass(frozen=True, slots=True)
class Realised:
    """What became of a realisation; nothing, where it is there already. absent: its path is not published."""

    id: str
    new: bool
    merged: bool = False
    conflict: str = ""
    absent: bool = False


class Publisher:
    """Publishes groups of candidates in an index."""

    def __init__(self, state: StateFolder) -> None:
        self._state = state
        self._journal = Journal(state.root / "journal")
        self._journalled: set[int] = set()  # serials that this process knows to be synced in the journal
        self._checked: set[int] = set()  # indexes that were found to be no older than the journal

    def publish(self, index: Index, group: Sequence[Candidate]) -> list[Published]:
        """Publish a group in one transaction and have it in the journal; under the write lock."""
        self._check_age(index)
        outcomes: list[Published] = []
        with index.write() as txn:
            foreign = self._settle_pending(txn)
            entries: list[journal.Entry] = []
            serial = txn.needed_number("next-serial")
            base = txn.needed_number("next-base")
            for candidate in group:
                outcome, entry = self._publish_one(txn, candidate, serial + len(entries), base)
                outcomes.append(outcome)
                if entry is not None:
                    entries.append(entry)
                if isinstance(entry, journal.Publication):
                    base += entry.count
            if entries:
                self._raise_limit(txn, base)
                txn.put_number("next-base", base)
            frame = self._note_entries(txn, serial, entries)
        self._say(foreign, serial, frame)
        return outcomes

    def remove(
        self, index: Index, group: Sequence[StorePath], leaving: Container[str], *, force: bool
    ) -> list[StorePath]:
        """Take a group of paths out in one transaction and have it in the journal; under the write lock.

        Return those that were there. Unless forced, raise InUse when something that is not among the hash
        parts `leaving` refers to one of them; then none is taken out.
        """
        self._check_age(index)
        gone: list[StorePath] = []
        with index.write() as txn:
            foreign = self._settle_pending(txn)
            entries: list[journal.Entry] = []
            serial = txn.needed_number("next-serial")
            for path in group:
                key = path.hash_part.encode()
                row = tables.find_path(txn, key)
                if row is None or row.name != path.name.encode():
                    continue
                if txn.get("records", key) is None:
                    raise IndexLost(f"{path}: its record is lost from the index; run `cidfs rebuild`")
                staying = [r for r in tables.referrers(txn, key) if r.decode() not in leaving]
                if staying and not force:
                    raise InUse(f"{path}: {len(staying)} other paths refer to it by now; remove it again")
                entry = journal.Removal(serial + len(entries), row.base, path.hash_part)
                tables.drop_publication(txn, entry)
                entries.append(entry)
                gone.append(path)
            frame = self._note_entries(txn, serial, entries)
        self._say(foreign, serial, frame)
        return gone

    def put_realisations(self, index: Index, group: Sequence[realisation.Realisation]) -> list[Realised]:
        """Put realisations in one transaction and have them in the journal; under the write lock."""
        self._check_age(index)
        outcomes: list[Realised] = []
        with index.write() as txn:
            foreign = self._settle_pending(txn)
            entries: list[journal.Realisation] = []
            serial = txn.needed_number("next-serial")
            for value in group:
                outcome, body = self._put_one(txn, value)
                outcomes.append(outcome)
                if body:
                    entries.append(journal.Realisation(serial + len(entries), body))
                    tables.put_realisation(txn, entries[-1])
            frame = self._note_entries(txn, serial, entries)
        self._say(foreign, serial, frame)
        return outcomes

    @staticmethod
    def _put_one(txn: WriteTxn, new: realisation.Realisation) -> tuple[Realised, bytes]:
        """Return what becomes of a realisation, and the bytes to write; empty for nothing."""
        path = new.store_path
        row = tables.find_path(txn, path.hash_part.encode())
        if row is None or row.name != path.name.encode():
            return Realised(new.id, new=False, absent=True), b""
        raw = txn.get("realisations", realisation.key_of(new.id))
        if raw is None:
            return Realised(new.id, new=True), realisation.encode(new)
        old = realisation.decode(RealisationRow.unpack(raw).body)
        reason = realisation.difference(old, new)
        if reason:
            return Realised(new.id, new=False, conflict=f"{new.id}: {reason}; the first stays"), b""
        merged = realisation.merge(old, new)
        if merged == old:
            return Realised(new.id, new=False), b""
        return Realised(new.id, new=False, merged=True), realisation.encode(merged)

    def say_pending(self, index: Index) -> None:
        """Have all of `pending` in the journal; under the write lock."""
        self._check_age(index)
        with index.write() as txn:
            foreign = self._settle_pending(txn)
        self._say(foreign, 0, b"")

    def write_checkpoint(
        self, index: Index, serials: Sequence[int], entries: Iterable[journal.Entry]
    ) -> None:
        """Replace the journal by a checkpoint of what is live, then empty `pending`.

        Under the write lock, with all of `pending` in the journal.
        """
        with index.read() as txn:
            serial, base = txn.needed_number("next-serial"), txn.needed_number("next-base")
        self._journal.write_checkpoint(entries, serial, base, serials=serials)
        with index.write() as txn:
            for key, _ in list(txn.rows("pending")):
                txn.delete("pending", key)
        self._journalled.clear()

    def _check_age(self, index: Index) -> None:
        """Raise IndexLost for an index that is older than the journal: it would give numbers out twice."""
        if index.number in self._checked:
            return
        with index.read() as txn:
            serial = txn.needed_number("next-serial")
        if self._journal.last_serial() >= serial:
            raise IndexLost(
                f"{index.path}: the index is older than the journal; run `cidfs --state {self._state.root}"
                " rebuild`"
            )
        self._checked.add(index.number)

    @staticmethod
    def _note_entries(txn: WriteTxn, serial: int, entries: Sequence[journal.Entry]) -> bytes:
        """Put the frame of what a transaction did into `pending` and return it; empty for nothing."""
        if not entries:
            return b""
        txn.put_number("next-serial", serial + len(entries))
        frame = journal.encode(entries)
        txn.put("pending", number_key(serial), frame)
        return frame

    def _say(self, foreign: dict[int, bytes], serial: int, frame: bytes) -> None:
        """Append to the journal what other processes left in `pending`, and the frame of this one."""
        if foreign or frame:
            self._journal.append([*foreign.values(), *([frame] if frame else [])])
            self._journalled.update(foreign)
            if frame:
                self._journalled.add(serial)

    def settle(self, index: Index) -> None:
        """Take out of `pending` what is in the journal, so that the next process need not say it again."""
        if self._journalled:
            with index.write() as txn:
                self._settle_pending(txn)

    def _settle_pending(self, txn: WriteTxn) -> dict[int, bytes]:
        """Drop what this process knows to be in the journal.

        Return the frames that it does not know to be there.
        """
        unknown: dict[int, bytes] = {}
        for key, raw in list(txn.rows("pending")):
            serial = key_number(key)
            if serial in self._journalled:
                txn.delete("pending", key)
            elif raw is not None:
                unknown[serial] = raw
        self._journalled.clear()
        return unknown

    def _raise_limit(self, txn: WriteTxn, base: int) -> None:
        if base > txn.number("limit"):
            limit = max(base, self._state.inode_limit()) + INODE_STEP
            self._state.write_inode_limit(limit)
            txn.put_number("limit", limit)

    def _publish_one(
        self, txn: WriteTxn, candidate: Candidate, serial: int, base: int
    ) -> tuple[Published, journal.Publication | journal.Amendment | None]:
        rec = candidate.record
        key = rec.path.hash_part.encode()
        row = tables.find_path(txn, key)
        if row is not None:
            return self._publish_again(txn, rec, row, serial)
        if candidate.already_here:
            raise PathAbsent(f"{rec.path}: removed by another process meanwhile; add it again")
        self._restore(txn, "manifests", rec.manifest, candidate.manifest_place)
        for i in range(len(candidate.digests) // 32):
            digest = bytes(candidate.digests[32 * i : 32 * i + 32])
            if txn.get("chunks", digest) is None:
                place = Place.unpack(bytes(candidate.places[PLACE_SIZE * i : PLACE_SIZE * (i + 1)]))
                self._restore(txn, "chunks", digest, place)
        entry = journal.Publication(
            serial, base, rec.node_count, candidate.flags, record.encode(rec, hints=False)
        )
        tables.put_publication(txn, entry, rec, size=candidate.size, files=candidate.files)
        return Published(rec.path, new=True), entry

    def _restore(self, txn: WriteTxn, database: str, digest: bytes, place: Place) -> None:
        """Put back a row that went while the ingest ran; its pack waits for the ingest."""
        if txn.get(database, digest) is not None:
            return
        if not pack_path(self._state.root, place.kind, place.pack).exists():
            raise ChunkMissing(
                f"{cid_text(digest)}: its pack is gone since it was stored; add the path again"
            )
        txn.put_place(database, digest, place)

    @staticmethod
    def _publish_again(
        txn: WriteTxn, rec: record.Record, row: PathRow, serial: int
    ) -> tuple[Published, journal.Amendment | None]:
        raw = txn.get("records", rec.path.hash_part.encode())
        if raw is None:
            raise IndexLost(f"{rec.path}: its record is lost from the index; run `cidfs rebuild`")
        old = record.decode(raw)
        reason = ""
        if row.name != rec.path.name.encode():
            reason = f"{rec.path}: the hash part is published as {old.path}"
        elif row.manifest != rec.manifest:
            reason = f"{rec.path}: published with other contents; the first stays"
        elif old.references != rec.references and rec.references:
            reason = f"{rec.path}: published with other references; the first stays"
        if reason:
            return Published(rec.path, new=False, conflict=reason), None
        merged = record.merge(old, rec)
        if merged == old:
            return Published(rec.path, new=False), None
        amendment = journal.Amendment(serial, row.base, record.encode(merged, hints=False))
        tables.put_amendment(txn, amendment)
        return Published(rec.path, new=False, amended=True), amendment
