"""Store paths: their parts, which names are valid, and the path that a content has.

Pure functions and one frozen value. Rules as in Nix 2.34 (`libstore/path.cc`, `store-dir-config.cc`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from cidfs.errors import FormatError
from cidfs.formats.digest import nix32_encode

HASH_PART_LENGTH = 32
MAX_NAME = 211
DEFAULT_STORE_DIR = "/nix/store"
_HASH_PART = re.compile(r"[0-9abcdfghijklmnpqrsvwxyz]{32}", re.ASCII)
_NAME = re.compile(r"[0-9a-zA-Z+\-._?=]{1,211}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A store path without its store directory: 32 characters of Nix's base32, and a name."""

    hash_part: str
    name: str

    @property
    def base_name(self) -> str:
        """The last component, `<hash part>-<name>`."""
        return f"{self.hash_part}-{self.name}"

    def full(self, store_dir: str = DEFAULT_STORE_DIR) -> str:
        """Return the absolute path in a store directory."""
        return f"{store_dir}/{self.hash_part}-{self.name}"

    def __str__(self) -> str:
        return self.base_name


def check_name(name: str) -> str:
    """Return a name that a store path can have; raise FormatError with the reason for another one."""
    if not name:
        raise FormatError("a store path's name must not be empty")
    if len(name) > MAX_NAME:
        raise FormatError(f"store path name {name[:40]!r}… is longer than {MAX_NAME} characters")
    if not _NAME.fullmatch(name):
        raise FormatError(f"store path name {name!r} has characters other than 0-9 a-z A-Z + - . _ ? =")
    if name in (".", "..") or name.startswith((".-", "..-")):
        raise FormatError(f"store path name {name!r} is reserved")
    return name


def check_hash_part(text: str) -> str:
    """Return a text that is a hash part; raise FormatError for another one."""
    if not _HASH_PART.fullmatch(text):
        raise FormatError(f"{text[:80]!r} is not a hash part: {HASH_PART_LENGTH} digits of Nix's base32")
    return text


def parse_base_name(text: str) -> StorePath:
    """Return the store path of a base name `<hash part>-<name>`."""
    if (
        not _HASH_PART.fullmatch(text[:HASH_PART_LENGTH])
        or text[HASH_PART_LENGTH : HASH_PART_LENGTH + 1] != "-"
    ):
        raise FormatError(f"not a store path: {text[:300]!r} does not begin with a hash part and a dash")
    return StorePath(text[:HASH_PART_LENGTH], check_name(text[HASH_PART_LENGTH + 1 :]))


def parse_store_path(text: str, store_dir: str = DEFAULT_STORE_DIR) -> StorePath:
    """Return the store path of an absolute path in store_dir, or of a base name."""
    if text.startswith("/"):
        if text.rstrip("/") == store_dir:
            raise FormatError(f"{text!r} is the store directory; name a path in it")
        if not text.startswith(store_dir + "/"):
            raise FormatError(f"{text!r} is not in the store directory {store_dir}")
        text = text[len(store_dir) + 1 :].rstrip("/")
    return parse_base_name(text)


def fixed_output_path(nar_sha256: bytes, name: str, store_dir: str = DEFAULT_STORE_DIR) -> StorePath:
    """Return the path of a content without references, ingested as a NAR: what `nix store add` gives.

    nar_sha256 is the SHA-256 of the content's NAR (32 bytes).
    """
    return made_path("source", nar_sha256, check_name(name), store_dir)


def made_path(kind: str, sha256: bytes, name: str, store_dir: str) -> StorePath:
    """Return the path that Nix makes of what a path is (`source`, `output:out`, ...) and a SHA-256."""
    text = f"{kind}:sha256:{sha256.hex()}:{store_dir}:{name}"
    folded = bytearray(20)
    for i, b in enumerate(hashlib.sha256(text.encode()).digest()):
        folded[i % 20] ^= b
    return StorePath(nix32_encode(bytes(folded)), name)


def fixed_output_ca(nar_sha256: bytes) -> str:
    """Return the content address that Nix records for such a path."""
    return f"fixed:r:sha256:{nix32_encode(nar_sha256)}"
