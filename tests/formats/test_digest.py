"""Digests and their text forms: round trips, and exactly one text for each digest."""

from __future__ import annotations

import base64
import contextlib

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import digest
from cidfs.formats.digest import (
    checksum,
    cid_text,
    digest_of,
    looks_like_cid,
    nix32_decode,
    nix32_encode,
    parse_cid,
    parse_sha256,
    sha256_text,
)
from cidfs.formats.store_path import parse_base_name
from tests.formats.support import examples, flipped

digests = st.binary(min_size=32, max_size=32)


@examples(50)
@given(st.binary(max_size=200))
def test_a_check_value_is_the_beginning_of_the_digest(data: bytes) -> None:
    assert digest_of(data) == blake3(data).digest()
    assert checksum(data) == digest_of(data)[:8]
    assert digest_of(memoryview(data)) == digest_of(bytearray(data)) == digest_of(data)


@examples(200)
@given(digests)
def test_a_cid_parses_to_its_digest(raw: bytes) -> None:
    text = cid_text(raw)
    assert len(text) == 59
    assert looks_like_cid(text)
    assert parse_cid(text) == raw


@examples(300)
@given(digests, st.integers(0, 58), st.characters(codec="ascii"))
def test_a_digest_has_one_cid_only(raw: bytes, at: int, character: str) -> None:
    text = cid_text(raw)
    other = text[:at] + character + text[at + 1 :]
    if other == text:
        return
    try:
        assert parse_cid(other) != raw
        assert cid_text(parse_cid(other)) == other
    except FormatError:
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "b",
        cid_text(bytes(32)).upper(),
        cid_text(bytes(32))[:-1],
        cid_text(bytes(32)) + "a",
        cid_text(bytes(32)) + "=",
        cid_text(bytes(32))[:-1] + "b",  # a spare bit
        cid_text(bytes(32))[:-1] + "1",
        cid_text(bytes(32))[:-1] + "\n",
        "z" + cid_text(bytes(32))[1:],
        "b" + base64.b32encode(b"\x01\x55\x12\x20" + bytes(32)).decode().rstrip("=").lower(),  # sha2-256
        "b" + base64.b32encode(b"\x01\x70\x1e\x20" + bytes(32)).decode().rstrip("=").lower(),  # dag-pb
        "b" + base64.b32encode(b"\x01\x55\x1e\x1f" + bytes(32)).decode().rstrip("=").lower(),
        "b" + "é" * 58,
        "b" + "٣" * 58,
    ],
)
def test_what_is_not_a_canonical_cid_is_refused(wrong: str) -> None:
    with pytest.raises(FormatError):
        parse_cid(wrong)


def test_no_store_path_looks_like_a_cid() -> None:
    name = "b" * 32 + "-" + "a" * 26
    assert len(name) == 59
    assert parse_base_name(name).base_name == name
    assert not looks_like_cid(name)


@examples(200)
@given(st.binary(max_size=70))
def test_nix32_decodes_to_what_was_encoded(raw: bytes) -> None:
    assert nix32_decode(nix32_encode(raw), len(raw)) == raw


@examples(300)
@given(st.text(alphabet="0123456789abcdfghijklmnpqrsvwxyz", min_size=32, max_size=32))
def test_every_hash_part_is_canonical_nix32(text: str) -> None:
    assert nix32_encode(nix32_decode(text, 20)) == text


@examples(200)
@given(digests, st.integers(0, 51), st.sampled_from("0123456789abcdfghijklmnpqrsvwxyzeotuA=- \n"))
def test_bytes_have_one_nix32_text_only(raw: bytes, at: int, character: str) -> None:
    text = nix32_encode(raw)
    other = text[:at] + character + text[at + 1 :]
    try:
        assert nix32_encode(nix32_decode(other, 32)) == other
    except FormatError:
        assert other != text


@pytest.mark.parametrize(
    ("text", "size", "reason"),
    [
        ("0" * 51, 32, "length"),
        ("0" * 53, 32, "length"),
        ("", 32, "length"),
        ("2" + "0" * 51, 32, "spare bits"),
        ("z" * 52, 32, "spare bits"),
        ("e" + "0" * 51, 32, "not a digit"),
        ("A" * 52, 32, "not a digit"),
        ("é" * 52, 32, "not a digit"),
    ],
)
def test_what_is_not_canonical_nix32_is_refused(text: str, size: int, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        nix32_decode(text, size)


@examples(200)
@given(digests)
def test_every_notation_of_a_sha256_says_the_same(raw: bytes) -> None:
    base64_text = base64.b64encode(raw).decode()
    for text in (
        sha256_text(raw),
        nix32_encode(raw),
        raw.hex(),
        f"sha256:{raw.hex()}",
        f"sha256:{base64_text}",
        f"sha256-{base64_text}",
    ):
        assert parse_sha256(text) == raw


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "sha256:",
        "sha256-",
        "sha512:" + "0" * 128,
        "sha1:" + "0" * 40,
        "sha256:" + "ab " * 21 + "a",  # what fromhex would take for 21 bytes
        "sha256:" + " " * 64,
        "sha256:" + "0" * 63,
        "sha256:" + "g" * 64,
        "sha256:" + "٣" * 64,
        "sha256:" + "A" * 44,  # 33 bytes
        "sha256:" + "A" * 42 + "==",  # 31 bytes
        "sha256:" + "A" * 42 + "=A",
        "sha256-" + "-" * 43 + "=",
        "sha256-" + "0" * 64,
        "sha256-" + "0" * 52,
        "sha256:sha256:" + "0" * 64,
        " " + "0" * 64,
    ],
)
def test_what_is_no_sha256_is_refused(wrong: str) -> None:
    with pytest.raises(FormatError, match="not a SHA-256"):
        parse_sha256(wrong)


@examples(300)
@given(st.text(max_size=70) | st.text(alphabet="0123456789abcdfghijklmnpqrsvwxyzAB=+/- :", max_size=70))
def test_any_text_gives_a_digest_or_a_format_error(text: str) -> None:
    for parse in (parse_cid, parse_sha256, lambda t: nix32_decode(t, 32)):
        for given_text in (text, "sha256:" + text, "b" + text):
            with contextlib.suppress(FormatError):
                assert len(parse(given_text)) == digest.DIGEST_SIZE


def test_the_digest_moves_with_every_bit() -> None:
    data = bytes(range(64))
    seen = {digest_of(flipped(data, at, 1 << bit)) for at in range(64) for bit in range(8)}
    assert len(seen | {digest_of(data)}) == 64 * 8 + 1
