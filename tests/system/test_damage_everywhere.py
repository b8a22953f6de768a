"""A byte flipped in each part of everything that is stored: just what needs it fails, verify names it."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cidfs.errors import EXIT_CODES, Damaged, IndexLost, JournalLoss
from cidfs.formats import pack
from cidfs.formats.digest import cid_text
from cidfs.formats.frames import HEADER_SIZE
from cidfs.local.packs import pack_path
from cidfs.local.rows import Place
from cidfs.local.store import LocalStore
from tests.commands import Store, wait_until
from tests.system.support import alive, describe, error_of, inodes, make_files, noise

DAMAGED, LOST, GAPS = EXIT_CODES[Damaged], EXIT_CODES[IndexLost], EXIT_CODES[JournalLoss]
SMALL_PACKS = "import cidfs.formats.pack; cidfs.formats.pack.ROLL_SIZE = 60_000"
PARTS = (0, 4, 5, 6, 8, 12, 16, 47, 48, 55, 56, -1)  # of a frame: each field of its head, and its data


def flip(path: Path, at: int, mask: int = 0x10) -> None:
    """Change a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        at = file.tell()
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ mask,)))


def flip_frame(store: Store, place: Place, part: int) -> Path:
    """Change a bit of a frame, in one of its parts."""
    path = pack_path(store.state, place.kind, place.pack)
    size = HEADER_SIZE + place.stored
    flip(path, place.offset + part % size)
    return path


def filled(store: Store, paths: int = 14) -> tuple[list[Path], list[str]]:
    """Add trees of one file each that no other has, one file that all have, and a folder; in small packs."""
    folder = store.state.parent
    trees = [
        make_files(
            folder / f"tree-{i}",
            {b"own": noise(f"own {i}", 4000 + i), b"sub/shared": b"shared " * 100, b"empty": b""},
        )
        for i in range(paths)
    ]
    names, _ = store.finish(store.start("add", *trees, hook=SMALL_PACKS))
    return trees, [Path(name).name for name in names]


def frames_of(store: Store, names: list[str]) -> dict[str, tuple[str, Place, str, Place]]:
    """Return CID and place of each path's manifest, and of the only chunk of its file `own`."""
    found = {}
    with LocalStore.open(store.state) as opened:
        for name in names:
            row = opened.find(name[:32].encode())
            assert row is not None
            manifest = opened.read_manifest(row.manifest)
            index = manifest.resolve(b"own")
            assert index is not None
            (span,) = manifest.spans(manifest.node(index))
            at, chunk_at = opened.place("manifests", row.manifest), opened.place("chunks", span.digest)
            assert at is not None
            assert chunk_at is not None
            found[name] = cid_text(row.manifest), at, cid_text(span.digest), chunk_at
    return found


def verified(store: Store, code: int = DAMAGED) -> list[str]:
    """Return what verify names."""
    return store.run("verify", code=code).stdout.decode().splitlines()


def data_file(store: Store) -> Path:
    """Return the file of the index that counts."""
    number = (store.state / "index" / "current").read_text().split()[0]
    return store.state / "index" / number / "data.mdb"


def test_each_part_of_a_chunks_frame(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    trees, names = filled(store)
    known = frames_of(store, names)
    hit = {name: flip_frame(store, known[name][3], part) for name, part in zip(names, PARTS, strict=False)}
    assert len(hit) == len(PARTS) < len(names)
    store.mount(mountpoint)
    for name, tree in zip(names, trees, strict=True):
        own = mountpoint / name / "own"
        if name in hit:
            assert error_of(own.read_bytes) == "EIO", PARTS[list(hit).index(name)]
            assert own.stat().st_size == (tree / "own").stat().st_size
        else:
            assert describe(mountpoint / name) == describe(tree)
        assert (mountpoint / name / "sub/shared").read_bytes() == b"shared " * 100
    lines = verified(store)
    for name, path in hit.items():
        assert any(str(path) in line and known[name][2] in line for line in lines), lines
    assert touched(names, lines) == set(hit)


def test_each_part_of_a_manifests_frame(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    trees, names = filled(store)
    known = frames_of(store, names)
    hit = {name: flip_frame(store, known[name][1], part) for name, part in zip(names, PARTS, strict=False)}
    store.mount(mountpoint)
    for name, tree in zip(names, trees, strict=True):
        if name in hit:
            assert error_of(partial(os.listdir, mountpoint / name)) == "EIO"
            assert error_of((mountpoint / name / "own").stat) == "EIO"
        else:
            assert describe(mountpoint / name) == describe(tree)
    lines = verified(store)
    for name, path in hit.items():
        assert any(str(path) in line and known[name][0] in line for line in lines), lines
    assert touched(names, lines) == set(hit)


def touched(names: list[str], lines: list[str]) -> set[str]:
    """Return the paths that verify names."""
    return {name for name in names if any(line.startswith(f"/nix/store/{name}:") for line in lines)}


def test_what_only_a_rebuild_reads_of_a_pack(store: Store, mountpoint: Path) -> None:
    """Header, footer and trailer: all is read, verify names the pack, and a rebuild finds its frames."""
    trees, names = filled(store, 65)
    ends = {}
    for path in sorted(path for path in (store.state / "packs/own").rglob("*") if path.is_file()):
        data = path.read_bytes()
        trailer = pack.read_trailer(data[-pack.TRAILER_SIZE :], len(data))
        if trailer is not None:
            ends[path] = trailer[0]
    assert len(ends) >= 4
    for (path, footer), part in zip(ends.items(), ("header", "footer", "rows", "trailer"), strict=False):
        places = {"header": 3, "footer": footer + 5, "rows": footer + HEADER_SIZE + 30, "trailer": -20}
        flip(path, places[part])
    store.mount(mountpoint)
    for name, tree in zip(names, trees, strict=True):
        assert describe(mountpoint / name) == describe(tree)
    before = {name: inodes(mountpoint / name) for name in names}
    store.umount(mountpoint)
    lines = verified(store)
    for path in list(ends)[:4]:
        assert any(str(path) in line for line in lines), lines
    assert not touched(names, lines)
    store.run("rebuild")
    store.mount(mountpoint)
    for name, tree in zip(names, trees, strict=True):
        assert describe(mountpoint / name) == describe(tree)
        assert inodes(mountpoint / name) == before[name]


def test_a_byte_of_the_journal(store: Store, mountpoint: Path) -> None:
    trees, names = filled(store, 3)
    (journal,) = (store.state / "journal").iterdir()
    size = journal.stat().st_size
    store.add(make_files(store.state.parent / "more", {b"file": b"more"}))
    store.mount(mountpoint)
    before = {name: inodes(mountpoint / name) for name in names}
    for at in (0, 20, size // 2):
        flip(journal, at)
        assert any(str(journal.parent) in line for line in verified(store)), at
        for name, tree in zip(names, trees, strict=True):
            assert describe(mountpoint / name) == describe(tree)
        flip(journal, at)
    store.run("verify")
    flip(journal, size // 2)
    whole = store.state.parent / "whole"
    shutil.copytree(store.state, whole, ignore=shutil.ignore_patterns("run", "nix.sock*"))
    (whole / "run").mkdir()
    shutil.rmtree(whole / "index" / data_file(store).parent.name)
    error = Store(whole).error("rebuild", code=GAPS)
    assert "journal" in error
    assert "lost" in error
    store.run("rebuild")  # the index still knew
    store.run("verify")
    for name, tree in zip(names, trees, strict=True):
        assert describe(mountpoint / name) == describe(tree)
        assert inodes(mountpoint / name) == before[name]


def test_the_inode_limit(store: Store) -> None:
    _, names = filled(store, 2)
    flip(store.state / "next-inode", 3)  # the other slot counts
    more = make_files(store.state.parent / "more", {b"file": b"more"})
    store.add(more)
    for at in (3, 4096 + 3):
        flip(store.state / "next-inode", at, 0x20)
    lines = verified(store)
    assert any("next-inode" in line for line in lines)
    assert {Path(path).name for path in store.lines("ls")} == {*names, *store.add(more)}
    error = store.error("rebuild", code=7)
    assert "next-inode" in error
    store.run("rebuild", "--accept-loss")
    store.run("verify")


def test_a_byte_of_the_pointer(store: Store) -> None:
    filled(store, 1)
    path = store.state / "index" / "current"
    data = path.read_bytes()
    for at in (0, 1, 5):
        flip(path, at, 0x80)
        assert str(path) in store.error("ls", code=LOST)
        path.write_bytes(data)
    flip(path, 0, 1)
    assert str(path) in store.error("verify", code=LOST)
    store.run("rebuild")
    store.run("verify")


# --- the index


def damage_quarter(store: Store) -> None:
    """Overwrite a quarter of the index's pages."""
    path = data_file(store)
    size = path.stat().st_size // 4096
    chosen = random.Random("quarter")
    with open(path, "r+b") as file:
        for page in chosen.sample(range(2, size), size // 4):
            file.seek(page * 4096 + 8)
            file.write(chosen.randbytes(60))


def cut(store: Store) -> None:
    """Cut the index to half its length."""
    path = data_file(store)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [cut, damage_quarter])
def test_no_start_on_a_damaged_index_dies_without_a_word(
    store: Store, mountpoint: Path, damage: Callable[[Store], None]
) -> None:
    trees, names = filled(store, 30)
    store.mount(mountpoint)
    before = {name: inodes(mountpoint / name) for name in names}
    store.umount(mountpoint)
    damage(store)
    more = make_files(store.state.parent / "more", {b"file": b"more"})
    mounts = (["mount", str(mountpoint)], ["mount", "--foreground", str(mountpoint)])
    for command in mounts if damage is cut else (["ls"], ["verify"], ["add", str(more)]):
        line = store.error(*command, code=LOST)
        assert str(store.state / "index") in line
        assert line.endswith("run `cidfs rebuild`")
    store.run("rebuild")
    store.run("verify")
    store.mount(mountpoint)
    for name, tree in zip(names, trees, strict=True):
        assert describe(mountpoint / name) == describe(tree)
        assert inodes(mountpoint / name) == before[name]


def test_an_index_that_is_cut_short_under_a_daemon(store: Store, mountpoint: Path) -> None:
    """It cannot go on, and says why: in its log, and by its exit code where somebody waits for that."""
    store.log_expected = True
    trees, names = filled(store, 30)
    store.mount(mountpoint)
    before = inodes(mountpoint / names[0])
    (pid,) = store.daemon_pids()
    os.truncate(data_file(store), 8192)
    for name in names:
        error_of(partial(os.listdir, mountpoint / name))
    wait_until(lambda: not alive(pid))
    (line,) = [text for text in store.log_text().splitlines() if "SIGBUS" in text]
    assert line.startswith(f"cidfs: {store.state}/index/")
    assert line.endswith("cut short (SIGBUS); run `cidfs rebuild`")
    store.umount(mountpoint)
    store.error("mount", mountpoint, code=LOST)
    store.run("rebuild")
    store.mount(mountpoint)
    assert inodes(mountpoint / names[0]) == before
    assert describe(mountpoint / names[0]) == describe(trees[0])


def test_a_foreground_mount_ends_with_a_line_and_a_code(store: Store, mountpoint: Path) -> None:
    _, names = filled(store, 30)
    process = store.start("mount", "--foreground", mountpoint)
    store.mounts.append(mountpoint)
    wait_until(store.parent_pids)  # all has been started
    wait_until(lambda: (mountpoint / names[0] / "own").is_file())
    os.truncate(data_file(store), 8192)
    for name in names:
        error_of(partial(os.listdir, mountpoint / name))
    _, said = store.finish(process, LOST)
    assert any(line.startswith("cidfs: ") and "SIGBUS" in line for line in said)
    assert not os.path.ismount(mountpoint)
    store.mounts.clear()


@pytest.mark.parametrize("hindrance", ["descriptors", "nobody reads"])
def test_a_fault_that_cannot_be_explained_ends_the_process_all_the_same(store: Store, hindrance: str) -> None:
    """The handler needs a descriptor to see what is mapped, and somebody to say it to."""
    filled(store, 30)
    process = store.start("verify", hook=CUT_SHORT.format(hindrance=hindrance))
    assert process.stderr is not None
    if hindrance == "nobody reads":
        process.stderr.close()
    code = process.wait(60)
    assert code == (LOST if hindrance == "nobody reads" else -signal.SIGBUS)


CUT_SHORT = """
import os, resource
from cidfs.local.store import LocalStore
publications = LocalStore.publications
def hindered(self, start):
    os.truncate(self._index.path / "data.mdb", 8192)
    if {hindrance!r} == "descriptors":
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return publications(self, start)
LocalStore.publications = hindered
"""


def test_pages_overwritten_under_a_daemon_never_give_wrong_bytes(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    trees, names = filled(store, 40)
    path = data_file(store)
    data = path.read_bytes()
    chosen = random.Random("under a daemon")
    whole = 0
    for _ in range(20 if Store.long else 3):
        store.mount(mountpoint)
        (pid,) = store.daemon_pids()
        with open(path, "r+b") as file:
            for _ in range(chosen.choice([3, 30, 300])):
                at = chosen.randrange(8192, len(data))
                file.seek(at)
                file.write(bytes((data[at] ^ (1 << chosen.randrange(8)),)))
        for name, tree in zip(names, trees, strict=True):
            for file_name in ("own", "sub/shared"):
                shown = mountpoint / name / file_name
                try:
                    read = shown.read_bytes()
                except OSError:
                    continue
                assert read == (tree / file_name).read_bytes()
                whole += 1
        if not alive(pid):
            assert "run `cidfs rebuild`" in store.log_text()
        store.umount(mountpoint)
        path.write_bytes(data)
    assert whole, "nothing could be read"
    store.run("verify")


def test_what_kills_a_process_for_another_reason_is_not_called_damage(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    filled(store, 1)
    process = store.start("mount", "--foreground", mountpoint)
    store.mounts.append(mountpoint)
    wait_until(store.parent_pids)  # all has been started
    (pid,) = store.daemon_pids()
    os.kill(pid, signal.SIGSEGV)
    wait_until(lambda: not os.path.ismount(mountpoint))
    store.umount(mountpoint)  # ends what is left
    _, said = store.finish(process)
    assert any("internal error: SIGSEGV" in line for line in said)
    assert not any("damaged" in line for line in said)
