"""Where all human output goes: results to standard output, progress and messages to standard error.

Libraries that only draw are loaded when something is drawn: most commands are short.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cidfs.engine import progress

if TYPE_CHECKING:
    from rich.progress import Progress


def say(message: str) -> None:
    """Write a message for people, one line, to standard error."""
    with contextlib.suppress(OSError):  # nowhere to say it; the exit code still does
        print(message, file=sys.stderr, flush=True)


def result(line: str) -> None:
    """Write one line of result to standard output."""
    sys.stdout.write(line + "\n")


def raw(data: bytes | memoryview) -> None:
    """Write bytes of result to standard output."""
    sys.stdout.buffer.write(data)


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun: `1 pack`, `1,204 packs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size_text(count: float) -> str:
    """Return a number of bytes in a form for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_facts(rows: list[tuple[str, str]]) -> None:
    """Show names and values as plain lines, never cut."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        result(f"{name:<{width}}  {value}")


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Show names and numbers."""
    from rich.console import Console
    from rich.table import Table

    result(title)  # not the table's own, which would be broken at its width
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)


def show_grid(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """Show a table with a head; the first column names, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    result(title)
    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


class _IngestBar(progress.Progress):
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("reading", total=None)

    def path(self, label: str) -> None:
        self._bar.update(self._task, description=label[-60:])

    def bytes(self, count: int) -> None:
        self._bar.advance(self._task, count)


@contextlib.contextmanager
def ingest_progress() -> Iterator[progress.Progress]:
    """Show an ingest's progress on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield progress.Progress()
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield _IngestBar(bar)


class Steps:
    """Counts steps towards a known end; shows a bar on a terminal."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None) if bar else None

    def begin(self, label: str, total: int) -> None:
        """A stage of so many steps begins."""
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, description=label, total=total)

    def step(self, count: int = 1) -> None:
        """So many steps were done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, count)

    def remaining(self, label: str, left: int) -> None:
        """So many steps of a stage are left."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{label}, {left} to go")


@contextlib.contextmanager
def steps_progress() -> Iterator[Steps]:
    """Show a bar with a known end on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield Steps(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Steps(bar)
