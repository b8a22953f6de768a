"""Manifests: what is built answers as a tree in plain Python does, and has one form only."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import manifest, manifest_builder
from cidfs.formats.chunking import MAXIMUM, Cutter
from cidfs.formats.digest import digest_of
from cidfs.formats.manifest import (
    DIRECTORY,
    ENTRY_SIZE,
    EXECUTABLE,
    FILE,
    MODES,
    NODE_SIZE,
    SYMLINK,
    Manifest,
    Node,
    decode_node,
)
from cidfs.formats.manifest_builder import ManifestBuilder
from cidfs.formats.nar import MAX_DEPTH
from tests.formats.make_vectors import MANIFEST_TREE, real_cut
from tests.formats.model import (
    Cut,
    File,
    Link,
    Tree,
    directory_trees,
    encoded_again,
    in_hundreds,
    manifest_of,
    names,
    trees,
    walked,
)
from tests.formats.support import by_reason, counter_stream, examples, flipped, pieces_of

HEADER_SIZE = 32
SAMPLE_TREE: Tree = {
    b"a": {b"x": File(b"1" * 250, True), b"y": Link(b"x"), b"z": {}},
    b"b": File(b""),
    b"c": File(b"2" * 100),
    b"d": {b"e": {b"f": File(b"3")}},
}
SAMPLE, _ = manifest_of(SAMPLE_TREE)


def type_of(tree: Tree) -> int:
    match tree:
        case File():
            return EXECUTABLE if tree.executable else FILE
        case Link():
            return SYMLINK
        case _:
            return DIRECTORY


def read(opened: Manifest, node: Node, chunks: Mapping[bytes, bytes], offset: int, size: int) -> bytes:
    """Read as a file system does: the spans of a range, and of each what lies in the range."""
    parts = []
    for span in opened.spans(node, offset, size):
        chunk = chunks[span.digest]
        assert len(chunk) == span.end - span.start
        parts.append(chunk[max(0, offset - span.start) : max(0, offset + size - span.start)])
    return b"".join(parts)


def cut_by(lengths: list[int]) -> Cut:
    return lambda data: pieces_of(data, lengths)


@examples(200)
@given(trees(), st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_a_manifest_says_what_its_tree_says(tree: Tree, lengths: list[int]) -> None:
    data, chunks = manifest_of(tree, cut_by(lengths))
    opened = Manifest(data).validate()
    model = list(walked(tree))
    assert len(opened) == len(data)
    assert opened.node_count == len(model)
    assert opened.total_size == sum(len(t.data) for _, t in model if isinstance(t, File))
    assert [opened.count_of(kind) for kind in MODES] == [
        sum(type_of(t) == kind for _, t in model) for kind in MODES
    ]
    walk = list(opened.walk())
    assert sorted(index for index, _ in walk) == list(range(opened.node_count))
    for (path, inner), (index, node) in zip(model, walk, strict=True):
        assert opened.path(index) == path
        assert opened.resolve(path) == index
        assert opened.node(index) == node == decode_node(opened.row(index))
        assert opened.name(node) == path.rpartition(b"/")[2]
        assert node.type == type_of(inner)
        match inner:
            case File(contents):
                assert node.is_file
                assert node.size == len(contents)
                assert read(opened, node, chunks, 0, len(contents)) == contents
            case Link(target):
                assert not node.is_file
                assert opened.target(node) == target
            case _:
                found = [opened.name(opened.node(i)) for i in opened.children(node)]
                assert found == sorted(inner)
                assert all(
                    opened.find(node, name) == i for name, i in zip(found, opened.children(node), strict=True)
                )
                assert all(opened.node(i).parent == index for i in opened.children(node))


@examples(150)
@given(directory_trees(), names(), st.binary(max_size=5))
def test_names_that_are_not_there_are_not_found(
    tree: Mapping[bytes, Tree], name: bytes, other: bytes
) -> None:
    opened = Manifest(manifest_of(tree)[0])
    root = opened.node(0)
    for candidate in (name, other, name[:-1], name + b"\0", b"", b".", b"..", b"\xff" * 300, name + b"/"):
        assert (opened.find(root, candidate) is not None) == (candidate in tree)


@examples(100)
@given(trees(), st.lists(st.one_of(names(), st.just(b"..")), max_size=4))
def test_paths_that_are_not_there_resolve_to_none(tree: Tree, parts: list[bytes]) -> None:
    opened = Manifest(manifest_of(tree)[0])
    here: Tree | None = tree
    for part in parts:
        here = here.get(part) if isinstance(here, Mapping) else None
    index = opened.resolve(b"/".join(parts))
    assert (index is None) == (here is None)
    if index is not None:
        assert opened.resolve(b"/./" + b"//".join(parts) + b"/.") == index


@examples(300)
@given(
    st.binary(max_size=400),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.integers(0, 500),
    st.integers(0, 500),
)
def test_a_read_equals_a_slice(contents: bytes, lengths: list[int], offset: int, size: int) -> None:
    data, chunks = manifest_of({b"before": File(b"12345"), b"it": File(contents)}, cut_by(lengths))
    opened = Manifest(data).validate()
    index = opened.resolve(b"it")
    assert index is not None
    node = opened.node(index)
    assert read(opened, node, chunks, offset, size) == contents[offset : offset + size]
    spans = list(opened.spans(node, offset, size))
    assert all(span.start < offset + size and span.end > offset for span in spans)
    assert all(a.end == b.start for a, b in itertools.pairwise(spans))
    assert list(opened.spans(node, offset)) == list(opened.spans(node, offset, len(contents) + 1))


def test_a_read_of_a_really_chunked_file_equals_a_slice() -> None:
    contents = counter_stream("file", 2_000_000) + bytes(1_000_000)
    cutter = Cutter(1 << 20)
    streamed = [c for piece in pieces_of(contents, [333_333]) for c in cutter.feed(piece)] + list(
        cutter.finish()
    )
    data, chunks = manifest_of(File(contents), real_cut)
    assert manifest_of(File(contents), lambda _: streamed)[0] == data
    opened = Manifest(data).validate()
    for offset in range(0, len(contents) + 100_000, 99_991):
        for size in (1, 4096, 131_072, 1 << 20, 1 << 40):
            assert read(opened, opened.node(0), chunks, offset, size) == contents[offset : offset + size]


@examples(100)
@given(trees())
def test_the_same_tree_has_the_same_bytes(tree: Tree) -> None:
    data, _ = manifest_of(tree)
    assert manifest_of(tree)[0] == data
    assert encoded_again(Manifest(data).validate()) == data


@examples(100)
@given(trees(), trees())
def test_another_tree_has_other_bytes(one: Tree, other: Tree) -> None:
    same = list(walked(one)) == list(walked(other))
    assert (manifest_of(one)[0] == manifest_of(other)[0]) == same


@examples(100)
@given(trees(), st.data())
def test_a_changed_byte_is_refused_or_says_another_tree(tree: Tree, draw: st.DataObject) -> None:
    data, _ = manifest_of(tree)
    for _ in range(10):
        changed = flipped(data, draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255)))
        try:
            opened = Manifest(changed).validate()
        except FormatError:
            continue
        assert encoded_again(opened) == changed


def test_every_changed_byte_of_a_sample_is_refused_or_says_another_tree() -> None:
    passed = 0
    for at in range(len(SAMPLE)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            changed = flipped(SAMPLE, at, mask)
            try:
                opened = Manifest(changed).validate()
            except FormatError:
                continue
            passed += 1
            assert encoded_again(opened) == changed
    digests_and_letters = 5 * 32 + 10 + 2  # the rest is structure, of which hardly anything can differ
    assert passed < 9 * digests_and_letters


def test_every_truncation_and_every_extension_is_refused() -> None:
    for end in range(len(SAMPLE)):
        with pytest.raises(FormatError):
            Manifest(SAMPLE[:end])
    with pytest.raises(FormatError, match="bytes where its header says"):
        Manifest(SAMPLE + b"\0")


Row = tuple[int, int, int, int, int, int, int, int, int]


def made_of(
    rows: list[Row],
    chunks: list[tuple[bytes, int]] | None = None,
    table: bytes = b"",
    total: int = 0,
    *,
    magic: bytes = b"cidfsmf1",
    zero: int = 0,
) -> bytes:
    """Return a manifest of any rows: name offset and length, type, zero, size, first, count, parent, zero."""
    entries = b"".join(struct.pack("<32sQ", *chunk) for chunk in chunks or [])
    header = struct.pack("<8sIIIIQ", magic, len(rows), len(chunks or []), len(table), zero, total)
    return header + b"".join(struct.pack("<IHBBQIIII", *row) for row in rows) + entries + table


ROOT: Row = (0, 0, DIRECTORY, 0, 0, 1, 1, 0, 0)
EMPTY_ROOT: Row = (0, 0, DIRECTORY, 0, 0, 0, 0, 0, 0)
D = bytes(32)


def child(name_offset: int = 0, name_length: int = 1, kind: int = FILE, **fields: int) -> Row:
    get = fields.get
    return (
        name_offset,
        name_length,
        kind,
        get("zero", 0),
        get("size", 0),
        get("first", 0),
        get("count", 0),
        get("parent", 0),
        get("zero2", 0),
    )


def root_of(count: int) -> Row:
    return (0, 0, DIRECTORY, 0, 0, 1 if count else 0, count, 0, 0)


def test_hand_made_manifests_that_are_right_are_accepted() -> None:
    assert made_of([EMPTY_ROOT]) == manifest_of({})[0]
    assert made_of([ROOT, child()], table=b"a") == manifest_of({b"a": File(b"")})[0]
    assert made_of([(0, 0, SYMLINK, 0, 3, 0, 0, 0, 0)], table=b"abc") == manifest_of(Link(b"abc"))[0]
    file = (0, 0, FILE, 0, 3, 0, 1, 0, 0)
    assert made_of([file], [(digest_of(b"abc"), 3)], total=3) == manifest_of(File(b"abc"))[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few for a header"),
        (made_of([EMPTY_ROOT], magic=b"cidfsmf2"), "no magic"),
        (made_of([EMPTY_ROOT], zero=1), "reserved bytes"),
        (made_of([]), "0 nodes"),
        (b"cidfsmf1" + struct.pack("<IIIIQ", (1 << 24) + 1, 0, 0, 0, 0), "16777217 nodes"),
        (b"cidfsmf1" + struct.pack("<IIIIQ", 1 << 24, 0, 0, 0, 0), "bytes where its header says"),
        (b"cidfsmf1" + struct.pack("<IIIIQ", 1, (1 << 32) - 1, (1 << 32) - 1, 0, 0), "where its header says"),
        (made_of([(0, 0, 0, 0, 0, 0, 0, 0, 0)]), "type 0"),
        (made_of([(0, 0, 5, 0, 0, 0, 0, 0, 0)]), "type 5"),
        (made_of([(0, 0, DIRECTORY, 1, 0, 0, 0, 0, 0)]), "node row"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 0, 0, 0, 1)]), "node row"),
        (made_of([(0, 1, DIRECTORY, 0, 0, 0, 0, 0, 0)], table=b"a"), "root has a name"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 0, 0, 1, 0)]), "root has a name or a parent"),
        (made_of([(1, 0, DIRECTORY, 0, 0, 0, 0, 0, 0)], table=b"a"), "name of node 0 is out of place"),
        (made_of([(1, 0, DIRECTORY, 0, 0, 0, 0, 0, 0)]), "name at 1 lies outside"),
        (made_of([(0, 0, DIRECTORY, 0, 1, 0, 0, 0, 0)]), "directory 0 is out of place"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 1, 0, 0, 0)]), "directory 0 is out of place"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 1, 1, 0, 0)]), "header does not fit"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 0, 1, 0, 0)]), "directory 0 is out of place"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 0, (1 << 32) - 1, 0, 0)]), "directory 0 is out of place"),
        (made_of([(0, 0, DIRECTORY, 0, 0, 1, (1 << 32) - 1, 0, 0)]), "header does not fit"),
        (made_of([EMPTY_ROOT], table=b"a"), "names that no node has"),
        (made_of([EMPTY_ROOT], [(D, 1)]), "header does not fit"),
        (made_of([EMPTY_ROOT], total=1), "header does not fit"),
        (made_of([ROOT, child(name_length=0)]), "node 1.*cannot be a name"),
        (made_of([ROOT, child()], table=b"."), "node 1.*cannot be a name"),
        (made_of([ROOT, child(name_length=2)], table=b".."), "node 1.*cannot be a name"),
        (made_of([ROOT, child()], table=b"/"), "node 1.*cannot be a name"),
        (made_of([ROOT, child(name_length=3)], table=b"a/b"), "node 1.*cannot be a name"),
        (made_of([ROOT, child()], table=b"\0"), "node 1.*cannot be a name"),
        (made_of([ROOT, child(name_length=256)], table=b"n" * 256), "node 1.*cannot be a name"),
        (made_of([ROOT, child(name_offset=1)], table=b"ab"), "name of node 1 is out of place"),
        (made_of([ROOT, child(parent=1)], table=b"a"), "stands before its parent"),
        (made_of([ROOT, child(parent=(1 << 32) - 1)], table=b"a"), "stands before its parent"),
        (made_of([EMPTY_ROOT, child()], table=b"a"), "not among its parent's children"),
        (made_of([root_of(2), child(), child(1, parent=1)], table=b"ab"), "not among its parent's children"),
        (made_of([root_of(2), child(), child(1)], table=b"ba"), "node 2 is out of order"),
        (made_of([root_of(2), child(), child(1)], table=b"aa"), "node 2 is out of order"),
        (
            made_of([root_of(1), child(kind=DIRECTORY, first=2, count=2), child(1, parent=1)], table=b"ab"),
            "fit",
        ),
        (made_of([root_of(1), child(kind=DIRECTORY, first=1, count=1)], table=b"a"), "directory 1 is out of"),
        (made_of([(0, 0, SYMLINK, 0, 0, 0, 0, 0, 0)]), "symlink 0 is out of place"),
        (made_of([(0, 0, SYMLINK, 0, 4096, 0, 0, 0, 0)], table=b"t" * 4096), "symlink 0 is out of place"),
        (made_of([(0, 0, SYMLINK, 0, 1 << 63, 0, 0, 0, 0)]), "symlink 0 is out of place"),
        (made_of([(0, 0, SYMLINK, 0, 1, 0, 1, 0, 0)], table=b"t"), "symlink 0 is out of place"),
        (made_of([(0, 0, SYMLINK, 0, 1, 1, 0, 0, 0)], table=b"tt"), "symlink 0 is out of place"),
        (made_of([(0, 0, SYMLINK, 0, 2, 0, 0, 0, 0)], table=b"t"), "lies outside"),
        (made_of([(0, 0, SYMLINK, 0, 2, 0, 0, 0, 0)], table=b"t\0"), "holds a zero byte"),
        (made_of([(0, 0, FILE, 0, 1, 0, 0, 0, 0)], total=1), "file 0 is out of place"),
        (made_of([(0, 0, FILE, 0, 0, 0, 1, 0, 0)], [(D, 1)]), "file 0 is out of place"),
        (made_of([(0, 0, FILE, 0, 0, 1, 0, 0, 0)]), "file 0 is out of place"),
        (made_of([(0, 0, FILE, 0, 1, 1, 1, 0, 0)], [(D, 1)] * 2, total=1), "file 0 is out of place"),
        (made_of([(0, 0, FILE, 0, 1, 0, 1, 0, 0)], total=1), "chunks outside the table"),
        (
            made_of([(0, 0, FILE, 0, 1, 0, (1 << 32) - 1, 0, 0)], [(D, 1)], total=1),
            "chunks outside the table",
        ),
        (made_of([(0, 0, FILE, 0, 2, 0, 1, 0, 0)], [(D, 1)], total=2), "end before their file"),
        (made_of([(0, 0, FILE, 0, 1, 0, 1, 0, 0)], [(D, 2)], total=1), "do not fill it"),
        (made_of([(0, 0, FILE, 0, 1, 0, 2, 0, 0)], [(D, 1), (D, 2)], total=1), "do not fill it"),
        (made_of([(0, 0, FILE, 0, 2, 0, 2, 0, 0)], [(D, 0), (D, 2)], total=2), "impossible length"),
        (made_of([(0, 0, FILE, 0, 2, 0, 2, 0, 0)], [(D, 2), (D, 2)], total=2), "do not fill it"),
        (made_of([(0, 0, FILE, 0, 3, 0, 3, 0, 0)], [(D, 2), (D, 1), (D, 3)], total=3), "impossible length"),
        (
            made_of([(0, 0, FILE, 0, MAXIMUM + 1, 0, 1, 0, 0)], [(D, MAXIMUM + 1)], total=MAXIMUM + 1),
            "impossible length",
        ),
        (made_of([(0, 0, FILE, 0, 1 << 63, 0, 1, 0, 0)], [(D, 1 << 63)], total=1 << 63), "impossible length"),
        (made_of([(0, 0, FILE, 0, 1, 0, 1, 0, 0)], [(D, 1)], total=2), "header does not fit"),
        (made_of([(0, 0, FILE, 0, 1, 0, 1, 0, 0)], [(D, 1), (D, 1)], total=1), "header does not fit"),
    ],
    ids=by_reason,
)
def test_a_wrong_manifest_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=f"(?s){reason}"):
        Manifest(data).validate()


def test_chunks_that_two_files_share_are_refused() -> None:
    file = {"size": 1, "first": 0, "count": 1}
    data = made_of([root_of(2), child(**file), child(1, **file)], [(D, 1)], b"ab", 2)
    with pytest.raises(FormatError, match="file 2 is out of place"):
        Manifest(data).validate()


def nested(depth: int, inner: Tree) -> Tree:
    for _ in range(depth):
        inner = {b"d": inner}
    return inner


@pytest.mark.parametrize("inner", [File(b"x"), Link(b"x"), {}])
def test_a_node_lies_in_at_most_max_depth_directories(inner: Tree) -> None:
    builder = ManifestBuilder()
    for _ in range(MAX_DEPTH):
        builder.enter(b"d" if builder.node_count else b"")
    deeper: list[None] = []
    match inner:
        case File():
            builder.file(b"x", False)
        case Link(target):
            builder.symlink(b"x", target)
        case _:
            builder.enter(b"x")
            deeper.append(None)
            with pytest.raises(FormatError, match="nested deeper"):
                builder.file(b"y", False)
            builder.leave()
    for _ in range(MAX_DEPTH):
        builder.leave()
    opened = Manifest(builder.encode()).validate()
    deepest = opened.node_count - 1
    assert opened.path(deepest).count(b"/") == MAX_DEPTH - 1
    assert opened.resolve(opened.path(deepest)) == deepest


def test_a_manifest_nested_too_deep_is_refused() -> None:
    rows = [(0, 0, DIRECTORY, 0, 0, 1, 1, 0, 0)]
    rows += [(i, 1, DIRECTORY, 0, 0, i + 2, 1, i, 0) for i in range(MAX_DEPTH)]
    rows += [(MAX_DEPTH, 1, DIRECTORY, 0, 0, 0, 0, MAX_DEPTH, 0)]
    with pytest.raises(FormatError, match="nested deeper than 1024"):
        Manifest(made_of(rows, table=b"d" * (MAX_DEPTH + 1))).validate()
    right = [*rows[:-2], (MAX_DEPTH - 1, 1, DIRECTORY, 0, 0, 0, 0, MAX_DEPTH - 1, 0)]
    Manifest(made_of(right, table=b"d" * MAX_DEPTH)).validate()


def test_a_walk_ends_where_directories_share_children_or_hold_themselves() -> None:
    itself = made_of([(0, 0, DIRECTORY, 0, 0, 0, 1, 0, 0)])
    with pytest.raises(FormatError, match="behind its children"):
        list(Manifest(itself).walk())
    back = made_of([root_of(1), child(kind=DIRECTORY, first=1, count=1)], table=b"a")
    with pytest.raises(FormatError):
        list(Manifest(back).walk())
    # Each directory claims all that follow: a naive walk visits 2^60 nodes.
    rows = (
        [root_of(60)] + [child(kind=DIRECTORY, first=i + 1, count=60 - i) for i in range(1, 60)] + [child()]
    )
    with pytest.raises(FormatError, match="not among its parent's children"):
        list(Manifest(made_of(rows, table=b"a")).walk())


def test_a_target_that_is_too_long_is_refused_unvalidated_too() -> None:
    opened = Manifest(made_of([(0, 0, SYMLINK, 0, 4096, 0, 0, 0, 0)], table=b"t" * 4096))
    with pytest.raises(FormatError, match="no symlink"):
        opened.target(opened.node(0))


def test_a_path_ends_where_parents_go_round() -> None:
    rows = [root_of(2), child(parent=2), child(parent=1)]
    opened = Manifest(made_of(rows, table=b"ab"))
    for index in (1, 2):
        with pytest.raises(FormatError, match="before its parent"):
            opened.path(index)


def test_positions_outside_the_tables_are_refused() -> None:
    opened = Manifest(SAMPLE)
    for index in (-1, opened.node_count, 1 << 40):
        for method in (opened.node, opened.row, opened.path):
            with pytest.raises(FormatError, match="manifest: node"):
                method(index)
    for index in (-1, opened.chunk_count, 1 << 40):
        with pytest.raises(FormatError, match="manifest: chunk"):
            opened.chunk(index)
    assert [opened.chunk(i)[1] for i in range(opened.chunk_count)] == [100, 100, 200, 250, 1]


def test_a_node_that_is_not_of_the_type_is_refused() -> None:
    opened = Manifest(SAMPLE)
    for index in range(opened.node_count):
        node = opened.node(index)
        if node.type != DIRECTORY:
            with pytest.raises(FormatError):
                opened.children(node)
            with pytest.raises(FormatError):
                opened.find(node, b"a")
        if node.type != SYMLINK:
            with pytest.raises(FormatError):
                opened.target(node)
        if not node.is_file:
            with pytest.raises(FormatError):
                list(opened.spans(node))


@pytest.mark.parametrize("length", [0, 1, 31])
def test_a_node_row_that_is_too_short_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match=f"{length} bytes where a node's row stands"):
        decode_node(bytes(length))
    with pytest.raises(FormatError, match=f"{length} bytes where a node's row stands"):
        decode_node(bytes(40), 40 - length)


def test_sizes_of_rows_are_those_of_the_format() -> None:
    assert (NODE_SIZE, ENTRY_SIZE) == (32, 40)
    assert MODES == {1: 0o040555, 2: 0o100444, 3: 0o100555, 4: 0o120777}


def test_a_tree_of_too_many_nodes_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (manifest, manifest_builder):
        monkeypatch.setattr(module, "MAX_NODES", 4)
    assert Manifest(manifest_of({b"a": File(b""), b"b": File(b""), b"c": File(b"")})[0]).node_count == 4
    with pytest.raises(FormatError, match="more than 4 files"):
        manifest_of({b"a": File(b""), b"b": File(b""), b"c": File(b""), b"d": File(b"")})


def test_a_manifest_that_is_too_large_is_neither_built_nor_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (manifest, manifest_builder):
        monkeypatch.setattr(module, "MAX_MANIFEST", len(SAMPLE))
    assert Manifest(manifest_of(SAMPLE_TREE)[0])
    for module in (manifest, manifest_builder):
        monkeypatch.setattr(module, "MAX_MANIFEST", len(SAMPLE) - 1)
    with pytest.raises(FormatError, match=f"of {len(SAMPLE)} bytes is larger than"):
        manifest_of(SAMPLE_TREE)
    with pytest.raises(FormatError, match=f"in {len(SAMPLE)} bytes"):
        Manifest(SAMPLE)


@pytest.mark.parametrize("digests", [b"", bytes(31), bytes(33), bytes(64)])
def test_a_manifest_without_the_digest_of_every_chunk_is_not_encoded(digests: bytes) -> None:
    builder = ManifestBuilder()
    builder.file(b"", False)
    builder.chunk(5)
    builder.digests += digests
    with pytest.raises(FormatError, match="bytes of digests for 1 chunks"):
        builder.encode()


@pytest.mark.parametrize("target", [b"", b"t" * 4096])
def test_a_symlink_without_a_possible_target_is_not_built(target: bytes) -> None:
    with pytest.raises(FormatError, match="target"):
        ManifestBuilder().symlink(b"", target)


def test_the_digests_may_come_later_than_the_nodes() -> None:
    builder = ManifestBuilder()
    builder.enter(b"")
    for name in (b"a", b"b"):
        builder.file(name, False)
        for _ in range(2):
            builder.chunk(100)
    builder.leave()
    assert (builder.node_count, builder.chunk_count) == (3, 4)
    builder.digests += b"".join(digest_of(c * 100) for c in (b"1", b"2", b"3", b"4"))
    tree = {b"a": File(b"1" * 100 + b"2" * 100), b"b": File(b"3" * 100 + b"4" * 100)}
    assert builder.encode() == manifest_of(tree, in_hundreds)[0]


def test_the_sample_vector_tree_is_breadth_first_and_sorted() -> None:
    opened = Manifest(manifest_of(MANIFEST_TREE, real_cut)[0])
    assert [opened.name(opened.node(i)) for i in range(opened.node_count)] == [
        b"",
        b"bin",
        b"empty",
        b"empty-dir",
        b"large",
        b"\xff",
        b"tool",
        b"tool-link",
    ]
