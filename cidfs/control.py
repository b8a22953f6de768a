"""What a running daemon is asked, and what it answers: the wire format of its control socket, and a client.

One JSON line each way over a Unix socket in the state folder's run/. Used by daemon and command line; imports
nothing of the floors. The client is synchronous and never waits longer than its deadline.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from cidfs.errors import CidfsError

VERSION: Final = 1
MAX_LINE: Final = 1 << 20
DEFAULT_TIMEOUT: Final = 2.0


class Request(msgspec.Struct, frozen=True):
    """What is asked. do: `stats`; `refresh`: show now what was published, hide what was removed, and say when

    that is done; `unveil`: take whiteouts of these published names (base names of store paths) out of the
    uppers of overlays.
    """

    do: str
    names: tuple[str, ...] = ()
    version: int = VERSION


class Done(msgspec.Struct, frozen=True):
    """Whether what was asked for is done; why not, the daemon has logged."""

    done: bool


class RequestStats(msgspec.Struct, frozen=True):
    """Requests of one kind: how many, how many failed, and how long they took (microseconds.

    Upper bounds of 25 % wide steps).
    """

    count: int
    errors: int
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float


class OverlayStats(msgspec.Struct, frozen=True, kw_only=True):
    """Overlays above a mount: where, how often they were reconfigured, how many whiteouts were taken out.

    confirmed is the serial up to which what became whole is shown; complaint says why no more is, if so.
    """

    above: list[str]
    remounts: int
    unveiled: int
    confirmed: int
    absent_names: int
    complaint: str = ""


class NixStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata process says of itself, since the mount began.

    broken counts connections that were ended for what they sent or did not send, withheld the answers
    "absent" for what is published.
    """

    pid: int
    socket: str
    restarts: int
    connections: int
    connections_total: int
    requests: int
    refused: int
    broken: int
    withheld: int


class DaemonStats(msgspec.Struct, frozen=True):
    """What a daemon says of itself. Times in seconds, sizes in bytes."""

    pid: int
    mountpoint: str
    transport: str
    uptime: float
    memory: int
    requests: dict[str, RequestStats]
    bytes_read: int
    chunk_hits: int
    chunk_reads: int
    manifest_hits: int
    manifest_reads: int
    damaged: int
    cached_bytes: int
    overlays: OverlayStats | None = None
    nix: NixStats | None = None
    version: int = VERSION


def ask(path: Path, request: Request, timeout: float = DEFAULT_TIMEOUT) -> DaemonStats:
    """Ask the daemon that listens at a path how it is.

    Raise OSError when it does not answer, CidfsError when it answers what is no answer.
    """
    try:
        return msgspec.json.decode(_exchange(path, request, timeout), type=DaemonStats)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise CidfsError(f"{path}: not the answer of a daemon: {e}") from None


def have_done(path: Path, request: Request, timeout: float = DEFAULT_TIMEOUT) -> bool:
    """Have the daemon that listens at a path do something, wait for its answer, and say whether it is done.

    Raise OSError when it does not answer within timeout seconds.
    """
    try:
        return msgspec.json.decode(_exchange(path, request, timeout), type=Done).done
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ConnectionResetError(f"{path}: the daemon went away") from None


def _exchange(path: Path, request: Request, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout)
        with SocketAddress(path) as address:
            connection.connect(address)
        connection.sendall(msgspec.json.encode(request) + b"\n")
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < MAX_LINE:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            piece = connection.recv(65536)
            if not piece:
                break
            answer += piece
    return answer


class SocketAddress:
    """A path for bind and connect that fits a socket address, however long the folder's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> str:
        self._fd = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
