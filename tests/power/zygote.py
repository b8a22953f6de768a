"""A process under the recorder that has all of cidfs imported, and forks one child for each command line.

Reads a line of JSON for each command on standard input and answers with one. The child runs the real entry
point with the real arguments; only its start is cheaper than that of an interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import Any, Final

from cidfs.formats import pack
from tests.local.support import few_urandom
from tests.system.forks import import_all

SECONDS: Final = 300  # for a command; what hangs ends then


def _child(main: Any, job: dict[str, Any], library: ctypes.CDLL, answer: int) -> int:
    signal.alarm(SECONDS)
    for number, (name, flags) in enumerate(
        ((job["stdin"], os.O_RDONLY), (job["stdout"], os.O_WRONLY), (job["stderr"], os.O_WRONLY))
    ):
        fd = os.open(name, flags | (os.O_CREAT | os.O_TRUNC if number else 0), 0o644)
        os.dup2(fd, number)
        os.close(fd)
    os.urandom = few_urandom
    module: Any = pack
    module.ROLL_SIZE = job["roll"] or pack.ROLL_SIZE
    if job["mark"]:
        library.power_configure(job["root"].encode(), job["log"].encode(), 0, 0, 0, 0)
        library.power_mark(job["mark"].encode())
    library.power_configure(
        job["root"].encode(), job["log"].encode(), job["kill_at"], job["full_at"], job["tear"], job["mode"]
    )
    sys.argv = ["cidfs", *job["words"]]
    code = 0
    try:
        main.run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    sys.stdout.flush()
    os.write(answer, str(library.power_count()).encode())
    return code


def main() -> None:
    """Serve until standard input ends."""
    cidfs = import_all()
    library = ctypes.CDLL(None)
    library.power_count.restype = ctypes.c_long
    library.power_configure.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_long,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_int,
    ]
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            code = 70
            try:
                code = _child(cidfs, job, library, theirs)
            finally:
                os._exit(code)
        os.close(theirs)
        _, status = os.waitpid(child, 0)
        with contextlib.closing(os.fdopen(ours, "rb")) as pipe:
            count = pipe.read()
        print(json.dumps({"status": status, "count": int(count or 0), "pid": child}), flush=True)


if __name__ == "__main__":
    main()
