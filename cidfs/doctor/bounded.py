"""Look at what may hang or end the process: in a child, with a deadline.

A child that does not end in time is killed and not waited for: what it waits for in the kernel may never let
it go. To be called in a process without threads.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from cidfs import faults
from cidfs.doctor.findings import FAILURE, Finding, of_error
from cidfs.errors import CidfsError

_END: Final = b"\n"  # an empty line: a child of the child may hold the pipe open, so its end says nothing


def look(check: str, call: Callable[[], Iterable[Finding]], seconds: float) -> list[Finding]:
    """Return what a look finds; what it has found until then where it does not end in time.

    That, an error, and the child's death are failures of the check.
    """

    def child(writing: int) -> None:
        def say(finding: Finding) -> None:
            os.write(writing, msgspec.json.encode(finding) + b"\n")

        faults.say = lambda line: say(of_error(check, CidfsError(line)))
        try:
            for finding in call():
                say(finding)
        except CidfsError as e:
            say(of_error(check, e))
        except OSError as e:
            say(Finding(check, FAILURE, f"{e.filename or 'input or output'}: {e.strerror}"))

    raw, status = _run(child, seconds)
    found = [msgspec.json.decode(line, type=Finding) for line in raw.splitlines() if line]
    if status is None:
        found.append(Finding(check, FAILURE, f"looking at it took more than {seconds:g} s"))
    elif status and not (found and found[-1].level == FAILURE):  # its last word, before a fault ended it
        found.append(Finding(check, FAILURE, f"looking at it ended the process (wait status {status})"))
    return found


def errno_of(call: Callable[[], object], seconds: float) -> int | None:
    """Return the number of the error that a call ends with, 0 for none; None where it does not end."""

    def child(writing: int) -> None:
        code = 0
        try:
            call()
        except OSError as e:
            code = e.errno or 0
        os.write(writing, b"%d\n" % code)

    raw, status = _run(child, seconds)
    return None if status is None or not raw.strip() else int(raw)


def _run(child: Callable[[int], None], seconds: float) -> tuple[bytes, int | None]:
    """Return what a child has written, and its wait status: None where it did not end in time."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            child(writing)
            os.write(writing, _END)
            os._exit(0)
        os._exit(70)
    os.close(writing)
    deadline = time.monotonic() + seconds
    raw = b""
    try:
        while not _has_ended(raw):
            if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
                return raw, None
            piece = os.read(reading, 1 << 16)
            if not piece:
                break
            raw += piece
    finally:
        os.close(reading)
    return raw, os.waitpid(pid, 0)[1]


def _has_ended(raw: bytes) -> bool:
    return raw == _END or raw.endswith(b"\n\n")
