"""Settings: one TOML file, the environment, the command line; the later beat the earlier.

Owns which settings exist and their defaults. Unknown keys are errors, so that a misspelt one is not silently
ignored.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from cidfs.errors import UsageError

SYSTEM_CONFIG = Path("/etc/cidfs.toml")


class StoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[store]: where the state folder is, and which store directory its paths are in."""

    state: str = ""
    store_dir: str = "/nix/store"
    lock_timeout: float = 30.0


class MountSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[mount]: how a mount is made. nix_socket: where Nix asks; empty for the state folder's nix.sock."""

    transport: Literal["auto", "pyfuse3"] = "auto"
    list_root: bool = False
    nix_socket: str = ""


class TrustSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[trust]: whose signatures count (`NAME:BASE64`, as Nix's trusted-public-keys), and whether one must."""

    public_keys: tuple[str, ...] = ()
    require_signatures: bool = True


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings."""

    store: StoreSettings = StoreSettings()
    mount: MountSettings = MountSettings()
    trust: TrustSettings = TrustSettings()


def default_state() -> Path:
    """Return the state folder that is used when none is named: the system's for root, else the user's."""
    if os.geteuid() == 0:
        return Path("/var/lib/cidfs")
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "cidfs"


def load(config: Path | None, state: Path | None) -> Settings:
    """Return the settings of a file, with a state folder filled in.

    When none is named, that of the system counts, if there is one. Raises UsageError for a file that is
    missing, cannot be read, or has unknown keys.
    """
    settings = Settings()
    path = config or (SYSTEM_CONFIG if SYSTEM_CONFIG.exists() else None)
    if path is not None:
        try:
            settings = msgspec.toml.decode(path.read_bytes(), type=Settings)
        except OSError as e:
            raise UsageError(f"{path}: cannot be read: {e.strerror}") from e
        except (msgspec.MsgspecError, UnicodeDecodeError) as e:
            raise UsageError(f"{path}: {e}") from e
    chosen = state or (Path(settings.store.state) if settings.store.state else default_state())
    store_dir = settings.store.store_dir
    if not store_dir.startswith("/") or store_dir != os.path.normpath(store_dir) or store_dir == "/":
        raise UsageError(f"store_dir {store_dir!r} must be an absolute path without trailing slash")
    store = msgspec.structs.replace(settings.store, state=str(Path(chosen).absolute()))
    return msgspec.structs.replace(settings, store=store)
