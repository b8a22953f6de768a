"""Which overlays stand above a mount, as the host sees it.

The kernel tells who polls mountinfo that something was mounted or unmounted, before mount(2) returns; asking
costs half a microsecond. A descriptor that was opened before its process moved into another namespace goes on
showing the one where it was opened. Belongs to one thread.
"""

from __future__ import annotations

import os
import select
from pathlib import Path

from cidfs.mount import mountinfo
from cidfs.mount.overlay import Overlay, overlays_above


class OverlayWatch:
    """The overlays above a mount point, in the namespace where this was made."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)
        self._standing = self._look()

    def standing(self) -> tuple[Overlay, ...]:
        """Return the overlays that stand now."""
        if self._poll.poll(0):
            self._standing = self._look()
        return self._standing

    def _look(self) -> tuple[Overlay, ...]:
        pieces = []
        at = 0
        while piece := os.pread(self._fd, 1 << 16, at):
            pieces.append(piece)
            at += len(piece)
        return tuple(overlays_above(self._mountpoint, mountinfo.parse(os.fsdecode(b"".join(pieces)))))

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)
