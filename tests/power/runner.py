"""Runs real command lines under the recorder (recorder.c): killed at a call, or on a disk that is full."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import environment

SOURCE = Path(__file__).with_name("recorder.c")
KILLED = -9


def build(folder: Path) -> Path:
    """Compile the recorder into a folder, and return the library."""
    library = folder / "recorder.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    flags = ["-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unused-result"]
    subprocess.run([compiler, *flags, "-o", library, SOURCE, "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Done:
    """How a command ended. calls: how many that count it made, 0 when it was killed."""

    words: tuple[str, ...]
    code: int
    out: list[str]
    err: list[str]
    calls: int

    def good(self) -> Done:
        """Fail unless the command ended well."""
        assert self.code == 0, f"{self.words}: exit code {self.code}: {self.err}"
        return self

    def failed(self, code: int) -> str:
        """Fail unless it ended with an exit code and one line of error; return the line."""
        assert self.code == code, f"{self.words}: exit code {self.code}, not {code}: {self.err}"
        assert len(self.err) == 1, f"{self.words}: not one line of error: {self.err}"
        assert self.err[0].startswith("cidfs: "), self.err
        return self.err[0]


class Runner:
    """Commands in processes of their own, each a fork of one that has imported everything."""

    def __init__(self, library: Path) -> None:
        self._room = Path(tempfile.mkdtemp(prefix="cidfs-runner-"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.power.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment({"LD_PRELOAD": str(library), "LC_ALL": "C.UTF-8"}),
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def run(
        self,
        state: Path,
        *words: str | Path,
        root: Path | None = None,
        log: Path | None = None,
        mark: object = None,
        stdin: Path = Path(os.devnull),
        kill_at: int = 0,
        tear: bool = False,
        full_at: int = 0,
        mode: int = 0,
        roll: int = 0,
    ) -> Done:
        """Run `cidfs --state STATE WORDS` to its end.

        root: what is recorded and counted; else the state folder. kill_at: the call that is the last, tear:
        half of it is still done. full_at: the call from which on the disk is full; mode: 1 files cannot grow,
        2 nothing can be written or synced. roll: the size at which packs are sealed.
        """
        said = self._room / "out", self._room / "err"
        given = ("--state", str(state), *map(str, words))
        job = {
            "words": given,
            "root": str(root or state),
            "log": str(log or ""),
            "mark": json.dumps(mark) if mark is not None else "",
            "stdin": str(stdin),
            "stdout": str(said[0]),
            "stderr": str(said[1]),
            "kill_at": kill_at,
            "tear": int(tear),
            "full_at": full_at,
            "mode": mode,
            "roll": roll,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._answer())
        code = os.waitstatus_to_exitcode(answer["status"])
        out, err = (s.read_text(errors="replace").splitlines() if s.exists() else [] for s in said)
        return Done(given[2:], code, out, err, answer["count"])

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(30)
        shutil.rmtree(self._room)


@contextmanager
def runner(library: Path) -> Iterator[Runner]:
    """Have a runner for a while."""
    here = Runner(library)
    try:
        yield here
    finally:
        here.close()
