"""Commands for overlays on a mount: mount one, and make one forget which names were absent."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from cidfs.cli.common import GLOBALS
from cidfs.cli.output import result, say
from cidfs.control import SocketAddress
from cidfs.errors import MountFailed, MountPointAbsent, UsageError
from cidfs.mount import mountinfo, session

HOOK = "cidfs-remount"
ANSWER_SECONDS = 2.0


def overlay(
    merged: Annotated[
        Path, typer.Argument(metavar="MERGED", parser=Path, help="An existing folder: ROOT/nix/store.")
    ],
    upper: Annotated[
        Path, typer.Option("--upper", metavar="DIR", help="Where what is written goes; made if absent.")
    ],
    work: Annotated[
        Path,
        typer.Option(
            "--work",
            metavar="DIR",
            help="For the kernel alone, on the same file system as the upper; made if absent.",
        ),
    ],
    mountpoint: Annotated[
        Path | None,
        typer.Option(
            "--mount", metavar="MOUNTPOINT", help="The cidfs mount below. Default: the store's only one."
        ),
    ] = None,
    nix_socket: Annotated[
        Path | None,
        typer.Option(
            "--nix-socket",
            metavar="PATH",
            help="Where Nix asks what is below. Default: the mount's own socket.",
        ),
    ] = None,
    nix_state: Annotated[
        Path | None,
        typer.Option(
            "--nix-state",
            metavar="DIR",
            help="Where Nix keeps the overlay's database. Default: ROOT/nix/var/nix.",
        ),
    ] = None,
) -> None:
    """Mount an overlay on a cidfs mount and print the store URI that Nix knows it by.

    Take it down with `cidfs umount`.
    """
    from cidfs.mount import overlay_plan

    below = mountinfo.resolve(mountpoint) if mountpoint is not None else _only_mount()
    info = mountinfo.mounted_at(below)
    state = mountinfo.source_of(info) if info is not None else Path("/")
    store_dir = GLOBALS.settings().store.store_dir
    plan = overlay_plan.plan(merged, upper, work, below, store_dir)
    asked = Path(os.path.abspath(nix_socket or session.nix_socket_of(state, below)))
    if nix_socket is None and not session.nix_socket_of(state, below):
        raise MountFailed(
            f"{below}: this mount has no socket for Nix (another mount of the store had it): mount it with"
            " --nix-socket PATH, or anew when the other one has ended"
        )
    overlay_plan.mount_overlay(plan)
    database = Path(os.path.abspath(nix_state)) if nix_state is not None else None
    hook = _hook()
    say(f"cidfs: {plan.merged}: the overlay is mounted; Nix knows it by the store URI")
    if not _answers(asked):
        say(f"cidfs: {asked}: nothing answers on the Nix socket; Nix cannot use the overlay until it does")
    if database is None and not overlay_plan.is_rooted(plan):
        say(
            f"cidfs: {plan.merged}: Nix has its usual database for it, which must be no other store's;"
            " name one of its own with --nix-state"
        )
    if not hook:
        say(f"cidfs: {HOOK} is not installed beside cidfs: the URI has no remount hook")
    result(overlay_plan.store_uri(plan, asked, state=database, hook=hook))


def remount(
    merged: Annotated[
        Path, typer.Argument(metavar="MERGED", parser=Path, help="Where the overlay is mounted.")
    ],
) -> None:
    """Have an overlay forget which names were absent or deleted, and look again.

    Nothing else of it changes, and it may be in use. Nix calls `cidfs-remount MERGED` for this.
    """
    from cidfs.mount.overlay import reconfigure

    reconfigure(str(merged))


def _only_mount() -> Path:
    """Return the living mount of the store that the settings name; raise when there is not just one."""
    root = Path(GLOBALS.settings().store.state)
    found = {
        info.mountpoint
        for info in mountinfo.mounts()
        if info.type == mountinfo.FILE_SYSTEM_TYPE
        and os.path.realpath(mountinfo.source_of(info)) == os.path.realpath(root)
        and session.daemon_of(root, Path(info.mountpoint))
    }
    if not found:
        raise MountPointAbsent(f"{root}: the store is not mounted; do so first (`cidfs mount`)")
    if len(found) > 1:
        raise UsageError(f"{root}: mounted {len(found)} times; say which one with --mount {min(found)}")
    return Path(found.pop())


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_SECONDS)
        try:
            with SocketAddress(path) as address:
                probe.connect(address)
        except OSError:
            return False
    return True


def _hook() -> str:
    """Return the program that was installed with this one, for Nix to call."""
    path = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), HOOK)
    return path if os.access(path, os.X_OK) else ""
