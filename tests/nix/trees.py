"""Trees with everything in them that a Nix store may hold, and what a walk over one sees.

Paths are bytes throughout: not every name in a store is UTF-8.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

AWKWARD_NAMES: tuple[bytes, ...] = (
    b"Ab",
    b"ab",
    b"AB",
    b"a",
    b"a.b",
    b"a-b",
    b"a0",
    b"x" * 255,
    b"\xc3\xa9" * 127 + b"x",
    b"with space",
    b" leading",
    b"trailing ",
    b"new\nline",
    b"\n",
    b"-rf",
    b"--help",
    b".dot",
    b"..two",
    b"...",
    b"\xf0\x9f\xa6\x8a",
    b"latin\xe9",
    b"\xff\xfe",
    b"nfc-\xc3\xa9",
    b"nfd-e\xcc\x81",
    b"\x01\x1b[31m",
    b"tab\t",
    b"'\"`$\\",
    b"*?[x]",
    b"%s%n%00",
    b"~nix~case~hack~1",
    b"\x7f",
)


def _noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def _write(path: bytes, data: bytes, mode: int = 0o644) -> None:
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, mode)


def _names(root: bytes) -> None:
    for parent in (root, root + b"/dirs"):
        os.mkdir(parent)
    for number, name in enumerate(AWKWARD_NAMES):
        _write(root + b"/" + name, b"%d " % number + name)
        os.mkdir(root + b"/dirs/" + name)
        _write(root + b"/dirs/" + name + b"/" + name, name)


def _symlinks(root: bytes) -> None:
    os.mkdir(root)
    targets = {
        b"dangling": b"nowhere",
        b"absolute": b"/no/such/file",
        b"self": b"self",
        b"here": b".",
        b"above": b"../../..",
        b"root": b"/",
        b"slash": b"here/",
        b"thousand": b"t" * 1000,
        b"thousand-deep": b"ab/" * 333 + b"c",
        b"longest": b"l/" * 2047 + b"l",
        b"latin": b"caf\xe9",
        b"newline": b"a\nb",
        b"space": b" ",
        b"store": b"/nix/store/00000000000000000000000000000000-nothing/bin",
    }
    for name, target in targets.items():
        os.symlink(target, root + b"/" + name)


def _empties(root: bytes) -> None:
    os.makedirs(root + b"/dir")
    os.makedirs(root + b"/some/where/deep")
    _write(root + b"/file", b"")
    _write(root + b"/executable", b"", 0o755)
    _write(root + b"/some/file", b"")


def _sizes(root: bytes) -> None:
    """Sizes around every border that matters: NAR padding, pages, chunks."""
    os.mkdir(root)
    borders = (0, 8, 512, 4096, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20)
    for border in borders:
        for size in (border - 1, border, border + 1):
            if size >= 0:
                _write(root + b"/noise-%d" % size, _noise(size, size))
    for size in (16 << 10, (256 << 10) + 1, 1 << 20):
        _write(root + b"/zeros-%d" % size, bytes(size))


def _big(root: bytes) -> None:
    os.mkdir(root)
    noise = _noise(1, (3 << 20) + 17)
    _write(root + b"/noise", noise)
    _write(root + b"/twin", noise)
    _write(root + b"/shifted", b"prefix" + noise)
    _write(root + b"/zeros", bytes(5 << 20))
    _write(root + b"/text", b"".join(b"line %d of a long text\n" % number for number in range(150_000)))
    _write(root + b"/hole", b"")
    with open(root + b"/hole", "r+b") as file:
        file.truncate(8 << 20)
        file.seek(6 << 20)
        file.write(b"an island")


def _wide(root: bytes) -> None:
    os.mkdir(root)
    for number in range(700):
        name = (b"%03d-" % number).ljust((number * 37) % 250 + 5, b"w")
        _write(root + b"/" + name, b"%d\n" % number)


def _deep(root: bytes) -> None:
    os.mkdir(root)
    path = root
    for level in range(60):
        path += b"/%02d-" % level + b"d" * 40
        os.mkdir(path)
        _write(path + b"/file", b"%d" % level)


_FILE_MODES = (0o400, 0o444, 0o600, 0o644, 0o666, 0o611, 0o500, 0o700, 0o755, 0o777, 0o4755, 0o2755, 0o4644)
_DIRECTORY_MODES = (0o700, 0o755, 0o777, 0o1777, 0o2755)


def _modes(root: bytes) -> None:
    os.mkdir(root)
    for mode in _FILE_MODES:
        path = root + b"/file-%o" % mode
        _write(path, b"%o" % mode, mode)
        os.utime(path, ns=(0, 1_234_567_890_123_456_789 + mode))
    for mode in _DIRECTORY_MODES:
        os.mkdir(root + b"/dir-%o" % mode)
        os.chmod(root + b"/dir-%o" % mode, mode)


def _hardlinks(root: bytes) -> None:
    os.makedirs(root + b"/sub")
    _write(root + b"/one", b"linked" * 50_000)
    for other in (b"/two", b"/sub/three"):
        os.link(root + b"/one", root + other)
    os.symlink(b"one", root + b"/soft")


TREES: dict[str, Callable[[bytes], None]] = {
    "names": _names,
    "symlinks": _symlinks,
    "empties": _empties,
    "sizes": _sizes,
    "big": _big,
    "wide": _wide,
    "deep": _deep,
    "modes": _modes,
    "hardlinks": _hardlinks,
    "empty-dir": os.mkdir,
    "file": lambda root: _write(root, b"a file at the top level\n"),
    "empty-file": lambda root: _write(root, b""),
    "big-file": lambda root: _write(root, _noise(2, (300 << 10) + 3)),
    "executable": lambda root: _write(root, b"#!/bin/sh\necho top level\n", 0o755),
    "link": lambda root: os.symlink(b"names/Ab", root),
    "link-dangling": lambda root: os.symlink(b"/nowhere\xe9", root),
    ".hidden": lambda root: _write(root, b"a name with a dot in front"),
    "+-._?=Az09": os.mkdir,
    "n" * 211: os.mkdir,
}
"""What builds each tree, under the base name that its store path will have."""


@dataclass(frozen=True)
class Entry:
    """What one name in a tree is; `size` is 0 and `digest` empty where they say nothing."""

    kind: str
    mode: int
    mtime_ns: int
    uid: int
    gid: int
    size: int
    target: bytes
    digest: str


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


def _entry(path: bytes, status: os.stat_result) -> Entry:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), oct(status.st_mode))
    target, digest = b"", ""
    if kind == "symlink":
        target = os.readlink(path)
    elif kind == "file":
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        mtime_ns=status.st_mtime_ns,
        uid=status.st_uid,
        gid=status.st_gid,
        size=0 if kind == "directory" else status.st_size,
        target=target,
        digest=digest,
    )


def _listed_kind(item: os.DirEntry[bytes]) -> str:
    if item.is_symlink():
        return "symlink"
    return "directory" if item.is_dir(follow_symlinks=False) else "file"


def snapshot(root: bytes | Path, *, single_links: bool = False) -> dict[bytes, Entry]:
    """Walk a tree and return what stands at each path relative to it, the tree itself under `b""`.

    Raises AssertionError where a listing and the attributes disagree about a type, or, with
    `single_links`, about an inode number, and where a link count is not 1.
    """
    top = os.fsencode(root)
    found = {b"": _entry(top, os.lstat(top))}
    directories = [b""] if found[b""].kind == "directory" else []
    while directories:
        parent = directories.pop()
        with os.scandir(top + b"/" + parent if parent else top) as listing:
            for item in listing:
                relative = parent + b"/" + item.name if parent else item.name
                assert relative not in found, f"listed twice: {relative!r}"
                status = os.lstat(item.path)
                entry = found[relative] = _entry(item.path, status)
                assert _listed_kind(item) == entry.kind, relative
                if single_links:
                    assert item.inode() == status.st_ino, relative
                    assert status.st_nlink == 1, relative
                if entry.kind == "directory":
                    directories.append(relative)
    return found


def differences(found: dict[bytes, Entry], wanted: dict[bytes, Entry]) -> list[str]:
    """Say, a line each, in what two snapshots differ."""
    lines = [f"missing: {path!r}" for path in sorted(wanted.keys() - found.keys())]
    lines += [f"not wanted: {path!r}" for path in sorted(found.keys() - wanted.keys())]
    for path in sorted(found.keys() & wanted.keys()):
        if found[path] != wanted[path]:
            lines.append(f"{path!r}: found {found[path]}, wanted {wanted[path]}")
    return lines
