"""StoreView: what the mounted file system is. Knows no FUSE library.

Answers from the index and the packs without awaiting. What would take long (a large manifest that is not in
memory) raises Miss with the work to be done on a thread; the caller does it and asks again. Belongs to one
thread; the work of a Miss may run on another, as it touches only LocalStore.

Inode numbers are computed: 1 is the root, 2 is `.links`, a published path has `base + node`. Nothing is
remembered between calls but caches, all bounded in bytes.
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from cidfs.errors import (
    ChunkInvalid,
    ChunkMissing,
    CidfsError,
    FormatError,
    PathAbsent,
    StaleInode,
    WrongType,
)
from cidfs.formats.digest import cid_text
from cidfs.formats.manifest import DIRECTORY, MODES, Manifest, Node, decode_node
from cidfs.formats.nar import MAX_NAME
from cidfs.formats.store_path import HASH_PART_LENGTH
from cidfs.local.rows import PathRow
from cidfs.local.store import LocalStore
from cidfs.mount.absences import Absences

log = logging.getLogger(__name__)

ROOT: Final = 1
LINKS: Final = 2
_LINKS_NAME: Final = b".links"
BIG_MANIFEST: Final = 256 << 10
MANIFEST_CACHE: Final = 32 << 20
CHUNK_CACHE: Final = 32 << 20
_ENTRY_COST: Final = 600  # bytes of Python around a cached manifest


class Attributes(NamedTuple):
    """What stat(2) shows of a node besides what is the same for all: owner 0:0, one link, mtime 1.

    The name of one that is fleeting may go, or be hidden, at any moment: nobody may remember it.
    """

    inode: int
    mode: int
    size: int
    fleeting: bool = False


class Entry(NamedTuple):
    """A directory entry; next is where a listing goes on behind it."""

    name: bytes
    attributes: Attributes
    next: int


class Miss(Exception):
    """The answer is not in memory: run job on a thread, then ask again."""

    def __init__(self, job: Callable[[], object]) -> None:
        super().__init__()
        self.job = job


class Counters:
    """What a view has done since it began."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.chunk_hits = 0
        self.chunk_reads = 0
        self.manifest_hits = 0
        self.manifest_reads = 0
        self.damaged = 0
        self.root_failures = 0


class _Published:
    """A published path that is in use: its inode range and its manifest."""

    __slots__ = ("base", "end", "manifest")

    def __init__(self, base: int, end: int, manifest: Manifest) -> None:
        self.base, self.end, self.manifest = base, end, manifest


_ROOT_ATTRIBUTES: Final = Attributes(ROOT, MODES[DIRECTORY] | 0o200, 0)
_LINKS_ATTRIBUTES: Final = Attributes(LINKS, MODES[DIRECTORY], 0)


class StoreView:
    """The file system over one store."""

    def __init__(
        self,
        store: LocalStore,
        *,
        list_root: bool = False,
        under_overlay: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self.list_root = list_root
        self._under_overlay = under_overlay
        self.absences = Absences()
        self.counters = Counters()
        self._bases: list[int] = []
        self._published: OrderedDict[int, _Published] = OrderedDict()
        self._published_bytes = 0
        self._largest = 0
        self._last: _Published | None = None
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._chunk_bytes = 0
        self._loaded: dict[bytes, Manifest] = {}  # by a Miss, not asked for yet

    # --- finding

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Return the attributes of a name in a directory; raise PathAbsent. In the root.

        From the index alone.
        """
        if len(name) > MAX_NAME:
            raise WrongType("the name is too long", errno.ENAMETOOLONG)
        if parent == ROOT:
            return self._lookup_root(name)
        if parent == LINKS:
            raise PathAbsent(".links is empty")
        published = self._of(parent)
        manifest = published.manifest
        node = manifest.node(parent - published.base)
        if node.type != DIRECTORY:
            raise WrongType("not a directory", errno.ENOTDIR)
        index = manifest.find(node, name)
        if index is None:
            raise PathAbsent("no such name")
        return _attributes(published.base + index, manifest.node(index))

    def _lookup_root(self, name: bytes) -> Attributes:
        """Return the attributes of a store path. Under an overlay: of one that is whole, and never an error.

        Nix makes its locks and outputs there: whatever is wrong here, another name must not suffer for it.
        """
        if name == _LINKS_NAME:
            return _LINKS_ATTRIBUTES
        if len(name) <= HASH_PART_LENGTH + 1 or name[HASH_PART_LENGTH] != 0x2D:
            raise PathAbsent("not a store path")
        found: Attributes | None = None
        try:
            row = self._store.find(name[:HASH_PART_LENGTH])
            if row is not None and row.name == name[HASH_PART_LENGTH + 1 :]:
                found = _root_attributes(row)
        except CidfsError as e:
            if not self._under_overlay():
                raise
            if not self.counters.root_failures:
                log.error("look-ups of store paths fail, and are answered as absent: %s", e)
            self.counters.root_failures += 1
        if found is None or (found.fleeting and self._under_overlay()):
            self.absences.add(name)
            raise PathAbsent("not published")
        return found

    def attributes(self, inode: int) -> Attributes:
        """Return a node's attributes; raise StaleInode for a number that belongs to nothing."""
        if inode == ROOT:
            return _ROOT_ATTRIBUTES
        if inode == LINKS:
            return _LINKS_ATTRIBUTES
        published = self._of(inode)
        return _attributes(inode, published.manifest.node(inode - published.base))

    def target(self, inode: int) -> bytes:
        """Return a symlink's target."""
        if inode <= LINKS:
            raise WrongType("not a symlink", errno.EINVAL)
        published = self._of(inode)
        node = published.manifest.node(inode - published.base)
        if node.type in (DIRECTORY,) or node.is_file:
            raise WrongType("not a symlink", errno.EINVAL)
        return published.manifest.target(node)

    # --- listing

    def check_directory(self, inode: int) -> None:
        """Raise unless an inode is a directory that can be listed."""
        if inode > LINKS:
            published = self._of(inode)
            if published.manifest.node(inode - published.base).type != DIRECTORY:
                raise WrongType("not a directory", errno.ENOTDIR)

    def listing(self, inode: int, start: int) -> Iterator[Entry]:
        """Yield the entries of a directory behind a position (0 for all), without `.` and `..`.

        The root is empty unless it is to be listed: Nix's collector misbehaves on a listed lower layer.
        """
        if inode == ROOT:
            yield from self._list_root(start)
            return
        if inode == LINKS:
            return
        published = self._of(inode)
        manifest, base = published.manifest, published.base
        node = manifest.node(inode - base)
        children = manifest.children(node)
        for index in children[start:]:
            child = manifest.node(index)
            yield Entry(manifest.name(child), _attributes(base + index, child), index - children.start + 1)

    def _list_root(self, start: int) -> Iterator[Entry]:
        if start < 1:
            yield Entry(_LINKS_NAME, _LINKS_ATTRIBUTES, 1)
        if not self.list_root:
            return
        # positions are inode bases: unique, growing, and they stay when paths are added while someone lists
        for base, path in self._store.publications(max(start, LINKS + 1)):
            found = _root_attributes(path.row)
            if not (found.fleeting and self._under_overlay()):
                yield Entry(path.path.base_name.encode(), found, base + 1)

    # --- reading

    def open(self, inode: int) -> None:
        """Raise unless an inode is a file that can be read."""
        if inode <= LINKS:
            raise WrongType("is a directory", errno.EISDIR)
        published = self._of(inode)
        node = published.manifest.node(inode - published.base)
        if not node.is_file:
            raise WrongType("not a file", errno.EISDIR if node.type == DIRECTORY else errno.ELOOP)

    def read(self, inode: int, offset: int, size: int) -> list[memoryview]:
        """Return the pieces of size bytes of a file from offset on; fewer at its end."""
        published = self._of(inode)
        manifest = published.manifest
        node = manifest.node(inode - published.base)
        stop = min(node.size, offset + size)
        pieces = []
        for span in manifest.spans(node, offset, size):
            data = self._chunk(span.digest)
            if len(data) != span.end - span.start:
                raise FormatError(
                    f"chunk {cid_text(span.digest)} has {len(data)} bytes; its manifest says otherwise"
                )
            first = max(0, offset - span.start)
            last = min(len(data), stop - span.start)
            pieces.append(memoryview(data)[first:last])
            self.counters.bytes_read += last - first
        return pieces

    def _chunk(self, digest: bytes) -> bytes:
        data = self._chunks.get(digest)
        if data is not None:
            self._chunks.move_to_end(digest)
            self.counters.chunk_hits += 1
            return data
        try:
            data = self._store.read_chunk(digest)
        except (ChunkMissing, ChunkInvalid):
            self.counters.damaged += 1
            raise
        self.counters.chunk_reads += 1
        self._chunks[digest] = data
        self._chunk_bytes += len(data)
        while self._chunk_bytes > CHUNK_CACHE:
            self._chunk_bytes -= len(self._chunks.popitem(last=False)[1])
        return data

    # --- inode numbers to manifests

    def _of(self, inode: int) -> _Published:
        last = self._last
        if last is not None and last.base <= inode < last.end:
            return last
        at = bisect_right(self._bases, inode) - 1
        if at >= 0:
            published = self._published[self._bases[at]]
            if inode < published.end:
                self._published.move_to_end(published.base)
                self._last = published
                self.counters.manifest_hits += 1
                return published
        return self._load(inode)

    def _load(self, inode: int) -> _Published:
        found = self._store.range_of(inode)
        if found is None:
            raise StaleInode(f"inode {inode} belongs to no path of this store")
        base, row = found
        manifest = self._loaded.pop(row.manifest, None)
        if manifest is None:
            place = self._store.place("manifests", row.manifest)
            if place is not None and place.length > BIG_MANIFEST:
                raise Miss(lambda: self._preload(base, row.manifest))
            manifest = self._store.read_manifest(row.manifest)
        self.counters.manifest_reads += 1
        if manifest.node_count != row.nodes:
            raise FormatError(
                f"manifest {cid_text(row.manifest)} has {manifest.node_count} nodes, not {row.nodes}"
            )
        published = _Published(base, base + row.nodes, manifest)
        self._bases.insert(bisect_right(self._bases, base), base)
        self._published[base] = published
        self._published_bytes += len(manifest) + _ENTRY_COST
        self._last = published
        # twice the largest: one huge tree and its neighbours must not drive each other out
        self._largest = max(self._largest, len(manifest))
        while self._published_bytes > max(MANIFEST_CACHE, 2 * self._largest):
            gone, old = self._published.popitem(last=False)
            del self._bases[bisect_right(self._bases, gone) - 1]
            self._published_bytes -= len(old.manifest) + _ENTRY_COST
        return published

    def _preload(self, base: int, digest: bytes) -> None:
        """Load a manifest on a worker thread, unless another one who waited for it has it in use by now."""
        if digest not in self._loaded and base not in self._published:
            manifest = self._store.read_manifest(digest)
            if base not in self._published:
                self._loaded[digest] = manifest

    @property
    def node_limit(self) -> int:
        """How many inode numbers were given out so far."""
        return self._store.next_base()

    @property
    def cached_bytes(self) -> int:
        """How many bytes the caches hold."""
        return self._published_bytes + self._chunk_bytes


def _root_attributes(row: PathRow) -> Attributes:
    node = decode_node(row.root_row)
    return Attributes(row.base, MODES[node.type], node.size, fleeting=not row.whole)


def _attributes(inode: int, node: Node) -> Attributes:
    return Attributes(inode, MODES[node.type], node.size)
