"""What is fuzzed: each decoder, samples that it accepts, and what must hold of what it makes of any bytes.

A target may raise FormatError and nothing else. What it accepts is held against promises: canonical forms
encode alike, no name leads out of its directory. `reseal` puts checksums right again after a change, so that
what stands behind them is reached.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from cidfs.errors import FormatError, RemoteRefused
from cidfs.formats import frames, journal, nar, narinfo, pack, realisation, record
from cidfs.formats.compression import unpacked
from cidfs.formats.content_address import parse_content_address
from cidfs.formats.digest import checksum, digest_of, parse_cid, parse_sha256
from cidfs.formats.manifest import Manifest
from cidfs.formats.signing import parse_public_key
from cidfs.formats.store_path import DEFAULT_STORE_DIR, parse_base_name, parse_store_path
from cidfs.nix import requests
from cidfs.nix.client import Client
from cidfs.nix.protocol import Server
from tests.formats.make_vectors import (
    ENTRIES,
    FULL_REALISATION,
    FULL_RECORD,
    SMALL_REALISATION,
    SMALL_RECORD,
    raw_frames,
    sealed_pack,
)
from tests.formats.model import File, Link, Tree, manifest_of, nar_of, read_nar
from tests.formats.test_hostile import use_unvalidated
from tests.formats.test_narinfo import SAMPLE as NARINFO
from tests.nix_protocol.support import connected, greeted

MAX_UNPACKED: Final = 1 << 20


def _same(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Target:
    """A decoder, samples, and how to put checksums right."""

    decode: Callable[[bytes], object]
    samples: tuple[bytes, ...]
    reseal: Callable[[bytes], bytes] = _same


@contextlib.contextmanager
def promised() -> Iterator[None]:
    """What was accepted is good for what follows: there, FormatError too breaks a promise."""
    try:
        yield
    except FormatError as e:
        raise AssertionError("it was accepted, and is refused now") from e


def _check_name(name: bytes) -> None:
    assert 0 < len(name) <= 255
    assert name not in (b".", b"..")
    assert not set(name) & {0, ord("/")}


def read_manifest(data: bytes) -> None:
    opened = Manifest(data).validate()
    with promised():
        for index in range(1, opened.node_count):
            _check_name(opened.name(opened.node(index)))


def read_whole_nar(data: bytes) -> None:
    reader = nar.NarReader()
    depth = 0
    for at in range(0, len(data), 100):
        for event in reader.feed(data[at : at + 100]):
            name = getattr(event, "name", None)
            if name is not None and depth:
                _check_name(name)
            depth += isinstance(event, nar.DirectoryStart) - isinstance(event, nar.DirectoryEnd)
            assert 0 <= depth <= 1025
    reader.close()
    with promised():
        assert list(read_nar([data]))


def read_record(data: bytes) -> None:
    found = record.decode(data)
    with promised():
        assert record.encode(found) == data
    assert found.nar_size < 1 << 63
    assert all("/" not in name for name in found.references)


def read_realisation(data: bytes) -> None:
    found = realisation.decode(data)
    with promised():
        assert realisation.encode(found) == data
        assert realisation.merge(found, found) == found
        assert found.store_path.base_name == found.path


def read_journal(data: bytes) -> None:
    found = journal.decode(data)
    with promised():
        frame = journal.encode(found.entries, of_checkpoint=found.of_checkpoint)
        assert frames.read_data(frame, frames.read_header(frame)) == data


def read_frame(data: bytes) -> None:
    header = frames.read_header(data)
    found = frames.read_data(data, header)
    assert len(found) == header.length
    assert digest_of(found) == header.digest


def read_pack(data: bytes) -> None:
    place = pack.read_trailer(data[-pack.TRAILER_SIZE :], len(data))
    end = len(pack.HEADER)
    if place is not None:
        offset, size = place
        for row in pack.read_footer(data[offset : offset + size], offset):
            assert end <= row.offset < row.end <= offset
            end = row.end


def scan(data: bytes) -> None:
    end = 0
    for item in frames.scan(data):
        assert item.offset >= end
        end = item.end if isinstance(item, frames.Gap) else item.offset + item.header.size
    assert end <= len(data)


def read_narinfo(data: bytes) -> None:
    info = narinfo.parse(data, DEFAULT_STORE_DIR)
    with promised():
        assert narinfo.parse(narinfo.render(info, DEFAULT_STORE_DIR), DEFAULT_STORE_DIR) == info
    assert ".." not in info.url.split("/")
    assert not info.url.startswith("/")


def read_texts(data: bytes) -> None:
    """Ask every parser of short texts."""
    text = data.decode("utf-8", "surrogateescape")
    parsers: tuple[Callable[[str], object], ...] = (
        parse_base_name, parse_cid, parse_sha256, parse_content_address, parse_public_key,
        lambda t: parse_store_path(t, DEFAULT_STORE_DIR),
    )  # fmt: skip
    for parse in parsers:
        try:
            parse(text)
        except FormatError:
            continue
    narinfo.cache_store_dir(data)


def unpack(compression: str) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        read = unpacked(compression, io.BytesIO(data).read)
        total = 0
        while total < MAX_UNPACKED:
            piece = read(4096)
            assert len(piece) <= 4096
            if not piece:
                return
            total += len(piece)

    return target


def _requests(server: Server, data: bytes, size: int) -> list[requests.Request | None]:
    """Return the requests that came; None at the end for what is refused."""
    found: list[requests.Request | None] = []
    try:
        for at in range(0, len(data), size):
            server.feed(data[at : at + size])
            while (request := server.next()) is not None:
                found.append(request)
    except FormatError:
        found.append(None)
    assert not (found and found[-1] is None and server.idle)
    return found


def converse(new: Callable[[], Server]) -> Callable[[bytes], None]:
    """Return what reads requests: in whatever pieces they come, they are the same."""

    def target(data: bytes) -> None:
        assert _requests(new(), data, max(1, len(data))) == _requests(new(), data, 13)

    return target


def read_answers(features: frozenset[str]) -> Callable[[bytes], None]:
    """Return what reads data as the answers to some requests."""

    def target(data: bytes) -> None:
        _, client = connected(features=features)
        for request in ASKED:
            client.ask(request)
        for at in range(0, len(data), 100):
            client.feed(data[at : at + 100])
            answer: object = True
            while answer is not None:
                try:
                    answer = client.next()
                except RemoteRefused:
                    continue

    return target


def reseal_heads(data: bytes) -> bytes:
    """Give every frame's head its check, and raw data its digest."""
    made = bytearray(data)
    at = data.find(frames.MAGIC)
    while 0 <= at <= len(made) - frames.HEADER_SIZE:
        encoding, stored = made[at + 5], struct.unpack_from("<I", made, at + 8)[0]
        start = at + frames.HEADER_SIZE
        if encoding == 0 and start + stored <= len(made):
            made[at + 16 : at + 48] = digest_of(bytes(made[start : start + stored]))
        made[at + 48 : at + 56] = checksum(bytes(made[at : at + 48]))
        at = bytes(made).find(frames.MAGIC, at + 1)
    return bytes(made)


def reseal_pack(data: bytes) -> bytes:
    data = reseal_heads(data)
    if len(data) < pack.TRAILER_SIZE:
        return data
    place = data[-32:-16]
    return data[:-32] + place + checksum(place) + b"cidfsEnd"


TREE: Final[Tree] = {
    b"a": {b"b": Link(b"../../../etc/passwd"), b"d": {}},
    b"e": File(b"12345" * 50, True),
    b"f": File(b""),
    b"link": Link(b"/absolute"),
}
DEEP: Final[Tree] = {b"d": {b"d": {b"d": {b"d": {b"d": {b"d": {b"d": File(b"x")}}}}}}}
MANIFESTS: Final = (manifest_of(TREE)[0], manifest_of(DEEP)[0], manifest_of(File(b"x" * 1000))[0])


_PATH: Final = "/nix/store/1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1"
ASKED: Final[tuple[requests.Request, ...]] = (
    requests.QueryPathInfo(_PATH),
    requests.QueryRealisation("1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1.drv!out"),
    requests.IsValidPath(_PATH),
    requests.QueryValidPaths((_PATH, "")),
    requests.QueryMissing((_PATH,)),
    requests.BuildPaths((_PATH,), True),
    requests.QueryDerivationOutputMap(_PATH),
    requests.SetOptions(),
    requests.FindRoots(),
)


def _asked(features: frozenset[str], *, greeting: bool = False) -> bytes:
    _, client = connected(features=features)
    asked = b"".join(client.ask(request) for request in ASKED)
    if not greeting:
        return asked
    server, client = Server(""), Client()
    begun = client.greeting()
    server.feed(begun)
    server.next()
    client.feed(server.output())
    client.next()
    return begun + client.output() + asked


def _answers(features: frozenset[str]) -> bytes:
    server, _ = connected(features=features)
    told = requests.RealisationInfo(
        id="x!out", out_path="x", signatures=("k:AAAA",), dependent={"y!out": "y"}
    )
    info = requests.PathInfo(nar_hash=bytes(32), references=(_PATH,), signatures=("k:AAAA",), ca="text:x")
    return b"".join(
        (
            server.path_info(info),
            server.realisations([told]),
            server.error("no"),
            server.paths([_PATH, ""]),
            server.missing([_PATH]),
            server.already_valid(requests.BuildPaths((_PATH,), True)),
            server.output_map({"out": _PATH}),
            server.options_taken(),
            server.no_roots(),
        )
    )


def _bodies() -> tuple[bytes, ...]:
    found = [journal.encode(e) for e in ENTRIES.values()]
    found.append(journal.encode([e for entries in ENTRIES.values() for e in entries]))
    return tuple(frames.read_data(f, frames.read_header(f)) for f in found)


def _footer(data: bytes) -> bytes:
    place = pack.read_trailer(data[-pack.TRAILER_SIZE :], len(data))
    assert place is not None
    return data[place[0] : place[0] + place[1]]


_PACK: Final = sealed_pack()
_FOOTER_AT: Final = len(_PACK) - pack.TRAILER_SIZE - len(_footer(_PACK))
_TEXT: Final = b"tar of nothing much, again and again. " * 40
_GZIP: Final = zlib.compressobj(wbits=31)

TARGETS: Final[dict[str, Target]] = {
    "nar": Target(read_whole_nar, (nar_of(TREE), nar_of(DEEP), nar_of(File(b"x")), nar_of(Link(b"y")))),
    "manifest": Target(read_manifest, MANIFESTS),
    "unvalidated manifest": Target(use_unvalidated, MANIFESTS),
    "record": Target(read_record, (record.encode(FULL_RECORD), record.encode(SMALL_RECORD))),
    "realisation": Target(
        read_realisation, (realisation.encode(FULL_REALISATION), realisation.encode(SMALL_REALISATION))
    ),
    "journal": Target(read_journal, _bodies()),
    "frame": Target(
        read_frame,
        (
            frames.build_from(1, bytes(1000)),
            frames.build_from(2, b"short"),
            journal.encode(ENTRIES["several"]),
        ),
        reseal_heads,
    ),
    "scan": Target(scan, (raw_frames(), _PACK), reseal_heads),
    "pack": Target(read_pack, (_PACK,), reseal_pack),
    "footer": Target(lambda d: pack.read_footer(d, _FOOTER_AT), (_footer(_PACK),), reseal_heads),
    "narinfo": Target(read_narinfo, (NARINFO,)),
    "texts": Target(
        read_texts,
        (
            b"/nix/store/1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1",
            b"sha256:1awhl2hm31spcigyxdqkzpk8w92wf68s8xk39gcp19x2k4rpywid",
            b"fixed:r:sha256:1awhl2hm31spcigyxdqkzpk8w92wf68s8xk39gcp19x2k4rpywid",
            b"bafkr4if2xygok7lx5wlofibl6mcj6stvkbpwei2d5vaufu7v6c73xmcae4",
            b"key-1:" + b"A" * 43 + b"=",
            b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n",
        ),
    ),
    "xz": Target(unpack("xz"), (lzma.compress(_TEXT),)),
    "gzip": Target(unpack("gzip"), (_GZIP.compress(_TEXT) + _GZIP.flush(),)),
    "zstd": Target(unpack("zstd"), (frames.build_from(1, _TEXT)[frames.HEADER_SIZE :],)),
    "nix conversation": Target(converse(lambda: Server("")), (_asked(requests.FEATURES, greeting=True),)),
    "nix requests": Target(converse(greeted), (_asked(frozenset()),)),
    "nix answers": Target(read_answers(requests.FEATURES), (_answers(requests.FEATURES),)),
    "older nix answers": Target(read_answers(frozenset()), (_answers(frozenset()),)),
}
