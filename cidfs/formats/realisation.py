"""Realisations: which store path an output of a content-addressed derivation came to.

Nix keeps one for each output that it built, and asks for it by an id. That is one of

    sha256:<64 hexadecimal digits>!<output>   the derivation's hash, of Nix up to 2.34
    <base name of the derivation>!<output>    its store path, of Nix from 2.35 on

One canonical form; what decodes encodes alike. Integers little-endian, texts as u16 length and bytes:

    "cidfsrea1" · id text · base name of the output path text · u16 count, signatures: texts, sorted, unique ·
    u32 count, realisations that this one depends on: id text and base name text each, ids sorted, unique

Pure; values are frozen.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from cidfs.errors import FormatError
from cidfs.formats.canonical import MAX_SIGNATURES, U32, Reader, signatures, text
from cidfs.formats.digest import digest_of
from cidfs.formats.store_path import StorePath, check_name, parse_base_name

MAGIC: Final = b"cidfsrea1"
MAX_SIZE: Final = 16 << 20
_WHAT: Final = "realisation"  # in errors
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")


class Realisation(msgspec.Struct, frozen=True, kw_only=True):
    """What an output came to. path: a base name; dependent: id and base name of others."""

    id: str
    path: str
    signatures: tuple[str, ...] = ()
    dependent: tuple[tuple[str, str], ...] = ()

    @property
    def store_path(self) -> StorePath:
        """The output path."""
        return parse_base_name(self.path)


def id_of(derivation: str, output: str) -> str:
    """Return the id of a derivation's output. derivation: its hash as `sha256:<hex>`, or its base name."""
    return check_id(f"{derivation}!{output}")


def check_id(value: str) -> str:
    """Return an id as it is; raise FormatError for what is none."""
    derivation, mark, output = value.partition("!")
    try:
        if not mark:
            raise FormatError("has no output")
        check_name(output)
        if not _HASH.fullmatch(derivation) and not parse_base_name(derivation).name.endswith(".drv"):
            raise FormatError("is of no derivation")
    except FormatError as e:
        raise FormatError(f"realisation: {value[:80]!r} is not an id: {e}") from None
    return value


def key_of(value: str) -> bytes:
    """Return the key that a realisation has in the index: the BLAKE3 of its id."""
    return digest_of(value.encode())


def encode(value: Realisation) -> bytes:
    """Return a realisation's canonical bytes; raise FormatError for one that decode would refuse."""
    whole = b"".join(
        (
            MAGIC,
            text(_WHAT, value.id),
            text(_WHAT, value.path),
            signatures(_WHAT, value.signatures),
            U32.pack(len(value.dependent)),
            *(text(_WHAT, part) for pair in value.dependent for part in pair),
        )
    )
    if decode(whole) != value:
        raise FormatError(f"realisation: the one of {value.id} is not in canonical form")
    return whole


def decode(data: bytes) -> Realisation:
    """Return the realisation of canonical bytes; raise FormatError for all others."""
    if len(data) > MAX_SIZE:
        raise FormatError(f"realisation: {len(data)} bytes")
    r = Reader(_WHAT, data)
    if r.take(len(MAGIC)) != MAGIC:
        raise FormatError("realisation: no magic")
    key, path = _pair(r)
    signed = r.signatures()
    dependent = tuple(_pair(r) for _ in range(r.count(U32, 4)))
    r.ascending([each for each, _ in dependent])
    r.end()
    return Realisation(id=key, path=path, signatures=signed, dependent=dependent)


def _pair(r: Reader) -> tuple[str, str]:
    key, path = check_id(r.text()), r.text()
    parse_base_name(path)
    return key, path


def difference(old: Realisation, new: Realisation) -> str:
    """Say in what two realisations of one output contradict each other; empty where they do not."""
    if old.path != new.path:
        return f"came to {old.path}, not to {new.path}"
    if old.dependent and new.dependent and old.dependent != new.dependent:
        return "depends on other realisations"
    return ""


def merge(old: Realisation, new: Realisation) -> Realisation:
    """Return the old realisation with the signatures, and what it depends on, that only the new one has.

    Of two that contradict each other it is the old one as it is.
    """
    if difference(old, new):
        return old
    more = [each for each in new.signatures if each not in old.signatures]
    joined = sorted([*old.signatures, *more[: MAX_SIGNATURES - len(old.signatures)]])
    return msgspec.structs.replace(old, signatures=tuple(joined), dependent=old.dependent or new.dependent)
