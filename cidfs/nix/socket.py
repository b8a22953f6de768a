"""The metadata process: answers Nix's worker protocol on a Unix socket, from the same index as the daemon.

A child of the mount's parent, and independent of the daemon: that may die, or be stopped, in the middle of a
build, and what is local is answered all the same. A thread a connection, synchronous; only reads. Whoever may
reach the socket may be hostile: who is silent within a handshake or a request, or sends what cannot be, is
let go; who is silent between requests is not (a Nix that builds may be so for hours). Each user has a share
of the connections, and of the memory that long requests and answers take; others never take up root's.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import cidfs
from cidfs.board import GONE, Board
from cidfs.errors import CidfsError, ProtocolError
from cidfs.local.store import LocalStore
from cidfs.mount.watch import OverlayWatch
from cidfs.nix import requests as r
from cidfs.nix.answers import Answers
from cidfs.nix.protocol import Server
from cidfs.nix.shares import Shares
from cidfs.nix.validity import Validity

log = logging.getLogger(__name__)

SILENCE_SECONDS: Final = 10.0  # within a handshake or a request
WHOLE_SECONDS: Final = 60.0  # for all of one, however it trickles
SEND_SECONDS: Final = 60.0  # without a byte taken
DRAIN_SECONDS: Final = 2.0
AWAKE_SECONDS: Final = 0.0005
LARGE: Final = 128 << 10  # a request that is longer needs one of its user's places
TIDY_SECONDS: Final = 1.0
SAY_SECONDS: Final = 60.0
SWITCH_SECONDS: Final = 0.0005  # a long answer on one connection must not hold up the others
STACK: Final = 512 << 10
RECEIVE: Final = 64 << 10
SHORT: Final = 4 << 10  # more than most requests; a larger buffer costs more than its bytes
PIECE: Final = 256 << 10
MAX_DESCRIPTORS: Final = 4096
MAX_COMPLAINTS: Final = 100
_CREDENTIALS: Final = struct.Struct("3i")
_TIME: Final = struct.Struct("ll")
_give_way: Final = ctypes.CDLL(None).sched_yield  # Python's own keeps the interpreter's lock


class _Ended(Exception):
    """A connection is over; the text says why, where the other side did wrong."""


class _Connection:
    """One connection and its thread."""

    def __init__(self, process: _Process, sock: socket.socket, user: int) -> None:
        self.user = user
        self.requests = 0
        self._process = process
        self._socket = sock
        self._server = Server(f"cidfs {cidfs.__version__}", store_dir=process.store.store_dir)
        self._told = process.validity.open(sock.fileno())
        self._answers = Answers(process.store, process.validity, self._told, self._server)
        self._has_place = False
        self._midway = False  # a part of an answer was sent
        self._is_pressed = False  # one request came upon the other

    def run(self) -> None:
        """Answer until the other side has gone, or did wrong."""
        problem = ""
        try:
            self._serve()
        except _Ended as e:
            problem = str(e)
        except ProtocolError as e:
            problem = str(e)
            with contextlib.suppress(OSError, _Ended):
                self._send(self._server.error(str(e)))
        except OSError:
            pass  # it has gone
        except CidfsError as e:  # a NAR that cannot be read
            self._process.complain(f"a connection ends: {e}")
            if not self._midway:
                with contextlib.suppress(OSError, _Ended):
                    self._send(self._server.error(str(e)))
        except Exception as e:
            self._process.complain(f"a connection ends in a way that was not foreseen: {e!r}", in_full=True)
        finally:
            self.end(problem)

    def end(self, problem: str) -> None:
        """Give everything back."""
        self._give_place_back()
        self._process.validity.close(self._told)
        self._socket.close()
        self._process.shares.give_connection_back(self.user)
        self._process.ended(self, problem, self._answers.refused)

    def _serve(self) -> None:
        sock, server, answer = self._socket, self._server, self._answers.answer
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _time(SEND_SECONDS))
        patient, since, unanswered = True, 0.0, 0
        while True:
            if server.idle != patient:
                patient = server.idle
                since = time.monotonic()
                limit = 0 if patient else SILENCE_SECONDS
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _time(limit))
            elif not patient:
                if time.monotonic() - since > WHOLE_SECONDS:
                    raise _Ended("a request that does not end")
                if unanswered > LARGE and not self._has_place:
                    self._take_place()
                    since = time.monotonic()
            try:
                data = self._wait() if patient else sock.recv(RECEIVE)
            except BlockingIOError:
                raise _Ended("silence in the midst of a request") from None
            if not data:
                if patient or not (self.requests or unanswered):  # who only looks whether anybody listens
                    return
                raise _Ended("gone in the midst of a request")
            unanswered += len(data)
            server.feed(data)
            while (request := server.next()) is not None:
                self.requests += 1
                unanswered = 0
                if type(request) is r.QueryAllValidPaths:
                    self._take_place()
                out = answer(request)
                if type(out) is bytes:
                    self._send(server.output() + out)
                else:
                    self._send_pieces(out)
                if type(request) is r.Refused:
                    self._drain()
                    return
                if self._has_place:
                    self._give_place_back()
                if not patient:
                    since = time.monotonic()
            out = server.output()
            if out:
                self._send(out)

    def _wait(self) -> bytes:
        """Return what comes after a pause that may be long, or very short.

        A Nix that builds asks one thing upon the other: to be woken for each, and to wake it while its
        processor sleeps, would take longer than all else. So one thread, as long as questions come without a
        pause, waits awake, and gives way to whoever can use the processor.
        """
        sock, awake = self._socket, self._process.awake
        began = time.perf_counter()
        if self._is_pressed and awake.acquire(blocking=False):
            try:
                while time.perf_counter() - began < AWAKE_SECONDS:
                    try:
                        return sock.recv(SHORT, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        _give_way()
            finally:
                awake.release()
        data = sock.recv(SHORT)
        self._is_pressed = time.perf_counter() - began < AWAKE_SECONDS
        return data

    def _take_place(self) -> None:
        if not self._has_place and not self._process.shares.take_place(self.user):
            raise _Ended("too many long requests at once")
        self._has_place = True

    def _give_place_back(self) -> None:
        if self._has_place:
            self._has_place = False
            self._process.shares.give_place_back(self.user)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except BlockingIOError:
            raise _Ended("an answer that nobody takes") from None

    def _send_pieces(self, pieces: Iterator[bytes] | bytes) -> None:
        waiting: list[bytes] = []
        size = 0
        for piece in pieces:
            assert isinstance(piece, bytes)
            waiting.append(piece)
            size += len(piece)
            if size >= PIECE:
                self._midway = True
                self._send(b"".join(waiting))
                waiting, size = [], 0
        self._send(b"".join(waiting))
        self._midway = False

    def _drain(self) -> None:
        """Let the other side read the last answer: closing with its bytes unread could lose that."""
        self._socket.shutdown(socket.SHUT_WR)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _time(DRAIN_SECONDS))
        deadline = time.monotonic() + DRAIN_SECONDS
        with contextlib.suppress(BlockingIOError):
            while time.monotonic() < deadline and self._socket.recv(65536):
                pass


def _time(seconds: float) -> bytes:
    return _TIME.pack(int(seconds), int(seconds % 1 * 1e6))


class _Process:
    """All connections, and who may have one."""

    def __init__(
        self, listener: socket.socket, store: LocalStore, mountpoint: Path, control: Path, board: Board
    ) -> None:
        self._listener = listener
        self.store = store
        self._board = board
        self.validity = Validity(store, board, OverlayWatch(mountpoint), control)
        self.shares = Shares()
        self.awake = threading.Lock()  # of the one who waits awake
        if len(os.sched_getaffinity(0)) == 1:
            self.awake.acquire()  # nobody: Nix needs the only processor
        self._lock = threading.Lock()
        self._running: set[_Connection] = set()
        self._said: dict[str, float] = {}
        self._complaints: set[str] = set()
        self._requests = 0  # of connections that have ended
        self._withheld = board.withheld  # by processes before this one
        self._tidy_now = threading.Event()

    def run(self, lifeline: int) -> None:
        """Accept until the mount's processes have gone."""
        threading.Thread(target=self._keep_tidy, daemon=True).start()
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(lifeline, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._listener.fileno():
                    self._accept()
                else:  # the parent has gone; a file system that is still mounted needs us
                    poll.unregister(fd)
                    threading.Thread(target=self._end_with_daemon, daemon=True).start()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as e:  # gone already, or no descriptor left: those who wait are taken later
            self._say(f"a connection cannot be taken: {e.strerror}")
            time.sleep(0.1)
            return
        sock.setblocking(True)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        user = _CREDENTIALS.unpack(credentials)[1]
        if not self.shares.take_connection(user):
            sock.close()
            self._say(f"connections of user {user} are turned away: there are too many")
            return
        with self._lock:
            connection = _Connection(self, sock, user)
            self._running.add(connection)
            self._board.connections_total += 1
        try:
            threading.Thread(target=connection.run, daemon=True).start()
        except RuntimeError:
            connection.end("no thread for it")

    def _say(self, text: str) -> None:
        """Warn, of one thing once in a minute."""
        now = time.monotonic()
        self._said = {said: when for said, when in self._said.items() if now - when < SAY_SECONDS}
        if text not in self._said:
            self._said[text] = now
            log.warning("%s", text)

    def complain(self, text: str, *, in_full: bool = False) -> None:
        """Log an error, each once: whoever asks decides how often it is met. In full: with where it arose."""
        with self._lock:
            is_new = text not in self._complaints and len(self._complaints) < MAX_COMPLAINTS
            if is_new:
                self._complaints.add(text)
        if is_new:
            log.error("%s", text, exc_info=in_full)

    def ended(self, connection: _Connection, problem: str, refused: int) -> None:
        """Count a connection that has ended."""
        with self._lock:
            self._running.remove(connection)
            self._requests += connection.requests
            self._board.refused += refused
            self._board.broken += bool(problem)
            self._board.connections = len(self._running)
        if problem:
            log.info("a connection of user %d was ended: %s", connection.user, problem)
        self._tidy_now.set()

    def _keep_tidy(self) -> None:
        seen = 0
        while True:
            self._tidy_now.wait(TIDY_SECONDS)
            self._tidy_now.clear()
            self.validity.tidy()
            with self._lock:
                now = self._requests + sum(connection.requests for connection in self._running)
                self._board.connections = len(self._running)
            self._board.requests += now - seen
            self._board.withheld = self._withheld + self.validity.withheld
            seen = now
            time.sleep(0.05)  # many that end at once are one reason to look

    def _end_with_daemon(self) -> None:
        with contextlib.suppress(OSError):
            if self._board.state != GONE:
                fd = os.pidfd_open(self._board.daemon)
                select.select([fd], [], [])
        log.warning("the other processes of the mount have gone: no more answers for Nix")
        os._exit(0)


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def rehearse(state: Path) -> None:
    """Ask a store once, and close it: libraries load parts of theirs when these are first used.

    For the parent: by the time that it starts a metadata process, they may be out of reach.
    """
    with LocalStore.open(state) as store:
        store.record_of("0" * 32)
        store.realisation(f"sha256:{'0' * 64}!out")


def run(
    listener: socket.socket, state: Path, mountpoint: Path, control: Path, board: Board, lifeline: int
) -> NoReturn:
    """Answer on a listening socket until the mount's other processes have gone, and end this process.

    control is the daemon's control socket; lifeline a descriptor that can be read when the parent has gone.
    """
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent says when it is over
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.chdir("/")
        threading.stack_size(STACK)
        sys.setswitchinterval(SWITCH_SECONDS)
        _allow_descriptors()
        with LocalStore.open(state) as store:
            _Process(listener, store, mountpoint, control, board).run(lifeline)
    except CidfsError as e:
        log.error("the metadata process ends: %s", e)
        code = 1
    except BaseException:
        log.exception("the metadata process ends in a way that was not foreseen")
    finally:
        os._exit(code)
