"""A store that is not /nix/store: the overlay stands at the store directory, and its database elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lab import Lab, assert_quiet
from .real_nix import ChrootStore, one
from .tool import Cidfs, mounted


class PlainStore(ChrootStore):
    """A store whose paths are where their names say."""

    def real(self, path: str) -> Path:
        return Path(path)


@pytest.fixture
def plain(lab: Lab) -> Iterator[PlainStore]:
    """Return an overlay store on a mount of its own, with nothing below but the tools that builds need."""
    at = lab.at / "plain"
    (at / "store").mkdir(parents=True)
    (at / "cidfs.toml").write_text(f'[store]\nstore_dir = "{at}/store"\n')
    cidfs = Cidfs(at / "state")
    cidfs.environment["CIDFS_CONFIG"] = str(at / "cidfs.toml")
    (tools,) = cidfs.run("add", lab.store.tools).lines
    layers = ("--upper", at / "upper", "--work", at / "work", "--nix-state", at / "nix")
    with mounted(cidfs, at / "mnt"):
        (uri,) = cidfs.run("overlay", at / "store", *layers).lines
        try:
            store = PlainStore(lab.nix, at, uri)
            assert store.run("nix", "path-info", tools) == tools
            yield store
        finally:
            cidfs.run("umount", at / "store")
    assert_quiet(cidfs)


def test_nix_builds_and_collects_in_a_store_of_another_name(plain: PlainStore) -> None:
    upper = plain.root / "upper"
    built = plain.build("everything")
    assert one(built, "-top-1").startswith(f"{plain.root}/store/")
    closure = plain.closure(built)
    assert {Path(path).name for path in closure} <= set(os.listdir(upper))
    assert not any("-tools" in name for name in os.listdir(upper))
    plain.run("nix-store", "--verify", "--check-contents")
    plain.run("nix-store", "--gc")
    assert set(os.listdir(upper)) <= {".links"}
    assert plain.build("leaf") == [one(closure, "-leaf-1")]
