"""The command: corpus, measures, report. See `tools/bench --help`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from benchmark import machine, profile, report
from benchmark.corpus import Corpus, Release, given
from benchmark.machine import BenchError
from benchmark.measures import FULL, QUICK, Measures
from benchmark.nix import OnTop
from benchmark.peers import ALL, Cidfs, Peer
from benchmark.reader import Reader, choose
from benchmark.scale import Scale

STEPS: Final = ("ingest", "read", "memory", "scale", "nix")
ON_CORPUS: Final = {"ingest", "read", "memory"}
BEGAN: Final = time.monotonic()


def say(text: str) -> None:
    """Tell how far it is, on standard error."""
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", file=sys.stderr, flush=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measure cidfs beside what people use today, on real package releases, in one run.",
    )
    parser.add_argument("--quick", action="store_true", help="everything in small, within two minutes")
    parser.add_argument(
        "--peer", action="append", choices=[peer.name for peer in ALL], help="only these beside cidfs"
    )
    parser.add_argument("--only", action="append", choices=STEPS, help="only these steps")
    parser.add_argument("--profile", choices=profile.NAMES, help="say where the time goes")
    parser.add_argument("--out", type=Path, help="where results go (default: bench-results in the cache)")
    parser.add_argument("--corpus", type=Path, help="a folder of directories to use as releases")
    parser.add_argument("--cache", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, help="rounds, instead of the form's own number")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    told = arguments(words)
    # what ends a run from outside ends it as Ctrl-C does: with all mounts taken down
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    peers: list[Peer] = []
    work: Path | None = None
    try:
        told.cache.mkdir(parents=True, exist_ok=True)
        corpus = Corpus(told.cache / "corpus")
        releases: Sequence[Release] = []
        if told.profile or not told.only or ON_CORPUS & set(told.only):
            releases = given(told.corpus) if told.corpus else corpus.get(quick=told.quick)
        work = Path(tempfile.mkdtemp(dir=told.cache, prefix="run-"))
        say(_about(releases))
        if told.profile:
            profile.show(told.profile, work, releases, quick=told.quick)
            return 0
        return measure(told, releases, work, peers)
    except BenchError as e:
        print(f"tools/bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tools/bench: stopped", file=sys.stderr)
        return 130
    finally:
        for peer in peers:
            peer.unmount()
        machine.end_all()
        if work is not None and not any(machine.is_mounted(point) for point in work.glob("*/mnt")):
            shutil.rmtree(work, ignore_errors=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _about(releases: Sequence[Release]) -> str:
    kinds = len({release.package for release in releases})
    size = sum(release.bytes for release in releases) / 1e6
    files = sum(release.files for release in releases)
    return f"{len(releases)} releases of {kinds} packages, {size:,.0f} MB in {files:,} files"


def measure(told: argparse.Namespace, releases: Sequence[Release], work: Path, peers: list[Peer]) -> int:
    """Measure everything and report; fills peers as they are made, so that the caller can unmount them."""
    size = QUICK if told.quick else FULL
    if told.repeat:
        times = told.repeat
        size = replace(size, ingests=times, rounds=times, asks=times, builds=times)
    steps = told.only or STEPS
    reader = Reader(work)
    versions: dict[str, str] = {}
    failures: dict[str, str] = {}
    for kind in ALL:
        if kind is not Cidfs and told.peer and kind.name not in told.peer:
            continue
        peer = kind(work / kind.name, releases)
        try:
            peer.check()
            versions[peer.name] = peer.version()
        except (BenchError, OSError) as e:
            failures[peer.name] = str(e)
            say(f"{peer.name} is left out: {e}")
            continue
        peers.append(peer)

    measures = Measures(peers, releases, size, reader, say)
    results = measures.results
    results.failures.update(failures)
    if set(steps) & ON_CORPUS:
        say("ingest")
        measures.ingest()
    lists = choose(releases, small=size.small, big=size.big, plenty=size.plenty, roots=size.roots)
    if "read" in steps:
        say("reading")
        measures.read(work / "lists", lists)
    if "memory" in steps:
        say("memory of the daemons")
        measures.memory(work / "lists", lists)
    for peer in measures.peers:
        shutil.rmtree(peer.folder, ignore_errors=True)
    if "scale" in steps:
        say("growth with the number of paths")
        Scale(work, size.paths, results, reader, say).measure(size.rounds)
    if "nix" in steps:
        say("Nix on top")
        prefix = os.environ.get("CIDFS_TEST_NIX", "")
        OnTop(work / "nix", size, results, say).measure(Path(prefix) if prefix else None)
    results.calibrate()

    out = told.out or told.cache.parent / "bench-results"
    out.mkdir(parents=True, exist_ok=True)
    names = [peer.name for peer in peers]
    data = {
        "form": "quick" if told.quick else "full",
        "seconds": round(time.monotonic() - BEGAN),
        "machine": machine.facts(work),
        "cold": results.cold,
        "noise": {
            "same work, slowest beside fastest": max(results.noise) / min(results.noise),
            "spread of repeated measures": report.spread(results.values),
        },
        "versions": versions | _libraries(),
        "corpus": {
            "about": _about(releases),
            "releases": {release.name: [release.bytes, release.files] for release in releases},
        },
        "not_mounted": {peer.name: peer.mount_note for peer in peers if peer.mount_note},
        "failures": results.failures,
        **report.as_data(results.values, names),
    }
    (out / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
    _draw(results.values, names, out / "bench.png", _about(releases))
    text = show(data, results.values, names)
    (out / "bench.txt").write_text(text)
    (out / "bench.md").write_text(report.markdown(results.values, names))
    print(text, end="")
    say(f"written: {out}/bench.json, bench.md, bench.png, bench.txt")
    return 0 if not results.failures else 1


def _draw(values: report.Values, names: Sequence[str], path: Path, title: str) -> None:
    try:
        from benchmark import plot
    except ImportError as e:
        say(f"no picture: {e}")
    else:
        plot.draw(values, names, path, title)


def _libraries() -> dict[str, str]:
    wanted = {"pyfuse3", "lmdb", "zstandard", "pyfastcdc", "blake3", "trio"}
    found = {one.metadata["Name"].lower(): one.version for one in distributions()}
    return {"python": sys.version.split()[0], **{name: found[name] for name in sorted(wanted & set(found))}}


def show(data: dict[str, Any], values: report.Values, names: Sequence[str]) -> str:
    """Return the report as text."""
    facts, noise = data["machine"], data["noise"]
    lines = [
        f"{data['corpus']['about']}; {data['form']} form, {data['seconds']} s, {facts['date']}",
        f"{facts['cores']} cores ({facts['processor']}), {facts['memory_mb']:,} MB, Linux {facts['kernel']},"
        f" {facts['file_system']}",
        f"cold by {data['cold'] or 'nothing'}; the best of the rounds counts",
        f"noise: the same work took up to {noise['same work, slowest beside fastest']:.2f} times as long,"
        f" repeated measures spread by {noise['spread of repeated measures']:.0%} (median)",
        "",
        "Values",
        report.table(values, names),
        "",
        "Times better than (above 1: cidfs is better)",
        report.ratios(values, names),
        "",
        "Wanted"
        if data["form"] == "full"
        else "Wanted (of the full form: in small, what starting costs counts)",
        report.figures_text(report.figures(values)),
        "",
    ]
    growth = [(key, row["cidfs"]) for key, row in values.items() if key.startswith("scale_")]
    if growth:
        lines += ["Growth", *(f"{key[6:]:14} {report.number(min(found))}" for key, found in growth), ""]
    if on_top := report.nix_text(values):
        lines += ["With Nix on top: median (least to most)", on_top, ""]
    lines += [f"{name}: {note}" for name, note in data["not_mounted"].items()]
    lines += [f"failed: {name}: {why}" for name, why in data["failures"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code == 130 else sys.exit(code)
