"""Commands that take things out: remove, gc."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cidfs.cli.common import GLOBALS, store_path, tell_mounts
from cidfs.cli.output import count_text, result, say, size_text, steps_progress
from cidfs.errors import InUse, PathAbsent
from cidfs.formats.store_path import StorePath
from cidfs.local.store import LocalStore
from cidfs.local.survey import Report


def remove(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Store paths.")],
    referrers: Annotated[
        bool, typer.Option("--referrers", help="With all that refers to them, directly or not.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also what others refer to, and also under an overlay that uses this store."
        ),
    ] = False,
) -> None:
    """Take store paths out of the store; print what was removed.

    The names are gone at once, from running mounts too; who has a file of theirs open can read on. What they
    took up is freed by `cidfs gc`.
    """
    with GLOBALS.open_store(write=True) as store:
        wanted = [store_path(text, store.store_dir) for text in paths]
        if not force:
            _refuse_under_overlay(store)

        def show(gone: Sequence[StorePath]) -> None:
            for path in gone:
                result(path.full(store.store_dir))
            sys.stdout.flush()

        absent = store.remove(wanted, referrers=referrers, force=force, on_removed=show)
        tell_mounts(store)
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise PathAbsent(f"{absent[0].full(store.store_dir)}{more}: not in the store at {store.state.root}")


def _refuse_under_overlay(store: LocalStore) -> None:
    """Raise InUse while an overlay stands on a mount of a store."""
    from cidfs.mount import mountinfo, overlay

    for info in mountinfo.mounts():
        if info.type == mountinfo.FILE_SYSTEM_TYPE and _is_same(mountinfo.source_of(info), store.state.root):
            above = overlay.overlays_above(Path(info.mountpoint))
            if above:
                raise InUse(
                    f"{above[0].mountpoint}: an overlay stands on the mount at {info.mountpoint}, and Nix's"
                    " database there may call the path valid; take the overlay down first, or say --force"
                )


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Free what no store path needs: dead chunks, leftovers of killed processes, the journal's past.

    Mounts and adds may run meanwhile; what a running add may still need is left to the next time. It may be
    interrupted at any moment.
    """
    from cidfs.local.collect import collect

    with GLOBALS.open_store(write=not dry_run) as store:
        with steps_progress() as steps:
            report = collect(store, dry_run=dry_run, progress=steps.remaining)
        tell_mounts(store)
    for line in report.problems:
        say(f"cidfs: {line}")
    if as_json:
        result(msgspec.json.encode(report).decode())
    else:
        _show(report, "would free" if dry_run else "freed")


def _show(report: Report, verb: str) -> None:
    freed = report.pack_bytes + report.sparse_bytes + report.leftover_bytes
    packs = report.packs + report.sparse
    dead = count_text(report.dead_chunks + report.dead_manifests, "dead frame")
    result(
        f"{verb} {size_text(freed)}: {count_text(packs, 'pack')}, {count_text(report.leftovers, 'leftover')};"
        f" {dead} of {size_text(report.dead_bytes)};"
        f" {count_text(report.paths, 'store path')} {'stays' if report.paths == 1 else 'stay'}"
    )
    if report.held_bytes:
        held = f"{size_text(report.held_bytes)} of {count_text(report.held, 'removed path')}"
        say(f"cidfs: {held} stay for mounts older than the removal; unmount these, then collect again")
    if report.waiting:
        waiting = f"{count_text(report.waiting, 'pack')} of {size_text(report.waiting_bytes)}"
        say(f"cidfs: {waiting} may be needed by an add or import that runs; collect again when it has ended")
