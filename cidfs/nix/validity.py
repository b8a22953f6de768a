"""Which paths are valid, on which connection: what Nix may rely on while it builds.

A path is valid when it and all that it refers to is published, and can be seen in the overlays above the
mount (the board says up to which serial that is so). And an answer stays true on its connection: what was
absent there stays absent, and so does all that refers to it; what was valid stays valid, with its closure. A
path that another open connection counts as absent may just be built there: whether it is, its upper layer
shows. A whiteout over a valid path is what such a build, or a removal, has left: it is taken out, once nobody
counts the path as absent, before anybody hears that it is valid.

Failures of ours are answered as "absent". Methods may be called from any thread; a `Told` belongs to one
connection, and others only look into it.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from cidfs import control
from cidfs.board import GONE, Board
from cidfs.errors import CidfsError
from cidfs.formats import record
from cidfs.local.lookups import Lookups
from cidfs.local.rows import head_of_path
from cidfs.mount.overlay import Overlay, whiteouts
from cidfs.mount.watch import OverlayWatch

log = logging.getLogger(__name__)

MAX_ABSENT: Final = 50_000  # names that a connection remembers as absent
MAX_ABSENT_IN_ALL: Final = 400_000
MAX_VALID_IN_ALL: Final = 2_000_000  # remembered as said; what is more is judged anew each time
DAEMON_SECONDS: Final = 2.0
UNVEILED_AT_ONCE: Final = 1000
CLOCK_TICK_NS: Final = 100_000_000  # more than file systems' clocks are behind or coarse
HASH_PART: Final = 32


class Told:
    """What one connection was told. Names are kept as hashes of their hash parts."""

    __slots__ = ("absent", "denied", "opened", "overflowed", "socket", "valid")

    def __init__(self, opened: int, socket: int) -> None:
        self.opened = opened  # what became whole up to this serial was never absent here, unless denied
        self.socket = socket
        self.absent: set[int] = set()
        self.valid: set[int] = set()
        self.denied = False  # something that was whole when it was opened was answered as absent
        self.overflowed = False  # more was absent than is remembered

    def counts_absent(self, key: int, whole: int) -> bool:
        """Say whether a path that became whole at a serial is absent here for good."""
        return key in self.absent or (self.overflowed and (self.denied or whole > self.opened))


class Validity:
    """What is valid, for all connections of one process."""

    def __init__(self, store: Lookups, board: Board, watch: OverlayWatch, daemon: Path) -> None:
        self._store = store
        self._board = board
        self._watch = watch
        self._daemon = daemon
        self._watching = threading.Lock()
        self._changing = threading.Lock()
        self._asking = threading.Lock()
        self._sweeping = threading.Lock()
        self._open: tuple[Told, ...] = ()
        self._has_room = True
        self._keeps_valid = True
        self._uppers: dict[str, tuple[int, list[bytes]]] = {}  # time of change and whiteouts, when looked at
        self._unveiling: set[bytes] = set()  # what overlays may still hide, though no whiteout shows it
        self._away_until = 0.0
        self._failed = ""
        self.withheld = 0  # answers "absent" for what is published

    # --- connections

    def open(self, socket: int) -> Told:
        """Begin a connection."""
        told = Told(self._board.confirmed, socket)
        with self._changing:
            self._open = (*self._open, told)
        return told

    def close(self, told: Told) -> None:
        """End a connection: what was absent on it holds nobody up any more."""
        with self._changing:
            self._open = tuple(other for other in self._open if other is not told)

    def tidy(self) -> None:
        """Look how much is remembered, and sweep; to be called every now and then."""
        self._has_room = sum(len(told.absent) for told in self._open) < MAX_ABSENT_IN_ALL
        self._keeps_valid = sum(len(told.valid) for told in self._open) < MAX_VALID_IN_ALL
        try:
            self.sweep()
        except CidfsError as e:
            self._fail(e)

    # --- answers

    def is_valid(self, told: Told, name: bytes) -> bool:
        """Answer whether a path (by its base name) is valid, and remember the answer."""
        try:
            return self._is_valid(told, name)
        except CidfsError as e:
            self._fail(e)
            return False

    def find(self, told: Told, name: bytes) -> record.Record | None:
        """Return the record of a path that is valid, and remember the answer."""
        if not self.is_valid(told, name):
            return None
        try:
            return self._store.record_of(name[:HASH_PART].decode())
        except CidfsError as e:
            self._fail(e)
            return None

    def facts(self, told: Told, name: bytes) -> record.Facts | None:
        """Return what Nix is told of a path that is valid, and remember the answer."""
        if not self.is_valid(told, name):
            return None
        try:
            raw = self._store.current().get("records", name[:HASH_PART])
        except CidfsError as e:
            self._fail(e)
            return None
        return record.facts_in(raw) if raw is not None else None

    def name_of(self, told: Told, hash_part: bytes) -> bytes:
        """Return the base name of the valid path that has a hash part, empty when there is none."""
        try:
            raw = self._store.current().get("paths", hash_part)
        except CidfsError as e:
            self._fail(e)
            return b""
        name = hash_part + b"-" + (head_of_path(raw)[1] if raw is not None else b"absent")
        return name if self.is_valid(told, name) else b""

    def valid_of(self, told: Told, names: Iterable[bytes]) -> list[bytes]:
        """Return which of some published paths are valid; the others were not asked for by name."""
        found = []
        for name in names:
            known = hash(name[:HASH_PART]) in told.absent
            if self.is_valid(told, name):
                found.append(name)
            elif not known:
                told.absent.discard(hash(name[:HASH_PART]))
        return found

    def all_valid(self, told: Told) -> list[bytes]:
        """Return the base names of all valid paths."""
        names = (each.path.base_name.encode() for each in self._store.paths() if each.row.whole)
        return self.valid_of(told, names)

    def referrers(self, told: Told, name: bytes) -> list[bytes]:
        """Return the base names of the valid paths that refer to a path, itself included where it does."""
        if not self.is_valid(told, name):
            return []
        hash_part = name[:HASH_PART].decode()
        found = []
        for other in self._store.referrers(hash_part):
            raw = self._store.current().get("paths", other.encode())
            if raw is not None:
                found.append(other.encode() + b"-" + head_of_path(raw)[1])
        own = self._store.record_of(hash_part)
        if own is not None and name.decode() in own.references:
            found.append(name)
        return self.valid_of(told, found)

    def remember_absent(self, told: Told, what: object) -> bool:
        """Say whether something other than a path is absent on a connection, and let it be so from now on."""
        key = hash(what)
        if key in told.absent:
            return True
        self._note(told, key)
        return False

    def forget_absent(self, told: Told, what: object) -> None:
        """Take back what was just remembered: it is there."""
        told.absent.discard(hash(what))

    def _is_valid(self, told: Told, name: bytes) -> bool:
        hash_part = name[:HASH_PART]
        key = hash(hash_part)
        if key in told.absent:
            return False
        said = key in told.valid
        if not said:
            self._note(told, key)  # before it is looked: who looks at the same time sees that it may be so
        raw = self._store.current().get("paths", hash_part)
        if raw is None:
            whole, found = 0, b""
        else:
            whole, found = head_of_path(raw)
        if found != name[HASH_PART + 1 :]:
            if said:  # removed since, by force
                told.valid.discard(key)
                self._note(told, key)
            return False
        if said:
            return True
        if self._commit(told, name, whole):
            told.absent.discard(key)
            return True
        if 0 < whole <= told.opened:
            told.denied = True
        self.withheld += 1
        return False

    def _note(self, told: Told, key: int) -> None:
        if len(told.absent) < MAX_ABSENT and self._has_room:
            told.absent.add(key)
        else:
            told.overflowed = True

    def _commit(self, told: Told, name: bytes, whole: int) -> bool:
        """Say whether a published path and its closure can be called valid, and if so commit to it."""
        if not whole or (whole > self._board.confirmed and not self._confirm(whole)):
            return False
        if told.overflowed and (told.denied or whole > told.opened):
            return False
        overlays = self.overlays()
        if not overlays and not told.denied and (whole <= told.opened or len(told.absent) <= 1):
            if self._keeps_valid:
                told.valid.add(hash(name[:HASH_PART]))
            return True
        committed: set[int] = set()
        waiting = [name]
        index = self._store.current()
        while waiting:
            here = waiting.pop()
            key = hash(here[:HASH_PART])
            if key in told.valid or key in committed:
                continue
            raw, known = index.get("paths", here[:HASH_PART]), index.get("records", here[:HASH_PART])
            if raw is None or known is None:
                return False
            when, found = head_of_path(raw)
            if found != here[HASH_PART + 1 :] or not when or (here != name and told.counts_absent(key, when)):
                return False
            if overlays and not self._is_clear(told, here, key, when, overlays):
                return False
            committed.add(key)
            waiting += record.facts_in(known).references
        if self._keeps_valid:
            told.valid |= committed
        return True

    def _fail(self, error: CidfsError) -> None:
        if str(error) != self._failed:
            self._failed = str(error)
            log.error("answered as absent: %s", error)

    # --- overlays

    def overlays(self) -> tuple[Overlay, ...]:
        """Return the overlays that stand above the mount."""
        with self._watching:
            return self._watch.standing()

    def _is_clear(self, told: Told, name: bytes, key: int, whole: int, overlays: tuple[Overlay, ...]) -> bool:
        """Say whether nothing in an upper hides a path, and nobody is just building it."""
        contested = self._is_contested(told, key, whole)
        for overlay in overlays:
            if not overlay.upper:
                continue
            place = os.fsencode(overlay.upper) + b"/" + name
            kind = _kind(place)
            if kind == _WHITEOUT or name in self._unveiling:
                if contested or not self._unveil([name]) or _kind(place) == _WHITEOUT:
                    return False
            elif contested and (kind != _NOTHING or _kind(place + b".lock") != _NOTHING):
                return False
        return True

    def _is_contested(self, told: Told | None, key: int, whole: int) -> bool:
        """Say whether an open connection, other than told, counts a path as absent."""
        others = [o for o in self._open if o is not told and o.counts_absent(key, whole)]
        return any(not _has_hung_up(other.socket) for other in others)

    def sweep(self) -> None:
        """Take whiteouts out that lie over whole paths which no open connection counts as absent."""
        with self._sweeping:
            found = {name for overlay in self.overlays() for name in self._whiteouts(overlay.upper)}
            free = [name for name in found if self._is_published(name) and not self._is_held(name)]
            for i in range(0, len(free), UNVEILED_AT_ONCE):
                self._unveil(free[i : i + UNVEILED_AT_ONCE])

    def _whiteouts(self, upper: str) -> list[bytes]:
        """Return the whiteouts in an upper; it is listed only where it may have changed since it was last."""
        if not upper:
            return []
        try:
            changed = os.stat(upper).st_mtime_ns
        except OSError:
            return []
        when, found = self._uppers.get(upper, (0, []))
        if when != changed:
            found = whiteouts(upper)
            if time.time_ns() - changed > CLOCK_TICK_NS:  # else it may change again and look the same
                self._uppers[upper] = changed, found
        return found

    def _is_published(self, name: bytes) -> bool:
        raw = self._store.current().get("paths", name[:HASH_PART]) if len(name) > HASH_PART else None
        if raw is None:
            return False
        whole, found = head_of_path(raw)
        return 0 < whole <= self._board.confirmed and found == name[HASH_PART + 1 :]

    def _is_held(self, name: bytes) -> bool:
        raw = self._store.current().get("paths", name[:HASH_PART])
        return raw is None or self._is_contested(None, hash(name[:HASH_PART]), head_of_path(raw)[0])

    # --- what the daemon does for us

    def _confirm(self, serial: int) -> bool:
        """Have what became whole at a serial shown in the overlays; say whether it is."""
        return self._have_done(control.Request("refresh"), lambda: serial <= self._board.confirmed)

    def _unveil(self, names: list[bytes]) -> bool:
        """Have whiteouts over whole paths taken out; say whether what they hid is to be seen."""
        self._unveiling.update(names)  # an overlay hides them for a while after the whiteouts have gone
        asked = tuple(name.decode() for name in names)
        done = self._have_done(control.Request("unveil", names=asked), lambda: False)
        if done:
            self._unveiling.difference_update(names)
        return done

    def _have_done(self, request: control.Request, is_done: Callable[[], bool]) -> bool:
        if self._board.state == GONE or not self._asking.acquire(timeout=DAEMON_SECONDS):
            return False
        try:
            if is_done():  # by one who asked before
                return True
            if time.monotonic() < self._away_until:
                return False
            done = control.have_done(self._daemon, request, DAEMON_SECONDS)
        except OSError as e:
            self._away_until = time.monotonic() + DAEMON_SECONDS
            log.warning("the daemon does not answer (%s): new store paths are absent until it does", e)
            return False
        finally:
            self._asking.release()
        return done


_NOTHING: Final = 0
_SOMETHING: Final = 1
_WHITEOUT: Final = 2


def _kind(place: bytes) -> int:
    """Return what lies at a place of an upper layer."""
    try:
        info = os.lstat(place)
    except OSError:
        return _NOTHING
    return _WHITEOUT if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0 else _SOMETHING


def _has_hung_up(socket: int) -> bool:
    """Say whether the other end of a connection has gone, which its own thread may not have seen yet."""
    poll = select.poll()
    poll.register(socket, select.POLLRDHUP)
    return bool(poll.poll(0))
