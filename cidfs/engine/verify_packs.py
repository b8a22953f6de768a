"""The packs' part of verification: each is read from end to end, once.

Every frame that the index refers to must be whole and where the index says; a sealed pack's footer must say
what is in the pack. Threads share nothing but the ledger and the packs that need a second look.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from typing import Final

from cidfs.engine.findings import Bad, Ledger, Report
from cidfs.engine.progress import Steps
from cidfs.engine.workers import alone, for_each, pause
from cidfs.errors import CidfsError, FormatError
from cidfs.formats import frames, pack
from cidfs.local.packs import MANIFEST, bad_mark, pack_path
from cidfs.local.rows import PackRow, Place
from cidfs.local.store import LocalStore

LOOK_UPS: Final = 1000


def find_damage(store: LocalStore, ledger: Ledger, database: str, digest: bytes) -> Bad | None:
    """Look at a chunk or manifest afresh; take it into the ledger if it cannot be read.

    None when it can be after all, or when the index has no row for it (any more).
    """
    error: CidfsError | None = None
    place: Place | None = None
    for _ in range(2):  # another index may count by now, and a collection may have moved it
        store.refresh(store.lock_timeout)
        place = store.place(database, digest)
        if place is None:
            continue
        store.packs.forget(place.pack)
        try:
            store.packs.read(digest, place)
        except CidfsError as e:
            error = e
            continue
        return None
    if place is None or error is None:
        return None
    path = pack_path(store.state.root, place.kind, place.pack)
    return ledger.add_bad(database, digest, place, str(path), str(error))


class _Frames:
    """Offset and digest of a pack's whole frames, 36 bytes each."""

    def __init__(self) -> None:
        self._offsets = array("I")
        self._digests = bytearray()

    def take(self, found: list[tuple[int, bytes]]) -> None:
        """Take frames in the order of their offsets, out of a list."""
        self._offsets.extend(offset for offset, _ in found)
        self._digests += b"".join(digest for _, digest in found)
        found.clear()

    def digest_at(self, offset: int) -> bytes:
        """Return the digest of the frame at an offset; empty where there is none."""
        at = bisect_left(self._offsets, offset)
        if at == len(self._offsets) or self._offsets[at] != offset:
            return b""
        return bytes(self._digests[32 * at : 32 * at + 32])


class PackCheck:
    """One pass over all packs that the index refers to."""

    def __init__(self, store: LocalStore, report: Report) -> None:
        self._store, self._report, self._ledger = store, report, report.ledger
        self._lock = threading.Lock()
        self._suspects: dict[bytes, array[int]] = {}  # packs that lack frames -> offsets of those they have

    async def run(self, steps: Steps) -> None:
        """Read all packs; then look afresh at each frame that was not found."""
        packs = await alone(lambda: [item for item in self._store.pack_rows() if item[1].frames])
        steps.begin("packs", len(packs))
        self._report.packs = await for_each(packs, lambda item: self._check(*item), steps)
        if self._suspects:
            steps.begin("damaged packs", len(self._suspects))
            await alone(self._look_again)

    def _check(self, identity: bytes, row: PackRow) -> None:
        path = pack_path(self._store.state.root, row.kind, identity)
        wanted = frames.KIND_MANIFEST if row.kind == MANIFEST else frames.KIND_CHUNK
        try:
            data = path.read_bytes()
        except OSError:
            with self._lock:
                self._suspects[identity] = array("I")
            return
        there = _Frames()
        offsets, size = array("I"), 0
        slice_: list[tuple[int, bytes]] = []
        footer = False
        for item in frames.scan(data):
            if isinstance(item, frames.Found):
                footer = item.header.kind == frames.KIND_FOOTER
                if item.header.kind == wanted:
                    slice_.append((item.offset, item.header.digest))
            if len(slice_) >= LOOK_UPS:
                size += self._of_index(identity, row, slice_, offsets)
                there.take(slice_)
        size += self._of_index(identity, row, slice_, offsets)
        there.take(slice_)
        with self._lock:
            self._report.frames += len(offsets)
            self._report.bytes += size
            if len(offsets) < row.frames:
                self._suspects[identity] = offsets
        if data[: len(pack.HEADER)] != pack.HEADER:
            self._ledger.add("pack", str(path), str(path), f"{path}: does not begin as a pack does")
        if row.sealed and not bad_mark(path).exists():
            self._check_footer(identity, str(path), data, there, footer=footer)

    def _of_index(
        self, identity: bytes, row: PackRow, found: list[tuple[int, bytes]], offsets: array[int]
    ) -> int:
        """Note the offsets of those frames that the index refers to; return how long they are."""
        pause()
        size = 0
        database = "manifests" if row.kind == MANIFEST else "chunks"
        with self._store.read() as txn:
            for offset, digest in found:
                raw = txn.get(database, digest)
                if raw is not None:
                    place = Place.unpack(raw)
                    if place.pack == identity and place.offset == offset:
                        offsets.append(offset)
                        size += frames.HEADER_SIZE + place.stored
        return size

    def _check_footer(self, identity: bytes, path: str, data: bytes, there: _Frames, *, footer: bool) -> None:
        try:
            trailer = pack.read_trailer(data[-pack.TRAILER_SIZE :], len(data))
            if trailer is None:
                if not footer:
                    return  # whoever was to seal it died while he did
                raise FormatError("pack: trailer is gone")
            offset, length = trailer
            rows = pack.footer_rows(memoryview(data)[offset : offset + length], offset)
            wrong = [row for row in rows if there.digest_at(row.offset) != row.digest]
        except FormatError as e:
            problem = f"{path}: {e}; the frames before it say the same"
        else:
            wrong = [row for row in wrong if not self._has_row(row)]
            if not wrong:
                return
            problem = f"{path}: a frame that nothing needs is damaged (+{wrong[0].offset})"
            if len(wrong) > 1:
                problem = f"{path}: {len(wrong)} frames that nothing needs are damaged (+{wrong[0].offset} …)"
        finding = self._ledger.add("pack", path, path, problem)
        self._ledger.bad_packs[identity] = finding

    def _has_row(self, row: pack.Row) -> bool:
        """Whether the index knows where to find this: here, or another copy, and rebuild will know too."""
        database = "manifests" if row.kind == frames.KIND_MANIFEST else "chunks"
        return self._store.place(database, row.digest) is not None

    def _look_again(self) -> None:
        """Read by itself each frame that the index has in a suspect pack and that was not found there."""
        for database in ("manifests", "chunks"):
            for number, (digest, place) in enumerate(self._store.places(database)):
                if number % 1000 == 0:
                    pause()
                offsets = self._suspects.get(place.pack)
                if offsets is None:
                    continue
                at = bisect_left(offsets, place.offset)
                if at == len(offsets) or offsets[at] != place.offset:
                    try:
                        self._store.packs.read(digest, place)
                    except CidfsError:
                        find_damage(self._store, self._ledger, database, digest)
