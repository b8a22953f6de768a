"""All looks, in their order. The one function that others call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final

from cidfs.doctor import mounts, nix, overlays, standing, store, system
from cidfs.doctor.bounded import look
from cidfs.doctor.findings import OK, Finding, of_error
from cidfs.doctor.standing import Standing
from cidfs.errors import CidfsError
from cidfs.local.state import StateFolder

QUICK_SECONDS: Final = 10.0
SECONDS: Final = 20.0  # for what reads the disk, or waits for several answers


def examine(root: Path) -> list[Finding]:
    """Look at everything that has to do with a store, and return what was found.

    Ends, whatever does not answer. Must be called in a process without threads.
    """
    found = [*_quick("kernel", system.kernel), *_quick("fuse", system.fuse)]
    try:
        state = StateFolder.open(root)
    except CidfsError as e:
        return [*found, of_error("store", e)]
    found += _quick("store", partial(store.folder, state))
    found += _quick("lock", partial(store.locks, state))
    found += look("index", partial(store.index, root), SECONDS)
    found += look("leftover", partial(store.left_behind, state), SECONDS)
    found += _quick("log", partial(store.logs, state))
    standings = standing.find(state)
    if not standings:
        what = f"{root}: the store is not mounted"
        found.append(Finding("mount", OK, what, f"`cidfs --state {root} mount MOUNTPOINT` does so"))
    with_overlay = False
    for mount in standings:
        above = overlays.above(mount)
        with_overlay |= bool(above)
        found += _mount(mount)
        for overlay in above:
            found += look("overlay", partial(overlays.look, mount, overlay), SECONDS)
            found += look("whiteout", partial(overlays.upper, mount, overlay), SECONDS)
    if not with_overlay:  # those of a mount whose parent lives were found with that
        found += look("overlay", overlays.orphaned, SECONDS)
    return [*found, *_quick("settings", partial(nix.settings, with_overlay))]


def _mount(mount: Standing) -> list[Finding]:
    return [
        *look("mount", partial(mounts.look, mount), SECONDS),
        *look("nix", partial(nix.socket, mount), SECONDS),
        *look("overlay", partial(overlays.elsewhere, mount), SECONDS),
    ]


def _quick(check: str, call: Callable[[], Iterable[Finding]]) -> list[Finding]:
    return look(check, call, QUICK_SECONDS)
