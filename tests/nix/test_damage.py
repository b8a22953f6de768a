"""A path that is no longer what Nix recorded is refused, and nothing of it is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import World
from .real_nix import ChrootStore, Nix
from .tool import Cidfs, Mount, mounted, wait_until
from .trees import differences, snapshot


def _flip(path: Path) -> None:
    data = bytearray((path / "noise").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "noise").write_bytes(data)


def _grow(path: Path) -> None:
    with (path / "text").open("ab") as file:
        file.write(b"\0")


def _shorten(path: Path) -> None:
    os.truncate(path / "noise", 12345)


def _empty(path: Path) -> None:
    os.truncate(path / "text", 0)


def _make_executable(path: Path) -> None:
    (path / "text").chmod(0o555)


def _make_plain(path: Path) -> None:
    (path / "run").chmod(0o444)


def _retarget(path: Path) -> None:
    (path / "link").unlink()
    (path / "link").symlink_to("other")


def _rename(path: Path) -> None:
    (path / "text").rename(path / "Text")


def _add_file(path: Path) -> None:
    (path / "extra").write_bytes(b"")


def _add_special(path: Path) -> None:
    os.mkfifo(path / "extra")


def _lose_file(path: Path) -> None:
    (path / "text").unlink()


def _lose_directory(path: Path) -> None:
    (path / "empty").rmdir()


def _become_directory(path: Path) -> None:
    (path / "text").unlink()
    (path / "text").mkdir()


def _become_link(path: Path) -> None:
    """The same bytes, but by way of a link."""
    (path / "text").rename(path.parent / "elsewhere")
    (path / "text").symlink_to(path.parent / "elsewhere")


def _become_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


def _vanish(path: Path) -> None:
    shutil.rmtree(path)


DAMAGES = {
    damage.__name__.strip("_").replace("_", "-"): damage
    for damage in (
        _flip, _grow, _shorten, _empty, _make_executable, _make_plain, _retarget, _rename,
        _add_file, _add_special, _lose_file, _lose_directory,
        _become_directory, _become_link, _become_file, _vanish,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Damaged:
    """A store in which one path suffered each damage, and a mounted cidfs that is to import from it."""

    store: ChrootStore
    paths: dict[str, str]
    good: str
    mount: Mount

    @property
    def cidfs(self) -> Cidfs:
        return self.mount.cidfs


def _source(at: Path, name: str, world: World) -> Path:
    source = at / name
    (source / "empty").mkdir(parents=True)
    shutil.copy(world.sources / "big" / "noise", source / "noise")
    (source / "text").write_text(f"the text of {name}\n")
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("text")
    return source


def _damage(store: ChrootStore, path: str, how: Callable[[Path], object]) -> None:
    real = store.real(path)
    for directory, _, files in os.walk(real):
        os.chmod(directory, 0o755)
        for file in (Path(directory, name) for name in files):
            if not file.is_symlink():
                file.chmod(file.stat().st_mode | 0o200)
    how(real)


@pytest.fixture(scope="module")
def damaged(
    nix: Nix, world: World, new_cidfs: Callable[[], Cidfs], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Damaged]:
    at = tmp_path_factory.mktemp("damaged").resolve()
    store = ChrootStore(nix, at / "root")
    paths = {}
    for name, how in DAMAGES.items():
        paths[name] = store.add(_source(at, name, world))
        _damage(store, paths[name], how)
    good = store.add(_source(at, "good", world))
    with mounted(new_cidfs(), at / "mnt", "--list-root") as mount:
        yield Damaged(store, paths, good, mount)


def _shown(mount: Mount, paths: Iterable[str]) -> set[str]:
    """Return those of the paths that the mount shows; it and `ls` are one, says the last test here."""
    listed = mount.names()
    names = {path.rpartition("/")[2] for path in paths}
    return {name for name in names if name in listed or os.path.lexists(mount.at / name)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_path_is_refused_and_nothing_of_it_is_published(damaged: Damaged, damage: str) -> None:
    path = damaged.paths[damage]
    refused = damaged.cidfs.refuse("import", "--from", damaged.store.root, path)
    assert path.rpartition("/")[2] in refused.complaints[0], "the line must name the path"
    assert _shown(damaged.mount, [path]) == set()


def test_damaged_paths_among_all_are_not_published(damaged: Damaged) -> None:
    result = damaged.cidfs.attempt("import", "--all", "--from", damaged.store.root)
    assert result.code > 0, str(result)
    assert _shown(damaged.mount, damaged.paths.values()) == set()


def test_a_good_path_of_the_same_store_is_imported_after_the_refusals(damaged: Damaged) -> None:
    damaged.cidfs.run("import", "--from", damaged.store.root, damaged.good)
    shown = damaged.mount.path(damaged.good)
    wait_until("the good path can be looked up", lambda: os.path.lexists(shown))
    assert differences(snapshot(shown), snapshot(damaged.store.real(damaged.good))) == []


def test_a_repaired_path_is_imported_and_appears_although_it_was_refused(
    new_store: ChrootStore, tmp_path: Path, world: World, damaged: Damaged
) -> None:
    path = new_store.add(_source(tmp_path, "repaired", world))
    _damage(new_store, path, _flip)
    damaged.cidfs.refuse("import", "--from", new_store.root, path)
    shown = damaged.mount.path(path)
    assert not os.path.lexists(shown)
    _flip(new_store.real(path))
    assert damaged.cidfs.run("import", "--from", new_store.root, path).lines == [path]
    wait_until("the repaired path can be looked up", lambda: os.path.lexists(shown))
    assert (shown / "noise").read_bytes() == (tmp_path / "repaired" / "noise").read_bytes()


def test_nothing_that_refers_to_a_damaged_path_is_published(new_store: ChrootStore, damaged: Damaged) -> None:
    (top,) = new_store.build("top", seed="damaged")
    closure = new_store.closure([top])
    (leaf,) = (path for path in closure if path.endswith("-leaf-damaged"))
    _damage(new_store, leaf, lambda path: (path / "share" / "data").write_bytes(b"leaf DAMAGED\n"))
    result = damaged.cidfs.attempt("import", "--from", new_store.root, top)
    assert result.code > 0, str(result)
    assert any(leaf.rpartition("/")[2] in line for line in result.complaints), str(result)
    infos = new_store.path_infos(closure)
    tainted = {leaf, *(path for path, info in infos.items() if leaf in info.references)}
    assert len(tainted) > 2
    assert _shown(damaged.mount, tainted) == set()


def test_the_state_is_clean_after_all_refusals(damaged: Damaged) -> None:
    assert damaged.cidfs.listed() == damaged.mount.names()
    damaged.cidfs.run("verify")
