"""The committed vectors: a change of ours or of a library's that moves a format's bytes is noticed here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cidfs.errors import FormatError
from cidfs.formats import chunking, frames, journal, pack, realisation, record
from cidfs.formats.digest import (
    cid_text,
    digest_of,
    nix32_decode,
    nix32_encode,
    parse_cid,
    parse_sha256,
    sha256_text,
)
from cidfs.formats.manifest import Manifest
from cidfs.formats.store_path import check_name, fixed_output_ca, fixed_output_path, parse_store_path
from tests.formats import make_vectors
from tests.formats.make_vectors import (
    AWKWARD_TREE,
    ENTRIES,
    FROM_NIX,
    FROZEN,
    FROZEN_DATA,
    FULL_REALISATION,
    FULL_RECORD,
    GENERATED,
    MANIFEST_TREE,
    SMALL_REALISATION,
    SMALL_RECORD,
    STREAMS,
    real_cut,
)
from tests.formats.model import File, Link, events_of, nar_of, read_nar, walked
from tests.formats.support import VECTORS, read_hex


def read_json(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


@pytest.mark.parametrize("name", GENERATED)
def test_a_vector_is_made_from_its_literals_byte_for_byte(name: str) -> None:
    assert GENERATED[name]() == (VECTORS / name).read_bytes()


def test_every_vector_is_small_and_accounted_for() -> None:
    sizes = {path.name: path.stat().st_size for path in VECTORS.iterdir()}
    assert set(sizes) == {*GENERATED, *FROZEN, *FROM_NIX}
    assert max(sizes.values()) < 20_000


def test_writing_the_vectors_anew_changes_none(tmp_path: Path) -> None:
    make_vectors.main(tmp_path)
    for name in GENERATED:
        assert (tmp_path / name).read_bytes() == (VECTORS / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {*GENERATED, *FROZEN}


def test_digests_are_those_that_blake3_publishes() -> None:
    # From the BLAKE3 paper's test vectors, and of "abc".
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    one = "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"
    abc = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert [digest_of(data).hex() for data in (b"", b"\0", b"abc")] == [empty, one, abc]


def test_cids_of_the_vector_parse_to_their_digests() -> None:
    vector = read_json("digests.json")
    assert list(vector) == list(STREAMS)
    for name, data in STREAMS.items():
        assert parse_cid(vector[name]["cid"]) == digest_of(data) == bytes.fromhex(vector[name]["blake3"])
        assert vector[name]["cid"].startswith("bafkr4i")  # CIDv1, raw, blake3-256


def test_nix32_is_what_nix_says() -> None:
    for pair in read_json("nix32.json"):
        raw = bytes.fromhex(pair["base16"])
        assert nix32_encode(raw) == pair["nix32"]
        assert nix32_decode(pair["nix32"], len(raw)) == raw


def test_sha256_notations_are_those_that_nix_reads() -> None:
    vector = read_json("sha256.json")
    same = vector["the same digest"]
    digest = bytes.fromhex(same["base16"])
    assert sha256_text(digest) == f"sha256:{same['nix32']}"
    for text in [*same.values(), *vector["accepted for it"]]:
        assert parse_sha256(text) == digest, text
    for text in vector["refused"]:
        with pytest.raises(FormatError):
            parse_sha256(text)


def test_store_paths_are_those_that_nix_computes() -> None:
    vector = read_json("store-paths.json")
    for case in vector["paths"]:
        made = fixed_output_path(bytes.fromhex(case["nar_sha256"]), case["name"], case["store_dir"])
        assert made.full(case["store_dir"]) == case["path"]
        assert parse_store_path(case["path"], case["store_dir"]) == made
        assert parse_store_path(made.base_name) == made
    for digest, address in vector["content addresses"].items():
        assert fixed_output_ca(bytes.fromhex(digest)) == address


def test_store_path_names_that_nix_refuses_are_refused() -> None:
    for name in read_json("store-paths.json")["names that Nix refuses"]:
        with pytest.raises(FormatError):
            check_name(name)
        with pytest.raises(FormatError):
            fixed_output_path(bytes(32), name)


def test_the_nar_that_nix_dumped_is_written_and_read_alike() -> None:
    dumped = (VECTORS / "awkward-tree.nar").read_bytes()
    assert nar_of(AWKWARD_TREE) == dumped
    assert list(read_nar([dumped])) == list(events_of(AWKWARD_TREE))
    assert list(read_nar(dumped[i : i + 1] for i in range(len(dumped)))) == list(events_of(AWKWARD_TREE))
    case = read_json("store-paths.json")["paths"][0]
    assert hashlib.sha256(dumped).hexdigest() == case["nar_sha256"] == FULL_RECORD.nar_hash.hex()
    assert len(dumped) == FULL_RECORD.nar_size


def test_cut_points_are_those_of_the_vector() -> None:
    vector = read_json("cuts.json")
    assert vector["parameters"] == chunking.PARAMETERS
    for name, data in STREAMS.items():
        lengths = [int(n) for n in vector["lengths"][name].split()]
        assert [n for _, n in chunking.cut(data)] == lengths, name
        assert sum(lengths) == len(data)


def test_a_frozen_zstd_frame_unpacks() -> None:
    data = FROZEN_DATA["zstd.hex"]
    assert chunking.decode(chunking.ENCODING_ZSTD, read_hex("zstd.hex"), len(data)) == data


def test_a_frozen_compressed_frame_is_read() -> None:
    frame, data = read_hex("frame-zstd.hex"), FROZEN_DATA["frame-zstd.hex"]
    header = frames.read_header(frame)
    assert header == frames.Header(
        frames.KIND_CHUNK, chunking.ENCODING_ZSTD, len(frame) - 56, len(data), digest_of(data)
    )
    assert frames.read_data(frame, header) == data
    assert list(frames.scan(frame)) == [frames.Found(0, header, data)]


def test_the_frames_of_the_vector_are_found_and_the_damaged_one_is_a_gap() -> None:
    found = list(frames.scan(read_hex("frames-raw.hex")))
    assert [(f.header.kind, f.data) for f in found if isinstance(f, frames.Found)] == [
        (frames.KIND_CHUNK, b"a chunk"),
        (frames.KIND_MANIFEST, b"a manifest"),
        (frames.KIND_FOOTER, b"a footer"),
        (frames.KIND_JOURNAL, b"a journal entry"),
        (frames.KIND_CHUNK, b""),
    ]
    (gap,) = (g for g in found if isinstance(g, frames.Gap))
    assert gap.end - gap.offset == frames.HEADER_SIZE + len(b"damaged")


def test_the_pack_of_the_vector_is_read_by_its_footer_as_by_a_scan() -> None:
    data = read_hex("pack.hex")
    assert data[:16] == pack.HEADER == b"cidfs-pack-v1\n\0\0"
    place = pack.read_trailer(data[-pack.TRAILER_SIZE :], len(data))
    assert place is not None
    offset, size = place
    rows = pack.read_footer(data[offset : offset + size], offset)
    assert [(r.kind, r.encoding, r.length) for r in rows] == [(1, 0, 7), (1, 1, 8700), (2, 0, 137)]
    found = [f for f in frames.scan(data, 16) if isinstance(f, frames.Found)]
    assert rows == [pack.row_of(f.offset, f.header) for f in found if f.header.kind != frames.KIND_FOOTER]
    assert Manifest(found[2].data).validate().node_count == 2


@pytest.mark.parametrize("name", ENTRIES)
def test_the_journal_entries_of_the_vector_are_read(name: str) -> None:
    body = bytes.fromhex(read_json("journal.json")[name])
    assert journal.decode(body) == journal.Transaction(ENTRIES[name], "checkpoint" in name)


def test_the_manifest_of_the_vector_says_its_tree() -> None:
    opened = Manifest(read_hex("manifest.hex")).validate()
    assert cid_text(digest_of(read_hex("manifest.hex"))).startswith("bafkr4i")
    told = {}
    for index, node in opened.walk():
        if node.is_file:
            told[opened.path(index)] = b"".join(span.digest for span in opened.spans(node))
        else:
            told[opened.path(index)] = opened.target(node) if node.type == 4 else b"directory"
    expected = {}
    for path, tree in walked(MANIFEST_TREE):
        match tree:
            case File(data):
                expected[path] = b"".join(map(digest_of, real_cut(data)))
            case Link(target):
                expected[path] = target
            case _:
                expected[path] = b"directory"
    assert told == expected
    large = opened.resolve(b"large")
    assert large is not None
    assert opened.node(large).count > 3


def test_the_records_of_the_vector_are_read() -> None:
    assert record.decode(read_hex("record-small.hex")) == SMALL_RECORD
    assert record.decode(read_hex("record-full.hex")) == FULL_RECORD


def test_the_realisations_of_the_vector_are_read() -> None:
    assert realisation.decode(read_hex("realisation-small.hex")) == SMALL_REALISATION
    assert realisation.decode(read_hex("realisation-full.hex")) == FULL_REALISATION
