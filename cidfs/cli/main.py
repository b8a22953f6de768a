"""The entry point: global options, the list of commands, errors to exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import cidfs
from cidfs.cli import look, mounts, stats, store
from cidfs.cli.common import GLOBALS
from cidfs.cli.output import say
from cidfs.errors import CidfsError, exit_code

USAGE_EXIT = 2
INTERNAL_EXIT = 70
INTERRUPTED_EXIT = 130

app = typer.Typer(
    name="cidfs",
    help="A content-addressed, read-only Nix store: add to it, import a Nix store, mount it.",
    epilog="Results go to standard output, all else to standard error. Exit codes: see docs/command-line.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cidfs {cidfs.__version__}")
        raise typer.Exit


@app.callback()
def options(
    state: Annotated[
        Path | None,
        typer.Option(
            envvar="CIDFS_STATE",
            help="The state folder: where the store is kept. Default: /var/lib/cidfs for root,"
            " ~/.local/state/cidfs for others.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(envvar="CIDFS_CONFIG", help="A TOML file with settings. Default: /etc/cidfs.toml."),
    ] = None,
    lock_timeout: Annotated[
        float | None,
        typer.Option(
            envvar="CIDFS_LOCK_TIMEOUT",
            min=0,
            help="Seconds to wait for another process that writes to the store. Default: 30.",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options before the command."""
    GLOBALS.state, GLOBALS.config, GLOBALS.lock_timeout, GLOBALS.debug = state, config, lock_timeout, debug


_COMMANDS: dict[str, Callable[..., None]] = {
    "add": store.add,
    "import": store.import_,
    "mount": mounts.mount,
    "umount": mounts.umount,
    "stats": stats.stats,
    "ls": look.ls,
    "cat": look.cat,
    "info": look.info,
    "nar": look.nar,
    "verify": store.verify,
    "rebuild": store.rebuild,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = code or 141
    sys.exit(code)


def _run() -> int:
    try:
        done = app(standalone_mode=False)
        return done if isinstance(done, int) else 0
    except CidfsError as e:
        code = exit_code(e)
        message = str(e)
    except KeyboardInterrupt:
        code, message = INTERRUPTED_EXIT, "interrupted; what was reported as done is done"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on: no message, as other tools do
        return 141
    except typer.Abort:
        code, message = INTERRUPTED_EXIT, "aborted"
    except Exception as e:
        if hasattr(e, "format_message"):  # the parser's own: wrong options and arguments
            message = f"{e.format_message()} (see `cidfs --help`)"
            code = USAGE_EXIT
        elif isinstance(e, OSError) and not GLOBALS.debug:
            code, message = 1, f"{e.filename or 'input or output'}: {e.strerror}"
        else:
            code, message = INTERNAL_EXIT, f"internal error: {type(e).__name__}: {e}; --debug shows where"
    if GLOBALS.debug:
        traceback.print_exc()
    say(f"cidfs: {' '.join(message.splitlines())}")
    return code
