"""What these tests share: a server and a client that have shaken hands, and bytes spelled out."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

from cidfs.nix import requests as r
from cidfs.nix.client import Client
from cidfs.nix.protocol import Server

VERSION: Final = "cidfs 0.1.0"
HASH_PART: Final = "g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q"
PATH: Final = f"/nix/store/{HASH_PART}-foo"
LAST: Final = 0x616C7473
MINORS: Final = (21, 22, 25, 26, 27, 28, 29, 30, 31, 33, 35, 37, 38)


def u(*values: int) -> bytes:
    """Return integers as they are sent."""
    return struct.pack(f"<{len(values)}Q", *values)


def t(*values: str | bytes) -> bytes:
    """Return texts as they are sent."""
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    return b"".join(u(len(each)) + each + bytes(-len(each) % 8) for each in raw)


def greeted(minor: int = 38, features: Iterable[str] = ()) -> Server:
    """Return a server that a client of this protocol has greeted."""
    server = Server(VERSION)
    server.feed(u(0x6E697863, 0x100 | minor))
    if minor >= 38:
        offered = sorted(features)
        server.feed(u(len(offered)) + t(*offered))
    server.feed(u(0, 0))
    assert server.next() is None
    assert server.handshaken
    server.output()
    return server


def connected(minor: int = 38, features: frozenset[str] = r.FEATURES) -> tuple[Server, Client]:
    """Return the two ends of one connection."""
    server, client = Server(VERSION), Client(minor, features)
    server.feed(client.greeting())
    while not client.handshaken:
        assert server.next() is None
        client.feed(server.output())
        assert client.next() is None
        server.feed(client.output())
    assert server.handshaken
    return server, client


def taken(server: Server, data: bytes) -> Any:
    """Return the only request in some bytes."""
    server.feed(data)
    found = server.next()
    assert server.next() is None
    return found
