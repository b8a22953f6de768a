"""Which mounts of a store there are, by what the kernel lists and by what their processes say of themselves.

Touches no mounted file system. Holds no state.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cidfs.doctor import processes
from cidfs.local.leases import HOLDER, MOUNT, LeaseInfo
from cidfs.local.state import StateFolder
from cidfs.mount.mountinfo import FILE_SYSTEM_TYPE, MountInfo, mounted_at, printable, source_of
from cidfs.mount.session import parent_of


@dataclass(frozen=True)
class Standing:
    """One mount point of a store, and who is behind it.

    info: what is mounted there, None for nothing of this store. daemon, control: the daemon's lease and
    socket; holder: the lease of its parent process; None for one that does not live. mounted: all mounts of
    the namespace where it was mounted; at_home: whether that is this process's own.
    """

    state: Path
    mountpoint: str
    info: MountInfo | None
    daemon: LeaseInfo | None
    control: Path | None
    holder: LeaseInfo | None
    mounted: list[MountInfo]
    at_home: bool

    @property
    def is_stopped(self) -> bool:
        """Whether its daemon was stopped: whoever touches the mount waits."""
        return self.daemon is not None and processes.is_stopped(self.daemon.pid)

    @property
    def again(self) -> str:
        """What makes it anew."""
        return f"`cidfs --state {self.state} mount {self.mountpoint}` mounts again"


def find(state: StateFolder) -> list[Standing]:
    """Return the mounts of a store, one for each mount point."""
    leases = state.leases()
    home = processes.mounts_of("self")
    names = {info.mountpoint for _, info in leases if info.kind in (MOUNT, HOLDER)}
    names |= {printable(Path(info.mountpoint)) for info in home if _is_of(state, info)}
    return [_at(state, name, leases, home) for name in sorted(names)]


def _is_of(state: StateFolder, info: MountInfo) -> bool:
    return info.type == FILE_SYSTEM_TYPE and str(source_of(info)) == os.path.abspath(state.root)


def _at(
    state: StateFolder, name: str, leases: list[tuple[Path, LeaseInfo]], home: list[MountInfo]
) -> Standing:
    here = [(path, info) for path, info in leases if info.mountpoint == name]
    # one that is older may still be behind what was taken from sight and is in use
    path, daemon = max(
        ((path, info) for path, info in here if info.kind == MOUNT),
        key=lambda each: each[1].started,
        default=(None, None),
    )
    parents = [info for _, info in here if info.kind == HOLDER]
    if daemon is not None:
        parents = [info for info in parents if info.pid == parent_of(daemon.pid)]
    holder = max(parents, key=lambda info: info.started, default=None)
    mounted, at_home = home, True
    if holder is not None and processes.namespace_of(holder.pid) not in ("", processes.namespace_of("self")):
        mounted, at_home = processes.mounts_of(holder.pid), False
    listed = {printable(Path(info.mountpoint)): info.mountpoint for info in mounted}
    info = mounted_at(Path(listed.get(name, name)), mounted)
    return Standing(
        state=state.root,
        mountpoint=name,
        info=info if info is not None and _is_of(state, info) else None,
        daemon=daemon,
        control=path.with_suffix(".sock") if path is not None else None,
        holder=holder,
        mounted=mounted,
        at_home=at_home,
    )
