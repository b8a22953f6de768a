"""Nix's ed25519 signatures: public keys as people write them, and which of them has signed something.

Pure. A key is `NAME:BASE64` (32 bytes), a signature `NAME:BASE64` (64 bytes); the name says which key to try
and proves nothing by itself. As in Nix 2.34 (`libutil/signature/local-keys.cc`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cidfs.errors import FormatError

KEY_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64
_NAME: Final = re.compile(r"[!-9;-~]{1,255}")  # printable, without white space and colon


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key: the name that its signatures carry, and 32 bytes."""

    name: str
    raw: bytes

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Say whether a signature (64 bytes) over a message was made with this key's other half."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def parse_public_key(text: str) -> PublicKey:
    """Return the key of a text `NAME:BASE64`; raise FormatError."""
    name, colon, body = text.strip().partition(":")
    raw = _decoded(body)
    if colon and raw is not None and len(raw) == SIGNATURE_SIZE:
        # what Nix calls a secret key has the public one as its second half: do not repeat it
        raise FormatError(f"the key {name[:80]!r} has 64 bytes, as a secret key has; give the public one")
    if not colon or not _NAME.fullmatch(name) or raw is None or len(raw) != KEY_SIZE:
        raise FormatError(f"not a public key, NAME:BASE64 of 32 bytes: {text[:120]!r}")
    return PublicKey(name, raw)


def key_name(signature: str) -> str:
    """Return the name of the key that a signature says that it was made with."""
    return signature.partition(":")[0]


class PublicKeys:
    """The keys that are trusted."""

    def __init__(self, keys: Iterable[PublicKey] = ()) -> None:
        self._by_name: dict[str, list[PublicKey]] = {}
        for key in keys:
            self._by_name.setdefault(key.name, []).append(key)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def signer(self, message: bytes, signatures: Iterable[str]) -> str | None:
        """Return the name of a key that one of the signatures was made with, or None.

        A signature that is no signature at all is one that does not verify.
        """
        for signature in signatures:
            name, _, body = signature.partition(":")
            if name not in self._by_name:
                continue
            raw = _decoded(body)
            if raw is None or len(raw) != SIGNATURE_SIZE:
                continue
            if any(key.verifies(message, raw) for key in self._by_name[name]):
                return name
        return None


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None
