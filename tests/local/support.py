"""What the tests of the local floor share.

Small store paths, publishing them, and looking at all that is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cidfs.formats import nar
from cidfs.formats.chunking import encode
from cidfs.formats.digest import digest_of, nix32_encode
from cidfs.formats.manifest import EXECUTABLE, FILE, Manifest
from cidfs.formats.manifest_builder import ManifestBuilder
from cidfs.formats.record import Record
from cidfs.formats.store_path import DEFAULT_STORE_DIR, StorePath
from cidfs.local.index import Index
from cidfs.local.packs import MANIFEST, OWN, PackWriter
from cidfs.local.publish import Candidate, Published
from cidfs.local.rows import DATABASES, LATER, PathRow, Place, unseal
from cidfs.local.store import LocalStore

CHUNK = 64 << 10
_URANDOM = os.urandom
Rows = dict[str, dict[bytes, bytes | None]]


def path_of(name: str) -> StorePath:
    """Return the store path that the tests mean by a name."""
    return StorePath(nix32_encode(hashlib.sha256(name.encode()).digest()[:20]), name)


def key_of(name: str) -> bytes:
    """Return the key of a path's rows."""
    return path_of(name).hash_part.encode()


def noise(seed: str, size: int) -> bytes:
    """Return size bytes that do not compress: SHA-256 of the seed and a counter, block after block."""
    blocks = (hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(-(-size // 32)))
    return b"".join(blocks)[:size]


@dataclass(frozen=True)
class Package:
    """A store path that is one directory of files: its record, its manifest and its chunks, in file order."""

    record: Record
    manifest: bytes
    chunks: tuple[bytes, ...]


def package(
    name: str,
    files: Mapping[str, bytes] | None = None,
    references: Iterable[str] = (),
    *,
    signatures: Iterable[str] = (),
    deriver: str = "",
    chunk: int = CHUNK,
) -> Package:
    """Make a store path; without files it holds one file with its name."""
    contents = {"name": name.encode()} if files is None else files
    builder, whole = ManifestBuilder(), [nar.HEADER, nar.write_directory()]
    chunks: list[bytes] = []
    builder.enter(b"")
    for file in sorted(contents, key=str.encode):
        data = contents[file]
        builder.file(file.encode(), executable=False)
        for piece in (data[i : i + chunk] for i in range(0, len(data), chunk)):
            builder.chunk(len(piece))
            builder.digests += digest_of(piece)
            chunks.append(piece)
        entry = (nar.write_entry(file.encode()), nar.write_file_head(len(data), False))
        whole += [*entry, data, nar.write_file_tail(len(data)), nar.ENTRY_END]
    builder.leave()
    archive = b"".join([*whole, nar.DIRECTORY_END])
    manifest = builder.encode()
    opened = Manifest(manifest)
    record = Record(
        store_dir=DEFAULT_STORE_DIR,
        path=path_of(name),
        nar_hash=hashlib.sha256(archive).digest(),
        nar_size=len(archive),
        references=tuple(sorted(path_of(r).base_name for r in references)),
        deriver=deriver,
        manifest=digest_of(manifest),
        node_count=opened.node_count,
        root_row=opened.row(0),
        signatures=tuple(sorted(signatures)),
    )
    return Package(record, manifest, tuple(chunks))


@dataclass
class Writers:
    """The packs that a publisher appends to."""

    own: PackWriter
    manifests: PackWriter

    @classmethod
    def of(cls, store: LocalStore) -> Writers:
        return cls(store.pack_writer(OWN), store.pack_writer(MANIFEST))

    def close(self) -> None:
        self.own.close()
        self.manifests.close()


def append(store: LocalStore, writers: Writers, item: Package, new: dict[bytes, Place]) -> Candidate:
    """Append what is new of a package; note the places of the chunks that have no row yet."""
    places = b""
    for data in item.chunks:
        digest = digest_of(data)
        place = store.place("chunks", digest) or new.get(digest)
        if place is None:
            place = new[digest] = writers.own.append(digest, *encode(data), len(data))
        places += place.packed()
    manifest = Manifest(item.manifest)
    at = store.place("manifests", item.record.manifest)
    if at is None:
        at = writers.manifests.append(item.record.manifest, *encode(item.manifest), len(item.manifest))
    digests = b"".join(digest_of(data) for data in item.chunks)
    files = manifest.count_of(FILE) + manifest.count_of(EXECUTABLE)
    return Candidate(item.record, at, manifest.total_size, files, digests, places)


def candidates(store: LocalStore, *items: Package) -> list[Candidate]:
    """Do all that comes before publishing: frames, sync, rows."""
    writers = Writers.of(store)
    try:
        new: dict[bytes, Place] = {}
        made = [append(store, writers, item, new) for item in items]
        writers.own.sync()
        writers.manifests.sync()
        store.put_places("chunks", list(new.items()), writers.own)
        manifests = [(candidate.record.manifest, candidate.manifest_place) for candidate in made]
        store.put_places("manifests", manifests, writers.manifests)
        return made
    finally:
        writers.close()


def publish(store: LocalStore, *items: Package) -> list[Published]:
    """Store packages and publish them as one group."""
    return store.publish(candidates(store, *items))


def publish_in(root: Path, *items: Package) -> dict[str, PathRow]:
    """Publish in a store that is opened for just that; return the rows by name."""
    with LocalStore.open(root, write=True, create=True) as store:
        publish(store, *items)
        return {item.record.path.name: row_of(store, item.record.path.name) for item in items}


def row_of(store: LocalStore, name: str) -> PathRow:
    """Return the row of a path that must be published."""
    row = store.find_path(path_of(name))
    assert row is not None, f"{name} is not published"
    return row


def contents_of(store: LocalStore, name: str) -> dict[str, bytes]:
    """Return the files of a published path as they are stored now, every digest verified."""
    manifest = store.read_manifest(row_of(store, name).manifest)
    found = {}
    for index in manifest.children(manifest.node(0)):
        node = manifest.node(index)
        found[manifest.name(node).decode()] = b"".join(
            store.read_chunk(span.digest) for span in manifest.spans(node)
        )
    return found


def all_rows(index: Index) -> Rows:
    """Return every row of every database, None for one that is damaged."""
    found: Rows = {name: {} for name in (*DATABASES, *LATER)}
    with index.read() as txn:
        for name, database in txn.db.items():
            found[name] = {
                bytes(key): unseal(name.encode(), bytes(key), bytes(stored))
                for key, stored in txn.raw.cursor(db=database)
            }
    return found


def rows_in(root: Path) -> Rows:
    """Return every row of the index that counts."""
    number = int((root / "index" / "current").read_bytes().split()[0])
    index = Index(root / "index" / str(number), number, write=False)
    try:
        return all_rows(index)
    finally:
        index.close()


def pack_files(root: Path, kind: str) -> list[Path]:
    """Return the pack files of a kind."""
    return sorted(p for p in (root / "packs" / kind).glob("*/*") if "." not in p.name)


def flip(path: Path, offset: int, mask: int = 1) -> None:
    """Change bits of one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes((byte ^ mask,)))


@dataclass
class Ledger:
    """What was seen and promised so far, to hold every later state against.

    bases: what "done" was said for. ranges: each inode range that anyone could see, and whose it is.
    """

    packages: dict[str, Package] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)
    ranges: dict[int, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, packages: dict[str, Package], root: Path) -> Ledger:
        """Return one that promises all that is visible in a store."""
        ledger = cls(packages)
        ledger.bases = ledger.look(root)
        return ledger

    def promise(self, name: str, base: int) -> None:
        """A publication was reported as done."""
        assert self.bases.setdefault(name, base) == base, f"{name} was promised another base before"

    def withdraw(self, name: str) -> None:
        """A removal was begun: the path may be there or not."""
        self.bases.pop(name, None)

    def look(self, root: Path) -> dict[str, int]:
        """Check all that is visible in a store; return base by name."""
        found: dict[str, int] = {}
        with LocalStore.open(root) as store:
            for published in store.paths():
                name, row = published.path.name, published.row
                found[name] = row.base
                assert self.ranges.setdefault(row.base, (row.count, name)) == (row.count, name)
                expected = self.packages[name]
                assert row.manifest == expected.record.manifest
                files = contents_of(store, name)  # nothing is half visible
                assert b"".join(files[f] for f in sorted(files, key=str.encode)) == b"".join(expected.chunks)
                assert store.range_of(row.base + row.count - 1) is not None
            assert store.current().damaged_rows == 0
        for name, base in self.bases.items():
            assert found.get(name) == base, f"{name} was promised at {base} and is at {found.get(name)}"
        end = 0
        for base, (count, name) in sorted(self.ranges.items()):
            assert base >= end, f"the range of {name} overlaps another"
            end = base + count
        return found


def few_urandom(count: int) -> bytes:
    """Return random bytes of which the first is one of four.

    In its place of os.urandom, packs need 12 folders instead of 768, and a store is copied in no time.
    """
    return bytes((_URANDOM(1)[0] & 3,)) + _URANDOM(count - 1)


def prune(root: Path) -> None:
    """Take away the folders that packs named by few_urandom do not use."""
    for folder in (root / "packs").glob("*/*"):
        if int(folder.name, 16) > 3:
            folder.rmdir()


def copy_store(source: Path, target: Path) -> Path:
    """Copy a store that nobody uses."""
    for folder, folders, files in os.walk(source):
        there = target / os.path.relpath(folder, source)
        there.mkdir(exist_ok=True)
        folders.sort()
        for name in files:
            (there / name).write_bytes((Path(folder) / name).read_bytes())
    return target


def names(items: Sequence[Package]) -> list[str]:
    """Return the names of packages."""
    return [item.record.path.name for item in items]
