"""What a real Nix is tried on: a store that was built and imported, its mount, and overlays on that.

Everything of a lab lies on a tmpfs of its own, which an upper layer can be on wherever the tests run.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from .real_nix import ChrootStore, Nix
from .tool import Cidfs, Mount, mount_points, mounted


class OverlayStore(ChrootStore):
    """Nix's local-overlay store on a mount, by the store URI that `cidfs overlay` printed."""

    def __init__(self, nix: Nix, at: Path, uri: str) -> None:
        super().__init__(nix, at / "merged", uri)
        self.upper = at / "upper"

    def above(self, path: str) -> Path:
        """Return where a store path is in the upper layer, when it is there."""
        return self.upper / path.rpartition("/")[2]

    def is_above(self, path: str) -> bool:
        """Say whether anything is in a store path's place in the upper layer."""
        return os.path.lexists(self.above(path))

    def written(self) -> set[str]:
        """Return the names in the upper layer, apart from Nix's own `.links`."""
        return set(os.listdir(self.upper)) - {".links"}

    def whiteouts(self) -> list[Path]:
        return [path for path in self.upper.rglob("*") if stat.S_ISCHR(path.lstat().st_mode)]


@dataclass(frozen=True)
class Lab:
    """A Nix, a chroot store that it built, and a mount that shows all paths of it.

    What tests add stays: each has its own seeds. Nobody removes anything from the mount or takes it down.
    """

    nix: Nix
    store: ChrootStore
    cidfs: Cidfs
    mount: Mount
    outputs: tuple[str, ...]
    ca_outputs: tuple[str, ...]
    at: Path
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def socket(self) -> Path:
        return self.cidfs.state / "nix.sock"

    def output(self, name: str) -> str:
        """Return the path of an output of `everything` that was built with the seed 1."""
        (path,) = (path for path in self.outputs if path.endswith(f"-{name}-1"))
        return path

    def import_(self, *paths: str, store: ChrootStore | None = None) -> None:
        """Have the mount show these paths of a chroot store, and their closures."""
        self.cidfs.run("import", "--from", (store or self.store).root, *paths)

    @contextmanager
    def overlay(self) -> Iterator[OverlayStore]:
        """Mount an overlay with an empty upper layer, and a Nix store with an empty database on it."""
        at = self.at / f"overlay-{next(self._numbers)}"
        merged = at / "merged" / "nix" / "store"
        merged.mkdir(parents=True)
        done = self.cidfs.run(
            "overlay", merged, "--upper", at / "upper", "--work", at / "work", "--mount", self.mount.at
        )
        try:
            (uri,) = done.lines
            yield OverlayStore(self.nix, at, uri)
        finally:
            self.cidfs.run("umount", merged)
        assert mount_points(at) == []


@contextmanager
def lab_in(at: Path, nix: Nix) -> Iterator[Lab]:
    """Build, import and mount in a folder; all is taken down afterwards, and no daemon may have logged."""
    ground = at / "ground"
    ground.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", ground], check=True)
    try:
        store = ChrootStore(nix, ground / "root")
        outputs = store.build("everything")
        ca_outputs = store.build("everything", seed="ca", ca=True)
        cidfs = Cidfs(ground / "state")
        cidfs.run("import", "--all", "--from", store.root)
        with mounted(cidfs, ground / "mnt") as mount:
            yield Lab(nix, store, cidfs, mount, tuple(outputs), tuple(ca_outputs), ground)
        logged = [log.read_text() for log in (cidfs.state / "run").glob("*.log")]
        assert "".join(logged) == "", "a daemon has logged something"
    finally:
        subprocess.run(["umount", ground], check=True)
