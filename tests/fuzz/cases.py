"""What fuzzing and reading found, so that it stays found: the target and the bytes that it could not take."""

from __future__ import annotations

from typing import Final

CASES: Final[list[tuple[str, str]]] = [
    # a publication with a flag that nobody knows was taken as if it were known
    ("journal", "0100000000" + "01050000000000000010000000" + "10000000000000000100000004000000"),
]
