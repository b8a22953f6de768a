"""A real Nix, kept apart from every other on this machine, and chroot stores made with it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

TIMEOUT = 120.0
CLOSURE = Path(__file__).with_name("closure.nix")

Done: TypeAlias = subprocess.CompletedProcess[bytes]

_CONFIGURATION = """\
experimental-features = nix-command ca-derivations local-overlay-store read-only-local-store
build-users-group =
sandbox-paths = /bin/sh={busybox}
substituters =
require-drop-supplementary-groups = false
fsync-metadata = false
gc-reserved-space = 0
"""


@dataclass(frozen=True)
class PathInfo:
    """What Nix says about a path; names and hashes are spelled as in `nix path-info --json`."""

    nar_hash: str
    nar_size: int
    references: frozenset[str]
    deriver: str | None
    signatures: frozenset[str]
    ca: str | None


def one(paths: Iterable[str], end: str) -> str:
    """Return the only path that ends so."""
    (path,) = (path for path in paths if path.endswith(end))
    return path


class Nix:
    """Runs the commands of the Nix under `prefix`, its configuration and home under `work`."""

    def __init__(self, prefix: Path, work: Path) -> None:
        self.prefix = prefix
        (work / "etc").mkdir(parents=True)
        (work / "home").mkdir()
        (work / "etc" / "nix.conf").write_text(_CONFIGURATION.format(busybox=self.busybox))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NIX_", "XDG_"))}
        self.environment = kept | {
            "PATH": f"{prefix}/bin:{os.environ.get('PATH', '/usr/bin:/bin')}",
            "HOME": str(work / "home"),
            "NIX_CONF_DIR": str(work / "etc"),
            "NIX_USER_CONF_FILES": "/dev/null",
            "NIX_REMOTE": str(work / "default"),
        }

    @property
    def busybox(self) -> Path:
        return self.prefix / "bin" / "busybox"

    def attempt(
        self,
        *arguments: str | bytes | Path,
        stdin: bytes = b"",
        cwd: Path | None = None,
        within: Sequence[str] = (),
    ) -> Done:
        """Run `nix…` with these arguments; `within` is put in front (nsenter)."""
        name, *rest = arguments
        command = [*within, str(self.prefix / "bin" / os.fsdecode(name)), *rest]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            env=self.environment,
            timeout=TIMEOUT,
            cwd=cwd,
            check=False,
        )

    def run(
        self,
        *arguments: str | bytes | Path,
        stdin: bytes = b"",
        cwd: Path | None = None,
        within: Sequence[str] = (),
    ) -> bytes:
        """Run `nix…` and return its output; a failure is the test's failure, with what Nix said."""
        done = self.attempt(*arguments, stdin=stdin, cwd=cwd, within=within)
        assert done.returncode == 0, f"{arguments}: {done.stderr.decode(errors='replace')}"
        return done.stdout


class ChrootStore:
    """A Nix store under a root directory of its own: ROOT/nix/store and ROOT/nix/var/nix/db.

    address is what Nix is given for it; by default the root directory.
    """

    def __init__(self, nix: Nix, root: Path, address: str = "") -> None:
        self.nix = nix
        self.root = root
        self.address = address or str(root)
        self.tools = root.parent / f"{root.name}-source" / "tools"
        self.tools.mkdir(parents=True)
        (self.tools / "busybox").write_bytes(nix.busybox.read_bytes())
        (self.tools / "busybox").chmod(0o755)

    @property
    def database(self) -> Path:
        return self.root / "nix" / "var" / "nix" / "db" / "db.sqlite"

    def real(self, path: str) -> Path:
        """Return where the bytes of a store path are."""
        return Path(f"{self.root}{path}")

    def attempt(self, *arguments: str | bytes | Path, stdin: bytes = b"") -> Done:
        """Run `nix…` with these arguments on this store."""
        return self.nix.attempt(*arguments, "--store", self.address, stdin=stdin)

    def run(self, *arguments: str | bytes | Path, stdin: bytes = b"") -> str:
        """Run `nix…` on this store and return its output; a failure is the test's."""
        return self.nix.run(*arguments, "--store", self.address, stdin=stdin).decode().strip()

    def refuse(self, *arguments: str | bytes | Path, stdin: bytes = b"") -> str:
        """Run `nix…` on this store, which must fail of its own accord, and return what it says."""
        done = self.attempt(*arguments, stdin=stdin)
        said = done.stderr.decode(errors="replace")
        assert done.returncode == 1, f"{arguments}: {done.returncode} {said}"
        return said

    def add(self, source: bytes | Path, name: str | None = None) -> str:
        named = [] if name is None else ["--name", name]
        return self.run("nix", "store", "add", *named, source)

    def build(self, attribute: str, *options: str, seed: str = "1", ca: bool = False) -> list[str]:
        """Build an attribute of closure.nix and return its outputs' paths."""
        return self.run(*self._build(attribute, seed, ca), *options).split()

    def refuse_to_build(self, attribute: str, *options: str, seed: str = "1", ca: bool = False) -> str:
        """Build an attribute of closure.nix, which must fail, and return what Nix says."""
        return self.refuse(*self._build(attribute, seed, ca), *options)

    def _build(self, attribute: str, seed: str, ca: bool) -> list[str | Path]:
        return [
            "nix-build", CLOSURE, "--no-out-link", "-Q", "-A", attribute,
            "--arg", "tools", self.tools, "--argstr", "seed", seed, "--arg", "ca", str(ca).lower(),
        ]  # fmt: skip

    def closure(self, paths: Iterable[str]) -> list[str]:
        return self.run("nix-store", "--query", "--requisites", *paths).split()

    def path_infos(self, paths: Iterable[str] = ()) -> dict[str, PathInfo]:
        """Return what Nix says about these paths, or about every valid one."""
        chosen = list(paths) or ["--all"]
        command = ["nix", "path-info", "--store", self.address, "--json"]
        done = self.nix.attempt(*command, "--json-format", "1", *chosen)
        if done.returncode:  # a Nix before 2.33 has one format, and no option to say so
            done = self.nix.attempt(*command, *chosen)
        assert done.returncode == 0, done.stderr
        answer: dict[str, dict[str, Any]] = json.loads(done.stdout)
        return {
            path: PathInfo(
                nar_hash=fields["narHash"],
                nar_size=fields["narSize"],
                references=frozenset(fields["references"]),
                deriver=fields.get("deriver"),
                signatures=frozenset(fields.get("signatures", ())),
                ca=fields.get("ca"),
            )
            for path, fields in answer.items()
        }

    def dump(self, path: str) -> bytes:
        return self.nix.run("nix-store", "--dump", self.real(path))
