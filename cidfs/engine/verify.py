"""Verification: what is stored, against itself.

Every frame, every manifest, every NAR hash; the index against packs and journal.

Reads everything, changes nothing, and may run beside mounts and adds. Packs are read in file order, several
at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from cidfs.engine.export import nar_pieces
from cidfs.engine.progress import Steps
from cidfs.errors import CidfsError
from cidfs.formats import frames
from cidfs.formats.digest import cid_text, sha256_text
from cidfs.formats.manifest import Manifest
from cidfs.local.audit import journal_differences, lost_rows
from cidfs.local.packs import MANIFEST, pack_path
from cidfs.local.rows import PackRow, Place
from cidfs.local.store import LocalStore, PublishedPath

T = TypeVar("T")


@dataclass
class Report:
    """What was found. problems: a line each, naming the damaged thing or the path that it touches."""

    paths: int = 0
    frames: int = 0
    packs: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


async def verify(store: LocalStore, paths: Sequence[PublishedPath] | None, steps: Steps) -> Report:
    """Verify some paths (their manifests, chunks and NAR hashes), or the whole store."""
    report = Report()
    if paths is None:
        report.problems += await trio.to_thread.run_sync(lost_rows, store)
        report.problems += await trio.to_thread.run_sync(journal_differences, store)
        packs = await trio.to_thread.run_sync(lambda: list(store.pack_rows()))
        steps.begin("packs", len(packs))
        await _in_parallel(packs, lambda item: _verify_pack(store, *item), report, steps)
        report.packs = len(packs)
        paths = await trio.to_thread.run_sync(lambda: list(store.paths()))
    steps.begin("store paths", len(paths))
    await _in_parallel(paths, lambda item: _verify_path(store, item), report, steps)
    report.paths = len(paths)
    return report


async def _in_parallel(
    items: Iterable[T], check: Callable[[T], Report], report: Report, steps: Steps
) -> None:
    """Check items on a thread a core; their findings keep the order of the items."""
    waiting = list(enumerate(items))
    waiting.reverse()
    found: dict[int, Report] = {}

    async def work() -> None:
        while waiting:
            number, item = waiting.pop()
            found[number] = await trio.to_thread.run_sync(check, item)
            steps.step()

    async with trio.open_nursery() as nursery:
        for _ in range(os.cpu_count() or 1):
            nursery.start_soon(work)
    for _, each in sorted(found.items()):
        report.problems += each.problems
        report.frames += each.frames
        report.bytes += each.bytes


def _verify_pack(store: LocalStore, identity: bytes, row: PackRow) -> Report:
    """Read a pack from end to end.

    Every frame that the index refers to must be whole and where the index says.
    """
    report = Report()
    path = pack_path(store.state.root, row.kind, identity)
    database = "manifests" if row.kind == MANIFEST else "chunks"
    if not row.frames:
        return report
    try:
        data = path.read_bytes()
    except OSError as e:
        report.problems.append(f"{path}: cannot be read: {e.strerror}; {row.frames} frames are missing")
        return report
    there: set[bytes] = set()
    for item in frames.scan(data):
        if isinstance(item, frames.Found) and item.header.kind in (frames.KIND_CHUNK, frames.KIND_MANIFEST):
            place = store.place(database, item.header.digest)
            if place is not None and (place.pack, place.offset) == (identity, item.offset):
                there.add(item.header.digest)
                report.bytes += item.header.size
    report.frames = len(there)
    if len(there) != row.frames:
        missing = [
            (digest, place)
            for digest, place in store.places(database)
            if place.pack == identity and digest not in there
        ]
        for digest, place in missing:
            report.problems.append(_damaged_frame(store, database, digest, place))
    return report


def _damaged_frame(store: LocalStore, database: str, digest: bytes, place: Place) -> str:
    try:
        store.packs.read(digest, place)
    except CidfsError as e:
        return f"{e}: {database.removesuffix('s')} {cid_text(digest)}"
    path = pack_path(store.state.root, place.kind, place.pack)
    return f"{path}: changed while it was verified; verify again"


def _verify_path(store: LocalStore, published: PublishedPath) -> Report:
    """Check record, manifest and NAR hash of one path."""
    report = Report()
    name = published.path.full(store.store_dir)
    try:
        record = store.record_of(published.path.hash_part)
        if record is None:
            raise CidfsError("its record is lost from the index; run `cidfs rebuild`")
        manifest = store.read_manifest(record.manifest).validate()
        _compare(published, record.manifest, record.node_count, record.root_row, manifest)
        digest, size = hashlib.sha256(), 0
        for piece in nar_pieces(store, manifest):
            digest.update(piece)
            size += len(piece)
        report.bytes += size
        if (digest.digest(), size) != (record.nar_hash, record.nar_size):
            found = sha256_text(digest.digest())
            raise CidfsError(f"its NAR hash is {found} where {sha256_text(record.nar_hash)} is recorded")
    except CidfsError as e:
        report.problems.append(f"{name}: {e}")
    return report


def _compare(published: PublishedPath, cid: bytes, nodes: int, root_row: bytes, manifest: Manifest) -> None:
    row = published.row
    if (row.manifest, row.count, row.root_row) != (cid, nodes, root_row):
        raise CidfsError("index and record differ; run `cidfs rebuild`")
    if (manifest.node_count, manifest.row(0)) != (nodes, root_row):
        raise CidfsError("manifest and record differ")
