"""The stats command: what the store holds, and what its daemons do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cidfs import control
from cidfs.cli.common import GLOBALS
from cidfs.cli.output import result, say, show_grid, show_table, size_text
from cidfs.errors import CidfsError
from cidfs.local.store import LocalStore

SCHEMA = 1


class StoreStats(msgspec.Struct, frozen=True):
    """What a store holds; all sizes in bytes. docs/command-line.md says what each field counts."""

    state: str
    store_dir: str
    paths: int
    nodes: int
    files: int
    chunks: int
    manifests: int
    packs: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    manifest_bytes: int
    index_bytes: int
    disk_bytes: int
    dedup_factor: float
    compression_factor: float
    overall_factor: float
    next_serial: int
    next_inode: int
    damaged_rows: int


class Stats(msgspec.Struct, frozen=True):
    """The answer of `stats --json`."""

    schema: int
    store: StoreStats
    daemon: control.DaemonStats | None
    daemons: list[control.DaemonStats]


def stats(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs (schema 1).")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until interrupted.")] = False,
) -> None:
    """Show sizes, numbers, deduplication and compression.

    Of running daemons also requests, latencies and caches.
    """
    while True:
        with GLOBALS.open_store() as store:
            now = collect(store)
        if as_json:
            result(msgspec.json.encode(now).decode())
        else:
            _show(now)
        if not watch:
            return
        time.sleep(1)


def collect(store: LocalStore) -> Stats:
    """Count, and ask every daemon that mounts this store."""
    t = store.totals()
    index = _used(store.state.root / "index")
    disk = index + _used(store.state.root / "packs") + _used(store.state.root / "journal")
    daemons = []
    for path, info in store.state.leases():
        if info.kind != "mount":
            continue
        try:
            daemons.append(control.ask(path.with_suffix(".sock"), control.Request("stats")))
        except (OSError, CidfsError) as e:
            say(f"cidfs: the daemon of {info.mountpoint} (process {info.pid}) does not answer: {e}")
    return Stats(
        schema=SCHEMA,
        store=StoreStats(
            state=os.fsencode(store.state.root).decode(errors="backslashreplace"),
            store_dir=store.store_dir,
            paths=t.paths,
            nodes=t.nodes,
            files=t.files,
            chunks=t.chunks,
            manifests=t.manifests,
            packs=t.packs,
            logical_bytes=t.logical,
            unique_bytes=t.unique,
            stored_bytes=t.stored,
            manifest_bytes=t.manifest_stored,
            index_bytes=index,
            disk_bytes=disk,
            dedup_factor=_ratio(t.logical, t.unique),
            compression_factor=_ratio(t.unique, t.stored),
            overall_factor=_ratio(t.logical, disk),
            next_serial=t.next_serial,
            next_inode=t.next_base,
            damaged_rows=t.damaged_rows,
        ),
        daemon=daemons[0] if daemons else None,
        daemons=daemons,
    )


def _ratio(a: int, b: int) -> float:
    return round(a / b, 3) if b else 1.0


def _used(folder: Path) -> int:
    """Return the bytes of disk that a folder's files take."""
    used = 0
    for here, _, names in os.walk(folder):
        for name in names:
            try:
                used += os.stat(os.path.join(here, name)).st_blocks * 512
            except OSError:
                continue  # gone meanwhile
    return used


def _show(now: Stats) -> None:
    s = now.store
    show_table(
        f"Store {s.state}",
        [
            ("store paths", f"{s.paths:,}"),
            ("files", f"{s.files:,}"),
            ("files, directories and links", f"{s.nodes:,}"),
            ("chunks", f"{s.chunks:,}"),
            ("packs", f"{s.packs:,}"),
            ("logical", size_text(s.logical_bytes)),
            ("after deduplication", f"{size_text(s.unique_bytes)}  ({s.dedup_factor:.2f}x)"),
            ("after compression", f"{size_text(s.stored_bytes)}  ({s.compression_factor:.2f}x)"),
            ("manifests", size_text(s.manifest_bytes)),
            ("index", size_text(s.index_bytes)),
            ("on disk, all in all", f"{size_text(s.disk_bytes)}  ({s.overall_factor:.2f}x)"),
        ],
    )
    for d in now.daemons:
        result("")
        show_table(
            f"Daemon {d.pid} at {d.mountpoint} ({d.transport})",
            [
                ("up", f"{d.uptime:,.0f} s"),
                ("memory", size_text(d.memory)),
                ("caches", size_text(d.cached_bytes)),
                ("read by programs", size_text(d.bytes_read)),
                ("chunks from memory / from disk", f"{d.chunk_hits:,} / {d.chunk_reads:,}"),
                ("manifests from memory / from disk", f"{d.manifest_hits:,} / {d.manifest_reads:,}"),
                ("damaged or missing", f"{d.damaged:,}"),
            ],
        )
        if d.nix is not None:
            show_table(
                f"Nix at {d.nix.socket} (process {d.nix.pid})",
                [
                    ("connections now / in all", f"{d.nix.connections:,} / {d.nix.connections_total:,}"),
                    ("requests", f"{d.nix.requests:,}"),
                    (
                        "refused / connections ended for what they did",
                        f"{d.nix.refused:,} / {d.nix.broken:,}",
                    ),
                    ("answered as absent although published", f"{d.nix.withheld:,}"),
                    ("started again", f"{d.nix.restarts:,}"),
                ],
            )
        if d.overlays is not None and d.overlays.above:
            show_table(
                f"Overlays: {', '.join(d.overlays.above)}",
                [
                    ("reconfigured", f"{d.overlays.remounts:,}"),
                    ("whiteouts taken out", f"{d.overlays.unveiled:,}"),
                    ("shown up to serial", f"{d.overlays.confirmed:,}"),
                    *([("new paths are not shown", d.overlays.complaint)] if d.overlays.complaint else []),
                ],
            )
        rows = [
            [
                kind,
                f"{r.count:,}",
                f"{r.errors:,}",
                *(f"{v:,.0f}" for v in (r.p50_us, r.p90_us, r.p99_us, r.max_us)),
            ]
            for kind, r in d.requests.items()
        ]
        show_grid("Requests (microseconds)", ["kind", "count", "errors", "p50", "p90", "p99", "max"], rows)
