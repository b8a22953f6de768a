"""After everything that the other tests did, the store is whole. (This file runs last.)"""

from __future__ import annotations

from .tool import Cidfs, Mount


def test_verify_finds_nothing_after_all_that_was_done(imported: Cidfs) -> None:
    imported.run("verify")


def test_verify_finds_nothing_beside_a_running_mount(mount: Mount) -> None:
    mount.cidfs.run("verify")
