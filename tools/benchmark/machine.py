"""What the measures need of the machine: commands with deadlines, their cost, cold caches, and its facts.

Owns every process that the benchmark starts: each is in a process group of its own and listed here until it
is gone, so that whatever ends the run, `end_all` ends just those. Belongs to the main thread.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SAMPLE_SECONDS: Final = 0.02
_running: dict[int, subprocess.Popen[bytes]] = {}


class BenchError(Exception):
    """What could not be measured, and why, in one line."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command cost; peak is the memory of its whole process tree at its highest, in bytes."""

    wall: float
    cpu: float
    peak: int
    output: str


def start(
    command: Sequence[str | Path],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; what it says goes to log."""
    with open(log, "ab") as sink:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
    _running[process.pid] = process
    return process


def end(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """End a process that `start` gave, and its group; one that has ended by itself left no group."""
    if process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            # the leader may go before the others, which would go on writing
            deadline = time.monotonic() + patience
            while _group_runs(process) and time.monotonic() < deadline:
                time.sleep(0.01)
        process.wait(patience)
    _running.pop(process.pid, None)


def _group_runs(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
        return True
    except ProcessLookupError:
        return False


def end_all() -> None:
    """End whatever was started and is still there."""
    for process in list(_running.values()):
        end(process)


def run(
    command: Sequence[str | Path],
    deadline: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Usage:
    """Run a command to its end; raise BenchError when it fails or is not done by its deadline (seconds)."""
    shown = " ".join(str(word) for word in command[:3])
    with tempfile.TemporaryDirectory(prefix="cidfs-bench-") as folder:
        log = Path(folder) / "log"
        began = time.monotonic()
        process = start(command, log, env, cwd)
        # not ru_maxrss: it counts what this process held when it forked
        peak, looked = 0, 0.0
        try:
            while True:
                pid, status, used = os.wait4(process.pid, os.WNOHANG)
                now = time.monotonic()
                if pid:
                    break
                if now - began > deadline:
                    raise BenchError(f"{shown}: not done after {deadline:.0f} s")
                if now - looked >= SAMPLE_SECONDS:
                    peak, looked = max(peak, tree_memory(process.pid)), now
                time.sleep(0.002)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            end(process)
        output = log.read_text(errors="replace")
    if process.returncode:
        last = output.strip().splitlines()[-1:] or ["no message"]
        raise BenchError(f"{shown}: exit {process.returncode}: {last[0][:300]}")
    return Usage(now - began, used.ru_utime + used.ru_stime, peak, output)


def tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and all below it, at least the highest that one of them had."""
    total = highest = 0
    todo = [pid]
    while todo:
        here = todo.pop()
        with contextlib.suppress(OSError, ValueError):
            now, peak = memory_of(here)
            total, highest = total + now, max(highest, peak)
            for thread in os.listdir(f"/proc/{here}/task"):
                todo += map(int, Path(f"/proc/{here}/task/{thread}/children").read_text().split())
    return max(total, highest)


def memory_of(pid: int) -> tuple[int, int]:
    """Return a process's resident bytes now and at their highest."""
    found = {"VmRSS": 0, "VmHWM": 0}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) << 10
    return found["VmRSS"], found["VmHWM"]


def cpu_of(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drop_caches(folders: Iterable[Path]) -> str:
    """Make what lies in folders cold; return how: all caches as root, else page by page of those files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "drop_caches"
    except OSError:
        for folder in folders:
            for path in folder.rglob("*") if folder.is_dir() else [folder]:
                if path.is_file() and not path.is_symlink():
                    with open(path, "rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise (not root: names and attributes stay warm)"


def is_mounted(point: Path) -> bool:
    """Whether something is mounted there; does not touch it, for a dead mount would hang."""
    wanted = str(point)
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(line.split(" ", 5)[4] == wanted for line in lines)


def file_system_of(path: Path) -> str:
    """Return type and options of the file system that a path lies on."""
    best, answer = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        inside = str(path) == point or str(path).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, answer = point, f"{right.split()[0]} ({left.split()[5]})"
    return answer


def sizes(folder: Path, without: Sequence[str] = ()) -> tuple[int, int]:
    """Return the bytes of all files below: as a listing says, and as the disk has them."""
    apparent = allocated = 0
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in without]
        for name in [*names, *folders]:
            info = os.lstat(os.path.join(here, name))
            apparent += info.st_size if name in names else 0
            allocated += info.st_blocks * 512
    return apparent, allocated


def facts(work: Path) -> dict[str, Any]:
    """Return what a reader of the figures must know of this machine."""
    memory = {
        line.split(":")[0]: int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith(("MemTotal", "MemAvailable"))
    }
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": models[0] if models else "unknown",
        "cores": os.cpu_count(),
        "memory_mb": memory.get("MemTotal", 0) // 1_000_000,
        "available_mb": memory.get("MemAvailable", 0) // 1_000_000,
        "file_system": file_system_of(work),
        "root": os.geteuid() == 0,
        "load": os.getloadavg(),
    }
