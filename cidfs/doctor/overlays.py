"""Overlays on mounts: whether Nix takes them, whether they live, and what hides published paths in them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cidfs.doctor import processes
from cidfs.doctor.bounded import errno_of
from cidfs.doctor.findings import FAILURE, OK, WARNING, Finding, times
from cidfs.doctor.standing import Standing
from cidfs.local.store import LocalStore
from cidfs.mount.mountinfo import MountInfo, mounted_at
from cidfs.mount.overlay import (
    OVERLAY_TYPE,
    Overlay,
    orphans,
    overlay_of,
    overlays_above,
    whiteouts,
)

ANSWER_SECONDS: Final = 2.0
TIDY_SECONDS: Final = 3.0  # within which the metadata process takes whiteouts out by itself
HASH_PART: Final = 32
NAMED: Final = 3


def above(mount: Standing) -> list[Overlay]:
    """Return the overlays on a mount, in its own namespace; also those that have outlived it."""
    if mount.info is not None:
        return overlays_above(Path(mount.info.mountpoint), mount.mounted)
    found = {}
    for info in mount.mounted:
        if info.type == OVERLAY_TYPE and mount.mountpoint in overlay_of(info).lower:
            found[info.device] = overlay_of(info)
    return list(found.values())


def look(mount: Standing, overlay: Overlay) -> Iterator[Finding]:
    """Look at one overlay."""
    where = overlay.mountpoint
    down = f"`cidfs --state {mount.state} umount {where}`"
    anew = f"{down}, then `cidfs overlay {where}` with the same upper and work folder"
    if mount.info is None:
        what = f"{where}: the overlay's mount {mount.mountpoint} has gone: it is dead too"
        yield Finding("overlay", FAILURE, what, f"{down}; {mount.again}; then `cidfs overlay`")
        return
    top = mounted_at(Path(where), mount.mounted)
    if top is None or top.device != overlay.device:
        kind = top.type if top is not None else "unknown"
        what = f"{where}: a mount of type {kind} covers the overlay: it cannot be told of new paths"
        yield Finding("overlay", FAILURE, what, f"take that down (`umount {where}`)")
        return
    yield from _fitness(mount.info, overlay, top, anew)
    if not mount.at_home or mount.is_stopped:
        return
    code = _error_in(where)
    if code is None:
        yield Finding("overlay", FAILURE, f"{where}: the overlay does not answer", "see to the mount below")
    elif code not in (errno.ENOENT, errno.EACCES):
        what = f"{where}: the overlay is dead ({os.strerror(code)}): the mount that it was made on has gone"
        yield Finding("overlay", FAILURE, what, anew)
    else:
        yield Finding("overlay", OK, f"{where}: answers")


def orphaned() -> Iterator[Finding]:
    """Look for overlays whose mount has ended, in whatever way: nothing else tells of them any more."""
    for overlay in orphans():
        if _error_in(overlay.mountpoint) == errno.ENOTCONN:
            what = f"{overlay.mountpoint}: the overlay is dead: the mount at {overlay.lower[0]} has ended"
            anew = f"`cidfs umount {overlay.mountpoint}`, then `cidfs mount` and `cidfs overlay`"
            yield Finding("overlay", FAILURE, what, anew)


def _fitness(below: MountInfo, overlay: Overlay, top: MountInfo, anew: str) -> Iterator[Finding]:
    """Hold an overlay against what Nix wants of it, and looks for in /proc/self/mounts (`check-mount`)."""
    where = overlay.mountpoint
    if "ro" in top.options:
        what = f"{where}: the overlay itself is read-only, as `mount -o remount` makes it: Nix cannot build"
        yield Finding("overlay", FAILURE, what, anew)
    if overlay.lower != (below.mountpoint,):
        spelled = ":".join(overlay.lower)
        what = f"{where}: its lower is spelled {spelled}, and not {below.mountpoint}: Nix may refuse it"
        yield Finding("overlay", WARNING, what, anew)
    if top.source != OVERLAY_TYPE:
        what = f"{where}: mounted from {top.source!r}, and Nix looks for {OVERLAY_TYPE!r}: it may refuse it"
        yield Finding("overlay", WARNING, what, anew)
    if not overlay.upper:
        yield Finding("overlay", WARNING, f"{where}: has no upper: Nix cannot use it", anew)


def upper(mount: Standing, overlay: Overlay) -> Iterator[Finding]:
    """Look for what in an upper hides published paths. For a child: it opens the index."""
    if not overlay.upper or not mount.at_home:
        return
    for role, folder in (("upper", overlay.upper), ("work folder", overlay.work)):
        if not os.path.isdir(folder):
            what = f"{folder}: the {role} of {overlay.mountpoint} is not there, or another mount covers it"
            yield Finding("overlay", FAILURE, what, "unmount the overlay, and mount it anew")
            return
    with LocalStore.open(mount.state) as store:
        hidden = _published(store, whiteouts(overlay.upper))
        deadline = time.monotonic() + TIDY_SECONDS
        while hidden and time.monotonic() < deadline:
            time.sleep(0.1)
            hidden = _published(store, whiteouts(overlay.upper))
        copies = _published(store, [os.fsencode(name) for name in os.listdir(overlay.upper)])
    if hidden:
        names = ", ".join(name.decode(errors="backslashreplace") for name in sorted(hidden)[:NAMED])
        more = f" and {len(hidden) - NAMED} more" if len(hidden) > NAMED else ""
        what = f"{overlay.upper}: whiteouts hide published store paths: {names}{more}"
        advice = (
            "they go when the Nix connections end that count the paths as absent; or, while no Nix runs,"
            f" remove them and `cidfs remount {overlay.mountpoint}`"
        )
        yield Finding("whiteout", WARNING, what, advice)
    else:
        yield Finding("whiteout", OK, f"{overlay.upper}: nothing hides a published store path")
    both = len(set(copies) - set(hidden))
    if both:
        yield Finding(
            "upper", OK, f"{overlay.upper}: has {times(both, 'store path')} that the store has, too"
        )


def _published(store: LocalStore, names: Sequence[bytes]) -> list[bytes]:
    """Return those of some names that are whole store paths of a store."""
    found = []
    for name in names:
        if name[HASH_PART : HASH_PART + 1] == b"-":
            row = store.find(name[:HASH_PART])
            if row is not None and row.whole and row.name == name[HASH_PART + 1 :]:
                found.append(name)
    return found


def elsewhere(mount: Standing) -> Iterator[Finding]:
    """Look for overlays on a mount that stand in other mount namespaces alone: nobody tells them anything.

    Also for those on an earlier mount at that place. A process with a mount namespace of its own, like
    nix-daemon, goes on seeing the overlay that was there when it began.
    """
    if mount.info is None:
        return
    known = {info.device for info in mount.mounted if info.type == OVERLAY_TYPE}
    place = mount.info.mountpoint
    home = mount.holder.pid if mount.holder is not None else "self"
    for pid in processes.other_namespaces({processes.namespace_of(home)}):
        theirs = processes.mounts_of(pid)
        below = mounted_at(Path(place), theirs)
        is_same = below is not None and below.device == mount.info.device
        for info in theirs:
            if info.type == OVERLAY_TYPE and info.device not in known and place in overlay_of(info).lower:
                known.add(info.device)
                yield _one_elsewhere(info.mountpoint, pid, is_same)


def _one_elsewhere(where: str, pid: int, is_same: bool) -> Finding:
    process = f"process {pid} ({processes.command_of(pid)})"
    code = _error_in(f"/proc/{pid}/root{where}")
    if code is None or code not in (errno.ENOENT, errno.EACCES, errno.EPERM):
        what = f"{where}: {process} has a dead overlay there, in a mount namespace of its own"
        return Finding("overlay", FAILURE, what, "start it anew (`systemctl restart nix-daemon`)")
    if is_same:
        what = f"{where}: an overlay in the mount namespace of {process}: it is not told of new paths"
        advice = f"mount it where the mount is, or `nsenter -t {pid} -m cidfs remount {where}` after each add"
        return Finding("overlay", WARNING, what, advice)
    what = f"{where}: {process} has an overlay there that stands on an earlier mount"
    return Finding("overlay", WARNING, what, "start it anew")


def _error_in(folder: str) -> int | None:
    """Return the number of the error that a name without an answer in the kernel gives in a folder."""
    return errno_of(lambda: os.lstat(f"{folder}/.doctor-{os.urandom(8).hex()}"), ANSWER_SECONDS)
