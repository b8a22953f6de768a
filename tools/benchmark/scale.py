"""How cost grows with the number of store paths: two synthetic stores, one with ten times as many.

Each path is a directory with two small files of its own, ingested by cidfs itself. `python -m
benchmark.scale STATE COUNT` makes such a store, in a process of its own. Measured through the command line
and a mount, as a user would.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from benchmark import machine
from benchmark.machine import BenchError, run
from benchmark.measures import Results
from benchmark.peers import Cidfs
from benchmark.reader import SEED, Reader
from cidfs.engine.ingest import ingest
from cidfs.engine.sources import Batch, Tree
from cidfs.engine.wanted import Wanted
from cidfs.formats import nar
from cidfs.local.publish import Published
from cidfs.local.store import LocalStore

LONG: Final = 900.0
LOOKUPS: Final = 1000
FEW: Final = 1000
NAMES: Final = "names.txt"


class Tiny:
    """A source: a directory with two small files."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.label = f"path {number}"

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Yield both files' data."""
        files = [f"{name} of path {self._number}\n".encode() * 8 for name in ("a", "b")]
        parts = [nar.HEADER, nar.write_directory()]
        tree.builder.enter(b"")
        for name, data in zip((b"a", b"b"), files, strict=True):
            parts += [nar.write_entry(name), nar.write_file_head(len(data), False), data]
            parts += [nar.write_file_tail(len(data)), nar.ENTRY_END]
            tree.builder.file(name, False)
            tree.builder.chunk(len(data))
        tree.builder.leave()
        tree.hash(b"".join([*parts, nar.DIRECTORY_END]))
        yield list(files)


def make(state: Path, count: int) -> None:
    """Make a store of so many paths, and write their names beside it."""
    wanted = (Wanted(Tiny(number), name=f"path-{number}") for number in range(count))
    with (
        LocalStore.open(state, create=True, write=True) as store,
        open(state.parent / NAMES, "w") as names,
    ):

        def note(group: object) -> None:
            assert isinstance(group, list)
            outcomes: list[Published] = group
            names.writelines(f"{outcome.path.base_name}\n" for outcome in outcomes)

        async def work() -> None:
            await ingest(store, wanted, on_published=note)

        trio.run(work)


class Scale:
    """The measures on synthetic stores."""

    def __init__(
        self, folder: Path, paths: int, results: Results, reader: Reader, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._paths = paths
        self._results = results
        self._reader = reader
        self._say = say

    def measure(self, repeat: int) -> None:
        """Make the stores and measure all; what fails is named and the rest goes on."""
        try:
            few, one, ten = (self._make(count) for count in (FEW, self._paths, 10 * self._paths))
        except BenchError as e:
            self._fail("synthetic stores", e)
            return
        steps: list[tuple[str, Callable[[], None]]] = [
            ("look-ups", lambda: self._lookups(few, ten, repeat)),
            ("growth", lambda: self._grow(one, ten)),
        ]
        for name, step in steps:
            try:
                step()
            except BenchError as e:
                self._fail(name, e)
        for peer in (few, one, ten):
            shutil.rmtree(peer.folder, ignore_errors=True)

    def _fail(self, name: str, error: BenchError) -> None:
        self._results.failures[f"cidfs: {name}"] = str(error)
        self._say(f"  {name} failed: {error}")

    def _make(self, count: int) -> Cidfs:
        began = time.monotonic()
        peer = Cidfs(self._folder / f"paths-{count}", [])
        peer.prepare()
        # this module again, in a process of its own: what it takes must not weigh on what is measured
        env = {"PYTHONPATH": ":".join(sys.path)}
        run([sys.executable, "-m", "benchmark.scale", peer.store, str(count)], LONG, env=env)
        names = (peer.folder / NAMES).read_text().split()
        peer.use(names)
        self._say(f"  a store of {count:,} paths made in {time.monotonic() - began:.1f} s")
        return peer

    def _lookups(self, few: Cidfs, many: Cidfs, repeat: int) -> None:
        """Mount both, and look up as many names in the one as in the other, each for the first time."""
        costs: dict[str, list[float]] = {few.folder.name: [], many.folder.name: []}
        for _ in range(repeat):
            for peer in (few, many):
                names = random.Random(SEED).sample(peer.names(), min(LOOKUPS, len(peer.names())))
                listed = peer.folder / "lookups"
                listed.write_text("".join(f"{name}\n" for name in names))
                try:
                    machine.drop_caches([peer.store])
                    peer.version()  # the index is cold, Python is not
                    cold = peer.mount()
                    first = self._reader.run("stat", 1, peer.base, listed, 60)
                    peer.unmount()
                    warm = peer.mount()  # by now what these look-ups touch of the index is in memory
                    count = self._reader.run("stat", 1, peer.base, listed, 60)
                    costs[peer.folder.name].append(count.seconds / count.entries)
                finally:
                    peer.unmount()
                if peer is many:
                    self._results.add("scale_mount", "cidfs", cold)
                    self._results.add("scale_mount_warm", "cidfs", warm)
                    self._results.add("scale_lookup_cold_us", "cidfs", first.seconds / first.entries * 1e6)
        small, large = (min(found) for found in costs.values())
        self._results.add("scale_lookup_us", "cidfs", large * 1e6)
        self._results.add("scale_lookup_ratio", "cidfs", large / small)
        self._say(
            f"  {len(many.names()):,} paths: mounted in {cold:.2f} s; look-up {large * 1e6:.1f} µs,"
            f" in {FEW:,} paths {small * 1e6:.1f} µs"
        )

    def _grow(self, one: Cidfs, ten: Cidfs) -> None:
        """Compare gc, verify and rebuild of the two; a tenth of the paths is removed before gc."""
        for name in ("verify", "rebuild", "gc"):
            if name == "gc":
                for peer in (one, ten):
                    self._remove(peer)
            seconds, peaks = [], []
            for peer in (one, ten):
                times = 1 if name == "gc" or peer is ten else 2
                usages = [run(peer.command(name), LONG) for _ in range(times)]
                seconds.append(min(usage.wall for usage in usages))
                peaks.append(max(usage.peak for usage in usages) / 1e6)
            for size, wall, peak in zip(("1", "10"), seconds, peaks, strict=True):
                self._results.add(f"scale_{name}_{size}_s", "cidfs", wall)
                self._results.add(f"scale_{name}_{size}_mb", "cidfs", peak)
            self._results.add(f"scale_{name}_ratio", "cidfs", seconds[1] / seconds[0])
            self._say(
                f"  {name}: {seconds[0]:.2f} s and {seconds[1]:.2f} s for ten times the paths; peak"
                f" {peaks[0]:.0f} and {peaks[1]:.0f} MB"
            )

    def _remove(self, peer: Cidfs) -> None:
        names = peer.names()[::10]
        for at in range(0, len(names), 1000):
            run(peer.command("remove", *names[at : at + 1000]), LONG)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
