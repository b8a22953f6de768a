"""Command lines as forks of a process that has imported everything: ten times as many in the same time.

    python -m tests.system.forks cidfs

Reads a line of JSON for each command on standard input, forks a child that runs the real entry point with the
real arguments, and says its process id, then its wait status. One command at a time; what is to run beside
another one is started by `Store.start`, as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cidfs
from tests.commands import TIMEOUT, Store, environment, store_in


class Forks:
    """The process, and where its children read and write."""

    def __init__(self) -> None:
        self.room = Path(tempfile.mkdtemp(prefix="cidfs-forks-"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.forks", "cidfs"],  # by that word a daemon is known
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment(),
        )
        assert self._answer(TIMEOUT) == "ready"

    def _answer(self, timeout: float) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return ""
        return self._process.stdout.readline().decode().strip()

    def run(self, words: list[str], stdin: bytes, timeout: float) -> subprocess.CompletedProcess[bytes]:
        """Run a command line to its end; kill it at the deadline."""
        (self.room / "in").write_bytes(stdin)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(self.room), words]).encode() + b"\n")
        child = int(self._answer(TIMEOUT))
        status = self._answer(timeout)
        if not status:
            os.kill(child, signal.SIGKILL)
            self._answer(TIMEOUT)
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = ((self.room / name).read_bytes() for name in ("out", "err"))
        return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(int(status)), out, err)

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(TIMEOUT)
        shutil.rmtree(self.room)


class ForkedStore(Store):
    """A store whose commands are forks."""

    def __init__(self, state: Path, forks: Forks) -> None:
        super().__init__(state)
        self.forks = forks

    def execute(
        self, words: Sequence[str | Path], stdin: bytes, env: dict[str, str] | None, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        assert env is None, "a fork has the environment that it has"
        return self.forks.run(["--state", str(self.state), *map(str, words)], stdin, timeout)


@contextlib.contextmanager
def forking() -> Iterator[Forks]:
    """Have forks for a while."""
    here = Forks()
    try:
        yield here
    finally:
        here.close()


@contextlib.contextmanager
def forked_store_in(folder: Path, forks: Forks) -> Iterator[ForkedStore]:
    """As store_in, with forks."""
    with store_in(folder) as plain:
        here = ForkedStore(plain.state, forks)
        here.processes = plain.processes
        try:
            yield here
        finally:
            left = here.end()
            plain.log_expected = here.log_expected
        assert not left, f"daemons did not end: {left}"


# --- the process


def import_all() -> Any:
    """Import all of cidfs, and what a command line imports when it is first used; return the entry point."""
    for module in pkgutil.walk_packages(cidfs.__path__, "cidfs."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    main = importlib.import_module("cidfs.cli.main")
    errors = importlib.import_module("cidfs.errors")
    with contextlib.suppress(errors.StoreAbsent):
        main.app(["--state", "/nowhere", "ls"], standalone_mode=False)
    return main


def _child(main: Any, room: str, words: list[str]) -> int:
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", write), ("err", write))):
        fd = os.open(f"{room}/{name}", flags, 0o644)
        os.dup2(fd, number)
        os.close(fd)
    sys.argv = ["cidfs", *words]
    code = 0
    try:
        main.run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _serve() -> None:
    main = import_all()
    print("ready", flush=True)
    for line in sys.stdin:
        room, words = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = _child(main, room, words)
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    _serve()
