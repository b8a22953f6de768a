"""Take realisations out of the database of a Nix store into a store here.

Nix has tables for them where it was ever used with `ca-derivations` (`libstore/ca-specific-schema.sql`). Up
to 2.34 that is `Realisations`, by the derivation's hash, with `RealisationsRefs`, what they depend on; from
2.35 on `BuildTraceV3`, by the derivation's base name. A database may have both. Synchronous.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from cidfs.engine.nix_db import NixDatabase
from cidfs.errors import FormatError
from cidfs.formats.realisation import Realisation, id_of
from cidfs.formats.store_path import StorePath, parse_store_path
from cidfs.local.publish import Realised
from cidfs.local.store import LocalStore

GROUP: Final = 1000

_TABLES: Final = "select name from sqlite_master where type = 'table'"
_REALISATIONS: Final = """
    select r.id, r.drvPath, r.outputName, v.path, r.signatures
    from Realisations r join ValidPaths v on v.id = r.outputPath order by r.id
"""
_DEPENDENT: Final = """
    select d.referrer, r.drvPath, r.outputName, v.path
    from RealisationsRefs d join Realisations r on r.id = d.realisationReference
    join ValidPaths v on v.id = r.outputPath
"""
_BUILD_TRACE: Final = """
    select id, drvPath, outputName, outputPath, signatures from BuildTraceV3 order by id
"""


def realisations_in(database: NixDatabase, paths: Collection[StorePath]) -> list[Realisation]:
    """Return what a Nix store knows to have come to some paths.

    Raise SourceError where its database cannot be read, FormatError for what cannot stand in it.
    """
    tables = {name for (name,) in database.rows(_TABLES)}
    found: list[Realisation] = []
    try:
        if "Realisations" in tables:
            dependent: dict[int, dict[str, str]] = {}
            if "RealisationsRefs" in tables:
                for number, derivation, output, path in database.rows(_DEPENDENT):
                    other = parse_store_path(path, database.store_dir).base_name
                    dependent.setdefault(number, {})[id_of(derivation, output)] = other
            found += _chosen(database, _REALISATIONS, paths, dependent)
        if "BuildTraceV3" in tables:
            found += _chosen(database, _BUILD_TRACE, paths, {})
    except FormatError as e:
        raise FormatError(f"{database.path}: {e}") from None
    return found


def _chosen(
    database: NixDatabase, query: str, paths: Collection[StorePath], dependent: dict[int, dict[str, str]]
) -> Iterator[Realisation]:
    for number, derivation, output, text, signatures in database.rows(query):
        path = parse_store_path(text, database.store_dir)
        if path in paths:
            yield Realisation(
                id=id_of(derivation, output),
                path=path.base_name,
                signatures=tuple(sorted(set((signatures or "").split()))),
                dependent=tuple(sorted(dependent.get(number, {}).items())),
            )


def put_all(store: LocalStore, found: Sequence[Realisation]) -> Iterator[Realised]:
    """Put realisations, some at a time; yield what became of each. Blocks for a sync each time."""
    for i in range(0, len(found), GROUP):
        yield from store.put_realisations(found[i : i + GROUP])
