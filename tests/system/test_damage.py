"""A flipped byte in a pack: just what it touches fails, and everyone who should says so."""

from __future__ import annotations

import json
from pathlib import Path

from cidfs.formats.digest import parse_cid
from cidfs.formats.frames import HEADER_SIZE
from cidfs.local.packs import pack_path
from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.system.support import describe, error_of, make_files, noise


def flip(store: Store, database: str, digest: bytes) -> Path:
    """Flip a bit in the middle of a stored frame and return its pack."""
    with LocalStore.open(store.state) as opened:
        place = opened.place(database, digest)
    assert place is not None
    path = pack_path(store.state, place.kind, place.pack)
    with open(path, "r+b") as file:
        at = place.offset + HEADER_SIZE + place.stored // 2
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    return path


def chunks_of(store: Store, path: str) -> list[str]:
    """Return the CIDs of a file's chunks."""
    known = json.loads(store.run("info", "--json", path).stdout)
    chunks: list[str] = known["chunks"]
    return chunks


def test_a_damaged_chunk_costs_only_the_files_that_have_it(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    folder = store.state.parent
    shared = noise("shared", 50_000)
    trees = [
        make_files(
            folder / f"tree-{i}",
            {b"good": noise(i, 300_000), b"shared": shared, b"small": b"%d" % i, b"sub/good": b"x" * 5000},
        )
        for i in range(2)
    ]
    other = make_files(folder / "other", {b"good": noise("other", 100_000)})
    names = store.add(*trees, other)
    store.mount(mountpoint)
    cids = chunks_of(store, f"{names[0]}/shared")
    pack = flip(store, "chunks", parse_cid(cids[0]))

    for name in names[:2]:
        assert error_of((mountpoint / name / "shared").read_bytes) == "EIO"
        assert (mountpoint / name / "shared").stat().st_size == 50_000
    for name, tree in zip(names, [*trees, other], strict=True):
        for good in (path for path in tree.rglob("*") if path.is_file() and path.name != "shared"):
            assert (mountpoint / name / good.relative_to(tree)).read_bytes() == good.read_bytes()
    assert describe(mountpoint / names[2]) == describe(other)
    assert error_of((mountpoint / names[0] / "shared").read_bytes) == "EIO"

    done = store.run("verify", code=16)
    lines = done.stdout.decode().splitlines()
    assert any(str(pack) in line and cids[0] in line for line in lines)
    for name in names[:2]:
        assert any(line.startswith(f"/nix/store/{name}:") for line in lines)
    assert not any(names[2] in line for line in lines)
    assert len(lines) == 3
    (summary,) = done.stderr.decode().splitlines()
    assert "3 problems" in summary
    store.run("verify", names[2])
    assert names[1] in store.run("verify", names[1], code=16).stdout.decode()

    daemon = store.stats()["daemon"]
    assert daemon["damaged"] >= 2
    assert daemon["requests"]["read"]["errors"] >= 2
    assert str(pack) in store.log_text()
    for command in (("cat", f"{names[0]}/shared"), ("nar", names[0]), ("cat", cids[0])):
        failed = store.run(*command, code=18)
        (line,) = failed.stderr.decode().splitlines()
        assert str(pack) in line
    assert store.run("cat", f"{names[0]}/good").stdout == (trees[0] / "good").read_bytes()


def test_a_damaged_manifest_costs_only_its_path(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    folder = store.state.parent
    trees = [make_files(folder / f"tree-{i}", {b"a/file": b"%d" % i}) for i in range(2)]
    names = store.add(*trees)
    cid = json.loads(store.run("info", "--json", names[0]).stdout)["cid"]
    store.mount(mountpoint)
    pack = flip(store, "manifests", parse_cid(cid))
    assert (mountpoint / names[0]).is_dir()  # the name is the index's
    assert error_of(lambda: list((mountpoint / names[0]).iterdir())) == "EIO"
    assert describe(mountpoint / names[1]) == describe(trees[1])
    lines = store.run("verify", code=16).stdout.decode().splitlines()
    assert any(str(pack) in line and cid in line for line in lines)
    assert any(line.startswith(f"/nix/store/{names[0]}:") for line in lines)
    assert not any(names[1] in line for line in lines)
    assert str(pack) in store.log_text()


def test_a_pack_that_is_gone_is_named(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    tree = make_files(store.state.parent / "tree", {b"file": noise(1, 100_000), b"empty": b""})
    (name,) = store.add(tree)
    store.mount(mountpoint)
    (pack,) = [path for path in (store.state / "packs/own").rglob("*") if path.is_file()]
    pack.unlink()
    assert error_of((mountpoint / name / "file").read_bytes) == "EIO"
    assert (mountpoint / name / "empty").read_bytes() == b""
    lines = store.run("verify", code=16).stdout.decode().splitlines()
    assert any(str(pack) in line for line in lines)
    assert any(line.startswith(f"/nix/store/{name}:") for line in lines)
    assert str(pack) in store.log_text()
