"""NARs out and in: the bytes that Nix would write, and the path that Nix would give."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import World
from .real_nix import ChrootStore
from .tool import Cidfs
from .trees import TREES


@pytest.fixture(scope="module")
def receiver(new_cidfs: Callable[[], Cidfs]) -> Iterator[Cidfs]:
    """Yield a cidfs for archives to go into; whatever was refused must not be in it in the end."""
    cidfs = new_cidfs()
    yield cidfs
    assert [name for name in cidfs.listed() if "-refused-" in name] == []
    cidfs.run("verify")


def test_nar_writes_the_bytes_whose_hash_nix_knows(world: World, imported: Cidfs) -> None:
    """(What a mount shows has the NAR hash of every path, says test_mount.)"""

    def wrong(path: str) -> str | None:
        info = world.infos[path]
        archive = imported.run("nar", path).out
        hashed = "sha256-" + base64.b64encode(hashlib.sha256(archive).digest()).decode()
        same = (hashed, len(archive)) == (info.nar_hash, info.nar_size) and archive == world.store.dump(path)
        return None if same else path

    few = (".drv", "-ca", "-ca-dev", "-ca-doc")  # of these there are many, and all alike
    chosen = [
        path for path in world.infos if not path.endswith(few) or path.endswith(("-top-1.drv", "-mid-ca"))
    ]
    with ThreadPoolExecutor(2) as pool:
        assert [path for path in pool.map(wrong, chosen) if path] == []


def test_nar_takes_a_base_name_too(world: World, imported: Cidfs) -> None:
    base_name = world.top.rpartition("/")[2]
    assert imported.run("nar", base_name).out == world.store.dump(world.top)


def test_nar_of_an_unknown_path_is_refused(imported: Cidfs) -> None:
    imported.refuse("nar", "/nix/store/00000000000000000000000000000000-nothing")


SENT = ("names", "symlinks", "big", "deep", "file", "executable", "link", "empty-dir")


@pytest.mark.parametrize("tree", SENT)
def test_an_archive_on_standard_input_gets_the_path_that_nix_gives(
    world: World, receiver: Cidfs, tree: str
) -> None:
    path = world.trees[tree]
    archive = world.store.dump(path)
    assert receiver.run("import", "-", "--name", tree, stdin=archive).lines == [path]


def test_an_archive_with_the_promised_hash_is_taken_however_the_hash_is_spelled(
    world: World, scratch: ChrootStore, receiver: Cidfs
) -> None:
    path = world.trees["empties"]
    archive = world.store.dump(path)
    sri = world.infos[path].nar_hash
    base32 = world.store.nix.run("nix-store", "--store", world.store.root, "--query", "--hash", path)
    spellings = [sri, base32.decode().strip(), f"sha256:{hashlib.sha256(archive).hexdigest()}"]
    for number, spelling in enumerate(spellings):
        name = f"empties-{number}"
        printed = receiver.run("import", "-", "--name", name, "--nar-hash", spelling, stdin=archive).lines
        assert printed == [scratch.add(world.sources / "empties", name)]


def _refuses(receiver: Cidfs, archive: bytes, case: str, *options: str) -> None:
    """See an archive refused; that nothing of it was published, `receiver` looks at in the end."""
    receiver.refuse("import", "-", "--name", f"refused-{case}", *options, stdin=archive)


@pytest.mark.parametrize("tree", ["empties", "big", "link"])
@pytest.mark.parametrize("kept", [0.0, 0.5, -8, -1])
def test_a_truncated_archive_publishes_nothing(world: World, receiver: Cidfs, tree: str, kept: float) -> None:
    archive = world.store.dump(world.trees[tree])
    end = int(len(archive) * kept) if kept >= 0 else int(kept)
    _refuses(receiver, archive[:end], f"{tree}-{kept}")


def test_an_archive_with_another_hash_than_promised_publishes_nothing(world: World, receiver: Cidfs) -> None:
    archive = world.store.dump(world.trees["modes"])
    other = world.infos[world.trees["names"]].nar_hash
    _refuses(receiver, archive, "hash", "--nar-hash", other)


@pytest.mark.parametrize("spelling", ["", "sha256-AAAA", f"md5:{'0' * 32}"])
def test_a_hash_that_is_none_publishes_nothing(world: World, receiver: Cidfs, spelling: str) -> None:
    _refuses(receiver, world.store.dump(world.trees["modes"]), "no-hash", "--nar-hash", spelling)


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def _archive(*words: bytes) -> bytes:
    return b"".join(map(_string, (b"nix-archive-1", *words)))


def _entry(name: bytes) -> tuple[bytes, ...]:
    node = (b"(", b"type", b"regular", b"contents", b"x", b")")
    return (b"entry", b"(", b"name", name, b"node", *node, b")")


def _directory(*names: bytes) -> bytes:
    entries = (word for name in names for word in _entry(name))
    return _archive(b"(", b"type", b"directory", *entries, b")")


HOSTILE = {
    "noise": b"this is no archive, but it is long enough to look at " * 1000,
    "zeros": bytes(4096),
    "huge-length": (2**63).to_bytes(8, "little") + bytes(4096),
    "padding": _directory(b"a").replace(_string(b"a"), (1).to_bytes(8, "little") + b"a1234567"),
    "unsorted": _directory(b"b", b"a"),
    "dot-dot": _directory(b".."),
    "slash": _directory(b"a/b"),
    "unknown-type": _archive(b"(", b"type", b"fifo", b")"),
    "link-with-contents": _archive(b"(", b"type", b"symlink", b"contents", b"x", b")"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_archive_publishes_nothing(receiver: Cidfs, hostile: str) -> None:
    _refuses(receiver, HOSTILE[hostile], hostile)


def test_what_follows_an_archive_publishes_nothing(receiver: Cidfs) -> None:
    _refuses(receiver, _directory(b"a") + b"and more", "trailing")


def test_the_archives_made_here_are_good_but_for_what_is_bad_in_them(
    scratch: ChrootStore, receiver: Cidfs, tmp_path: Path
) -> None:
    archive = _directory(b"a", b"b")
    source = tmp_path / "by-hand"
    scratch.nix.run("nix-store", "--restore", source, stdin=archive)
    printed = receiver.run("import", "-", "--name", "by-hand", stdin=archive).lines
    assert printed == [scratch.add(source)]


def test_the_trees_are_all_among_what_is_compared(world: World) -> None:
    assert set(TREES) == set(world.trees)
    assert set(world.trees.values()) <= set(world.infos)
