"""What the values say: the best of each, ratios against each peer, and which wanted figures are reached.

Pure: values in, text and plain data out. Of several values the best one counts, for noise only ever slows
down; a ratio is cidfs beside a peer of the same run, above 1 where cidfs is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

Values = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the table."""

    key: str
    title: str
    unit: str
    more_is_better: bool


MEASURES: Final = [
    Measure("ingest", "ingest", "MB/s", True),
    Measure("ingest_cpu", "ingest, processor time", "s", False),
    Measure("ingest_peak_mb", "ingest, peak memory", "MB", False),
    Measure("stored_mb", "stored size, with index", "MB", False),
    Measure("mount", "time to mount, cold", "s", False),
    Measure("walk_cold", "walk and stat, cold", "entries/s", True),
    Measure("walk_warm", "walk and stat, warm", "entries/s", True),
    Measure("walk2_cold", "walk, 2 readers, cold", "entries/s", True),
    Measure("walk2_warm", "walk, 2 readers, warm", "entries/s", True),
    Measure("small_cold", "small files, cold", "files/s", True),
    Measure("small_warm", "small files, warm", "files/s", True),
    Measure("small2_cold", "small files, 2 readers, cold", "files/s", True),
    Measure("small2_warm", "small files, 2 readers, warm", "files/s", True),
    Measure("big_cold", "sequential read, cold", "MB/s", True),
    Measure("big_warm", "sequential read, warm", "MB/s", True),
    Measure("big2_cold", "sequential, 2 readers, cold", "MB/s", True),
    Measure("big2_warm", "sequential, 2 readers, warm", "MB/s", True),
    Measure("daemon_mb", "daemon memory after use", "MB", False),
    Measure("daemon_peak_mb", "daemon memory, peak", "MB", False),
    Measure("daemon_cpu", "daemon processor time", "s", False),
]
BY_KEY: Final = {measure.key: measure for measure in MEASURES}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure that is asked for: a measure's ratio to a peer, or a value of cidfs alone."""

    title: str
    key: str
    peer: str
    limit: float
    at_least: bool


WANTED: Final = [
    Wanted("ingest, MB/s beside casync's", "ingest", "casync", 2.5, True),
    Wanted("ingest, MB/s beside restic's", "ingest", "restic", 2.0, True),
    Wanted("stored size beside restic's", "stored_mb", "restic", 1.0, False),
    Wanted("cold sequential read beside squashfuse_ll's", "big_cold", "squashfuse_ll", 0.9, True),
    Wanted("cold sequential read beside casync's mount", "big_cold", "casync", 5.0, True),
    Wanted("cold walk-and-stat beside squashfuse_ll's", "walk_cold", "squashfuse_ll", 1.2, True),
    Wanted("daemon memory after the reads, MB", "daemon_peak_mb", "", 150.0, False),
    Wanted("mounting the larger index, s", "scale_mount", "", 1.0, False),
    Wanted("a look-up in the larger index beside the smaller", "scale_lookup_ratio", "", 1.2, False),
    Wanted("gc of ten times the paths, times as long", "scale_gc_ratio", "", 12.0, False),
    Wanted("verify of ten times the paths, times as long", "scale_verify_ratio", "", 12.0, False),
    Wanted("rebuild of ten times the paths, times as long", "scale_rebuild_ratio", "", 12.0, False),
    Wanted("isValidPath, times as long as nix-daemon", "nix_valid_ratio", "", 2.0, False),
    Wanted("isValidPath of what is absent, times as long", "nix_absent_ratio", "", 2.0, False),
    Wanted("queryPathInfo, times as long as nix-daemon", "nix_info_ratio", "", 2.0, False),
    Wanted("a build above it, times as long as above a folder", "nix_build_ratio", "", 1.15, False),
]

NIX: Final = {
    "nix_valid_us": "isValidPath, µs",
    "nix_absent_us": "isValidPath of what is absent, µs",
    "nix_info_us": "queryPathInfo, µs",
    "nix_build_s": "a build of many derivations, s",
}
"""What is measured with Nix on top; medians count."""
NIX_PEERS: Final = ("cidfs", "plain folder", "nix-daemon")


@dataclass(frozen=True, slots=True)
class Figure:
    """A wanted figure, as measured; got is None where it was not."""

    title: str
    wanted: str
    got: float | None
    reached: bool | None


def best(values: Values, key: str, peer: str) -> float | None:
    """Return the value that counts of those measured, or None."""
    found = values.get(key, {}).get(peer)
    if not found:
        return None
    more = BY_KEY[key].more_is_better if key in BY_KEY else False
    return max(found) if more else min(found)


def ratio(values: Values, key: str, peer: str, subject: str = "cidfs") -> float | None:
    """Return how many times better the subject is than a peer, or None."""
    ours, theirs = best(values, key, subject), best(values, key, peer)
    if not ours or not theirs:
        return None
    return ours / theirs if BY_KEY[key].more_is_better else theirs / ours


def figures(values: Values) -> list[Figure]:
    """Return the wanted figures, as far as they were measured."""
    found = []
    for wanted in WANTED:
        got: float | None
        if wanted.peer:
            got = ratio(values, wanted.key, wanted.peer)
            if got is not None and not BY_KEY[wanted.key].more_is_better:
                got = 1 / got  # a size or a time beside the peer's, not how much better it is
        else:
            got = best(values, wanted.key, "cidfs")
        reached = None if got is None else got >= wanted.limit if wanted.at_least else got <= wanted.limit
        sign = "≥" if wanted.at_least else "≤"
        found.append(Figure(wanted.title, f"{sign} {wanted.limit:g}", got, reached))
    return found


def spread(values: Values) -> float:
    """Return by how much repeated measures differ: the median over all of (largest - smallest) / median."""
    spreads = [
        (max(found) - min(found)) / median(found)
        for of_peer in values.values()
        for found in of_peer.values()
        if len(found) > 1 and median(found) > 0
    ]
    return median(spreads) if spreads else 0.0


def number(value: float | None) -> str:
    """Return a value with three digits that count."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(values: Values, peers: Sequence[str]) -> str:
    """Return all values, a row a measure and a column a peer."""
    rows = [["", "", *peers]]
    for measure in MEASURES:
        if measure.key in values:
            cells = [number(best(values, measure.key, peer)) for peer in peers]
            rows.append([measure.title, measure.unit, *cells])
    return _aligned(rows)


def ratios(values: Values, peers: Sequence[str]) -> str:
    """Return how many times better cidfs is than each peer."""
    others = [peer for peer in peers if peer != "cidfs"]
    rows = [["", *others]]
    for measure in MEASURES:
        cells = [ratio(values, measure.key, peer) for peer in others]
        if any(cell is not None for cell in cells):
            rows.append([measure.title, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    return _aligned(rows)


def nix_rows(values: Values) -> list[list[str]]:
    """Return what was measured with Nix on top: medians, and in brackets the least and the most."""
    rows = [["", *NIX_PEERS]]
    for key, title in NIX.items():
        if key in values:
            cells = []
            for peer in NIX_PEERS:
                found = values[key].get(peer)
                ends = f" ({number(min(found))} to {number(max(found))})" if found else ""
                cells.append(f"{number(median(found))}{ends}" if found else "-")
            rows.append([title, *cells])
    return rows if len(rows) > 1 else []


def nix_text(values: Values) -> str:
    """Return the same as a table."""
    return _aligned(rows) if (rows := nix_rows(values)) else ""


def figures_text(found: Sequence[Figure]) -> str:
    """Return the wanted figures and whether they are reached."""
    rows = [["", "wanted", "measured", ""]]
    for figure in found:
        state = {None: "not measured", True: "reached", False: "NOT REACHED"}[figure.reached]
        rows.append([figure.title, figure.wanted, number(figure.got), state])
    return _aligned(rows)


def markdown(values: Values, peers: Sequence[str]) -> str:
    """Return the tables of docs/performance.md: what is wanted; then ratios, with each value behind."""
    lines = ["| figure | wanted | measured | |", "|---|---|---|---|"]
    for figure in figures(values):
        state = {None: "not measured", True: "reached", False: "**not reached**"}[figure.reached]
        lines.append(f"| {figure.title} | {figure.wanted} | {number(figure.got)} | {state} |")
    others = [peer for peer in peers if peer != "cidfs"]
    lines += ["", f"| | cidfs | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    for measure in MEASURES:
        if measure.key in values:
            cells = [f"{measure.title}, {measure.unit}", number(best(values, measure.key, "cidfs"))]
            for peer in others:
                times, value = ratio(values, measure.key, peer), best(values, measure.key, peer)
                cells.append("" if times is None else f"**{times:.2f}** ({number(value)})")
            lines.append(f"| {' | '.join(cells)} |")
    if on_top := nix_rows(values):
        lines += ["", f"| {' | '.join(on_top[0])} |", "|---" * len(on_top[0]) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in on_top[1:]]
    return "\n".join(lines) + "\n"


def as_data(values: Values, peers: Sequence[str]) -> dict[str, Any]:
    """Return values, what counts of them, ratios and wanted figures as plain data for JSON."""
    return {
        "values": {key: {peer: list(found) for peer, found in row.items()} for key, row in values.items()},
        "best": {key: {peer: best(values, key, peer) for peer in row} for key, row in values.items()},
        "ratios": {
            measure.key: {peer: ratio(values, measure.key, peer) for peer in peers if peer != "cidfs"}
            for measure in MEASURES
            if measure.key in values
        },
        "figures": [
            {"title": f.title, "wanted": f.wanted, "measured": f.got, "reached": f.reached}
            for f in figures(values)
        ],
        "spread": spread(values),
    }


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
