"""Hostile bytes: every decoder answers any of them with a value or FormatError, in little memory."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cidfs
from cidfs.errors import FormatError
from cidfs.formats import chunking, frames, journal, pack, realisation, record
from cidfs.formats.manifest import DIRECTORY, SYMLINK, Manifest, decode_node
from tests.formats.make_vectors import ENTRIES, FULL_REALISATION, FULL_RECORD, raw_frames, sealed_pack
from tests.formats.model import File, Link, Tree, manifest_of, nar_of, read_nar
from tests.formats.support import examples, flipped

TREE: Final[Tree] = {b"a": {b"b": Link(b"c"), b"d": {}}, b"e": File(b"12345" * 50, True), b"f": File(b"")}


def read_whole_nar(data: bytes) -> None:
    for _ in read_nar([data]):
        pass


def validate(data: bytes) -> None:
    Manifest(data).validate()


def use_unvalidated(data: bytes) -> None:
    """Ask a manifest that nobody validated everything that can be asked."""
    opened = Manifest(data)
    for index in range(opened.node_count):
        with contextlib.suppress(FormatError):
            node = opened.node(index)
            for ask in (opened.name, opened.target, opened.children):
                with contextlib.suppress(FormatError):
                    ask(node)
            for name in (b"a", b"zz", b""):
                with contextlib.suppress(FormatError):
                    opened.find(node, name)
            for offset, size in ((0, None), (0, 1), (100, 50), (1 << 62, 1 << 62)):
                with contextlib.suppress(FormatError):
                    spans = list(opened.spans(node, offset, size))
                    assert len(spans) <= opened.chunk_count
            assert (node.type in (DIRECTORY, SYMLINK)) != node.is_file
        with contextlib.suppress(FormatError):
            opened.path(index)
    for index in range(opened.chunk_count):
        opened.chunk(index)
    for path in (b"", b"a", b"a/b", b"a/b/c", b"e", b"//", b"\xff"):
        with contextlib.suppress(FormatError):
            opened.resolve(path)
    with contextlib.suppress(FormatError):
        assert len(list(opened.walk())) <= opened.node_count


def read_frame(data: bytes) -> None:
    frames.read_data(data, frames.read_header(data))


def read_pack(data: bytes) -> None:
    place = pack.read_trailer(data[-pack.TRAILER_SIZE :], len(data))
    if place is not None:
        offset, size = place
        pack.read_footer(data[offset : offset + size], offset)


def scan(data: bytes) -> None:
    for _ in frames.scan(data):
        pass


def unpack(data: bytes) -> None:
    chunking.decode(chunking.ENCODING_ZSTD, data, 1000)


BODY: Final = frames.read_data(
    journal.encode([e for entries in ENTRIES.values() for e in entries]),
    frames.read_header(journal.encode([e for entries in ENTRIES.values() for e in entries])),
)
MANIFEST: Final = manifest_of(TREE)[0]
PACK: Final = sealed_pack()
FOOTER: Final = pack.read_trailer(PACK[-32:], len(PACK)) or (0, 0)

DECODERS: Final[dict[str, tuple[Callable[[bytes], object], bytes]]] = {
    "nar": (read_whole_nar, nar_of(TREE)),
    "manifest": (validate, MANIFEST),
    "unvalidated manifest": (use_unvalidated, MANIFEST),
    "node": (decode_node, Manifest(MANIFEST).row(0)),
    "record": (record.decode, record.encode(FULL_RECORD)),
    "realisation": (realisation.decode, realisation.encode(FULL_REALISATION)),
    "journal": (journal.decode, BODY),
    "frame": (read_frame, frames.build_from(frames.KIND_CHUNK, bytes(1000))),
    "scan": (scan, raw_frames()),
    "pack": (read_pack, PACK),
    "footer": (lambda data: pack.read_footer(data, FOOTER[0]), PACK[FOOTER[0] : FOOTER[0] + FOOTER[1]]),
    "zstd": (unpack, chunking.encode(b"0123456789" * 100)[1]),
}
decoders = pytest.mark.parametrize("name", DECODERS)


def survive(decoder: Callable[[bytes], object], data: bytes) -> None:
    """Let a decoder have bytes; any exception but FormatError is a failure."""
    with contextlib.suppress(FormatError):
        decoder(data)


@decoders
def test_the_sample_itself_is_accepted(name: str) -> None:
    decoder, sample = DECODERS[name]
    decoder(sample)


@decoders
def test_random_bytes_give_a_format_error_at_worst(name: str) -> None:
    decoder, sample = DECODERS[name]

    @examples(100)
    @given(st.binary(max_size=200), st.integers(0, len(sample)), st.integers(0, len(sample)))
    def survives(junk: bytes, keep: int, resume: int) -> None:
        survive(decoder, junk)
        survive(decoder, sample[:keep] + junk)
        survive(decoder, sample[:keep] + junk + sample[resume:])

    survives()


@decoders
def test_every_truncation_gives_a_format_error_at_worst(name: str) -> None:
    decoder, sample = DECODERS[name]
    for end in range(len(sample)):
        survive(decoder, sample[:end])
        survive(decoder, sample[end:])


@decoders
def test_every_flipped_bit_gives_a_format_error_at_worst(name: str) -> None:
    decoder, sample = DECODERS[name]
    for at in range(len(sample)):
        for bit in range(8):
            survive(decoder, flipped(sample, at, 1 << bit))


NUMBERS: Final = [
    struct.pack(form, number)
    for form, bits in (("<H", 16), ("<I", 32), ("<Q", 64))
    for number in (0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << bits) - 2)
]


@decoders
def test_absurd_numbers_anywhere_give_a_format_error_at_worst(name: str) -> None:
    decoder, sample = DECODERS[name]
    for at in range(len(sample)):
        for number in NUMBERS:
            survive(decoder, sample[:at] + number + sample[at + len(number) :])


@decoders
def test_repeated_and_reordered_parts_give_a_format_error_at_worst(name: str) -> None:
    decoder, sample = DECODERS[name]
    for step in (4, 8, 32, 40):
        parts = [sample[i : i + step] for i in range(0, len(sample), step)]
        survive(decoder, b"".join(reversed(parts)))
        for i in range(len(parts)):
            survive(decoder, b"".join(parts[: i + 1] + parts[i:]))
            survive(decoder, b"".join(parts[:i] + parts[i + 1 :]))


STARVED = """
import resource, struct
from cidfs.errors import FormatError
from cidfs.formats import chunking, frames, journal, nar, pack, realisation, record
from cidfs.formats.digest import checksum, digest_of
from cidfs.formats.manifest import Manifest
from tests.formats.support import zstd_of_zeros

GIB = 1 << 30
bomb = zstd_of_zeros(GIB, 1024)
unsized = zstd_of_zeros(GIB, None)
honest = zstd_of_zeros(GIB, GIB)

def forged(kind, encoding, stored, length):
    head = struct.pack("<4sBBHII32s", frames.MAGIC, kind, encoding, 0, len(stored), length, bytes(32))
    return head + checksum(head) + stored

def frame(data):
    frames.read_data(data, frames.read_header(data))

def whole_nar(data):
    reader = nar.NarReader()
    for event in reader.feed(data):
        pass
    reader.close()

full = (1 << 32) - 1
cases = [
    lambda: chunking.decode(1, bomb, 1024),
    lambda: chunking.decode(1, unsized, 1024),
    lambda: chunking.decode(1, unsized, GIB),
    lambda: chunking.decode(1, honest, 1024),
    lambda: chunking.decode(1, zstd_of_zeros(GIB, 1 << 62), 1 << 62),
    lambda: chunking.decode(0, b"", 1 << 62),
    lambda: frame(forged(1, 1, bomb, 256 << 10)),
    lambda: frame(forged(1, 1, honest, GIB)),
    lambda: frame(forged(2, 1, honest, GIB)),
    lambda: frame(forged(3, 1, honest, GIB)),
    lambda: frame(forged(16, 0, b"", GIB)),
    lambda: frame(forged(99, 1, bomb, 40000)),
    lambda: pack.read_footer(forged(3, 1, zstd_of_zeros(256 << 20, 256 << 20), 256 << 20), 1 << 40),
    lambda: Manifest(b"cidfsmf1" + struct.pack("<IIIIQ", 1 << 24, full, full, 0, 1 << 63)),
    lambda: record.decode(b"cidfsrec1" + b"\\xff" * 200),
    lambda: record.decode(record.MAGIC + struct.pack("<H", 45) + b"/nix/store/" + b"0" * 32 + b"-a"
        + bytes(40) + b"\\xff" * 4),
    lambda: realisation.decode(realisation.MAGIC + struct.pack("<H", 42) + b"0" * 32 + b"-a.drv!out"
        + struct.pack("<H", 34) + b"0" * 32 + b"-a" + bytes(2) + b"\\xff" * 4),
    lambda: journal.decode(struct.pack("<IB", full, 0) + struct.pack("<BQI", 2, 1, full)),
    lambda: journal.decode(struct.pack("<IB", 1, 0) + struct.pack("<BQI", 5, 1, 20)
        + struct.pack("<QQI", 1, 1, full)),
    lambda: whole_nar(struct.pack("<Q", 1 << 62)),
    lambda: whole_nar(nar.HEADER + nar.write_file_head((1 << 63) - 1, False)),
    lambda: whole_nar(nar.HEADER + (nar.write_directory() + nar.write_entry(b"d")) * 2000),
]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    bytearray(128 << 20)
except MemoryError:
    pass
else:
    raise SystemExit("the limit does not hold")
for number, case in enumerate(cases):
    try:
        case()
    except FormatError:
        continue
    raise SystemExit(f"case {number} was accepted")
for _ in frames.scan(forged(1, 1, bomb, 256 << 10) * 10 + frames.build_from(1, b"chunk")):
    pass
print("survived", len(cases))
"""


def test_bombs_and_absurd_sizes_take_less_than_64_mib() -> None:
    tops = {str(Path(cidfs.__file__).parents[1]), str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", STARVED],
        env={"PYTHONPATH": ":".join(tops), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived 22\n", "")
