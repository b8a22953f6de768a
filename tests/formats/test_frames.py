"""Frames: whatever lies between them, whole ones are found, and damage costs no more than its own frame."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import frames
from cidfs.formats.chunking import ENCODING_RAW, ENCODING_ZSTD, MAX_DECODED, MAXIMUM, encode
from cidfs.formats.digest import checksum, digest_of
from cidfs.formats.frames import (
    HEADER_SIZE,
    KIND_CHUNK,
    KIND_FOOTER,
    KIND_JOURNAL,
    KIND_MANIFEST,
    MAGIC,
    Found,
    Gap,
    Header,
    build,
    build_from,
    read_data,
    read_header,
    scan,
)
from tests.formats.support import by_reason, counter_stream, examples, flipped, zstd_of_zeros

KNOWN = (KIND_CHUNK, KIND_MANIFEST, KIND_FOOTER, KIND_JOURNAL)
UNKNOWN = 77


def forged(kind: int, encoding: int, zero: int, stored: int, length: int, digest: bytes = bytes(32)) -> bytes:
    """Return a header with a right checksum around any numbers."""
    head = struct.pack("<4sBBHII32s", MAGIC, kind, encoding, zero, stored, length, digest)
    return head + checksum(head)


@dataclass(frozen=True)
class Part:
    """A stretch of a file: a frame's bytes before damage, and what is there of them; or garbage."""

    frame: bytes
    there: bytes

    @property
    def whole(self) -> bool:
        return bool(self.frame) and self.there == self.frame


payloads = st.one_of(
    st.binary(max_size=80),
    st.binary(min_size=1, max_size=10).map(lambda b: b * 40),
    st.just(MAGIC),
    st.just(MAGIC * 20),
)
known_frames = st.builds(
    lambda kind, data, compress: build_from(kind, data, compress=compress),
    st.sampled_from(KNOWN),
    payloads,
    st.booleans(),
)


def parts() -> st.SearchStrategy[Part]:
    garbage = st.one_of(
        st.binary(max_size=60),
        st.just(MAGIC),
        st.just(MAGIC[:3]),
        st.binary(max_size=60).map(lambda b: MAGIC + b),
        st.just(bytes(HEADER_SIZE)),
    )

    def torn(frame: bytes, keep: int) -> Part:
        return Part(frame, frame[: keep % len(frame)])

    def damaged(frame: bytes, at: int, mask: int) -> Part:
        return Part(frame, flipped(frame, at % len(frame), mask))

    return st.one_of(
        known_frames.map(lambda f: Part(f, f)),
        garbage.map(lambda g: Part(b"", g)),
        st.builds(torn, known_frames, st.integers(0, 10_000)),
        st.builds(damaged, known_frames, st.integers(0, 10_000), st.integers(1, 255)),
    )


@examples(100)
@given(st.sampled_from((*KNOWN, UNKNOWN)), payloads, st.booleans(), st.binary(max_size=70))
def test_a_frame_is_read_back_at_any_offset(kind: int, data: bytes, compress: bool, before: bytes) -> None:
    frame = build_from(kind, data, compress=compress)
    around = before + frame + b"after"
    header = read_header(around, len(before))
    assert (header.kind, header.length, header.digest) == (kind, len(data), digest_of(data))
    assert header.size == len(frame)
    assert read_data(around, header, len(before)) == data
    view = memoryview(around)
    assert read_data(view, read_header(view, len(before)), len(before)) == data


@examples(400)
@given(st.lists(parts(), max_size=8))
def test_every_whole_frame_is_found_between_garbage_torn_and_flipped_ones(stretches: list[Part]) -> None:
    data = b"".join(part.there for part in stretches)
    at, whole, hurt = 0, {}, {}
    for part in stretches:
        if part.whole:
            whole[at] = part.frame
        elif part.frame:
            hurt[at] = part.frame
            assume(data[at : at + len(part.frame)] != part.frame)  # what follows completes a torn one
        at += len(part.there)
    told = list(scan(data))
    found = {f.offset: f for f in told if isinstance(f, Found)}
    for offset, frame in whole.items():
        assert found[offset].header == read_header(frame)
        assert found[offset].data == read_data(frame, read_header(frame))
    for offset in found.keys() - whole.keys():
        # Some bits inside zstd data mean nothing; then the data is right all the same.
        assert found[offset].data == read_data(hurt[offset], read_header(hurt[offset]))
    place = 0
    for item in told:  # frames and gaps fill the file in order, and no gap follows another
        assert item.offset == place
        place = item.end if isinstance(item, Gap) else item.offset + item.header.size
        assert place > item.offset
    assert place == len(data)
    assert not any(isinstance(a, Gap) and isinstance(b, Gap) for a, b in itertools.pairwise(told))
    assert list(scan(memoryview(data))) == told


@examples(100)
@given(st.lists(known_frames, min_size=1, max_size=6), st.data())
def test_a_file_cut_anywhere_loses_only_its_last_frame(row: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(row)
    end = data.draw(st.integers(0, len(whole)))
    found = [f for f in scan(whole[:end]) if isinstance(f, Found)]
    at, expected = 0, []
    for frame in row:
        if at + len(frame) <= end:
            expected.append(at)
        at += len(frame)
    assert [f.offset for f in found] == expected


def test_every_flipped_bit_of_a_raw_frame_costs_that_frame_alone() -> None:
    before, middle, after = (
        build_from(KIND_CHUNK, d, compress=False) for d in (b"before", b"in it", b"after")
    )
    for at in range(len(middle)):
        for bit in range(8):
            told = list(scan(before + flipped(middle, at, 1 << bit) + after))
            assert [f.data for f in told if isinstance(f, Found)] == [b"before", b"after"]
            assert [(g.offset, g.end) for g in told if isinstance(g, Gap)] == [
                (len(before), len(before) + len(middle))
            ]


def test_a_scan_starts_where_it_is_told() -> None:
    frame = build_from(KIND_CHUNK, b"data")
    told = list(scan(b"0123456789" + frame + frame, 10))
    assert [f.offset for f in told] == [10, 10 + len(frame)]
    assert list(scan(frame, len(frame))) == []
    assert list(scan(b"")) == []
    assert list(scan(frame, 1)) == [Gap(1, len(frame))]


def test_a_frame_inside_a_whole_frames_data_is_not_found() -> None:
    inner = build_from(KIND_CHUNK, b"inner", compress=False)
    outer = build_from(KIND_CHUNK, b"a pack in a chunk: " + inner, compress=False)
    (found,) = scan(outer)
    assert isinstance(found, Found)
    assert found.data.endswith(inner)


def test_whole_frames_of_an_unknown_kind_are_skipped_silently() -> None:
    chunk, unknown = build_from(KIND_CHUNK, b"chunk"), build_from(UNKNOWN, b"what a newer cidfs wrote")
    told = list(scan(chunk + unknown + chunk))
    assert [f.offset for f in told] == [0, len(chunk) + len(unknown)]
    assert all(isinstance(f, Found) for f in told)


@pytest.mark.parametrize("size", [100, 1000, 100_000])
def test_a_torn_frame_of_an_unknown_kind_hides_none_that_follow(size: int) -> None:
    chunk = build_from(KIND_CHUNK, b"chunk")
    torn = build_from(UNKNOWN, counter_stream("torn", size), compress=False)[: HEADER_SIZE + 20]
    told = list(scan(torn + chunk * 2000))
    assert told[0] == Gap(0, len(torn))
    assert len(told) == 2001


def test_a_damaged_frame_of_an_unknown_kind_is_a_gap() -> None:
    unknown = build_from(UNKNOWN, b"what a newer cidfs wrote", compress=False)
    assert list(scan(flipped(unknown, len(unknown) - 1, 1))) == [Gap(0, len(unknown))]


def test_an_unknown_encoding_is_an_error_for_that_frame_alone() -> None:
    chunk = build_from(KIND_CHUNK, b"chunk")
    delta = build(KIND_CHUNK, 2, b"delta", 100, digest_of(b"based"))
    told = list(scan(chunk + delta + chunk))
    assert [type(item) for item in told] == [Found, Gap, Found]
    with pytest.raises(FormatError, match="offset 0: unknown encoding 2"):
        read_data(delta, read_header(delta))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "0 bytes where a header"),
        (forged(1, 0, 0, 0, 0)[:-1], "55 bytes where a header"),
        (bytes(HEADER_SIZE), "no magic"),
        (flipped(forged(1, 0, 0, 0, 0), 20, 1), "header checksum"),
        (flipped(forged(1, 0, 0, 0, 0), 55, 128), "header checksum"),
        (forged(1, 0, 1, 0, 0), "impossible lengths or reserved"),
        (forged(1, 0, 0x8000, 0, 0), "impossible lengths or reserved"),
        (forged(1, 0, 0, 1, 0), "impossible lengths"),
        (forged(1, 1, 0, 10, 9), "impossible lengths"),
        (forged(KIND_CHUNK, 1, 0, 10, MAXIMUM + 1), "impossible lengths"),
        (forged(KIND_MANIFEST, 1, 0, 10, (256 << 20) + 1), "impossible lengths"),
        (forged(KIND_FOOTER, 1, 0, 10, (256 << 20) + 1), "impossible lengths"),
        (forged(KIND_JOURNAL, 1, 0, 10, MAX_DECODED + 1), "impossible lengths"),
        (forged(UNKNOWN, 1, 0, 10, MAX_DECODED + 1), "impossible lengths"),
        (forged(UNKNOWN, 1, 0, (1 << 32) - 1, (1 << 32) - 1), "impossible lengths"),
    ],
    ids=by_reason,
)
def test_a_wrong_header_is_refused_with_its_reason(header: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=f"{reason}.*at offset|{reason}.*offset 3"):
        read_header(b"123" + header, 3)
    assert list(scan(header)) == ([Gap(0, len(header))] if header else [])


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (forged(1, 0, 0, 5, 5, digest_of(b"12345")) + b"1234", "cut short"),
        (forged(1, 0, 0, 5, 5, digest_of(b"12345")) + b"12346", "does not have its digest"),
        (forged(1, 0, 0, 4, 5, digest_of(b"12345")) + b"1234", "raw data of 4 bytes where 5"),
        (forged(1, 1, 0, 5, 9, digest_of(b"12345")) + b"12345", "zstd"),
        (forged(1, 7, 0, 5, 5, digest_of(b"12345")) + b"12345", "unknown encoding 7"),
    ],
    ids=by_reason,
)
def test_wrong_data_is_refused_with_its_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        read_data(b"x" + frame, read_header(frame), 1)
    assert "at offset 1" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "stored", "length"),
    [(KIND_CHUNK, b"12345", 4), (KIND_CHUNK, b"1", MAXIMUM + 1), (UNKNOWN, b"", MAX_DECODED + 1)],
)
def test_a_frame_that_no_reader_would_accept_is_not_built(kind: int, stored: bytes, length: int) -> None:
    with pytest.raises(FormatError, match="do not fit"):
        build(kind, ENCODING_ZSTD, stored, length, bytes(32))


def test_the_largest_chunk_fits_a_frame() -> None:
    data = counter_stream("largest", MAXIMUM)
    assert encode(data)[0] == ENCODING_RAW
    frame = build_from(KIND_CHUNK, data)
    assert read_data(frame, read_header(frame)) == data
    with pytest.raises(FormatError):
        build_from(KIND_CHUNK, data + b"1")


def test_a_bomb_in_a_chunk_is_a_gap() -> None:
    chunk = build_from(KIND_CHUNK, b"chunk")
    bomb = zstd_of_zeros(1 << 30, MAXIMUM)
    told = list(scan(chunk + build(KIND_CHUNK, ENCODING_ZSTD, bomb, MAXIMUM, digest_of(b"")) + chunk))
    assert [type(item) for item in told] == [Found, Gap, Found]


@examples(200)
@given(st.binary(max_size=200), st.integers(0, 250))
def test_any_bytes_are_gaps_or_a_format_error(junk: bytes, offset: int) -> None:
    for data in (junk, MAGIC + junk):
        assert list(scan(data)) == ([Gap(0, len(data))] if data else [])
        with pytest.raises(FormatError):
            read_header(data, offset)
        with pytest.raises(FormatError):
            read_data(data, Header(KIND_CHUNK, ENCODING_RAW, len(junk) + 1, len(junk) + 1, bytes(32)), offset)


def test_heads_of_long_frames_that_are_none_do_not_make_a_scan_endless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each claims most of what follows: to check them all would be quadratic."""
    heads = forged(KIND_MANIFEST, ENCODING_RAW, 0, 1 << 20, 1 << 20) * (1 << 16)
    chunk = build_from(KIND_CHUNK, b"chunk")
    checked = 0

    def counted(data: bytes) -> bytes:
        nonlocal checked
        checked += len(data)
        return digest_of(data)

    monkeypatch.setattr(frames, "MAX_FALSE", 64 << 20)
    monkeypatch.setattr(frames, "digest_of", counted)
    told = list(scan(heads + chunk))
    assert [type(item) for item in told] == [Gap, Found]
    assert checked < 80 << 20
