"""Realisations: one canonical form, ids as Nix has them, and what two of one output come to."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import realisation
from cidfs.formats.canonical import MAX_SIGNATURES
from cidfs.formats.digest import digest_of
from cidfs.formats.realisation import MAGIC, Realisation, check_id, decode, difference, encode, id_of, merge
from cidfs.formats.store_path import StorePath
from tests.formats.make_vectors import FULL_REALISATION, SMALL_REALISATION
from tests.formats.support import by_reason, examples, flipped
from tests.formats.test_record import base_names, lists, printable
from tests.formats.test_store_path import hash_parts, valid_names

HASH = "sha256:" + "0123456789abcdef" * 4
BASE = "0" * 32 + "-a"
A_OUT, B_OUT = f"{HASH}!a".encode(), f"{HASH}!b".encode()
FULL = encode(FULL_REALISATION)

ids = st.one_of(
    st.builds(
        lambda raw, output: f"sha256:{raw.hex()}!{output}", st.binary(min_size=32, max_size=32), valid_names
    ),
    st.builds(lambda h, name, output: f"{h}-{name}.drv!{output}", hash_parts, valid_names, valid_names),
)
realisations = st.builds(
    Realisation,
    id=ids,
    path=base_names,
    signatures=lists(printable),
    dependent=st.dictionaries(ids, base_names, max_size=4).map(lambda d: tuple(sorted(d.items()))),
)


def changed(**fields: object) -> Realisation:
    return msgspec.structs.replace(FULL_REALISATION, **fields)


def text(value: bytes) -> bytes:
    return struct.pack("<H", len(value)) + value


def raw(
    identity: bytes = BASE.encode() + b".drv!out",
    path: bytes = BASE.encode(),
    signatures: tuple[bytes, ...] = (),
    dependent: tuple[bytes, ...] = (),
    after: bytes = b"",
) -> bytes:
    signed = struct.pack("<H", len(signatures)) + b"".join(map(text, signatures))
    others = struct.pack("<I", len(dependent) // 2) + b"".join(map(text, dependent))
    return MAGIC + text(identity) + text(path) + signed + others + after


@examples(200)
@given(realisations)
def test_a_realisation_is_read_back(value: Realisation) -> None:
    data = encode(value)
    assert decode(data) == value
    assert encode(decode(data)) == data
    assert decode(data).store_path.base_name == value.path


@examples(100)
@given(realisations, st.data())
def test_a_changed_byte_is_refused_or_says_something_else(value: Realisation, draw: st.DataObject) -> None:
    data = encode(value)
    for _ in range(10):
        other = flipped(data, draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255)))
        try:
            told = decode(other)
        except FormatError:
            continue
        assert told != value
        assert encode(told) == other


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends too early"),
        (b"cidfsrec1" + raw()[9:], "no magic"),
        (raw()[:-1], "ends too early"),
        (raw(after=b"\0"), "bytes after its end"),
        (raw(identity=b""), "is not an id: has no output"),
        (raw(identity=b"\xff!out"), "not printable ASCII"),
        (raw(path=b"a"), "not a store path"),
        (raw(path=b"/nix/store/" + BASE.encode()), "not a store path"),
        (raw(signatures=(b"b", b"a")), "not sorted"),
        (raw(signatures=(b"a", b"a")), "not sorted"),
        (raw(signatures=tuple(b"%05d" % i for i in range(MAX_SIGNATURES + 1))), "1001 signatures"),
        (raw(dependent=(b"x!out", BASE.encode())), "is not an id"),
        (raw(dependent=(A_OUT, b"x")), "not a store path"),
        (raw(dependent=(B_OUT, BASE.encode(), A_OUT, BASE.encode())), "not sorted"),
        (raw(dependent=(A_OUT, BASE.encode()) * 2), "not sorted"),
        (raw()[:-4] + b"\xff\xff\xff\xff", "4294967295 items do not fit"),
    ],
    ids=by_reason,
)  # fmt: skip
def test_a_wrong_realisation_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        decode(data)


@pytest.mark.parametrize("identity", [f"{HASH}!out", f"{BASE}.drv!out", f"{BASE}.drv!a.b-c_d?=+1"])
def test_an_id_is_taken_as_it_is(identity: str) -> None:
    assert check_id(identity) == identity
    derivation, _, output = identity.partition("!")
    assert id_of(derivation, output) == identity
    assert realisation.key_of(identity) == digest_of(identity.encode())


@pytest.mark.parametrize(
    "identity",
    [
        "", "!", "out", f"{HASH}", f"{HASH}!", f"{HASH}^out", f"{HASH}!a!b", f"{HASH}!a b", f"{HASH}!a/b",
        "!out", f"{HASH.upper()}!out", f"{HASH}0!out", f"{HASH[:-1]}!out", f"sha512:{'0' * 128}!out",
        f"{BASE}!out", f"/nix/store/{BASE}.drv!out", f"{BASE}.drv!", "é!out",
    ],
)  # fmt: skip
def test_what_is_no_id_is_neither_written_nor_read(identity: str) -> None:
    with pytest.raises(FormatError):
        check_id(identity)
    with pytest.raises(FormatError):
        encode(changed(id=identity))
    with pytest.raises(FormatError):
        decode(raw(identity=identity.encode()))


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "a"},
        {"path": "é"},
        {"signatures": ("b", "a")},
        {"signatures": ("two\nlines",)},
        {"signatures": ("s" * 65536,)},
        {"signatures": tuple(f"{i:05}" for i in range(MAX_SIGNATURES + 1))},
        {"dependent": FULL_REALISATION.dependent[::-1]},
        {"dependent": FULL_REALISATION.dependent[:1] * 2},
        {"dependent": ((f"{HASH}!out", "a"),)},
    ],
)
def test_a_realisation_that_could_not_be_read_again_is_not_written(fields: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        encode(changed(**fields))


def test_a_realisation_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realisation, "MAX_SIZE", len(FULL))
    assert decode(FULL) == FULL_REALISATION
    monkeypatch.setattr(realisation, "MAX_SIZE", len(FULL) - 1)
    with pytest.raises(FormatError, match=f"realisation: {len(FULL)} bytes"):
        decode(FULL)


def test_signatures_are_joined_and_what_it_depends_on_is_added() -> None:
    bare = changed(signatures=("m:1",), dependent=())
    both = tuple(sorted((*FULL_REALISATION.signatures, "m:1")))
    for old, new in ((bare, FULL_REALISATION), (FULL_REALISATION, bare)):
        assert difference(old, new) == ""
        assert merge(old, new) == changed(signatures=both)
    assert merge(FULL_REALISATION, FULL_REALISATION) == FULL_REALISATION


@pytest.mark.parametrize(
    "fields",
    [{"path": SMALL_REALISATION.path}, {"dependent": FULL_REALISATION.dependent[:1]}],
    ids=["another path", "other realisations"],
)
def test_of_two_that_contradict_each_other_the_first_stays(fields: dict[str, object]) -> None:
    other = changed(signatures=("z:1",), **fields)
    assert difference(FULL_REALISATION, other) != ""
    assert merge(FULL_REALISATION, other) == FULL_REALISATION
    assert merge(other, FULL_REALISATION) == other


@examples(100)
@given(realisations, lists(printable))
def test_a_merge_is_canonical_and_the_same_a_second_time(
    value: Realisation, signatures: tuple[str, ...]
) -> None:
    once = merge(value, msgspec.structs.replace(value, signatures=signatures))
    assert set(once.signatures) == {*value.signatures, *signatures}
    assert decode(encode(once)) == once
    assert merge(once, msgspec.structs.replace(value, signatures=signatures)) == once


def test_no_more_signatures_are_joined_than_can_be_kept() -> None:
    many = tuple(f"{i:05}" for i in range(MAX_SIGNATURES - 1))
    once = merge(changed(signatures=many), changed(signatures=("00000a", "00000b")))
    assert once.signatures == tuple(sorted((*many, "00000a")))
    assert merge(once, changed(signatures=("00000a", "00000b"))) == once
    assert decode(encode(once)) == once


def test_the_output_path_is_a_store_path() -> None:
    assert SMALL_REALISATION.store_path == StorePath("fk92h4hwm5993g6ii3sgm5mxx53pvvx4", "tool-1")
