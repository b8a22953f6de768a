"""Sparse packs: what is needed is copied out of them, so that they can go.

Where there is no room for a copy, the space of what is dead is given back in place. A part of a collection:
under its lock, and only while no ingest runs. Synchronous.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

from cidfs.errors import CidfsError, DiskFailed
from cidfs.formats import frames, pack
from cidfs.local import room
from cidfs.local.files import disk_errors, leads_to, mapped, punch, try_flock
from cidfs.local.index import Index, ReadTxn
from cidfs.local.leases import at_work
from cidfs.local.packs import MANIFEST, PackWriter, bad_mark, distrust, pack_path
from cidfs.local.rows import PackRow, Place
from cidfs.local.store import LocalStore
from cidfs.local.survey import PackFile, Report, Survey, digests_of, pack_file

ROWS_A_TRANSACTION: Final = 2000
HOLE: Final = 4096  # a smaller one would free nothing
SPARSE: Final = 4  # a pack is copied when one part in so many of it is dead


class SparsePacks:
    """The sparse packs of a survey.

    locked holds the write lock as the collection does; drop unlinks packs without rows and counts them.
    """

    def __init__(
        self,
        store: LocalStore,
        survey: Survey,
        report: Report,
        locked: Callable[[], AbstractContextManager[Index]],
        drop: Callable[[list[bytes]], int],
        progress: Callable[[str, int], None],
    ) -> None:
        self._store = store
        self._state = store.state
        self._survey = survey
        self._report = report
        self._locked = locked
        self._drop = drop
        self._progress = progress

    def find(self) -> dict[bytes, int]:
        """Return the packs of which much is dead, and what is needed of each.

        Those first that free most for what is copied.
        """
        live = self._survey.live_bytes()
        found = []
        for identity, here in self._survey.packs.items():
            needed = live.get(identity, 0)
            if needed and here.path.exists():
                used = _frames_end(here) - len(pack.HEADER)
                unsure = bad_mark(here.path).exists()  # what it holds may be in memory alone
                if (used - needed) * SPARSE >= used or unsure:
                    found.append((0.0 if unsure else needed / used, identity, needed))
        return {identity: needed for _, identity, needed in sorted(found)}

    def copy(self) -> None:
        """Copy what is needed out of sparse packs, so that they can go.

        Not while an ingest runs, which may need the rest. Where there is no room for the copy, the space of
        the dead frames is given back in place.
        """
        if at_work(self._state.leases()):
            return
        sparse = self.find()
        for number, (identity, needed) in enumerate(sparse.items()):
            self._progress("copying out of sparse packs", len(sparse) - number)
            here = self._survey.packs[identity]
            with self._held(here) as fd:
                if fd < 0:
                    continue
                if room.free_bytes(self._state.root) < needed + room.LOW:
                    self._punch(identity, here, fd)
                    continue
                copied = self._copy(identity, here, set(sparse))
            if copied and self._drop([identity]):
                self._report.packs -= 1
                self._report.pack_bytes -= here.occupied
                self._report.sparse += 1
                self._report.sparse_bytes += max(0, here.occupied - copied)

    @contextlib.contextmanager
    def _held(self, here: PackFile) -> Iterator[int]:
        """Hold a pack's lock, so that nobody appends; yield its descriptor, -1 where it cannot be had."""
        try:
            fd = os.open(here.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            yield -1
            return
        except OSError as e:
            raise mapped(e, here.path, "open") from e
        try:
            ours = try_flock(fd) and leads_to(here.path, fd) and os.fstat(fd).st_size == here.size
            yield fd if ours else -1
        finally:
            os.close(fd)

    def _punch(self, identity: bytes, here: PackFile, fd: int) -> None:
        """Give back the space of what has no row in a pack. It is marked first: its footer tells of more."""
        name = "manifests" if here.kind == MANIFEST else "chunks"
        with self._locked() as index:
            if at_work(self._state.leases()):
                return
            with index.read() as txn:
                raw = txn.get("packs", identity)
                live = sorted(place for _, place in self._places_in(txn, name, identity))
            if raw is None or PackRow.unpack(raw).frames != len(live):
                return
            try:
                distrust(here.path)
                before = os.fstat(fd).st_blocks
                start = len(pack.HEADER)
                for place in [*live, None]:
                    end = place.offset if place is not None else _frames_end(here)
                    if end - start >= HOLE:
                        punch(fd, start, end - start)
                    if place is not None:
                        start = end + frames.HEADER_SIZE + place.stored
                os.fdatasync(fd)
            except (OSError, DiskFailed) as e:  # a file system that cannot do it, say
                self._report.problems.append(f"{here.path}: no room to copy what is needed ({e})")
                return
            self._report.sparse += 1
            self._report.sparse_bytes += max(0, before - os.fstat(fd).st_blocks) * 512

    def _places_in(self, txn: ReadTxn, name: str, identity: bytes) -> Iterator[tuple[bytes, Place]]:
        """Yield the rows that lie in a pack."""
        done: set[bytes] = set()
        for prefix in self._survey.marks[name].rows_in(identity):
            for digest in digests_of(txn, name, prefix):
                raw = txn.get(name, digest)
                if digest not in done and raw is not None and (place := Place.unpack(raw)).pack == identity:
                    done.add(digest)
                    yield digest, place

    def _copy(self, identity: bytes, here: PackFile, sparse: set[bytes]) -> int:
        """Copy the frames of a pack that have rows, and move the rows; return the bytes that were copied."""
        name = "manifests" if here.kind == MANIFEST else "chunks"
        with self._store.read() as txn:
            places = list(self._places_in(txn, name, identity))
        places.sort(key=lambda item: item[1].offset)
        writer = self._store.pack_writer(here.kind, without=sparse)
        moved: list[tuple[bytes, Place, Place]] = []
        copied = 0
        try:
            for digest, place in places:
                try:
                    stored = self._store.packs.read_stored(digest, place)
                    frames.read_data(stored, frames.read_header(stored))
                except CidfsError:  # it stays where it is, for `verify` to name and repair
                    self._report.problems.append(
                        f"{here.path}: the frame at {place.offset} is damaged and stays; see `cidfs verify`"
                    )
                    continue
                data = stored[frames.HEADER_SIZE :]
                new = writer.append(digest, place.encoding, data, place.length)
                moved.append((digest, place, new))
                copied += len(stored)
            writer.sync()
            for i in range(0, max(1, len(moved)), ROWS_A_TRANSACTION):
                with self._locked() as index, index.write() as txn:
                    for digest, old, new in moved[i : i + ROWS_A_TRANSACTION]:
                        if txn.get(name, digest) == old.packed():
                            txn.put_place(name, digest, new)
                    self._store.note_packs(txn, writer)
        except DiskFailed as e:
            self._report.problems.append(f"{here.path}: what is needed of it could not be copied ({e})")
            copied = 0
        finally:
            writer.close()
        self._store.packs.forget(identity)
        if not copied:
            self._drop_new(writer)
        return copied if len(moved) == len(places) else 0

    def _drop_new(self, writer: PackWriter) -> None:
        """Take the packs away that a copy that came to nothing has made."""
        for identity in writer.made:
            path = pack_path(self._state.root, writer.kind, identity)
            with contextlib.suppress(FileNotFoundError):
                here = self._survey.packs[identity] = pack_file(writer.kind, path)
                if self._drop([identity]):
                    self._report.packs -= 1
                    self._report.pack_bytes -= here.occupied


def _frames_end(here: PackFile) -> int:
    """Return where the frames of a pack end: at its footer, if it has one."""
    with disk_errors(here.path, "read"), open(here.path, "rb") as file:
        file.seek(max(0, here.size - pack.TRAILER_SIZE))
        tail = file.read(pack.TRAILER_SIZE)
    try:
        trailer = pack.read_trailer(tail, here.size)
    except CidfsError:
        trailer = None
    return trailer[0] if trailer is not None else here.size
