"""Where trees come from: a directory, file or symlink on disk, or a NAR stream.

A source is a synchronous generator that runs on a worker thread: it puts nodes into a Tree and yields batches
of chunk data in file order. It never holds more than a batch and one window of a file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from cidfs.errors import FormatError, SourceError
from cidfs.formats import nar
from cidfs.formats.chunking import MINIMUM, Cutter, cut, cut_stream
from cidfs.formats.manifest_builder import ManifestBuilder

BATCH_BYTES: Final = 1 << 20
BATCH_CHUNKS: Final = 256
WHOLE_FILE: Final = 1 << 20  # up to here a file is read in one piece
PIECE: Final = 4 << 20
HASH_BYTES: Final = 64 << 10

Data = bytes | memoryview
Batch = list[Data]


class Tree:
    """What a source has told so far: nodes, and the hash and size of its NAR."""

    def __init__(self) -> None:
        self.builder = ManifestBuilder()
        self.nar_size = 0
        self._hash = hashlib.sha256()
        self._unhashed: list[Data] = []
        self._unhashed_bytes = 0

    def hash(self, data: Data) -> None:
        """Take the next bytes of the NAR; they must stay as they are."""
        # small pieces together: each one by itself costs more than its hash
        self._unhashed.append(data)
        self._unhashed_bytes += len(data)
        if self._unhashed_bytes >= HASH_BYTES:
            self._hash_all()

    def _hash_all(self) -> None:
        last = self._unhashed.pop() if self._unhashed and len(self._unhashed[-1]) >= HASH_BYTES else b""
        self._hash.update(b"".join(self._unhashed))
        self._hash.update(last)
        self._unhashed.clear()
        self.nar_size += self._unhashed_bytes
        self._unhashed_bytes = 0

    @property
    def nar_hash(self) -> bytes:
        """SHA-256 of the NAR, when it is complete."""
        self._hash_all()
        return self._hash.digest()


class Source(Protocol):
    """One tree to be ingested."""

    @property
    def label(self) -> str:
        """What to call it in messages."""
        ...

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Fill the tree and yield chunk data in order; raise SourceError or FormatError."""
        ...


class _Batches:
    """Chunks on their way into batches."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._batch: Batch = []
        self._bytes = 0

    def add(self, data: Data) -> None:
        self._tree.builder.chunk(len(data))
        self._batch.append(data)
        self._bytes += len(data)

    @property
    def full(self) -> bool:
        return self._bytes >= BATCH_BYTES or len(self._batch) >= BATCH_CHUNKS

    def take(self) -> Batch:
        batch, self._batch, self._bytes = self._batch, [], 0
        return batch


class DiskSource:
    """A directory, file or symlink on disk, as Nix would add it.

    Types, executable bits, names, targets, contents.
    """

    def __init__(self, path: str | bytes) -> None:
        self._path = os.fsencode(path)

    @property
    def label(self) -> str:
        """The path as text."""
        return os.fsdecode(self._path).encode(errors="replace").decode()

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Yield the chunk data of all files below, in NAR order."""
        batches = _Batches(tree)
        tree.hash(nar.HEADER)
        try:
            kind = stat.S_IFMT(os.lstat(self._path).st_mode)
            yield from self._node(tree, batches, self._path, b"", kind)
        except OSError as e:
            raise SourceError(f"{_shown(e.filename or self._path)}: {e.strerror}") from e
        yield batches.take()

    def _node(self, tree: Tree, batches: _Batches, path: bytes, name: bytes, kind: int) -> Iterator[Batch]:
        if kind == stat.S_IFREG:
            yield from self._file(tree, batches, path, name)
        elif kind == stat.S_IFLNK:
            target = os.readlink(path)
            tree.builder.symlink(name, target)
            tree.hash(nar.write_symlink(target))
        elif kind == stat.S_IFDIR:
            yield from self._directory(tree, batches, path, name)
        else:
            raise SourceError(
                f"{_shown(path)}: neither file, directory nor symlink; a store path cannot hold it"
            )

    def _directory(self, tree: Tree, batches: _Batches, top: bytes, name: bytes) -> Iterator[Batch]:
        # a stack of iterators, not recursion: trees may be deep
        tree.builder.enter(name)
        tree.hash(nar.write_directory())
        stack = [(top, iter(_entries(top)))]
        while stack:
            folder, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                tree.builder.leave()
                tree.hash(nar.DIRECTORY_END + nar.ENTRY_END if stack else nar.DIRECTORY_END)
                continue
            here, kind = entry
            path = folder + b"/" + here
            tree.hash(nar.write_entry(here))
            if kind == stat.S_IFDIR:
                tree.builder.enter(here)
                tree.hash(nar.write_directory())
                stack.append((path, iter(_entries(path))))
            else:
                yield from self._node(tree, batches, path, here, kind)
                tree.hash(nar.ENTRY_END)

    def _file(self, tree: Tree, batches: _Batches, path: bytes, name: bytes) -> Iterator[Batch]:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise SourceError(
                    f"{_shown(path)}: changed while it was read; add it again when it is at rest"
                )
            size, executable = info.st_size, bool(info.st_mode & stat.S_IXUSR)
            tree.builder.file(name, executable)
            tree.hash(nar.write_file_head(size, executable))
            read = 0
            if size <= WHOLE_FILE:
                data = os.read(fd, size + 1)
                while 0 < len(data) < size and (more := os.read(fd, size + 1 - len(data))):
                    data += more
                read = len(data)
                if read == size:
                    tree.hash(data)
                if size <= MINIMUM:
                    if data:
                        batches.add(data)
                else:
                    view = memoryview(data)
                    for offset, length in cut(data):
                        batches.add(view[offset : offset + length])
                if batches.full:
                    yield batches.take()
            else:

                def readinto(view: memoryview) -> int:
                    nonlocal read
                    count = os.readv(fd, [view])
                    read += count
                    tree.hash(view[:count])
                    return count

                for chunk in cut_stream(readinto, PIECE):
                    batches.add(chunk)
                    if batches.full:
                        yield batches.take()
            if read != size:
                raise SourceError(
                    f"{_shown(path)}: changed while it was read; add it again when it is at rest"
                )
            tree.hash(nar.write_file_tail(size))
        finally:
            os.close(fd)


class NarSource:
    """A NAR that arrives in pieces: read(n) gives up to n bytes, b"" at the end."""

    def __init__(self, read: Callable[[int], bytes], label: str) -> None:
        self._read = read
        self._label = label

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self._label

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Yield the chunk data of all files, in NAR order."""
        batches = _Batches(tree)
        reader = nar.NarReader()
        cutter = Cutter()
        try:
            while piece := self._read(BATCH_BYTES):
                tree.hash(piece)
                for event in reader.feed(piece):
                    match event:
                        case nar.FileData(data):
                            for chunk in cutter.feed(data):
                                batches.add(chunk)
                        case nar.FileStart(name, _, executable):
                            tree.builder.file(name, executable)
                        case nar.FileEnd():
                            for chunk in cutter.finish():
                                batches.add(chunk)
                        case nar.Symlink(name, target):
                            tree.builder.symlink(name, target)
                        case nar.DirectoryStart(name):
                            tree.builder.enter(name)
                        case nar.DirectoryEnd():
                            tree.builder.leave()
                    if batches.full:
                        yield batches.take()
            reader.close()
        except FormatError as e:
            raise FormatError(f"{self._label}: {e}") from None
        except OSError as e:
            raise SourceError(f"{self._label}: {e.strerror}") from e
        yield batches.take()


def _entries(folder: bytes) -> list[tuple[bytes, int]]:
    """Return name and type of a directory's entries, sorted bytewise."""
    found = []
    with os.scandir(folder) as listing:
        for entry in listing:
            if entry.is_symlink():
                kind = stat.S_IFLNK
            elif entry.is_file(follow_symlinks=False):
                kind = stat.S_IFREG
            elif entry.is_dir(follow_symlinks=False):
                kind = stat.S_IFDIR
            else:
                kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
            found.append((entry.name, kind))
    found.sort()
    return found


def _shown(path: bytes | str | int) -> str:
    if isinstance(path, int):
        return f"descriptor {path}"
    return os.fsencode(path).decode(errors="backslashreplace")
