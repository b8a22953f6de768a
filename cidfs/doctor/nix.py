"""Nix's side: the socket that it asks, the process behind it, and what its settings must not say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import cidfs
from cidfs.doctor import processes
from cidfs.doctor.findings import FAILURE, OK, WARNING, Finding
from cidfs.doctor.standing import Standing
from cidfs.errors import CidfsError
from cidfs.nix.client import Connection

ANSWER_SECONDS: Final = 2.0
NAME: Final = "cidfs "


def socket(mount: Standing) -> Iterator[Finding]:
    """Shake hands on the socket of a mount."""
    if mount.holder is None:
        return
    path = mount.holder.nix_socket
    if not path:
        what = f"{mount.mountpoint}: has no socket for Nix: another mount of the store listens at nix.sock"
        yield Finding("nix", OK, what)
        return
    again = f"`cidfs umount {mount.mountpoint}`; then {mount.again}"
    for pid in processes.children_of(mount.holder.pid):
        is_daemon = mount.daemon is not None and pid == mount.daemon.pid
        if not is_daemon and processes.is_stopped(pid):
            what = f"{path}: the metadata process (process {pid}) is stopped: Nix waits"
            yield Finding("nix", FAILURE, what, f"`kill -CONT {pid}`, or end it: another one is started")
            return
    try:
        with Connection(Path(path), ANSWER_SECONDS) as connection:
            version = connection.client.version
    except FileNotFoundError:
        what = f"{path}: the socket was removed: Nix cannot connect"
        yield Finding("nix", FAILURE, what, again)
    except (OSError, CidfsError) as e:
        yield Finding("nix", FAILURE, f"{path}: Nix is not answered: {e}", f"see the log; {again}")
    else:
        if version == NAME + cidfs.__version__:
            yield Finding("nix", OK, f"{path}: answers Nix")
        elif version.startswith(NAME):
            what = f"{path}: {version} answers Nix, and this is {NAME}{cidfs.__version__}"
            yield Finding("nix", WARNING, what, "unmount and mount again to use this one")
        else:
            what = f"{path}: something else answers there ({version!r})"
            yield Finding("nix", FAILURE, what, again)


def settings(with_overlay: bool) -> Iterator[Finding]:
    """Look for what nix.conf must not say; with_overlay: whether an overlay stands on a mount."""
    path = Path(os.environ.get("NIX_CONF_DIR", "/etc/nix"), "nix.conf")
    try:
        values = _read(path)
    except FileNotFoundError:
        return
    except OSError as e:
        yield Finding("settings", WARNING, f"{path}: {e.strerror}", "run as root")
        return
    uri = values.get("store", "")
    if uri.startswith("local-overlay:"):
        what = f"{path}: `store` is a local-overlay store, which breaks all who are not root"
        advice = "set it as NIX_REMOTE of nix-daemon alone, and NIX_REMOTE=daemon for all others"
        yield Finding("settings", WARNING, what, advice)
    if with_overlay and values.get("auto-optimise-store", "false") == "true":
        what = f"{path}: `auto-optimise-store` is on, and an overlay stands on a mount"
        yield Finding("settings", WARNING, what, "set it to false: paths that are in use could vanish")
    elif not uri.startswith("local-overlay:"):
        yield Finding("settings", OK, f"{path}: nothing in the way of an overlay")


def _read(path: Path) -> dict[str, str]:
    values = {}
    for line in path.read_text(errors="replace").splitlines():
        key, equals, value = line.partition("#")[0].partition("=")
        if equals:
            values[key.strip()] = value.strip()
    return values
