"""What to mount, and where. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MountPlan:
    """A mount as it was asked for.

    Without a nix_socket, the store's own is used, unless another mount has it. With in_background, what the
    processes have to say goes to a log in the state folder once the mount answers.
    """

    state: Path
    mountpoint: Path
    store_dir: str
    list_root: bool
    lock_timeout: float
    nix_socket: Path | None = None
    in_background: bool = True

    def log_of(self, holder: int) -> Path:
        """Return where the processes of a mount log, by the process number of their parent."""
        return self.state / "run" / f"mount-{holder}.log"
