"""What the system tests share: trees to add, trees as a walk sees them, and processes as /proc shows them."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

PIECE = 1 << 20
LONG_NAME = b"n" * 255
LONG_TARGET = b"../" * 333 + b"x"
DEPTH = 120


class Node(NamedTuple):
    """A file, directory or link as a reader sees it. digest: of a file's contents."""

    mode: int
    size: int
    target: bytes
    digest: str


def make_files(folder: Path, files: dict[bytes, bytes]) -> Path:
    """Make files below a folder; a name that ends in a slash is a directory."""
    top = os.fsencode(folder)
    for name, data in files.items():
        path = os.path.join(top, name)
        os.makedirs(path if name.endswith(b"/") else os.path.dirname(path), exist_ok=True)
        if not name.endswith(b"/"):
            with open(path, "wb") as file:
                file.write(data)
    return folder


def noise(seed: int | str, size: int) -> bytes:
    """Return bytes that look random and are the same each time."""
    return random.Random(seed).randbytes(size)


def awkward_tree(folder: Path) -> Path:
    """Make a tree with everything in it that a store path can hold and a program might trip over."""
    deep = b"d/" * DEPTH
    make_files(
        folder,
        {
            b"plain": b"plain\n",
            b"empty": b"",
            b"empty-folder/": b"",
            b"one": b"1",
            b"at-most-one-chunk": noise("a", 16 << 10),
            b"many chunks": noise("m", 3_333_333),
            b"repeats": noise("r", 200_000) * 5,
            b"zeros": bytes(1 << 20),
            b"bin/tool": b"#!/bin/sh\n",
            b"bin/big tool": noise("t", 100_001),
            b"Case": b"upper",
            b"case": b"lower",
            b"CASE/": b"",
            b"cafe\xcc\x81": b"decomposed",
            b"caf\xc3\xa9": b"composed",
            b"not-utf8-\xff\xfe\xe9": b"latin",
            b"new\nline": b"newline",
            b"tab\tand\x01control\x7f": b"control",
            b" spaces and \\ back\\040slashes ": b"spaces",
            b"-rf": b"dash",
            b"...": b"dots",
            b"*?[a]": b"glob",
            LONG_NAME: b"a name of 255 bytes",
            LONG_NAME[:-1] + b"/" + LONG_NAME: b"a long name in a long name",
            deep + b"bottom": b"deep down",
            deep + b"folder/": b"",
        },
    )
    make_files(folder / "many", {b"%05d" % i: b"%d\n" % (i % 100) for i in range(3000)})
    for name in ("bin/tool", "bin/big tool", "empty"):
        os.chmod(folder / name, 0o755)
    for name, target in {
        "link": "plain",
        "link to folder": "many",
        "dangling": "nowhere/at all",
        "absolute": "/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-nothing",
        "loop": "loop",
        "long link": os.fsdecode(LONG_TARGET),
        "not utf-8": os.fsdecode(b"\xff\xfe"),
        "new\nline link": "new\nline",
    }.items():
        os.symlink(target, folder / name)
    os.chmod(folder / "plain", 0o640)
    os.chmod(folder / "many", 0o700)
    os.utime(folder / "plain", (12345, 67890))
    return folder


def describe(root: Path | bytes) -> dict[bytes, Node]:
    """Return all that is below a path (and itself) by its path from there, with canonical modes."""
    return dict(_describe(os.fsencode(root), b""))


def _describe(path: bytes, name: bytes) -> Iterator[tuple[bytes, Node]]:
    info = os.lstat(path)
    if stat.S_ISDIR(info.st_mode):
        yield name, Node(stat.S_IFDIR | 0o555, 0, b"", "")
        for child in sorted(os.listdir(path)):
            yield from _describe(path + b"/" + child, name + b"/" + child)
    elif stat.S_ISLNK(info.st_mode):
        yield name, Node(stat.S_IFLNK | 0o777, info.st_size, os.readlink(path), "")
    else:
        mode = stat.S_IFREG | (0o555 if info.st_mode & stat.S_IXUSR else 0o444)
        yield name, Node(mode, info.st_size, b"", digest_of(path))


def digest_of(path: Path | bytes) -> str:
    """Return a digest of a file's contents."""
    digest = hashlib.blake2b()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def below(root: Path | bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield path and attributes of all that is below a path, and of itself."""
    path = os.fsencode(root)
    info = os.lstat(path)
    yield path, info
    if stat.S_ISDIR(info.st_mode):
        for child in sorted(os.listdir(path)):
            yield from below(path + b"/" + child)


def inodes(root: Path) -> dict[bytes, int]:
    """Return the inode number of all that is below a path, and of itself, by path from there."""
    top = len(os.fsencode(root))
    return {path[top:]: info.st_ino for path, info in below(root)}


def error_of(call: Callable[[], object]) -> str:
    """Return the name of the errno that a call fails with; empty when it does not fail."""
    try:
        call()
    except OSError as e:
        return errno.errorcode[e.errno or 0]
    return ""


def nar_hash(root: Path) -> str:
    """Return the SHA-256 of a tree's NAR, by a writer of our own: nothing of cidfs, and little memory."""
    digest = hashlib.sha256()
    for piece in nar_of(os.fsencode(root)):
        digest.update(piece)
    return digest.hexdigest()


def nar_of(path: bytes) -> Iterator[bytes]:
    """Yield the NAR of what is on disk."""
    yield _word(b"nix-archive-1")
    yield from _nar_node(path)


def _word(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def _words(*words: bytes) -> bytes:
    return b"".join(map(_word, words))


def _nar_node(path: bytes) -> Iterator[bytes]:
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        yield _words(b"(", b"type", b"symlink", b"target", os.readlink(path), b")")
    elif stat.S_ISDIR(info.st_mode):
        yield _words(b"(", b"type", b"directory")
        for child in sorted(os.listdir(path)):
            yield _words(b"entry", b"(", b"name", child, b"node")
            yield from _nar_node(path + b"/" + child)
            yield _word(b")")
        yield _word(b")")
    else:
        yield _words(b"(", b"type", b"regular")
        if info.st_mode & stat.S_IXUSR:
            yield _words(b"executable", b"")
        yield _word(b"contents") + info.st_size.to_bytes(8, "little")
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                yield piece
        yield bytes(-info.st_size % 8) + _word(b")")


def at_once(call: Callable[[T], R], each: Iterable[T]) -> list[R]:
    """Call something with each of several arguments, as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(call, each))


# --- processes and mounts, as /proc shows them


def running(text: Path | str) -> list[int]:
    """Return the processes that name something on their command line, this one left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(str(text)) in words:
                found.append(int(entry.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Say whether a process runs (one that ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def status_bytes(pid: int | str, field: str) -> int:
    """Return a field of /proc/PID/status that is given in kB, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def mount_lines(pid: int | str = "self") -> list[list[str]]:
    """Return the fields of /proc/PID/mounts: source, folder, type, options."""
    text = Path(f"/proc/{pid}/mounts").read_text(errors="surrogateescape")
    return [line.split(" ")[:4] for line in text.splitlines()]


def mounted(folder: Path, pid: int | str = "self") -> list[list[str]]:
    """Return what is mounted at a folder or below it, in the namespace of a process."""
    name = str(folder)
    return [m for m in mount_lines(pid) if m[1] == name or m[1].startswith(f"{name}/")]


def mount(*words: str | Path) -> None:
    """Run mount(8)."""
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def umount(*words: str | Path) -> None:
    """Run umount(8)."""
    subprocess.run(["umount", *map(str, words)], check=True, capture_output=True)
