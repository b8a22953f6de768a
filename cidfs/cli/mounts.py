"""Commands that mount and unmount. The daemon and its libraries are loaded by these alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cidfs.cli.common import GLOBALS
from cidfs.cli.output import say
from cidfs.errors import UsageError
from cidfs.mount import mountinfo


def mount(
    mountpoint: Annotated[
        Path, typer.Argument(metavar="MOUNTPOINT", parser=Path, help="An existing folder.")
    ],
    foreground: Annotated[
        bool,
        typer.Option("--foreground", help="Stay, and log to standard error; tells systemd when it is ready."),
    ] = False,
    transport: Annotated[
        str | None,
        typer.Option(metavar="auto|pyfuse3", help="How requests get from the kernel. Default: auto."),
    ] = None,
    list_root: Annotated[
        bool | None,
        typer.Option(
            "--list-root/--no-list-root",
            help="Whether listing MOUNTPOINT shows the store paths. Default: not.",
        ),
    ] = None,
    nix_socket: Annotated[
        Path | None,
        typer.Option(
            "--nix-socket",
            metavar="PATH",
            parser=Path,
            help="Where Nix asks for metadata. Default: nix.sock in the state folder, for the first mount.",
        ),
    ] = None,
) -> None:
    """Mount the store, read-only; return when the mount answers. The daemon goes on in the background.

    Store paths are MOUNTPOINT/<hash>-<name>, and there as soon as they are added. Take it down with `cidfs
    umount`.
    """
    from cidfs import background
    from cidfs.mount import session
    from cidfs.mount.plan import MountPlan

    settings = GLOBALS.settings()
    if (transport or settings.mount.transport) not in ("auto", "pyfuse3"):
        raise UsageError(f"--transport {transport}: this version has auto and pyfuse3")
    timeout = settings.store.lock_timeout if GLOBALS.lock_timeout is None else GLOBALS.lock_timeout
    chosen = nix_socket or (Path(settings.mount.nix_socket) if settings.mount.nix_socket else None)
    plan = MountPlan(
        state=Path(settings.store.state),
        mountpoint=mountinfo.resolve(mountpoint),
        store_dir=settings.store.store_dir,
        list_root=settings.mount.list_root if list_root is None else list_root,
        lock_timeout=timeout,
        nix_socket=chosen.absolute() if chosen is not None else None,
        in_background=not foreground,
    )
    is_new = not os.path.exists(plan.state / "format")  # or out of reach: the start says so
    if foreground:
        raise typer.Exit(background.run_in_foreground(plan))
    else:
        background.start(plan)
        if is_new:
            say(f"cidfs: {plan.state}: no store was here; made an empty one")
        if not session.nix_socket_of(plan.state, plan.mountpoint):
            say(
                f"cidfs: {plan.mountpoint}: another mount of this store has its socket for Nix; this one has"
                " none (--nix-socket gives it one)"
            )


def umount(
    mountpoint: Annotated[
        Path,
        typer.Argument(
            metavar="MOUNTPOINT", parser=Path, help="Where cidfs is mounted, or an overlay on a cidfs mount."
        ),
    ],
    lazy: Annotated[
        bool,
        typer.Option(
            "--lazy", help="Also while it is in use: it goes from sight at once, and ends with its last user."
        ),
    ] = False,
) -> None:
    """Take a cidfs mount down and wait until its daemon has ended; or take an overlay on one down."""
    from cidfs import background
    from cidfs.mount import overlay_plan

    where = mountinfo.resolve(mountpoint)
    state = Path(GLOBALS.settings().store.state)
    if overlay_plan.is_ours(where, state):
        overlay_plan.unmount_overlay(where, lazy=lazy)
    else:
        background.stop(where, state, lazy=lazy)
