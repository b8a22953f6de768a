"""Run the real command line in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

TIMEOUT = 300.0
ROOT = Path(__file__).parent.parent
ENDED_IN_A_READ = "fuse: reading device: Software caused connection abort\n"


class Failed(AssertionError):
    """A command ended with another exit code than it should have."""


def unmount_left_over(below: Path) -> None:
    """Take down whatever is still mounted below a folder."""
    lines = Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines()
    for line in reversed(lines):
        where = line.split(" ")[1].replace("\\040", " ")
        if where.startswith(f"{below}/"):
            command = ["umount", "-l", where] if os.geteuid() == 0 else ["fusermount3", "-uz", where]
            subprocess.run(command, check=False, capture_output=True)


def wait_until(condition: Any, timeout: float = 30.0, what: str = "") -> None:
    """Wait until a condition holds; fail when it does not within timeout seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"did not come true within {timeout} s: {what or condition}")
        time.sleep(0.01)


class Store:
    """A state folder, and commands on it."""

    long: ClassVar[bool] = False

    def __init__(self, state: Path) -> None:
        self.state = state
        self.mounts: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log_expected = False  # set by a test that makes daemons complain

    def command(self, *words: str | Path) -> list[str]:
        """Return a command's words."""
        return [sys.executable, "-m", "cidfs", "--state", str(self.state), *map(str, words)]

    def execute(
        self, words: Sequence[str | Path], stdin: bytes, env: dict[str, str] | None, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*words),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=environment(env),
            check=False,
        )

    def run(
        self,
        *words: str | Path,
        code: int = 0,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end; its exit code must be as said."""
        done = self.execute(words, stdin or b"", env, timeout)
        if done.returncode != code:
            raise Failed(
                f"{words}: exit code {done.returncode}, not {code}\n"
                f"{done.stdout[-4000:].decode(errors='replace')}{done.stderr.decode(errors='replace')}"
            )
        return done

    def lines(self, *words: str | Path) -> list[str]:
        """Run a command and return the lines of its standard output."""
        return self.run(*words).stdout.decode().splitlines()

    def error(self, *words: str | Path, code: int, **more: Any) -> str:
        """Run a command that must fail with an exit code and exactly one line on standard error.

        Return the line.
        """
        done = self.run(*words, code=code, **more)
        lines = done.stderr.decode().splitlines()
        if len(lines) != 1 or not lines[0].startswith("cidfs: "):
            raise Failed(f"{words}: not one line of error:\n{done.stderr.decode()}")
        return lines[0]

    def start(
        self,
        *words: str | Path,
        hook: str = "",
        stdin: int = subprocess.DEVNULL,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command and go on; it is ended with the store if it has not ended by then.

        hook is Python that runs in the process first: it can put something in the way of a function.
        """
        command = self.command(*words)
        if hook:
            command[1:3] = ["-c", f"{hook}\nfrom cidfs.cli.main import run\nrun()"]
        process = subprocess.Popen(
            command,
            bufsize=0,  # a line can be read now, and the rest with finish()
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(env),
        )
        self.processes.append(process)
        return process

    def finish(
        self, process: subprocess.Popen[bytes], code: int = 0, timeout: float = TIMEOUT
    ) -> tuple[list[str], list[str]]:
        """Wait for a started command and return the lines of its standard output and standard error."""
        out, err = process.communicate(timeout=timeout)
        if process.returncode != code:
            raise Failed(f"{process.args!r}: exit code {process.returncode}, not {code}\n{err.decode()}")
        return out.decode().splitlines(), err.decode().splitlines()

    def add(self, *paths: Path, name: str = "") -> list[str]:
        """Add directories and return their base names."""
        return [Path(p).name for p in self.lines("add", *paths, *(["--name", name] if name else []))]

    def mount(self, mountpoint: Path, *options: str) -> Path:
        """Mount in the background."""
        self.run("mount", *options, mountpoint)
        self.mounts.append(mountpoint)
        return mountpoint

    def umount(self, mountpoint: Path) -> None:
        """Unmount."""
        self.run("umount", mountpoint)
        self.mounts.remove(mountpoint)

    def stats(self) -> dict[str, Any]:
        """Return stats --json."""
        found: dict[str, Any] = json.loads(self.run("stats", "--json").stdout)
        return found

    def daemon_pids(self) -> list[int]:
        """Return the processes that have a mount lease of this store, from the leases alone."""
        return [json.loads(p.read_text())["pid"] for p in sorted((self.state / "run").glob("mount-*.lease"))]

    def parent_pids(self) -> list[int]:
        """Return the parents of daemons that have a lease of this store, dead ones too."""
        return [json.loads(p.read_text())["pid"] for p in sorted((self.state / "run").glob("holder-*.lease"))]

    def log_text(self) -> str:
        """Return what all daemons of this store have logged.

        Without libfuse's line about a mount that ended in the midst of a read: that is an end like any other.
        """
        logs = sorted((self.state / "run").glob("*.log"))
        return "".join(log.read_text().replace(ENDED_IN_A_READ, "") for log in logs)

    def end(self) -> list[int]:
        """Unmount all, and return the daemons that did not end by themselves (they are killed)."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        pids = self.daemon_pids() if (self.state / "run").exists() else []
        parents = self.parent_pids()
        for mountpoint in self.mounts:
            with contextlib.suppress(Failed):
                self.run("umount", mountpoint)
        if self.log_expected:  # a parent stays when its daemon is killed, until it is told to end
            for pid in filter(_alive, parents):
                os.kill(pid, signal.SIGTERM)
        pids += parents
        left = []
        for pid in pids:
            with contextlib.suppress(Failed):
                wait_until(lambda pid=pid: not _alive(pid), 10)
            if _alive(pid):
                left.append(pid)
                os.kill(pid, signal.SIGKILL)
        return left


@contextlib.contextmanager
def store_in(folder: Path) -> Iterator[Store]:
    """A state folder in a folder; what is mounted from it is taken down afterwards, and must be gone.

    A daemon that has logged something fails the test, unless the test expects it.
    """
    here = Store(folder / "state")
    try:
        yield here
    finally:
        left = here.end()
        unmount_left_over(folder)
    assert not left, f"daemons did not end: {left}"
    assert here.log_expected or not here.log_text(), f"a daemon logged: {here.log_text()}"


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command: this checkout is the cidfs that it runs, wherever it runs."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, **(more or {})}


def _alive(pid: int) -> bool:
    try:
        return b"cidfs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def tree(root: Path) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    """Yield path, mode, size, mtime and a link's target of everything below a folder, the folder included."""
    top = os.fsencode(root)
    stack = [top]
    while stack:
        here = stack.pop()
        info = os.lstat(here)
        target = os.readlink(here) if os.path.islink(here) else b""
        yield here[len(top) :], info.st_mode, info.st_size, int(info.st_mtime), target
        if os.path.isdir(here) and not target:
            stack += [here + b"/" + name for name in sorted(os.listdir(here), reverse=True)]
