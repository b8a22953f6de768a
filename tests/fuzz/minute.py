"""Fuzz all targets for some seconds, in little memory and without a file that could be written to.

Run as a process of its own: `python -m tests.fuzz.minute SECONDS SEED`. Says how many examples it tried of
each target, or the target, the bytes and the traceback of the first that broke a promise, and ends with 1.
"""

from __future__ import annotations

import random
import resource
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cidfs.errors import FormatError
from tests.fuzz.targets import TARGETS, Target

EXAMPLE_SECONDS: Final = 10
MEMORY: Final = 96 << 20
EXAMPLES: Final = 150

NUMBERS: Final = tuple(
    struct.pack(form, number)
    for form, bits in (("<B", 8), ("<H", 16), ("<I", 32), ("<Q", 64))
    for number in (0, 1, 2, 1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << bits) - 2, (1 << bits) - 1)
)
WORDS: Final = (
    b"..", b".", b"/", b"\0", b"../..", b"/etc/passwd", b"\xc1\x0d\xf5\xa7", b"cidfsEnd", b"cidfsrec1",
    b"cidfsmf1", b"(", b")", b"\1\0\0\0\0\0\0\0(\0\0\0\0\0\0\0", b"entry", b"type", b"\n", b": ", b"-", b"=",
)  # fmt: skip
PIECES: Final = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.binary(max_size=12))
CHANGES: Final = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "repeat", "copy", "cut"]),
        st.integers(0, 1 << 20),
        st.integers(0, 64),
        PIECES,
    ),
    max_size=6,
)


def change(data: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    """Change bytes in ways that formats trip over."""
    for what, where, count, piece in changes:
        at = where % (len(data) + 1)
        match what:
            case "overwrite":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "delete":
                data = data[:at] + data[at + count :]
            case "repeat":
                data = data[:at] + data[at : at + count] * 3 + data[at:]
            case "copy":
                data = data[:at] + data[count * 7 % (len(data) + 1) :][:count] + data[at + count :]
            case _:
                data = data[:at]
    return data


class Broken(Exception):
    """A target broke a promise; holds the bytes that made it."""


def attempt(target: Target, data: bytes) -> None:
    """Let a target have bytes: FormatError is its only exception, and it is soon done."""
    signal.alarm(EXAMPLE_SECONDS)
    try:
        target.decode(data)
    except FormatError:
        pass
    except Exception as e:
        raise Broken(data.hex()) from e
    finally:
        signal.alarm(0)


def fuzz(target: Target, number: int) -> int:
    """Try a round of examples; return how many."""
    tried = 0

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(CHANGES, st.binary(max_size=60))
    def one(changes: list[tuple[str, int, int, bytes]], junk: bytes) -> None:
        nonlocal tried
        for sample in (*target.samples, junk):
            data = change(sample, changes)
            for each in {data, target.reseal(data)}:
                tried += 1
                attempt(target, each)

    one()
    return tried


def _too_long(_: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {EXAMPLE_SECONDS} s at {frame}")


def main() -> None:
    """Fuzz until the time is over."""
    seconds, number = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGALRM, _too_long)
    for target in TARGETS.values():  # what is imported and allocated once
        for sample in target.samples:
            target.decode(sample)
        fuzz(target, 0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    chosen = random.Random(number)
    tried = dict.fromkeys(TARGETS, 0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, target in TARGETS.items():
            own = chosen.getrandbits(64)
            try:
                tried[name] += fuzz(target, own)
            except Exception as e:
                print(f"{name}, round {own}, run {number}: {e}", flush=True)
                traceback.print_exc(file=sys.stdout)
                raise SystemExit(1) from None
    print(" ".join(f"{name.replace(' ', '-')}={count}" for name, count in tried.items()))


if __name__ == "__main__":
    main()
