"""Commands that examine the store and mend it: verify, rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cidfs.cli.common import GLOBALS, cid, published, store_path
from cidfs.cli.output import result, say, steps_progress
from cidfs.errors import Damaged, PathAbsent
from cidfs.formats.digest import looks_like_cid
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore, PublishedPath


def verify(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH",
            help="Store paths or manifests' CIDs; none: the whole store.",
        ),
    ] = None,
) -> None:
    """Check what is stored: every frame, every manifest, every NAR hash, index against journal.

    Prints a line for each damaged thing and for each store path that it touches; the exit code is 16 then.
    """
    import trio

    from cidfs.engine.verify import verify as check

    with GLOBALS.open_store() as store, steps_progress() as steps:
        chosen = None
        if paths:
            chosen = [p for text in paths for p in _named(store, text)]
        report = trio.run(check, store, chosen, steps)
    for line in report.problems:
        result(line)
    if report.problems:
        raise Damaged(
            f"{store.state.root}: {len(report.problems)} problems found; {report.paths} store paths were read"
        )
    scope = f"{report.packs} packs with {report.frames} frames and " if chosen is None else ""
    paths_text = "1 store path" if report.paths == 1 else f"{report.paths} store paths"
    say(f"verified {scope}{paths_text}: all is well")


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

    Mounts may run meanwhile; they take the new index within a second.
    """
    from cidfs.local.rebuild import rebuild as make_anew

    settings = GLOBALS.settings()
    timeout = settings.store.lock_timeout if GLOBALS.lock_timeout is None else GLOBALS.lock_timeout
    state = StateFolder.open(Path(settings.store.state))
    with steps_progress() as steps:
        report = make_anew(state, lock_timeout=timeout, accept_loss=accept_loss, progress=steps.remaining)
    for line in report.problems:
        say(f"cidfs: {line}")
    say(
        f"rebuilt: {report.paths} store paths, {report.chunks} chunks and {report.manifests} manifests"
        f" in {report.packs} packs"
    )
