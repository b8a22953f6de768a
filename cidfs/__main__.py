"""The command line's entry, also of `python -m cidfs`. Loading it takes a while and may be interrupted."""

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


if __name__ == "__main__":
    main()
