"""What NARs in a binary cache are compressed with, unpacked in bounded memory.

Pure but for the callable that it reads from. Takes hostile input: FormatError for whatever is not whole and
well-formed, never more than a step's output in memory, no window larger than MAX_WINDOW. Several streams in
a row count as one (parallel compressors write such); anything else behind the end is an error.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final, Protocol

import brotli
import zstandard

from cidfs.errors import FormatError

PIECE: Final = 256 << 10
STEP: Final = 1 << 20
MAX_WINDOW: Final = 128 << 20  # zstd's and xz's highest levels stay within
XZ_MEMORY: Final = MAX_WINDOW + (16 << 20)
Read = Callable[[int], bytes]
"""read(n) gives up to n bytes, b"" at the end."""


class _Stream(Protocol):
    """One compressed stream."""

    @property
    def ended(self) -> bool: ...

    @property
    def rest(self) -> bytes:
        """What was fed and lies behind its end."""
        ...

    @property
    def hungry(self) -> bool:
        """Whether it needs more input to go on."""
        ...

    def step(self, data: bytes, limit: int) -> bytes:
        """Take data, and give some output, around limit bytes at most."""
        ...


class _Library:
    """A stream of lzma or bz2, which share an interface."""

    def __init__(self, decompressor: Any) -> None:
        self._inner = decompressor

    @property
    def ended(self) -> bool:
        return bool(self._inner.eof)

    @property
    def rest(self) -> bytes:
        return bytes(self._inner.unused_data)

    @property
    def hungry(self) -> bool:
        return bool(self._inner.needs_input)

    def step(self, data: bytes, limit: int) -> bytes:
        return bytes(self._inner.decompress(data, limit))


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def ended(self) -> bool:
        return self._inner.eof

    @property
    def rest(self) -> bytes:
        return self._inner.unused_data

    @property
    def hungry(self) -> bool:
        return not self._inner.unconsumed_tail

    def step(self, data: bytes, limit: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, limit)


class _Brotli:
    rest = b""  # the library itself refuses what lies behind the end in the same piece

    def __init__(self) -> None:
        self._inner = brotli.Decompressor()

    @property
    def ended(self) -> bool:
        return bool(self._inner.is_finished())

    @property
    def hungry(self) -> bool:
        return bool(self._inner.can_accept_more_data())

    def step(self, data: bytes, limit: int) -> bytes:
        return bytes(self._inner.process(data, output_buffer_limit=limit))


class _Unpacker:
    """Streams of one compression, one behind the other."""

    def __init__(self, name: str, read: Read, new: Callable[[], _Stream], single: bool) -> None:
        self._name, self._read, self._new, self._single = name, read, new, single
        self._stream: _Stream | None = None
        self._begun = False
        self._input = b""
        self._surplus = b""

    def read(self, count: int) -> bytes:
        if not self._surplus:
            self._surplus = self._more(min(count, STEP))
        piece, self._surplus = self._surplus[:count], self._surplus[count:]
        return piece

    def _more(self, limit: int) -> bytes:
        while True:
            starved = False
            if self._stream is None:
                if not self._next_stream():
                    return b""
            elif self._stream.hungry:
                self._input = self._read(PIECE)
                starved = not self._input
            assert self._stream is not None
            data, self._input = self._input, b""
            try:
                piece = self._stream.step(data, limit)
            except _ERRORS as e:
                raise FormatError(f"no {self._name} data, or damaged: {e}") from None
            if self._stream.ended:
                self._input, self._stream = self._stream.rest, None
            if piece:
                return piece  # brotli may have some left although it asks for more input
            if starved and self._stream is not None:
                raise FormatError(f"{self._name} data that ends too early")

    def _next_stream(self) -> bool:
        """Begin the next stream, if there is one."""
        while True:
            if self._begun and self._name == "xz":
                self._input = self._input.lstrip(b"\0")  # its padding
            if not self._input:
                self._input = self._read(PIECE)
                if not self._input and self._begun:
                    return False
                if not self._input:
                    raise FormatError(f"no {self._name} data but nothing at all")
                continue
            if self._begun and self._single:
                raise FormatError(f"bytes behind the end of {self._name} data")
            self._stream, self._begun = self._new(), True
            return True


class _Source:
    """What zstd's reader reads from; counts, for the library takes nothing at all for a whole stream."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.begun = False

    def read(self, count: int) -> bytes:
        piece = self._read(count)
        self.begun = self.begun or bool(piece)
        return piece


def _zstd(read: Read) -> Read:
    source = _Source(read)
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(
        source,  # type: ignore[arg-type]  # typed as a whole file; only read(n) is called
        read_size=PIECE,
        read_across_frames=True,
    )

    def step(count: int) -> bytes:
        # what ends within a frame looks like an end here: the NAR's reader sees that it is none
        try:
            piece = reader.read(min(count, STEP))
        except zstandard.ZstdError as e:
            raise FormatError(f"no zstd data, or damaged: {e}") from None
        if not piece and not source.begun:
            raise FormatError("no zstd data but nothing at all")
        return piece

    return step


_ERRORS: Final = (lzma.LZMAError, zlib.error, brotli.error, OSError, ValueError, EOFError)
_STREAMS: Final[dict[str, tuple[Callable[[], _Stream], bool]]] = {
    "xz": (lambda: _Library(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)), False),
    "bzip2": (lambda: _Library(bz2.BZ2Decompressor()), False),
    "gzip": (_Gzip, False),
    "br": (_Brotli, True),
}
COMPRESSIONS: Final = ("none", "zstd", *_STREAMS)


def unpacked(compression: str, read: Read) -> Read:
    """Return a read for what was compressed; raise FormatError for a compression that is not known.

    The compressed data is read to its end before the read returned says b"".
    """
    if compression == "none":
        return read
    if compression == "zstd":
        return _zstd(read)
    if compression not in _STREAMS:
        raise FormatError(f"compression {compression[:40]!r} is not one of {', '.join(COMPRESSIONS)}")
    new, single = _STREAMS[compression]
    return _Unpacker(compression, read, new, single).read
