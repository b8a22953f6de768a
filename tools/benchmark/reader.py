"""The reader (reader.c): compiled when needed, run with a deadline; and the lists of what it reads.

All file systems are read by this one program from the same lists, so that only they differ.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmark.corpus import Release
from benchmark.machine import BenchError, run

SOURCE: Final = Path(__file__).with_name("reader.c")
SMALL: Final = 64 << 10
BIG: Final = 1 << 20
SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Count:
    """What the reader did."""

    entries: int
    bytes: int
    seconds: float


class Reader:
    """The compiled reader."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "reader"
        run(["gcc", "-O2", "-o", self._program, SOURCE], 60)

    def run(self, action: str, readers: int, base: Path, paths: Path, deadline: float) -> Count:
        """Run an action on a list of paths below base."""
        output = run([self._program, action, str(readers), base, paths], deadline).output
        try:
            entries, size, seconds = output.split()
            return Count(int(entries), int(size), float(seconds))
        except ValueError:
            raise BenchError(f"the reader said {output[:200]!r}") from None


@dataclass(frozen=True, slots=True)
class Lists:
    """What is read: by release and path below it, so that it can be said for every mount."""

    roots: list[tuple[int, str]]
    small: list[tuple[int, str]]
    big: list[tuple[int, str]]
    plenty: list[tuple[int, str]]
    """Files of any size, a gigabyte in all where the corpus has it, with every root's: for the memory."""

    def write(self, folder: Path, names: Sequence[str]) -> dict[str, Path]:
        """Write the lists with the names that a peer gives the releases."""
        folder.mkdir(parents=True, exist_ok=True)
        written = {}
        for kind in ("roots", "small", "big", "plenty"):
            lines = [f"{names[at]}/{rest}" if rest else names[at] for at, rest in getattr(self, kind)]
            written[kind] = folder / kind
            written[kind].write_bytes(b"".join(os.fsencode(line) + b"\n" for line in lines))
        return written


def choose(releases: Sequence[Release], *, small: int, big: int, plenty: int, roots: int) -> Lists:
    """Choose what is read: a number of small files, bytes of big ones, releases with a number of files.

    Whole releases in a random but fixed order: neighbours are read one after the other, as programs do.
    """
    order = list(range(len(releases)))
    random.Random(SEED).shuffle(order)
    lists = Lists([], [], [], [])
    big_bytes = plenty_bytes = walked = 0
    for at in order:
        if walked < roots:
            lists.roots.append((at, ""))
            walked += releases[at].files
        top = os.fspath(releases[at].path)
        for here, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(here, name)
                if os.path.islink(path) or "\n" in path:
                    continue
                size = os.path.getsize(path)
                item = (at, os.path.relpath(path, top))
                if size <= SMALL and len(lists.small) < small:
                    lists.small.append(item)
                if size >= BIG and big_bytes < big:
                    lists.big.append(item)
                    big_bytes += size
                if plenty_bytes < plenty:
                    lists.plenty.append(item)
                    plenty_bytes += size
    return lists
