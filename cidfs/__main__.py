"""The command line's entry, also of `python -m cidfs`. Loading it takes a while and may be interrupted.

The remount hook of Nix has an entry of its own, which loads next to nothing.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from cidfs.cli.main import run
    except KeyboardInterrupt:
        os.write(2, b"cidfs: interrupted; nothing was begun\n")
        sys.exit(130)
    run()


def remount() -> None:
    """Have the overlay look again below that is named by the only argument; end with the exit code."""
    from cidfs.errors import CidfsError, UsageError, exit_code
    from cidfs.mount.overlay import reconfigure

    try:
        if len(sys.argv) != 2:
            raise UsageError("usage: cidfs-remount MERGED")
        reconfigure(sys.argv[1])
    except CidfsError as e:
        os.write(2, f"cidfs: {e}\n".encode(errors="surrogateescape"))
        sys.exit(exit_code(e))


if __name__ == "__main__":
    main()
