"""A tree of files in plain Python.

The model that NARs and manifests are compared with, and its strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from hypothesis import strategies as st

from cidfs.formats import manifest, nar
from cidfs.formats.digest import digest_of
from cidfs.formats.manifest import Manifest
from cidfs.formats.manifest_builder import ManifestBuilder
from cidfs.formats.nar import NarReader


@dataclass(frozen=True)
class File:
    """A regular file."""

    data: bytes
    executable: bool = False


@dataclass(frozen=True)
class Link:
    """A symlink."""

    target: bytes


Tree: TypeAlias = File | Link | Mapping[bytes, "Tree"]
Cut: TypeAlias = Callable[[bytes], Iterable[bytes]]
"""Divides a file's contents into chunks."""


def file_data() -> st.SearchStrategy[bytes]:
    return st.binary(max_size=300)


def names() -> st.SearchStrategy[bytes]:
    """Names that a directory entry can have, awkward ones among them."""
    awkward = [b"a", b"b", b"a.b", b"a-b", b"A", b"..a", b"...", b" ", b"\n", b"\xff", b"\x01", b"n" * 255]
    letters = st.sampled_from([bytes((i,)) for i in range(1, 256) if i != ord("/")])
    made = st.lists(letters, min_size=1, max_size=6).map(b"".join)
    return st.one_of(st.sampled_from(awkward), made.filter(lambda n: n not in (b".", b"..")))


def targets() -> st.SearchStrategy[bytes]:
    letters = st.sampled_from([bytes((i,)) for i in range(1, 256)])
    return st.one_of(st.lists(letters, min_size=1, max_size=20).map(b"".join), st.just(b"t" * 4095))


def trees() -> st.SearchStrategy[Tree]:
    """Small trees; a root can be a file or a symlink as well."""
    leaves: st.SearchStrategy[Tree] = st.one_of(
        st.builds(File, file_data(), st.booleans()), st.builds(Link, targets())
    )

    def directories(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        return st.dictionaries(names(), inner, max_size=6)

    return st.recursive(st.one_of(leaves, st.just({})), directories, max_leaves=25)


def directory_trees() -> st.SearchStrategy[Mapping[bytes, Tree]]:
    return st.dictionaries(names(), trees(), max_size=6)


def nar_of(tree: Tree) -> bytes:
    """Return the NAR of a tree, made with the writer."""
    return nar.HEADER + _nar_node(tree)


def _nar_node(tree: Tree) -> bytes:
    match tree:
        case File(data, executable):
            return nar.write_file_head(len(data), executable) + data + nar.write_file_tail(len(data))
        case Link(target):
            return nar.write_symlink(target)
        case _:
            inside = b"".join(
                nar.write_entry(name) + _nar_node(tree[name]) + nar.ENTRY_END for name in sorted(tree)
            )
            return nar.write_directory() + inside + nar.DIRECTORY_END


def events_of(tree: Tree, name: bytes = b"") -> Iterator[tuple[object, ...]]:
    """Yield what the reader is to say of a tree; a file's contents in one piece."""
    match tree:
        case File(data, executable):
            yield "file", name, len(data), executable, data
        case Link(target):
            yield "link", name, target
        case _:
            yield "directory", name
            for inner in sorted(tree):
                yield from events_of(tree[inner], inner)
            yield ("end",)


def read_nar(pieces: Iterable[bytes]) -> Iterator[tuple[object, ...]]:
    """Yield what the reader says of a NAR, in the form of events_of."""
    reader = NarReader()
    contents = bytearray()
    head: tuple[object, ...] = ()
    for piece in pieces:
        for event in reader.feed(piece):
            match event:
                case nar.DirectoryStart(name):
                    yield "directory", name
                case nar.DirectoryEnd():
                    yield ("end",)
                case nar.Symlink(name, target):
                    yield "link", name, target
                case nar.FileStart(name, size, executable):
                    contents.clear()
                    head = ("file", name, size, executable)
                case nar.FileData(data):
                    contents += data
                case nar.FileEnd():
                    yield *head, bytes(contents)
    reader.close()


def in_hundreds(data: bytes) -> Iterable[bytes]:
    """Divide a file's contents into chunks of at most 100 bytes."""
    return [data[i : i + 100] for i in range(0, len(data), 100)]


def add_to(
    builder: ManifestBuilder, tree: Tree, cut: Cut = in_hundreds, name: bytes = b""
) -> dict[bytes, bytes]:
    """Put a tree into a builder and return its chunks by digest."""
    chunks: dict[bytes, bytes] = {}
    match tree:
        case File(data, executable):
            builder.file(name, executable)
            for piece in cut(data):
                builder.chunk(len(piece))
                builder.digests += digest_of(piece)
                chunks[digest_of(piece)] = piece
        case Link(target):
            builder.symlink(name, target)
        case _:
            builder.enter(name)
            for inner in sorted(tree):
                chunks.update(add_to(builder, tree[inner], cut, inner))
            builder.leave()
    return chunks


def manifest_of(tree: Tree, cut: Cut = in_hundreds) -> tuple[bytes, dict[bytes, bytes]]:
    """Return a tree's manifest and its chunks by digest."""
    builder = ManifestBuilder()
    chunks = add_to(builder, tree, cut)
    return builder.encode(), chunks


def encoded_again(opened: Manifest) -> bytes:
    """Return the manifest that a builder makes of what a manifest says."""
    builder = ManifestBuilder()
    open_until: list[int] = []  # of each open directory, how many of its nodes are to come

    def close() -> None:
        while open_until and not open_until[-1]:
            open_until.pop()
            builder.leave()

    for _, node in opened.walk():
        if open_until:
            open_until[-1] -= 1
        name = opened.name(node)
        if node.type == manifest.DIRECTORY:
            builder.enter(name)
            open_until.append(node.count)
        elif node.type == manifest.SYMLINK:
            builder.symlink(name, opened.target(node))
        else:
            builder.file(name, node.type == manifest.EXECUTABLE)
            for span in opened.spans(node):
                builder.chunk(span.end - span.start)
                builder.digests += span.digest
        close()
    return builder.encode()


def walked(tree: Tree, path: tuple[bytes, ...] = ()) -> Iterator[tuple[bytes, Tree]]:
    """Yield path and node of a whole tree, parents before children, in NAR order."""
    yield b"/".join(path), tree
    if isinstance(tree, Mapping):
        for name in sorted(tree):
            yield from walked(tree[name], (*path, name))
