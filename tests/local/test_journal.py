"""The journal on disk: frames appended and read back, torn, lost and twice; checkpoints."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cidfs.errors import DiskFailed, FormatError
from cidfs.formats import frames, journal
from cidfs.formats.journal import Amendment, Publication, Removal
from cidfs.local.journal import Journal, Replay, journal_files

HASH = "0" * 32


def publication(serial: int, text: bytes = b"record") -> Publication:
    return Publication(serial, 16 * serial, 3, 0, text)


def frame(*serials: int) -> bytes:
    return journal.encode([publication(s) for s in serials])


def replay(folder: Path) -> Replay:
    return Journal(folder).replay()


@pytest.fixture
def folder(room: Path) -> Path:
    """A journal with one empty file, as a new store has it."""
    (room / "journal").mkdir()
    (room / "journal" / "1").touch()
    return room / "journal"


def test_what_is_appended_is_read_back(folder: Path) -> None:
    entries: Sequence[journal.Entry] = [publication(1), Amendment(2, 16, b"other"), Removal(3, 16, HASH)]
    ours = Journal(folder)
    ours.append([journal.encode(entries[:2])])
    ours.append([journal.encode(entries[2:])])
    found = replay(folder)
    assert list(found.entries.values()) == entries
    assert (found.next_serial, found.next_base, found.missing, found.damage) == (4, 0, [], [])


def test_an_empty_journal(folder: Path) -> None:
    found = replay(folder)
    assert (found.entries, found.next_serial, found.missing) == ({}, 1, [])
    (folder / "1").unlink()
    assert replay(folder).entries == {}
    Journal(folder).append([frame(1)])
    assert list(replay(folder).entries) == [1]


def test_a_torn_frame_costs_no_other(folder: Path) -> None:
    """At every length that a dead writer can have left."""
    torn = frame(2)
    for length in range(1, len(torn)):
        (folder / "1").write_bytes(frame(1) + torn[:length])
        Journal(folder).append([frame(2), frame(3)])
        found = replay(folder)
        assert (sorted(found.entries), found.missing) == ([1, 2, 3], [])
        assert len(found.damage) == 1


def test_a_damaged_frame_is_a_loss(folder: Path) -> None:
    whole = frame(1) + frame(2, 3) + frame(4)
    start = len(frame(1))
    for at in range(start, start + len(frame(2, 3)), 7):
        (folder / "1").write_bytes(whole[:at] + bytes((whole[at] ^ 1,)) + whole[at + 1 :])
        found = replay(folder)
        assert (sorted(found.entries), found.missing, found.next_serial) == ([1, 4], [2, 3], 5)
        assert found.damage


def test_serials_have_no_gaps(folder: Path) -> None:
    Journal(folder).append([frame(2), frame(5)])
    assert replay(folder).missing == [1, 3, 4]


def test_twice_is_once(folder: Path) -> None:
    Journal(folder).append([frame(1), frame(2), frame(1)])
    Journal(folder).append([frame(2)])
    assert sorted(replay(folder).entries) == [1, 2]


def test_two_entries_of_one_serial_are_refused(folder: Path) -> None:
    Journal(folder).append([frame(1), journal.encode([publication(1, b"another")])])
    with pytest.raises(FormatError, match="serial 1"):
        replay(folder)


def test_an_entry_of_an_unknown_kind_refuses_the_store(folder: Path) -> None:
    entry = struct.pack("<BQI", 9, 2, 0)
    body = struct.pack("<IB", 1, 0) + entry
    Journal(folder).append([frame(1), frames.build_from(frames.KIND_JOURNAL, body)])
    with pytest.raises(FormatError, match="unknown entry kind 9"):
        replay(folder)


def test_frames_of_other_kinds_are_passed_over(folder: Path) -> None:
    others = [frames.build_from(kind, b"x") for kind in (frames.KIND_CHUNK, 200)]
    Journal(folder).append([frame(1), *others, frame(2)])
    assert sorted(replay(folder).entries) == [1, 2]


def failing(times: int) -> Callable[[int], None]:
    """Return an fdatasync that fails so many times."""
    real, left = os.fdatasync, [times]

    def fails(fd: int) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    return fails


def test_after_a_failed_sync_frames_go_into_a_new_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Journal(folder)
    ours.append([frame(1)])
    monkeypatch.setattr(os, "fdatasync", failing(1))
    ours.append([frame(2)])
    assert journal_files(folder) == [1, 2]
    assert (folder / "2").read_bytes() == frame(2)
    before = (folder / "1").read_bytes()
    ours.append([frame(3)])
    Journal(folder).append([frame(4)])
    assert (folder / "1").read_bytes() == before, "nothing more is written to it"
    found = replay(folder)
    assert (sorted(found.entries), found.missing) == ([1, 2, 3, 4], [])


def test_a_disk_that_always_fails_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Journal(folder)
    ours.append([frame(1)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(100))
        with pytest.raises(DiskFailed, match="journal"):
            ours.append([frame(2)])
    ours.append([frame(2), frame(3)])
    assert sorted(replay(folder).entries) == [1, 2, 3]


def test_a_file_that_cannot_be_written_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short writes are gone on with."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:5]), offset))
    Journal(folder).append([frame(1), frame(2)])
    assert sorted(replay(folder).entries) == [1, 2]


# --- checkpoints


def test_a_checkpoint_stands_for_all_before_it(folder: Path) -> None:
    ours = Journal(folder)
    ours.append([frame(1), frame(2, 3), journal.encode([Removal(4, 32, HASH)])])
    live = [publication(1, b"amended"), publication(3)]
    number = ours.write_checkpoint(live, 5, 999)
    assert journal_files(folder) == [number] == [2]
    found = replay(folder)
    assert list(found.entries.values()) == live
    assert (found.next_serial, found.next_base, found.missing) == (5, 999, [])
    ours.append([frame(5)])
    found = replay(folder)
    assert (sorted(found.entries), found.next_serial, found.missing) == ([1, 3, 5], 6, [])


def test_a_late_frame_behind_a_checkpoint_is_ignored(folder: Path) -> None:
    ours = Journal(folder)
    ours.write_checkpoint([publication(1, b"amended")], 4, 0)
    Journal(folder).append([frame(1), frame(2), frame(4)])  # another found them in its `pending`
    found = replay(folder)
    assert found.entries == {1: publication(1, b"amended"), 4: publication(4)}
    assert found.missing == []


def test_older_files_that_were_left_count_no_more(folder: Path) -> None:
    (folder / "1").write_bytes(frame(1) + frame(2))
    ours = Journal(folder)
    old = (folder / "1").read_bytes()
    ours.write_checkpoint([publication(2)], 3, 0)
    (folder / "1").write_bytes(old)  # its writer died before it took this away
    (folder / "3.tmp-1-00").write_bytes(journal.encode([journal.Checkpoint(9, 9, ())], of_checkpoint=True))
    found = replay(folder)
    assert (sorted(found.entries), found.next_serial) == ([2], 3)
    old = (folder / "2").read_bytes()
    assert ours.write_checkpoint([], 3, 0) == 3
    assert journal_files(folder) == [3]
    (folder / "2").write_bytes(old)  # an older checkpoint, of what was removed since
    assert replay(folder).entries == {}


def test_a_damaged_checkpoint_is_a_loss(folder: Path) -> None:
    Journal(folder).write_checkpoint([publication(s) for s in (1, 2, 5)], 7, 0)
    raw = (folder / "2").read_bytes()
    head = len(journal.encode([journal.Checkpoint(7, 0, (1, 2, 5))], of_checkpoint=True))
    (folder / "2").write_bytes(raw[:head] + raw[head + 1 :])
    assert replay(folder).missing == [1, 2, 5]
    (folder / "2").write_bytes(raw[1:])
    assert replay(folder).missing == [3, 4], "without its head, the others seem to be lost"


def test_a_checkpoint_of_many_and_one_above_another_number(folder: Path) -> None:
    many = [publication(s) for s in range(1, 700)]
    ours = Journal(folder)
    assert ours.write_checkpoint(many, 700, 5, above=41) == 42
    found = replay(folder)
    assert list(found.entries.values()) == many
    assert ours.write_checkpoint([], 700, 5) == 43


def test_a_checkpoint_that_cannot_be_written_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Journal(folder).append([frame(1)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(DiskFailed, match="disk is full"):
            Journal(folder).write_checkpoint([publication(1)], 2, 0)
    assert os.listdir(folder) == ["1"]
    assert sorted(replay(folder).entries) == [1]


# --- what may lie there


@pytest.mark.parametrize("name", ["²", "01", "7"])
def test_what_is_no_journal_file_stops_nobody_for_ever(folder: Path, name: str) -> None:
    Journal(folder).append([frame(1)])
    if name == "7":  # leads nowhere
        (folder / name).symlink_to(folder / "nowhere")
        with pytest.raises(DiskFailed, match="/7"):
            replay(folder)
    else:
        (folder / name).touch()
        assert journal_files(folder) == [1]
        assert list(replay(folder).entries) == [1]


@pytest.mark.parametrize("after", [b"", b"torn" * 1000])
def test_the_end_is_found_behind_a_frame_longer_than_what_is_read(folder: Path, after: bytes) -> None:
    Journal(folder).append([frame(1, 2, 3)])
    assert Journal(folder).last_serial() == 3
    filler = random.Random(1).randbytes(3 << 20)
    Journal(folder).append([journal.encode([publication(10, filler)]) + after])
    assert Journal(folder).last_serial() == replay(folder).next_serial - 1 == 10
