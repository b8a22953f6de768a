"""Who connects to the metadata socket and does wrong, each in another way."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

from cidfs.control import SocketAddress
from cidfs.nix import requests as r
from cidfs.nix.wire import MAX_ITEMS, MAX_TEXT, number, text, texts

PATIENCE = 60.0
MAGIC = number(r.CLIENT_MAGIC)
VERSION = number(1 << 8 | 37)
GREETING = MAGIC + VERSION + number(0) + number(0)
PATH = "/nix/store/00000000000000000000000000000000-hostile"


def connect(path: Path) -> socket.socket:
    """Return a plain connection."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.settimeout(PATIENCE)
        with SocketAddress(path) as address:
            found.connect(address)
    except BaseException:
        found.close()
        raise
    return found


def await_end(peer: socket.socket) -> bytes:
    """Return all that still comes until the other side closes, which it must within PATIENCE."""
    peer.settimeout(PATIENCE)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := peer.recv(65536):
            found += piece
    return found


def greet(path: Path) -> socket.socket:
    """Return a connection that is past its handshake."""
    peer = connect(path)
    peer.sendall(GREETING)
    found = b""
    while not found.endswith(number(r.LAST)):
        piece = peer.recv(4096)
        assert piece, "closed within the handshake"
        found += piece
    return peer


WORDS: dict[str, bytes] = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "wrong magic": number(r.SERVER_MAGIC) + VERSION,
    "an old version": MAGIC + number(1 << 8 | 20),
    "a version that cannot be": MAGIC + number(2**64 - 1),
    "a flag that is none": MAGIC + VERSION + number(7),
    "many features": MAGIC + number(1 << 8 | 38) + number(101),
    "cut short in the magic": MAGIC[:5],
    "cut short in the handshake": MAGIC + VERSION + number(0)[:3],
    "cut short in a number": GREETING + number(r.IS_VALID_PATH)[:3],
    "cut short in a text": GREETING + number(r.IS_VALID_PATH) + number(80) + b"/nix/store",
    "cut short in a list": GREETING + number(r.QUERY_VALID_PATHS) + number(1000) + text(PATH) * 10,
    "a huge length": GREETING + number(r.IS_VALID_PATH) + number(2**63),
    "the largest length": GREETING + number(r.IS_VALID_PATH) + number(2**64 - 1),
    "a length above the cap": GREETING + number(r.QUERY_PATH_INFO) + number(MAX_TEXT + 1) + b"x" * 1000,
    "the longest text": GREETING + number(r.IS_VALID_PATH) + number(MAX_TEXT) + b"x" * (MAX_TEXT - 8),
    "a huge count": GREETING + number(r.QUERY_VALID_PATHS) + number(2**64 - 1),
    "a count at the cap": GREETING + number(r.QUERY_VALID_PATHS) + number(MAX_ITEMS) + text("") * 4000,
    "many settings": GREETING + number(r.SET_OPTIONS) + number(0) * 12 + number(10_001),
    "padding that is not zero": GREETING + number(r.IS_VALID_PATH) + number(3) + b"abc\0\0x\0\0",
    "not UTF-8": GREETING + number(r.IS_VALID_PATH) + number(8) + b"\xff" * 8,
    "an unknown operation": GREETING + number(999) + b"x" * 5000,
    "a write": GREETING + number(7) + text("name") + b"x" * 5000,
    "an old write": GREETING + number(8) + text("name") + text("content") + texts(()),
}
"""What is sent by those who only send."""


def says(words: bytes) -> Callable[[Path, str], socket.socket]:
    """Return who connects, says some words, and stays."""

    def attack(path: Path, big: str) -> socket.socket:
        peer = connect(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(words)
        return peer

    return attack


def never_reads(path: Path, big: str) -> socket.socket:
    """Ask for much more than a socket holds, and take none of it."""
    peer = greet(path)
    peer.sendall((number(r.NAR_FROM_PATH) + text(big)) * 20)
    return peer


def never_reads_lists(path: Path, big: str) -> socket.socket:
    """Ask for all paths for as long as that is taken."""
    peer = greet(path)
    peer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(20_000):
            peer.send(number(r.QUERY_ALL_VALID_PATHS) * 10)
    return peer


def sends_descriptors(path: Path, big: str) -> socket.socket:
    """Send what nobody asked for along with the bytes."""
    peer = connect(path)
    with open(os.devnull, "rb") as file:
        rights = array.array("i", [file.fileno()] * 100)
        peer.sendmsg([MAGIC], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    return peer


ATTACKS: dict[str, Callable[[Path, str], socket.socket]] = {
    **{name: says(words) for name, words in WORDS.items()},
    "never reads": never_reads,
    "never reads lists": never_reads_lists,
    "sends descriptors": sends_descriptors,
}
