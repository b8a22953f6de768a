"""`cidfs add` gives the store path that `nix store add` gives, and refuses what Nix refuses."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import World
from .real_nix import ChrootStore
from .tool import Cidfs
from .trees import TREES


@pytest.fixture(scope="module")
def cidfs(new_cidfs: Callable[[], Cidfs]) -> Cidfs:
    return new_cidfs()


@pytest.fixture(scope="module")
def printed(world: World, cidfs: Cidfs) -> dict[str, str]:
    """Add all trees with one command, and return what it printed for each."""
    lines = cidfs.run("add", *(world.sources / tree for tree in TREES)).lines
    return dict(zip(TREES, lines, strict=True))


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree[:20])
def test_add_prints_what_nix_store_add_prints(world: World, printed: dict[str, str], tree: str) -> None:
    assert printed[tree] == world.trees[tree]


def test_several_are_printed_in_the_order_given(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    chosen = ["modes", "file", "link-dangling", "empty-dir", "file"]
    printed = new_cidfs().run("add", *(world.sources / tree for tree in chosen)).lines
    assert printed == [world.trees[tree] for tree in chosen]


@pytest.mark.parametrize(
    "name", ["other", ".dot", "a.drv.b", "+-._?=09", "n" * 211], ids=lambda name: name[:20]
)
def test_a_given_name_counts_as_it_does_for_nix(
    world: World, scratch: ChrootStore, cidfs: Cidfs, name: str
) -> None:
    source = world.sources / "executable"
    assert cidfs.run("add", source, "--name", name).lines == [scratch.add(source, name)]


BAD_NAMES = ("", ".", "..", ".-x", "..-x", "a/b", "sp ace", "\u00e9", "new\nline", "n" * 212)


def test_names_that_nix_refuses_are_refused(world: World, scratch: ChrootStore, cidfs: Cidfs) -> None:
    source = world.sources / "file"
    cidfs.run("add", source)
    before = cidfs.listed()
    for name in BAD_NAMES:
        done = scratch.nix.attempt("nix", "store", "add", "--store", scratch.root, "--name", name, source)
        assert done.returncode != 0, name
        cidfs.refuse("add", source, "--name", name)
    assert cidfs.listed() == before


def test_a_base_name_that_is_no_store_name_needs_another(
    scratch: ChrootStore, cidfs: Cidfs, tmp_path: Path
) -> None:
    source = os.fsencode(tmp_path) + b"/caf\xe9 au lait"
    os.mkdir(source)
    cidfs.refuse("add", source)
    assert cidfs.run("add", source, "--name", "cafe").lines == [scratch.add(source, "cafe")]


def test_a_relative_path_is_taken_from_the_working_directory(
    world: World, scratch: ChrootStore, cidfs: Cidfs
) -> None:
    inside = world.sources / "empties"
    forms = ("file", "./executable", "../file", "some/../../link")
    expected = [
        scratch.nix.run("nix", "store", "add", "--store", scratch.root, form, cwd=inside).decode().strip()
        for form in forms
    ]
    assert cidfs.run("add", *forms, cwd=inside).lines == expected


def test_a_symlink_on_the_way_is_followed_and_at_the_end_is_not(
    world: World, scratch: ChrootStore, cidfs: Cidfs, tmp_path: Path
) -> None:
    (tmp_path / "way").symlink_to(world.sources)
    (tmp_path / "end").symlink_to(world.sources / "file")
    assert cidfs.run("add", tmp_path / "way" / "file").lines == [world.trees["file"]]
    assert cidfs.run("add", tmp_path / "end").lines == [scratch.add(tmp_path / "end")]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


@pytest.mark.parametrize("special", [_fifo, _socket])
@pytest.mark.parametrize("where", ["top", "top/inside"])
def test_what_no_store_can_hold_is_refused(
    cidfs: Cidfs, tmp_path: Path, special: Callable[[Path], None], where: str
) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    special(tmp_path / where)
    assert str(tmp_path / where) in cidfs.refuse("add", tmp_path / "top").complaints[0]
    assert [name for name in cidfs.listed() if name.endswith("-top")] == []


def test_a_source_that_is_not_there_is_refused(cidfs: Cidfs, tmp_path: Path) -> None:
    assert "absent" in cidfs.refuse("add", tmp_path / "absent").complaints[0]


def test_adding_again_changes_nothing(world: World, cidfs: Cidfs, printed: dict[str, str]) -> None:
    before = cidfs.listed()
    assert cidfs.run("add", world.sources / "sizes").lines == [printed["sizes"]]
    assert cidfs.listed() == before
