"""The daemon as a child of the mount's parent: tells it of the start, logs, and ends with an exit code.

Never returns to its caller: the process ends here. The daemon and its libraries are loaded in this process
alone, so that the parent stays small.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import NoReturn

from cidfs import errors, faults
from cidfs.board import Board
from cidfs.errors import CidfsError
from cidfs.mount.acts import Link, Told
from cidfs.mount.plan import MountPlan


def run(plan: MountPlan, link: Link, board: Board) -> NoReturn:
    """Serve a mount until it ends, and end this process."""
    code = 0
    started = False

    def tell(kind: str, text: str) -> None:
        if not started:
            with contextlib.suppress(OSError):  # the parent has gone
                link.tell(Told(kind=kind, text=text.encode(errors="backslashreplace").decode()))

    def ready(control: Path) -> None:
        nonlocal started
        if plan.in_background:
            log_to(plan.log_of(os.getppid()))
        faults.say = None
        link.tell(Told(control=os.fsencode(control).hex()))
        started = True

    faults.say = lambda line: tell("IndexLost", line)
    try:
        from cidfs import daemon

        daemon.run(plan, link, board, ready)
    except CidfsError as e:
        if started:
            logging.error("%s", e)
        tell(next((c.__name__ for c in type(e).__mro__ if c in errors.EXIT_CODES), "CidfsError"), str(e))
        code = errors.exit_code(e)
    except BaseException as e:
        if started:
            logging.exception("the daemon ended in a way that was not foreseen")
        tell("MountFailed", f"{plan.mountpoint}: {type(e).__name__}: {e}")
        code = 70
    finally:
        os._exit(code)


def log_to(path: Path) -> None:
    """Let standard error be a log: from here on nobody waits for our words."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    os.dup2(fd, 2)
    os.close(fd)
