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
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cidfs.errors import CidfsError, MountFailed, MountPointAbsent, MountPointBusy, NotPermitted
from cidfs.local.leases import HOLDER, MOUNT, LeaseInfo
from cidfs.local.state import StateFolder
from cidfs.mount.mountinfo import FILE_SYSTEM_TYPE, MountInfo, mounted_at, mounts, printable, source_of
from cidfs.mount.overlay import OVERLAY_TYPE, overlay_of, overlays_above

log = logging.getLogger(__name__)

READ_AHEAD_KIB: Final = 1024
HELPER_SECONDS: Final = 20.0

_CLONE_FS: Final = 0x200
_CLONE_NEWNS: Final = 0x20000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MS_SLAVE: Final = 0x80000
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def daemons_of(state: Path, mountpoint: Path) -> set[int]:
    """Return the processes that say in a state folder that they serve a mount point, and live."""
    return {info.pid for info in _leases_of(state, mountpoint)}


def daemon_of(state: Path, mountpoint: Path) -> int:
    """Return the process behind what is mounted uppermost at a mount point now; 0 for none."""
    lease = lease_of(state, mountpoint)
    return lease.pid if lease is not None else 0


def lease_of(state: Path, mountpoint: Path) -> LeaseInfo | None:
    """Return what the process behind what is mounted uppermost at a mount point says of itself.

    Others may be behind what was mounted there before and is still in use.
    """
    return max(_leases_of(state, mountpoint), key=lambda info: info.started, default=None)


def holders_of(state: Path, mountpoint: Path) -> set[int]:
    """Return the parent processes of mounts at a mount point that live."""
    return {info.pid for info in _leases_of(state, mountpoint, HOLDER)}


def nix_socket_of(state: Path, mountpoint: Path) -> str:
    """Return where Nix is answered by the processes of a mount; empty where it is not, or there are none."""
    latest = max(_leases_of(state, mountpoint, HOLDER), key=lambda info: info.started, default=None)
    return latest.nix_socket if latest is not None else ""


def survivors_of(state: Path, mountpoint: Path) -> set[int]:
    """Return the parent processes of mounts at a mount point whose daemon has died."""
    parents = {parent_of(pid) for pid in daemons_of(state, mountpoint)}
    return {pid for pid in holders_of(state, mountpoint) if pid not in parents}


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0 when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _leases_of(state: Path, mountpoint: Path, kind: str = MOUNT) -> list[LeaseInfo]:
    try:
        leases = StateFolder.open(state).leases()
    except CidfsError:
        return []
    return [i for _, i in leases if i.kind == kind and i.mountpoint == printable(mountpoint)]


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
    for info in mounts():
        layer = overlay_of(info) if info.type == OVERLAY_TYPE else None
        if layer is not None and str(mountpoint) in (layer.mountpoint, layer.upper, layer.work):
            raise MountPointBusy(f"{mountpoint}: a part of the overlay at {layer.mountpoint}; choose another")
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

    def __init__(self, host: int) -> None:
        self._host = host

    def unmount(self, mount: MountInfo | None) -> None:
        """Take a mount down in the host's namespace. Ends this thread's stay in its own one."""
        # threads share one view of the file system until they are parted
        _call(_libc.unshare(_CLONE_FS), "unshare")
        _call(_libc.setns(self._host, _CLONE_NEWNS), "setns")
        os.close(self._host)
        take_from_sight(mount)


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
    return Isolation(host)


def _let_go(needed: set[str]) -> None:
    """Detach this namespace's copies of cidfs mounts and of overlays that hold nothing that is needed here.

    Where the host's mounts are private (no systemd) its unmounts do not get here: two daemons would keep each
    other's mounts alive, and an overlay its lower layer.
    """
    for info in reversed(mounts()):
        inside = info.mountpoint.rstrip("/") + "/"
        is_needed = any(f"{name}/".startswith(inside) for name in needed)
        if info.type in (FILE_SYSTEM_TYPE, OVERLAY_TYPE) and not is_needed:
            _libc.umount2(os.fsencode(info.mountpoint), _MNT_DETACH)


def mount_of(state: Path, mountpoint: Path) -> MountInfo | None:
    """Return the mount of a store that is uppermost at a mount point."""
    info = mounted_at(mountpoint)
    if info is None or info.type != FILE_SYSTEM_TYPE or source_of(info) != state:
        return None
    return info


def is_mounted(mount: MountInfo) -> bool:
    """Say whether a mount is still uppermost at its place; another one of the same store is not it."""
    now = mounted_at(Path(mount.mountpoint))
    return now is not None and (now.id, now.device, now.source) == (mount.id, mount.device, mount.source)


def take_from_sight(mount: MountInfo | None) -> None:
    """Take a mount of ours down at once where it still is, even while somebody uses it: its daemon has ended.

    Who waits for an answer of it gets an error. By root, a single system call.
    """
    if mount is None or not is_mounted(mount):
        return
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mount.mountpoint), _MNT_FORCE | _MNT_DETACH)
    else:
        _fusermount(Path(mount.mountpoint), lazy=True)


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
            f"{mountpoint}: the overlay at {above[0].mountpoint} stands on it;"
            " take that down first, or use --lazy"
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


def notify(message: str) -> None:
    """Tell systemd, where it asked to be told (sd_notify(3)); its absence is no error."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.sendto(message.encode(), address)
    except OSError as e:
        print(f"cidfs: cannot notify {where}: {e.strerror}", file=sys.stderr)
