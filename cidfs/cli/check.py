"""Commands that examine the store and mend it: verify, rebuild."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cidfs.cli.common import GLOBALS, cid, published, refuse_foreign, store_path
from cidfs.cli.output import count_text, result, say, steps_progress
from cidfs.errors import Damaged, PathAbsent, SourceError, UsageError
from cidfs.formats.digest import looks_like_cid
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore, PublishedPath

if TYPE_CHECKING:
    from cidfs.engine.findings import Report
    from cidfs.engine.verify import Depth, Sample

JSON_SCHEMA = 1


def verify(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH",
            help="Store paths or manifests' CIDs; none: the whole store.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read no chunk: index, journal, manifests.")] = False,
    sample: Annotated[
        str | None,
        typer.Option(metavar="N|P%", help="As --quick, and read so many chunks, or that share of them."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="With --sample: read the chunks that this seed chose before.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Store again what is damaged and can be had from elsewhere.")
    ] = False,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="ORIGINAL",
            help="With --repair: an original directory or file, the root of a Nix store, or a binary cache"
            " (file://…). May be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, on one line.")] = False,
) -> None:
    """Check what is stored: every frame, every manifest, every NAR hash, index against packs and journal.

    Prints a line for each damaged thing and for each store path that it touches; the exit code is 16 unless
    all of it was repaired.
    """
    import trio

    from cidfs.engine.verify import Depth
    from cidfs.engine.verify import verify as check

    if quick and sample is not None:
        raise UsageError("--quick reads no chunk and --sample some: say one of them")
    if paths and sample is not None:
        raise UsageError("--sample is of the whole store: leave out the paths")
    if seed is not None and sample is None:
        raise UsageError("--seed goes with --sample")
    if sources and not repair:
        raise UsageError("--from goes with --repair")
    for source in sources or ():
        if "://" not in source and not os.path.lexists(source):
            raise SourceError(f"{source}: no such file or directory")
    depth = Depth(quick, _sample(sample, seed) if sample is not None else None)
    if depth.sample is not None:
        say(f"a sample of {sample}, chosen with --seed {depth.sample.seed}")
    with GLOBALS.open_store(write=repair) as store, steps_progress() as steps:
        chosen = [p for text in paths for p in _named(store, text)] if paths else None

        async def work() -> tuple[Report, list[str]]:
            report = await check(store, chosen, steps, depth)
            if not repair:
                return report, []
            from cidfs.engine.repair import Repair

            mending = Repair(store, report, steps)
            await mending.run(sources or [], whole=chosen is None, read_chunks=depth.full)
            return report, mending.said

        report, said = trio.run(work)
    for line in said:
        say(f"cidfs: {line}")
    _show(store, report, depth, whole=chosen is None, as_json=as_json)


def _sample(text: str, seed: int | None) -> Sample:
    """Return the sample that an argument means."""
    from cidfs.engine.verify import Sample

    if seed is None:
        seed = secrets.randbelow(1 << 32)
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return Sample(0, share, seed)
        elif int(text) > 0:
            return Sample(int(text), 0, seed)
    except ValueError:
        pass
    raise UsageError(f"--sample {text}: neither a number of chunks (1000) nor a share of them (5%)")


def _show(store: LocalStore, report: Report, depth: Depth, *, whole: bool, as_json: bool) -> None:
    left = report.left
    if as_json:
        result(json.dumps(_as_json(report, depth)))
    else:
        for line in report.problems:
            result(line)
    read = count_text(report.paths, "store path")
    if left:
        repaired = f", {report.repaired} more repaired" if report.repaired else ""
        raise Damaged(f"{store.state.root}: {count_text(left, 'problem')} found{repaired}; {read} verified")
    if whole and depth.full:
        read = f"{count_text(report.packs, 'pack')} with {count_text(report.frames, 'frame')} and {read}"
    elif whole:
        chunks = f"{count_text(report.chunks, 'chunk')} read" if depth.sample else "no chunk read"
        read = f"{read} ({chunks})"
    well = (
        f"{count_text(report.repaired, 'problem')} found and repaired" if report.repaired else "all is well"
    )
    say(f"verified {read}: {well}")


def _as_json(report: Report, depth: Depth) -> dict[str, object]:
    return {
        "schema": JSON_SCHEMA,
        "paths": report.paths,
        "packs": report.packs,
        "frames": report.frames,
        "chunks": report.chunks,
        "bytes": report.bytes,
        "seed": depth.sample.seed if depth.sample is not None else None,
        "problems": report.left,
        "findings": [finding.as_json() for finding in report.findings],
        "more": {kind: count for kind, count in sorted(report.ledger.more.items()) if count},
    }


def _named(store: LocalStore, text: str) -> list[PublishedPath]:
    """Return the published path that an argument names, or those with a manifest."""
    if not looks_like_cid(text):
        path = store_path(text, store.store_dir)
        return [PublishedPath(path, published(store, path))]
    digest = cid(text)
    found = [p for p in store.paths() if p.row.manifest == digest]
    if not found:
        raise PathAbsent(f"{text}: no store path at {store.state.root} has this manifest")
    return found


def rebuild(
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss", help="Go on although the journal has gaps; what stood there is forgotten."
        ),
    ] = False,
) -> None:
    """Make the index anew from packs and journal: the same paths, attributes, bytes and inode numbers.

    Mounts may run meanwhile; they take the new index within a second. The exit code is 16 when a published
    path has lost its manifest.
    """
    from cidfs.local.rebuild import rebuild as make_anew

    settings = GLOBALS.settings()
    timeout = settings.store.lock_timeout if GLOBALS.lock_timeout is None else GLOBALS.lock_timeout
    refuse_foreign(Path(settings.store.state))
    state = StateFolder.open(Path(settings.store.state))
    with steps_progress() as steps:
        report = make_anew(state, lock_timeout=timeout, accept_loss=accept_loss, progress=steps.remaining)
    for line in report.problems:
        say(f"cidfs: {line}")
    say(
        f"rebuilt: {report.paths} store paths, {report.chunks} chunks and {report.manifests} manifests"
        f" in {report.packs} packs"
    )
    if report.lost_manifests:
        lost = count_text(report.lost_manifests, "store path")
        raise Damaged(
            f"{state.root}: {lost} cannot be read without a manifest;"
            " `cidfs verify --repair --from ORIGINAL` makes it anew"
        )
