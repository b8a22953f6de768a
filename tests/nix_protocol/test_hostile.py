"""Hostile bytes: refused as soon as they are seen, in little memory, and with one kind of error."""

from __future__ import annotations

import tracemalloc

import pytest

from cidfs.errors import ProtocolError, exit_code
from cidfs.nix import requests as r
from cidfs.nix.client import Client
from cidfs.nix.protocol import Server
from cidfs.nix.wire import MAX_ITEMS, MAX_TEXT

from .support import LAST, PATH, VERSION, connected, greeted, t, u

HANDSHAKES = [
    ("another protocol", b"GET / HTTP/1.1\r\n\r\n"),
    ("Nix 2.2 and older", u(0x6E697863, 0x114)),
    ("no version", u(0x6E697863, 0)),
    ("a version beyond all", u(0x6E697863, 1 << 32)),
    ("too many features", u(0x6E697863, 0x126, 101)),
    ("a feature too long", u(0x6E697863, 0x126, 1, MAX_TEXT + 1)),
    ("a CPU flag", u(0x6E697863, 0x125, 2)),
    ("a reserve flag", u(0x6E697863, 0x125, 0, 2)),
]


@pytest.mark.parametrize("data", [h[1] for h in HANDSHAKES], ids=[h[0] for h in HANDSHAKES])
def test_greetings_that_are_refused(data: bytes) -> None:
    server = Server(VERSION)
    server.feed(data)
    with pytest.raises(ProtocolError):
        server.next()
    server.feed(data)
    assert server.next() is None
    assert not server.handshaken
    assert not server.idle


REQUESTS = [
    ("a text too long", u(1, MAX_TEXT + 1)),
    ("a text beyond all", u(1, (1 << 64) - 1)),
    ("padding", u(1, 3) + b"abc\0\0\0\0\1"),
    ("not UTF-8", u(1) + t(b"/\xff")),
    ("a surrogate", u(1) + t(b"\xed\xa0\x80")),
    ("a list too long", u(31, MAX_ITEMS + 1)),
    ("a list beyond all", u(40, (1 << 64) - 1)),
    ("padding in a list", u(31, 2) + t("abc") + u(3) + b"abc\1\0\0\0\0"),
    ("not UTF-8 in a list", u(31, 2) + t("abc", b"\xff")),
    ("a text too long in a list", u(31, 2) + t("abc") + u(MAX_TEXT + 1)),
    ("whether to substitute", u(31, 0, 2)),
    ("too many settings", u(19, *[0] * 12, 10_001)),
    ("a setting too long", u(19, *[0] * 12, 1, MAX_TEXT + 1)),
    ("too many substitutable", u(30, MAX_ITEMS + 1)),
    ("an output that is not UTF-8", u(43) + t(PATH, b"\xff")),
]


@pytest.mark.parametrize("data", [h[1] for h in REQUESTS], ids=[h[0] for h in REQUESTS])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_requests_that_are_refused(data: bytes, size: int) -> None:
    """At once: no byte more than shows it is waited for."""
    server = greeted(features=r.FEATURES)
    *early, last = [data[at : at + size] for at in range(0, len(data), size)]
    for piece in early:
        server.feed(piece)
        assert server.next() is None
        assert not server.idle
    server.feed(last)
    with pytest.raises(ProtocolError):
        server.next()
    server.feed(u(1) + t(PATH))
    assert server.next() is None
    assert not server.idle


@pytest.mark.parametrize("begin", [u(1), u(31, 1), u(31, 2) + t("x"), u(12), u(43)])
def test_a_text_too_long_is_refused_when_it_is_there_too(begin: bytes) -> None:
    server = greeted(features=r.FEATURES)
    server.feed(begin + t("x" * (MAX_TEXT + 1)) + u(0))
    with pytest.raises(ProtocolError, match=f"{MAX_TEXT + 1} bytes"):
        server.next()


@pytest.mark.parametrize("begin", [u(31, MAX_ITEMS), u(30, MAX_ITEMS), u(40, MAX_ITEMS), u(9, MAX_ITEMS)])
def test_a_million_announced_texts_cost_nothing(begin: bytes) -> None:
    server = greeted()
    tracemalloc.start()
    server.feed(begin)
    assert server.next() is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("begin", [u(31, MAX_ITEMS), u(19, *[0] * 12, 10_000)], ids=["a list", "settings"])
def test_a_request_of_more_than_64_mib_ends(begin: bytes) -> None:
    server = greeted()
    server.feed(begin)
    texts = t(*["x" * (MAX_TEXT - 8)] * 16)
    for _ in range(64):
        server.feed(texts)
        assert server.next() is None
    server.feed(u(1))
    with pytest.raises(ProtocolError, match="more bytes than"):
        server.next()


def test_a_request_is_read_once_however_small_the_pieces() -> None:
    """What was read is not kept, so nothing can be read again."""
    server = greeted()
    data = u(31, 2000) + t(*[PATH] * 2000) + u(0)
    for at in range(0, len(data) - 1, 10):
        server.feed(data[at : min(at + 10, len(data) - 1)])
        assert server.next() is None
        assert len(server._incoming) < len(t(PATH)) + 10
    server.feed(data[-1:])
    assert server.next() == r.QueryValidPaths((PATH,) * 2000)


def test_parts_of_a_request_are_not_idle() -> None:
    server = greeted()
    data = u(1) + t(PATH)
    for at in range(len(data)):
        assert server.idle == (at == 0)
        server.feed(data[at : at + 1])
        found = server.next()
    assert found == r.IsValidPath(PATH)
    assert server.idle


GREETINGS = [
    ("another protocol", b"HTTP/1.1 400 Bad Request\r\n"),
    ("another major", u(0x6478696F, 0x226)),
    ("a daemon too old", u(0x6478696F, 0x114)),
    ("trust", u(0x6478696F, 0x126, 0) + t("2.34") + u(3)),
    ("no end", u(0x6478696F, 0x126, 0) + t("2.34") + u(1, 0)),
]


@pytest.mark.parametrize("data", [g[1] for g in GREETINGS], ids=[g[0] for g in GREETINGS])
def test_daemons_that_a_client_refuses(data: bytes) -> None:
    client = Client()
    client.feed(data)
    with pytest.raises(ProtocolError):
        client.next()


ANSWERS: list[tuple[str, r.Request, bytes]] = [
    ("a word", r.IsValidPath(PATH), u(0)),
    ("neither yes nor no", r.IsValidPath(PATH), u(LAST, 2)),
    ("a hash too short", r.QueryPathInfo(PATH), u(LAST, 1) + t("", "00")),
    ("a hash in capitals", r.QueryPathInfo(PATH), u(LAST, 1) + t("", "A" * 64)),
    ("too many paths", r.QueryReferrers(PATH), u(LAST, MAX_ITEMS + 1)),
    ("an old hash's realisation", r.QueryRealisation("x!out"), u(LAST, 2)),
    ("too many fields", r.IsValidPath(PATH), u(0x52534C54, 0, 0, 1001)),
    ("something built", r.BuildPaths((PATH,), True), u(LAST, 1) + t(PATH) + u(0) + t("") + u(*[0] * 6, 1)),
]


@pytest.mark.parametrize(("request_", "data"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_answers_that_a_client_refuses(request_: r.Request, data: bytes) -> None:
    _, client = connected()
    client.ask(request_)
    client.feed(data)
    with pytest.raises(ProtocolError):
        client.next()


@pytest.mark.parametrize("shown", ["", "[]", "{}", '{"id":"x"}', '{"id":1,"outPath":"x"}'])
def test_realisations_that_are_none(shown: str) -> None:
    _, client = connected(features=frozenset())
    client.ask(r.QueryRealisation("x!out"))
    client.feed(u(LAST, 1) + t(shown))
    with pytest.raises(ProtocolError, match="realisation"):
        client.next()


def test_a_client_asks_nothing_before_the_end_of_the_handshake() -> None:
    with pytest.raises(ProtocolError):
        Client().ask(r.IsValidPath(PATH))


def test_its_error_ends_a_command_as_a_bad_format_does() -> None:
    assert exit_code(ProtocolError("x")) == 7
