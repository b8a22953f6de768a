"""Start a daemon in the background, and stop one: the processes around `daemon`.

The caller of `start` gets the errors of the start as if it had run them itself. Nothing waits without a
deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from cidfs import daemon, errors, faults
from cidfs.errors import CidfsError, MountFailed
from cidfs.mount import session

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 15.0
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Report(msgspec.Struct, frozen=True):
    """What the child says of its start: an error's class and text, or neither."""

    kind: str = ""
    text: str = ""


def run_in_foreground(plan: daemon.MountPlan) -> None:
    """Mount and serve in this process, logging to standard error."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    daemon.run(plan, ready=lambda: logging.getLogger(__name__).info("%s: mounted", plan.mountpoint))


def start(plan: daemon.MountPlan) -> None:
    """Mount in a process of its own and return when the mount answers; raise what its start raised."""
    session.check_mountpoint(plan.mountpoint)  # before anything is made on disk
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


def _await_start(plan: daemon.MountPlan, child: int, reading: int) -> None:
    raw = b""
    deadline = time.monotonic() + START_SECONDS
    while not raw.endswith(b"\n"):
        readable, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            os.kill(child, 9)
            os.waitpid(child, 0)
            session.unmount_if_mounted(plan.mountpoint)
            raise MountFailed(f"{plan.mountpoint}: the daemon did not start within {START_SECONDS:g} s")
        piece = os.read(reading, 65536)
        if not piece:
            _, status = os.waitpid(child, 0)
            session.unmount_if_mounted(plan.mountpoint)
            raise MountFailed(f"{plan.mountpoint}: the daemon died at its start (wait status {status})")
        raw += piece
    report = msgspec.json.decode(raw, type=_Report)
    if report.kind:
        os.waitpid(child, 0)
        known = {c.__name__: c for c in errors.EXIT_CODES}
        raise known.get(report.kind, CidfsError)(report.text)
    os.statvfs(plan.mountpoint)


def _child(plan: daemon.MountPlan, writing: int) -> NoReturn:
    code = 0
    log = plan.state / "run" / f"mount-{os.getpid()}.log"

    def report(kind: str = "", text: str = "") -> None:
        with contextlib.suppress(OSError):  # told already, or the caller has gone
            told = text.encode(errors="backslashreplace").decode()
            os.write(writing, msgspec.json.encode(_Report(kind, told)) + b"\n")

    def ready() -> None:
        # from here on nobody waits for our words: standard error becomes the log
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        os.dup2(fd, 2)
        os.close(fd)
        faults.say = None
        report()

    faults.say = lambda line: report("IndexLost", line)
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
        daemon.run(plan, ready)
    except CidfsError as e:
        kind = next((c.__name__ for c in type(e).__mro__ if c in errors.EXIT_CODES), "CidfsError")
        if os.path.exists(log):
            logging.error("%s", e)
        report(kind, str(e))
        code = errors.exit_code(e)
    except BaseException as e:
        if os.path.exists(log):
            logging.exception("the daemon ended in a way that was not foreseen")
        report("MountFailed", f"{plan.mountpoint}: {type(e).__name__}: {e}")
        code = 70
    finally:
        with contextlib.suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
        os._exit(code)


def stop(mountpoint: Path, *, lazy: bool) -> None:
    """Take a mount down and wait for the end of its daemon.

    Raise MountPointAbsent, MountPointBusy, MountFailed.
    """
    info = session.mounted_at(mountpoint)
    state = session.source_of(info) if info is not None else Path("/")
    pid = session.daemon_of(state, mountpoint)
    session.unmount(mountpoint, lazy=lazy)
    deadline = time.monotonic() + STOP_SECONDS
    pause = 0.005
    while not lazy and pid in session.daemons_of(state, mountpoint):
        if time.monotonic() > deadline:
            raise MountFailed(f"{mountpoint}: unmounted, but its daemon (process {pid}) goes on; see its log")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
