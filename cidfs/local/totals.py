"""What a store holds, counted. Reads the rows of all paths and packs, a page a transaction. Synchronous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cidfs.local.packs import CACHE
from cidfs.local.state import FIRST_INODE

if TYPE_CHECKING:
    from cidfs.local.store import LocalStore


@dataclass(frozen=True, slots=True)
class Totals:
    """What a store holds. Bytes.

    Logical is the sum of all regular files of all paths, unique that of distinct chunks.
    """

    paths: int
    nodes: int
    files: int
    chunks: int
    manifests: int
    packs: int
    logical: int
    unique: int
    stored: int
    manifest_stored: int
    next_serial: int
    next_base: int
    damaged_rows: int


def count(store: LocalStore) -> Totals:
    """Count what a store holds."""
    nodes = files = logical = unique = stored = manifest_stored = packs = 0
    for published in store.paths():
        nodes += published.row.count
        files += published.row.files
        logical += published.row.size
    for _, row in store.pack_rows():
        if row.frames:
            packs += 1
        if row.kind > CACHE:
            manifest_stored += row.stored
        else:
            unique += row.length
            stored += row.stored
    index = store.current()
    with index.read() as txn:
        return Totals(
            paths=txn.entries("paths"),
            nodes=nodes,
            files=files,
            chunks=txn.entries("chunks"),
            manifests=txn.entries("manifests"),
            packs=packs,
            logical=logical,
            unique=unique,
            stored=stored,
            manifest_stored=manifest_stored,
            next_serial=max(1, txn.number("next-serial")),
            next_base=max(FIRST_INODE, txn.number("next-base")),
            damaged_rows=index.damaged_rows,
        )
