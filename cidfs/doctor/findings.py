"""What a look has found: one value for each thing, whether it is well or not. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from cidfs.errors import CidfsError

OK: Final = "ok"
WARNING: Final = "warning"
FAILURE: Final = "failure"
LEVELS: Final = (OK, WARNING, FAILURE)


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    check is one word for what kind of thing, level one of LEVELS; what says what is so and where, advice what
    to do about it, empty where nothing is to be done.
    """

    check: str
    level: str
    what: str
    advice: str = ""

    @property
    def line(self) -> str:
        """The line for people."""
        return f"{self.level:<7}  {self.check}: {self.what}" + (f"; {self.advice}" if self.advice else "")


def of_error(check: str, error: CidfsError) -> Finding:
    """Return an error of ours as a failure: what, and behind the first semicolon what to do."""
    what, _, advice = " ".join(str(error).splitlines()).partition("; ")
    return Finding(check, FAILURE, what, advice)


def times(number: int, noun: str) -> str:
    """Return a number with its noun: `1 line`, `2 lines`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def count(found: Iterable[Finding], level: str) -> int:
    """Return how many findings are of a level."""
    return sum(finding.level == level for finding in found)
