"""How LMDB lays out its data file: structures, and the two meta pages in which a commit ends.

That of LMDB 0.9 (`mdb.c`: MDB_meta, MDB_db, MDB_page, MDB_node) on a little-endian machine. Reads meta pages
with pread and checks them; knows nothing of trees. Synchronous.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

PAGE: Final = struct.Struct("<QHHHH")  # number, padding, flags, lower, upper (or u32: pages)
META: Final = struct.Struct("<IIQQ")
DB: Final = struct.Struct("<IHHQQQQQ")
TAIL: Final = struct.Struct("<QQ")
NODE: Final = struct.Struct("<HHHH")
U64: Final = struct.Struct("<Q")
U32: Final = struct.Struct("<I")

HEADER: Final = PAGE.size
META_SIZE: Final = HEADER + META.size + 2 * DB.size + TAIL.size
MAGIC: Final = 0xBEEFC0DE
VERSION: Final = 1
BRANCH, LEAF, OVERFLOW, META_PAGE = 1, 2, 4, 8
BIG, SUB_DATABASE = 1, 2
INTEGER_KEYS: Final = 8
NOTHING: Final = (1 << 64) - 1
MAX_DEPTH: Final = 31  # one less than LMDB's own stack
MAX_PAGES: Final = (128 << 30) // 512
MAX_KEY: Final = 511


class Wrong(Exception):
    """What is wrong with a page or a tree."""


class Db(NamedTuple):
    """Where a tree begins, and how large it is."""

    padding: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflow: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One of the two places where a commit ends: where the trees of a snapshot begin."""

    page_size: int
    free: Db
    main: Db
    last: int
    snapshot: int


def number_of(key: bytes) -> int:
    """Return the number that a key of the list of free pages is; -1 when it is none."""
    return int(U64.unpack(key)[0]) if len(key) == 8 else -1


def _read_meta(fd: int, page: int, page_size: int) -> Meta:
    """Return what a meta page says, checked as far as it can be by itself. page_size 0: not known yet."""
    raw = os.pread(fd, META_SIZE, page * page_size)
    if len(raw) < META_SIZE:
        raise Wrong("the file is cut short")
    number, _, flags, _, _ = PAGE.unpack_from(raw)
    magic, version, _, _ = META.unpack_from(raw, HEADER)
    at = HEADER + META.size
    free, main = Db(*DB.unpack_from(raw, at)), Db(*DB.unpack_from(raw, at + DB.size))
    last, snapshot = TAIL.unpack_from(raw, at + 2 * DB.size)
    size = free.padding
    if (number, flags, magic, version) != (page, META_PAGE, MAGIC, VERSION):
        raise Wrong(f"page {page} is no meta page of LMDB's")
    if size & (size - 1) or not 512 <= size <= 65536 or (page_size and size != page_size):
        raise Wrong(f"page {page} says a wrong page size")
    if free.flags != INTEGER_KEYS or main.flags or main.padding:
        raise Wrong(f"page {page} says wrong flags")
    if not 1 <= last < MAX_PAGES or (snapshot and snapshot & 1 != page):
        raise Wrong(f"page {page} says a wrong last page or snapshot")
    return Meta(size, free, main, last, snapshot)


def read_metas(fd: int) -> tuple[Meta, Meta]:
    """Return both meta pages; raise Wrong."""
    first = _read_meta(fd, 0, 0)
    second = _read_meta(fd, 1, first.page_size)
    if abs(first.snapshot - second.snapshot) != 1 and (first.snapshot or second.snapshot):
        raise Wrong("its two snapshots do not follow each other")
    return first, second


def heads(fd: int) -> bytes:
    """Return what changes with every commit: both meta pages, wherever the second one lies."""
    first = os.pread(fd, META_SIZE, 0)
    size = U32.unpack_from(first, HEADER + META.size)[0] if len(first) == META_SIZE else 0
    return first + os.pread(fd, META_SIZE, size)
