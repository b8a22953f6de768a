"""What the kernel says is mounted: the lines of mountinfo, and names of mount points.

Owns how mountinfo is read. Touches no mounted file system: one may be dead, and who looks would wait for it.
Holds no state; safe from any thread. Imports little, for a small process uses it that is locked in memory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

FILE_SYSTEM_TYPE: Final = "fuse.cidfs"

_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountInfo:
    """A line of mountinfo (proc_pid_mountinfo(5)); flags are the mount's own, options the file system's."""

    id: int
    parent: int
    device: str
    root: str
    mountpoint: str
    flags: tuple[str, ...]
    type: str
    source: str
    options: tuple[str, ...]


def parse(text: str) -> list[MountInfo]:
    """Return what a mountinfo file lists, oldest first; its text is what os.fsdecode makes of it."""
    return [_line(line) for line in os.fsencode(text).split(b"\n") if line]


def mounts() -> list[MountInfo]:
    """Return what is mounted in this process's namespace, oldest first."""
    # read as bytes: in text, names with a carriage return would be changed
    return parse(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))


def mounted_at(mountpoint: Path, mounted: list[MountInfo] | None = None) -> MountInfo | None:
    """Return what is mounted uppermost at a folder, without touching it."""
    here = None
    for info in mounts() if mounted is None else mounted:
        if info.mountpoint == str(mountpoint):
            here = info
    return here


def source_of(info: MountInfo) -> Path:
    """Return the state folder that a cidfs mount shows as its source."""
    return Path(os.fsdecode(unquote_to_bytes(info.source)))


def printable(path: Path) -> str:
    """Return a path as text that any encoding takes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def resolve(mountpoint: Path) -> Path:
    """Return the absolute form of a mount point without touching a file system that may be dead there."""
    parent = Path(os.path.abspath(mountpoint)).parent
    return Path(os.path.realpath(parent)) / Path(os.path.abspath(mountpoint)).name


def _line(line: bytes) -> MountInfo:
    # between the flags and the dash stand fields that come and go; each name is without blanks
    before, _, after = line.partition(b" - ")
    number, parent, device, root, mountpoint, flags, *_ = before.split(b" ")
    kind, source, options = after.split(b" ", 2)
    return MountInfo(
        int(number),
        int(parent),
        device.decode(),
        _unescape(root),
        _unescape(mountpoint),
        _options(flags),
        _unescape(kind),
        _unescape(source),
        _options(options),
    )


def _options(field: bytes) -> tuple[str, ...]:
    """Return the options of a list, of which the commas inside are escaped."""
    return tuple(_unescape(option) for option in field.split(b","))


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field))
