"""Something tried in a process of its own that is forked from this one: quick enough for a thousand times.

What it does to itself (a fault, an endless loop, threads, all memory) is its own affair; it has a deadline.
"""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Final, NamedTuple

from cidfs import faults
from cidfs.errors import CidfsError, exit_code

SECONDS: Final = 30.0
CRASHED: Final = 99  # an exception that is no error of ours


class Ended(NamedTuple):
    """How it ended: exit code (negative: the signal that killed it) and standard error."""

    code: int
    said: str


def forked(action: Callable[[], int], *, seconds: float = SECONDS) -> Ended:
    """Run an action as a command of cidfs would run it, and return how it ended; fail when it hangs."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(action, writing)
    os.close(writing)
    said = b""
    deadline = time.monotonic() + seconds
    try:
        while True:
            ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"did not end within {seconds:g} s: {said.decode(errors='replace')}"
            piece = os.read(reading, 65536)
            if not piece:
                break
            said += piece
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reading)
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"))


def _child(action: Callable[[], int], writing: int) -> None:
    code = CRASHED
    try:
        os.dup2(writing, 2)
        os.close(writing)
        faults.install()
        code = action()
    except CidfsError as e:
        os.write(2, f"cidfs: {e}\n".encode(errors="replace"))
        code = exit_code(e)
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)
