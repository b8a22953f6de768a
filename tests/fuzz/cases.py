"""What fuzzing found, so that it stays found: the target and the bytes that it could not take."""

from __future__ import annotations

from typing import Final

CASES: Final[list[tuple[str, str]]] = []
