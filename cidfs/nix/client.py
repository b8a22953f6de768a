"""The side of Nix's worker protocol that asks: for tests, `doctor` and benchmarks.

`Client` is without I/O: requests in, bytes out; bytes in, answers out. It takes hostile answers (see
`wire`): ProtocolError for what cannot be, RemoteRefused for an error that was sent, no other exception.
`Connection` does the I/O of one over a Unix socket; it blocks, at each step for as long as its timeout says.
Either belongs to one thread.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from cidfs.control import SocketAddress
from cidfs.errors import ProtocolError, RemoteRefused
from cidfs.formats.nar import NarReader
from cidfs.formats.store_path import DEFAULT_STORE_DIR
from cidfs.nix import requests as r
from cidfs.nix.protocol import MAX_FEATURES
from cidfs.nix.replies import Replies
from cidfs.nix.wire import MAX_REPLY, Incoming, Steps, number, text, texts

DEFAULT_TIMEOUT: Final = 10.0
RECEIVE: Final = 256 << 10
_SETTINGS: Final = 12


class Answer(msgspec.Struct, frozen=True):
    """What a request was answered with; None where there is nothing to say, or no such thing."""

    value: Any


class Client:
    """One connection, seen from the side that asks.

    minor and features are what is offered, then what was negotiated; `version` and `trusted` are what the
    other side said of itself (where its protocol has it), once `handshaken`.
    """

    def __init__(
        self,
        minor: int = r.MINOR,
        features: frozenset[str] = r.FEATURES,
        store_dir: str = DEFAULT_STORE_DIR,
    ) -> None:
        self.handshaken = False
        self.minor = minor
        self.features = features
        self.version = ""
        self.trusted: bool | None = None
        self._prefix = store_dir + "/"
        self._incoming = Incoming()
        self._output: list[bytes] = []
        self._expected: deque[Steps[Any]] = deque()
        self._replies = Replies(self._incoming, minor, features, self._prefix)
        self._steps: Steps[Any] | None = self._handshake()

    def greeting(self) -> bytes:
        """Return what a connection begins with."""
        return number(r.CLIENT_MAGIC) + number(1 << 8 | self.minor)

    def feed(self, data: bytes) -> None:
        """Take bytes that came."""
        self._incoming.feed(data)

    def output(self) -> bytes:
        """Return what is to be sent now besides requests: parts of the handshake."""
        found = b"".join(self._output)
        self._output.clear()
        return found

    def take(self) -> bytes:
        """Return what came behind the answer to NarFromPath: a piece of the NAR, which says its own end."""
        return self._incoming.take()

    def next(self) -> Answer | None:
        """Return the answer to the oldest request, None while it has not come whole.

        Raise RemoteRefused for an error in its place, ProtocolError for what is no answer.
        """
        while True:
            if self._steps is None:
                if not self._expected:
                    return None
                self._steps = self._answer(self._expected.popleft())
            shaking = not self.handshaken
            try:
                next(self._steps)
            except StopIteration as done:
                self._steps = None
                if not shaking:
                    return Answer(done.value)
            except RemoteRefused:
                self._steps = None
                raise
            else:
                return None

    def ask(self, request: r.Request) -> bytes:
        """Return a request as it is sent; its answer is expected then. Only once handshaken."""
        if not self.handshaken:
            raise ProtocolError("a request before the end of the handshake")
        operation, rest, reply = self._request(request)
        self._expected.append(reply)
        return number(operation) + rest

    def _handshake(self) -> Steps[None]:
        came = self._incoming
        came.begin(MAX_REPLY)
        magic = yield from came.number()
        if magic != r.SERVER_MAGIC:
            raise ProtocolError(f"not a Nix daemon: it begins with {magic:#x}")
        version = yield from came.number()
        if version >> 8 != 1 or version & 255 < r.OLDEST:
            raise ProtocolError(f"a daemon of protocol {version >> 8}.{version & 255}")
        self.minor = min(self.minor, version & 255)
        offered, self.features = self.features, frozenset()
        if self.minor >= 38:
            self._output.append(texts(sorted(offered)))
        self._output.append(number(0) + number(0))  # no CPU, no reserve
        if self.minor >= 38:
            self.features = offered.intersection((yield from came.texts("features", MAX_FEATURES)))
        if self.minor >= 33:
            self.version = yield from came.text()
        if self.minor >= 35:
            trust = yield from came.number()
            if trust > 2:
                raise ProtocolError(f"a daemon whose trust is {trust}")
            self.trusted = None if not trust else trust == 1
        self._replies = Replies(came, self.minor, self.features, self._prefix)
        yield from self._replies.messages()
        self.handshaken = True

    def _answer(self, reply: Steps[Any]) -> Steps[Any]:
        self._incoming.begin(MAX_REPLY)
        yield from self._replies.messages()
        return (yield from reply)

    def _request(self, request: r.Request) -> tuple[int, bytes, Steps[Any]]:
        """Return a request's number, what follows it, and the parser of its answer."""
        reply = self._replies
        match request:
            case r.IsValidPath(path):
                return r.IS_VALID_PATH, text(path), reply.boolean()
            case r.QueryPathInfo(path):
                return r.QUERY_PATH_INFO, text(path), reply.path_info()
            case r.QueryReferrers(path):
                return r.QUERY_REFERRERS, text(path), reply.paths()
            case r.QueryValidDerivers(path):
                return r.QUERY_VALID_DERIVERS, text(path), reply.paths()
            case r.QueryDerivationOutputs(path):
                return r.QUERY_DERIVATION_OUTPUTS, text(path), reply.paths()
            case r.QueryDerivationOutputNames(path):
                return r.QUERY_DERIVATION_OUTPUT_NAMES, text(path), reply.paths()
            case r.QueryDerivationOutputMap(path):
                return r.QUERY_DERIVATION_OUTPUT_MAP, text(path), reply.output_map()
            case r.QueryPathFromHashPart(hash_part):
                return r.QUERY_PATH_FROM_HASH_PART, text(hash_part), reply.path()
            case r.QueryAllValidPaths():
                return r.QUERY_ALL_VALID_PATHS, b"", reply.paths()
            case r.QueryValidPaths(paths):
                substitute = number(0) if self.minor >= 27 else b""
                return r.QUERY_VALID_PATHS, texts(paths) + substitute, reply.paths()
            case r.QueryRealisation(name):
                return r.QUERY_REALISATION, self._realisation_id(name), reply.realisations(name)
            case r.QueryMissing(targets):
                return r.QUERY_MISSING, texts(targets), reply.missing()
            case r.BuildPaths(targets, False):
                return r.BUILD_PATHS, texts(targets) + number(0), reply.boolean()
            case r.BuildPaths(targets, _):
                return r.BUILD_PATHS_WITH_RESULTS, texts(targets) + number(0), reply.results()
            case r.QuerySubstitutable():
                return r.QUERY_SUBSTITUTABLE_PATHS, texts(()), reply.paths()
            case r.FindRoots():
                return r.FIND_ROOTS, b"", reply.roots()
            case r.Acknowledge(""):
                return r.SYNC_WITH_GC, b"", reply.boolean()
            case r.Acknowledge(path):
                return r.ADD_TEMP_ROOT, text(path), reply.boolean()
            case r.NarFromPath(path):
                return r.NAR_FROM_PATH, text(path), reply.nothing()
            case r.SetOptions():
                return r.SET_OPTIONS, number(0) * (_SETTINGS + 1), reply.nothing()
            case r.Refused(operation):
                known = [each for each, name in r.REFUSED.items() if name == operation]
                return known[0] if known else 0, b"", reply.nothing()

    def _realisation_id(self, name: str) -> bytes:
        if r.REALISATION_WITH_PATH not in self.features:
            return text(name)
        derivation, _, output = name.rpartition("!")
        return text(self._prefix + derivation) + text(output)


class Connection:
    """A connection to a Nix daemon, or to a cidfs that answers like one. A context manager.

    Each step (to connect, to send, to receive) may take as long as the timeout says, in seconds. Raise
    OSError where there is no answer, RemoteRefused for an error in place of one, ProtocolError for what is
    none; after the first and the last it can only be closed.
    """

    def __init__(self, path: Path, timeout: float = DEFAULT_TIMEOUT, client: Client | None = None) -> None:
        self.client = Client() if client is None else client
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout)
            with SocketAddress(path) as address:
                self._socket.connect(address)
            self._socket.sendall(self.client.greeting())
            while not self.client.handshaken:
                self._receive()
                self.client.next()
                self._socket.sendall(self.client.output())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self, request: r.Request) -> Any:
        """Return the answer to a request."""
        self._socket.sendall(self.client.ask(request))
        while (answer := self.client.next()) is None:
            self._receive()
        return answer.value

    def is_valid(self, path: str) -> bool:
        """Return whether a path is valid."""
        answer: bool = self.ask(r.IsValidPath(path))
        return answer

    def path_info(self, path: str) -> r.PathInfo | None:
        """Return what is known of a path, None for one that is not valid."""
        answer: r.PathInfo | None = self.ask(r.QueryPathInfo(path))
        return answer

    def valid_paths(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return those of the paths that are valid."""
        answer: tuple[str, ...] = self.ask(r.QueryValidPaths(tuple(paths)))
        return answer

    def all_valid_paths(self) -> tuple[str, ...]:
        """Return all valid paths."""
        answer: tuple[str, ...] = self.ask(r.QueryAllValidPaths())
        return answer

    def referrers(self, path: str) -> tuple[str, ...]:
        """Return the valid paths that refer to a path."""
        answer: tuple[str, ...] = self.ask(r.QueryReferrers(path))
        return answer

    def path_from_hash_part(self, hash_part: str) -> str:
        """Return the valid path with a hash part, empty where there is none."""
        answer: str = self.ask(r.QueryPathFromHashPart(hash_part))
        return answer

    def realisation(self, name: str) -> r.RealisationInfo | None:
        """Return the realisation with an id (see QueryRealisation), None where there is none."""
        answer: tuple[r.RealisationInfo, ...] = self.ask(r.QueryRealisation(name))
        return answer[0] if answer else None

    def nar(self, path: str) -> Iterator[bytes]:
        """Yield the NAR of a path, in pieces; to be read to its end before anything else is asked."""
        self.ask(r.NarFromPath(path))
        reader = NarReader()
        while True:
            piece = self.client.take()
            for _ in reader.feed(piece):
                pass
            if piece:
                yield piece
            if reader.finished:
                return
            self._receive()

    def _receive(self) -> None:
        data = self._socket.recv(RECEIVE)
        if not data:
            raise ConnectionResetError(f"{self._path}: the other side has closed the connection")
        self.client.feed(data)
