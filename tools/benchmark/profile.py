"""tools/bench --profile: where the time goes, by the sampling profiler inside the process that does the
work.

Nothing is compared here, and the profiler itself costs a few per cent. Each profile brings cidfs to where
the work can begin, and then does only that work under the profiler.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmark import machine
from benchmark.corpus import Release
from benchmark.machine import BenchError, run
from benchmark.measures import FULL, QUICK, READ_SECONDS
from benchmark.peers import LONG, Cidfs
from benchmark.reader import Reader, choose

NAMES: Final = ("ingest", "read", "walk", "mount", "gc", "verify", "rebuild")


class Sampled(Cidfs):
    """cidfs with the profiler around the commands that are to be profiled."""

    sampled = False

    @property
    def report(self) -> Path:
        """Where the profiler writes."""
        return self.folder / "profile.txt"

    def command(self, *words: str | Path) -> list[str | Path]:
        plain = super().command(*words)
        if not self.sampled or words[0] == "umount":
            return plain
        return [sys.executable, "-m", "benchmark.sampler", self.report, *plain[3:]]


def show(name: str, work: Path, releases: Sequence[Release], *, quick: bool) -> None:
    """Print where the time goes."""
    peer = Sampled(work / "cidfs", releases)
    peer.environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    peer.prepare()
    try:
        _profiles()[name](peer, work, quick)
    finally:
        peer.unmount()
    print(peer.report.read_text() if peer.report.exists() else "the profiler wrote nothing")


def _profiles() -> dict[str, Callable[[Sampled, Path, bool], None]]:
    def read(peer: Sampled, work: Path, quick: bool) -> None:
        _through_a_mount(peer, work, quick, ["small", "big"])

    def walk(peer: Sampled, work: Path, quick: bool) -> None:
        _through_a_mount(peer, work, quick, ["roots"])

    def mount(peer: Sampled, work: Path, quick: bool) -> None:
        _through_a_mount(peer, work, quick, [])

    def command(name: str) -> Callable[[Sampled, Path, bool], None]:
        def work(peer: Sampled, folder: Path, quick: bool) -> None:
            _one_command(peer, name)

        return work

    return {
        "ingest": _ingest,
        "read": read,
        "walk": walk,
        "mount": mount,
        **{name: command(name) for name in ("gc", "verify", "rebuild")},
    }


def _ingest(peer: Sampled, work: Path, quick: bool) -> None:
    peer.sampled = True
    usage = peer.ingest()
    size = sum(release.bytes for release in peer.releases)
    print(
        f"ingest: {usage.wall:.2f} s, {size / usage.wall / 1e6:.0f} MB/s, {usage.cpu:.2f} s of processor time"
    )
    print(f"peak memory {usage.peak / 1e6:.0f} MB")


def _one_command(peer: Sampled, name: str) -> None:
    peer.ingest()
    if name == "gc":
        for at in range(0, len(peer.names()), 2):
            run(peer.command("remove", peer.names()[at]), LONG)
    machine.drop_caches([peer.store])
    peer.sampled = True
    usage = run(peer.command(name), LONG, env=peer.environment)
    print(f"{name}: {usage.wall:.2f} s, {usage.cpu:.2f} s of processor time, peak {usage.peak / 1e6:.0f} MB")


def _through_a_mount(peer: Sampled, work: Path, quick: bool, kinds: Sequence[str]) -> None:
    size = QUICK if quick else FULL
    peer.ingest()
    lists = choose(peer.releases, small=size.small, big=size.big, plenty=0, roots=size.roots)
    written = lists.write(work / "lists", peer.names())
    reader = Reader(work)
    machine.drop_caches([peer.store])
    peer.sampled = True
    print(f"mounted in {peer.mount():.2f} s, cold")
    for kind in kinds:
        for state in ("cold", "warm"):
            action = "walk" if kind == "roots" else "read"
            count = reader.run(action, 1, peer.base, written[kind], READ_SECONDS)
            print(
                f"{action} {kind}, {state}: {count.entries:,} entries, {count.bytes / 1e6:,.0f} MB in"
                f" {count.seconds:.2f} s"
            )
    peer.sampled = False
    for daemon in _stats(peer).get("daemons", []):
        print(json.dumps(daemon.get("requests", {})))
    peer.unmount()


def _stats(peer: Sampled) -> dict[str, list[dict[str, object]]]:
    done = subprocess.run(
        [str(word) for word in peer.command("stats", "--json")], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise BenchError(f"cidfs stats: {done.stderr.strip()}")
    found: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
    return found
