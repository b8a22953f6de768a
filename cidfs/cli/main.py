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
from cidfs import faults
from cidfs.cli import check, collect, doctor, look, mounts, overlays, stats, store
from cidfs.cli.common import GLOBALS
from cidfs.cli.output import say
from cidfs.errors import CidfsError, exit_code

USAGE_EXIT = 2
INTERNAL_EXIT = 70
INTERRUPTED_EXIT = 130
CLOSED_PIPE_EXIT = 141

app = typer.Typer(
    name="cidfs",
    help="A content-addressed, read-only Nix store: add to it, import a Nix store, mount it.",
    epilog="Results go to standard output, all else to standard error. Exit codes: 0 done, 1 other,"
    " 2 wrong use, 3 unreadable source, 4 absent, 5 hash mismatch, 6 conflict, 7 malformed, 8 not trusted,"
    " 9 in use, 10 no store, 11 other version, 12 index lost, 13 locked, 14 not permitted, 15 disk,"
    " 16 damaged, 17 journal lost, 18 chunk lost, 19 unhealthy, 20 mount failed, 21 mount point absent,"
    " 22 busy, 130 interrupted.",
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
            readable=False,
            help="The state folder: where the store is kept. Default: /var/lib/cidfs for root,"
            " ~/.local/state/cidfs for others.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="CIDFS_CONFIG", readable=False, help="A TOML file with settings. Default: /etc/cidfs.toml."
        ),
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


_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "add": (store.add, "Add directories or files."),
    "import": (store.import_, "Import paths from a Nix store or a binary cache, or a NAR."),
    "remove": (collect.remove, "Take store paths out."),
    "gc": (collect.gc, "Free what nobody needs."),
    "mount": (mounts.mount, "Mount the store, read-only."),
    "umount": (mounts.umount, "Take a mount or an overlay down."),
    "overlay": (overlays.overlay, "Mount a writable overlay on a mount, for Nix."),
    "remount": (overlays.remount, "Have an overlay look again below."),
    "stats": (stats.stats, "Show sizes, requests and latencies."),
    "ls": (look.ls, "List store paths, or what is in one."),
    "cat": (look.cat, "Write a file to standard output."),
    "info": (look.info, "Show what is known of a store path."),
    "nar": (look.nar, "Write a NAR to standard output."),
    "verify": (check.verify, "Check all that is stored."),
    "rebuild": (check.rebuild, "Make the index anew."),
    "doctor": (doctor.doctor, "Look for what is wrong, and say what to do."),
}
for _name, (_command, _short) in _COMMANDS.items():
    app.command(name=_name, short_help=_short)(_command)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    _open_closed_descriptors()
    faults.install()
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = code or CLOSED_PIPE_EXIT
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        say(f"cidfs: standard output: {e.strerror}")
        code = code or 1
    sys.exit(code)


def _open_closed_descriptors() -> None:
    """Put /dev/null where the caller has closed a standard descriptor, before any file gets its number."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 (for the process's whole life)


def _run() -> int:
    try:
        done = app(standalone_mode=False, prog_name="cidfs")
        if done == INTERRUPTED_EXIT:  # what the parser makes of KeyboardInterrupt
            raise KeyboardInterrupt
        return done if isinstance(done, int) else 0
    except (BrokenPipeError, SystemExit):  # the parser makes the second of the first
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on: no message, as other tools do
        return CLOSED_PIPE_EXIT
    except (Exception, KeyboardInterrupt) as e:
        code, message = _explain(e)
        if GLOBALS.debug:
            traceback.print_exception(e)
    if message:
        say(f"cidfs: {' '.join(message.splitlines())}")
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an error, and one line for people."""
    if isinstance(error, CidfsError):
        return exit_code(error), str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED_EXIT, "interrupted; what was reported as done is done"
    if hasattr(error, "format_message"):  # the parser's own: wrong options and arguments
        text: str = error.format_message()
        if text.lstrip().startswith("Usage:"):  # no command at all: its message is the whole help
            say(text)
            return USAGE_EXIT, ""
        early = next((o for o in _EARLY_OPTIONS if f"No such option: {o}" in text), "")
        hint = f"{early} stands before the command" if early else "see `cidfs --help`"
        return USAGE_EXIT, f"{text.rstrip('.')} ({hint})"
    if isinstance(error, OSError):
        return 1, f"{error.filename or 'input or output'}: {error.strerror}"
    return INTERNAL_EXIT, f"internal error: {type(error).__name__}: {error}; --debug shows where"


_EARLY_OPTIONS = ("--state", "--config", "--lock-timeout", "--debug")
