"""Start a mount in the background, and stop one: the processes around `holder`.

The caller of `start` gets the errors of the start as if it had run them itself. Nothing waits without a
deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from cidfs import daemon_process, errors, holder
from cidfs.errors import CidfsError, MountFailed
from cidfs.mount import mountinfo, session
from cidfs.mount.plan import MountPlan

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 25.0
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Report(msgspec.Struct, frozen=True):
    """What the child says of its start: an error's class and text, or neither."""

    kind: str = ""
    text: str = ""


def run_in_foreground(plan: MountPlan) -> int:
    """Mount, and stay in this process as the parent of the mount, logging to standard error.

    Return the exit code that tells how the daemon ended.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    session.check_mountpoint(plan.mountpoint)
    _end_survivors(plan)
    return holder.run(
        plan,
        time.monotonic() + START_SECONDS,
        lambda: logging.getLogger(__name__).info("%s: mounted", plan.mountpoint),
    )


def start(plan: MountPlan) -> None:
    """Mount with processes of its own and return when the mount answers; raise what its start raised."""
    session.check_mountpoint(plan.mountpoint)  # before anything is made on disk
    _end_survivors(plan)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(plan, writing)
    os.close(writing)
    try:
        _await_start(plan, child, reading)
    finally:
        os.close(reading)


def _await_start(plan: MountPlan, child: int, reading: int) -> None:
    raw = b""
    deadline = time.monotonic() + START_SECONDS + 5  # the child has a deadline of its own
    while not raw.endswith(b"\n"):
        readable, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            session.take_from_sight(session.mount_of(plan.state, plan.mountpoint))
            raise MountFailed(f"{plan.mountpoint}: the mount did not start within {START_SECONDS:g} s")
        piece = os.read(reading, 65536)
        if not piece:
            _, status = os.waitpid(child, 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            session.take_from_sight(session.mount_of(plan.state, plan.mountpoint))
            raise MountFailed(
                f"{plan.mountpoint}: its parent process died at the start (wait status {status})"
            )
        raw += piece
    report = msgspec.json.decode(raw, type=_Report)
    if report.kind:
        os.waitpid(child, 0)
        known = {c.__name__: c for c in errors.EXIT_CODES}
        raise known.get(report.kind, CidfsError)(report.text)
    os.statvfs(plan.mountpoint)


def _child(plan: MountPlan, writing: int) -> NoReturn:
    code = 0
    log = plan.log_of(os.getpid())

    def report(kind: str = "", text: str = "") -> None:
        with contextlib.suppress(OSError):  # told already, or the caller has gone
            told = text.encode(errors="backslashreplace").decode()
            os.write(writing, msgspec.json.encode(_Report(kind, told)) + b"\n")

    def ready() -> None:
        daemon_process.log_to(log)
        report()
        os.close(writing)

    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        os.chdir("/")
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
        holder.run(plan, time.monotonic() + START_SECONDS, ready)
    except CidfsError as e:
        kind = next((c.__name__ for c in type(e).__mro__ if c in errors.EXIT_CODES), "CidfsError")
        report(kind, str(e))
        code = errors.exit_code(e)
    except BaseException as e:
        if log.exists():
            logging.exception("the parent of the mount ended in a way that was not foreseen")
        report("MountFailed", f"{plan.mountpoint}: {type(e).__name__}: {e}")
        code = 70
    finally:
        with contextlib.suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
        os._exit(code)


def _end_survivors(plan: MountPlan) -> None:
    """End the processes that a mount whose daemon died has left at a mount point."""
    for pid in session.survivors_of(plan.state, plan.mountpoint):
        _end_holder(plan.state, plan.mountpoint, pid)


def _end_holder(state: Path, mountpoint: Path, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    _await_end(mountpoint, "the parent of its daemon", pid, lambda: session.holders_of(state, mountpoint))


def _await_end(mountpoint: Path, what: str, pid: int, running: Callable[[], Container[int]]) -> None:
    """Wait until a process has given its lease back, and then until it has nothing open any more."""
    deadline = time.monotonic() + STOP_SECONDS
    pause = 0.005
    while pid in running() or _is_alive(pid):
        if time.monotonic() > deadline:
            raise MountFailed(f"{mountpoint}: unmounted, but {what} (process {pid}) goes on; see its log")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _is_alive(pid: int) -> bool:
    """Say whether a process has not ended yet; one that ended is none, although nobody has asked for it."""
    if not pid:
        return False
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        return not select.select([process], [], [], 0)[0]
    finally:
        os.close(process)


def stop(mountpoint: Path, state: Path, *, lazy: bool) -> None:
    """Take a mount down and wait for the end of its processes.

    Of a mount whose daemon died, end what is left. state is where to look for that, as nothing is mounted any
    more. Raise MountPointAbsent, MountPointBusy, MountFailed.
    """
    info = mountinfo.mounted_at(mountpoint)
    if info is not None and info.type == mountinfo.FILE_SYSTEM_TYPE:
        state = mountinfo.source_of(info)
    else:
        survivors = session.survivors_of(state, mountpoint)
        for pid in survivors:
            _end_holder(state, mountpoint, pid)
        if survivors:
            return
    pid = session.daemon_of(state, mountpoint)
    holders = session.holders_of(state, mountpoint)
    parent = session.parent_of(pid)
    session.unmount(mountpoint, lazy=lazy)
    if not lazy:
        _await_end(mountpoint, "its daemon", pid, lambda: session.daemons_of(state, mountpoint))
        if parent in holders:  # else it has died
            _await_end(
                mountpoint, "the parent of its daemon", parent, lambda: session.holders_of(state, mountpoint)
            )
