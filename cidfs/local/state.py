"""The state folder: its format, the write lock, the inode limit, which index is current, who is at work.

    format          what kind of store this is; written last when a store is made
    write.lock      flock: whoever holds it may run a write transaction
    next-inode      two checksummed slots, 4 KiB apart: no inode number from this limit on was ever given out
    journal/<n>     what was committed
    packs/own|cache|manifest/<aa>/<id>
    index/<n>/      LMDB; index/current says which one counts
    run/            leases (flocked files), control sockets, logs

Synchronous. `StateFolder` is safe for several threads and processes; `write.lock` is held by one thread at a
time.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from cidfs.errors import (
    CidfsError,
    DiskFailed,
    FormatError,
    IndexLost,
    LockTimeout,
    NotPermitted,
    StoreAbsent,
    StoreVersion,
)
from cidfs.formats.chunking import PARAMETERS
from cidfs.formats.digest import checksum
from cidfs.local import leases, room
from cidfs.local.files import (
    disk_errors,
    mapped,
    replace_durably,
    sync_folder,
    try_flock,
    write_all,
)
from cidfs.local.leases import Lease, LeaseInfo

VERSION: Final = 1
NIX_SOCKET: Final = "nix.sock"  # where Nix asks for metadata, of the store's first mount
NIX_LOCK: Final = f"{NIX_SOCKET}.lock"  # held by whoever listens there
PACK_KINDS: Final = ("own", "cache", "manifest")
DEFAULT_LOCK_TIMEOUT: Final = 30.0
FIRST_INODE: Final = 16
_SLOT: Final = struct.Struct("<Q")
_SLOT_DISTANCE: Final = 4096


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `format`."""

    version: int
    id: str
    store_dir: str
    chunking: str
    features: list[str] = []


class StateFolder:
    """A store's folder on disk, opened."""

    def __init__(self, root: Path, form: Format) -> None:
        self.root = root
        self.format = form
        self._thread_lock = threading.Lock()

    # --- making and opening

    @classmethod
    def open(cls, root: Path) -> StateFolder:
        """Open an existing store; raise StoreAbsent, StoreVersion or NotPermitted."""
        try:
            raw = (root / "format").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if _has_journal(root):
                raise StoreAbsent(f"{root}: a store that lost its file `format`; {_FORMAT_ADVICE}") from None
            raise StoreAbsent(
                f"{root}: no store here; make one with `cidfs --state {root} add DIR`, or name another"
            ) from None
        except OSError as e:
            raise mapped(e, root / "format", "read") from None
        try:
            version = msgspec.json.decode(raw, type=dict[str, Any]).get("version")
            if version != VERSION:
                raise StoreVersion(
                    f"{root}: a store of version {version!r}, and this cidfs knows version {VERSION}:"
                    " use the cidfs that wrote it"
                )
            form = msgspec.json.decode(raw, type=Format)
        except (msgspec.MsgspecError, UnicodeDecodeError) as e:
            raise FormatError(f"{root}/format: cannot be read ({e}); {_FORMAT_ADVICE}") from None
        if form.features or form.chunking != PARAMETERS:
            unknown = ", ".join(form.features) or form.chunking
            raise StoreVersion(f"{root}: the store needs what this cidfs does not know: {unknown}")
        return cls(root, form)

    @classmethod
    def create(cls, root: Path, store_dir: str, *, lock_timeout: float = DEFAULT_LOCK_TIMEOUT) -> StateFolder:
        """Make a store in a folder, or open the one that is there; two processes may try at once."""
        with contextlib.suppress(StoreAbsent):
            return cls.open(root)
        with disk_errors(root, "make a store here"):
            try:
                root.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise StoreAbsent(f"{root}: is not a folder; name another with --state") from None
            _refuse_strangers(root)
        form = Format(version=VERSION, id=os.urandom(16).hex(), store_dir=store_dir, chunking=PARAMETERS)
        state = cls(root, form)
        with state.write_lock(lock_timeout):
            with contextlib.suppress(StoreAbsent):
                return cls.open(root)
            _refuse_strangers(root)
            with disk_errors(root, "make a store here"):
                for kind in PACK_KINDS:
                    for i in range(256):
                        (root / "packs" / kind / f"{i:02x}").mkdir(parents=True, exist_ok=True)
                for name in ("journal", "index", "run"):
                    (root / name).mkdir(exist_ok=True)
                (root / "next-inode").write_bytes(b"")
                (root / "journal" / "1").touch()
            state.write_inode_limit(FIRST_INODE)
            for kind in PACK_KINDS:
                sync_folder(root / "packs" / kind)
            for name in ("packs", "journal", "run", "."):
                sync_folder(root / name)
        return state

    def finish_creation(self) -> None:
        """Make the store valid: called under the write lock, after its first index exists."""
        replace_durably(self.root / "format", msgspec.json.format(msgspec.json.encode(self.format)) + b"\n")
        sync_folder(self.root.parent)
        # whoever made the folders above may have died before syncing them: up to the file system's root
        device = self.root.stat().st_dev
        for folder in self.root.absolute().parents[1:]:
            with contextlib.suppress(CidfsError, OSError):
                if folder.stat().st_dev != device:
                    break
                sync_folder(folder)

    # --- the write lock

    @contextlib.contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        """Hold write.lock; raise LockTimeout naming the holder after timeout seconds."""
        path = self.root / "write.lock"
        if not self._thread_lock.acquire(timeout=timeout):
            raise LockTimeout(f"{path}: another thread of this process held it for {timeout:g} s")
        try:
            with _locked(path, timeout):
                yield
        finally:
            self._thread_lock.release()

    def collector_lock(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Hold gc.lock: one collection at a time. Raise LockTimeout naming the holder."""
        return _locked(self.root / "gc.lock", timeout)

    # --- the inode limit

    def inode_limit(self) -> int:
        """Return the highest limit that a whole slot of next-inode holds; raise FormatError when none is."""
        limit = max(self._inode_slots())
        if limit < 0:
            raise FormatError(
                f"{self.root}/next-inode: both slots are damaged; `cidfs rebuild --accept-loss` goes on"
                " from the journal's end"
            )
        return limit

    def _inode_slots(self) -> list[int]:
        """Return the limits of both slots, -1 for one that is damaged or not there."""
        raw = b""
        with disk_errors(self.root / "next-inode", "read"), contextlib.suppress(FileNotFoundError):
            raw = (self.root / "next-inode").read_bytes()
        slots = [raw[offset : offset + 16] for offset in (0, _SLOT_DISTANCE)]
        return [
            int(_SLOT.unpack(s[:8])[0]) if len(s) == 16 and checksum(s[:8]) == s[8:] else -1 for s in slots
        ]

    def write_inode_limit(self, limit: int) -> None:
        """Raise the limit, durably: the lower slot is overwritten.

        After a failed sync a new file replaces it.
        """
        path = self.root / "next-inode"
        slot = _SLOT.pack(limit)
        slot += checksum(slot)
        first, second = self._inode_slots()
        target = 0 if first <= second else _SLOT_DISTANCE
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                write_all(fd, slot, target)
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError:
            replace_durably(path, slot + bytes(_SLOT_DISTANCE - len(slot)) + slot)
        else:
            sync_folder(self.root)  # whoever made this file may have died before doing so

    # --- which index is current

    def current_index(self) -> int:
        """Return the number of the index that counts; raise IndexLost."""
        path = self.root / "index" / "current"
        try:
            raw = path.read_bytes()
            number, _, check = raw.strip().partition(b" ")
            if checksum(number).hex().encode() == check:
                return int(number)
            problem = "is damaged"
        except (FileNotFoundError, NotADirectoryError, ValueError):
            problem = "is gone"
        except PermissionError:
            raise NotPermitted(f"{path}: permission denied; run as the owner of the store") from None
        raise IndexLost(f"{path}: {problem}; run `cidfs --state {self.root} rebuild`")

    def index_stamp(self) -> tuple[int, int] | None:
        """Return what changes whenever the pointer is switched; None while there is no pointer."""
        try:
            s = os.stat(self.root / "index" / "current")
        except OSError:
            return None
        return s.st_ino, s.st_mtime_ns

    def switch_index(self, number: int) -> None:
        """Make an index the current one, durably. Under the write lock."""
        text = str(number).encode()
        replace_durably(self.root / "index" / "current", text + b" " + checksum(text).hex().encode() + b"\n")

    # --- leases

    def take_lease(self, kind: str, serial: int, *, mountpoint: str = "", transport: str = "") -> Lease:
        """Say in run/ that this process is at work, since a serial. To be called before its first look-up."""

        def take() -> Lease:
            return leases.take(self.root / "run", kind, serial, mountpoint=mountpoint, transport=transport)

        try:
            return take()
        except DiskFailed:  # nothing else is needed to read what is on a full disk
            if kind != leases.MOUNT or not room.release(self.root):
                raise
        return take()

    def leases(self) -> list[tuple[Path, LeaseInfo]]:
        """Return the leases whose holders live."""
        return leases.held(self.root / "run")


_OUR_NAMES: Final = {
    "ballast",
    "format",
    "gc.lock",
    "index",
    "journal",
    "lost+found",
    "next-inode",
    NIX_SOCKET,
    NIX_LOCK,
    "packs",
    "run",
    "write.lock",
}
_FORMAT_ADVICE: Final = (
    "restore that from a backup, or copy it from another store for the same store directory: only its id"
    " differs"
)
_LOCK_ADVICE: Final = "let it go on or end it, then try again"


@contextlib.contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold a lock file; raise LockTimeout naming the holder after timeout seconds."""
    deadline = time.monotonic() + timeout
    with disk_errors(path, "lock"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        pause = 0.0005
        while not try_flock(fd):
            if time.monotonic() >= deadline:
                raise LockTimeout(f"{path}: {_holder(fd)} held it for {timeout:g} s; {_LOCK_ADVICE}")
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        with contextlib.suppress(OSError):  # a full disk; the name is for messages alone
            os.pwrite(fd, f"{os.getpid():<10}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _has_journal(root: Path) -> bool:
    """Say whether something was ever published in a folder."""
    try:
        return any(f.stat().st_size for f in root.glob("journal/*"))
    except OSError:
        return False


def _refuse_strangers(root: Path) -> None:
    """Raise StoreAbsent when there is something in a folder that no store would put there."""
    if (root / "format").exists():
        return  # another process has just made it
    if _has_journal(root):
        raise StoreAbsent(f"{root}: a store that lost its file `format`; {_FORMAT_ADVICE}")
    strange = sorted(n for n in os.listdir(root) if n.partition(".tmp-")[0] not in _OUR_NAMES)
    if strange:
        raise StoreAbsent(
            f"{root}: not empty and no store ({strange[0]!r} is in it); name another with --state"
        )


def _holder(fd: int) -> str:
    """Name the process that last took a lock, as far as it can be known."""
    try:
        pid = int(os.pread(fd, 11, 0))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return "another process"
    command = b" ".join(words).decode(errors="replace").strip()[:100]
    return f"process {pid} ({command}{', stopped' if state in 'tT' else ''})"
