"""Overlays that stand on a cidfs mount: which there are, making them forget absent names, their whiteouts.

Owns what the kernel's options of an overlay mean. Does not touch a file system that may be dead, except where
`reconfigure` says so. Holds no state; safe from any thread. Imports little, for a small process uses it that
is locked in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cidfs.errors import CidfsError, MountFailed, MountPointAbsent, NotPermitted, UsageError
from cidfs.mount.mountinfo import FILE_SYSTEM_TYPE, MountInfo, mounted_at, mounts, resolve

OVERLAY_TYPE: Final = "overlay"

_MAY_HANG: Final = ("fuse", "nfs", "cifs", "9p", "ceph")
_LAYER: Final = re.compile(r"(?:[^:\\]|\\.)+", re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)

# <asm/unistd.h>, alike on x86_64 and aarch64; <linux/mount.h>
_SYS_FSCONFIG: Final = 431
_SYS_FSPICK: Final = 433
_FSPICK_CLOEXEC: Final = 1
_FSPICK_EMPTY_PATH: Final = 8
_FSCONFIG_CMD_RECONFIGURE: Final = 7
_TOO_LONG: Final = "x" * 2048
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay as the kernel lists it; without an upper, upper and work are empty.

    Layers are spelled as whoever mounted it did. device is what mountinfo calls it: "0:57".
    """

    mountpoint: str
    lower: tuple[str, ...]
    upper: str
    work: str
    device: str
    options: tuple[str, ...]


def overlay_of(info: MountInfo) -> Overlay:
    """Return what the line of an overlay says.

    In what mount(2) was given, a backslash keeps the next character from having a meaning; layers that were
    given one by one (`lowerdir+`) are plain.
    """
    lower: list[str] = []
    named = {"upperdir": "", "workdir": ""}
    for option in info.options:
        key, _, value = option.partition("=")
        if key == "lowerdir":
            lower += map(_plain, _LAYER.findall(value))
        elif key in ("lowerdir+", "datadir+"):
            lower.append(value)
        elif key in named:
            named[key] = _plain(value)
    return Overlay(
        info.mountpoint, tuple(lower), named["upperdir"], named["workdir"], info.device, info.options
    )


def overlays_above(mountpoint: Path, mounted: list[MountInfo] | None = None) -> list[Overlay]:
    """Return the overlays that have a cidfs mount, or a folder in it, among their lower layers.

    One for each overlay, however often it is mounted; none where no cidfs mount is at the mount point. Other
    mounts of the same file system count as it does. The kernel does not call a lower layer busy: taking it
    down leaves a file system that nobody can reach.
    """
    mounted = mounts() if mounted is None else mounted
    ours = [info for info in mounted if info.type == FILE_SYSTEM_TYPE]
    devices = {info.device for info in ours if info.mountpoint == str(mountpoint)}
    inside = tuple(f"{info.mountpoint}/" for info in ours if info.device in devices)
    untouched = {info.mountpoint for info in mounted if info.type.startswith(_MAY_HANG)}
    uppermost = {info.mountpoint: info for info in mounted}
    found: dict[str, MountInfo] = {}
    for info in mounted:
        if info.type == OVERLAY_TYPE and _stands_on(overlay_of(info).lower, inside, untouched):
            before = found.get(info.device)
            if before is None or uppermost[before.mountpoint].device != info.device:
                found[info.device] = info
    return [overlay_of(info) for info in found.values()]


def overlay_at(mountpoint: Path) -> Overlay | None:
    """Return the overlay that is mounted uppermost at a folder, if it stands on a cidfs mount."""
    mounted = mounts()
    here = mounted_at(mountpoint, mounted)
    if here is None or here.type != OVERLAY_TYPE:
        return None
    for info in mounted:
        if info.type == FILE_SYSTEM_TYPE:
            above = overlays_above(Path(info.mountpoint), mounted)
            if any(found.device == here.device for found in above):
                return overlay_of(here)
    return None


def orphans(mounted: list[MountInfo] | None = None) -> list[Overlay]:
    """Return the overlays whose one lower layer is an empty folder: what is left of a mount that has ended.

    The files of such an overlay are out of reach. The folder is looked into, unless it is on a file system
    that may be dead itself.
    """
    mounted = mounts() if mounted is None else mounted
    untouched = tuple(f"{info.mountpoint}/" for info in mounted if info.type.startswith(_MAY_HANG))
    places = {info.mountpoint for info in mounted}
    found = []
    for info in mounted:
        lower = overlay_of(info).lower if info.type == OVERLAY_TYPE else ()
        if len(lower) == 1 and lower[0] not in places and not f"{lower[0]}/".startswith(untouched):
            with contextlib.suppress(OSError):
                if not os.listdir(lower[0]):
                    found.append(overlay_of(info))
    return found


def reconfigure(where: str) -> None:
    """Have an overlay forget which names are absent in it, in all namespaces; its mounts keep their flags.

    It is what mount(8) calls a remount, without any option: over a read-only mount of the overlay, as NixOS
    makes one, mount(8) would make all of it read-only. Look-ups in its top folder that are under way may hold
    an answer from before: they are waited for first, and not even a signal ends that. So who answers them
    must not wait for this, and who must go on when they are not answered calls it in another process.

    Raise MountPointAbsent where no overlay is, NotPermitted or MountFailed.
    """
    try:
        folder = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise _failure(where, e) from None
    try:
        number = mount_id(folder)
        info = next((info for info in mounts() if info.id == number), None)
        if info is None or info.type != OVERLAY_TYPE:
            raise MountPointAbsent(f"{where}: no overlay is mounted there")
        # making a file takes the folder's lock for itself, and so waits for look-ups; no file system takes a
        # name of this length, and a read-only mount is asked for that after the lock
        with contextlib.suppress(OSError):
            os.close(os.open(_TOO_LONG, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder))
        context = _syscall(_SYS_FSPICK, folder, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
        try:
            _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
        finally:
            os.close(context)
    except OSError as e:
        raise _failure(where, e) from None
    finally:
        os.close(folder)


def mount_id(descriptor: int) -> int:
    """Return the number in mountinfo of the mount that a descriptor was opened on."""
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "mnt_id":
            return int(value)
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def whiteouts(upper: str, names: Iterable[bytes] | None = None) -> list[bytes]:
    """Return the names right in an upper, of those given or of all, that hide what is below.

    Raise MountFailed or NotPermitted where the upper cannot be looked at.
    """
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        folder = os.open(upper, flags | (os.O_RDONLY if names is None else os.O_PATH))
        try:
            return [
                name
                for name in (_odd_names(folder) if names is None else names)
                if _is_whiteout(folder, name)
            ]
        finally:
            os.close(folder)
    except OSError as e:
        raise _failure(upper, e) from None


def _odd_names(folder: int) -> list[bytes]:
    """Return what in a folder is neither file, directory nor link, as far as a listing tells."""
    with os.scandir(folder) as listed:
        return [
            os.fsencode(each.name)
            for each in listed
            if not (
                each.is_file(follow_symlinks=False) or each.is_dir(follow_symlinks=False) or each.is_symlink()
            )
        ]


def take_out(upper: str, name: bytes) -> bool:
    """Take a whiteout out of an upper, and say whether there was one; anything else of that name stays.

    The overlay shows what is below after `reconfigure`. Nobody may make the name in the overlay meanwhile.
    Raise UsageError for what is no name, and MountFailed or NotPermitted.
    """
    try:
        folder = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not _is_whiteout(folder, name):
                return False
            os.unlink(name, dir_fd=folder)
            return True
        finally:
            os.close(folder)
    except FileNotFoundError as e:
        if e.filename == name:  # somebody else was faster
            return False
        raise _failure(upper, e) from None
    except OSError as e:
        raise _failure(upper, e) from None


def _is_whiteout(folder: int, name: bytes) -> bool:
    """Say whether a name in a folder is what overlays hide a lower name with: a character device 0:0."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise UsageError(f"{name!r}: is not the name of a file")
    try:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call; raise OSError."""
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _failure(where: str, error: OSError) -> CidfsError:
    """Return what an error at a folder is for people."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(f"{where}: permission denied; only root may change an overlay")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return MountPointAbsent(f"{where}: does not exist or is not a directory")
    return MountFailed(f"{where}: {error.strerror}")


def _stands_on(layers: Iterable[str], inside: tuple[str, ...], untouched: set[str]) -> bool:
    return any(f"{_followed(layer, untouched)}/".startswith(inside) for layer in layers)


def _followed(layer: str, untouched: set[str]) -> str:
    """Return what a layer's name leads to; names of mounts, and what is below them, are left as they are.

    Who looks at one that is dead waits for it.
    """
    for _ in range(40):  # as many links as the kernel follows
        if any(f"{layer}/".startswith(f"{mount}/") for mount in untouched):
            return layer
        if not os.path.islink(layer):
            return str(resolve(Path(layer)))
        layer = os.path.normpath(os.path.join(os.path.dirname(layer), os.readlink(layer)))
    return layer


def _plain(value: str) -> str:
    return _ESCAPED.sub(r"\1", value)
