"""cidfs as its users meet it: the command line, and a mount that is always taken down again."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 120.0
_ESCAPE = re.compile(rb"\\([0-7]{3})")
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """How one command ended."""

    arguments: tuple[str | bytes | Path, ...]
    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    @property
    def complaints(self) -> list[str]:
        return self.err.splitlines()

    def __str__(self) -> str:
        return f"{self.arguments} ended with {self.code}: {self.out[:2000]!r} {self.err}"


class Cidfs:
    """The command line over one state folder."""

    def __init__(self, state: Path) -> None:
        self.state = state
        home = state.parent / f"{state.name}-home"
        home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CIDFS_", "XDG_"))}
        paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}

    def command(self, *arguments: str | bytes | Path) -> list[str | bytes | Path]:
        return [sys.executable, "-m", "cidfs", "--state", self.state, *arguments]

    def attempt(
        self, *arguments: str | bytes | Path, stdin: bytes | None = b"", cwd: Path | None = None
    ) -> Result:
        """Run a command; whatever it says, it may neither show a traceback nor warn."""
        done = self.execute(arguments, stdin, cwd)
        result = Result(arguments, done.returncode, done.stdout, done.stderr.decode(errors="replace"))
        assert "Traceback" not in result.err, str(result)
        assert "Warning" not in result.err, str(result)
        return result

    def execute(
        self, arguments: tuple[str | bytes | Path, ...], stdin: bytes | None, cwd: Path | None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            env=self.environment,
            timeout=TIMEOUT,
            cwd=cwd,
            check=False,
        )

    def run(self, *arguments: str | bytes | Path, stdin: bytes = b"", cwd: Path | None = None) -> Result:
        """Run a command that must succeed."""
        result = self.attempt(*arguments, stdin=stdin, cwd=cwd)
        assert result.code == 0, str(result)
        return result

    def refuse(self, *arguments: str | bytes | Path, stdin: bytes = b"") -> Result:
        """Run a command that must fail, with one line that says why and nothing on standard output."""
        result = self.attempt(*arguments, stdin=stdin)
        assert result.code > 0, str(result)
        assert len(result.complaints) == 1, str(result)
        assert result.out == b"", str(result)
        return result

    def listed(self) -> set[str]:
        """Return the base name of every published path, as `ls` shows them."""
        return {line.rstrip("/").rpartition("/")[2] for line in self.run("ls").lines}

    def info(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run("info", "--json", path).out)
        return answer

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run("stats", "--json").out)
        return answer


@dataclass(frozen=True)
class Mount:
    """A mount that answers, of the state that `cidfs` works on."""

    cidfs: Cidfs
    at: Path
    daemon: int

    def path(self, store_path: str) -> Path:
        return self.at / store_path.rpartition("/")[2]

    def names(self) -> set[str]:
        """List the root; the collector's empty `.links` is no path."""
        return set(os.listdir(self.at)) - {".links"}


def mount_points(below: Path) -> list[str]:
    """Return what is mounted at or below a directory, the innermost last."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    points = [Path(os.fsdecode(_ESCAPE.sub(_unescaped, line.split(b" ")[4]))) for line in lines]
    return [str(point) for point in points if point.is_relative_to(below)]


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes([int(escape[1], 8)])


@contextmanager
def mounted(cidfs: Cidfs, at: Path, *options: str) -> Iterator[Mount]:
    """Mount, and whatever happens unmount; the mount and its daemon must both be gone then."""
    at.mkdir(parents=True, exist_ok=True)
    gone = None
    try:
        cidfs.run("mount", at, *options)
        assert mount_points(at) == [str(at)]
        daemon = cidfs.stats()["daemon"]["pid"]
        gone = os.pidfd_open(daemon)
        try:
            yield Mount(cidfs, at, daemon)
        finally:
            cidfs.run("umount", at)
        assert mount_points(at) == []
        assert select.select([gone], [], [], 20)[0], f"the daemon {daemon} outlived its mount"
    finally:
        for _ in mount_points(at):
            subprocess.run(["umount", "--lazy", at], check=False)
        if gone is not None:
            os.close(gone)


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition of another process; say what did not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
