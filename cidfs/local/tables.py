"""How a journal entry changes the index: the one place that turns publications into rows.

Used by the commit of a publication and by rebuild, so both give the same rows. Functions on a write
transaction; synchronous; the caller holds the write lock.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from cidfs.errors import FormatError, IndexLost
from cidfs.formats import journal, realisation, record
from cidfs.local.index import ReadTxn, WriteTxn
from cidfs.local.rows import (
    REMOVED,
    InodeRow,
    PathRow,
    RealisationRow,
    RemovedRow,
    key_number,
    number_key,
    removed_key,
)


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
    try:
        found = list(iterate_publications(txn))
    except IndexLost:
        return None
    return found if len(found) == txn.number("count:paths") else None


def iterate_publications(txn: ReadTxn) -> Iterator[journal.Publication]:
    """Yield what an index has published; raise IndexLost at a row that is lost or damaged."""
    for key, raw in txn.rows("paths"):
        known = txn.get("records", key)
        if raw is None or known is None:
            raise IndexLost(f"{txn.index.path}: {key.decode()} is damaged; run `cidfs rebuild`")
        row = PathRow.unpack(raw)
        yield journal.Publication(row.serial, row.base, row.count, row.flags, known)


def ranges_in(entries: Iterable[journal.Entry], bases: Container[int]) -> list[journal.Entry]:
    """Return publication and removal of some inode bases, by serial: the pairs that say whose they were."""
    found: dict[int, list[journal.Entry]] = {}
    for entry in entries:
        if isinstance(entry, journal.Publication | journal.Removal) and entry.base in bases:
            found.setdefault(entry.base, []).append(entry)
    pairs = [e for both in found.values() if len({type(e) for e in both}) == 2 for e in both]
    return sorted(pairs, key=lambda e: e.serial)


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
    """Take a path out, with the realisations that came to it; who refers to it is not whole any more.

    Its inode range stays, with the name that it had: the kernel may still know both.
    """
    key = entry.hash_part.encode()
    row = find_path(txn, key)
    raw = txn.get("records", key)
    if row is None or raw is None or row.base != entry.base:
        return
    for reference in record.decode(raw).references:
        txn.delete("referrers", reference[:32].encode() + key)
    for each in realised(txn, key):
        txn.delete("realisations", each)
        txn.delete("outputs", key + each)
    txn.delete("paths", key)
    txn.delete("records", key)
    txn.put("meta", removed_key(row.base), RemovedRow(entry.serial, key, row.name).packed())
    txn.put_number("removals", txn.number("removals") + 1)
    _withdraw_whole(txn, key)


def _withdraw_whole(txn: WriteTxn, key: bytes) -> None:
    """Note of all that refers to a path, directly or not, that it is not whole."""
    waiting = [key]
    while waiting:
        for here in referrers(txn, waiting.pop()):
            row = find_path(txn, here)
            if row is not None and row.whole:
                txn.put("paths", here, _with_whole(row, 0).packed())
                waiting.append(here)


def put_realisation(txn: WriteTxn, entry: journal.Realisation) -> None:
    """Write the rows of a realisation, in place of an older one of the same output."""
    found = realisation.decode(entry.body)
    path = found.store_path
    hash_part = path.hash_part.encode()
    row = find_path(txn, hash_part)
    if row is None or row.name != path.name.encode():
        return  # of a path that has gone since
    key = realisation.key_of(found.id)
    old = txn.get("realisations", key)
    if old is not None:  # perhaps of another path, whose removal was lost from the journal
        before = realisation.decode(RealisationRow.unpack(old).body).store_path
        txn.delete("outputs", before.hash_part.encode() + key)
    txn.put("realisations", key, RealisationRow(entry.serial, entry.body).packed())
    txn.put("outputs", hash_part + key, b"")


def realised(txn: ReadTxn, hash_part: bytes) -> list[bytes]:
    """Return the keys of the realisations that came to a path."""
    found = []
    for key, _ in txn.rows("outputs", hash_part):
        if key[:32] != hash_part:
            break
        found.append(key[32:])
    return found


def iterate_realisations(txn: ReadTxn) -> Iterator[journal.Realisation]:
    """Yield the realisations of an index, as the journal would say them; not those whose rows are damaged."""
    for _, raw in txn.rows("realisations"):
        if raw is not None:
            yield journal.Realisation(*RealisationRow.unpack(raw))


def removed_ranges(txn: ReadTxn) -> list[tuple[int, RemovedRow]]:
    """Return inode base and row of the removed paths whose ranges are still kept."""
    found = []
    for key, raw in txn.rows("meta", REMOVED):
        if not key.startswith(REMOVED):
            break
        if raw is not None:
            found.append((key_number(key[len(REMOVED) :]), RemovedRow.unpack(raw)))
    return found


def drop_range(txn: WriteTxn, base: int) -> None:
    """Forget the inode range of a removed path: no mount can know it any more."""
    txn.delete("inodes", number_key(base))
    txn.delete("meta", removed_key(base))
