"""Digests and their text forms: BLAKE3-256, CIDs, Nix's base32, Nix's hash notations.

Pure functions. A digest is 32 bytes of BLAKE3 everywhere in cidfs; SHA-256 appears only where Nix asks for
it.
"""

from __future__ import annotations

import base64
import binascii

from blake3 import blake3

from cidfs.errors import FormatError

DIGEST_SIZE = 32
_CID_PREFIX = b"\x01\x55\x1e\x20"  # CIDv1, codec raw, multihash blake3, 32 bytes
_CID_LENGTH = 59  # "b" and the base32 of 36 bytes without padding
_NIX32 = "0123456789abcdfghijklmnpqrsvwxyz"
_NIX32_VALUE = {c: i for i, c in enumerate(_NIX32)}


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32-byte BLAKE3 digest of data."""
    return blake3(data).digest()


def checksum(data: bytes | bytearray | memoryview) -> bytes:
    """Return the 8-byte check value that headers and index rows end in: the first bytes of BLAKE3."""
    return blake3(data).digest(8)


def cid_text(digest: bytes) -> str:
    """Return the CID of a digest.

    CIDv1, multibase base32 (lower case, no padding), codec raw, multihash blake3.
    """
    return "b" + base64.b32encode(_CID_PREFIX + digest).decode().rstrip("=").lower()


def parse_cid(text: str) -> bytes:
    """Return the digest of a CID in its canonical text form; raise FormatError for anything else."""
    if not looks_like_cid(text):
        raise FormatError(f"not a CID: {text[:80]!r}")
    try:
        raw = base64.b32decode(text[1:].upper() + "=" * (-len(text[1:]) % 8))
    except (binascii.Error, ValueError) as e:
        raise FormatError(f"not a CID: {text!r}") from e
    if not raw.startswith(_CID_PREFIX) or len(raw) != len(_CID_PREFIX) + DIGEST_SIZE:
        raise FormatError(f"CID {text!r} is not a CIDv1 of codec raw and multihash blake3-256")
    digest = raw[len(_CID_PREFIX) :]
    if cid_text(digest) != text:
        raise FormatError(f"CID {text!r} is not in canonical form")
    return digest


def looks_like_cid(text: str) -> bool:
    """Say whether a text can only be meant as a CID (no store path name has this form)."""
    return len(text) == _CID_LENGTH and text.startswith("b") and text.isalnum() and text.isascii()


def nix32_encode(data: bytes) -> str:
    """Return Nix's base32 of data (its alphabet lacks e, o, t, u.

    The digits run from the last bits to the first).
    """
    value = int.from_bytes(data, "little")
    count = (len(data) * 8 - 1) // 5 + 1
    return "".join(_NIX32[value >> (5 * i) & 31] for i in reversed(range(count)))


def nix32_decode(text: str, size: int) -> bytes:
    """Return the size bytes that a text in Nix's base32 stands for.

    Raise FormatError when it is not canonical.
    """
    if len(text) != (size * 8 - 1) // 5 + 1:
        raise FormatError(f"{text[:80]!r} has not the length of {size} bytes in Nix's base32")
    value = 0
    for c in text:
        try:
            value = value << 5 | _NIX32_VALUE[c]
        except KeyError:
            raise FormatError(f"{c!r} in {text!r} is not a digit of Nix's base32") from None
    if value >> (size * 8):
        raise FormatError(f"{text!r} is not canonical Nix base32: spare bits are set")
    return value.to_bytes(size, "little")


def sha256_text(digest: bytes) -> str:
    """Return Nix's usual notation of a SHA-256: `sha256:` and Nix's base32."""
    return "sha256:" + nix32_encode(digest)


def parse_sha256(text: str) -> bytes:
    """Return the 32 bytes of a SHA-256 in any of Nix's notations.

    `sha256:` base16, base32 or base64, or SRI.
    """
    sri = text.startswith("sha256-")
    body = text[7:] if sri or text.startswith("sha256:") else text
    digest = b""
    try:
        if len(body) == 44:
            digest = base64.b64decode(body, validate=True)
        elif len(body) == 64 and not sri:
            digest = bytes.fromhex(body)
        elif len(body) == 52 and not sri:
            digest = nix32_decode(body, 32)
    except ValueError:
        pass
    if len(digest) == 32:  # fromhex skips white space, and 44 digits of base64 are 31 to 33 bytes
        return digest
    raise FormatError(f"not a SHA-256 hash: {text[:100]!r}")
