"""The client of a daemon's control socket: nobody listens, somebody hangs, answers nonsense, or answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from cidfs.control import DaemonStats, Request, RequestStats, SocketAddress, ask, have_done
from cidfs.errors import CidfsError

STATS = DaemonStats(
    pid=1,
    mountpoint="/m",
    transport="pyfuse3",
    uptime=1.5,
    memory=5,
    requests={"read": RequestStats(1, 0, 1.0, 2.0, 3.0, 4.0)},
    bytes_read=6,
    chunk_hits=7,
    chunk_reads=8,
    manifest_hits=9,
    manifest_reads=10,
    damaged=0,
    cached_bytes=11,
)


@contextmanager
def listening(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Listen at a path, and answer one connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            with suppress(BrokenPipeError, ConnectionResetError):  # the client has gone
                answer(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with SocketAddress(path) as address:
            listener.bind(address)
        listener.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(30)
        assert not thread.is_alive()


def until_closed(connection: socket.socket) -> None:
    """Read, and say nothing, until the client goes."""
    while connection.recv(4096):
        pass


def test_an_answer(tmp_path: Path) -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(4096))
        raw = msgspec.json.encode(STATS) + b"\n"
        for i in range(0, len(raw), 50):
            connection.sendall(raw[i : i + 50])

    with listening(tmp_path / "s.sock", answer):
        assert ask(tmp_path / "s.sock", Request("stats")) == STATS
    [line] = asked
    assert msgspec.json.decode(line) == {"do": "stats", "names": [], "version": 1}
    assert line.endswith(b"\n")


def test_nobody_listens(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.sock", tmp_path / "absent" / "s.sock"):
        with pytest.raises(FileNotFoundError):
            ask(path, Request("stats"))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left,
        SocketAddress(tmp_path / "left.sock") as address,
    ):
        left.bind(address)  # by one that died
    with pytest.raises(ConnectionRefusedError):
        ask(tmp_path / "left.sock", Request("stats"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="refused"):
        ask(tmp_path / "file", Request("stats"))


def test_one_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    with listening(tmp_path / "s.sock", until_closed), pytest.raises(TimeoutError):
        ask(tmp_path / "s.sock", Request("stats"), timeout=0.1)
    assert time.monotonic() - start < 10


def test_one_that_does_not_even_take_the_connection(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with SocketAddress(tmp_path / "s.sock") as address:
            listener.bind(address)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            with SocketAddress(tmp_path / "s.sock") as address:
                other.connect(address)
            with pytest.raises((TimeoutError, BlockingIOError)):
                ask(tmp_path / "s.sock", Request("stats"), timeout=0.1)


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"garbage\n", b"\xff\xfe\n", b'{"pid": "x"}\n', b"{"])
def test_nonsense(tmp_path: Path, text: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(text)

    with listening(tmp_path / "s.sock", answer), pytest.raises(CidfsError):
        ask(tmp_path / "s.sock", Request("stats"))


def test_one_that_never_ends_its_line(tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        while True:
            connection.sendall(b"x" * 65536)

    with listening(tmp_path / "s.sock", answer), pytest.raises((CidfsError, OSError)):
        ask(tmp_path / "s.sock", Request("stats"), timeout=5)


def test_an_answer_of_a_later_version_has_more_in_it(tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        told = msgspec.to_builtins(STATS) | {"later": [1], "version": 2}
        connection.sendall(msgspec.json.encode(told) + b"\n")

    with listening(tmp_path / "s.sock", answer):
        assert ask(tmp_path / "s.sock", Request("stats")).version == 2


def test_a_folder_with_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)
    folder.mkdir()

    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(msgspec.json.encode(STATS) + b"\n")

    with listening(folder / "s.sock", answer):
        assert ask(folder / "s.sock", Request("stats")).pid == 1


@pytest.mark.parametrize(
    ("text", "done"), [(b'{"done":true}\n', True), (b'{"done":false,"later":1}\n', False)]
)
def test_what_is_to_be_done(tmp_path: Path, text: bytes, done: bool) -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(4096))
        connection.sendall(text)

    with listening(tmp_path / "s.sock", answer):
        assert have_done(tmp_path / "s.sock", Request("unveil", names=("a", "b"))) is done
    assert msgspec.json.decode(asked[0], type=Request).names == ("a", "b")


@pytest.mark.parametrize("text", [b"", b"{}\n", b'{"done":1}\n', b"\xff\n"])
def test_who_does_not_say_that_it_is_done(tmp_path: Path, text: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(text)

    with listening(tmp_path / "s.sock", answer), pytest.raises(ConnectionResetError, match="went away"):
        have_done(tmp_path / "s.sock", Request("refresh"))
