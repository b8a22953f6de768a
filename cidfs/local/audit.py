"""The index held against the journal and against its own counts: what verification asks this floor.

Synchronous.
"""

from __future__ import annotations

from cidfs.errors import FormatError
from cidfs.formats import frames, journal, record
from cidfs.local.journal import Journal
from cidfs.local.store import LocalStore


def lost_rows(store: LocalStore) -> list[str]:
    """Return a line for each database with another number of rows than its last commit noted."""
    lines = []
    with store.read() as txn:
        for name in sorted(set(txn.index.db) - {"meta"}):
            noted, there = txn.number(f"count:{name}"), txn.entries(name)
            if noted != there:
                lines.append(f"{txn.index.path}: {name} has {there} rows where {noted} were written")
    return lines


def journal_differences(store: LocalStore) -> list[str]:
    """Return a line for each difference between index and journal, and for each damage in the journal."""
    # under the lock, or a publication might be in one and not yet in the other
    with store.state.write_lock(store.lock_timeout):
        replay = Journal(store.state.root / "journal").replay()
        published: dict[str, int] = {}
        for serial in sorted(replay.entries):
            entry = replay.entries[serial]
            if isinstance(entry, journal.Publication):
                published.setdefault(record.decode(entry.record).path.hash_part, serial)
            elif isinstance(entry, journal.Removal):
                published.pop(entry.hash_part, None)
        with store.read() as txn:
            late = {e.serial for _, raw in txn.rows("pending") if raw is not None for e in _entries(raw)}
        indexed = {p.path.hash_part: p.row.serial for p in store.paths()}
        base = store.next_base()
    lines = list(replay.damage)
    try:
        if store.state.inode_limit() < base:
            lines.append(
                f"{store.state.root}/next-inode: below the numbers that were given out; run `cidfs rebuild`"
            )
    except FormatError as e:
        lines.append(str(e))
    lines += [f"journal: serial {s} is in no whole frame" for s in replay.missing if s not in late]
    for hash_part in sorted({*published, *indexed}):
        if published.get(hash_part, indexed.get(hash_part)) in late:
            continue
        if hash_part not in indexed:
            lines.append(f"{hash_part}: in the journal and not in the index; run `cidfs rebuild`")
        elif hash_part not in published:
            lines.append(f"{hash_part}: in the index and not in the journal; run `cidfs rebuild`")
    return lines


def _entries(frame: bytes) -> tuple[journal.Entry, ...]:
    return journal.decode(frames.read_data(frame, frames.read_header(frame))).entries
