"""The command that looks for what is wrong around a store."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cidfs.cli.common import GLOBALS
from cidfs.cli.output import count_text, result, say
from cidfs.errors import Unhealthy

SCHEMA = 1


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, on one line (schema 1).")] = False,
) -> None:
    """Look at what a mounted store needs: kernel, state folder, index, mounts, overlays, the socket for Nix.

    Prints a line for each thing: ok, warning or failure, what is so, and what to do. Changes nothing, and
    ends whatever does not answer. The exit code is 19 when there is a failure.
    """
    from cidfs.doctor import findings
    from cidfs.doctor.examination import examine

    root = Path(GLOBALS.settings().store.state)
    found = examine(root)
    failures, warnings = (findings.count(found, level) for level in (findings.FAILURE, findings.WARNING))
    if as_json:
        state = os.fsencode(root).decode(errors="backslashreplace")
        each = [msgspec.to_builtins(finding) for finding in found]
        result(json.dumps({"schema": SCHEMA, "state": state, "failures": failures, "findings": each}))
    else:
        for finding in found:
            result(finding.line)
    counted = f"{count_text(failures, 'failure')}, {count_text(warnings, 'warning')}"
    if failures:
        raise Unhealthy(f"{root}: {counted}; each line says what to do")
    say(f"examined {count_text(len(found), 'thing')}: {counted if warnings else 'all is well'}")
