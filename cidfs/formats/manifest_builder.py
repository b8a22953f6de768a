"""Build a manifest: nodes in NAR order go in, the deterministic bytes of `manifest` come out.

Pure; a builder belongs to one thread.
"""

from __future__ import annotations

from array import array

from cidfs.errors import FormatError
from cidfs.formats.frames import MAX_MANIFEST
from cidfs.formats.manifest import (
    DIRECTORY,
    END_OFFSET,
    ENTRY_SIZE,
    EXECUTABLE,
    FILE,
    HEADER,
    MAGIC,
    MAX_NODES,
    NODE_ROW,
    NODE_SIZE,
    SYMLINK,
)
from cidfs.formats.nar import MAX_DEPTH, MAX_TARGET


class ManifestBuilder:
    """Take the nodes of a tree in NAR order (depth first, entries sorted) and encode them.

    Digests come separately and later than nodes, in the same order: compression runs behind reading. About 60
    bytes of memory a node and 40 a chunk.
    """

    def __init__(self) -> None:
        self._types = bytearray()
        self._parents = array("I")
        self._sizes = array("Q")
        self._names = bytearray()
        self._name_ends = array("Q")
        self._targets: dict[int, bytes] = {}
        self._first_chunk = array("Q")
        self._chunk_counts = array("I")
        self._ends = array("Q")
        self.digests = bytearray()
        self._open: list[int] = []
        self._by_depth: list[array[int]] = []

    @property
    def node_count(self) -> int:
        """How many nodes there are so far."""
        return len(self._types)

    @property
    def chunk_count(self) -> int:
        """How many chunks the files so far refer to."""
        return len(self._ends)

    def _add(self, kind: int, name: bytes, size: int) -> int:
        index = len(self._types)
        if index >= MAX_NODES:
            raise FormatError(f"more than {MAX_NODES} files and directories in one store path")
        depth = len(self._open)
        if depth > MAX_DEPTH:
            raise FormatError(f"directories nested deeper than {MAX_DEPTH}")
        if depth == len(self._by_depth):
            self._by_depth.append(array("I"))
        self._by_depth[depth].append(index)
        self._types.append(kind)
        self._parents.append(self._open[-1] if self._open else 0)
        self._sizes.append(size)
        self._names += name
        self._name_ends.append(len(self._names))
        self._first_chunk.append(len(self._ends))
        self._chunk_counts.append(0)
        return index

    def enter(self, name: bytes) -> None:
        """A directory begins."""
        self._open.append(self._add(DIRECTORY, name, 0))

    def leave(self) -> None:
        """The directory that was entered last ends."""
        self._open.pop()

    def symlink(self, name: bytes, target: bytes) -> None:
        """A symlink."""
        if not 0 < len(target) <= MAX_TARGET:
            raise FormatError(f"a symlink's target of {len(target)} bytes")
        self._targets[self._add(SYMLINK, name, len(target))] = target

    def file(self, name: bytes, executable: bool) -> None:
        """A file begins; chunk() follows for each of its chunks."""
        self._add(EXECUTABLE if executable else FILE, name, 0)

    def chunk(self, length: int) -> None:
        """The next chunk of the file that was begun last; its digest goes into `digests` when it is known."""
        self._sizes[-1] += length
        self._ends.append(self._sizes[-1])
        self._chunk_counts[-1] += 1

    def encode(self) -> bytes:
        """Return the manifest's bytes; raise FormatError when it would be too large."""
        count = len(self._types)
        whole = HEADER.size + count * NODE_SIZE + len(self._ends) * ENTRY_SIZE + len(self._names)
        whole += sum(map(len, self._targets.values()))
        if whole > MAX_MANIFEST:
            raise FormatError(
                f"a manifest of {whole} bytes is larger than {MAX_MANIFEST}: split the store path"
            )
        if len(self.digests) != 32 * len(self._ends):
            raise FormatError(f"manifest: {len(self.digests)} bytes of digests for {len(self._ends)} chunks")
        order: array[int] = array("I")
        for level in self._by_depth:  # breadth first is depth first, stably sorted by depth
            order.extend(level)
        place = array("I", bytes(4 * count))
        for position, index in enumerate(order):
            place[index] = position
        first_child = array("I", bytes(4 * count))
        children = array("I", bytes(4 * count))
        for position, index in enumerate(order):
            if index:
                parent = self._parents[index]
                if not children[parent]:
                    first_child[parent] = position
                children[parent] += 1
        rows, names, entries = bytearray(), bytearray(), bytearray()
        chunks = total = 0
        for index in order:
            kind, size = self._types[index], self._sizes[index]
            name_start = self._name_ends[index - 1] if index else 0
            name = self._names[name_start : self._name_ends[index]]
            name_offset = len(names)
            names += name
            first = counted = 0
            if kind == DIRECTORY:
                first, counted = first_child[index], children[index]
            elif kind == SYMLINK:
                first = len(names)
                names += self._targets[index]
            else:
                counted = self._chunk_counts[index]
                first = chunks if counted else 0
                chunks += counted
                total += size
                for i in range(self._first_chunk[index], self._first_chunk[index] + counted):
                    entries += self.digests[32 * i : 32 * i + 32] + END_OFFSET.pack(self._ends[i])
            parent = place[self._parents[index]]
            rows += NODE_ROW.pack(name_offset, len(name), kind, 0, size, first, counted, parent, 0)
        return b"".join((HEADER.pack(MAGIC, count, chunks, len(names), 0, total), rows, entries, names))
