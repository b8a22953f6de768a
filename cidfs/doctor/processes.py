"""Processes and their mount namespaces, as /proc shows them. Holds no state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cidfs.mount import mountinfo
from cidfs.mount.mountinfo import MountInfo


def state_of(pid: int) -> str:
    """Return the letter that the kernel gives a process's state, empty for one that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def is_stopped(pid: int) -> bool:
    """Say whether a process was stopped, by a signal or by a debugger."""
    return state_of(pid) in ("T", "t")


def is_alive(pid: int) -> bool:
    """Say whether a process runs, or could."""
    return state_of(pid) not in ("", "Z", "X")


def command_of(pid: int) -> str:
    """Return what a process was started as, in at most 60 characters; empty where that cannot be seen."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode(errors="replace").strip()[:60]


def children_of(pid: int) -> list[int]:
    """Return the children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return found


def namespace_of(pid: int | str) -> str:
    """Return the name of a process's mount namespace, empty where that cannot be seen."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def mounts_of(pid: int | str) -> list[MountInfo]:
    """Return what is mounted in a process's namespace; nothing where that cannot be seen."""
    try:
        return mountinfo.parse(os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes()))
    except OSError:
        return []


def other_namespaces(known: set[str]) -> Iterator[int]:
    """Yield one process for each mount namespace that can be seen and is not among those known."""
    seen = {*known, ""}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (name := namespace_of(entry)) not in seen:
            seen.add(name)
            yield int(entry)
