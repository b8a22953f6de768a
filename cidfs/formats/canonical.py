"""What canonical forms of metadata are written in: little-endian numbers, texts with their lengths.

For path records and realisations. Bounds are checked before anything is taken, and every error says which
form it is of. Pure; a Reader belongs to one decoding.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Sequence
from typing import Final

from cidfs.errors import FormatError

U16: Final = struct.Struct("<H")
U32: Final = struct.Struct("<I")
U64: Final = struct.Struct("<Q")
MAX_SIGNATURES: Final = 1000
_PRINTABLE: Final = re.compile(rb"[ -~]*")


def text(what: str, value: str) -> bytes:
    """Return a text as it is written: u16 length and ASCII bytes; raise FormatError for what is none."""
    try:
        raw = value.encode("ascii")
    except UnicodeEncodeError:
        raise FormatError(f"{what}: {value[:80]!r} is not ASCII") from None
    if len(raw) > 0xFFFF:
        raise FormatError(f"{what}: a text of {len(raw)} bytes")
    return U16.pack(len(raw)) + raw


def signatures(what: str, group: Sequence[str]) -> bytes:
    """Return signatures as they are written: u16 count and texts."""
    if len(group) > MAX_SIGNATURES:
        raise FormatError(f"{what}: {len(group)} signatures")
    return U16.pack(len(group)) + b"".join(text(what, each) for each in group)


class Reader:
    """Takes one field after the other; raises FormatError for what does not fit."""

    def __init__(self, what: str, data: bytes) -> None:
        self.what = what
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if self.at + count > len(self.data):
            raise FormatError(f"{self.what}: ends too early, at byte {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: struct.Struct) -> int:
        """Return the next number."""
        value: int = form.unpack(self.take(form.size))[0]
        return value

    def text(self) -> str:
        """Return the next text, of printable ASCII."""
        start = self.at
        raw = self.take(self.number(U16))
        if not _PRINTABLE.fullmatch(raw):
            raise FormatError(f"{self.what}: a text that is not printable ASCII, at byte {start}")
        return raw.decode()

    def count(self, form: struct.Struct, each: int) -> int:
        """Return the next count of items, each at least so many bytes long."""
        value = self.number(form)
        if value * each > len(self.data) - self.at:
            raise FormatError(f"{self.what}: {value} items do not fit, at byte {self.at}")
        return value

    def texts(self, form: struct.Struct) -> tuple[str, ...]:
        """Return the next texts, ascending and none twice."""
        found = tuple(self.text() for _ in range(self.count(form, 2)))
        self.ascending(found)
        return found

    def ascending(self, found: Sequence[str]) -> None:
        """Raise FormatError for a list that was read and is not ascending, or has something twice."""
        if any(a >= b for a, b in itertools.pairwise(found)):
            raise FormatError(f"{self.what}: a list that is not sorted, before byte {self.at}")

    def signatures(self) -> tuple[str, ...]:
        """Return the next signatures."""
        found = self.texts(U16)
        if len(found) > MAX_SIGNATURES:
            raise FormatError(f"{self.what}: {len(found)} signatures")
        return found

    def end(self) -> None:
        """Raise FormatError when anything is left."""
        if self.at != len(self.data):
            raise FormatError(f"{self.what}: bytes after its end, at byte {self.at}")
