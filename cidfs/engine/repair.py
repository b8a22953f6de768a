"""Repair: what verification found damaged is stored again, from what can be had.

In this order: another whole copy in any pack, then what `--from` names. Everything is known by its digest
before it is stored. A frame is appended and synced, then the row is switched, so a repair that is killed has
lost nothing and is run again. Lost rows are not brought back from packs: that is what rebuild does.

One thread; under an ingest's lease, so that no collection takes what it has appended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from cidfs.engine.findings import Bad, Ledger, Report
from cidfs.engine.progress import Steps
from cidfs.engine.sources import DiskSource, NarSource, Source, Tree
from cidfs.engine.verify_packs import find_damage
from cidfs.engine.verify_paths import PathCheck
from cidfs.engine.workers import alone, pause
from cidfs.errors import CidfsError, FormatError, HashMismatch, PathAbsent, SourceError
from cidfs.formats import frames, pack
from cidfs.formats.chunking import encode
from cidfs.formats.digest import digest_of
from cidfs.formats.manifest import EXECUTABLE, FILE
from cidfs.formats.store_path import StorePath
from cidfs.local import tables
from cidfs.local.audit import frames_of
from cidfs.local.leases import INGEST
from cidfs.local.pack_scan import all_packs
from cidfs.local.packs import MANIFEST, OWN, PackWriter, distrust, pack_path
from cidfs.local.rows import PackRow, PathRow, Place
from cidfs.local.store import LocalStore, PublishedPath
from cidfs.remote.upstream import open_upstream

COMMIT_BYTES: Final = 32 << 20
COMMIT_FRAMES: Final = 1000
ROUNDS: Final = 3
NO_COPY: Final = "not repaired: no other copy is here"


@dataclass(slots=True)
class _Waiting:
    """A frame that was appended, and whose row is to be switched to it."""

    bad: Bad
    place: Place
    how: str


class _Mender:
    """Appends frames in place of damaged ones and switches the rows."""

    def __init__(self, store: LocalStore, ledger: Ledger, mended: dict[tuple[str, bytes], str]) -> None:
        """mended: what was stored again so far, and how."""
        self._store = store
        self._writers = {"chunks": store.pack_writer(OWN), "manifests": store.pack_writer(MANIFEST)}
        self._waiting: list[_Waiting] = []
        self._bytes = 0
        self.mended = mended
        self.left = {
            name: {digest: one for digest, one in bad.items() if (name, digest) not in mended}
            for name, bad in ledger.bad.items()
        }

    def __bool__(self) -> bool:
        return any(self.left.values())

    def put(self, database: str, data: bytes | memoryview, digest: bytes, how: str) -> None:
        """Store the right bytes of something damaged."""
        encoding, stored = encode(data)
        self.put_stored(self.left[database].pop(digest), encoding, stored, len(data), how)

    def put_stored(self, bad: Bad, encoding: int, stored: bytes, length: int, how: str) -> None:
        """Store the right bytes of something damaged in their stored form."""
        place = self._writers[bad.database].append(bad.digest, encoding, stored, length)
        self._waiting.append(_Waiting(bad, place, how))
        self._bytes += len(stored)
        if self._bytes >= COMMIT_BYTES or len(self._waiting) >= COMMIT_FRAMES:
            self.commit()

    def commit(self) -> None:
        """Sync what was appended, then switch the rows."""
        for database, writer in self._writers.items():
            mine = [item for item in self._waiting if item.bad.database == database]
            if mine:
                writer.sync()
                rows = [(item.bad.digest, item.bad.place, item.place) for item in mine]
                _replace_places(self._store, database, rows, writer)
                self.mended.update(((database, item.bad.digest), item.how) for item in mine)
        self._waiting, self._bytes = [], 0

    def forget(self, unneeded: Sequence[Bad]) -> None:
        """Drop the rows of damaged chunks that nothing needs."""
        for start in range(0, len(unneeded), COMMIT_FRAMES):
            pause()
            group = unneeded[start : start + COMMIT_FRAMES]
            rows = [(bad.digest, bad.place, None) for bad in group]
            _replace_places(self._store, "chunks", rows, self._writers["chunks"])
            for bad in group:
                del self.left["chunks"][bad.digest]
                self.mended["chunks", bad.digest] = "forgotten, for nothing needs it"

    def close(self) -> None:
        """Let go of the packs."""
        for writer in self._writers.values():
            writer.close()


def _replace_places(
    store: LocalStore,
    database: str,
    rows: Sequence[tuple[bytes, Place | None, Place | None]],
    writer: PackWriter,
) -> None:
    """Give digests whose row still has the bad place (None: no row) the good one (None: no row any more).

    The pack is marked first: its footer goes on telling of the bad one, and a rebuild must not believe it.
    """
    for place in {bad.pack: bad for _, bad, _ in rows if bad is not None}.values():
        _distrust(store, place)
    with store.transaction() as index, index.write() as txn:
        for digest, bad, good in rows:
            raw = txn.get(database, digest)
            if (Place.unpack(raw) if raw is not None else None) != bad:
                continue  # somebody was quicker
            if good is not None:
                txn.put_place(database, digest, good)
            else:
                txn.drop_place(database, digest)
        store.note_packs(txn, writer)


def _distrust(store: LocalStore, place: Place) -> None:
    with contextlib.suppress(OSError, CidfsError):  # the pack is gone, or cannot be written to
        path = pack_path(store.state.root, place.kind, place.pack)
        if path.exists():
            distrust(path)


class Repair:
    """One repair, after a verification. said: lines for people, on what could not be used."""

    def __init__(self, store: LocalStore, report: Report, steps: Steps) -> None:
        self._store, self._report, self._ledger, self._steps = store, report, report.ledger, steps
        self._mended: dict[tuple[str, bytes], str] = {}
        self.said: list[str] = []

    def _say(self, error: CidfsError) -> None:
        line = f"{error} (read for the repair)"
        if line not in self.said:  # each round reads again
            self.said.append(line)

    async def run(self, sources: Sequence[str], *, whole: bool, read_chunks: bool) -> None:
        """Repair what can be, and note in the report what was. whole: all paths were verified."""
        if not (self._ledger.bad["chunks"] or self._ledger.bad["manifests"] or self._ledger.bad_packs):
            return
        lease = await alone(lambda: self._store.lease(INGEST))
        try:
            for _ in range(ROUNDS):
                await alone(lambda: self._mend(sources, whole=whole))
                self._steps.begin("repaired store paths", len(self._ledger.touched))
                if not await alone(lambda: self._check_paths(read_chunks=read_chunks)):
                    break  # else a manifest came back that names what is damaged too
        finally:
            lease.release()

    def _mend(self, sources: Sequence[str], *, whole: bool) -> None:
        mender = _Mender(self._store, self._ledger, self._mended)
        try:
            if mender:
                self._from_packs(mender)
            for source in sources:
                if mender and "://" in source:
                    self._from_cache(mender, source)
                elif mender:
                    self._from_disk(mender, Path(source))
            mender.commit()
            everything_read = whole and not mender.left["manifests"] and not self._ledger.more_bad
            if everything_read and not any(f.kind in ("path", "index") for f in self._ledger.findings):
                unneeded = [b for b in mender.left["chunks"].values() if not b.needed and b.place is not None]
                mender.forget(unneeded)
                for bad in unneeded:
                    if bad.place is not None and self._is_sealed(bad.place):
                        # its footer would bring the row back
                        self._ledger.bad_packs.setdefault(bad.place.pack, bad.finding)
            self._move_out(mender)
            self._judge(mender, sources)
        finally:
            mender.close()

    def _is_sealed(self, place: Place) -> bool:
        with self._store.read() as txn:
            raw = txn.get("packs", place.pack)
        return raw is not None and bool(PackRow.unpack(raw).sealed)

    # --- from other packs

    def _from_packs(self, mender: _Mender) -> None:
        packs = list(all_packs(self._store.state.root))
        self._steps.begin("looking for other copies", len(packs))
        for identity, kind, path in packs:
            pause()
            self._steps.step()
            if not mender:
                break
            database = "manifests" if kind == MANIFEST else "chunks"
            left = mender.left[database]
            found: list[pack.Row] = []
            with contextlib.suppress(CidfsError, OSError):  # one that is damaged or went has no more copies
                for row in _rows_of(path):
                    if row.digest in left:
                        found.append(row)
            for row in found:
                bad = left.get(row.digest)
                if bad is None or (row.kind == frames.KIND_MANIFEST) != (kind == MANIFEST):
                    continue
                place = Place(identity, row.offset, row.stored, row.length, kind, row.encoding)
                if place != bad.place:
                    self._from_copy(mender, bad, place, path)

    def _from_copy(self, mender: _Mender, bad: Bad, place: Place, path: Path) -> None:
        try:
            raw = self._store.packs.read_stored(bad.digest, place)
            frames.read_data(raw, frames.read_header(raw))
        except CidfsError:
            return
        del mender.left[bad.database][bad.digest]
        if bad.place is None:
            bad.finding.hint = f"it is in {path}: run `cidfs rebuild`"
            return
        stored = raw[frames.HEADER_SIZE :]
        mender.put_stored(bad, place.encoding, stored, place.length, f"from another copy, in {path}")

    # --- from originals

    def _from_disk(self, mender: _Mender, source: Path) -> None:
        """Take what is missing from an original, or from the paths of a Nix store."""
        nix_store = Path(f"{source}{self._store.store_dir}")
        self._steps.begin(f"reading {source}", len(self._ledger.touched))
        for path in sorted(self._ledger.touched, key=str):
            self._steps.step()
            for candidate in (nix_store / path.base_name, source / path.base_name, source / path.name):
                if mender and os.path.lexists(candidate):
                    self._from_tree(mender, DiskSource(str(candidate)), str(candidate))
                    break
        if mender and not nix_store.is_dir():
            self._from_tree(mender, DiskSource(str(source)), str(source))
            if mender.left["chunks"]:
                self._from_files(mender, source)

    def _from_cache(self, mender: _Mender, url: str) -> None:
        """Take what is missing from the NARs of a binary cache."""
        self._steps.begin(f"reading {url}", len(self._ledger.touched))
        try:
            upstream = trio.from_thread.run(open_upstream, url, self._store.store_dir)
        except CidfsError as e:
            self._say(e)
            return
        for path in sorted(self._ledger.touched, key=str):
            self._steps.step()
            if not mender:
                return
            try:
                info = trio.from_thread.run(upstream.info, path)
                if info is not None:
                    with upstream.nar(info) as read:
                        label = upstream.nar_label(info)
                        self._from_tree(mender, NarSource(read, label), label)
            except (SourceError, FormatError, PathAbsent, HashMismatch) as e:
                self._say(e)

    def _from_tree(self, mender: _Mender, source: Source, name: str) -> None:
        """Take chunks from a tree, and its manifest."""
        tree = Tree()
        chunks = mender.left["chunks"]
        try:
            for batch in source.read(tree):
                pause()
                for data in batch:
                    digest = digest_of(data)
                    tree.builder.digests += digest
                    if digest in chunks:
                        mender.put("chunks", data, digest, f"from {name}")
            manifest = tree.builder.encode()
            digest = digest_of(manifest)
            if digest in mender.left["manifests"]:
                mender.put("manifests", manifest, digest, f"from {name}")
        except (SourceError, FormatError, HashMismatch) as e:
            self._say(e)

    def _from_files(self, mender: _Mender, source: Path) -> None:
        """Take chunks from each file by itself, where something else stopped the reading of the tree."""
        for folder, _, names in os.walk(source):
            for name in names:
                if not mender.left["chunks"]:
                    return
                path = os.path.join(folder, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    self._from_tree(mender, DiskSource(path), path)

    # --- packs that are damaged where nothing reads

    def _move_out(self, mender: _Mender) -> None:
        """Give each frame of a pack with a damaged footer another place; `gc` takes the pack then."""
        packs = self._ledger.bad_packs
        if not packs:
            return
        kept: set[bytes] = set()
        for database in ("manifests", "chunks"):
            for number, (digest, place) in enumerate(self._store.places(database)):
                if number % 1000 == 0:
                    pause()
                finding = packs.get(place.pack)
                if finding is None:
                    continue
                _distrust(self._store, place)
                try:
                    raw = self._store.packs.read_stored(digest, place)
                    frames.read_data(raw, frames.read_header(raw))
                except CidfsError:
                    kept.add(place.pack)
                    continue
                bad = Bad(database, digest, place, finding)
                mender.put_stored(bad, place.encoding, raw[frames.HEADER_SIZE :], place.length, "moved")
        mender.commit()
        for identity, finding in packs.items():
            if identity not in kept:
                self._ledger.set_repaired(
                    finding, "its frames were stored again elsewhere; `cidfs gc` frees it"
                )

    # --- what came of it

    def _judge(self, mender: _Mender, sources: Sequence[str]) -> None:
        """Read everything that was repaired, and say what was and what was not."""
        whole: dict[int, bool] = {}
        for database, found in self._ledger.bad.items():
            for digest, bad in found.items():
                pause()
                how = mender.mended.get((database, digest), "")
                good = bool(how) and find_damage(self._store, Ledger(), database, digest) is None
                whole[id(bad.finding)] = whole.get(id(bad.finding), True) and good
                if good and bad.finding.kind != "pack":
                    self._ledger.set_repaired(bad.finding, how)
                elif not good and not bad.finding.hint:
                    advice = " nor in what --from names" if sources else "; name an original with --from"
                    bad.finding.hint = NO_COPY + advice
        for found in self._ledger.bad.values():
            for bad in found.values():
                if bad.finding.kind == "pack" and whole[id(bad.finding)] and not self._ledger.more_bad:
                    self._ledger.set_repaired(bad.finding, "what was in it was stored again")

    def _check_paths(self, *, read_chunks: bool) -> bool:
        """Check again the paths that were touched; say whether more damage showed."""
        fresh = Ledger()
        check = PathCheck(self._store, fresh, read_chunks=read_chunks)
        for path in sorted(self._ledger.touched, key=str):
            pause()
            self._steps.step()
            row = self._measured(path)
            if row is None or check.check(PublishedPath(path, row)):
                self._ledger.mended.add(path)
        more = self._ledger.add_from(fresh)
        everything = all(finding.repaired for finding in self._ledger.findings)
        if everything and not self._ledger.more_bad and len(self._ledger.mended) == len(self._ledger.touched):
            self._ledger.more_touches = 0
        return more

    def _measured(self, path: StorePath) -> PathRow | None:
        """Return a path's row; one that was rebuilt while its manifest was lost is completed."""
        row = self._store.find_path(path)
        if row is None or row.files or row.size:
            return row
        try:
            manifest = self._store.read_manifest(row.manifest)
        except CidfsError:
            return row
        files = manifest.count_of(FILE) + manifest.count_of(EXECUTABLE)
        if not files:
            return row
        with self._store.transaction() as index, index.write() as txn:
            now = tables.find_path(txn, path.hash_part.encode())
            if now == row:
                row = dataclasses.replace(row, size=manifest.total_size, files=files)
                txn.put("paths", path.hash_part.encode(), row.packed())
        return row


def _rows_of(path: Path) -> Iterator[pack.Row]:
    """Yield the rows of a pack: by its footer, or by its frames where there is none or a bad one."""
    size = os.stat(path).st_size
    with open(path, "rb", buffering=0) as file:
        try:
            tail = os.pread(file.fileno(), pack.TRAILER_SIZE, max(0, size - pack.TRAILER_SIZE))
            trailer = pack.read_trailer(tail, size)
            if trailer is not None:
                yield from pack.read_footer(os.pread(file.fileno(), trailer[1], trailer[0]), trailer[0])
                return
        except FormatError:
            pass
    for item in frames_of(path, len(pack.HEADER), size):
        if isinstance(item, frames.Found):
            yield pack.row_of(item.offset, item.header)
