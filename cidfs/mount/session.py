"""A mount as the operating system sees it: options, read-ahead, namespaces, taking it down.

Owns every privileged call. `isolate` must run before any thread starts. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from cidfs.errors import CidfsError, MountFailed, MountPointAbsent, MountPointBusy, NotPermitted
from cidfs.local.leases import LeaseInfo
from cidfs.local.state import StateFolder

log = logging.getLogger(__name__)

FILE_SYSTEM_TYPE: Final = "fuse.cidfs"
READ_AHEAD_KIB: Final = 1024
HELPER_SECONDS: Final = 20.0

_MAY_HANG: Final = ("fuse", "nfs", "cifs", "9p", "ceph")

_CLONE_FS: Final = 0x200
_CLONE_NEWNS: Final = 0x20000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MS_SLAVE: Final = 0x80000
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountInfo:
    """A line of mountinfo."""

    device: str
    mountpoint: str
    type: str
    source: str
    options: str


def mounts() -> list[MountInfo]:
    """Return what is mounted in this process's namespace, oldest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        found.append(MountInfo(fields[2], _unescape(fields[4]), rest[0], *map(_unescape, rest[1:3])))
    return found


def mounted_at(mountpoint: Path) -> MountInfo | None:
    """Return what is mounted uppermost at a folder, without touching it."""
    here = None
    for info in mounts():
        if info.mountpoint == str(mountpoint):
            here = info
    return here


def overlays_above(mountpoint: Path) -> list[str]:
    """Return where the overlays are mounted that have a folder, or one in it, among their lower layers.

    The kernel does not call a lower layer busy: taking it down leaves a file system that nobody can reach.
    """
    inside = f"{mountpoint}/"
    found = []
    mounted = mounts()
    # who looks at one that is dead waits for it
    untouched = {info.mountpoint for info in mounted if info.type.startswith(_MAY_HANG)}
    for info in mounted:
        layers = [
            layer
            for option in info.options.split(",")
            if info.type == "overlay" and option.startswith("lowerdir")
            for layer in option.partition("=")[2].split(":")
        ]
        if any(f"{_followed(layer, untouched)}/".startswith(inside) for layer in layers if layer):
            found.append(info.mountpoint)
    return found


def _followed(layer: str, untouched: set[str]) -> str:
    """Return what a layer's name leads to; names of mounts, and what is below them, are left as they are."""
    for _ in range(40):  # as many links as the kernel follows
        if any(f"{layer}/".startswith(f"{mount}/") for mount in untouched):
            return layer
        if not os.path.islink(layer):
            return str(resolve(Path(layer)))
        layer = os.path.normpath(os.path.join(os.path.dirname(layer), os.readlink(layer)))
    return layer


def source_of(info: MountInfo) -> Path:
    """Return the state folder that a cidfs mount shows as its source."""
    return Path(os.fsdecode(unquote_to_bytes(info.source)))


def daemons_of(state: Path, mountpoint: Path) -> set[int]:
    """Return the processes that say in a state folder that they serve a mount point, and live."""
    return {info.pid for info in _leases_of(state, mountpoint)}


def daemon_of(state: Path, mountpoint: Path) -> int:
    """Return the process behind what is mounted uppermost at a mount point now; 0 for none.

    Others may be behind what was mounted there before and is still in use.
    """
    newest = max(_leases_of(state, mountpoint), key=lambda info: info.started, default=None)
    return newest.pid if newest is not None else 0


def _leases_of(state: Path, mountpoint: Path) -> list[LeaseInfo]:
    try:
        leases = StateFolder.open(state).leases()
    except CidfsError:
        return []
    return [i for _, i in leases if i.kind == "mount" and i.mountpoint == printable(mountpoint)]


def printable(path: Path) -> str:
    """Return a path as text that any encoding takes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def resolve(mountpoint: Path) -> Path:
    """Return the absolute form of a mount point without touching a file system that may be dead there."""
    parent = Path(os.path.abspath(mountpoint)).parent
    return Path(os.path.realpath(parent)) / Path(os.path.abspath(mountpoint)).name


def check_mountpoint(mountpoint: Path) -> None:
    """Raise MountPointAbsent, MountPointBusy, NotPermitted or MountFailed where a mount could not succeed.

    A cidfs mount that is there is not touched: its daemon may be stopped, and whoever looked would wait with
    it.
    """
    there = mounted_at(mountpoint)
    if there is not None and there.type == FILE_SYSTEM_TYPE:
        state = source_of(there)
        if daemons_of(state, mountpoint):
            raise MountPointBusy(f"{mountpoint}: cidfs is mounted there already (store {state})")
        raise MountPointBusy(
            f"{mountpoint}: a dead mount is there; take it down with `cidfs umount {mountpoint}`"
        )
    try:
        if not mountpoint.is_dir():
            problem = "is not a directory" if mountpoint.exists() else "does not exist; make it first"
            raise MountPointAbsent(f"{mountpoint}: the mount point {problem}")
    except PermissionError:
        raise NotPermitted(f"{mountpoint}: permission denied") from None
    if not os.path.exists("/dev/fuse"):
        raise MountFailed("/dev/fuse is not there: load the kernel's fuse module (`modprobe fuse`)")
    if os.geteuid() != 0:
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            raise NotPermitted("/dev/fuse: permission denied; an administrator must allow you to use FUSE")
        if shutil.which("fusermount3") is None:
            raise MountFailed("fusermount3 is not there: install the package fuse3")
        if not os.access(mountpoint, os.W_OK):
            raise NotPermitted(f"{mountpoint}: you may only mount on a folder that you may write to")


def options(source: Path) -> set[str]:
    """Return the mount options; the state folder is shown as the source."""
    chosen = {f"fsname={quote(os.fsencode(source))}", "subtype=cidfs", "ro", "noatime", "nosuid", "nodev"}
    if os.geteuid() == 0 or _user_may_allow_other():
        chosen.add("allow_other")
    return chosen


def _user_may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def raise_read_ahead(device: str) -> bool:
    """Let the kernel read ahead in requests of a megabyte; say whether it could be set (root alone may).

    device is that of the mount's line in mountinfo. The kernel sets its own value when the first message
    (INIT) is answered: what was written before that does not last.
    """
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect the lines that libraries and helpers write to standard error.

    Libfuse says its reasons only there.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as taken:
        os.dup2(taken.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            taken.seek(0)
            lines += taken.read().decode(errors="replace").split("\n")
            lines[:] = [line.strip() for line in lines if line.strip()]


def _call(result: int, what: str) -> None:
    if result != 0:
        raise MountFailed(f"{what}: {os.strerror(ctypes.get_errno())}")


class Isolation:
    """A mount namespace of the daemon's own, and the way back to the host's."""

    def __init__(self, mountpoint: Path, host: int) -> None:
        self._mountpoint = mountpoint
        self._host = host

    def unmount(self) -> None:
        """Take the mount down in the host's namespace. Ends this thread's stay in its own one."""
        # threads share one view of the file system until they are parted
        _call(_libc.unshare(_CLONE_FS), "unshare")
        _call(_libc.setns(self._host, _CLONE_NEWNS), "setns")
        os.close(self._host)
        unmount_if_mounted(self._mountpoint)


def isolate(mountpoint: Path, state: Path, store_dir: str) -> Isolation | None:
    """Move this process into a mount namespace where no later overlay of the host covers its own files.

    Unmounts of the host still get here (`rslave`), mounts over the store directory do not (it is bound onto
    itself and private). The own copy of the mount is detached, or the host's umount would never end it, and
    so are those of other cidfs mounts and of overlays. None for who is not root.
    """
    if os.geteuid() != 0:
        return None
    host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _call(_libc.unshare(_CLONE_NEWNS), "unshare")
    if _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None) != 0:
        # a plain chroot: its root is no mount point. What is not parted from the host's mounts must not be
        # unmounted here
        log.warning("/ is not a mount point: staying in the namespace of the host")
        _call(_libc.setns(host, _CLONE_NEWNS), "setns")
        os.close(host)
        return None
    _call(_libc.umount2(os.fsencode(mountpoint), _MNT_DETACH), f"umount {mountpoint}")
    _let_go({str(state), sys.prefix, sys.base_prefix, *sys.path})
    if os.path.isdir(store_dir):
        where = os.fsencode(store_dir)
        _call(_libc.mount(where, where, None, ctypes.c_ulong(_MS_BIND | _MS_REC), None), f"bind {store_dir}")
        _call(
            _libc.mount(None, where, None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), f"part {store_dir}"
        )
    os.chdir("/")
    return Isolation(mountpoint, host)


def _let_go(needed: set[str]) -> None:
    """Detach this namespace's copies of cidfs mounts and of overlays that hold nothing that is needed here.

    Where the host's mounts are private (no systemd) its unmounts do not get here: two daemons would keep each
    other's mounts alive, and an overlay its lower layer.
    """
    for info in reversed(mounts()):
        inside = info.mountpoint.rstrip("/") + "/"
        if info.type in (FILE_SYSTEM_TYPE, "overlay") and not any(f"{n}/".startswith(inside) for n in needed):
            _libc.umount2(os.fsencode(info.mountpoint), _MNT_DETACH)


def unmount_if_mounted(mountpoint: Path) -> None:
    """Take our mount down at once where it still is, even while somebody uses it: its daemon is ending."""
    info = mounted_at(mountpoint)
    if info is None or info.type != FILE_SYSTEM_TYPE:
        return
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)
    else:
        _fusermount(mountpoint, lazy=True)


def unmount(mountpoint: Path, *, lazy: bool) -> None:
    """Take a cidfs mount down; raise MountPointAbsent, MountPointBusy or NotPermitted."""
    info = mounted_at(mountpoint)
    if info is None or info.type != FILE_SYSTEM_TYPE:
        what = (
            "nothing is mounted there"
            if info is None
            else f"a file system of type {info.type} is mounted there"
        )
        raise MountPointAbsent(f"{mountpoint}: no cidfs mount ({what})")
    above = overlays_above(mountpoint)
    if above and not lazy:
        raise MountPointBusy(
            f"{mountpoint}: the overlay at {above[0]} stands on it; take that down first, or use --lazy"
        )
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EBUSY:
            raise MountPointBusy(_busy(mountpoint))
        raise MountFailed(f"{mountpoint}: cannot be unmounted: {os.strerror(code)}")
    problem = _fusermount(mountpoint, lazy=lazy)
    if problem:
        if "busy" in problem:
            raise MountPointBusy(_busy(mountpoint))
        raise NotPermitted(f"{mountpoint}: cannot be unmounted: {problem}")


def _busy(mountpoint: Path) -> str:
    return (
        f"{mountpoint}: in use by a process or by an overlay above it (`fuser -vm {mountpoint}` shows whom);"
        " end that first, or use --lazy"
    )


def _fusermount(mountpoint: Path, *, lazy: bool) -> str:
    """Run fusermount3 -u and return what it complains of."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=HELPER_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    return "" if done.returncode == 0 else done.stderr.strip() or "fusermount3 failed"
