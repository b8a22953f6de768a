"""A minute of hostile bytes for every decoder, and all that was found before."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Final

import pytest

from tests.commands import ROOT, Store, environment
from tests.fuzz.cases import CASES
from tests.fuzz.minute import attempt
from tests.fuzz.targets import TARGETS

SECONDS: Final = 45.0  # and some for starting; ten times as long with --long
PROCESSES: Final = min(4, os.cpu_count() or 1)


@pytest.mark.parametrize("name", TARGETS)
def test_samples_are_accepted(name: str) -> None:
    target = TARGETS[name]
    for sample in target.samples:
        target.decode(sample)
        target.decode(target.reseal(sample))


@pytest.mark.parametrize(("name", "data"), CASES)
def test_what_was_found_once(name: str, data: str) -> None:
    attempt(TARGETS[name], bytes.fromhex(data))


def test_a_minute_of_hostile_bytes() -> None:
    """In 96 MiB beyond what was there at the start, and with no file that could grow."""
    seconds = SECONDS * (10 if Store.long else 1)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.minute", str(seconds), str(random.getrandbits(32))],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=seconds + 120)
            assert process.returncode == 0, said
            tried = dict(word.split("=") for word in said.split())
            assert len(tried) == len(TARGETS), said
            assert all(int(count) > 100 for count in tried.values()), said
    finally:
        for process in started:
            process.kill()
            process.communicate()
