"""Mount an overlay on a cidfs mount as Nix wants it, take one down, and name it to Nix.

Owns what has to be so before an overlay can be mounted, and the store URI. Everything that would fail later
is an error of one line before. Synchronous; for short-lived commands of root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cidfs.errors import MountFailed, MountPointAbsent, MountPointBusy, NotPermitted, UsageError
from cidfs.mount import session
from cidfs.mount.mountinfo import FILE_SYSTEM_TYPE, mounted_at, mounts, resolve, source_of
from cidfs.mount.overlay import OVERLAY_TYPE, mount_id, orphans, overlay_at, overlay_of

NIX_STORE: Final = "/nix/store"  # what Nix puts behind `root=`, whatever its store directory is called

# what overlayfs or /proc/self/mounts would escape, and what means something in the expression that Nix makes
# of a name to look for it there (local-overlay-store.cc)
_UNFIT: Final = re.compile(r"[\x00-\x20\x7f,:\\+*?()\[\]{}|^$]")
_FORMER_WORK: Final = {"work", "index"}
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class OverlayPlan:
    """An overlay to be: the folder it is seen at, its upper and work, and the cidfs mount below.

    All are absolute, without symlinks. store_dir is the one that the paths in the mount are named in.
    """

    merged: Path
    upper: Path
    work: Path
    mount: Path
    store_dir: str


def plan(merged: Path, upper: Path, work: Path, lower_mount: Path, store_dir: str) -> OverlayPlan:
    """Return a plan that was checked as far as can be without making anything.

    Raise NotPermitted, UsageError, MountPointAbsent or MountPointBusy.
    """
    if os.geteuid() != 0:
        raise NotPermitted(f"{merged}: only root may mount an overlay")
    found = OverlayPlan(
        resolve(merged),
        Path(os.path.realpath(upper)),
        Path(os.path.realpath(work)),
        resolve(lower_mount),
        store_dir,
    )
    _check_names(found)
    _check_mounts(found)
    if not found.merged.is_dir():
        problem = "is not a directory" if found.merged.exists() else "does not exist; make it first"
        raise MountPointAbsent(f"{found.merged}: the folder to mount on {problem}")
    return found


def mount_overlay(plan: OverlayPlan) -> None:
    """Mount an overlay; upper and work are made if they are not there.

    Raise UsageError where they do not fit, MountPointBusy where they are in use, NotPermitted or MountFailed.
    """
    for folder in (plan.upper, plan.work):
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as e:
            raise MountFailed(f"{folder}: cannot be made: {e.strerror}") from None
    _check_upper(plan)
    options = f"lowerdir={plan.mount},upperdir={plan.upper},workdir={plan.work}"
    kind = OVERLAY_TYPE.encode()  # also as the source: Nix looks for a line that begins with it
    if _libc.mount(kind, os.fsencode(plan.merged), kind, ctypes.c_ulong(0), os.fsencode(options)) != 0:
        code = ctypes.get_errno()
        if code == errno.ENODEV:
            raise MountFailed("the kernel has no overlay file system: load its module (`modprobe overlay`)")
        if code == errno.EBUSY:
            raise MountPointBusy(f"{plan.upper}: it or {plan.work} is in use by another overlay")
        if code == errno.EPERM:
            raise NotPermitted(f"{plan.merged}: the system does not let an overlay be mounted here")
        raise MountFailed(
            f"{plan.merged}: the overlay was not mounted: {os.strerror(code)} (the kernel's log says why)"
        )


def is_ours(merged: Path, state: Path) -> bool:
    """Say whether an overlay is at a folder that stands on a cidfs mount.

    Or that stood on one that has ended, in whatever way.
    """
    here = mounted_at(merged)
    if here is None or here.type != OVERLAY_TYPE:
        return False
    below = overlay_of(here).lower
    return (
        overlay_at(merged) is not None
        or any(session.holders_of(state, Path(each)) for each in below)
        or (any(orphan.device == here.device for orphan in orphans()) and _is_dead(merged))
    )


def _is_dead(merged: Path) -> bool:
    """Say whether what is below an overlay has ended: a name that nobody knows is looked up there."""
    try:
        os.lstat(merged / f".cidfs-{os.urandom(8).hex()}")
    except OSError as e:
        return e.errno == errno.ENOTCONN
    return False


def unmount_overlay(merged: Path, *, lazy: bool) -> None:
    """Take down an overlay, with all mounts of it at that folder.

    Raise MountPointAbsent, MountPointBusy, NotPermitted or MountFailed.
    """
    found = mounted_at(merged)
    if found is None or found.type != OVERLAY_TYPE:
        raise MountPointAbsent(f"{merged}: no overlay is there")
    if os.geteuid() != 0:
        raise NotPermitted(f"{merged}: only root may take an overlay down")
    while (here := mounted_at(merged)) is not None and here.device == found.device:
        if _libc.umount2(os.fsencode(merged), _MNT_DETACH if lazy else 0) != 0:
            code = ctypes.get_errno()
            if code == errno.EBUSY:
                raise MountPointBusy(
                    f"{merged}: the overlay is in use (`fuser -vm {merged}` shows by whom);"
                    " end that first, or use --lazy"
                )
            raise MountFailed(f"{merged}: cannot be unmounted: {os.strerror(code)}")


def store_uri(plan: OverlayPlan, nix_socket: Path, *, state: Path | None = None, hook: str = "") -> str:
    """Return the store URI that Nix knows an overlay by.

    state is where Nix keeps the overlay's database; None for what Nix takes by itself. hook is the program
    that Nix has the overlay remounted by.
    """
    lower = [("store", plan.store_dir)] if plan.store_dir != NIX_STORE else []
    upper = list(lower)
    if is_rooted(plan):
        upper.append(("root", str(plan.merged)[: -len(NIX_STORE)]))
    elif str(plan.merged) != plan.store_dir:
        upper.append(("real", str(plan.merged)))
    if state is not None:
        upper.append(("state", str(state)))
    lower.append(("real", str(plan.mount)))
    upper += [
        ("lower-store", f"unix://{quote(os.fsencode(nix_socket))}?{_query(lower)}"),
        ("upper-layer", str(plan.upper)),
        *([("remount-hook", hook)] if hook else []),
    ]
    return f"local-overlay://?{_query(upper)}"


def is_rooted(plan: OverlayPlan) -> bool:
    """Say whether an overlay is the store of a root folder, which also has Nix's database for it."""
    merged = str(plan.merged)
    return plan.store_dir == NIX_STORE and merged.endswith(NIX_STORE) and merged != NIX_STORE


def _query(parameters: list[tuple[str, str]]) -> str:
    return "&".join(f"{key}={quote(os.fsencode(value), safe='/')}" for key, value in parameters)


def _check_names(plan: OverlayPlan) -> None:
    """Raise UsageError for names that Nix or the kernel would misread, and for folders in one another."""
    roles = _roles(plan)
    for role, path in roles:
        if unfit := _UNFIT.search(str(path)):
            raise UsageError(
                f"{str(path)!r}: the {role} may not have {unfit[0]!r} in its path:"
                " Nix would not find the overlay; choose another place"
            )
    for role, path in roles:
        for other_role, other in roles:
            if role != other_role and path.is_relative_to(other):
                where = "the same as" if path == other else "inside"
                raise UsageError(f"{path}: the {role} must not be {where} the {other_role} ({other})")


def _roles(plan: OverlayPlan) -> list[tuple[str, Path]]:
    return [
        ("upper", plan.upper),
        ("work folder", plan.work),
        ("merged folder", plan.merged),
        ("cidfs mount", plan.mount),
    ]


def _check_mounts(plan: OverlayPlan) -> None:
    """Raise where no living cidfs mount is below, or an overlay is in the way."""
    below = mounted_at(plan.mount)
    if below is None or below.type != FILE_SYSTEM_TYPE:
        raise MountPointAbsent(f"{plan.mount}: no cidfs mount is there; make one with `cidfs mount`")
    if not session.daemon_of(source_of(below), plan.mount):
        raise MountPointAbsent(
            f"{plan.mount}: a dead mount is there; take it down with `cidfs umount {plan.mount}`"
        )
    there = mounted_at(plan.merged)
    if there is not None and there.type == OVERLAY_TYPE:
        raise MountPointBusy(
            f"{plan.merged}: an overlay is mounted there already; `cidfs umount {plan.merged}` takes it down"
        )
    for info in mounts():
        theirs = overlay_of(info) if info.type == OVERLAY_TYPE else None
        for ours in (plan.upper, plan.work):
            if theirs is not None and any(_overlap(str(ours), each) for each in (theirs.upper, theirs.work)):
                raise MountPointBusy(f"{ours}: it, or a part of it, is in use by {info.mountpoint}")
    if os.geteuid() == 0 and not {"allow_other", "user_id=0"} & set(below.options):
        raise UsageError(
            f"{plan.mount}: an ordinary user's mount, which only that user may read: mount it as root"
        )


def _overlap(one: str, other: str) -> bool:
    """Say whether one of two folders is the other, or inside it."""
    return bool(one and other) and (f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"))


def _check_upper(plan: OverlayPlan) -> None:
    """Raise UsageError where upper and work cannot be used together, or their file system cannot at all."""
    with _opened(plan.upper) as upper, _opened(plan.work) as work:
        if mount_id(upper) != mount_id(work):
            raise UsageError(
                f"{plan.work}: the work folder must be on the same mount as the upper {plan.upper}"
            )
    foreign = set(os.listdir(plan.work)) - _FORMER_WORK
    if foreign:
        raise UsageError(
            f"{plan.work}: the work folder must be empty; it has {min(foreign)!r} in it: name another"
        )
    lacking = _lacking(plan.work)
    if lacking:
        raise UsageError(
            f"{plan.upper}: its file system has no {lacking}, which an upper needs;"
            " choose a place on ext4, xfs, btrfs or tmpfs"
        )


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise UsageError(f"{folder}: {e.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lacking(folder: Path) -> str:
    """Return what the file system of a folder lacks for an upper; nothing is left in the folder."""
    try:
        probe = tempfile.mkdtemp(dir=folder)
    except OSError as e:
        raise MountFailed(f"{folder}: cannot be written to: {e.strerror}") from None
    try:
        os.mknod(f"{probe}/whiteout", stat.S_IFCHR, 0)
        os.setxattr(probe, "trusted.overlay.opaque", b"y")
        with os.scandir(folder) as entries:
            entry = next(entry for entry in entries if entry.path == probe)
    except OSError as e:
        return "whiteouts" if e.filename != probe else "trusted extended attributes"
    finally:
        shutil.rmtree(probe)
    # it is gone now: only a listing that told its type can say what it was
    return "" if entry.is_dir(follow_symlinks=False) else "types in its listings (d_type)"
