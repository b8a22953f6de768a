"""Where a file is cut into chunks, and how a chunk is compressed.

Parameters version 1 are part of a store's metadata and never change within a store. Pure functions; `cut`
releases the GIL while it works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import zstandard

from cidfs.errors import CidfsError, FormatError

try:
    from pyfastcdc.cy import FastCDC
except ImportError as _e:
    # The pure Python form cuts alike at 10 MB/s: refuse it instead of being mysteriously slow.
    raise CidfsError(
        "the compiled form of pyfastcdc is missing: "
        "reinstall it with `pip install --force-reinstall pyfastcdc`"
    ) from _e

AVERAGE = 64 << 10
MINIMUM = 16 << 10
MAXIMUM = 256 << 10
NORMALISATION = 1
SEED = 0
PARAMETERS = f"fastcdc avg={AVERAGE} min={MINIMUM} max={MAXIMUM} norm={NORMALISATION} seed={SEED}"
LEVEL = 3
SMALL = 32 << 10
SMALL_LEVEL = 5

# Level 3 with shorter matches and tables that stay in a core's cache: as fast, and 1 % smaller.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=18,
    hash_log=16,
    chain_log=15,
    search_log=1,
    min_match=4,
    target_length=0,
    strategy=zstandard.STRATEGY_DFAST,
    write_content_size=True,
    write_checksum=False,
)

ENCODING_RAW = 0
ENCODING_ZSTD = 1
MAX_DECODED = 1 << 30
"""The longest decoded data of any frame, in bytes; nothing longer is ever allocated for."""

_cutter = FastCDC(
    avg_size=AVERAGE,
    min_size=MINIMUM,
    max_size=MAXIMUM,
    normalized_chunking=NORMALISATION,
    seed=SEED,
)
_local = threading.local()


def cut(buffer: bytes | bytearray | memoryview) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the chunks of a buffer.

    It holds a whole file, or a file from a chunk's start on.
    """
    if len(buffer) <= MINIMUM:
        if len(buffer):
            yield 0, len(buffer)
        return
    for c in _cutter.cut_buf(buffer):
        yield c.offset, c.length


def cut_stream(readinto: Callable[[memoryview], int], window: int = 4 << 20) -> Iterator[memoryview]:
    """Yield the chunks of a file that is read in windows, as `cut` would cut it whole, without copying.

    readinto fills a part of what it is given and returns how much, 0 at the end. Each chunk is a view of its
    window's buffer, which is never used again.
    """
    rest = b""
    while True:
        buffer = bytearray(len(rest) + window)
        buffer[: len(rest)] = rest
        view, filled = memoryview(buffer), len(rest)
        while filled < len(buffer) and (count := readinto(view[filled:])):
            filled += count
        last = filled < len(buffer)
        kept = filled
        for offset, length in cut(view[:filled]):
            if not last and offset + length == filled:
                kept = offset
                break
            yield view[offset : offset + length]
        if last:
            return
        rest = bytes(view[kept:filled])


class Cutter:
    """Cut a file that arrives in pieces, exactly as `cut` would cut it whole.

    A chunk is settled as soon as a later byte is known, so the last one of what has arrived waits for more.
    Holds at most `window` bytes and one piece.
    """

    def __init__(self, window: int = 4 << 20) -> None:
        self._window = window
        self._kept = bytearray()

    def feed(self, piece: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Yield the chunks that a piece settles."""
        self._kept += piece
        if len(self._kept) >= self._window:
            yield from self._settled()

    def finish(self) -> Iterator[bytes]:
        """Yield the remaining chunks of the file and be ready for the next file."""
        data = bytes(self._kept)
        self._kept = bytearray()
        for offset, length in cut(data):
            yield data[offset : offset + length]

    def _settled(self) -> Iterator[bytes]:
        data = bytes(self._kept)
        done = 0
        for offset, length in cut(data):
            if offset + length == len(data):
                break
            done = offset + length
            yield data[offset:done]
        self._kept = bytearray(memoryview(data)[done:])


def encode(data: bytes | bytearray | memoryview, level: int = LEVEL) -> tuple[int, bytes]:
    """Return encoding and stored form of data: zstd, or raw where that does not help.

    LEVEL is what suits chunks, by their size; any other is zstd's own.
    """
    if level == LEVEL and len(data) <= SMALL:
        level = SMALL_LEVEL
    compressors: dict[int, zstandard.ZstdCompressor] | None = getattr(_local, "compressors", None)
    if compressors is None:
        compressors = _local.compressors = {}
    compressor = compressors.get(level)
    if compressor is None:  # it belongs to one thread
        if level == LEVEL:
            compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        else:
            compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)
        compressors[level] = compressor
    packed = compressor.compress(data)
    if len(packed) < len(data):
        return ENCODING_ZSTD, packed
    return ENCODING_RAW, bytes(data)


def decode(encoding: int, stored: bytes | memoryview, length: int) -> bytes:
    """Return the length bytes that were stored; raise FormatError when they are not just that.

    The declared size inside the zstd frame is compared before anything is allocated: 32 KiB can claim to be 1
    GiB.
    """
    if encoding == ENCODING_RAW:
        if len(stored) != length:
            raise FormatError(f"raw data of {len(stored)} bytes where {length} are declared")
        return bytes(stored)
    if encoding != ENCODING_ZSTD:
        raise FormatError(f"unknown encoding {encoding}")
    if not 0 < length <= MAX_DECODED:  # of no bytes, the library would not look at what follows the frame
        raise FormatError(f"zstd data where {length} bytes are declared")
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        declared = zstandard.get_frame_parameters(stored).content_size
        if declared != length:
            raise FormatError(f"zstd data that unpacks to {declared} bytes where {length} are declared")
        data: bytes = decompressor.decompress(stored, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as e:
        raise FormatError(f"zstd data that cannot be unpacked: {e}") from None
    if len(data) != length:
        raise FormatError(f"zstd data that unpacked to {len(data)} bytes where {length} are declared")
    return data
