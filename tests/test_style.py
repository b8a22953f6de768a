"""ruff and mypy run with the tests, so that neither can be forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    _run("ruff", "check", "--output-format=concise", ".")


def test_the_code_is_formatted() -> None:
    _run("ruff", "format", "--check", "--quiet", ".")


def test_mypy_strict_finds_nothing() -> None:
    _run("mypy")
