"""Unpacking what NARs are compressed with: whole, in small memory, and no damage unnoticed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import cidfs
from cidfs.errors import FormatError
from cidfs.formats.compression import COMPRESSIONS, STEP, unpacked
from tests.formats.support import counter_stream, examples, flipped, pieces_of

PACK: Final[dict[str, Callable[[bytes], bytes]]] = {
    "none": lambda data: data,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "br": lambda data: bytes(brotli.compress(data, quality=3)),
}
every = pytest.mark.parametrize("name", PACK)
real = pytest.mark.parametrize("name", [name for name in PACK if name != "none"])
SAMPLE: Final = counter_stream("sample", 3000) + bytes(5000) + counter_stream("sample", 100)


class Pieces:
    """A read that gives its bytes in pieces of certain lengths."""

    def __init__(self, data: bytes, lengths: Sequence[int] = (1 << 30,)) -> None:
        self._pieces = pieces_of(data, lengths)

    def __call__(self, count: int) -> bytes:
        piece = next(self._pieces, b"")
        assert len(piece) <= count or count >= 1 << 17, "a test that asks for less than a piece"
        return piece


def whole(name: str, data: bytes, lengths: Sequence[int] = (100_000,), count: int = 1 << 20) -> bytes:
    read = unpacked(name, Pieces(data, lengths))
    out = bytearray()
    while piece := read(count):
        assert len(piece) <= count
        out += piece
    assert read(count) == b"", "after the end it stays at the end"
    return bytes(out)


def test_every_compression_that_is_known_is_tested() -> None:
    assert set(PACK) == set(COMPRESSIONS)


@real
@pytest.mark.parametrize("size", [0, 1, 100, STEP - 1, STEP + 1, 2 * STEP + 17])
def test_what_was_packed_comes_out(name: str, size: int) -> None:
    data = counter_stream(name, size // 2) + bytes(size - size // 2)
    assert whole(name, PACK[name](data)) == data


@real
@examples(30)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    st.integers(1, 10_000),
    st.binary(max_size=3000),
)
def test_neither_the_pieces_nor_the_reads_matter(
    name: str, lengths: list[int], count: int, data: bytes
) -> None:
    data = data + bytes(3000) + data
    assert whole(name, PACK[name](data), lengths, count) == data


@pytest.mark.parametrize("name", ["xz", "zstd", "bzip2", "gzip"])
@pytest.mark.parametrize("lengths", [(1 << 17,), (1,), (7, 1000)])
def test_several_streams_are_one(name: str, lengths: Sequence[int]) -> None:
    parts = [b"one", b"", bytes(10_000), b"four"]
    assert whole(name, b"".join(PACK[name](part) for part in parts), lengths) == b"".join(parts)


def test_the_padding_between_streams_of_xz_is_skipped() -> None:
    one = PACK["xz"](b"one")
    assert whole("xz", one + bytes(8) + one + bytes(4), (5,)) == b"oneone"


@real
def test_a_stream_that_ends_too_early_is_never_whole(name: str) -> None:
    packed = PACK[name](SAMPLE)
    for end in range(len(packed)):
        try:
            got = whole(name, packed[:end])
        except FormatError:
            continue
        # zstd alone says nothing; then what came out is too short, or all of it with the check missing
        assert name == "zstd", end
        assert len(got) < len(SAMPLE) or end >= len(packed) - 4
        assert SAMPLE.startswith(got)


@real
def test_bytes_behind_the_end_are_refused(name: str) -> None:
    for junk in (b"\1", b"junk", counter_stream("junk", 300_000)):
        for lengths in ((1 << 17,), (1,)) if len(junk) < 10 else ((1 << 17,),):
            with pytest.raises(FormatError):
                whole(name, PACK[name](SAMPLE) + junk, lengths)


@real
def test_what_is_not_of_that_kind_is_refused(name: str) -> None:
    others = [PACK[other](SAMPLE) for other in PACK if other not in (name, "none")]
    for junk in (b"", b"junk", counter_stream("x", 10_000), *others):
        with pytest.raises(FormatError, match=name):
            whole(name, junk)


@real
def test_flipped_bits_give_a_format_error_at_worst(name: str) -> None:
    packed = PACK[name](SAMPLE[:1500] + bytes(3000))
    refused = 0
    for at in range(0, len(packed), 3):
        try:
            whole(name, flipped(packed, at, 1 << at % 8))
        except FormatError:
            refused += 1
    assert refused, "not one of them noticed"


def test_an_unknown_compression_is_named() -> None:
    for name in ("lzip", "", "x" * 1000, "brotli"):
        with pytest.raises(FormatError, match="compression") as raised:
            unpacked(name, Pieces(b""))
        assert len(str(raised.value)) < 200


def test_windows_that_are_too_large_are_refused() -> None:
    """Memory is taken for what the stream's head says, before anything is unpacked."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    large = bytearray(lzma.compress(b"x", filters=filters))
    with pytest.raises(FormatError):
        whole("xz", bytes(large))
    frame = bytes.fromhex("28b52ffd") + bytes((0x00, 21 << 3)) + bytes.fromhex("010000")  # a window of 2 GiB
    with pytest.raises(FormatError):
        whole("zstd", frame)


def test_an_error_of_the_source_is_passed_on() -> None:
    def broken(count: int) -> bytes:
        raise ConnectionResetError("gone")

    for name in PACK:
        with pytest.raises(ConnectionResetError):
            unpacked(name, broken)(100)


BOMBS = """
import bz2, lzma, resource, sys, zlib
import brotli, zstandard
from cidfs.errors import FormatError
from cidfs.formats.compression import unpacked

MIB = 1 << 20
zeros = bytes(MIB)
makers = {
    "xz": lzma.LZMACompressor(preset=0),
    "zstd": zstandard.ZstdCompressor().compressobj(),
    "bzip2": bz2.BZ2Compressor(1),
    "gzip": zlib.compressobj(1, wbits=31),
}
bombs = {}
for name, maker in makers.items():
    bombs[name] = b"".join(maker.compress(zeros) for _ in range(SIZE)) + maker.flush()
maker = brotli.Compressor(quality=1, lgwin=20)
bombs["br"] = b"".join(maker.process(zeros) for _ in range(SIZE)) + maker.finish()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
try:
    bytearray(64 << 20)
except MemoryError:
    pass
else:
    raise SystemExit("the limit does not hold")
for name, bomb in bombs.items():
    pieces = iter([bomb])
    read = unpacked(name, lambda count: next(pieces, b""))
    size = 0
    while piece := read(MIB):
        assert len(piece) <= MIB
        size += len(piece)
    print(name, size // MIB)
"""


def test_a_bomb_is_unpacked_in_small_memory() -> None:
    tops = {str(Path(cidfs.__file__).parents[1]), str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", f"SIZE = 64\n{BOMBS}"],
        env={"PYTHONPATH": ":".join(tops), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    expected = "".join(f"{name} 64\n" for name in ("xz", "zstd", "bzip2", "gzip", "br"))
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
