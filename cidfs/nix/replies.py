"""The answers of Nix's worker protocol, read: one parser for each kind.

Pure parsers over what came (see `wire`), hostile or not. Owns what stands before each answer too: log
messages and activities, which are passed over, and errors. One `Replies` belongs to one `Client`.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from cidfs.errors import ProtocolError, RemoteRefused
from cidfs.nix import requests as r
from cidfs.nix.protocol import WireRealisation
from cidfs.nix.wire import MAX_ITEMS, Incoming, Steps

MAX_FIELDS: Final = 1000
MAX_OUTPUTS: Final = 100_000
_LOG: Final = 0x6F6C6D67
_START_ACTIVITY: Final = 0x53545254
_STOP_ACTIVITY: Final = 0x53544F50
_RESULT: Final = 0x52534C54
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Replies:
    """Parsers of answers, for a protocol and features that both sides have."""

    def __init__(self, incoming: Incoming, minor: int, features: frozenset[str], prefix: str) -> None:
        self._incoming = incoming
        self._minor = minor
        self._with_path = r.REALISATION_WITH_PATH in features
        self._prefix = prefix

    def messages(self) -> Steps[None]:
        """Pass over what is said before an answer."""
        came = self._incoming
        while True:
            kind = yield from came.number()
            if kind == r.LAST:
                return
            if kind == r.ERROR:
                raise RemoteRefused((yield from self._error()))
            if kind == _LOG:
                yield from came.raw()
            elif kind == _START_ACTIVITY:
                for _ in range(3):  # activity, level, type
                    yield from came.number()
                yield from came.raw()
                yield from self._fields()
                yield from came.number()
            elif kind == _STOP_ACTIVITY:
                yield from came.number()
            elif kind == _RESULT:
                yield from came.number()
                yield from came.number()
                yield from self._fields()
            else:
                raise ProtocolError(f"a daemon that says {kind:#x} before an answer")

    def _fields(self) -> Steps[None]:
        came = self._incoming
        for _ in range((yield from came.count("fields", MAX_FIELDS))):
            if (yield from came.boolean("a field's type")):
                yield from came.raw()
            else:
                yield from came.number()

    def _error(self) -> Steps[str]:
        came = self._incoming
        if self._minor < 26:
            message = yield from came.raw()
            yield from came.number()
        else:
            yield from came.raw()  # "Error", level, "Error"
            yield from came.number()
            yield from came.raw()
            message = yield from came.raw()
            yield from came.number()  # position
            for _ in range((yield from came.count("traces", MAX_FIELDS))):
                yield from came.number()
                yield from came.raw()
        plain = _COLOUR.sub("", message.decode("utf-8", "replace"))
        return "".join(c if c.isprintable() else "?" for c in " ".join(plain.split()))

    def nothing(self) -> Steps[None]:
        """Read nothing."""
        yield from ()

    def boolean(self) -> Steps[bool]:
        """Read yes or no."""
        return (yield from self._incoming.boolean("an answer"))

    def path(self) -> Steps[str]:
        """Read a path, empty where there is none."""
        return (yield from self._incoming.text())

    def paths(self) -> Steps[tuple[str, ...]]:
        """Read a set of paths."""
        return (yield from self._incoming.texts("paths"))

    def path_info(self) -> Steps[r.PathInfo | None]:
        """Read what is known of a path, None for one that is not valid."""
        came = self._incoming
        if not (yield from self.boolean()):
            return None
        deriver = yield from came.text()
        nar_hash = yield from came.text()
        if not _HASH.fullmatch(nar_hash):
            raise ProtocolError(f"{nar_hash[:80]!r} is not a NAR hash")
        references = yield from came.texts("references")
        registration_time = yield from came.number()
        nar_size = yield from came.number()
        yield from came.boolean("whether it was built there")
        return r.PathInfo(
            deriver=deriver,
            nar_hash=bytes.fromhex(nar_hash),
            references=references,
            registration_time=registration_time,
            nar_size=nar_size,
            signatures=(yield from came.texts("signatures")),
            ca=(yield from came.text()),
        )

    def realisations(self, name: str) -> Steps[tuple[r.RealisationInfo, ...]]:
        """Read the realisations of an output."""
        came = self._incoming
        if self._with_path:
            if not (yield from self.boolean()):
                return ()
            out_path = (yield from came.text()).removeprefix(self._prefix)
            signatures = yield from came.texts("signatures")
            return (r.RealisationInfo(id=name, out_path=out_path, signatures=signatures),)
        found = yield from came.texts("realisations")
        if self._minor < 31:
            return tuple(r.RealisationInfo(id=name, out_path=p.removeprefix(self._prefix)) for p in found)
        return tuple(_from_json(each) for each in found)

    def missing(self) -> Steps[r.Missing]:
        """Read what is missing."""
        came = self._incoming
        will_build, will_substitute, unknown = (
            (yield from came.texts("paths")),
            (yield from came.texts("paths")),
            (yield from came.texts("paths")),
        )
        yield from came.number()  # download size, NAR size
        yield from came.number()
        return r.Missing(will_build, will_substitute, unknown)

    def results(self) -> Steps[dict[str, int]]:
        """Read the status of each target; outputs are never among them here."""
        came = self._incoming
        numbers = (4 if self._minor >= 29 else 0) + (2 if self._minor >= 37 else 0)
        found = {}
        for _ in range((yield from came.count("results", MAX_ITEMS))):
            target = yield from came.text()
            found[target] = yield from came.number()
            yield from came.raw()
            for _ in range(numbers):
                yield from came.number()
            if self._minor >= 28 and (yield from came.number()):
                raise ProtocolError(f"{target} was built, and should have been there")
        return found

    def output_map(self) -> Steps[dict[str, str]]:
        """Read paths by the names of outputs, empty where not known."""
        found = {}
        for _ in range((yield from self._incoming.count("outputs", MAX_OUTPUTS))):
            name = yield from self._incoming.text()
            found[name] = yield from self._incoming.text()
        return found

    def roots(self) -> Steps[tuple[tuple[str, str], ...]]:
        """Read roots: the link, or what else it is, and the store path that it keeps."""
        found = []
        for _ in range((yield from self._incoming.count("roots", MAX_ITEMS))):
            link = (yield from self._incoming.raw()).decode("utf-8", "surrogateescape")
            found.append((link, (yield from self._incoming.text())))
        return tuple(found)


def _from_json(shown: str) -> r.RealisationInfo:
    try:
        found = msgspec.json.decode(shown, type=WireRealisation)
    except msgspec.MsgspecError as e:
        raise ProtocolError(f"not a realisation: {e}") from None
    return r.RealisationInfo(
        id=found.id,
        out_path=found.out_path,
        signatures=found.signatures,
        dependent=found.dependent_realisations,
    )
