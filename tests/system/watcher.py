"""A reader in a process of its own that waits for names to appear in a mount.

    python -m tests.system.watcher MOUNTPOINT NAMES

NAMES is a JSON file: base name → the folder that it was made of. The moment that a look-up of a name
succeeds, the whole path is read and compared with its source. Says `watching` when no name was there yet,
ends with code 0 when all have appeared and were whole, and with 1 at the first that was not, saying which.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.system.support import describe


def watch(mountpoint: Path, sources: dict[str, str]) -> str:
    """Return what is wrong, or nothing."""
    expected = {name: describe(Path(source)) for name, source in sources.items()}
    waiting = dict.fromkeys(expected, 0)
    first = True
    while waiting:
        for name in list(waiting):
            try:
                os.lstat(mountpoint / name)
            except FileNotFoundError:
                waiting[name] += 1
                continue
            if not waiting.pop(name):
                return f"{name}: was there from the beginning"
            if describe(mountpoint / name) != expected[name]:
                return f"{name}: not the same as {sources[name]}"
        if first:
            print("watching", flush=True)
            first = False
    for name, nodes in expected.items():
        if describe(mountpoint / name) != nodes:
            return f"{name}: has changed"
    return ""


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())) or 0)
