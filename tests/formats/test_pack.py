"""Packs: the footer says what a scan says, and a damaged one is noticed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import frames
from cidfs.formats.chunking import MAXIMUM
from cidfs.formats.digest import checksum, digest_of
from cidfs.formats.pack import HEADER, TRAILER_SIZE, Row, build_footer, read_footer, read_trailer, row_of
from tests.formats.support import by_reason, examples, flipped

contents = st.lists(
    st.tuples(
        st.sampled_from([frames.KIND_CHUNK, frames.KIND_MANIFEST, 99]),
        st.one_of(st.binary(max_size=100), st.binary(min_size=1, max_size=4).map(lambda b: b * 50)),
    ),
    max_size=8,
)


def packed(content: list[tuple[int, bytes]]) -> tuple[bytes, list[Row], int]:
    """Return a sealed pack, its rows and where its footer lies."""
    body, rows = HEADER, []
    for kind, data in content:
        frame = frames.build_from(kind, data)
        rows.append(row_of(len(body), frames.read_header(frame)))
        body += frame
    return body + build_footer(rows, len(body)), rows, len(body)


def opened(data: bytes) -> list[Row] | None:
    """Return the rows of a pack as a reader gets them: trailer, then footer."""
    place = read_trailer(data[-TRAILER_SIZE:], len(data))
    if place is None:
        return None
    offset, size = place
    assert 0 <= offset <= offset + size <= len(data)
    return read_footer(data[offset : offset + size], offset)


SAMPLE, SAMPLE_ROWS, SAMPLE_FOOTER = packed([(1, b"first"), (2, b"second"), (99, b"third" * 30)])


def footer_of(rows: list[tuple[bytes, int, int, int, int, int, int]], count: int | None = None) -> bytes:
    """Return a footer frame with any rows and any count."""
    data = b"".join(struct.pack("<32sQIIBBH", *row) for row in rows)
    number = struct.pack("<I", len(rows) if count is None else count)
    return frames.build_from(frames.KIND_FOOTER, number + data, compress=False)


@examples(100)
@given(contents)
def test_the_footer_says_what_was_packed_and_what_a_scan_says(content: list[tuple[int, bytes]]) -> None:
    data, rows, footer = packed(content)
    assert opened(data) == rows
    known = [row for row in rows if row.kind != 99]
    found = [f for f in frames.scan(data, len(HEADER)) if isinstance(f, frames.Found)]
    assert [row_of(f.offset, f.header) for f in found if f.header.kind != frames.KIND_FOOTER] == known
    assert found[-1].offset == footer
    for row, (kind, chunk) in zip(rows, content, strict=True):
        header = frames.read_header(data, row.offset)
        assert row.end == row.offset + header.size
        assert (row.kind, row.digest) == (kind, digest_of(chunk))
        assert frames.read_data(data, header, row.offset) == chunk


@examples(30)
@given(contents)
def test_a_pack_that_is_not_sealed_has_no_trailer(content: list[tuple[int, bytes]]) -> None:
    data, _, footer = packed(content)
    for end in (0, 15, 16, footer, len(data) - 1, len(data) - 32):
        if end < footer or end == len(data) - 1:
            assert read_trailer(data[:end][-TRAILER_SIZE:], end) is None


def test_every_truncation_is_unsealed_or_a_format_error() -> None:
    for end in range(len(SAMPLE)):
        assert read_trailer(SAMPLE[:end][-TRAILER_SIZE:], end) is None
        with pytest.raises(FormatError):
            read_footer(SAMPLE[SAMPLE_FOOTER : min(end, len(SAMPLE) - TRAILER_SIZE - 1)], SAMPLE_FOOTER)


def test_every_flipped_bit_of_trailer_and_footer_is_noticed() -> None:
    for at in range(SAMPLE_FOOTER, len(SAMPLE)):
        for bit in range(8):
            data = flipped(SAMPLE, at, 1 << bit)
            if at >= len(SAMPLE) - 8:
                assert opened(data) is None
            else:
                with pytest.raises(FormatError):
                    opened(data)


@examples(200)
@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 40))
def test_a_trailer_points_inside_its_pack_or_is_refused(offset: int, length: int, size: int) -> None:
    place = struct.pack("<QQ", offset, length)
    with pytest.raises(FormatError, match="points outside"):
        read_trailer(place + checksum(place) + b"cidfsEnd", size)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 168), (15, 153), (16, 153), (16, 151), (169, (1 << 64) - 1)]
)
def test_a_trailer_that_points_a_little_outside_is_refused(offset: int, length: int) -> None:
    place = struct.pack("<QQ", offset, length)
    with pytest.raises(FormatError, match="points outside"):
        read_trailer(place + checksum(place) + b"cidfsEnd", 200)


@pytest.mark.parametrize(
    ("footer", "reason"),
    [
        (frames.build_from(frames.KIND_CHUNK, struct.pack("<I", 0), compress=False), "no footer"),
        (footer_of([]) + b"\0", "no footer"),
        (frames.build_from(frames.KIND_FOOTER, bytes(4000)), "no footer"),  # compressed
        (frames.build_from(frames.KIND_FOOTER, b"", compress=False), "does not fit its count"),
        (frames.build_from(frames.KIND_FOOTER, b"\0\0\0", compress=False), "does not fit its count"),
        (footer_of([], 1), "does not fit its count"),
        (footer_of([], (1 << 32) - 1), "does not fit its count"),
        (footer_of([(bytes(32), 16, 5, 5, 1, 0, 0)], 0), "does not fit its count"),
        (footer_of([(bytes(32), 15, 5, 5, 1, 0, 0)]), "overlaps or lies outside"),
        (footer_of([(bytes(32), 940, 5, 5, 1, 0, 0)]), "overlaps or lies outside"),
        (footer_of([(bytes(32), 1 << 63, 5, 5, 1, 0, 0)]), "overlaps or lies outside"),
        (footer_of([(bytes(32), 16, (1 << 32) - 1, 5, 1, 0, 0)]), "overlaps or lies outside"),
        (footer_of([(bytes(32), 16, 5, 5, 1, 0, 0)] * 2), "overlaps or lies outside"),
        (footer_of([(bytes(32), 16, 5, 5, 1, 0, 0), (bytes(32), 76, 5, 5, 1, 0, 0)]), "overlaps"),
        (footer_of([(bytes(32), 77, 5, 5, 1, 0, 0), (bytes(32), 16, 5, 5, 1, 0, 0)]), "overlaps"),
        (footer_of([(bytes(32), 16, 5, 5, 1, 0, 1)]), "reserved bytes"),
        (footer_of([(bytes(32), 16, 6, 5, 1, 0, 0)]), "impossible lengths"),
        (footer_of([(bytes(32), 16, 5, MAXIMUM + 1, 1, 1, 0)]), "impossible lengths"),
        (footer_of([(bytes(32), 16, 5, (1 << 32) - 1, 99, 1, 0)]), "impossible lengths"),
    ],
    ids=by_reason,
)
def test_a_wrong_footer_is_refused_with_its_reason(footer: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        read_footer(footer, 1000)


def test_rows_that_just_fit_are_read() -> None:
    rows = [(bytes(32), 16, 5, 5, 1, 0, 0), (bytes(32), 77, 5, 5, 1, 0, 0)]
    assert [row.end for row in read_footer(footer_of(rows), 138)] == [77, 138]
    with pytest.raises(FormatError):
        read_footer(footer_of(rows), 137)
