"""After everything that the other tests did, the store is whole. (This file runs last.) Repair from Nix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import World
from .tool import Cidfs, Mount


def test_verify_finds_nothing_after_all_that_was_done(imported: Cidfs) -> None:
    imported.run("verify")


def test_verify_finds_nothing_beside_a_running_mount(mount: Mount) -> None:
    mount.cidfs.run("verify")


@pytest.mark.parametrize("source", ["root", "cache"])
def test_what_is_lost_comes_back_from_nix(
    world: World, new_cidfs: Callable[[], Cidfs], tmp_path: Path, source: str
) -> None:
    cidfs = new_cidfs()
    chosen = [world.trees["names"], world.trees["big"], world.top]
    cidfs.run("import", "--from", world.store.root, *chosen)
    where: str | Path = world.store.root
    if source == "cache":
        where = f"file://{tmp_path}/cache"
        world.store.nix.run(
            "nix", "copy", "--from", world.store.root, "--to", f"{where}?compression=xz", *chosen
        )
    for kind in ("own", "manifest"):
        for pack in (cidfs.state / "packs" / kind).glob("*/*"):
            pack.unlink()
    assert cidfs.attempt("verify", "--quick").code == 16
    assert cidfs.attempt("verify", "--repair").code == 16
    result = cidfs.run("verify", "--repair", "--from", where)
    assert sum("the pack is gone; repaired" in line for line in result.lines) == 2
    cidfs.run("verify")
    for path in chosen:
        assert cidfs.run("nar", path).out == world.store.dump(path)
