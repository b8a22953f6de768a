"""The parent of a mount: starts the daemon and the metadata process, and watches over both.

Stays in the mount namespace where it was started, and does there what the daemon asks for (`mount/acts`). It
starts the metadata process again when that dies, and keeps the socket that Nix connects to: who connects
meanwhile waits. When the daemon dies, it takes the dead mount from sight with one system call and says how to
mount again; the metadata process goes on with what is local until the mount is taken down or made anew.

One thread, one loop. After the start it loads nothing and executes nothing, and its memory is locked: by then
an overlay may lie over its own interpreter, with a dead mount below. What may block is done by a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cidfs import board as boards
from cidfs import daemon_process, errors
from cidfs.board import Board
from cidfs.errors import CidfsError, MountFailed, MountPointBusy
from cidfs.local import leases
from cidfs.local.leases import Lease
from cidfs.local.state import NIX_SOCKET
from cidfs.mount import acts, mountinfo, session
from cidfs.mount.overlay import overlays_above
from cidfs.mount.plan import MountPlan
from cidfs.nix import socket as metadata
from cidfs.nix.listener import NixListener

log = logging.getLogger(__name__)

UNKNOWN: Final = -1
GRACE_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 0.5  # a leader that is dead while a thread of it is not shows in /proc alone
STOP_SECONDS: Final = 10.0
BACK_OFF: Final = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
CALM_SECONDS: Final = 60.0  # after which a death counts as the first one again
_MCL_CURRENT: Final = 1
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(slots=True)
class _Child:
    """A process that was started here."""

    pid: int
    fd: int
    status: int = UNKNOWN
    _since: float = 0.0

    @classmethod
    def of(cls, pid: int) -> _Child:
        return cls(pid, os.pidfd_open(pid))

    def has_ended(self) -> bool:
        """Say whether it is dead; then `status` is its wait status.

        That is UNKNOWN where its first thread has ended and another one waits in the kernel: that can be for
        ever, so it counts as dead after a moment.
        """
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid:
            self.status = status
            return True
        if _state(self.pid) not in ("Z", "X"):
            return False
        now = time.monotonic()
        self._since = self._since or now
        return now - self._since > GRACE_SECONDS

    def forget(self) -> None:
        """Let go of one that has ended."""
        os.close(self.fd)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


class Holder:
    """One mount with its processes."""

    def __init__(self, plan: MountPlan) -> None:
        self._plan = plan
        self._board = Board()
        self._mine, self._theirs = acts.pair()
        self._lifeline = os.pipe()  # nobody writes: its end says that this process has gone
        self._daemon: _Child | None = None
        self._nix: _Child | None = None
        self._act: _Child | None = None
        self._act_began = 0.0
        self._act_number = 0
        self._deaths = 0
        self._last_start = 0.0
        self._start_at: float | None = None
        self._listener: NixListener | None = None
        self._control = Path()
        self._mount: mountinfo.MountInfo | None = None
        self._lease: Lease | None = None
        self._ending = False
        self.code = 0
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # --- the start

    def start(self, deadline: float) -> None:
        """Start all; return when the mount answers. Raises what the daemon's start raised."""
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # read from the wakeup descriptor
        self._fork_daemon()
        try:
            told = self._await_daemon(deadline)
            self._control = Path(os.fsdecode(bytes.fromhex(told.control)))
            self._mount = session.mount_of(self._plan.state, self._plan.mountpoint)
            self._open_nix_socket()
            metadata.rehearse(self._plan.state)
            self._lease = leases.take(
                self._plan.state / "run",
                leases.HOLDER,
                0,
                mountpoint=mountinfo.printable(self._plan.mountpoint),
                nix_socket=mountinfo.printable(self._listener.path) if self._listener else "",
            )
        except BaseException:
            self._stop_daemon()
            self._give_back()
            raise
        self._board.state = boards.SERVING

    def _fork_daemon(self) -> None:
        self._board.state = boards.STARTING
        pid = os.fork()
        if pid == 0:
            self._become_child(self._mine.fileno())
            daemon_process.run(self._plan, acts.Link(self._theirs), self._board)
        self._daemon = _Child.of(pid)
        self._board.daemon = pid
        self._theirs.close()

    def _await_daemon(self, deadline: float) -> acts.Told:
        assert self._daemon is not None
        where = self._plan.mountpoint
        poll = select.poll()
        for fd in (self._mine.fileno(), self._daemon.fd, self._wake[0]):
            poll.register(fd, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(max(0.0, left) * 1000)}
            if self._mine.fileno() in ready:
                raw = self._mine.recv(acts.MAX_MESSAGE)
                if raw:
                    told = msgspec.json.decode(raw, type=acts.Told)
                    if told.kind:
                        known = {c.__name__: c for c in errors.EXIT_CODES}
                        raise known.get(told.kind, CidfsError)(told.text)
                    return told
            if self._daemon.fd in ready:
                raise MountFailed(
                    f"{where}: the daemon died at its start; see its log in {self._plan.state}/run"
                )
            if self._wake[0] in ready and self._signals() & {signal.SIGTERM, signal.SIGINT}:
                raise KeyboardInterrupt
            if left <= 0:
                raise MountFailed(f"{where}: the daemon did not start in time")

    def _open_nix_socket(self) -> None:
        """Listen where Nix is to connect; the store's own socket goes to the first mount of it."""
        path = self._plan.nix_socket or self._plan.state / NIX_SOCKET
        self._listener = NixListener.open(path)
        if self._listener is None:
            if self._plan.nix_socket is not None:
                raise MountPointBusy(f"{path}: another mount listens there; choose another --nix-socket")
            log.info("%s: another mount of this store listens there; this one has no socket for Nix", path)

    # --- the loop

    def hold(self) -> None:
        """Watch until all has ended: the file system was unmounted, or this process was told to end."""
        _lock_memory()
        self._start_nix()
        waits, acts_too = select.poll(), select.poll()
        for poll in (waits, acts_too):
            poll.register(self._wake[0], select.POLLIN)
        acts_too.register(self._mine.fileno(), select.POLLIN)
        while not self._ending:
            # the next act may be asked for as soon as the outcome of the last one is known, before its end is
            poll = acts_too if self._act is None else waits
            pause = LOOK_SECONDS
            if self._start_at is not None:
                pause = min(pause, max(0.0, self._start_at - time.monotonic()))
            ready = {fd: what for fd, what in poll.poll(pause * 1000)}
            if self._wake[0] in ready and self._signals() & {signal.SIGTERM, signal.SIGINT}:
                self._ending = True
            if self._mine.fileno() in ready and not self._take_message():
                acts_too.unregister(self._mine.fileno())
            self._look_at_children()
        for overlay in overlays_above(self._plan.mountpoint) if self._daemon is not None else ():
            where = overlay.mountpoint
            log.warning("%s: the overlay is dead from now on; `cidfs umount %s` takes it down", where, where)
        self._stop_daemon()
        self._stop_nix()
        self._give_back()

    def _signals(self) -> set[int]:
        with contextlib.suppress(BlockingIOError):
            return set(os.read(self._wake[0], 4096))
        return set()

    def _look_at_children(self) -> None:
        if self._act is not None:
            if self._act.has_ended():
                self._act.forget()
                self._act = None
            elif time.monotonic() - self._act_began > acts.ACT_SECONDS:
                os.kill(self._act.pid, signal.SIGKILL)
                self._answer(acts.Outcome(self._act_number, problem="an overlay does not answer"))
                self._act.forget()  # what it waits for may let it go one day: init takes it then
                self._act = None
        if self._nix is not None and self._nix.has_ended():
            self._nix.forget()
            self._nix = None
            self._board.nix = 0
            self._nix_died()
        if self._start_at is not None and time.monotonic() >= self._start_at:
            self._start_nix()
        if self._daemon is not None and self._daemon.has_ended():
            self._daemon_ended()

    def _take_message(self) -> bool:
        """Begin what the daemon asks for; say whether there can be more."""
        try:
            raw = self._mine.recv(acts.MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not raw:
            return False
        try:
            act = msgspec.json.decode(raw, type=acts.Act)
        except msgspec.MsgspecError as e:
            log.warning("the daemon asks for what is no act: %s", e)
            return True
        pid = os.fork()
        if pid == 0:
            self._become_child()
            with contextlib.suppress(BaseException):
                acts.send(self._mine, acts.perform(act, self._plan.mountpoint))
            os._exit(0)
        self._act, self._act_began, self._act_number = _Child.of(pid), time.monotonic(), act.number
        return True

    def _answer(self, outcome: acts.Outcome) -> None:
        with contextlib.suppress(OSError):
            acts.send(self._mine, outcome)

    # --- the daemon's end

    def _daemon_ended(self) -> None:
        assert self._daemon is not None
        self._daemon.forget()
        pid, status, self._daemon = self._daemon.pid, self._daemon.status, None
        self._board.state = boards.GONE
        if status == 0 and (self._mount is None or not session.is_mounted(self._mount)):
            self._ending = True  # unmounted, as somebody wanted it
            return
        if not self._plan.in_background and os.WIFEXITED(status) and os.WEXITSTATUS(status):
            self._ending, self.code = True, os.WEXITSTATUS(status)  # it has said why
            session.take_from_sight(self._mount)
            return
        above = [overlay.mountpoint for overlay in overlays_above(self._plan.mountpoint)]
        session.take_from_sight(self._mount)
        again = f"`cidfs --state {self._plan.state} mount {self._plan.mountpoint}` mounts again"
        if above:
            again = f"take down the overlay at {above[0]} (it is dead too); {again}; then the overlay"
        log.error(
            "%s: the daemon (process %d) died and the mount with it; Nix is still answered. %s",
            self._plan.mountpoint,
            pid,
            again,
        )
        session.notify(f"STATUS=the daemon died: {again}")

    def _stop_daemon(self) -> None:
        if self._daemon is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._daemon.pid, signal.SIGTERM)
        while not self._daemon.has_ended():
            if time.monotonic() > deadline:
                os.kill(self._daemon.pid, signal.SIGKILL)
                session.take_from_sight(self._mount)
                deadline = float("inf")
            select.select([self._daemon.fd], [], [], 0.05)
        self._daemon.forget()
        self._daemon = None
        session.take_from_sight(self._mount)

    # --- the metadata process

    def _start_nix(self) -> None:
        self._start_at = None
        if self._listener is None:
            return
        self._last_start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._become_child(self._mine.fileno(), self._lifeline[1])
            metadata.run(
                self._listener.socket,
                self._plan.state,
                self._plan.mountpoint,
                self._control,
                self._board,
                self._lifeline[0],
            )
        self._nix = _Child.of(pid)
        self._board.nix = pid

    def _nix_died(self) -> None:
        now = time.monotonic()
        if now - self._last_start > CALM_SECONDS:
            self._deaths = 0
        pause = BACK_OFF[min(self._deaths, len(BACK_OFF) - 1)]
        self._deaths += 1
        self._board.restarts += 1
        log.error("the metadata process died; it is started again in %g s", pause)
        self._start_at = now + pause

    def _stop_nix(self) -> None:
        if self._nix is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._nix.pid, signal.SIGTERM)
        while not self._nix.has_ended():
            if time.monotonic() > deadline:
                os.kill(self._nix.pid, signal.SIGKILL)
                deadline = float("inf")
            select.select([self._nix.fd], [], [], 0.05)
        self._nix.forget()
        self._nix = None

    # ---

    def _become_child(self, *closed: int) -> None:
        """Undo, in a new child, what belongs to the parent alone."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for fd in (*closed, *self._wake):
            os.close(fd)

    def _give_back(self) -> None:
        """Take socket and lease away; nobody is served any more."""
        if self._listener is not None:
            self._listener.close()
        if self._lease is not None:
            self._lease.release()


def _lock_memory() -> None:
    """Keep what is loaded in memory, as far as this user may."""
    ctypes.CDLL(None).mlockall(_MCL_CURRENT)


def run(plan: MountPlan, deadline: float, ready: Callable[[], None]) -> int:
    """Mount, call ready when the mount answers, and stay until it has ended; return an exit code.

    That is the daemon's own in the foreground, where it ended by itself. Raises the errors of the start. Must
    be called before any thread has started in this process.
    """
    holder = Holder(plan)
    gc.collect()
    gc.freeze()  # children do not copy what they only look at
    holder.start(deadline)
    ready()
    session.notify("READY=1")
    holder.hold()
    session.notify("STOPPING=1")
    return holder.code
