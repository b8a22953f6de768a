"""Publishing: the transaction that makes paths visible, and the journal that says it again.

The order is the promise: frames are synced in packs and have rows; one LMDB commit shows name, metadata and
inode range together; then, still under the write lock, the journal has it too, and only then it is "done".
Owns what this process knows of the journal; belongs to one thread, which holds the write lock. Synchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cidfs.errors import ChunkMissing, IndexLost, PathAbsent
from cidfs.formats import journal, record
from cidfs.formats.digest import cid_text
from cidfs.formats.store_path import StorePath
from cidfs.local import tables
from cidfs.local.index import Index, WriteTxn
from cidfs.local.journal import Journal
from cidfs.local.packs import pack_path
from cidfs.local.rows import PLACE_SIZE, PathRow, Place, key_number, number_key
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


class Publisher:
    """Publishes groups of candidates in an index."""

    def __init__(self, state: StateFolder) -> None:
        self._state = state
        self._journal = Journal(state.root / "journal")
        self._journalled: set[int] = set()  # serials that this process knows to be synced in the journal

    def publish(self, index: Index, group: Sequence[Candidate]) -> list[Published]:
        """Publish a group in one transaction and have it in the journal; under the write lock."""
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
            frame = b""
            if entries:
                self._raise_limit(txn, base)
                txn.put_number("next-serial", serial + len(entries))
                txn.put_number("next-base", base)
                frame = journal.encode(entries)
                txn.put("pending", number_key(serial), frame)
        if foreign or frame:
            self._journal.append([*foreign.values(), *([frame] if frame else [])])
            self._journalled.update(foreign)
            if frame:
                self._journalled.add(serial)
        return outcomes

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
