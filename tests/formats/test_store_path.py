"""Store paths: which names are valid, and that every text is read back or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats.store_path import (
    MAX_NAME,
    StorePath,
    check_hash_part,
    check_name,
    fixed_output_path,
    parse_base_name,
    parse_store_path,
)
from tests.formats.support import examples

HASH_PART = "0123456789abcdfghijklmnpqrsvwxyz"
hash_parts = st.text(alphabet=HASH_PART, min_size=32, max_size=32)
NAME_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-._?="


def is_valid(name: str) -> bool:
    """The rule in other words than the code's: Nix 2.34, libstore/path.cc, checkName."""
    if not 1 <= len(name) <= 211 or set(name) - set(NAME_CHARACTERS):
        return False
    return name.split("-")[0] not in (".", "..")


valid_names = st.text(alphabet=NAME_CHARACTERS, min_size=1, max_size=30).filter(is_valid)


@examples(300)
@given(
    st.text(max_size=8) | st.text(alphabet=".-a", max_size=6) | st.text(alphabet="+?=_/ \n\0é", max_size=3)
)
def test_a_name_is_valid_exactly_when_nix_takes_it(name: str) -> None:
    if is_valid(name):
        assert check_name(name) == name
    else:
        with pytest.raises(FormatError):
            check_name(name)


def test_a_name_has_at_most_211_characters() -> None:
    assert MAX_NAME == 211
    assert check_name("n" * 211)
    with pytest.raises(FormatError, match="longer than 211"):
        check_name("n" * 212)


def test_a_name_with_a_newline_at_its_end_is_refused() -> None:
    with pytest.raises(FormatError):
        check_name("name\n")
    with pytest.raises(FormatError):
        check_hash_part(HASH_PART + "\n")


@examples(200)
@given(hash_parts, valid_names, st.sampled_from(["/nix/store", "/other/store", "/a/b/c/d"]))
def test_a_store_path_is_read_back(hash_part: str, name: str, store_dir: str) -> None:
    path = StorePath(hash_part, name)
    assert check_hash_part(hash_part) == hash_part
    assert parse_base_name(path.base_name) == path
    assert parse_store_path(path.full(store_dir), store_dir) == path
    assert parse_store_path(path.base_name, store_dir) == path
    assert path.full(store_dir) == f"{store_dir}/{hash_part}-{name}" == f"{store_dir}/{path}"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "/",
        "/nix/store",
        "/nix/store/",
        f"/nix/storeage/{HASH_PART}-a",
        f"/nix/storeX{HASH_PART}-a",
        f"/other/{HASH_PART}-a",
        f"/nix/store/{HASH_PART}-a/b",
        f"/nix/store//{HASH_PART}-a",
        f"/nix/store/../{HASH_PART}-a",
        f"nix/store/{HASH_PART}-a",
        HASH_PART,
        f"{HASH_PART}-",
        f"{HASH_PART}-..",
        f"{HASH_PART}_a",
        f"{HASH_PART[:-1]}-a",
        f"{HASH_PART}0-a",
        f"{HASH_PART[:-1]}e-a",
        f"{HASH_PART.upper()}-a",
        f"{HASH_PART[:-1]}\0-a",
        f"{HASH_PART}-a\0",
        "٣" * 32 + "-a",
    ],
)
def test_what_is_no_store_path_is_refused(wrong: str) -> None:
    with pytest.raises(FormatError):
        parse_store_path(wrong)


@pytest.mark.parametrize(
    "wrong", ["", HASH_PART[1:], HASH_PART + "0", "e" * 32, "Z" * 32, "0" * 31 + "/", "é" * 32]
)
def test_what_is_no_hash_part_is_refused(wrong: str) -> None:
    with pytest.raises(FormatError, match="hash part"):
        check_hash_part(wrong)


@examples(300)
@given(
    st.text(max_size=80), st.sampled_from(["", f"{HASH_PART}-", "/nix/store/", f"/nix/store/{HASH_PART}-"])
)
def test_any_text_is_a_store_path_or_a_format_error(text: str, before: str) -> None:
    try:
        path = parse_store_path(before + text)
    except FormatError:
        return
    assert (before + text).rstrip("/").endswith(path.base_name)


@examples(100)
@given(st.binary(min_size=32, max_size=32), valid_names)
def test_a_fixed_output_path_depends_on_contents_name_and_store(nar_sha256: bytes, name: str) -> None:
    made = fixed_output_path(nar_sha256, name)
    assert parse_base_name(made.base_name) == made
    others = [
        fixed_output_path(bytes(32) if nar_sha256 != bytes(32) else bytes(31) + b"\1", name),
        fixed_output_path(nar_sha256, name, "/other/store"),
        fixed_output_path(nar_sha256, name + "x"),
    ]
    assert made.hash_part not in [other.hash_part for other in others]
