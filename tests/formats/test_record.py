"""Path records: one canonical form, and what it cannot say is neither written nor read."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import record
from cidfs.formats.canonical import MAX_SIGNATURES
from cidfs.formats.chunking import MAXIMUM
from cidfs.formats.manifest import DIRECTORY, EXECUTABLE, FILE, MAX_NODES, SYMLINK, Manifest
from cidfs.formats.nar import MAX_FILE
from cidfs.formats.record import Record, body, decode, decode_known, encode
from cidfs.formats.store_path import StorePath
from tests.formats.make_vectors import FULL_RECORD, SMALL_RECORD
from tests.formats.model import Tree, manifest_of, trees
from tests.formats.support import by_reason, examples, flipped
from tests.formats.test_store_path import hash_parts, valid_names

digests = st.binary(min_size=32, max_size=32)
base_names = st.builds(lambda h, n: StorePath(h, n).base_name, hash_parts, valid_names)
printable = st.text(alphabet=[chr(c) for c in range(0x20, 0x7F)], max_size=30)


def lists(texts: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(texts, max_size=5, unique=True).map(lambda found: tuple(sorted(found)))


roots = trees().map(lambda tree: Manifest(manifest_of(tree)[0])).map(lambda m: (m.node_count, m.row(0)))


@st.composite
def records(draw: st.DrawFn) -> Record:
    node_count, root_row = draw(roots)
    return Record(
        store_dir=draw(st.sampled_from(["/nix/store", "/s", "/a/b/c/.d"])),
        path=StorePath(draw(hash_parts), draw(valid_names)),
        nar_hash=draw(digests),
        nar_size=draw(st.integers(0, MAX_FILE)),
        references=draw(lists(base_names)),
        deriver=draw(st.just("") | base_names),
        ca=draw(printable),
        manifest=draw(digests),
        node_count=node_count,
        root_row=root_row,
        features=draw(st.integers(0, (1 << 64) - 1)),
        signatures=draw(lists(printable)),
        seals=draw(lists(printable)),
        hints=draw(st.lists(hash_parts, max_size=4).map(tuple)),
    )


def changed(base: Record = FULL_RECORD, /, **fields: object) -> Record:
    return msgspec.structs.replace(base, **fields)


FULL = encode(FULL_RECORD)


@examples(200)
@given(records())
def test_a_record_is_read_back(value: Record) -> None:
    data = encode(value)
    assert decode(data) == value
    assert encode(decode(data)) == data
    assert decode(encode(value, hints=False)) == changed(value, hints=())


@examples(100)
@given(records())
def test_parts_of_a_record_can_be_had_without_the_rest(value: Record) -> None:
    data = encode(value)
    facts = record.facts_in(data)
    assert (facts.nar_hash, facts.nar_size) == (value.nar_hash, value.nar_size)
    assert tuple(name.decode() for name in facts.references) == value.references
    assert (facts.deriver.decode(), facts.ca.decode()) == (value.deriver, value.ca)
    assert tuple(each.decode() for each in facts.signatures) == value.signatures


@examples(100)
@given(records(), st.data())
def test_a_changed_byte_is_refused_or_says_something_else(value: Record, draw: st.DataObject) -> None:
    data = encode(value)
    for _ in range(10):
        other = flipped(data, draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255)))
        try:
            told = decode(other)
        except FormatError:
            continue
        assert told != value
        assert encode(told) == other


def test_every_flipped_bit_is_refused_or_says_something_else() -> None:
    for at in range(len(FULL)):
        for bit in range(8):
            other = flipped(FULL, at, 1 << bit)
            try:
                told = decode(other)
            except FormatError:
                continue
            assert told != FULL_RECORD
            assert encode(told) == other


@examples(100)
@given(records(), lists(printable), lists(printable), st.lists(hash_parts, max_size=3))
def test_signatures_seals_and_hints_are_outside_the_body(
    value: Record, signatures: tuple[str, ...], seals: tuple[str, ...], hints: list[str]
) -> None:
    other = changed(value, signatures=signatures, seals=seals, hints=tuple(hints))
    assert body(other) == body(value)
    assert encode(other).startswith(body(value))


OTHERS: dict[str, object] = {
    "store_dir": "/nix/store",
    "path": SMALL_RECORD.path,
    "nar_hash": bytes(32),
    "nar_size": 1,
    "references": (),
    "deriver": "",
    "ca": "",
    "manifest": bytes(32),
    "node_count": 10,
    "root_row": struct.pack("<IHBBQIIII", 0, 0, DIRECTORY, 0, 0, 1, 1, 0, 0),
    "features": 4,
}


@pytest.mark.parametrize("field", OTHERS)
def test_every_other_field_is_in_the_body(field: str) -> None:
    assert body(changed(**{field: OTHERS[field]})) != body(FULL_RECORD)


def test_every_field_is_covered_by_the_body_or_named_as_outside() -> None:
    assert {*OTHERS, "signatures", "seals", "hints"} == set(Record.__struct_fields__)
    assert record.DOMAIN_TAG == b"cidfs-record-1"


def test_every_truncation_and_every_extension_is_refused() -> None:
    for end in range(len(FULL)):
        with pytest.raises(FormatError):
            decode(FULL[:end])
    with pytest.raises(FormatError, match="bytes after its end"):
        decode(FULL + b"\0")


ROOT = struct.Struct("<IHBBQIIII")


def raw(
    path: bytes = b"/nix/store/" + b"0" * 32 + b"-a",
    nar_size: int = 1,
    references: tuple[bytes, ...] = (),
    deriver: bytes = b"",
    ca: bytes = b"",
    nodes: int = 1,
    root: bytes = ROOT.pack(0, 0, FILE, 0, 0, 0, 0, 0, 0),
    signatures: tuple[bytes, ...] = (),
    seals: tuple[bytes, ...] = (),
    hints: bytes = bytes(4),
    magic: bytes = b"cidfsrec1",
) -> bytes:
    """Return a record of any fields, written apart from the code under test."""

    def text(value: bytes) -> bytes:
        return struct.pack("<H", len(value)) + value

    def texts(form: str, values: tuple[bytes, ...]) -> bytes:
        return struct.pack(form, len(values)) + b"".join(map(text, values))

    parts = [
        magic,
        text(path),
        bytes(32),
        struct.pack("<Q", nar_size),
        texts("<I", references),
        text(deriver),
    ]
    parts += [text(ca), bytes(32), struct.pack("<I", nodes), root, bytes(8)]
    parts += [texts("<H", signatures), texts("<H", seals), hints]
    return b"".join(parts)


A, B = b"a" * 32 + b"-a", b"b" * 32 + b"-b"


def test_a_record_that_was_written_apart_is_read() -> None:
    told = decode(raw(references=(A, B), deriver=B, ca=b"c a", signatures=(b"", b"s"), seals=(b"t",)))
    assert told.references == (A.decode(), B.decode())
    assert (told.deriver, told.ca, told.signatures, told.seals) == (B.decode(), "c a", ("", "s"), ("t",))
    assert told.full_path == "/nix/store/" + "0" * 32 + "-a"


def root(kind: int, size: int = 0, first: int = 0, count: int = 0, **fields: int) -> bytes:
    get = fields.get
    return ROOT.pack(
        get("name_offset", 0),
        get("name_length", 0),
        kind,
        get("zero", 0),
        size,
        first,
        count,
        get("parent", 0),
        0,
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends too early"),
        (raw(magic=b"cidfsrec2"), "no magic"),
        (raw(path=b""), "not an absolute store path"),
        (raw(path=b"0" * 32 + b"-a"), "not an absolute store path"),
        (raw(path=b"/" + b"0" * 32 + b"-a"), "not a store directory"),
        (raw(path=b"//" + b"0" * 32 + b"-a"), "not a store directory"),
        (raw(path=b"nix/store/" + b"0" * 32 + b"-a"), "not a store directory"),
        (raw(path=b"/nix/store//" + b"0" * 32 + b"-a"), "not a store directory"),
        (raw(path=b"/nix/../etc/" + b"0" * 32 + b"-a"), "not a store directory"),
        (raw(path=b"/nix/./store/" + b"0" * 32 + b"-a"), "not a store directory"),
        (raw(path=b"/nix/store/" + b"0" * 32 + b"-a/"), "not a store path"),
        (raw(path=b"/nix/store/" + b"e" * 32 + b"-a"), "not a store path"),
        (raw(path=b"/nix/store/" + b"0" * 32 + b"-.."), "reserved"),
        (raw(path=b"/nix/store/" + b"0" * 32 + b"-a\n"), "not printable ASCII"),
        (raw(path=b"/nix/\xff/" + b"0" * 32 + b"-a"), "not printable ASCII"),
        (raw(nar_size=1 << 63), "a NAR of 9223372036854775808 bytes"),
        (raw(references=(B, A)), "not sorted"),
        (raw(references=(A, A)), "not sorted"),
        (raw(references=(b"..",)), "not a store path"),
        (raw(references=(b"a" * 32 + b"-a/b",)), "has characters other"),
        (raw(references=(b"",)), "not a store path"),
        (raw(deriver=b"unknown-deriver"), "not a store path"),
        (raw(deriver=b"/nix/store/" + A), "not a store path"),
        (raw(ca=b"a\0b"), "not printable ASCII"),
        (raw(ca=b"a\x7f"), "not printable ASCII"),
        (raw(ca=b"a\nSig: forged"), "not printable ASCII"),
        (raw(ca="é".encode()), "not printable ASCII"),
        (raw(signatures=(b"b", b"a")), "not sorted"),
        (raw(signatures=(b"a", b"a")), "not sorted"),
        (raw(seals=(b"b", b"a")), "not sorted"),
        (raw(seals=(b"a\n",)), "not printable ASCII"),
        (raw(signatures=tuple(b"%05d" % i for i in range(MAX_SIGNATURES + 1))), "1001 signatures"),
        (raw(seals=tuple(b"%05d" % i for i in range(MAX_SIGNATURES + 1))), "1001 signatures"),
        (raw(hints=struct.pack("<I", 1)), "1 items do not fit"),
        (raw(hints=struct.pack("<I", (1 << 32) - 1)), "4294967295 items do not fit"),
        (raw(hints=struct.pack("<I", 1) + b"e" * 32), "not a hash part"),
        (raw(hints=struct.pack("<I", 1) + b"\xff" * 32), "no hash part"),
        (raw(hints=struct.pack("<I", 1) + b"0" * 33), "bytes after its end"),
        (raw(nodes=0), "0 nodes"),
        (raw(nodes=MAX_NODES + 1), "16777217 nodes"),
        (raw(nodes=(1 << 32) - 1), "4294967295 nodes"),
        (raw(root=bytes(32)), "type 0"),
        (raw(root=root(FILE, zero=1)), "node row"),
        (raw(root=root(FILE, parent=1)), "root node that no tree has"),
        (raw(root=root(FILE, name_length=1)), "root node that no tree has"),
        (raw(root=root(FILE, name_offset=1)), "root node that no tree has"),
        (raw(nodes=2), "root node that no tree has"),
        (raw(root=root(FILE, size=1)), "root node that no tree has"),
        (raw(root=root(FILE, count=1)), "root node that no tree has"),
        (raw(root=root(FILE, size=MAXIMUM + 1, count=1)), "root node that no tree has"),
        (raw(root=root(EXECUTABLE, size=1 << 63, count=1)), "root node that no tree has"),
        (raw(root=root(FILE, size=1, first=1, count=1)), "root node that no tree has"),
        (raw(root=root(SYMLINK)), "root node that no tree has"),
        (raw(root=root(SYMLINK, size=4096)), "root node that no tree has"),
        (raw(root=root(SYMLINK, size=1, first=1)), "root node that no tree has"),
        (raw(root=root(SYMLINK, size=1, count=1)), "root node that no tree has"),
        (raw(root=root(SYMLINK, size=1), nodes=2), "root node that no tree has"),
        (raw(root=root(DIRECTORY, size=1)), "root node that no tree has"),
        (raw(root=root(DIRECTORY, first=1)), "root node that no tree has"),
        (raw(root=root(DIRECTORY), nodes=2), "root node that no tree has"),
        (raw(root=root(DIRECTORY, first=1, count=2), nodes=2), "root node that no tree has"),
        (raw(root=root(DIRECTORY, first=0, count=1), nodes=2), "root node that no tree has"),
        (raw(root=root(DIRECTORY, first=1, count=(1 << 32) - 1), nodes=2), "root node that no tree has"),
    ],
    ids=by_reason,
)
def test_a_wrong_record_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        decode(data)


@pytest.mark.parametrize(
    ("row", "nodes"),
    [
        (root(FILE), 1),
        (root(EXECUTABLE, size=1, count=1), 1),
        (root(FILE, size=2 * MAXIMUM, count=2), 1),
        (root(FILE, size=2, count=2), 1),
        (root(SYMLINK, size=4095), 1),
        (root(DIRECTORY), 1),
        (root(DIRECTORY, first=1, count=1), 2),
        (root(DIRECTORY, first=1, count=1), MAX_NODES),
        (root(DIRECTORY, first=1, count=MAX_NODES - 1), MAX_NODES),
    ],
)
def test_a_root_that_a_tree_can_have_is_read(row: bytes, nodes: int) -> None:
    assert decode(raw(root=row, nodes=nodes)).root_row == row


@examples(100)
@given(trees())
def test_the_root_of_every_tree_is_read(tree: Tree) -> None:
    opened = Manifest(manifest_of(tree)[0])
    assert decode(raw(root=opened.row(0), nodes=opened.node_count)).node_count == opened.node_count


def test_a_count_of_texts_that_do_not_fit_is_refused() -> None:
    whole = raw()
    place = whole.index(struct.pack("<Q", 1)) + 8
    data = whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4 :]
    with pytest.raises(FormatError, match="4294967295 items do not fit"):
        decode(data)


def test_a_record_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_SIZE", len(FULL))
    assert decode(FULL) == FULL_RECORD
    monkeypatch.setattr(record, "MAX_SIZE", len(FULL) - 1)
    with pytest.raises(FormatError, match=f"record: {len(FULL)} bytes"):
        decode(FULL)


@pytest.mark.parametrize(
    "fields",
    [
        {"store_dir": "nix/store"},
        {"store_dir": "/nix/store/"},
        {"store_dir": ""},
        {"path": StorePath("e" * 32, "a")},
        {"path": StorePath("0" * 32, "a/b")},
        {"nar_hash": bytes(31)},
        {"nar_hash": bytes(33)},
        {"nar_hash": bytes(31), "manifest": bytes(33)},
        {"nar_size": 1 << 63},
        {"references": (B.decode(), A.decode())},
        {"references": (A.decode(), A.decode())},
        {"references": ("/nix/store/" + A.decode(),)},
        {"deriver": "unknown-deriver"},
        {"ca": "two\nlines"},
        {"ca": "é"},
        {"ca": "\ud800"},
        {"ca": "c" * 65536},
        {"manifest": bytes(31)},
        {"node_count": 0},
        {"root_row": bytes(32)},
        {"root_row": FULL_RECORD.root_row[:31]},
        {"signatures": ("b", "a")},
        {"signatures": ("a", "a")},
        {"signatures": tuple(f"{i:05}" for i in range(MAX_SIGNATURES + 1))},
        {"seals": ("b", "a")},
        {"hints": ("0" * 31,)},
        {"hints": ("é" * 16,)},
    ],
)
def test_a_record_that_could_not_be_read_again_is_not_written(fields: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        encode(changed(**fields))


def test_as_many_signatures_as_are_allowed_are_read_back() -> None:
    many = tuple(f"{i:05}" for i in range(MAX_SIGNATURES))
    value = changed(signatures=many, seals=many)
    assert decode(encode(value)) == value


def test_a_record_that_needs_what_is_not_known_is_read_and_not_used() -> None:
    needy = changed(features=4)
    assert decode(encode(needy)) == needy
    with pytest.raises(FormatError, match="needs features 0x4 "):
        decode_known(encode(needy))
    plain = changed(features=0)
    assert decode_known(encode(plain)) == plain
