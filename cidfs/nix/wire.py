"""The primitives of Nix's worker protocol: integers, texts and lists of texts, written and read.

Integers are u64 little-endian. A text is its length, its bytes and zeros up to a multiple of 8; a list is its
count and its items (`libutil/serialise.cc`). Owns the bytes that came and were not yet parsed, and the caps.
No I/O. Takes hostile input: a length is held against its cap before its bytes are waited for, nothing is
allocated for what has not come, and each byte is looked at once, in whatever pieces it comes. One `Incoming`
belongs to one connection and one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Final, TypeAlias, TypeVar

from cidfs.errors import ProtocolError

MAX_TEXT: Final = 64 << 10
MAX_ITEMS: Final = 1_000_000
MAX_REQUEST: Final = 64 << 20
MAX_REPLY: Final = 256 << 20  # a list of a million long paths, and some
PIECE_ITEMS: Final = 1000
U64: Final = struct.Struct("<Q")
PAIR: Final = struct.Struct("<QQ")
PADDING: Final = tuple(bytes(-length % 8) for length in range(8))
"""The zeros behind a text, by its length modulo 8."""

_Result = TypeVar("_Result")
Steps: TypeAlias = Generator[None, None, _Result]
"""A parser that can stop: yields when it needs bytes that have not come, returns its value."""


def number(value: int) -> bytes:
    """Return an integer as it is sent."""
    return U64.pack(value)


def text(value: str) -> bytes:
    """Return a text as it is sent; what is not UTF-8 was escaped on its way in and goes out as it came."""
    raw = value.encode("utf-8", "surrogateescape")
    return U64.pack(len(raw)) + raw + PADDING[len(raw) & 7]


def texts(values: Iterable[str]) -> bytes:
    """Return a list of texts as it is sent."""
    return b"".join(text_pieces(values if isinstance(values, Collection) else list(values)))


def text_pieces(values: Collection[str]) -> Iterator[bytes]:
    """Yield a list of texts as it is sent, in pieces of PIECE_ITEMS texts."""
    pending = [number(len(values))]
    for value in values:
        pending.append(text(value))
        if len(pending) >= PIECE_ITEMS:
            yield b"".join(pending)
            pending.clear()
    yield b"".join(pending)


class Incoming:
    """Bytes that came; `data` from `at` on is not yet parsed."""

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        self.at = 0
        self._left = 0

    def __len__(self) -> int:
        return len(self.data) - self.at

    def feed(self, data: bytes) -> None:
        """Take bytes that came."""
        if self.at == len(self.data):
            self.data, self.at = data, 0
            return
        if isinstance(self.data, bytes):
            self.data = bytearray(memoryview(self.data)[self.at :])
        else:
            del self.data[: self.at]
        self.at = 0
        self.data += data

    def take(self) -> bytes:
        """Return all that came and was not parsed."""
        taken = bytes(memoryview(self.data)[self.at :])
        self.data, self.at = b"", 0
        return taken

    def begin(self, cap: int) -> None:
        """Begin a message that may have so many bytes of texts."""
        self._left = cap

    def number(self) -> Steps[int]:
        """Read an integer."""
        while len(self.data) - self.at < 8:
            yield
        value: int = U64.unpack_from(self.data, self.at)[0]
        self.at += 8
        return value

    def boolean(self, what: str) -> Steps[bool]:
        """Read an integer that is 0 or 1."""
        value = yield from self.number()
        if value > 1:
            raise ProtocolError(f"{what} is {value}, and neither 0 nor 1")
        return value == 1

    def raw(self) -> Steps[bytes]:
        """Read a text without decoding it."""
        length = yield from self.number()
        if length > MAX_TEXT:
            raise ProtocolError(f"a text of {length} bytes; at most {MAX_TEXT} are taken")
        stop = length + (-length & 7)
        self._spend(8 + stop)
        while len(self.data) - self.at < stop:
            yield
        whole = bytes(memoryview(self.data)[self.at : self.at + stop])
        if whole[length:] != PADDING[length & 7]:
            raise ProtocolError("a text is not padded with zeros")
        self.at += stop
        return whole[:length]

    def text(self) -> Steps[str]:
        """Read a text."""
        raw = yield from self.raw()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ProtocolError(f"{raw[:80]!r} is not UTF-8") from None

    def count(self, what: str, cap: int) -> Steps[int]:
        """Read how many items follow."""
        count = yield from self.number()
        if count > cap:
            raise ProtocolError(f"{count} {what}; at most {cap} are taken")
        return count

    def texts(self, what: str, cap: int = MAX_ITEMS) -> Steps[tuple[str, ...]]:
        """Read a list of texts."""
        count = yield from self.count(what, cap)
        found: list[str] = []
        while len(found) < count:
            self._whole_texts(found, count)
            if len(found) < count:
                found.append((yield from self.text()))
        return tuple(found)

    def _whole_texts(self, found: list[str], count: int) -> None:
        """Take the texts that are here whole and in order; the first that is not is for `text` to judge."""
        data, at, end = self.data, self.at, len(self.data)
        unpack, padding = U64.unpack_from, PADDING
        while len(found) < count and at + 8 <= end:
            length = unpack(data, at)[0]
            start = at + 8
            stop = start + length
            after = stop + (-length & 7)
            if length > MAX_TEXT or after > end or data[stop:after] != padding[length & 7]:
                break
            try:
                found.append(data[start:stop].decode())
            except UnicodeDecodeError:
                break
            at = after
        self._spend(at - self.at)
        self.at = at

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ProtocolError("more bytes than one request or reply may have")
