"""The last word of a process that the system kills for a fault: one line, and an exit code that says why.

LMDB reads its file through a map and trusts what it reads. A file that is damaged or cut short while it is
open makes that a SIGSEGV or SIGBUS, for which Python has no exception: the process would die without a word.
Owns the handlers of those signals; they belong to the whole process, whichever thread the fault is in. What
the handler does is little, for anything may be broken by then: it looks for the index that is mapped where
the fault is, writes one line, and ends the process. A fault that has nothing to do with an index is left to
the system, after a traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final

from cidfs.errors import EXIT_CODES, IndexLost

_SIGNALS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)
_SA_SIGINFO: Final = 4
_CODE_AND_ADDRESS: Final = struct.Struct("8xi4xQ")  # si_code and si_addr of siginfo_t, on 64 bits
_BY_ABORT: Final = -6  # si_code of what a thread sends itself; other negative ones are other processes' doing
_INDEX_FILE: Final = "data.mdb"
_INDEX_MODULE: Final = os.path.join("cidfs", "local", "index.py")


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_kept: list[object] = []  # what C code calls must not be freed


say: Callable[[str], None] | None = None
"""Set while somebody waits for this process's word: is told the line instead of standard error."""


def install() -> None:
    """Let faults of this process end it with a word, in whichever thread they are."""
    if _kept or sys.platform != "linux" or struct.calcsize("P") != 8:
        return
    faulthandler.enable(file=2)  # what this module does not handle ends with a traceback at least
    try:
        handler = _Handler(_handle)
    except (MemoryError, OSError):  # a system that lets nobody make code at run time
        return
    _kept.append(handler)
    _set_action(ctypes.cast(handler, ctypes.c_void_p), *_SIGNALS)


def _set_action(handler: ctypes.c_void_p, *numbers: int) -> None:
    """Set what signals do; 0 is the system's default. A second fault, in a handler, is the default's too."""
    libc = ctypes.CDLL(None)
    action = _Action(handler=handler, flags=_SA_SIGINFO)
    for number in numbers:
        libc.sigaction(ctypes.c_int(number), ctypes.byref(action), None)


def _handle(number: int, info: int | None, _: int | None) -> None:
    try:
        _last_word(number, info)
    finally:  # whatever went wrong there, this fault ends the process: else it would come again for ever
        _set_action(ctypes.c_void_p(0), number)
        signal.pthread_kill(threading.get_ident(), number)  # comes when the handler returns


def _last_word(number: int, info: int | None) -> None:
    """Say what is known of a fault; end the process where it is an index's."""
    code, address = (
        _CODE_AND_ADDRESS.unpack(ctypes.string_at(info, _CODE_AND_ADDRESS.size)) if info else (0, 0)
    )
    name = signal.Signals(number).name
    path, inside = _mapped_index(address)
    if (code > 0 or code == _BY_ABORT) and path and (inside or _in_index(sys._getframe())):
        folder = path.removesuffix(" (deleted)").removesuffix(f"/{_INDEX_FILE}")
        line = f"{folder}: the index is damaged or was cut short ({name}); run `cidfs rebuild`"
        if say is not None:
            say(line)
        else:
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, f"cidfs: {line}\n".encode(errors="backslashreplace"))
        os._exit(EXIT_CODES[IndexLost])
    os.write(2, f"cidfs: internal error: {name}\n".encode())
    faulthandler.dump_traceback(file=2)


def _mapped_index(address: int) -> tuple[str, bool]:
    """Return the index that this process has mapped at an address, or any, and whether it was there."""
    found = ""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) < 6 or not fields[5].removesuffix(" (deleted)").endswith(f"/{_INDEX_FILE}"):
                continue
            start, _, end = fields[0].partition("-")
            found = fields[5]
            if int(start, 16) <= address < int(end, 16):
                return found, True
    return found, False


def _in_index(frame: FrameType | None) -> bool:
    """Say whether a thread was just asking the index for something."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(_INDEX_MODULE):
            return True
        frame = frame.f_back
    return False
