"""The narinfo, what a binary cache says of one store path, and its `nix-cache-info`.

Pure: bytes in, values out, and back. Takes hostile input: caps on everything, FormatError with the line for
what a narinfo cannot be, no other exception. Lines of `Name: value`, as in Nix 2.34
(`libstore/nar-info.cc`); unknown names are skipped. StorePath, URL, NarHash and NarSize must be there.
"""

from __future__ import annotations

import re
import sys
from typing import Final

import msgspec

from cidfs.errors import FormatError
from cidfs.formats.canonical import MAX_SIGNATURES
from cidfs.formats.digest import parse_sha256, sha256_text
from cidfs.formats.nar import MAX_FILE
from cidfs.formats.store_path import StorePath, parse_base_name, parse_store_path

MAX_SIZE: Final = 8 << 20
MAX_VALUE: Final = 4096  # of each line but References
MAX_REFERENCES: Final = 100_000
MAX_LINES: Final = 10_000
SUFFIX: Final = ".narinfo"
CACHE_INFO: Final = "nix-cache-info"
DEFAULT_COMPRESSION: Final = "bzip2"  # Nix's, where a narinfo names none
UNKNOWN_DERIVER: Final = "unknown-deriver"
_PRINTABLE: Final = re.compile(r"[ -~]*")
_NUMBER: Final = re.compile(r"[0-9]{1,19}", re.ASCII)
_TOKEN: Final = re.compile(r"[!-~]*")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")


class NarInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a binary cache says of a store path.

    references (sorted, unique) and deriver are base names, hashes 32 raw bytes, signatures sorted and unique.
    url is relative to the cache. file_hash and file_size are of the compressed NAR, None where not given.
    """

    path: StorePath
    url: str
    compression: str = DEFAULT_COMPRESSION
    file_hash: bytes | None = None
    file_size: int | None = None
    nar_hash: bytes
    nar_size: int
    references: tuple[str, ...] = ()
    deriver: str = ""
    signatures: tuple[str, ...] = ()
    ca: str = ""

    def fingerprint(self, store_dir: str) -> bytes:
        """Return the bytes that Nix signs: `1;path;NAR hash;NAR size;references`."""
        references = ",".join(f"{store_dir}/{name}" for name in self.references)
        hashed = sha256_text(self.nar_hash)
        return f"1;{self.path.full(store_dir)};{hashed};{self.nar_size};{references}".encode()


def parse(data: bytes, store_dir: str) -> NarInfo:
    """Return what a narinfo says of a path in a store directory; raise FormatError."""
    fields = _fields(data, {"Sig": MAX_SIGNATURES}, _KNOWN)
    for name in _REQUIRED:
        if name not in fields:
            raise FormatError(f"no {name}")
    get = _Fields(fields)
    nar_size = get.number("NarSize")
    if not nar_size:
        raise FormatError(f"line {fields['NarSize'][0][0]}: a NAR of 0 bytes")
    file_hash = get.sha256("FileHash") if get.text("FileHash") else None
    return NarInfo(
        path=get.store_path("StorePath", store_dir),
        url=get.key("URL"),
        compression=get.token("Compression") or DEFAULT_COMPRESSION,
        file_hash=file_hash,
        file_size=(get.number("FileSize") or None) if get.text("FileSize") else None,
        nar_hash=get.sha256("NarHash"),
        nar_size=nar_size,
        references=get.references(),
        deriver=get.deriver(),
        signatures=tuple(sorted({get.checked_token("Sig", n, value) for n, value in fields.get("Sig", ())})),
        ca=get.token("CA"),
    )


def render(info: NarInfo, store_dir: str) -> bytes:
    """Return a narinfo, its lines in Nix's order."""
    lines = [
        f"StorePath: {info.path.full(store_dir)}",
        f"URL: {info.url}",
        f"Compression: {info.compression}",
    ]
    if info.file_hash is not None:
        lines.append(f"FileHash: {sha256_text(info.file_hash)}")
    if info.file_size is not None:
        lines.append(f"FileSize: {info.file_size}")
    lines += [
        f"NarHash: {sha256_text(info.nar_hash)}",
        f"NarSize: {info.nar_size}",
        f"References: {' '.join(info.references)}",
    ]
    if info.deriver:
        lines.append(f"Deriver: {info.deriver}")
    lines += [f"Sig: {signature}" for signature in info.signatures]
    if info.ca:
        lines.append(f"CA: {info.ca}")
    return "".join(line + "\n" for line in lines).encode()


def cache_store_dir(data: bytes) -> str:
    """Return the store directory that a `nix-cache-info` names, empty where it names none.

    As in Nix, whatever else stands there is passed over. Raise FormatError for a name that none can have.
    """
    for line in data.decode("latin-1").splitlines():
        name, _, value = line.partition(":")
        if name == "StoreDir":
            if not _PRINTABLE.fullmatch(value) or len(value) > MAX_VALUE:
                raise FormatError("a StoreDir that is no path")
            return value.strip()
    return ""


def check_key(text: str) -> str:
    """Return a text that names something inside a binary cache; raise FormatError for one that may not.

    Relative, without scheme, without empty parts, `.` and `..`; printable, no white space.
    """
    parts = text.split("/")
    if not _TOKEN.fullmatch(text) or _SCHEME.match(text) or any(part in ("", ".", "..") for part in parts):
        raise FormatError(f"{text[:200]!r} does not name a file inside the binary cache")
    return text


_Found = dict[str, list[tuple[int, str]]]
_REQUIRED: Final = ("StorePath", "URL", "NarHash", "NarSize")
_KNOWN: Final = frozenset(
    (*_REQUIRED, "Compression", "FileHash", "FileSize", "References", "Deriver", "Sig", "CA")
)


def _fields(data: bytes, repeatable: dict[str, int], known: frozenset[str]) -> _Found:
    """Return the values of known names, each with its line's number."""
    if len(data) > MAX_SIZE:
        raise FormatError(f"{len(data)} bytes, more than {MAX_SIZE}")
    lines = data.decode("latin-1").split("\n", MAX_LINES)  # of an unknown line any bytes are taken
    if lines.pop() != "":
        raise FormatError(f"ends in the middle of line {len(lines) + 1}, or has more than {MAX_LINES} lines")
    found: _Found = {}
    for number, line in enumerate(lines, 1):
        name, colon, value = line.partition(":")
        if not colon or (value and not value.startswith(" ")):
            raise FormatError(f"line {number}: no `Name: value` but {line[:80]!r}")
        if name not in known:
            continue
        value = value[1:]
        if not _PRINTABLE.fullmatch(value):
            raise FormatError(f"line {number}: a {name} that is not printable ASCII")
        if len(value) > MAX_VALUE and name != "References":
            raise FormatError(f"line {number}: a {name} of {len(value)} characters")
        held = found.setdefault(name, [])
        if len(held) >= repeatable.get(name, 1):
            raise FormatError(f"line {number}: {name} is there {len(held) + 1} times")
        held.append((number, value))
    return found


class _Fields:
    """Values of fields, checked; an error says in which line."""

    def __init__(self, found: _Found) -> None:
        self._found = found

    def _of(self, name: str) -> tuple[int, str]:
        return self._found.get(name, [(0, "")])[0]

    def text(self, name: str) -> str:
        return self._of(name)[1]

    def checked_token(self, name: str, number: int, value: str) -> str:
        if not _TOKEN.fullmatch(value):
            raise FormatError(f"line {number}: a {name} with white space: {value[:80]!r}")
        return value

    def token(self, name: str) -> str:
        return self.checked_token(name, *self._of(name))

    def number(self, name: str) -> int:
        number, value = self._of(name)
        if not _NUMBER.fullmatch(value) or int(value) > MAX_FILE:
            raise FormatError(f"line {number}: {name} {value[:80]!r} is not a number of bytes")
        return int(value)

    def sha256(self, name: str) -> bytes:
        number, value = self._of(name)
        try:
            if not value.startswith("sha256"):
                raise FormatError(f"not a SHA-256 hash: {value[:100]!r}")
            return parse_sha256(value)
        except FormatError as e:
            raise FormatError(f"line {number}: {name}: {e}") from None

    def key(self, name: str) -> str:
        number, value = self._of(name)
        try:
            return check_key(value)
        except FormatError as e:
            raise FormatError(f"line {number}: {name} {e}") from None

    def store_path(self, name: str, store_dir: str) -> StorePath:
        number, value = self._of(name)
        try:
            if not value.startswith("/"):
                raise FormatError(f"{value[:300]!r} is not an absolute store path")
            return parse_store_path(value, store_dir)
        except FormatError as e:
            raise FormatError(f"line {number}: {name}: {e}") from None

    def references(self) -> tuple[str, ...]:
        number, value = self._of("References")
        names = value.split()
        if len(names) > MAX_REFERENCES:
            raise FormatError(f"line {number}: {len(names)} references, more than {MAX_REFERENCES}")
        try:
            # a closure's narinfos name the same paths over and over
            return tuple(sorted({sys.intern(parse_base_name(name).base_name) for name in names}))
        except FormatError as e:
            raise FormatError(f"line {number}: References: {e}") from None

    def deriver(self) -> str:
        number, value = self._of("Deriver")
        if value in ("", UNKNOWN_DERIVER):
            return ""
        try:
            return parse_base_name(value).base_name
        except FormatError as e:
            raise FormatError(f"line {number}: Deriver: {e}") from None
