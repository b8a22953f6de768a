"""What each request of Nix is answered: from the index, by what is valid on its connection.

Nothing is ever written, built or substituted here; what would be is refused with a clear line. One object
belongs to one connection and its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from cidfs.engine.export import nar_pieces
from cidfs.errors import CidfsError
from cidfs.formats.record import Record
from cidfs.formats.store_path import HASH_PART_LENGTH
from cidfs.local.store import LocalStore
from cidfs.nix import requests as r
from cidfs.nix.protocol import Server
from cidfs.nix.validity import Told, Validity

REFUSAL: Final = (
    "cidfs serves this store read-only: {operation} is refused here; ask the overlay store above it"
    " (local-overlay://), or add with `cidfs add` and `cidfs import`"
)
_SHORTEST: Final = HASH_PART_LENGTH + 2


class Answers:
    """Answers of one connection."""

    def __init__(self, store: LocalStore, validity: Validity, told: Told, server: Server) -> None:
        self._store = store
        self._validity = validity
        self._told = told
        self._server = server
        self._prefix = store.store_dir + "/"
        self.refused = 0
        self._by_type: dict[type, Callable[[Any], bytes | Iterator[bytes]]] = {
            r.IsValidPath: self._is_valid_path,
            r.QueryPathInfo: self._path_info,
            r.QueryReferrers: self._referrers,
            r.QueryValidPaths: self._valid_paths,
            r.QueryValidDerivers: self._valid_derivers,
            r.QueryPathFromHashPart: self._path_from_hash_part,
            r.QueryRealisation: self._realisation,
            r.QueryAllValidPaths: self._all_valid_paths,
            r.NarFromPath: self._nar,
            r.QueryMissing: self._missing,
            r.BuildPaths: self._build,
            r.QueryDerivationOutputMap: self._outputs,
            r.QueryDerivationOutputs: self._outputs,
            r.QueryDerivationOutputNames: self._outputs,
            r.QuerySubstitutable: server.nothing_substitutable,
            r.SetOptions: lambda request: server.options_taken(),
            r.Acknowledge: lambda request: server.done(),
            r.FindRoots: lambda request: server.no_roots(),
            r.Refused: lambda request: self._refuse(request.operation),
        }

    def answer(self, request: r.Request) -> bytes | Iterator[bytes]:
        """Return the answer to a request, in pieces where it is long."""
        return self._by_type[type(request)](request)

    # --- names

    def _name(self, path: str) -> bytes:
        """Return the base name of an absolute store path; empty for what cannot be one of this store."""
        if not path.startswith(self._prefix):
            return b""
        name = path[len(self._prefix) :]
        if len(name) < _SHORTEST or name[HASH_PART_LENGTH] != "-" or not name.isascii():
            return b""
        return name.encode()

    def _full(self, names: Iterable[bytes]) -> list[str]:
        return sorted(self._prefix + name.decode() for name in names)

    def _is_valid(self, path: str) -> bool:
        name = self._name(path)
        return bool(name) and self._validity.is_valid(self._told, name)

    def _find(self, path: str) -> Record | None:
        name = self._name(path)
        return self._validity.find(self._told, name) if name else None

    # --- answers

    def _is_valid_path(self, request: r.IsValidPath) -> bytes:
        return self._server.boolean(self._is_valid(request.path))

    def _path_info(self, request: r.QueryPathInfo) -> bytes:
        name = self._name(request.path)
        found = self._validity.facts(self._told, name) if name else None
        return self._server.path_facts(found) if found is not None else self._server.path_info(None)

    def _referrers(self, request: r.QueryReferrers) -> bytes:
        name = self._name(request.path)
        try:
            found = self._validity.referrers(self._told, name) if name else []
        except CidfsError:
            found = []
        return self._server.paths(self._full(found))

    def _valid_paths(self, request: r.QueryValidPaths) -> bytes:
        return self._server.paths([path for path in request.paths if self._is_valid(path)])

    def _valid_derivers(self, request: r.QueryValidDerivers) -> bytes:
        found = self._find(request.path)
        if found is None or not found.deriver:
            return self._server.paths(())
        return self._server.paths(self._full(self._validity.valid_of(self._told, [found.deriver.encode()])))

    def _path_from_hash_part(self, request: r.QueryPathFromHashPart) -> bytes:
        hash_part = request.hash_part
        if len(hash_part) != HASH_PART_LENGTH or not hash_part.isascii():
            return self._server.maybe_path("")
        name = self._validity.name_of(self._told, hash_part.encode()).decode()
        return self._server.maybe_path(self._prefix + name if name else "")

    def _realisation(self, request: r.QueryRealisation) -> bytes:
        if self._validity.remember_absent(self._told, request.id):
            return self._server.realisations(())
        try:
            found = self._store.realisation(request.id)
        except CidfsError:
            found = None
        if found is None or not self._validity.valid_of(self._told, [found.path.encode()]):
            return self._server.realisations(())
        self._validity.forget_absent(self._told, request.id)
        return self._server.realisations(
            [
                r.RealisationInfo(
                    id=found.id,
                    out_path=found.path,
                    signatures=found.signatures,
                    dependent=dict(found.dependent),
                )
            ]
        )

    def _all_valid_paths(self, request: r.QueryAllValidPaths) -> Iterator[bytes]:
        return self._server.path_pieces(self._full(self._validity.all_valid(self._told)))

    def _nar(self, request: r.NarFromPath) -> bytes | Iterator[bytes]:
        found = self._find(request.path)
        if found is None:
            return self._server.error(f"path '{request.path}' is not valid")
        return self._nar_pieces(found)

    def _nar_pieces(self, found: Record) -> Iterator[bytes]:
        manifest = self._store.read_manifest(found.manifest)
        yield self._server.nar_begins()
        yield from nar_pieces(self._store, manifest)

    def _missing(self, request: r.QueryMissing) -> bytes:
        unknown, will_build = [], []
        for target in request.targets:
            path, bang, _ = target.partition("!")
            if bang:
                will_build.append(path)
            elif not self._is_valid(path):
                unknown.append(path)
        return self._server.missing(unknown, will_build)

    def _build(self, request: r.BuildPaths) -> bytes:
        if all(self._is_valid(target) for target in request.targets):
            return self._server.already_valid(request)
        return self._refuse("building")

    def _outputs(self, request: r.Request) -> bytes:
        return self._refuse("asking for the outputs of a derivation")

    def _refuse(self, operation: str) -> bytes:
        self.refused += 1
        return self._server.error(REFUSAL.format(operation=operation))
