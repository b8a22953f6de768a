"""What the system must have for a mount, and for an overlay on one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cidfs.doctor.findings import FAILURE, OK, WARNING, Finding
from cidfs.mount.overlay import OVERLAY_TYPE


def kernel() -> Iterator[Finding]:
    """Say which of the file systems that are needed the kernel has."""
    text = Path("/proc/filesystems").read_text()
    known = {line.split()[-1] for line in text.splitlines() if line.strip()}
    for name, level, purpose in (("fuse", FAILURE, "mounts"), (OVERLAY_TYPE, WARNING, "overlays")):
        if name in known:
            yield Finding("kernel", OK, f"has {name}")
        else:
            what = f"has no file system {name}, which {purpose} need"
            yield Finding("kernel", level, what, f"load its module (`modprobe {name}`)")


def fuse() -> Iterator[Finding]:
    """Say whether this user may mount."""
    device = "/dev/fuse"
    if not os.path.exists(device):
        yield Finding("fuse", FAILURE, f"{device}: is not there", "load the module (`modprobe fuse`)")
        return
    if not os.access(device, os.R_OK | os.W_OK):
        what = f"{device}: you may not read and write it"
        yield Finding("fuse", FAILURE, what, "an administrator must allow it (mode 0666)")
        return
    if os.geteuid() == 0:
        yield Finding("fuse", OK, f"{device}: root may mount, and everybody may read such a mount")
        return
    if shutil.which("fusermount3") is None:
        yield Finding("fuse", FAILURE, "fusermount3 is not there", "install the package fuse3")
        return
    readers = "everybody" if _may_allow_other() else "only you (`user_allow_other` is not in /etc/fuse.conf)"
    yield Finding("fuse", OK, f"{device}: you may mount, and {readers} may read such a mount")


def _may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
