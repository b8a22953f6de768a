"""The side of Nix's worker protocol that answers: bytes in, requests out; answers in, bytes out.

Owns the handshake, the parsing of requests and the form of answers; what the answers are is its caller's to
say. No I/O. Takes hostile input (see `wire`): ProtocolError for what cannot be, no other exception. One
`Server` belongs to one connection; it is synchronous and for one thread.

A client sends a request and waits for its answer, so a caller feeds what came, takes requests until there is
none, and sends an answer for each, in order:

    server.feed(data)
    while (request := server.next()) is not None:
        answer = ...
    send(server.output() + answers)

A build asks one thing tens of thousands of times, so requests of one text, whole and in order, are taken
without a step of a parser; all others, also those that turn out to be wrong, go through one.

Format: Nix 2.26, 2.34 and 2.35 (`libstore/worker-protocol*.cc`, `remote-store.cc`, `daemon.cc`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from cidfs.errors import ProtocolError
from cidfs.formats.record import Facts
from cidfs.formats.store_path import DEFAULT_STORE_DIR
from cidfs.nix import requests as r
from cidfs.nix.wire import (
    MAX_ITEMS,
    MAX_REQUEST,
    MAX_TEXT,
    PADDING,
    PAIR,
    U64,
    Incoming,
    Steps,
    number,
    text,
    text_pieces,
    texts,
)

MAX_OVERRIDES: Final = 10_000
MAX_FEATURES: Final = 100
_SETTINGS: Final = 12
_NOT_TRUSTED: Final = 2  # trust would let a client change things, and nothing can be changed here
_ALREADY_VALID: Final = 2
_NO_TIMES: Final = 4  # times built, not deterministic, start, stop
_NO_CPU: Final = 2  # user, system

_LAST: Final = number(r.LAST)
_NO: Final = _LAST + number(0)
_YES: Final = _LAST + number(1)
_HASH_LENGTH: Final = number(64)
_NOT_ULTIMATE: Final = number(0)

_OF_ONE_TEXT: Final[dict[int, Callable[[str], r.Request]]] = {
    r.IS_VALID_PATH: r.IsValidPath,
    r.QUERY_PATH_INFO: r.QueryPathInfo,
    r.QUERY_REFERRERS: r.QueryReferrers,
    r.QUERY_VALID_DERIVERS: r.QueryValidDerivers,
    r.QUERY_PATH_FROM_HASH_PART: r.QueryPathFromHashPart,
    r.QUERY_DERIVATION_OUTPUT_MAP: r.QueryDerivationOutputMap,
    r.QUERY_DERIVATION_OUTPUTS: r.QueryDerivationOutputs,
    r.QUERY_DERIVATION_OUTPUT_NAMES: r.QueryDerivationOutputNames,
    r.NAR_FROM_PATH: r.NarFromPath,
    r.ENSURE_PATH: r.Acknowledge,
    r.ADD_TEMP_ROOT: r.Acknowledge,
}
_WITH_REALISATION: Final = _OF_ONE_TEXT | {r.QUERY_REALISATION: r.QueryRealisation}
_OF_NOTHING: Final[dict[int, r.Request]] = {
    r.QUERY_ALL_VALID_PATHS: r.QueryAllValidPaths(),
    r.FIND_ROOTS: r.FindRoots(),
    r.SYNC_WITH_GC: r.Acknowledge(""),
}
_SUBSTITUTABLE: Final = frozenset(
    (r.QUERY_SUBSTITUTABLE_PATH_INFO, r.QUERY_SUBSTITUTABLE_PATHS, r.QUERY_SUBSTITUTABLE_PATH_INFOS)
)


class WireRealisation(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A realisation as JSON, as protocols without REALISATION_WITH_PATH send it; names in Nix's order."""

    dependent_realisations: dict[str, str] = {}
    id: str
    out_path: str
    signatures: tuple[str, ...] = ()


class Server:
    """One connection, seen from the side that answers.

    version is what clients are shown. features are those offered; `features` holds what both have, `minor`
    the protocol that both speak, once `handshaken`. The store directory is needed for base names.
    """

    def __init__(
        self, version: str, features: frozenset[str] = r.FEATURES, store_dir: str = DEFAULT_STORE_DIR
    ) -> None:
        self.handshaken = False
        self.minor = 0
        self.features: frozenset[str] = frozenset()
        self._version = version
        self._offered = features
        self._prefix = store_dir + "/"
        self._raw_prefix = self._prefix.encode()
        self._incoming = Incoming()
        self._output: list[bytes] = []
        self._one_text = _OF_ONE_TEXT
        self._ended = False
        self._steps: Steps[r.Request | None] | None = self._handshake()

    @property
    def idle(self) -> bool:
        """Whether silence is fine: no part of a handshake or a request is there without its rest."""
        return self.handshaken and self._steps is None and not self._ended and not len(self._incoming)

    def feed(self, data: bytes) -> None:
        """Take bytes that came. After a refusal or an error they are dropped, so a caller may drain them."""
        if not self._ended:
            self._incoming.feed(data)

    def output(self) -> bytes:
        """Return what is to be sent now besides answers: parts of the handshake, mostly nothing."""
        if not self._output:
            return b""
        found = b"".join(self._output)
        self._output.clear()
        return found

    def next(self) -> r.Request | None:
        """Return the next request, None when it has not come whole.

        Raise ProtocolError for what no client of Nix sends; nothing more is read then, nor after Refused.
        """
        incoming = self._incoming
        if self._steps is None:
            data, at = incoming.data, incoming.at
            start = at + 16
            if len(data) >= start:
                operation, length = PAIR.unpack_from(data, at)
                make = self._one_text.get(operation)
                if make is not None and length <= MAX_TEXT:
                    stop = start + length
                    after = stop + (-length & 7)
                    if len(data) >= after and data[stop:after] == PADDING[length & 7]:
                        try:
                            value = data[start:stop].decode()
                        except UnicodeDecodeError:
                            pass  # the parser says so
                        else:
                            incoming.at = after
                            return make(value)
        return self._step()

    def _step(self) -> r.Request | None:
        while not self._ended:
            if self._steps is None:
                if not len(self._incoming):
                    return None
                self._steps = self._request()
            try:
                next(self._steps)
            except StopIteration as done:
                self._steps = None
                if done.value is not None:
                    found: r.Request = done.value
                    return found
            except ProtocolError:
                self._end()
                raise
            else:
                return None
        return None

    def _end(self) -> None:
        self._ended = True
        self._steps = None
        self._incoming.take()

    def _handshake(self) -> Steps[None]:
        came = self._incoming
        came.begin(MAX_REQUEST)
        magic = yield from came.number()
        if magic != r.CLIENT_MAGIC:
            raise ProtocolError(f"not a client of a Nix daemon: it begins with {magic:#x}")
        self._output.append(number(r.SERVER_MAGIC) + number(1 << 8 | r.MINOR))
        version = yield from came.number()
        if not 1 << 8 | r.OLDEST <= version < 1 << 16:
            raise ProtocolError(
                f"a client of protocol {version >> 8}.{version & 255}; use Nix 2.3 or newer (1.{r.OLDEST})"
            )
        self.minor = r.MINOR if version >> 8 > 1 else min(version & 255, r.MINOR)
        if self.minor >= 38:
            theirs = yield from came.texts("features", MAX_FEATURES)
            self.features = self._offered.intersection(theirs)
            self._output.append(texts(sorted(self._offered)))
        if r.REALISATION_WITH_PATH not in self.features:
            self._one_text = _WITH_REALISATION
        if (yield from came.boolean("the handshake's CPU flag")):
            yield from came.number()
        yield from came.boolean("the handshake's reserve flag")
        if self.minor >= 33:
            self._output.append(text(self._version))
        if self.minor >= 35:
            self._output.append(number(_NOT_TRUSTED))
        self._output.append(_LAST)
        self.handshaken = True

    def _request(self) -> Steps[r.Request]:
        came = self._incoming
        came.begin(MAX_REQUEST)
        operation = yield from came.number()
        make = self._one_text.get(operation)
        if make is not None:
            return make((yield from came.text()))
        found = _OF_NOTHING.get(operation)
        if found is not None:
            return found
        if operation == r.SET_OPTIONS:
            return (yield from self._settings())
        if operation == r.QUERY_VALID_PATHS:
            paths = yield from came.texts("paths")
            if self.minor >= 27:
                yield from came.boolean("whether to substitute")
            return r.QueryValidPaths(paths)
        if operation == r.QUERY_REALISATION:
            return (yield from self._derivation_output())
        if operation == r.QUERY_MISSING:
            return r.QueryMissing((yield from came.texts("targets")))
        if operation in (r.BUILD_PATHS, r.BUILD_PATHS_WITH_RESULTS):
            targets = yield from came.texts("targets")
            if (yield from came.number()) == 0:  # else to repair or to check, which is refused below
                return r.BuildPaths(targets, operation == r.BUILD_PATHS_WITH_RESULTS)
        if operation == r.ADD_INDIRECT_ROOT:
            link = yield from came.raw()
            return r.Acknowledge(link.decode("utf-8", "surrogateescape"))
        if operation in _SUBSTITUTABLE:
            return (yield from self._substitutable(operation))
        self._end()
        return r.Refused(r.REFUSED.get(operation, f"operation {operation}"))

    def _settings(self) -> Steps[r.Request]:
        came = self._incoming
        for _ in range(_SETTINGS):
            yield from came.number()
        for _ in range(2 * (yield from came.count("settings", MAX_OVERRIDES))):
            yield from came.raw()
        return r.SetOptions()

    def _derivation_output(self) -> Steps[r.Request]:
        derivation = yield from self._incoming.text()
        output = yield from self._incoming.text()
        return r.QueryRealisation(f"{derivation.removeprefix(self._prefix)}!{output}")

    def _substitutable(self, operation: int) -> Steps[r.Request]:
        came = self._incoming
        if operation == r.QUERY_SUBSTITUTABLE_PATH_INFO:
            yield from came.text()
        elif operation == r.QUERY_SUBSTITUTABLE_PATHS or self.minor < 22:
            yield from came.texts("paths")
        else:
            for _ in range(2 * (yield from came.count("paths", MAX_ITEMS))):
                yield from came.text()
        return r.QuerySubstitutable()

    def done(self) -> bytes:
        """Answer that it is done."""
        return _YES

    def options_taken(self) -> bytes:
        """Answer that the settings were heard."""
        return _LAST

    def boolean(self, value: bool) -> bytes:
        """Answer yes or no."""
        return _YES if value else _NO

    def path_info(self, info: r.PathInfo | None) -> bytes:
        """Answer with what is known of a path, None for one that is not valid."""
        if info is None:
            return _NO
        facts = Facts(
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            references=[_raw(name) for name in info.references],
            deriver=_raw(info.deriver),
            ca=_raw(info.ca),
            signatures=[_raw(signature) for signature in info.signatures],
        )
        return _path_info(facts, b"", info.registration_time)

    def path_facts(self, facts: Facts) -> bytes:
        """Answer with what stands in a path's record."""
        return _path_info(facts, self._raw_prefix, 0)

    def paths(self, paths: Iterable[str]) -> bytes:
        """Answer with a set of paths (or of names)."""
        return _LAST + texts(paths)

    def path_pieces(self, paths: Collection[str]) -> Iterator[bytes]:
        """Answer with a set of very many paths, piece by piece."""
        yield _LAST
        yield from text_pieces(paths)

    def maybe_path(self, path: str) -> bytes:
        """Answer with a path, or with none where it is empty."""
        return _LAST + text(path)

    def realisations(self, found: Sequence[r.RealisationInfo]) -> bytes:
        """Answer with the realisations of an output: none, or one, or as many as there are."""
        if r.REALISATION_WITH_PATH in self.features:
            if not found:
                return _NO
            return _YES + text(self._prefix + found[0].out_path) + texts(found[0].signatures)
        if self.minor < 31:
            return _LAST + texts([self._prefix + each.out_path for each in found])
        return _LAST + texts([_as_json(each) for each in found])

    def missing(self, unknown: Iterable[str] = (), will_build: Iterable[str] = ()) -> bytes:
        """Answer what is missing: paths that nobody here knows, and derivations that would be built."""
        return _LAST + texts(will_build) + texts(()) + texts(unknown) + number(0) + number(0)

    def already_valid(self, request: r.BuildPaths) -> bytes:
        """Answer that all targets are there and nothing was built."""
        if not request.with_results:
            return _YES
        result = number(_ALREADY_VALID) + text("")
        if self.minor >= 29:
            result += number(0) * _NO_TIMES
        if self.minor >= 37:
            result += number(0) * _NO_CPU
        if self.minor >= 28:
            result += number(0)  # outputs that were built
        targets = b"".join(text(target) + result for target in request.targets)
        return _LAST + number(len(request.targets)) + targets

    def output_map(self, outputs: dict[str, str]) -> bytes:
        """Answer with outputs by name; the path is empty where it is not known."""
        return _LAST + number(len(outputs)) + b"".join(text(k) + text(v) for k, v in outputs.items())

    def no_roots(self) -> bytes:
        """Answer that there are no roots."""
        return _NO

    def nothing_substitutable(self, request: r.QuerySubstitutable) -> bytes:
        """Answer that nothing can be substituted."""
        return _NO

    def nar_begins(self) -> bytes:
        """Answer that the NAR follows."""
        return _LAST

    def error(self, message: str) -> bytes:
        """Answer with an error; the connection may go on where the request had come whole."""
        if self.minor < 26:
            return number(r.ERROR) + text(message) + number(1)
        kind = text("Error")
        return number(r.ERROR) + kind + number(0) + kind + text(message) + number(0) + number(0)


def _raw(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


def _path_info(facts: Facts, prefix: bytes, registration_time: int) -> bytes:
    """Return the answer about a path; prefix is what its names need to be absolute."""
    pack, padding = U64.pack, PADDING
    deriver = facts.deriver and prefix + facts.deriver
    parts = [_YES, pack(len(deriver)), deriver, padding[len(deriver) & 7], _HASH_LENGTH]
    parts += (facts.nar_hash.hex().encode(), pack(len(facts.references)))
    for base_name in facts.references:
        name = prefix + base_name
        parts += (pack(len(name)), name, padding[len(name) & 7])
    parts += (pack(registration_time), pack(facts.nar_size), _NOT_ULTIMATE, pack(len(facts.signatures)))
    for each in (*facts.signatures, facts.ca):
        parts += (pack(len(each)), each, padding[len(each) & 7])
    return b"".join(parts)


def _as_json(found: r.RealisationInfo) -> str:
    """Return a realisation as it stands on the wire, in Nix's own order and spacing."""
    shown = WireRealisation(
        dependent_realisations=found.dependent,
        id=found.id,
        out_path=found.out_path,
        signatures=found.signatures,
    )
    return msgspec.json.encode(shown).decode()
