"""Commands that bring store paths in: add, import."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cidfs.cli.common import GLOBALS, store_path, tell_mounts
from cidfs.cli.output import ingest_progress, result, say, steps_progress
from cidfs.engine.sources import DiskSource, NarSource
from cidfs.engine.wanted import Wanted
from cidfs.errors import CidfsError, Conflict, FormatError, SourceError, UsageError
from cidfs.formats.digest import parse_sha256
from cidfs.formats.store_path import StorePath, check_name, parse_store_path
from cidfs.local.publish import Published
from cidfs.local.store import LocalStore

if TYPE_CHECKING:
    from cidfs.engine.nix_db import ValidPath
    from cidfs.formats.realisation import Realisation
    from cidfs.formats.signing import PublicKey


def _ingest(
    store: LocalStore,
    wanted: Iterable[Wanted],
    *,
    asked_for: set[StorePath] | None = None,
    keep_going: bool = False,
    realisations: Sequence[Realisation] = (),
) -> None:
    """Run _ingesting, then put the realisations of what is published; report what failed."""
    import trio

    failed: list[CidfsError] = []
    trio.run(partial(_ingesting, store, wanted, failed, asked_for=asked_for, keep_going=keep_going))
    if realisations:
        from cidfs.engine.nix_realisations import put_all

        failed += [Conflict(each.conflict) for each in put_all(store, realisations) if each.conflict]
    _report(failed)


async def _ingesting(
    store: LocalStore,
    wanted: Iterable[Wanted],
    failed: list[CidfsError],
    *,
    asked_for: set[StorePath] | None,
    keep_going: bool,
) -> None:
    """Ingest, and print what is new, and of the rest what was asked for (all when that is None).

    With keep_going, a path that cannot be ingested is added to what failed and the others go on. A conflict
    always is.
    """
    from cidfs.engine.ingest import ingest

    def show(outcomes: Sequence[Published]) -> None:
        for outcome in outcomes:
            if outcome.conflict:
                failed.append(Conflict(outcome.conflict))
            elif outcome.new or asked_for is None or outcome.path in asked_for:
                result(outcome.path.full(store.store_dir))
        sys.stdout.flush()

    with ingest_progress() as progress:
        on_failed = failed.append if keep_going else None
        try:
            await ingest(store, wanted, progress=progress, on_published=show, on_failed=on_failed)
        finally:
            tell_mounts(store)


def _report(failed: Sequence[CidfsError]) -> None:
    """Say what failed, a line each; the first one is the command's own error."""
    for error in failed[1:]:
        say(f"cidfs: {error}")
    if failed:
        raise failed[0]


def add(
    paths: Annotated[
        list[Path], typer.Argument(metavar="DIR", parser=Path, help="Directories, files or symlinks.")
    ],
    name: Annotated[
        str | None, typer.Option(help="The name in the store path; by default the last component of DIR.")
    ] = None,
) -> None:
    """Add directories or files to the store, each as the store path that `nix store add` gives.

    Print the paths.
    """
    if name is not None and len(paths) > 1:
        raise UsageError("--name goes with one directory only")
    wanted = []
    for path in paths:
        base = os.path.basename(os.path.abspath(path)) if name is None else name
        if not os.path.lexists(path):
            raise SourceError(f"{path}: no such file or directory")
        try:
            wanted.append(Wanted(DiskSource(str(path)), name=check_name(base)))
        except FormatError as e:
            raise UsageError(f"{path}: {e}; give another with --name") from None
    with GLOBALS.open_store(write=True, create=True) as store:
        _ingest(store, wanted)


def import_(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH", help="Store paths (absolute or base names); - for a NAR on standard input."
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="ROOT|URL",
            help="The root folder of the Nix store to import from, or a binary cache: file:///folder.",
        ),
    ] = "/",
    closure: Annotated[
        bool, typer.Option("--closure/--no-closure", help="With all that the paths refer to, or without.")
    ] = True,
    everything: Annotated[
        bool, typer.Option("--all", help="Every valid path of the Nix store, all that the cache has.")
    ] = False,
    trusted_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-key",
            metavar="NAME:BASE64",
            help="With a binary cache: a public key to trust, besides those in the settings; repeatable.",
        ),
    ] = None,
    no_check_sigs: Annotated[
        bool, typer.Option("--no-check-sigs", help="With a binary cache: take paths without signatures too.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="With -: the name that the contents shall have, or a whole store path to take as it is."
        ),
    ] = None,
    nar_hash: Annotated[
        str | None,
        typer.Option(help="With -: the SHA-256 that the NAR must have, in any of Nix's notations."),
    ] = None,
) -> None:
    """Import paths from a Nix store or a binary cache, with what is known of them there, or a NAR.

    Print what was added. Each NAR hash is computed and compared; a mismatch publishes nothing. Nix may be
    using its store meanwhile. Paths from a binary cache must be signed by a trusted key.
    """
    texts = paths or []
    if (trusted_keys or no_check_sigs) and "://" not in source:
        raise UsageError("--trusted-key and --no-check-sigs go with a binary cache (--from file:///folder)")
    if texts == ["-"]:
        if everything:
            raise UsageError("a NAR on standard input (-) is one path: leave out --all")
        if name is None:
            raise UsageError("a NAR on standard input (-) needs --name")
        _import_nar(name, nar_hash)
        return
    if "-" in texts:
        raise UsageError("- (a NAR on standard input) stands alone")
    if name is not None or nar_hash is not None:
        raise UsageError("--name and --nar-hash go with a NAR on standard input (-)")
    if texts and everything:
        raise UsageError("name the paths to import or say --all, not both")
    if not texts and not everything:
        raise UsageError("name the paths to import, or --all")
    store_dir = GLOBALS.settings().store.store_dir
    if "://" in source:
        chosen = None if everything else [store_path(t, store_dir) for t in texts]
        _import_from_cache(source, chosen, closure, trusted_keys or [], no_check_sigs)
        return
    if (Path(source) / "nix-cache-info").is_file():
        raise UsageError(f"--from {source}: say a binary cache as a URL: {Path(source).absolute().as_uri()}")
    from cidfs.engine.nix_db import NixDatabase
    from cidfs.engine.nix_realisations import realisations_in

    # closed before anything is read: a reader of its database keeps Nix from tidying up its log
    with NixDatabase(Path(source).absolute(), store_dir) as database:
        asked = list(database.all_paths()) if everything else [store_path(t, store_dir) for t in texts]
        ordered = database.ordered(asked, closure=closure or everything)
        realisations = realisations_in(database, {valid.path for valid in ordered})
    wanted = [_wanted(database.physical(valid.path), valid) for valid in ordered]
    with GLOBALS.open_store(write=True, create=True) as store:
        _ingest(store, wanted, asked_for=set(asked), keep_going=everything, realisations=realisations)


def _wanted(where: Path, valid: ValidPath) -> Wanted:
    return Wanted(
        DiskSource(str(where)),
        path=valid.path,
        expected_hash=valid.nar_hash,
        expected_size=valid.nar_size,
        references=valid.references,
        deriver=valid.deriver,
        ca=valid.ca,
        signatures=valid.signatures,
    )


def _import_from_cache(
    url: str,
    asked: Sequence[StorePath] | None,
    closure: bool,
    trusted_keys: Sequence[str],
    no_check_sigs: bool,
) -> None:
    """Import paths, everything when asked is None."""
    import trio

    from cidfs.engine.caches import Trust, gather, gather_all
    from cidfs.formats.signing import PublicKeys
    from cidfs.remote.upstream import open_upstream

    settings = GLOBALS.settings()
    keys = [*_keys("--trusted-key", trusted_keys), *_keys("[trust] public_keys", settings.trust.public_keys)]
    trust = Trust(PublicKeys(keys), settings.trust.require_signatures and not no_check_sigs)
    failed: list[CidfsError] = []

    async def work() -> None:
        upstream = await open_upstream(url, settings.store.store_dir)
        with GLOBALS.open_store(write=True, create=True) as store:
            with steps_progress() as steps:
                on_left = partial(steps.remaining, "reading narinfos")
                if asked is None:
                    wanted = await gather_all(
                        upstream, store, trust, on_failed=failed.append, on_left=on_left
                    )
                else:
                    wanted = await gather(upstream, asked, store, trust, closure=closure, on_left=on_left)
            asked_for = None if asked is None else set(asked)
            await _ingesting(store, wanted, failed, asked_for=asked_for, keep_going=asked is None)

    trio.run(work)
    _report(failed)


def _keys(where: str, texts: Sequence[str]) -> list[PublicKey]:
    from cidfs.formats.signing import parse_public_key

    try:
        return [parse_public_key(text) for text in texts]
    except FormatError as e:
        raise UsageError(f"{where}: {e}") from None


def _import_nar(name: str, nar_hash: str | None) -> None:
    store_dir = GLOBALS.settings().store.store_dir
    path: StorePath | None = None
    try:
        path = parse_store_path(name, store_dir)
    except FormatError:
        try:
            check_name(name)
        except FormatError as e:
            raise UsageError(str(e)) from None
    try:
        expected = parse_sha256(nar_hash) if nar_hash is not None else None
    except FormatError as e:
        raise UsageError(f"--nar-hash: {e}") from None
    if sys.stdin.isatty():
        raise UsageError(
            "standard input is a terminal; pipe a NAR into it, as `nix-store --dump DIR | cidfs import -`"
        )
    source = NarSource(_stdin_read, "standard input")
    with GLOBALS.open_store(write=True, create=True) as store:
        _ingest(store, [Wanted(source, name=name, path=path, expected_hash=expected)])


def _stdin_read(count: int) -> bytes:
    return os.read(0, count)
