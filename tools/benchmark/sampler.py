"""A sampling profiler: `python -m benchmark.sampler REPORT ARGUMENT...` runs cidfs with it and writes a
report.

The main thread is interrupted by a timer that counts its processor time: a look from outside would only
come to it where it lets go of the interpreter's lock, and a daemon does that at the same place each time.
For the others, a thread looks at them every few milliseconds and gives what each one spent of the
processor since then (the kernel counts it in nanoseconds) to the functions on its stack. So work in C,
with the interpreter's lock released, is seen under the function that called it, and waiting is not taken
for work. What never reaches Python's stacks, such as the kernel's own threads, is not seen.
"""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

INTERVAL: Final = 0.003
TICK: Final = 0.001
ROWS: Final = 32


class Sampler:
    """Collects samples until stopped; one a process."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.below: Counter[str] = Counter()
        self.threads: Counter[str] = Counter()
        self.samples = 0
        self._spent: dict[int, int] = {}
        self._done = threading.Event()
        self._began = time.perf_counter()
        self._cpu_began = time.process_time()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin; called on the main thread."""
        signal.signal(signal.SIGPROF, self._tick)
        signal.setitimer(signal.ITIMER_PROF, TICK, TICK)
        self._thread.start()

    def stop(self) -> None:
        """End; what was collected stays."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._done.set()
        self._thread.join(5)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        """Give what the main thread spent since the last time to where it is now."""
        if frame is not None:
            self._weigh(threading.main_thread(), frame)

    def _run(self) -> None:
        while not self._done.wait(INTERVAL):
            self.look()

    def look(self) -> None:
        """Take one sample of all threads but this one."""
        stacks = sys._current_frames()
        me = threading.get_ident()
        for thread in threading.enumerate():
            frame = stacks.get(thread.ident or 0)
            if frame is not None and thread.ident != me and thread is not threading.main_thread():
                self._weigh(thread, frame)
        self.samples += 1

    def _weigh(self, thread: threading.Thread, frame: FrameType) -> None:
        if thread.native_id is None:
            return
        spent = _spent(thread.native_id)
        weight = spent - self._spent.get(thread.native_id, spent)
        self._spent[thread.native_id] = spent
        if weight > 0:
            self._note(thread.name, frame, weight)

    def _note(self, thread: str, frame: FrameType, weight: int) -> None:
        self.threads["worker threads" if thread.startswith("Trio thread") else thread] += weight
        here: FrameType | None = frame
        seen: set[str] = set()
        while here is not None:
            name = _name(here)
            if not seen:
                self.own[f"{name}:{here.f_lineno}"] += weight
            if name not in seen:
                seen.add(name)
                self.below[name] += weight
            here = here.f_back

    def report(self) -> str:
        """Return what was found as text."""
        wall, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        total = sum(self.threads.values()) or 1
        lines = [f"{wall:.2f} s, {cpu:.2f} s of processor time, {self.samples} samples", ""]
        for title, found in (
            ("thread", self.threads),
            ("function, with all that it calls", self.below),
            ("line, by itself (with what C code it calls)", self.own),
        ):
            lines.append(f"{'share':>7}  {'s':>6}  {title}")
            lines += [f"{w / total:7.1%}  {w / 1e9:6.2f}  {name}" for name, w in found.most_common(ROWS)]
            lines.append("")
        return "\n".join(lines)


def _spent(thread: int) -> int:
    """Return the nanoseconds that a thread has run."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _name(frame: FrameType) -> str:
    code = frame.f_code
    path = code.co_filename
    for mark in ("site-packages/", "/cidfs/", "/lib/python"):
        before, found, after = path.rpartition(mark)
        if found and before:
            path = ("cidfs/" if mark == "/cidfs/" else "") + after
            break
    return f"{path}:{getattr(code, 'co_qualname', code.co_name)}"


def main() -> None:
    """Run cidfs with a sampler and write the report when it ends."""
    report, *words = sys.argv[1:]
    from cidfs.cli.main import run

    sampler = Sampler()

    def write() -> None:
        sampler.stop()
        Path(report).write_text(sampler.report())

    atexit.register(write)
    sys.argv = ["cidfs", *words]
    sampler.start()
    run()


if __name__ == "__main__":
    main()
