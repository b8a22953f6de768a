"""Mounts: whether they are there, and whether the processes behind them live and answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cidfs import control
from cidfs.control import DaemonStats
from cidfs.doctor import processes
from cidfs.doctor.bounded import errno_of
from cidfs.doctor.findings import FAILURE, OK, WARNING, Finding, times
from cidfs.doctor.standing import Standing
from cidfs.errors import CidfsError

ANSWER_SECONDS: Final = 2.0
STILL_SECONDS: Final = 1.0
FUSECTL: Final = "/sys/fs/fuse/connections"


def look(mount: Standing) -> Iterator[Finding]:
    """Look at a mount and at its daemon and parent."""
    if mount.daemon is None:
        yield _dead(mount)
        return
    if mount.info is None:
        where = "" if mount.at_home else " (in the mount namespace of its parent)"
        what = (
            f"{mount.mountpoint}: not mounted any more{where}, and still in use: process {mount.daemon.pid}"
        )
        yield Finding("mount", WARNING, what, "it ends with its last user")
    if mount.is_stopped:
        what = f"{mount.mountpoint}: its daemon (process {mount.daemon.pid}) is stopped; nobody is answered"
        yield Finding("daemon", FAILURE, what, f"`kill -CONT {mount.daemon.pid}`, or {abort(mount)}")
    else:
        yield from _answers(mount)
    yield from _parent(mount)


def _dead(mount: Standing) -> Finding:
    if mount.info is not None:
        what = f"{mount.mountpoint}: a dead mount: its daemon has gone"
        advice = f"`cidfs --state {mount.state} umount {mount.mountpoint}`; then {mount.again}"
        return Finding("mount", FAILURE, what, advice)
    what = f"{mount.mountpoint}: the daemon died, and the mount with it"
    return Finding("mount", FAILURE, what, mount.again)


def _answers(mount: Standing) -> Iterator[Finding]:
    """Ask the daemon how it is, and the kernel whether the mount answers."""
    assert mount.daemon is not None
    assert mount.control is not None
    pid = mount.daemon.pid
    try:
        stats = control.ask(mount.control, control.Request("stats"), ANSWER_SECONDS)
    except PermissionError:
        what = f"{mount.mountpoint}: you may not ask its daemon (process {pid})"
        yield Finding("daemon", WARNING, what, "run as its owner")
    except OSError as e:
        what = f"{mount.mountpoint}: its daemon (process {pid}) does not answer: {e.strerror or e}"
        yield Finding("daemon", FAILURE, what, f"wait, or {abort(mount)}")
    except CidfsError as e:
        what = f"{mount.mountpoint}: its daemon is of another version ({e})"
        yield Finding("daemon", WARNING, what, "unmount and mount again to use this one")
    else:
        yield Finding("daemon", OK, f"{mount.mountpoint}: process {pid} answers")
        yield from _complaints(mount, stats)
    if mount.info is not None and mount.at_home:
        yield from _file_system(mount)


def _complaints(mount: Standing, stats: DaemonStats) -> Iterator[Finding]:
    overlays, nix = stats.overlays, stats.nix
    if overlays is not None and overlays.complaint:
        what = f"{mount.mountpoint}: new store paths are not shown in overlays: {overlays.complaint}"
        advice = f"`cidfs remount {overlays.above[0]}`" if overlays.above else "see its log"
        yield Finding("growth", FAILURE, what, f"{advice} as root, or unmount all and mount again")
    if stats.damaged:
        what = f"{mount.mountpoint}: a chunk was found damaged or missing {times(stats.damaged, 'time')}"
        yield Finding("daemon", FAILURE, what, "`cidfs verify` names it, and `--repair` mends it")
    if nix is not None and nix.restarts:
        what = (
            f"{mount.mountpoint}: the metadata process died {times(nix.restarts, 'time')}, and was restarted"
        )
        yield Finding("nix", WARNING, what, f"see {mount.state}/run for its log")


def _file_system(mount: Standing) -> Iterator[Finding]:
    """Ask the mount itself something that the kernel cannot answer, and see whether requests wait."""
    assert mount.info is not None
    where = mount.info.mountpoint
    code = errno_of(lambda: os.statvfs(where), ANSWER_SECONDS)
    if code is None:
        yield Finding(
            "mount",
            FAILURE,
            f"{where}: does not answer: whoever touches it waits{_waiting(mount)}",
            abort(mount),
        )
    elif code:
        what = f"{where}: cannot be used: {os.strerror(code)}"
        advice = f"`cidfs --state {mount.state} umount {where}`; then {mount.again}"
        yield Finding("mount", FAILURE, what, advice)
    elif stuck := _stuck(mount):
        what = f"{where}: answers, but {times(stuck, 'older request')} got no answer for {STILL_SECONDS:g} s"
        yield Finding("mount", WARNING, what, f"a slow disk, or a fault; in the end, {abort(mount)}")
    else:
        yield Finding("mount", OK, f"{where}: answers")


def _connection(mount: Standing) -> Path | None:
    """Return the kernel's folder for a mount's connection; None where it is not to be had."""
    if mount.info is None:
        return None
    number = mount.info.device.partition(":")[2]
    for info in mount.mounted:
        if info.type == "fusectl" and os.path.isdir(f"{info.mountpoint}/{number}"):
            return Path(info.mountpoint, number)
    return None


def abort(mount: Standing) -> str:
    """Return how root makes everybody who waits for a mount get an error."""
    if mount.info is None:
        return f"`kill -KILL {mount.daemon.pid if mount.daemon is not None else ''}`"
    folder = _connection(mount)
    number = mount.info.device.partition(":")[2]
    first = "" if folder is not None else f"`mount -t fusectl fusectl {FUSECTL}` and "
    return f"give it up: {first}`echo 1 > {folder or Path(FUSECTL, number)}/abort`"


def _count(mount: Standing) -> int:
    folder = _connection(mount)
    try:
        return int((folder / "waiting").read_text()) if folder is not None else 0
    except (OSError, ValueError):
        return 0


def _waiting(mount: Standing) -> str:
    count = _count(mount)
    return f" ({times(count, 'request')} unanswered)" if count else ""


def _stuck(mount: Standing) -> int:
    """Return how many requests wait, where that number has not moved for a second."""
    first = _count(mount)
    deadline = time.monotonic() + STILL_SECONDS
    while first and time.monotonic() < deadline:
        time.sleep(0.02)
        if _count(mount) != first:
            return 0
    return first


def _parent(mount: Standing) -> Iterator[Finding]:
    """Look at the parent process, which makes overlays look again and starts the metadata process."""
    if mount.holder is None:
        what = f"{mount.mountpoint}: the parent of its daemon has died: overlays are not told of new paths"
        yield Finding("holder", FAILURE, what, f"unmount when it can be; then {mount.again}")
    elif processes.is_stopped(mount.holder.pid):
        what = f"{mount.mountpoint}: the parent of its daemon (process {mount.holder.pid}) is stopped"
        yield Finding("holder", FAILURE, what, f"`kill -CONT {mount.holder.pid}`")
    else:
        yield Finding("holder", OK, f"{mount.mountpoint}: process {mount.holder.pid} watches over it")
