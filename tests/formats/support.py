"""What the tests of this floor share.

Settings, deterministic data, zstd frames that lie, feeding in pieces.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard
from hypothesis import HealthCheck, settings

VECTORS = Path(__file__).with_name("vectors")


def examples(count: int) -> settings:
    """Return settings for a property: the same examples on every machine, however slow it is."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def by_reason(value: object) -> str:
    """Name a case after the reason that it is refused for."""
    return value if isinstance(value, str) else ""


def counter_stream(seed: str, size: int) -> bytes:
    """Return size pseudo-random bytes: SHA-256 of the seed and a counter, block after block."""
    blocks = (hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(-(-size // 32)))
    return b"".join(blocks)[:size]


def hex_lines(data: bytes) -> bytes:
    """Return data as lines of 32 bytes in hexadecimal."""
    return b"".join(data[i : i + 32].hex().encode() + b"\n" for i in range(0, len(data), 32))


def read_hex(name: str) -> bytes:
    """Return the bytes of a committed vector that is kept as lines of hexadecimal."""
    return bytes.fromhex((VECTORS / name).read_text())


def pieces_of(data: bytes, lengths: Sequence[int]) -> Iterator[bytes]:
    """Yield data in pieces of these lengths, over and over."""
    at = 0
    for length in itertools.cycle(lengths):
        if at >= len(data):
            return
        yield data[at : at + length]
        at += length


def flipped(data: bytes, at: int, mask: int) -> bytes:
    """Return data with the bits of a mask changed in one byte."""
    return data[:at] + bytes((data[at] ^ mask,)) + data[at + 1 :]


def zstd_of_zeros(size: int, declared: int | None) -> bytes:
    """Return a small zstd frame that unpacks to size zero bytes and declares another size, or none.

    Written by hand, a run-length block for each 128 KiB (RFC 8878, section 3.1.1).
    """
    head = struct.pack("<I", 0xFD2FB528)
    window = bytes((0x58,))  # 2 MiB
    if declared is None:
        head += b"\x00" + window
    else:
        head += b"\xc0" + window + struct.pack("<Q", declared)
    blocks = []
    left = size
    while left > 0:
        here = min(left, 128 << 10)
        left -= here
        blocks.append((here << 3 | 1 << 1 | (left == 0)).to_bytes(3, "little") + b"\0")
    return head + b"".join(blocks)


def zstd_without_size(data: bytes) -> bytes:
    """Return a zstd frame of data as a streaming compressor writes it: without the content's size."""
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    return packer.compress(data) + packer.flush()
