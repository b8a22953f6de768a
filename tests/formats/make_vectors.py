"""How each committed vector was made, from literal inputs.

`GENERATED` maps the files of vectors/ to what makes their bytes; test_vectors.py compares them. Files in
`FROZEN` hold zstd data, whose bytes another version of the library may choose otherwise: they were written
once (zstandard 0.25.0, libzstd 1.5.7, level 3) and are only ever decoded.

After a change of a format that is meant: `python -m tests.formats.make_vectors` at the top of the checkout.

What Nix says is not computed here but written down, as Nix 2.34.8 said it:

    awkward-tree.nar    nix-store --dump tree, where tree is AWKWARD_TREE on disk
    sha256.json         nix hash convert --to base16|nix32|base64|sri
    nix32.json          nix hash convert --hash-algo md5|sha1|sha256|sha512 --to nix32 (of md5sum etc.)
    store-paths.json    nix-store --print-fixed-path --recursive sha256 HASH NAME (NIX_STORE_DIR for others)

So test_vectors.py compares these with what cidfs says, and nothing writes them but by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cidfs.formats import chunking, frames, journal, pack, realisation, record
from cidfs.formats.chunking import ENCODING_RAW, cut
from cidfs.formats.digest import checksum, cid_text, digest_of
from cidfs.formats.journal import Amendment, Checkpoint, Entry, Publication, Removal
from cidfs.formats.manifest import Manifest
from cidfs.formats.realisation import Realisation
from cidfs.formats.record import Record
from cidfs.formats.store_path import parse_base_name
from tests.formats.model import File, Link, Tree, manifest_of
from tests.formats.support import VECTORS, counter_stream, hex_lines, read_hex


def real_cut(data: bytes) -> list[bytes]:
    """Divide a file's contents as cidfs does."""
    return [data[a : a + n] for a, n in cut(data)]


AWKWARD_TREE: Final[Tree] = {
    b"empty": File(b""),
    b"one": File(b"\0"),
    b"seven": File(b"1234567"),
    b"eight": File(b"12345678"),
    b"nine": File(b"123456789"),
    b"run": File(b"#!/bin/sh\nexit 0\n", True),
    b"run-empty": File(b"", True),
    b"Z": File(b"upper before lower\n"),
    b"a": {b"b": File(b"in a\n")},
    b"a.b": File(b"dot before slash\n"),
    b"\xff\xfe not utf-8": File(b"bytes\n"),
    "ünïcode".encode(): File(b"u\n"),
    b"line\nbreak": File(b"n\n"),
    b" ": File(b"space\n"),
    b"..a": File(b"dots\n"),
    b"-": File(b"dash\n"),
    b"n" * 255: File(b"longest name\n"),
    b'\\back*slash"': File(b"q\n"),
    b"\x01": File(b"c\n"),
    b"empty-dir": {},
    b"deep": {b"er": {b"est": {b"x": File(b"x")}}},
    b"dangling": Link(b"../nowhere"),
    b"absolute": Link(b"/nix/store"),
    b"loop": Link(b"."),
    b"longest target": Link(b"t" * 4095),
    b"bytes target": Link(b"\xff"),
    b"magic": File(b"nix-archive-1\x00\x00\x00(\x00"),
    b"data": File(bytes(i * i >> 3 & 255 for i in range(5000))),
}

MANIFEST_TREE: Final[Tree] = {
    b"bin": {b"tool": File(b"#!/bin/sh\n", True), b"tool-link": Link(b"tool")},
    b"empty": File(b""),
    b"empty-dir": {},
    b"large": File(counter_stream("large", 600_000)),
    b"\xff": File(b"not utf-8"),
}

STREAMS: Final = {
    "empty": b"",
    "one byte": b"\0",
    "minimum - 1": counter_stream("short", chunking.MINIMUM - 1),
    "minimum": counter_stream("short", chunking.MINIMUM),
    "minimum + 1": counter_stream("short", chunking.MINIMUM + 1),
    "maximum": counter_stream("short", chunking.MAXIMUM),
    "maximum + 1": counter_stream("short", chunking.MAXIMUM + 1),
    "3000000 of counter stream a": counter_stream("a", 3_000_000),
    "1500001 of counter stream b": counter_stream("b", 1_500_001),
    "1000000 zeros": bytes(1_000_000),
    "0 to 255, 4000 times": bytes(range(256)) * 4000,
    "lines of numbers": b"".join(b"%d\n" % i for i in range(100_000)),
}

FROZEN_DATA: Final = {
    "frame-zstd.hex": b"a chunk that compresses well\n" * 300,
    "zstd.hex": counter_stream("zstd", 2000) * 5,
}
"""What the frozen files decode to."""

ENTRIES: Final[dict[str, tuple[Entry, ...]]] = {
    "none": (),
    "publication, own": (Publication(1, 2, 3, 0, b"record"),),
    "publication, fetched": (Publication(7, 1 << 40, 1 << 24, journal.FLAG_FETCHED, bytes(range(64))),),
    "publication, to be mirrored": (Publication((1 << 64) - 1, 5, 6, journal.FLAG_TO_MIRROR, b""),),
    "amendment": (Amendment(8, 2, b"another record"),),
    "removal": (Removal(9, 2, "0123456789abcdfghijklmnpqrsvwxyz"),),
    "realisation": (journal.Realisation(14, b"a realisation"),),
    "checkpoint": (Checkpoint(10, 1 << 33, (1, 7, 1 << 50)),),
    "checkpoint of nothing": (Checkpoint(1, 2, ()),),
    "several": (
        Publication(11, 100, 4, 3, b"first"),
        Publication(12, 104, 4, 0, b"second"),
        Removal(13, 2, "z" * 32),
    ),
}

SMALL_RECORD: Final = Record(
    store_dir="/nix/store",
    path=parse_base_name("wbyrcj9qskgk94dwkg7g9lcwxp1z5lk6-file"),
    nar_hash=bytes(range(32)),
    nar_size=120,
    manifest=bytes(range(32, 64)),
    node_count=1,
    root_row=Manifest(manifest_of(File(b"x"))[0]).row(0),
)

FULL_RECORD: Final = Record(
    store_dir="/other/store",
    path=parse_base_name("wbyrcj9qskgk94dwkg7g9lcwxp1z5lk6-awkward-tree"),
    nar_hash=bytes.fromhex("2b733521c867dc3235f39f118f617ff64c326c285f2ccdd337b0d0dc503465f4"),
    nar_size=15656,
    references=(
        "fk92h4hwm5993g6ii3sgm5mxx53pvvx4-a",
        "wbyrcj9qskgk94dwkg7g9lcwxp1z5lk6-awkward-tree",
    ),
    deriver="0vqz94lphrf9wdl5xzsz1q19vgrp2mr2-a.drv",
    ca="fixed:r:sha256:1x356i8drl5h6z9wsb2z51n34k7ngxhqy4czycsk5p37r0hkawrb",
    manifest=digest_of(b"a manifest"),
    node_count=9,
    root_row=Manifest(manifest_of(MANIFEST_TREE, real_cut)[0]).row(0),
    features=5,
    signatures=("cache.example.org-1:c2lnbmF0dXJl", "other-1:c2ln"),
    seals=("machine-1:c2VhbA==",),
    hints=("wbyrcj9qskgk94dwkg7g9lcwxp1z5lk6", "fk92h4hwm5993g6ii3sgm5mxx53pvvx4"),
)


SMALL_REALISATION: Final = Realisation(
    id="wbyrcj9qskgk94dwkg7g9lcwxp1z5lk6-tool-1.drv!out", path="fk92h4hwm5993g6ii3sgm5mxx53pvvx4-tool-1"
)

FULL_REALISATION: Final = Realisation(
    id=f"sha256:{bytes(range(32)).hex()}!dev",
    path="wbyrcj9qskgk94dwkg7g9lcwxp1z5lk6-tool-1-dev",
    signatures=("cache.example.org-1:c2lnbmF0dXJl", "other-1:c2ln"),
    dependent=(
        (f"sha256:{bytes(range(32)).hex()}!out", "fk92h4hwm5993g6ii3sgm5mxx53pvvx4-tool-1"),
        (f"sha256:{bytes(range(1, 33)).hex()}!bin", "0vqz94lphrf9wdl5xzsz1q19vgrp2mr2-library-bin"),
    ),
)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"


def digests() -> bytes:
    """BLAKE3, check value and CID of some data."""
    return _json(
        {
            name: {
                "blake3": digest_of(data).hex(),
                "check": checksum(data).hex(),
                "cid": cid_text(digest_of(data)),
            }
            for name, data in STREAMS.items()
        }
    )


def cuts() -> bytes:
    """The lengths of the chunks of each stream, and the parameters that they hold for."""
    lengths = {name: " ".join(str(n) for _, n in cut(data)) for name, data in STREAMS.items()}
    return _json({"parameters": chunking.PARAMETERS, "lengths": lengths})


def raw_frames() -> bytes:
    """A frame of each kind, a damaged one and an unknown one; raw."""
    return b"".join(
        (
            frames.build_from(frames.KIND_CHUNK, b"a chunk", compress=False),
            frames.build_from(frames.KIND_MANIFEST, b"a manifest", compress=False),
            frames.build_from(frames.KIND_FOOTER, b"a footer", compress=False),
            frames.build_from(frames.KIND_JOURNAL, b"a journal entry", compress=False),
            frames.build_from(200, b"of a kind that nobody knows", compress=False),
            frames.build(frames.KIND_CHUNK, ENCODING_RAW, b"damaged", 7, digest_of(b"as it was")),
            frames.build_from(frames.KIND_CHUNK, b"", compress=False),
        )
    )


def sealed_pack() -> bytes:
    """A sealed pack: a raw chunk, the frozen compressed one, a manifest."""
    body = pack.HEADER
    rows = []
    for frame in (
        frames.build_from(frames.KIND_CHUNK, b"a chunk", compress=False),
        read_hex("frame-zstd.hex"),
        frames.build_from(frames.KIND_MANIFEST, manifest_of({b"a": File(b"a chunk")})[0], compress=False),
    ):
        rows.append(pack.row_of(len(body), frames.read_header(frame)))
        body += frame
    return body + pack.build_footer(rows, len(body))


def journal_bodies() -> bytes:
    """The decoded data of a journal frame of each kind of entry."""
    bodies = {}
    for name, entries in ENTRIES.items():
        frame = journal.encode(entries, of_checkpoint="checkpoint" in name)
        bodies[name] = frames.read_data(frame, frames.read_header(frame)).hex()
    return _json(bodies)


GENERATED: Final[dict[str, Callable[[], bytes]]] = {
    "digests.json": digests,
    "cuts.json": cuts,
    "frames-raw.hex": lambda: hex_lines(raw_frames()),
    "pack.hex": lambda: hex_lines(sealed_pack()),
    "journal.json": journal_bodies,
    "manifest.hex": lambda: hex_lines(manifest_of(MANIFEST_TREE, real_cut)[0]),
    "record-small.hex": lambda: hex_lines(record.encode(SMALL_RECORD)),
    "record-full.hex": lambda: hex_lines(record.encode(FULL_RECORD)),
    "realisation-small.hex": lambda: hex_lines(realisation.encode(SMALL_REALISATION)),
    "realisation-full.hex": lambda: hex_lines(realisation.encode(FULL_REALISATION)),
}

FROZEN: Final[dict[str, Callable[[], bytes]]] = {
    "frame-zstd.hex": lambda: hex_lines(frames.build_from(frames.KIND_CHUNK, FROZEN_DATA["frame-zstd.hex"])),
    "zstd.hex": lambda: hex_lines(chunking.encode(FROZEN_DATA["zstd.hex"])[1]),
}

FROM_NIX: Final = ("awkward-tree.nar", "narinfo.json", "nix32.json", "sha256.json", "store-paths.json")


def main(folder: Path = VECTORS) -> None:
    """Write every generated vector, and the frozen ones that are not there."""
    for name, make in FROZEN.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(make())
    for name, make in GENERATED.items():
        (folder / name).write_bytes(make())


if __name__ == "__main__":
    main()
