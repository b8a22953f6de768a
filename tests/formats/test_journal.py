"""The journal: every entry can be said again, and what a newer cidfs wrote refuses the store."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import frames
from cidfs.formats.journal import (
    Amendment,
    Checkpoint,
    Entry,
    Publication,
    Realisation,
    Removal,
    Transaction,
    decode,
    encode,
)
from tests.formats.make_vectors import ENTRIES
from tests.formats.support import by_reason, examples, flipped
from tests.formats.test_store_path import hash_parts

u32 = st.one_of(st.integers(0, (1 << 32) - 1), st.sampled_from([0, (1 << 32) - 1]))
u64 = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1 << 63, (1 << 64) - 1]))
records = st.binary(max_size=60)
entry_lists: st.SearchStrategy[list[Entry]] = st.lists(
    st.one_of(
        st.builds(Publication, u64, u64, u32, st.integers(0, 3), records),
        st.builds(Amendment, u64, u64, records),
        st.builds(Removal, u64, u64, hash_parts),
        st.builds(Realisation, u64, records),
        st.builds(Checkpoint, u64, u64, st.lists(u64, max_size=5).map(tuple)),
    ),
    max_size=5,
)


def body_of(frame: bytes) -> bytes:
    header = frames.read_header(frame)
    assert (header.kind, header.size) == (frames.KIND_JOURNAL, len(frame))
    return frames.read_data(frame, header)


def entry(kind: int, serial: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<BQI", kind, serial, len(payload) if length is None else length) + payload


def transaction(*entries: bytes, count: int | None = None, flags: int = 0) -> bytes:
    return struct.pack("<IB", len(entries) if count is None else count, flags) + b"".join(entries)


SAMPLE = body_of(encode([e for entries in ENTRIES.values() for e in entries]))


@examples(200)
@given(entry_lists, st.booleans())
def test_a_transaction_is_read_back(entries: list[Entry], of_checkpoint: bool) -> None:
    frame = encode(entries, of_checkpoint=of_checkpoint)
    assert decode(body_of(frame)) == Transaction(tuple(entries), of_checkpoint)


@examples(50)
@given(st.lists(entry_lists, max_size=4), st.integers(0, 10_000))
def test_a_row_of_frames_that_was_torn_says_all_but_its_last(rows: list[list[Entry]], cut: int) -> None:
    written = [encode(entries) for entries in rows]
    last = encode([Publication(1, 2, 3, 0, b"torn")])
    data = b"".join(written) + last[: cut % len(last)]
    found = [f for f in frames.scan(data) if isinstance(f, frames.Found)]
    assert [decode(f.data).entries for f in found] == [tuple(entries) for entries in rows]


@examples(400)
@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_an_error_or_says_something_else(at: int, mask: int) -> None:
    changed = flipped(SAMPLE, at, mask)
    try:
        told = decode(changed)
    except FormatError:
        return
    assert body_of(encode(told.entries, of_checkpoint=told.of_checkpoint)) == changed


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "too short"),
        (bytes(4), "too short"),
        (transaction(flags=2), "unknown flags 0x2; a newer"),
        (transaction(flags=255), "unknown flags 0xff; a newer"),
        (transaction(count=1), "cut short"),
        (transaction(count=(1 << 32) - 1), "cut short"),
        (transaction(entry(1, 5, b"", length=1)), "cut short"),
        (transaction(entry(2, 5, bytes(20), length=(1 << 32) - 1)), "cut short"),
        (transaction(entry(2, 5, bytes(20))) + b"\0", "bytes after the last entry"),
        (transaction(entry(2, 5, bytes(20)), count=0), "bytes after the last entry"),
        (transaction(entry(0, 5, bytes(40))), "unknown entry kind 0; a newer"),
        (transaction(entry(6, 5, bytes(40))), "unknown entry kind 6; a newer"),
        (transaction(entry(255, 5, b"")), "unknown entry kind 255; a newer"),
        (transaction(entry(1, 5, bytes(15))), "of kind 1 that is cut short"),
        (transaction(entry(1, 5, struct.pack("<QII", 16, 1, 4))), "unknown flags 0x4; a newer"),
        (transaction(entry(1, 5, struct.pack("<QII", 16, 1, 1 << 31))), "unknown flags 0x80000000; a newer"),
        (transaction(entry(2, 5, bytes(7))), "of kind 2 that is cut short"),
        (transaction(entry(3, 5, bytes(8) + b"0" * 31)), "removal of wrong length"),
        (transaction(entry(3, 5, bytes(8) + b"0" * 33)), "removal of wrong length"),
        (transaction(entry(3, 5, bytes(8) + b"e" * 32)), "not a hash part"),
        (transaction(entry(3, 5, bytes(8) + b"\xff" * 32)), "of kind 3"),
        (transaction(entry(5, 5, bytes(19))), "of kind 5 that is cut short"),
        (transaction(entry(5, 5, struct.pack("<QQI", 6, 0, 0))), "checkpoint of wrong length"),
        (transaction(entry(5, 5, struct.pack("<QQI", 5, 0, 1))), "checkpoint of wrong length"),
        (transaction(entry(5, 5, struct.pack("<QQI", 5, 0, (1 << 32) - 1))), "checkpoint of wrong length"),
        (transaction(entry(5, 5, struct.pack("<QQIQQ", 5, 0, 1, 7, 8))), "checkpoint of wrong length"),
    ],
    ids=by_reason,
)
def test_a_wrong_transaction_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=f"(?s){reason}"):
        decode(body)


def test_flags_that_could_not_be_read_again_are_not_written() -> None:
    with pytest.raises(FormatError, match="unknown flags 0x4"):
        encode([Publication(1, 16, 1, 4, b"record")])


@pytest.mark.parametrize("hash_part", ["", "0" * 31, "0" * 33, "e" * 32, "é" * 32])
def test_a_removal_that_could_not_be_read_again_is_not_written(hash_part: str) -> None:
    with pytest.raises(FormatError, match="hash part"):
        encode([Removal(1, 2, hash_part)])
