"""Chunking: a stream is cut as the whole is, and stored chunks unpack to just what was stored."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import chunking
from cidfs.formats.chunking import (
    AVERAGE,
    ENCODING_RAW,
    ENCODING_ZSTD,
    MAXIMUM,
    MINIMUM,
    Cutter,
    cut,
    cut_stream,
    decode,
    encode,
)
from tests.formats.support import (
    counter_stream,
    examples,
    flipped,
    pieces_of,
    zstd_of_zeros,
    zstd_without_size,
)

RANDOM = counter_stream("chunking", 1 << 20)
MIXED = RANDOM[:300_000] + bytes(700_001) + RANDOM[300_000:500_000] + b"line of text\n" * 30_000
GIB = 1 << 30


def whole_cut(data: bytes) -> list[bytes]:
    return [data[offset : offset + length] for offset, length in cut(data)]


def streamed(cutter: Cutter, data: bytes, lengths: list[int]) -> list[bytes]:
    chunks: list[bytes] = []
    for piece in pieces_of(data, lengths):
        chunks += cutter.feed(piece)
    return chunks + list(cutter.finish())


def test_the_parameters_are_version_1() -> None:
    assert (MINIMUM, AVERAGE, MAXIMUM) == (16384, 65536, 262144)
    assert chunking.PARAMETERS == "fastcdc avg=65536 min=16384 max=262144 norm=1 seed=0"


@pytest.mark.parametrize("data", [RANDOM, MIXED, bytes(3 * MAXIMUM), bytes(3 * MAXIMUM + 1)])
def test_chunks_fill_a_file_within_their_bounds(data: bytes) -> None:
    at = 0
    for offset, length in cut(data):
        assert offset == at
        assert length <= MAXIMUM
        at += length
        assert length >= MINIMUM or at == len(data)
    assert at == len(data)


@pytest.mark.parametrize("size", [0, 1, MINIMUM - 1, MINIMUM])
def test_a_short_file_is_one_chunk_or_none(size: int) -> None:
    assert list(cut(bytes(size))) == ([(0, size)] if size else [])


def test_any_kind_of_buffer_is_cut_alike() -> None:
    assert list(cut(bytearray(RANDOM))) == list(cut(memoryview(RANDOM))) == list(cut(RANDOM))


def test_a_file_is_cut_alike_from_any_chunks_start_on() -> None:
    places = list(cut(MIXED))
    for start, _ in places[1:]:
        assert [(start + o, n) for o, n in cut(memoryview(MIXED)[start:])] == [
            p for p in places if p[0] >= start
        ]


def test_a_change_moves_only_the_chunks_around_it() -> None:
    before, after = whole_cut(RANDOM), whole_cut(RANDOM[:500_000] + b"inserted" + RANDOM[500_000:])
    assert len(set(before) - set(after)) <= 3


@examples(25)
@given(
    st.sampled_from([RANDOM, MIXED, bytes(2 * MAXIMUM), RANDOM[:MAXIMUM], RANDOM[:20_000], b"x", b""]),
    st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
    st.sampled_from([1, MINIMUM, MAXIMUM - 1, MAXIMUM, MAXIMUM + 1, 1 << 20, 4 << 20]),
)
def test_a_stream_is_cut_as_the_whole_is(data: bytes, lengths: list[int], window: int) -> None:
    lengths = [max(n, len(data) // 200) for n in lengths]
    assert streamed(Cutter(window), data, lengths) == whole_cut(data)


def test_a_stream_of_single_bytes_is_cut_as_the_whole_is() -> None:
    data = RANDOM[:150_000]
    assert streamed(Cutter(100_000), data, [1]) == whole_cut(data)


def reader_of(data: bytes, lengths: list[int]) -> Callable[[memoryview], int]:
    """Return a readinto that gives at most these lengths at a time, and must not be asked after the end."""
    rest = iter(pieces_of(data, lengths))
    piece, ended = b"", False

    def readinto(place: memoryview) -> int:
        nonlocal piece, ended
        assert not ended
        assert len(place)
        piece = piece or next(rest, b"")
        count = min(len(piece), len(place))
        place[:count] = piece[:count]
        piece = piece[count:]
        ended = not count
        return count

    return readinto


@examples(25)
@given(
    st.sampled_from([RANDOM, MIXED, bytes(2 * MAXIMUM), RANDOM[:MAXIMUM], RANDOM[:20_000], b"x", b""]),
    st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
    st.sampled_from([MINIMUM, MAXIMUM - 1, MAXIMUM, MAXIMUM + 1, 1 << 20, 4 << 20]),
)
def test_a_file_that_is_read_in_windows_is_cut_as_the_whole_is(
    data: bytes, lengths: list[int], window: int
) -> None:
    lengths = [max(n, len(data) // 200) for n in lengths]
    views = list(cut_stream(reader_of(data, lengths), window))  # all are kept, so none may be overwritten
    assert [bytes(view) for view in views] == whole_cut(data)


@pytest.mark.parametrize("window", [1, 5000])
def test_a_file_is_cut_alike_through_a_narrow_window(window: int) -> None:
    data = RANDOM[: 20_000 * min(window, 10)]
    assert [bytes(v) for v in cut_stream(reader_of(data, [999]), window)] == whole_cut(data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_cutter_takes_any_kind_of_buffer(kind: type) -> None:
    cutter = Cutter(1)
    assert [*cutter.feed(kind(RANDOM)), *cutter.finish()] == whole_cut(RANDOM)


def test_a_cutter_is_ready_for_the_next_file() -> None:
    cutter = Cutter(window=1)
    for data in (RANDOM, b"", MIXED, b"short"):
        assert streamed(cutter, data, [100_000]) == whole_cut(data)


def test_a_cutter_holds_its_window_and_a_piece() -> None:
    cutter, piece = Cutter(window=1 << 20), bytes(1 << 20)
    tracemalloc.start()
    try:
        for _ in range(64):
            for _chunk in cutter.feed(piece):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@examples(100)
@given(st.binary(max_size=2000), st.integers(1, 30), st.sampled_from([1, 3, 19]))
def test_what_was_encoded_decodes(data: bytes, times: int, level: int) -> None:
    data *= times
    encoding, stored = encode(data, level)
    assert encoding in (ENCODING_RAW, ENCODING_ZSTD)
    assert len(stored) < len(data) if encoding else stored == data
    assert decode(encoding, stored, len(data)) == data
    assert decode(encoding, memoryview(stored), len(data)) == data
    assert encode(memoryview(data), level) == (encoding, stored)


def test_data_that_zstd_does_not_shorten_is_stored_raw() -> None:
    assert encode(RANDOM[:1000]) == (ENCODING_RAW, RANDOM[:1000])
    assert encode(b"") == (ENCODING_RAW, b"")


@pytest.mark.parametrize("length", [0, 1, 999, 1001, 2000, GIB, 1 << 63, -1])
def test_data_of_another_length_than_declared_is_refused(length: int) -> None:
    _, packed = encode(bytes(1000))
    for encoding, stored in ((ENCODING_RAW, bytes(1000)), (ENCODING_ZSTD, packed)):
        with pytest.raises(FormatError):
            decode(encoding, stored, length)


@pytest.mark.parametrize("encoding", [2, 3, 255, -1])
def test_an_unknown_encoding_is_refused(encoding: int) -> None:
    with pytest.raises(FormatError, match="unknown encoding"):
        decode(encoding, b"", 0)


@pytest.mark.parametrize(
    ("stored", "length"),
    [
        (b"", 10),
        (zstd_without_size(b"0123456789"), 10),
        (encode(bytes(1000))[1] + b"\0", 1000),  # bytes after the frame
        (encode(bytes(1000))[1] * 2, 1000),  # a second frame
        (encode(bytes(1000))[1] * 2, 2000),
        (encode(bytes(1000))[1][:-1], 1000),
        (b"\x50\x2a\x4d\x18\x0a\0\0\0" + b"0123456789", 10),  # a skippable frame
        (b"\x50\x2a\x4d\x18\0\0\0\0" + encode(bytes(1000))[1], 1000),
        (zstd_of_zeros(0, 0), 0),  # not what the encoder makes of nothing
        (zstd_of_zeros(0, 0) + b"anything", 0),
    ],
)
def test_zstd_data_is_exactly_one_frame_with_its_size(stored: bytes, length: int) -> None:
    with pytest.raises(FormatError, match="zstd"):
        decode(ENCODING_ZSTD, stored, length)


def test_a_hand_made_frame_that_tells_the_truth_unpacks() -> None:
    assert decode(ENCODING_ZSTD, zstd_of_zeros(300_000, 300_000), 300_000) == bytes(300_000)


@pytest.mark.parametrize(
    ("declared", "length"),
    [
        (1024, 1024),  # the header lies, as the one who declares does
        (None, 1024),
        (GIB, 1024),
        (None, GIB),
        (1 << 62, 1 << 62),
        ((1 << 64) - 1, (1 << 64) - 1),
        ((1 << 64) - 2, (1 << 64) - 2),
    ],
)
def test_a_bomb_is_refused_before_memory_is_taken(declared: int | None, length: int) -> None:
    bomb = zstd_of_zeros(GIB, declared)
    assert len(bomb) < 40_000
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode(ENCODING_ZSTD, bomb, length)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_any_flipped_bit_of_a_stored_chunk_is_an_error_or_as_long_as_declared() -> None:
    _, stored = encode(b"some text, some more text, some text again " * 4)
    for at in range(len(stored)):
        for bit in range(8):
            with contextlib.suppress(FormatError):
                assert len(decode(ENCODING_ZSTD, flipped(stored, at, 1 << bit), 172)) == 172


@examples(300)
@given(st.binary(max_size=100), st.integers(0, 300), st.booleans())
def test_any_bytes_unpack_to_the_declared_length_or_give_a_format_error(
    junk: bytes, length: int, with_magic: bool
) -> None:
    stored = b"\x28\xb5\x2f\xfd" + junk if with_magic else junk
    for encoding in (ENCODING_RAW, ENCODING_ZSTD):
        with contextlib.suppress(FormatError):
            assert len(decode(encoding, stored, length)) == length
