"""How work tells how far it is. No imports: the command line shows progress without loading the engine."""

from __future__ import annotations

from typing import Protocol


class Progress:
    """What an ingest tells while it runs; does nothing unless overridden. Called from the trio thread."""

    def path(self, label: str) -> None:
        """The next path is being read."""

    def bytes(self, count: int) -> None:
        """So many more bytes of contents were stored or found to be here."""


class Steps(Protocol):
    """Told how far work with a known end is."""

    def begin(self, label: str, total: int) -> None:
        """A stage of so many steps begins."""
        ...

    def step(self, count: int = 1) -> None:
        """So many steps were done."""
        ...
