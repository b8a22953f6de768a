"""What is measured on the corpus: taking in, stored size, mounting, walking, reading, memory.

Every measure is made in rounds; within a round all peers take their turn one after the other, so that the
noise of a shared machine hits them alike. A peer that fails at a measure is named with its reason and left
out of that measure from then on. Values are collected, not judged: that is for `report`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from benchmark import machine
from benchmark.corpus import Release
from benchmark.machine import BenchError, Usage
from benchmark.peers import Peer
from benchmark.reader import Count, Lists, Reader

READ_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done in one form of the run."""

    ingests: int
    rounds: int
    warm: int
    small: int
    big: int
    plenty: int
    roots: int
    paths: int
    """Store paths of the small one of the two synthetic stores; the other has ten times as many."""
    known: int
    """Store paths that Nix is asked about."""
    asks: int
    """Rounds of questions about all of them."""
    derivations: int
    builds: int
    """Rounds in which the derivations are built."""


FULL: Final = Size(
    ingests=2,
    rounds=3,
    warm=3,
    small=8000,
    big=700 << 20,
    plenty=1 << 30,
    roots=60_000,
    paths=10_000,
    known=6000,
    asks=15,
    derivations=100,
    builds=9,
)
QUICK: Final = Size(
    ingests=2,
    rounds=2,
    warm=2,
    small=1500,
    big=80 << 20,
    plenty=100 << 20,
    roots=5_000,
    paths=300,
    known=300,
    asks=3,
    derivations=5,
    builds=2,
)


@dataclass
class Results:
    """All values by measure and peer, and what could not be measured."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    noise: list[float] = field(default_factory=list)
    cold: str = ""

    def add(self, measure: str, peer: str, value: float) -> None:
        """Note one value."""
        self.values.setdefault(measure, {}).setdefault(peer, []).append(value)

    def calibrate(self) -> None:
        """Note how long the same work takes now: what it varies by is the machine's noise."""
        began = time.perf_counter()
        hashlib.sha256(bytes(48 << 20)).digest()
        self.noise.append(time.perf_counter() - began)


class Measures:
    """The run over all peers."""

    def __init__(
        self,
        peers: Sequence[Peer],
        releases: Sequence[Release],
        size: Size,
        reader: Reader,
        say: Callable[[str], None],
    ) -> None:
        self.peers = list(peers)
        self.size = size
        self.results = Results()
        self._releases = releases
        self._reader = reader
        self._say = say
        self._usages: dict[str, list[Usage]] = {}

    def _try(self, peer: Peer, measure: str, work: Callable[[], None]) -> bool:
        """Do a peer's part of a measure, unless it failed at it before."""
        name = f"{peer.name}: {measure}"
        if name in self.results.failures:
            return False
        try:
            work()
            return True
        except (BenchError, OSError) as e:
            self.results.failures[name] = str(e)
            self._say(f"  {name} failed: {e}")
            return False

    # --- taking in

    def ingest(self) -> None:
        """Take the corpus in with every peer; who cannot is out of the run."""
        total = sum(release.bytes for release in self._releases)
        self._warm_the_corpus()
        for turn in range(self.size.ingests):
            self.results.calibrate()
            # who comes first differs: what one leaves to the disk should not always hit the same
            turned = self.peers[turn % len(self.peers) :] + self.peers[: turn % len(self.peers)]
            for peer in turned:
                if turn == 0 or peer.repeat:
                    self._try(peer, "ingest", partial(self._ingest, peer, total))
        gone = {peer.name for peer in self.peers if f"{peer.name}: ingest" in self.results.failures}
        self.peers = [peer for peer in self.peers if peer.name not in gone]
        for peer in self.peers:
            listed, allocated = peer.size()
            self.results.add("stored_mb", peer.name, allocated / 1e6)
            self.results.add("stored_listed_mb", peer.name, listed / 1e6)

    def _warm_the_corpus(self) -> None:
        """Read it once: whoever comes first should not pay for the disk."""
        words = 'find "$@" -type f -exec cat {} + > /dev/null'
        machine.run(["sh", "-c", words, "sh", *(release.path for release in self._releases)], 600)

    def _ingest(self, peer: Peer, total: int) -> None:
        peer.prepare()
        usage = peer.ingest()
        if usage is None:
            return
        self.results.add("ingest", peer.name, total / usage.wall / 1e6)
        self.results.add("ingest_cpu", peer.name, usage.cpu)
        self.results.add("ingest_peak_mb", peer.name, usage.peak / 1e6)
        self._say(f"  ingest {peer.name}: {total / usage.wall / 1e6:.0f} MB/s ({usage.wall:.1f} s)")

    # --- reading

    def read(self, folder: Path, lists: Lists) -> None:
        """Walk and read through all mounts, cold and warm, with one reader and with two."""
        mounted = [peer for peer in self.peers if peer.mounts]
        for peer in list(mounted):
            if not self._try(peer, "mount", peer.finish):
                mounted.remove(peer)
        written = {}
        for peer in mounted:
            written[peer.name] = self._lists(peer, lists).write(folder / peer.name, peer.names())
        for turn in range(self.size.rounds):
            self.results.calibrate()
            for measure, action, kind in (
                ("walk", "walk", "roots"),
                ("small", "read", "small"),
                ("big", "read", "big"),
            ):
                for readers in (1, 2):
                    if readers == 2 and turn == self.size.rounds - 1 and turn > 0:
                        continue  # two readers tell more, and decide nothing: one round less
                    name = measure if readers == 1 else f"{measure}2"
                    for peer in mounted:
                        if peer.share < 1 and measure != "big" and turn + readers > 1:
                            continue
                        self._read(peer, name, action, readers, written[peer.name][kind])

    def _lists(self, peer: Peer, lists: Lists) -> Lists:
        """Return the lists, cut for a slow peer; big files stay, for a rate needs some of them."""
        if peer.share == 1:
            return lists
        roots, walked = [], 0
        for root in sorted(lists.roots, key=lambda root: self._releases[root[0]].files):
            if walked < self.size.roots * peer.share:
                roots.append(root)
                walked += self._releases[root[0]].files
        cut = [found[: int(len(found) * peer.share) + 1] for found in (lists.small, lists.plenty)]
        return Lists(roots, cut[0], lists.big[: len(lists.big) // 4 + 1], cut[1])

    def _read(self, peer: Peer, name: str, action: str, readers: int, paths: Path) -> None:
        def work() -> None:
            self._cold_mount(peer)
            cold = self._run(peer, action, readers, paths)
            self.results.add(f"{name}_cold", peer.name, _rate(name, cold))
            warm = []
            for _ in range(self.size.warm):
                warm.append(_rate(name, self._run(peer, action, readers, paths)))
                if cold.seconds > 20:
                    break
            self.results.add(f"{name}_warm", peer.name, max(warm))
            self._say(f"  {name} {peer.name}: cold {_rate(name, cold):,.0f}, warm {max(warm):,.0f}")

        try:
            self._try(peer, name, work)
        finally:
            peer.unmount()

    def _cold_mount(self, peer: Peer) -> None:
        peer.unmount()
        self.results.cold = machine.drop_caches([peer.store])
        seconds = peer.mount()
        if peer.process is not None or seconds:
            self.results.add("mount", peer.name, seconds)

    def _run(self, peer: Peer, action: str, readers: int, paths: Path) -> Count:
        return self._reader.run(action, readers, peer.base, paths, READ_SECONDS)

    def memory(self, folder: Path, lists: Lists) -> None:
        """Walk everything and read a gigabyte, and look what the daemons hold then."""
        everything = Lists([(at, "") for at in range(len(self._releases))], [], [], lists.plenty)
        for peer in self.peers:
            if not peer.mounts or peer.name in ("ext4", "squashfs"):
                continue

            def work(peer: Peer = peer) -> None:
                written = self._lists(peer, everything).write(folder / peer.name / "memory", peer.names())
                peer.mount()
                assert peer.process is not None
                walked = self._run(peer, "walk", 1, written["roots"])
                done = self._run(peer, "read", 1, written["plenty"])
                now, peak = machine.memory_of(peer.process.pid)
                self.results.add("daemon_mb", peer.name, now / 1e6)
                self.results.add("daemon_peak_mb", peer.name, peak / 1e6)
                self.results.add("daemon_cpu", peer.name, machine.cpu_of(peer.process.pid))
                self._say(
                    f"  memory {peer.name}: {now / 1e6:.0f} MB, at most {peak / 1e6:.0f}, after"
                    f" {walked.entries:,} entries and {done.bytes / 1e9:.2f} GB"
                )

            try:
                self._try(peer, "memory", work)
            finally:
                peer.unmount()


def _rate(name: str, count: Count) -> float:
    """Return MB/s for big files, entries or files a second for the others."""
    done = count.bytes / 1e6 if name.startswith("big") else count.entries
    return done / max(count.seconds, 1e-9)
