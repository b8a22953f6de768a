"""A manifest: the tree of one store path.

Built once, encoded to deterministic bytes, opened without decoding.

    header, 32 bytes    "cidfsmf1", u32 nodes, u32 chunks, u32 bytes of names, u32 zero,
                        u64 sum of all file sizes
    node table          rows of 32 bytes: u32 name offset, u16 name length, u8 type, u8 zero, u64 size,
                        u32 first, u32 count, u32 parent, u32 zero
    chunk table         rows of 40 bytes: digest 32, u64 end offset within its file
    names               of each node its name, then a symlink's target

Node 0 is the root (without a name, its own parent); then breadth first, so a directory's children are
contiguous, and sorted bytewise. size: bytes of a file or of a target, else 0. first and count: children of a
directory, chunks of a file, offset of a symlink's target and 0. Chunks stand in node order, each file's own.
Same tree, same bytes, same CID.

Pure. `Manifest` is immutable and safe for several threads. `manifest_builder` makes the bytes.
"""

from __future__ import annotations

import stat
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple

from cidfs.errors import FormatError
from cidfs.formats.chunking import MAXIMUM
from cidfs.formats.frames import MAX_MANIFEST
from cidfs.formats.nar import MAX_DEPTH, MAX_TARGET, check_entry_name

MAGIC: Final = b"cidfsmf1"
MAX_NODES: Final = 1 << 24
HEADER: Final = struct.Struct("<8sIIIIQ")
NODE_ROW: Final = struct.Struct("<IHBBQIIII")
CHUNK_ROW: Final = struct.Struct("<32sQ")
END_OFFSET: Final = struct.Struct("<Q")
NODE_SIZE: Final = NODE_ROW.size
_TYPE_AT: Final = 6  # within a row
ENTRY_SIZE: Final = CHUNK_ROW.size

DIRECTORY: Final = 1
FILE: Final = 2
EXECUTABLE: Final = 3
SYMLINK: Final = 4
MODES: Final = {
    DIRECTORY: stat.S_IFDIR | 0o555,
    FILE: stat.S_IFREG | 0o444,
    EXECUTABLE: stat.S_IFREG | 0o555,
    SYMLINK: stat.S_IFLNK | 0o777,
}
"""The mode of each node type: Nix's canonical ones."""


class Node(NamedTuple):
    """One row of the node table."""

    name_offset: int
    name_length: int
    type: int
    size: int
    first: int
    count: int  # type: ignore[assignment]  # the tuple method of this name is not used
    parent: int

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file, executable or not."""
        return self.type in (FILE, EXECUTABLE)


class ChunkSpan(NamedTuple):
    """A chunk of a file: its digest, and the bytes of the file that it holds."""

    digest: bytes
    start: int
    end: int


def decode_node(row: bytes | memoryview, offset: int = 0) -> Node:
    """Return the node of a 32-byte row.

    Raise FormatError for an impossible type or reserved bytes that are set.
    """
    if len(row) - offset < NODE_SIZE:
        raise FormatError(f"manifest: {len(row) - offset} bytes where a node's row stands")
    fields = NODE_ROW.unpack_from(row, offset)
    name_offset, length, kind, zero, size, first, count, parent, zero2 = fields
    if kind not in MODES or zero or zero2:
        raise FormatError(f"manifest: node row with type {kind} at offset {offset}")
    return Node(name_offset, length, kind, size, first, count, parent)


class Manifest:
    """A read-only view of a manifest's bytes.

    Opening checks the section sizes; `validate` checks every row and is for bytes from outside. Every method
    checks its bounds and raises FormatError rather than answer from outside the tables.
    """

    __slots__ = ("_chunks_at", "_data", "_names_at", "chunk_count", "node_count", "total_size")

    def __init__(self, data: bytes) -> None:
        if len(data) < HEADER.size:
            raise FormatError(f"manifest: {len(data)} bytes are too few for a header")
        magic, nodes, chunks, names, zero, total = HEADER.unpack_from(data)
        if magic != MAGIC or zero:
            raise FormatError("manifest: no magic, or reserved bytes set")
        if not 0 < nodes <= MAX_NODES or len(data) > MAX_MANIFEST:
            raise FormatError(f"manifest: {nodes} nodes in {len(data)} bytes")
        self._data = data
        self.node_count: int = nodes
        self.chunk_count: int = chunks
        self.total_size: int = total
        self._chunks_at = HEADER.size + nodes * NODE_SIZE
        self._names_at = self._chunks_at + chunks * ENTRY_SIZE
        if len(data) != self._names_at + names:
            raise FormatError(f"manifest: {len(data)} bytes where its header says {self._names_at + names}")

    def __len__(self) -> int:
        return len(self._data)

    def count_of(self, kind: int) -> int:
        """Return how many nodes are of a type."""
        return self._data[HEADER.size + _TYPE_AT : self._chunks_at : NODE_SIZE].count(kind)

    def row(self, index: int) -> bytes:
        """Return the 32 bytes of a node's row."""
        if not 0 <= index < self.node_count:
            raise FormatError(f"manifest: node {index} of {self.node_count}")
        at = HEADER.size + index * NODE_SIZE
        return self._data[at : at + NODE_SIZE]

    def node(self, index: int) -> Node:
        """Return a node by its position."""
        if not 0 <= index < self.node_count:
            raise FormatError(f"manifest: node {index} of {self.node_count}")
        return decode_node(self._data, HEADER.size + index * NODE_SIZE)

    def _names(self, offset: int, length: int) -> bytes:
        start = self._names_at + offset
        if start + length > len(self._data):
            raise FormatError(f"manifest: name at {offset} lies outside")
        return self._data[start : start + length]

    def name(self, node: Node) -> bytes:
        """Return a node's name; empty for the root."""
        return self._names(node.name_offset, node.name_length)

    def target(self, node: Node) -> bytes:
        """Return a symlink's target."""
        if node.type != SYMLINK or node.size > MAX_TARGET:
            raise FormatError("manifest: no symlink")
        return self._names(node.first, node.size)

    def children(self, node: Node) -> range:
        """Return the positions of a directory's children, sorted by name."""
        if node.type != DIRECTORY or node.first + node.count > self.node_count:
            raise FormatError("manifest: children outside the table")
        return range(node.first, node.first + node.count)

    def find(self, node: Node, name: bytes) -> int | None:
        """Return the position of a directory's child, or None. A bisection over the encoded rows."""
        low, high = node.first, node.first + node.count
        if node.type != DIRECTORY or high > self.node_count:
            raise FormatError("manifest: children outside the table")
        data, names_at, unpack = self._data, self._names_at, _NAME.unpack_from
        while low < high:
            middle = (low + high) >> 1
            offset, length = unpack(data, HEADER.size + middle * NODE_SIZE)
            at = names_at + offset
            here = data[at : at + length]
            if here < name:
                low = middle + 1
            elif here == name:
                return middle
            else:
                high = middle
        return None

    def chunk(self, index: int) -> tuple[bytes, int]:
        """Return digest and end offset of a row of the chunk table."""
        if not 0 <= index < self.chunk_count:
            raise FormatError(f"manifest: chunk {index} of {self.chunk_count}")
        digest, end = CHUNK_ROW.unpack_from(self._data, self._chunks_at + index * ENTRY_SIZE)
        return digest, end

    def prefixes(self) -> array[int]:
        """Return the first 8 bytes of each chunk's digest as a big-endian number, in the table's order."""
        table = array("Q", self._data[self._chunks_at : self._names_at])
        if sys.byteorder == "little":
            table.byteswap()
        return table[:: ENTRY_SIZE // 8]

    def spans(self, node: Node, offset: int = 0, size: int | None = None) -> Iterator[ChunkSpan]:
        """Yield the chunks of a file that hold size bytes from offset on (all to the end by default)."""
        if not node.is_file or node.first + node.count > self.chunk_count:
            raise FormatError("manifest: chunks outside the table")
        stop = node.size if size is None else min(node.size, offset + size)
        if offset >= stop:
            return
        base = self._chunks_at + node.first * ENTRY_SIZE + 32
        data = self._data
        low = 0
        if offset:
            low = bisect_right(
                range(node.count),
                offset,
                key=lambda i: END_OFFSET.unpack_from(data, base + i * ENTRY_SIZE)[0],
            )
        start = END_OFFSET.unpack_from(data, base + (low - 1) * ENTRY_SIZE)[0] if low else 0
        while start < stop:
            if low >= node.count:
                raise FormatError("manifest: chunks end before their file")
            digest, end = CHUNK_ROW.unpack_from(data, base - 32 + low * ENTRY_SIZE)
            if not start < end <= start + MAXIMUM:
                raise FormatError("manifest: a chunk of impossible length")
            yield ChunkSpan(digest, start, end)
            start = end
            low += 1

    def resolve(self, path: bytes) -> int | None:
        """Return the node at a relative path, or None.

        Components are separated by slashes; no links are followed.
        """
        index = 0
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            node = self.node(index)
            found = self.find(node, part) if node.type == DIRECTORY else None
            if found is None:
                return None
            index = found
        return index

    def walk(self) -> Iterator[tuple[int, Node]]:
        """Yield position and node of the whole tree, parents before children, in NAR order.

        Raise FormatError where a node is not its directory's alone, so that this ends for any bytes.
        """
        pending = [(0, iter(range(1)))]
        while pending:
            parent, rest = pending[-1]
            index = next(rest, None)
            if index is None:
                pending.pop()
                continue
            node = self.node(index)
            if node.parent != parent:
                raise FormatError(f"manifest: node {index} is not among its parent's children")
            yield index, node
            if node.type == DIRECTORY and node.count:
                children = self.children(node)
                if children.start <= index:
                    raise FormatError(f"manifest: directory {index} stands behind its children")
                pending.append((index, iter(children)))

    def path(self, index: int) -> bytes:
        """Return a node's path within its store path; empty for the root."""
        parts = []
        while index:
            node = self.node(index)
            if node.parent >= index:
                raise FormatError("manifest: a node before its parent")
            parts.append(self.name(node))
            index = node.parent
        return b"/".join(reversed(parts))

    def validate(self) -> Manifest:
        """Check every row against the canonical form and return self.

        Raise FormatError naming the first wrong one.
        """
        next_child, next_chunk, next_name, total = 1, 0, 0, 0
        depth = array("H", [0])
        last = b""
        for index in range(self.node_count):
            node = self.node(index)
            name = self.name(node)
            if node.name_offset != next_name:
                raise FormatError(f"manifest: name of node {index} is out of place")
            next_name += node.name_length
            if index:
                try:
                    check_entry_name(name)
                except FormatError as e:
                    raise FormatError(f"manifest: node {index}: {e}") from None
                if node.parent >= index:
                    raise FormatError(f"manifest: node {index} stands before its parent")
                parent = self.node(node.parent)
                if parent.type != DIRECTORY or not parent.first <= index < parent.first + parent.count:
                    raise FormatError(f"manifest: node {index} is not among its parent's children")
                if index > parent.first and name <= last:
                    raise FormatError(f"manifest: node {index} is out of order")
                depth.append(depth[node.parent] + 1)
                if depth[index] > MAX_DEPTH:
                    raise FormatError(f"manifest: nested deeper than {MAX_DEPTH}")
                last = name
            elif name or node.parent:
                raise FormatError("manifest: the root has a name or a parent")
            if node.type == DIRECTORY:
                if node.size or node.first != (next_child if node.count else 0):
                    raise FormatError(f"manifest: directory {index} is out of place")
                next_child += node.count
            elif node.type == SYMLINK:
                if not 0 < node.size <= MAX_TARGET or node.count or node.first != next_name:
                    raise FormatError(f"manifest: symlink {index} is out of place")
                if b"\0" in self.target(node):
                    raise FormatError(f"manifest: target of symlink {index} holds a zero byte")
                next_name += node.size
            else:
                if node.first != (next_chunk if node.count else 0) or bool(node.size) != bool(node.count):
                    raise FormatError(f"manifest: file {index} is out of place")
                end = 0
                for span in self.spans(node):
                    end = span.end
                    next_chunk += 1
                if end != node.size or next_chunk != (node.first + node.count if node.count else next_chunk):
                    raise FormatError(f"manifest: chunks of file {index} do not fill it")
                total += node.size
        if next_child != self.node_count or next_chunk != self.chunk_count or total != self.total_size:
            raise FormatError("manifest: header does not fit its tables")
        if self._names_at + next_name != len(self._data):
            raise FormatError("manifest: names that no node has")
        return self


_NAME: Final = struct.Struct("<IH")
