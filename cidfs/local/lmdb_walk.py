"""LMDB's trees, walked page by page without LMDB, every number checked before it is used.

Judges pages, the order of keys, and who uses which page; not what rows hold. Reads with pread alone, changes
nothing; bounded by the pages that the file has, for each is taken once. Synchronous.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from operator import gt, lt
from typing import Final

from cidfs.local.lmdb_layout import (
    BIG,
    BRANCH,
    DB,
    HEADER,
    LEAF,
    MAX_DEPTH,
    MAX_KEY,
    NODE,
    NOTHING,
    OVERFLOW,
    PAGE,
    SUB_DATABASE,
    U32,
    U64,
    Db,
    Meta,
    Wrong,
    number_of,
)

MAX_FINDINGS: Final = 20
FREE_DATABASE: Final = "the list of free pages"
MAIN_DATABASE: Final = "the list of databases"


class _Seen:
    """What was read of a tree, to be compared with what its row says."""

    def __init__(self) -> None:
        self.branches = self.leaves = self.overflow = self.entries = 0


def _ascending(name: str, keys: list[bytes]) -> bool:
    """Say whether keys stand in the order of their database, none twice."""
    if name == FREE_DATABASE:
        numbers = [number_of(key) for key in keys]
        return all(map(lt, numbers, numbers[1:]))
    return all(map(lt, keys, keys[1:]))


class Walk:
    """One reading of a snapshot. deep: leaves are read too, not only counted."""

    def __init__(self, fd: int, meta: Meta, *, deep: bool) -> None:
        self.fd = fd
        self.meta = meta
        self.deep = deep
        self.found: list[str] = []
        self.databases: dict[bytes, Db] = {}
        self.size = meta.page_size
        self.pages = os.fstat(fd).st_size // self.size  # whole ones
        self.users = bytearray(meta.last + 1)  # 0 nobody, 1 a tree, 2 free
        self.users[0:2] = b"\1\1"
        self.used = 2
        self.salvaged = ""  # the database whose values are read too

    def note(self, problem: str) -> None:
        if len(self.found) < MAX_FINDINGS:
            self.found.append(problem)

    # --- pages

    def claim(self, first: int, count: int, *, free: bool = False) -> None:
        if not 2 <= first <= first + count - 1 <= self.meta.last:
            raise Wrong(f"there is no page {first}")
        if not free and first + count > self.pages:
            raise Wrong(f"page {first} lies behind the end of the file, which was cut short")
        if any(self.users[first : first + count]):
            raise Wrong(f"page {first} is used twice")
        self.users[first : first + count] = (b"\2" if free else b"\1") * count
        self.used += count

    def read(self, number: int, flags: int) -> tuple[bytes, tuple[int, ...]]:
        """Return a page of a tree and the offsets of its nodes, which are within it."""
        raw = os.pread(self.fd, self.size, number * self.size)
        if len(raw) < self.size:
            raise Wrong(f"page {number} lies behind the end of the file, which was cut short")
        says, _, kind, lower, upper = PAGE.unpack_from(raw)
        if says != number or kind != flags:
            raise Wrong(f"page {number} is another one than it should be")
        count = (lower - HEADER) >> 1
        if lower & 1 or count < 1 or not lower <= upper <= self.size:
            raise Wrong(f"page {number} has wrong bounds")
        offsets: tuple[int, ...] = struct.unpack_from(f"<{count}H", raw, HEADER)
        if min(offsets) < upper or max(offsets) > self.size - NODE.size:
            raise Wrong(f"page {number} has nodes outside of it")
        return raw, offsets

    def packed(self, number: int, sizes: list[tuple[int, int]], raw: bytes) -> None:
        """Check that nodes fill the end of their page, one behind the other, as LMDB keeps them."""
        sizes.sort()
        at = int(PAGE.unpack_from(raw)[4])
        for offset, size in sizes:
            if offset != at:
                raise Wrong(f"page {number} has nodes of wrong sizes")
            at += size + (size & 1)
        if at != self.size:
            raise Wrong(f"page {number} has nodes of wrong sizes")

    # --- trees

    def tree(self, name: str, db: Db, leaf: Callable[[bytes, int, bytes], None] | None = None) -> None:
        """Walk a tree; leaf is told key, flags and value of each row."""
        seen = _Seen()
        before = len(self.found)
        try:
            if db.root == NOTHING:
                if (db.depth, db.branches, db.leaves, db.overflow, db.entries) != (0, 0, 0, 0, 0):
                    raise Wrong("has no pages, and rows")
                return
            if not 1 <= db.depth <= MAX_DEPTH:
                raise Wrong("has a wrong depth")
            self._descend(name, db.root, db.depth, seen, (None, None), leaf)
        except Wrong as e:
            self.note(f"{name}: {e}")
            return
        there = [seen.branches, seen.leaves, seen.overflow, seen.entries]
        said = [db.branches, db.leaves, db.overflow, db.entries]
        if leaf is None:
            self.used += db.overflow  # they stand in the leaves, which were not read
            there[2:] = said[2:]
        if there != said and len(self.found) == before:
            self.note(f"{name}: has not as many pages and rows as it says")

    def _descend(
        self,
        name: str,
        number: int,
        depth: int,
        seen: _Seen,
        bounds: tuple[bytes | None, bytes | None],
        leaf: Callable[[bytes, int, bytes], None] | None,
    ) -> None:
        """Check a page and all below it. bounds: no key below the first, all below the second."""
        self.claim(number, 1)
        if depth == 1:
            seen.leaves += 1
            if leaf is not None:
                self._leaf(name, number, seen, bounds, leaf)
            return
        seen.branches += 1
        raw, offsets = self.read(number, BRANCH)
        sizes, children, keys = [], [], []
        unpack = NODE.unpack_from
        for offset in offsets:
            low, middle, high, length = unpack(raw, offset)
            end = offset + 8 + length
            sizes.append((offset, 8 + length))
            children.append(low | middle << 16 | high << 32)
            keys.append(raw[offset + 8 : end])
        self.packed(number, sizes, raw)
        limits = [bounds[0], *keys[1:], bounds[1]]  # the first key of a branch page says nothing
        if not _ascending(name, [k for k in limits if k is not None]):
            raise Wrong(f"page {number} has keys in a wrong order")
        if depth == 2 and leaf is None and self._claim_leaves(children):
            seen.leaves += len(children)
            return
        for i, child in enumerate(children):
            try:
                self._descend(name, child, depth - 1, seen, (limits[i], limits[i + 1]), leaf)
            except Wrong as e:
                self.note(f"{name}: {e}")

    def _claim_leaves(self, children: list[int]) -> bool:
        """Claim pages that will not be read, quickly; False and nothing done when one cannot be claimed."""
        users = self.users
        if (
            min(children) < 2
            or max(children) >= min(len(users), self.pages)
            or any(map(users.__getitem__, children))
            or len(set(children)) != len(children)
        ):
            return False
        for child in children:
            users[child] = 1
        self.used += len(children)
        return True

    def _leaf(
        self,
        name: str,
        number: int,
        seen: _Seen,
        bounds: tuple[bytes | None, bytes | None],
        leaf: Callable[[bytes, int, bytes], None],
    ) -> None:
        raw, offsets = self.read(number, LEAF)
        sizes, rows = [], []
        wanted = name in (FREE_DATABASE, MAIN_DATABASE, self.salvaged)
        for offset in offsets:
            low, high, flags, length = NODE.unpack_from(raw, offset)
            at = offset + NODE.size + length
            size = low | high << 16
            if flags & BIG:
                if at + 8 > self.size:
                    raise Wrong(f"page {number} has nodes outside of it")
                inside, big = 8, int(U64.unpack_from(raw, at)[0])
            else:
                inside, big = size, 0
            if flags & ~(BIG | SUB_DATABASE) or not 1 <= length <= MAX_KEY:
                raise Wrong(f"page {number} has a node with wrong flags")
            sizes.append((offset, NODE.size + length + inside))
            rows.append((raw[offset + NODE.size : at], flags, big, at, size))
        self.packed(number, sizes, raw)
        keys = [row[0] for row in rows]
        first, end = bounds
        if not _ascending(name, keys) or (
            (first is not None and first != keys[0] and not _ascending(name, [first, keys[0]]))
            or (end is not None and not _ascending(name, [keys[-1], end]))
        ):
            raise Wrong(f"page {number} has keys in a wrong order")
        seen.entries += len(rows)
        for key, flags, big, at, size in rows:
            if flags & BIG:
                seen.overflow += self._claim_big(big, size)
            if wanted:
                value = self._read_big(big, size) if flags & BIG else raw[at : at + size]
                leaf(key, flags, value)

    def _claim_big(self, number: int, size: int) -> int:
        """Check the pages of a row that is too long for its leaf; return how many."""
        self.claim(number, 1)
        head = os.pread(self.fd, HEADER, number * self.size)
        says, _, kind, _, _ = PAGE.unpack(head)
        count = int(U32.unpack_from(head, 12)[0])
        needed = (HEADER - 1 + size) // self.size + 1
        if says != number or kind != OVERFLOW or count < needed:  # more, where a longer row stood before
            raise Wrong(f"page {number} is another one than it should be")
        if count > 1:
            self.claim(number + 1, count - 1)
        return count

    def _read_big(self, number: int, size: int) -> bytes:
        return os.pread(self.fd, size, number * self.size + HEADER)

    # --- the snapshot

    def free_row(self, key: bytes, flags: int, value: bytes) -> None:
        """Claim the pages that one snapshot freed: their number, and they themselves, the last one first."""
        words = struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8])
        if len(key) != 8 or flags & SUB_DATABASE or not words or words[0] >= len(words):
            raise Wrong("a row of another form than it should be")
        pages = words[1 : 1 + words[0]]
        if not all(map(gt, pages, pages[1:])):
            raise Wrong("pages in a wrong order")
        for page in pages:
            self.claim(page, 1, free=True)

    def database_row(self, key: bytes, flags: int, value: bytes) -> None:
        """Take what the list of databases says of one."""
        db = Db(*DB.unpack(value)) if len(value) == DB.size else None
        if db is None or flags != SUB_DATABASE or db.flags or db.padding:
            raise Wrong(f"a row of another form than it should be ({key!r})")
        self.databases[key] = db

    def run(self) -> None:
        self.tree(FREE_DATABASE, self.meta.free, self.free_row)
        self.tree(MAIN_DATABASE, self.meta.main, self.database_row)
        for name, db in sorted(self.databases.items()):
            self.tree(name.decode("ascii", "replace"), db, (lambda *_: None) if self.deep else None)
        behind = self.users[self.pages :]
        if self.meta.last >= self.pages and behind.count(2) != len(behind):
            self.note(f"the file is cut short: it has {self.pages} pages of {self.meta.last + 1}")
        if not self.found and self.used != self.meta.last + 1:
            self.note(f"it has {self.meta.last + 1} pages, and {self.used} of them are known")
