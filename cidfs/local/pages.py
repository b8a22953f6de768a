"""LMDB's pages, read without LMDB: is a data file whole enough to be mapped and trusted?

LMDB follows whatever its pages say: a flipped bit makes it serve an older tree, give out pages that are in
use, or read behind the end of its map, which kills the process. So the file is read here first: with pread
alone, never mapped, every number checked before it is used. What rows hold is none of this module's business
(they have check bytes); it judges pages, the order of keys, and who uses which page. Changes nothing. Safe
beside a writer: LMDB overwrites no page of the newest snapshot before two more were committed, so what was
found counts unless that happened meanwhile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from cidfs.errors import IndexLost
from cidfs.local.files import disk_errors
from cidfs.local.lmdb_layout import (
    BRANCH,
    LEAF,
    MAX_DEPTH,
    NODE,
    NOTHING,
    Meta,
    Wrong,
    heads,
    number_of,
    read_metas,
)
from cidfs.local.lmdb_walk import FREE_DATABASE, MAIN_DATABASE, Walk
from cidfs.local.rows import unseal

ATTEMPTS: Final = 5
MAX_AHEAD: Final = 1 << 20  # pages that were given out and freed again, and never written
DEEP_PAGES: Final = 512  # a file of up to so many is read whole whenever it is opened: 10 ms


def _last_freed(fd: int, meta: Meta) -> int:
    """Return the newest snapshot that the list of free pages names; 0 when it is empty.

    Each commit frees pages and says so under its own number. Where the two differ, the number that decides
    which tree is the newest is not to be trusted.
    """
    walk = Walk(fd, meta, deep=False)
    page = meta.free.root
    if page == NOTHING:
        return 0
    if not 1 <= meta.free.depth <= MAX_DEPTH:
        raise Wrong(f"{FREE_DATABASE}: has a wrong depth")
    for depth in range(meta.free.depth, 0, -1):
        walk.claim(page, 1)
        raw, offsets = walk.read(page, BRANCH if depth > 1 else LEAF)
        low, middle, high, length = NODE.unpack_from(raw, offsets[-1])
        page = low | middle << 16 | high << 32
    return number_of(raw[offsets[-1] + NODE.size : offsets[-1] + NODE.size + length])


def _examine(fd: int, *, deep: bool | None, pinned: bool) -> tuple[list[str], bool]:
    """Return what is wrong with the newest snapshot, and whether that counts."""
    before = heads(fd)
    try:
        metas = read_metas(fd)
        newest = max(metas, key=lambda m: m.snapshot)
        if newest.last > 2 * os.fstat(fd).st_size // newest.page_size + MAX_AHEAD:
            raise Wrong("it says a wrong last page")
        for meta in metas:
            if meta.snapshot > 1 and _last_freed(fd, meta) != meta.snapshot:
                raise Wrong(f"snapshot {meta.snapshot} is another one than it says")
    except Wrong as e:
        return [str(e)], heads(fd) == before
    walk = Walk(fd, newest, deep=newest.last < DEEP_PAGES if deep is None else deep)
    walk.run()
    return walk.found, pinned or _newest(fd) <= newest.snapshot + 1


def _newest(fd: int) -> int:
    try:
        return max(meta.snapshot for meta in read_metas(fd))
    except Wrong:  # just being written
        return NOTHING


def damage(folder: Path, *, deep: bool | None = True, pinned: bool = False) -> list[str]:
    """Return a line for each thing that is wrong with the pages of an index, at most MAX_FINDINGS.

    deep: leaves are read, not only counted; None: where that takes a few milliseconds. pinned: this process
    has a read transaction open, so no page that it sees is overwritten. Without one, beside a writer that
    never rests, nothing can be said and nothing is. Raise DiskFailed, NotPermitted.
    """
    path = folder / "data.mdb"
    if sys.byteorder != "little":
        return []  # LMDB lays its numbers out otherwise there
    with disk_errors(path, "read"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return [f"{path}: the index is gone"]
        try:
            for _ in range(ATTEMPTS):
                found, counts = _examine(fd, deep=deep, pinned=pinned)
                if not found or counts:
                    return [f"{path}: {problem}" for problem in found]
        finally:
            os.close(fd)
    return []


def check(folder: Path, *, deep: bool | None = None) -> None:
    """Raise IndexLost when the pages of an index must not be mapped; as `damage` looks at them."""
    found = damage(folder, deep=deep)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise IndexLost(f"{found[0]}{more}; run `cidfs rebuild`")


def salvage(folder: Path, database: str) -> dict[bytes, bytes]:
    """Return those rows of a database that can be found and have right check bytes, whatever is damaged.

    For an index that must not be mapped any more, and that nobody writes to.
    """
    rows: dict[bytes, bytes] = {}
    name = database.encode()

    def keep(key: bytes, _: int, stored: bytes) -> None:
        value = unseal(name, key, stored)
        if value is not None:
            rows[key] = value

    path = folder / "data.mdb"
    with disk_errors(path, "read"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            newest = max(read_metas(fd), key=lambda m: m.snapshot)
            walk = Walk(fd, newest, deep=True)
            walk.salvaged = database
            walk.tree(MAIN_DATABASE, newest.main, walk.database_row)
            if name in walk.databases:
                walk.tree(database, walk.databases[name], keep)
        except Wrong:
            return {}
        finally:
            os.close(fd)
    return rows
