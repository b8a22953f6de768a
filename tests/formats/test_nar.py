"""NAR: what the writer writes the reader reads, in any pieces; anything but the canonical form is refused."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import nar
from cidfs.formats.nar import (
    MAX_DEPTH,
    MAX_FILE,
    MAX_NAME,
    MAX_TARGET,
    FileData,
    FileStart,
    NarReader,
    check_entry_name,
    pack_string,
)
from tests.formats.model import File, Link, Tree, directory_trees, events_of, nar_of, read_nar, trees
from tests.formats.support import by_reason, examples, flipped, pieces_of


def tokens(*words: bytes | str) -> bytes:
    return b"".join(pack_string(w.encode() if isinstance(w, str) else w) for w in words)


HEAD = tokens("nix-archive-1")
FILE = ("(", "type", "regular", "contents", "", ")")


def entry(name: bytes | str, *node: bytes | str) -> tuple[bytes | str, ...]:
    return ("entry", "(", "name", name, "node", *(node or FILE), ")")


def directory(*entries: tuple[bytes | str, ...]) -> bytes:
    return HEAD + tokens("(", "type", "directory", *(w for e in entries for w in e), ")")


def read(data: bytes) -> list[tuple[object, ...]]:
    return list(read_nar([data]))


SAMPLE_TREE: Tree = {b"a": {b"b": Link(b"c")}, b"d": File(b"12345", True), b"e": File(b"12345678")}
SAMPLE = nar_of(SAMPLE_TREE)


@examples(150)
@given(trees(), st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_a_tree_that_is_written_is_read_back_from_any_pieces(tree: Tree, lengths: list[int]) -> None:
    data = nar_of(tree)
    assert list(read_nar(pieces_of(data, lengths))) == list(events_of(tree))
    assert read(data) == list(events_of(tree))


@pytest.mark.parametrize("length", range(1, 25))
def test_pieces_of_every_length_give_the_same_events(length: int) -> None:
    assert list(read_nar(pieces_of(SAMPLE, [length]))) == list(events_of(SAMPLE_TREE))


def test_empty_pieces_change_nothing() -> None:
    pieces = [p for piece in pieces_of(SAMPLE, [7]) for p in (b"", piece, b"")]
    assert list(read_nar(pieces)) == list(events_of(SAMPLE_TREE))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_reader_takes_any_kind_of_buffer(kind: type) -> None:
    assert list(read_nar(kind(piece) for piece in pieces_of(SAMPLE, [100]))) == list(events_of(SAMPLE_TREE))


def test_a_reader_says_when_it_has_finished() -> None:
    reader = NarReader()
    for piece in pieces_of(SAMPLE, [1]):
        assert not reader.finished
        list(reader.feed(piece))
    assert reader.finished
    reader.close()


def test_a_files_size_is_told_before_its_contents() -> None:
    reader = NarReader()
    data = HEAD + nar.write_file_head(MAX_FILE, True)
    assert list(reader.feed(data)) == [FileStart(b"", MAX_FILE, True)]
    (event,) = reader.feed(b"1234")
    assert isinstance(event, FileData)
    assert bytes(event.data) == b"1234"


def test_the_padding_is_that_of_the_format() -> None:
    assert pack_string(b"") == bytes(8)
    assert pack_string(b"12345678") == b"\x08" + bytes(7) + b"12345678"
    assert pack_string(b"123456789") == b"\x09" + bytes(7) + b"123456789" + bytes(7)
    assert HEAD == nar.HEADER == b"\x0d" + bytes(7) + b"nix-archive-1" + bytes(3)


def test_every_truncation_is_refused_where_it_ends() -> None:
    for end in range(len(SAMPLE)):
        for lengths in ([len(SAMPLE)], [13]):
            with pytest.raises(FormatError, match=f"ends too early, at byte {end}$"):
                list(read_nar(pieces_of(SAMPLE[:end], lengths)))


@pytest.mark.parametrize("extra", [b"\0", bytes(8), SAMPLE, tokens(")")])
def test_trailing_bytes_are_refused_where_they_begin(extra: bytes) -> None:
    for pieces in ([SAMPLE + extra], [SAMPLE, extra], pieces_of(SAMPLE + extra, [11])):
        with pytest.raises(FormatError, match=f"bytes after its end, at byte {len(SAMPLE)}$"):
            list(read_nar(pieces))


def test_every_flipped_bit_is_refused_or_says_another_tree() -> None:
    for at in range(len(SAMPLE)):
        for bit in range(8):
            changed = flipped(SAMPLE, at, 1 << bit)
            try:
                told = read(changed)
            except FormatError:
                continue
            assert nar_of_events(told) == changed
            assert told != list(events_of(SAMPLE_TREE))


@examples(150)
@given(directory_trees(), st.data())
def test_a_changed_byte_is_refused_or_says_another_tree(tree: Tree, draw: st.DataObject) -> None:
    data = nar_of(tree)
    for _ in range(10):
        changed = flipped(data, draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255)))
        try:
            told = read(changed)
        except FormatError:
            continue
        assert nar_of_events(told) == changed


def nar_of_events(told: list[tuple[object, ...]]) -> bytes:
    """Write again what was read: the one canonical form."""
    rest = iter(told)

    def node(event: tuple[object, ...]) -> tuple[bytes, Tree]:
        match event:
            case ("file", bytes(name), _, bool(executable), bytes(contents)):
                return name, File(contents, executable)
            case ("link", bytes(name), bytes(target)):
                return name, Link(target)
            case ("directory", bytes(name)):
                entries: dict[bytes, Tree] = {}
                for inner in rest:
                    if inner == ("end",):
                        break
                    key, value = node(inner)
                    entries[key] = value
                return name, entries
        raise AssertionError(event)

    return nar_of(node(next(rest))[1])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tokens("nix-archive-2"), "b'nix-archive-2' where MAGIC stands, at byte 0"),
        (tokens("nix-archive"), "b'nix-archive' where MAGIC stands, at byte 0"),
        (tokens(""), "b'' where MAGIC stands, at byte 0"),
        (b"nix-archive-1 and more", "where MAGIC stands, at byte 0"),
        (HEAD + tokens("type"), "b'type' where OPEN stands, at byte 24"),
        (HEAD + tokens("(", "typo"), "b'typo' where TYPE_WORD stands, at byte 40"),
        (HEAD + tokens("(", "type", "fifo"), "b'fifo' where TYPE stands, at byte 56"),
        (HEAD + tokens("(", "type", "Regular"), "b'Regular' where TYPE stands"),
        (HEAD + tokens("(", ")"), r"b'\)' where TYPE_WORD stands"),
        # a file
        (HEAD + tokens("(", "type", "regular", ")"), "a file without contents, at byte 72"),
        (HEAD + tokens("(", "type", "regular", "executable", "", ")"), r"b'\)' where CONTENTS_WORD stands"),
        (HEAD + tokens("(", "type", "regular", "executable", "x"), "b'x' where EXECUTABLE_VALUE stands"),
        (
            HEAD + tokens("(", "type", "regular", "executable", "contents", ""),
            "b'contents' where EXECUTABLE_VALUE stands",
        ),
        (
            HEAD + tokens("(", "type", "regular", "executable", "", "executable"),
            "b'executable' where CONTENTS_WORD stands",
        ),
        (HEAD + tokens("(", "type", "regular", "target"), "b'target' where FILE_FIELD stands"),
        (HEAD + tokens("(", "type", "regular", "contents", "", "contents"), "where FILE_CLOSE stands"),
        (HEAD + tokens("(", "type", "regular", "contents", "", "executable"), "where FILE_CLOSE stands"),
        (
            HEAD + tokens("(", "type", "regular", "contents") + (1 << 63).to_bytes(8, "little"),
            "a file of 9223372036854775808 bytes at byte 88",
        ),
        (
            HEAD + tokens("(", "type", "regular", "contents") + b"\x01" + bytes(7) + b"x" + bytes(6) + b"\1",
            "padding is not zero at byte 97",
        ),
        # a symlink
        (HEAD + tokens("(", "type", "symlink", ")"), r"b'\)' where TARGET_WORD stands"),
        (HEAD + tokens("(", "type", "symlink", "target", "", ")"), "target that is empty"),
        (HEAD + tokens("(", "type", "symlink", "target", "a\0b", ")"), "holds a zero byte"),
        (HEAD + tokens("(", "type", "symlink", "target", "t" * 4096), "a string of 4096 bytes where TARGET"),
        (HEAD + tokens("(", "type", "symlink", "target", "t", "target"), "where SYMLINK_CLOSE stands"),
        # a directory
        (directory(entry("b"), entry("a")), "b'a' is not after b'b' in its directory, at byte "),
        (directory(entry("a"), entry("a")), "b'a' is not after b'a' in its directory"),
        (directory(entry("a"), entry("B")), "b'B' is not after b'a' in its directory"),
        (directory(entry("a.b"), entry("a")), "b'a' is not after b'a.b' in its directory"),
        (directory(entry(b"\xff"), entry("a")), r"b'a' is not after b'\\xff' in its directory"),
        (directory(entry("")), "b'' cannot be a name"),
        (directory(entry(".")), "b'.' cannot be a name"),
        (directory(entry("..")), "b'..' cannot be a name"),
        (directory(entry("a/b")), "b'a/b' cannot be a name"),
        (directory(entry("/")), "b'/' cannot be a name"),
        (directory(entry("a\0")), r"b'a\\x00' cannot be a name"),
        (directory(entry("n" * 256)), "a string of 256 bytes where NAME stands"),
        (directory(("entry", "(", "node")), "b'node' where NAME_WORD stands"),
        (directory(("entry", "name")), "b'name' where ENTRY_OPEN stands"),
        (directory(("entry", "(", "name", "a", "name")), "b'name' where NODE_WORD stands"),
        (directory(("entry", "(", "name", "a", ")")), r"b'\)' where NODE_WORD stands"),
        (directory(("entry", "(", "name", "a", "node", *FILE, "entry")), "b'entry' where ENTRY_CLOSE stands"),
        (directory(("type", "directory")), "b'type' where DIRECTORY_FIELD stands"),
        (directory(("contents", "")), "b'contents' where DIRECTORY_FIELD stands"),
        # sizes that are absurd
        (
            (1 << 63).to_bytes(8, "little"),
            "a string of 9223372036854775808 bytes where MAGIC stands, at byte 0",
        ),
        (b"\xff" * 8, "a string of 18446744073709551615 bytes where MAGIC stands"),
        (
            HEAD + (1 << 40).to_bytes(8, "little"),
            "a string of 1099511627776 bytes where OPEN stands, at byte 24",
        ),
        (
            HEAD + tokens("(", "type") + b"\x11" + bytes(7),
            "a string of 17 bytes where TYPE stands, at byte 56",
        ),
    ],
    ids=by_reason,
)
def test_what_is_not_canonical_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    for pieces in ([data], pieces_of(data, [1]), pieces_of(data, [9])):
        with pytest.raises(FormatError, match=f"^NAR: .*{reason}"):
            list(read_nar(pieces))


def test_nonzero_padding_is_refused_wherever_it_is() -> None:
    tree: Tree = {b"a": File(b"12345"), b"bcd": Link(b"target")}
    data = nar_of(tree)
    paddings = [m.start() for m in re.finditer(rb"\0", data)]
    seen = 0
    for at in paddings:
        changed = flipped(data, at, 0x40)
        try:
            read(changed)
        except FormatError as e:
            seen += "padding is not zero" in str(e)
        else:
            raise AssertionError(f"byte {at} is not looked at")
    # 3 after the magic, 2 and 5 of name and contents, 5 and 2 of the other, and those of the words.
    words = [
        b"(",
        b"type",
        b"directory",
        b"regular",
        b"contents",
        b"entry",
        b"name",
        b"node",
        b")",
        b"symlink",
        b"target",
    ]
    expected = sum(-len(w) % 8 * data.count(pack_string(w)) for w in words)
    assert seen == expected + 3 + 7 + 3 + 5


@pytest.mark.parametrize("inner", [File(b"x"), Link(b"x"), {}])
def test_a_node_lies_in_at_most_max_depth_directories(inner: Tree) -> None:
    before = nar.write_directory() + nar.write_entry(b"d")
    after = nar.ENTRY_END + nar.DIRECTORY_END
    core = nar_of(inner)[len(HEAD) :]
    told = read(HEAD + before * MAX_DEPTH + core + after * MAX_DEPTH)
    assert sum(event[0] == "directory" for event in told) == MAX_DEPTH + (inner == {})
    with pytest.raises(FormatError, match="nested deeper than 1024, at byte"):
        read(HEAD + before * (MAX_DEPTH + 1) + core + after * (MAX_DEPTH + 1))


def test_endless_nesting_is_refused() -> None:
    data = HEAD + (nar.write_directory() + nar.write_entry(b"d")) * 100_000
    with pytest.raises(FormatError, match="nested deeper"):
        read(data)


def test_the_longest_name_and_target_are_read() -> None:
    tree: Tree = {b"n" * MAX_NAME: Link(b"t" * MAX_TARGET)}
    assert list(read_nar(pieces_of(nar_of(tree), [100]))) == list(events_of(tree))


def test_a_reader_holds_no_more_than_a_piece_however_large_the_file() -> None:
    reader, piece = NarReader(), bytes(1 << 20)
    list(reader.feed(HEAD + nar.write_file_head(1 << 50, False)))
    tracemalloc.start()
    try:
        for _ in range(100):
            for event in reader.feed(piece):
                assert isinstance(event, FileData)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
    with pytest.raises(FormatError, match="too early"):
        reader.close()


@pytest.mark.parametrize("name", [b"", b".", b"..", b"/", b"a/b", b"a/", b"\0", b"a\0b", b"n" * 256])
def test_a_name_that_would_leave_its_directory_is_refused(name: bytes) -> None:
    with pytest.raises(FormatError, match="cannot be a name"):
        check_entry_name(name)


@pytest.mark.parametrize("name", [b"a", b"...", b"..a", b".a", b"-", b" ", b"\n", b"\xff", b"\\", b"n" * 255])
def test_an_awkward_name_is_accepted(name: bytes) -> None:
    assert check_entry_name(name) == name
    assert read(nar_of({name: File(b"")})) == list(events_of({name: File(b"")}))


@examples(200)
@given(st.binary(max_size=100), st.integers(0, len(SAMPLE)))
def test_any_bytes_give_a_format_error(junk: bytes, keep: int) -> None:
    data = SAMPLE[:keep] + junk
    if data != SAMPLE:
        with pytest.raises(FormatError):
            read(data)
