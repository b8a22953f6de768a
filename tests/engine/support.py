"""Trees on disk, their NARs written independently of any source, and sources that misbehave."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from cidfs.engine.export import nar_pieces
from cidfs.engine.sources import Batch, Tree
from cidfs.engine.wanted import Wanted
from cidfs.formats import nar
from cidfs.formats.store_path import StorePath
from cidfs.local.store import LocalStore
from tests.local.support import noise

Node: TypeAlias = bytes | tuple[str, bytes] | Mapping[bytes, "Node"]
"""A file, ("x", contents) for an executable one, ("l", target) for a symlink, or a directory."""

TREE: Node = {
    b"bin": {
        b"tool": ("x", noise("tool", 90_000)),
        b"link": ("l", b"tool"),
        b"dangling": ("l", b"../no/where"),
    },
    b"lib": {
        b"a": b"a",
        b"a.b": b"",
        b"a-b": noise("ab", 17_000),
        b"deep": {b"er": {b"still": {b"f": b"1"}}},
    },
    b"empty": {},
    b"\xff not utf-8": b"x" * 300_000,
    b"large": noise("large", 1_500_000),
    b"copy of tool": noise("tool", 90_000),
}


def make(path: Path, node: Node) -> Path:
    """Make a tree on disk."""
    _make(os.fsencode(path), node)
    return path


def _make(path: bytes, node: Node) -> None:
    match node:
        case bytes():
            with open(path, "wb") as file:
                file.write(node)
        case ("l", bytes(target)):
            os.symlink(target, path)
        case ("x", bytes(data)):
            _make(path, data)
            os.chmod(path, 0o755)
        case Mapping():
            os.mkdir(path)
            for name, inner in node.items():
                _make(path + b"/" + name, inner)


def nar_of(node: Node) -> bytes:
    """Return the NAR of a tree."""
    return nar.HEADER + _nar(node)


def _nar(node: Node) -> bytes:
    match node:
        case bytes():
            return nar.write_file_head(len(node), False) + node + nar.write_file_tail(len(node))
        case ("l", bytes(target)):
            return nar.write_symlink(target)
        case ("x", bytes(data)):
            return nar.write_file_head(len(data), True) + data + nar.write_file_tail(len(data))
        case Mapping():
            inside = b"".join(nar.write_entry(n) + _nar(node[n]) + nar.ENTRY_END for n in sorted(node))
            return nar.write_directory() + inside + nar.DIRECTORY_END
    raise AssertionError(node)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def stored_nar(store: LocalStore, path: StorePath) -> bytes:
    """Return the NAR of a published path as the store gives it."""
    record = store.record_of(path.hash_part)
    assert record is not None, path
    return b"".join(nar_pieces(store, store.read_manifest(record.manifest)))


class Pieces:
    """A stream that gives its bytes in pieces of certain lengths, over and over."""

    def __init__(self, data: bytes, *lengths: int) -> None:
        self._data, self._lengths, self._at, self._turn = data, lengths, 0, 0

    def __call__(self, count: int) -> bytes:
        length = min(count, self._lengths[self._turn % len(self._lengths)])
        self._turn += 1
        piece = self._data[self._at : self._at + length]
        self._at += len(piece)
        return piece


class Source:
    """A source of one file, that does something between its batches."""

    def __init__(self, label: str, batches: list[bytes], between: Callable[[int], None]) -> None:
        self.label = label
        self._batches, self._between = batches, between

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Yield a batch of one chunk after the other."""
        whole = b"".join(self._batches)
        tree.hash(nar.HEADER + nar.write_file_head(len(whole), False))
        tree.builder.file(b"", False)
        for number, data in enumerate(self._batches):
            self._between(number)
            tree.builder.chunk(len(data))
            tree.hash(data)
            yield [data]
        self._between(len(self._batches))
        tree.hash(nar.write_file_tail(len(whole)))


def quiet(number: int) -> None:
    """Do nothing between batches."""


def file_source(label: str, *batches: bytes, between: Callable[[int], None] = quiet) -> Wanted:
    """Return what is wanted of a source of one file."""
    return Wanted(Source(label, list(batches), between), name=label)
