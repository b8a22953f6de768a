"""The two privileged acts on overlays: reconfigure them, and take whiteouts out of their uppers.

The daemon cannot do either from its own mount namespace: it asks its parent, one request at a time, over a
pair of sockets; each message is one JSON text. Here are that wire format, the daemon's end, and what the
parent does. An act belongs to a process of its own that may be given up: a file system that does not answer
can hold it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cidfs.errors import CidfsError
from cidfs.mount import mountinfo
from cidfs.mount.overlay import Overlay, overlays_above, reconfigure, take_out

MAX_MESSAGE: Final = 1 << 17
MAX_NAMES: Final = 500
ACT_SECONDS: Final = 10.0


class Act(msgspec.Struct, frozen=True):
    """What is asked of the parent. do: `remount` every overlay above the mount, or `unveil` names."""

    do: str
    number: int
    names: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """What became of an act: how many overlays were reconfigured, how many whiteouts taken out."""

    number: int
    remounted: int = 0
    taken: int = 0
    problem: str = ""


class Told(msgspec.Struct, frozen=True):
    """What a daemon tells its parent of its start: an error's class and text, or its control socket."""

    kind: str = ""
    text: str = ""
    control: str = ""


def send(link: socket.socket, message: Act | Outcome | Told) -> None:
    """Send a message; raise OSError when the other end has gone."""
    link.send(msgspec.json.encode(message))


def perform(act: Act, mountpoint: Path) -> Outcome:
    """Do an act, in the namespace where the overlays are."""
    remounted = taken = 0
    try:
        found = overlays_above(mountpoint)
        if act.do == "unveil":
            for overlay in found:
                taken += sum(take_out(overlay.upper, name.encode()) for name in act.names)
        if act.do == "remount" or taken:
            for overlay in found:
                _reconfigure(overlay)
                remounted += 1
    except (OSError, CidfsError) as e:
        return Outcome(act.number, remounted, taken, str(e))
    return Outcome(act.number, remounted, taken)


def _reconfigure(overlay: Overlay) -> None:
    """Reconfigure an overlay, unless its place leads to something else."""
    top = mountinfo.mounted_at(Path(overlay.mountpoint))
    if top is not None and top.device != overlay.device:
        raise CidfsError(f"{overlay.mountpoint}: the overlay is covered by another mount; take that down")
    reconfigure(overlay.mountpoint)


class Link:
    """The daemon's end: asks, and waits for the outcome with a deadline. One act at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._number = 0

    def tell(self, told: Told) -> None:
        """Tell the parent of the start."""
        send(self._end, told)

    def ask(self, do: str, names: Sequence[str] = ()) -> Outcome:
        """Have an act done, on a worker thread; raise CidfsError when nobody does it."""
        remounted = taken = 0
        for i in range(0, max(1, len(names)), MAX_NAMES):
            self._number += 1
            outcome = self._ask(Act(do, self._number, tuple(names[i : i + MAX_NAMES])))
            if outcome.problem:
                raise CidfsError(outcome.problem)
            remounted += outcome.remounted
            taken += outcome.taken
        return Outcome(self._number, remounted, taken)

    def _ask(self, act: Act) -> Outcome:
        self._end.settimeout(ACT_SECONDS + 1)
        try:
            send(self._end, act)
            while raw := self._end.recv(MAX_MESSAGE):
                outcome = msgspec.json.decode(raw, type=Outcome)
                if outcome.number == act.number:  # not one that came too late
                    return outcome
        except OSError as e:
            raise CidfsError(f"the parent process does not answer: {e}") from None
        except msgspec.MsgspecError as e:
            raise CidfsError(f"the parent process answers what is no answer: {e}") from None
        raise CidfsError("the parent process has gone: overlays cannot be told of new store paths")

    def close(self) -> None:
        """Give the socket back."""
        self._end.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends, the parent's first."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
