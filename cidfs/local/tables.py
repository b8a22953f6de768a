"""How a journal entry changes the index: the one place that turns publications into rows.

Used by the commit of a publication and by rebuild, so both give the same rows. Functions on a write
transaction; synchronous; the caller holds the write lock.
"""

from __future__ import annotations

from cidfs.errors import FormatError
from cidfs.formats import journal, record
from cidfs.local.index import ReadTxn, WriteTxn
from cidfs.local.rows import InodeRow, PathRow, number_key


def find_path(txn: ReadTxn, hash_part: bytes) -> PathRow | None:
    """Return the row of a published path."""
    row = txn.get("paths", hash_part)
    return PathRow.unpack(row) if row is not None else None


def put_publication(
    txn: WriteTxn, entry: journal.Publication, rec: record.Record, *, size: int, files: int
) -> None:
    """Write all rows of a publication: name, record, inode range, referrers, and who becomes whole by it."""
    key = rec.path.hash_part.encode()
    row = PathRow(
        base=entry.base,
        count=entry.count,
        serial=entry.serial,
        whole=0,
        flags=entry.flags,
        size=size,
        files=files,
        manifest=rec.manifest,
        root_row=rec.root_row,
        name=rec.path.name.encode(),
    )
    txn.put("paths", key, row.packed())
    txn.put("records", key, entry.record)
    txn.put("inodes", number_key(entry.base), InodeRow(key, entry.count, rec.manifest).packed())
    for reference in rec.references:
        txn.put("referrers", reference[:32].encode() + key, b"")
    _make_whole(txn, key, entry.serial)


def _make_whole(txn: WriteTxn, key: bytes, serial: int) -> None:
    """Note the serial at which a path, and then each of its referrers, became whole."""
    waiting = [key]
    while waiting:
        here = waiting.pop()
        row = find_path(txn, here)
        raw = txn.get("records", here)
        if row is None or row.whole or raw is None:
            continue
        references = [r[:32].encode() for r in record.decode(raw).references]
        if all(r == here or _is_whole(txn, r) for r in references):
            txn.put("paths", here, _with_whole(row, serial).packed())
            waiting.extend(referrers(txn, here))


def _is_whole(txn: ReadTxn, key: bytes) -> bool:
    row = find_path(txn, key)
    return row is not None and row.whole > 0


def _with_whole(row: PathRow, serial: int) -> PathRow:
    return PathRow(
        row.base,
        row.count,
        row.serial,
        serial,
        row.flags,
        row.size,
        row.files,
        row.manifest,
        row.root_row,
        row.name,
    )


def publications(txn: ReadTxn) -> list[journal.Publication] | None:
    """Return what an index has published, as the journal would say it.

    None when a row of it is lost or damaged.
    """
    found: list[journal.Publication] = []
    for key, raw in txn.rows("paths"):
        known = txn.get("records", key)
        if raw is None or known is None:
            return None
        row = PathRow.unpack(raw)
        found.append(journal.Publication(row.serial, row.base, row.count, row.flags, known))
    return found if len(found) == txn.number("count:paths") else None


def referrers(txn: ReadTxn, hash_part: bytes) -> list[bytes]:
    """Return the hash parts of the published paths that refer to a path, itself left out."""
    found = []
    for key, _ in txn.rows("referrers", hash_part):
        if key[:32] != hash_part:
            break
        if key[32:] != hash_part:
            found.append(key[32:])
    return found


def put_amendment(txn: WriteTxn, entry: journal.Amendment) -> None:
    """Give a published path another record under the same manifest and base."""
    rec = record.decode(entry.record)
    key = rec.path.hash_part.encode()
    row = find_path(txn, key)
    if row is None or row.base != entry.base:
        return  # of a publication that has gone since
    if row.manifest != rec.manifest:
        raise FormatError(f"journal: amendment {entry.serial} of {rec.path} names another manifest")
    txn.put("records", key, entry.record)


def drop_publication(txn: WriteTxn, entry: journal.Removal) -> None:
    """Take a path out. Its inode range stays: the kernel may still know its numbers."""
    key = entry.hash_part.encode()
    row = find_path(txn, key)
    raw = txn.get("records", key)
    if row is None or raw is None or row.base != entry.base:
        return
    for reference in record.decode(raw).references:
        txn.delete("referrers", reference[:32].encode() + key)
    txn.delete("paths", key)
    txn.delete("records", key)
