"""Content addresses: the store path that one leads to, and whether contents are those that it stands for.

Pure. `text:sha256:H` is of a file's bytes, `fixed:A:H` of a file's bytes (flat), `fixed:r:A:H` of the NAR, A
being the algorithm. Rules as in Nix 2.34 (`libstore/content-address.cc`, `store-dir-config.cc`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from cidfs.errors import FormatError
from cidfs.formats import nar
from cidfs.formats.digest import nix32_decode
from cidfs.formats.store_path import StorePath, made_path

_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}
_PROVING: Final = ("sha256", "sha512")  # the older ones have collisions: anyone may have two contents of one
_PREFIXES: Final = {"flat": "", "nar": "r:", "git": "git:"}


@dataclass(frozen=True, slots=True)
class ContentAddress:
    """How contents are hashed (`text`, `flat`, `nar`, `git`), by what, and the hash."""

    method: Literal["text", "flat", "nar", "git"]
    algorithm: str
    digest: bytes

    def proves(self, own: bool) -> bool:
        """Say whether contents can be held against it; own says that they refer to their own path.

        Those that do are hashed with zeros for the own hash part, so that there are others of the same hash.
        """
        return self.method != "git" and self.algorithm in _PROVING and not own


def parse_content_address(text: str) -> ContentAddress:
    """Return the content address of Nix's notation; raise FormatError, also for kinds not known here."""
    match text.split(":"):
        case ["text", "sha256" as algorithm, digits]:
            return ContentAddress("text", algorithm, _digest(digits, algorithm, text))
        case ["fixed", algorithm, digits] if algorithm in _SIZES:
            return ContentAddress("flat", algorithm, _digest(digits, algorithm, text))
        case ["fixed", "r", algorithm, digits] if algorithm in _SIZES:
            return ContentAddress("nar", algorithm, _digest(digits, algorithm, text))
        case ["fixed", "git", algorithm, digits] if algorithm in _SIZES:
            return ContentAddress("git", algorithm, _digest(digits, algorithm, text))
    raise FormatError(f"content address {text[:120]!r} is of no known kind")


def path_of(ca: ContentAddress, name: str, references: Iterable[str], own: bool, store_dir: str) -> StorePath:
    """Return the store path that a content address leads to.

    references are the base names of the others that it refers to, own says that it refers to itself. Raise
    FormatError where this kind has no references.
    """
    others = sorted(references)
    if ca.method == "text" or (ca.method == "nar" and ca.algorithm == "sha256"):
        if own and ca.method == "text":
            raise FormatError("a text that refers to itself has no content address")
        kind = "text" if ca.method == "text" else "source"
        kind = ":".join([kind, *(f"{store_dir}/{other}" for other in others), *(["self"] if own else [])])
        return made_path(kind, ca.digest, name, store_dir)
    if others or own:
        raise FormatError("a path of this kind of content address has no references")
    inner = f"fixed:out:{_PREFIXES[ca.method]}{ca.algorithm}:{ca.digest.hex()}:"
    return made_path("output:out", hashlib.sha256(inner.encode()).digest(), name, store_dir)


class ContentProof:
    """Takes the NAR of a path in pieces, and says in the end whether the content address is theirs."""

    def __init__(self, ca: ContentAddress) -> None:
        self._ca = ca
        self._hash = hashlib.new(ca.algorithm)
        self._held = b""  # the one file's head while it is not whole, then what stands behind its bytes
        self._at = 0
        self._size = -1  # of the one file, once its head was read
        self._wrong = False

    def update(self, data: bytes) -> None:
        """Take the next piece of the NAR."""
        if self._ca.method != "nar":
            self._file(data)
        else:
            self._hash.update(data)

    def holds(self) -> bool:
        """Say whether the whole NAR was that of the content address."""
        if self._ca.method != "nar":
            whole = self._size >= 0 and self._at == self._size
            if not whole or self._wrong or self._held != nar.write_file_tail(self._size):
                return False
        return self._hash.digest() == self._ca.digest

    def _file(self, data: bytes) -> None:
        """Hash the bytes of the one file that the NAR must be."""
        if self._size < 0:
            self._held += data
            head = nar.HEADER + nar.write_file_head(0, False)
            if len(self._held) < len(head):
                return
            self._size = int.from_bytes(self._held[len(head) - 8 : len(head)], "little")
            self._wrong = self._held[: len(head) - 8] != head[:-8]
            data, self._held = self._held[len(head) :], b""
        take = min(len(data), self._size - self._at)
        self._hash.update(data[:take])
        self._at += take
        self._held = (self._held + data[take : take + 64])[:64]  # the tail is shorter; a longer one is none


def _digest(text: str, algorithm: str, whole: str) -> bytes:
    digest, size = b"", _SIZES[algorithm]
    try:
        if len(text) == size * 2:
            digest = bytes.fromhex(text)
        elif len(text) == (size * 8 - 1) // 5 + 1:
            digest = nix32_decode(text, size)
        else:
            digest = base64.b64decode(text, validate=True)
    except (ValueError, FormatError):
        pass
    if len(digest) != size:
        raise FormatError(f"content address {whole[:120]!r} has no such hash")
    return digest
