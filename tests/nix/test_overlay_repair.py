"""Nix finds what is damaged in the upper layer, and mends it: from a substituter, or by building it again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .lab import Lab, OverlayStore
from .real_nix import one

# With ca-derivations, Nix takes an output for undamaged whose realisation it knows, and builds nothing.
_BUILDING = ("--option", "experimental-features", "nix-command local-overlay-store")
_VERIFY = ("nix-store", "--verify", "--check-contents")


def _damage(store: OverlayStore, path: str, inside: str) -> None:
    """Change a file of a path as a disk would: its name, mode and time stay."""
    file = store.real(path) / inside
    file.chmod(0o644)
    file.write_text("damaged\n")
    file.chmod(0o444)
    os.utime(file, (1, 1))


def _remove(store: OverlayStore, path: str) -> None:
    real = store.real(path)
    if real.is_dir():
        shutil.rmtree(real)
    else:
        real.unlink()


def test_a_substituter_repairs_what_is_damaged_or_missing(
    lab: Lab, above: OverlayStore, tmp_path: Path
) -> None:
    built = above.build("everything", seed="broken")
    top, dev, script = (one(built, f"-{name}") for name in ("top-broken", "mid-broken-dev", "script-broken"))
    leaf = one(above.closure([top]), "-leaf-broken")
    backup = tmp_path / "backup"
    lab.nix.run("nix", "copy", "--from", above.address, "--to", backup, "--no-check-sigs", top, script)
    _damage(above, top, "zero")
    _damage(above, leaf, "share/data")
    _remove(above, dev)
    _remove(above, script)

    said = above.refuse(*_VERIFY)
    for path in (top, leaf):
        assert f"path '{path}' was modified!" in said
    assert f"path '{dev}' disappeared, but it still has valid referrers!" in said
    assert f"path '{script}' disappeared, removing from database" in said

    trusting = ("--option", "substituters", str(backup), "--option", "require-sigs", "false")
    above.run(*_VERIFY, "--repair", *trusting)
    above.run(*_VERIFY)
    assert (above.real(top) / "zero").read_bytes() == b""
    assert (above.real(leaf) / "share" / "data").read_text() == "leaf broken\n"
    assert above.real(dev).is_dir()
    assert above.whiteouts() == []


def test_what_is_damaged_is_repaired_by_building_it_again(above: OverlayStore) -> None:
    (top,) = above.build("top", seed="again")
    leaf = one(above.closure([top]), "-leaf-again")
    for repair in (
        ("nix-store", "--repair-path", leaf),
        ("nix", "store", "repair", leaf),
        (*_VERIFY, "--repair"),
    ):
        _damage(above, leaf, "share/data")
        above.refuse(*_VERIFY)
        above.run(*repair, *_BUILDING)
        assert (above.real(leaf) / "share" / "data").read_text() == "leaf again\n", repair
        above.run(*_VERIFY)
    assert above.whiteouts() == []


def test_verifying_says_nothing_of_what_was_only_ever_below(
    lab: Lab, above: OverlayStore, tmp_path: Path
) -> None:
    """And repairing what is below takes nothing there for damaged, nor copies it."""
    top = lab.output("top")
    above.run("nix-store", "--realise", top)
    above.run("nix-store", "--repair-path", top)
    assert not above.is_above(top)
    above.run(*_VERIFY)
