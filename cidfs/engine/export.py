"""Out of the store again without a mount: files, listings, NARs. Synchronous generators over LocalStore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cidfs.formats import nar
from cidfs.formats.manifest import DIRECTORY, EXECUTABLE, SYMLINK, Manifest, Node


class Chunks(Protocol):
    """Where chunks are read: a LocalStore, or what keeps some of them."""

    def read_chunk(self, digest: bytes) -> bytes:
        """Return a chunk's verified bytes; raise ChunkMissing or ChunkInvalid."""
        ...


def file_pieces(store: Chunks, manifest: Manifest, node: Node) -> Iterator[bytes]:
    """Yield a file's contents, chunk by chunk, each verified."""
    for span in manifest.spans(node):
        yield store.read_chunk(span.digest)


def nar_pieces(store: Chunks, manifest: Manifest) -> Iterator[bytes]:
    """Yield the NAR of a manifest's tree: what `nix-store --dump` would write."""
    yield nar.HEADER
    stack: list[tuple[int | None, bytes]] = [(0, b"")]  # a node, or what to write at this point
    while stack:
        index, text = stack.pop()
        if index is None:
            yield text
            continue
        node = manifest.node(index)
        if index:
            yield nar.write_entry(manifest.name(node))
            stack.append((None, nar.ENTRY_END))
        if node.type == DIRECTORY:
            yield nar.write_directory()
            stack.append((None, nar.DIRECTORY_END))
            stack.extend((child, b"") for child in reversed(manifest.children(node)))
        elif node.type == SYMLINK:
            yield nar.write_symlink(manifest.target(node))
        else:
            yield nar.write_file_head(node.size, node.type == EXECUTABLE)
            yield from file_pieces(store, manifest, node)
            yield nar.write_file_tail(node.size)
