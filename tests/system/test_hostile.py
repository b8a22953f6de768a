"""NARs that nobody should take: each is refused in one line, and nothing of it is published or written."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from cidfs.errors import EXIT_CODES, FormatError
from cidfs.formats import nar
from tests.commands import Store
from tests.system.support import make_files

MALFORMED: Final = EXIT_CODES[FormatError]


def word(data: bytes) -> bytes:
    """Return a NAR's string, whatever is in it."""
    return struct.pack("<Q", len(data)) + data + bytes(-len(data) % 8)


def entry(name: bytes, node: bytes) -> bytes:
    return b"".join(map(word, (b"entry", b"(", b"name", name, b"node"))) + node + word(b")")


def folder(*entries: bytes) -> bytes:
    return b"".join(map(word, (b"(", b"type", b"directory"))) + b"".join(entries) + word(b")")


def link(target: bytes) -> bytes:
    return b"".join(map(word, (b"(", b"type", b"symlink", b"target", target, b")")))


def file(data: bytes, size: int | None = None) -> bytes:
    contents = word(data) if size is None else struct.pack("<Q", size) + data
    return b"".join(map(word, (b"(", b"type", b"regular", b"contents"))) + contents + word(b")")


def deep(levels: int) -> bytes:
    """Return directories in directories."""
    start = b"".join(map(word, (b"(", b"type", b"directory", b"entry", b"(", b"name", b"d", b"node")))
    return start * levels + folder() + (word(b")") + word(b")")) * levels


HOSTILE: Final[dict[str, bytes]] = {
    "name ..": folder(entry(b"..", file(b"out"))),
    "name .": folder(entry(b".", file(b"here"))),
    "empty name": folder(entry(b"", file(b"x"))),
    "name with a slash": folder(entry(b"../../escaped", file(b"out"))),
    "absolute name": folder(entry(b"/tmp/escaped", file(b"out"))),
    "name with a zero": folder(entry(b"a\0b", file(b"x"))),
    "name of 64 KiB": folder(entry(b"n" * 65536, file(b"x"))),
    "the same name twice": folder(entry(b"a", link(b"/etc")), entry(b"a", folder(entry(b"b", file(b"x"))))),
    "target of nothing": folder(entry(b"a", link(b""))),
    "target of 64 KiB": folder(entry(b"a", link(b"t" * 65536))),
    "file of 2^63 bytes": file(b"x" * 8, 1 << 63),
    "file of 2^64 - 1 bytes": file(b"x" * 8, (1 << 64) - 1),
    "file of 2^62 bytes": file(b"x" * 8, 1 << 62),
    "string of 2^62 bytes": struct.pack("<Q", 1 << 62),
    "100,000 directories deep": deep(100_000),
}


def below(top: Path) -> set[str]:
    """Return all that is below a folder, but for what is in the state folder."""
    found = set()
    for here, folders, files in os.walk(top):
        if "state" in folders:
            folders.remove("state")
        found |= {os.path.join(here, name) for name in (*folders, *files)}
    return found


def test_hostile_nars_publish_nothing_and_write_nothing_outside(store: Store, mountpoint: Path) -> None:
    (good,) = store.add(make_files(store.state.parent / "good", {b"file": b"good"}))
    around = store.state.parent
    before = below(around)
    hostile = list(HOSTILE.items())
    for name, body in hostile if Store.long else hostile[::3] + hostile[-1:]:
        line = store.error("import", "-", "--name", "hostile", code=MALFORMED, stdin=nar.HEADER + body)
        assert len(line) < 1000, name
    assert [Path(path).name for path in store.lines("ls")] == [good]
    assert below(around) == before
    assert not Path("/tmp/escaped").exists()
    store.run("verify")


def test_links_that_lead_out_are_kept_as_they_are_and_followed_by_nobody(
    store: Store, mountpoint: Path
) -> None:
    outside = make_files(store.state.parent / "outside", {b"secret": b"secret"})
    body = folder(
        entry(b"absolute", link(os.fsencode(outside / "secret"))), entry(b"up", link(b"../../outside/secret"))
    )
    (path,) = store.run("import", "-", "--name", "links", stdin=nar.HEADER + body).stdout.decode().split()
    name = Path(path).name
    store.mount(mountpoint)
    assert os.readlink(mountpoint / name / "up") == "../../outside/secret"
    assert os.readlink(mountpoint / name / "absolute") == str(outside / "secret")
    assert store.run("nar", name).stdout == nar.HEADER + body
    for inside in ("up", "absolute"):
        assert "symlink" in store.error("cat", f"{name}/{inside}", code=2)
