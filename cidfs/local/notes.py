"""What verification says of this floor: one value for each thing that is wrong. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that is wrong. kind: index, journal or inodes; what: the row, serial, path or realisation."""

    kind: str
    what: str
    where: str
    text: str

    @property
    def line(self) -> str:
        """The line for people."""
        return f"{self.where}: {self.text}"
