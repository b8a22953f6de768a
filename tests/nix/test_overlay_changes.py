"""The store below a real Nix changes while the overlay stands: what was built above comes to be below too."""

from __future__ import annotations

from pathlib import Path

import pytest

from .lab import Lab, OverlayStore
from .real_nix import one


@pytest.fixture
def source(lab: Lab, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a file that no other test has added."""
    file = tmp_path / "source"
    file.write_text(f"for {request.node.name}\n")
    return file


def _merged(store: OverlayStore) -> str:
    return str(store.root / "nix" / "store")


def test_what_is_added_below_is_there_at_once(lab: Lab, above: OverlayStore, source: Path) -> None:
    """Also where its name was looked up before, and was absent: nobody has to remount anything."""
    path = lab.store.add(source)
    assert not above.real(path).exists()
    above.refuse("nix", "path-info", path)
    lab.import_(path)
    assert above.run("nix", "path-info", path) == path
    assert above.real(path).read_bytes() == source.read_bytes()
    above.run("nix-store", "--verify-path", path)
    assert not above.is_above(path)


def test_what_is_below_is_not_added_again(lab: Lab, above: OverlayStore, source: Path) -> None:
    path = lab.add(source)
    assert above.run("nix-store", "--add", source) == path
    assert above.add(source) == path
    assert not above.is_above(path)


def test_a_copy_of_what_is_below_is_deleted_without_a_trace(
    lab: Lab, above: OverlayStore, source: Path, tmp_path: Path
) -> None:
    store = above.hooked(tmp_path / "hooked")
    path = store.add(source)
    assert lab.add(source) == path
    assert store.above(path).read_bytes() == source.read_bytes()
    store.run("nix-store", "--delete", path)
    assert not store.is_above(path)
    assert (tmp_path / "hooked").read_text() == f"{_merged(store)}\n"
    assert store.real(path).read_bytes() == source.read_bytes()
    assert store.run("nix", "path-info", path) == path


def test_deleting_what_is_only_below_changes_nothing(lab: Lab, above: OverlayStore) -> None:
    top = lab.output("top")
    above.run("nix-store", "--realise", top)
    above.run("nix-store", "--delete", top)
    assert not above.is_above(top)
    assert above.run("nix", "path-info", top) == top
    above.run("nix-store", "--verify-path", top)


@pytest.mark.parametrize("command", [("nix-store", "--optimise"), ("nix", "store", "optimise")])
def test_optimising_an_idle_store_takes_copies_of_what_is_below_away(
    lab: Lab, above: OverlayStore, source: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    store = above.hooked(tmp_path / "hooked")
    copied = store.add(source)
    assert lab.add(source) == copied
    (tmp_path / "other").write_text(f"other for {command[0]}\n")
    other = store.add(tmp_path / "other")
    store.run(*command)
    assert (store.is_above(copied), store.is_above(other)) == (False, True)
    assert (tmp_path / "hooked").read_text() == f"{_merged(store)}\n"
    for path, file in ((copied, source), (other, tmp_path / "other")):
        assert store.real(path).read_bytes() == file.read_bytes()
    store.run("nix-store", "--verify", "--check-contents")


def test_what_is_in_use_above_is_kept_until_it_is_not(above: OverlayStore) -> None:
    (top,) = above.build("top", seed="use")
    used = above.run("nix-store", "--query", "--references", top).split()
    for path in used:
        assert f"annot delete path '{path}'" in above.refuse("nix-store", "--delete", path)
        assert above.is_above(path)
    above.run("nix-store", "--delete", top, *used)
    assert not any(above.is_above(path) for path in (top, *used))


def test_the_collector_keeps_what_is_rooted_and_takes_what_is_left_of_builds(above: OverlayStore) -> None:
    (top,) = above.build("top", seed="rooted")
    roots = above.root / "nix" / "var" / "nix" / "gcroots"
    root = roots / "kept"
    root.symlink_to(top)
    assert f"{root} -> {top}" in above.run("nix-store", "--query", "--roots", top)
    assert top in above.run("nix-store", "--gc", "--print-roots")
    assert top in above.run("nix-store", "--gc", "--print-live").split()
    assert top not in above.run("nix-store", "--gc", "--print-dead").split()
    assert f"annot delete path '{top}'" in above.refuse("nix-store", "--delete", top)
    leftover = one(above.build("everything", seed="leftover"), "-top-leftover")
    for name in above.written():
        for end in (".lock", ".chroot"):
            above.real(f"/nix/store/{name}{end}").touch()

    above.collect()
    closure = above.closure([top])
    assert {Path(path).name for path in closure} <= above.written()
    assert not [name for name in above.written() if name.endswith((".lock", ".chroot", "-leftover"))]
    assert not above.real(leftover).exists()
    above.run("nix-store", "--verify-path", *closure)

    root.unlink()
    above.collect()
    assert above.written() == set()


def test_no_handle_is_stale_when_builds_and_collections_alternate_with_what_is_below(
    lab: Lab, above: OverlayStore
) -> None:
    """What was built above comes to be below, is collected above, is used from below, and vanishes there."""
    built = above.build("everything", seed="stale")
    before = {path: lab.nix.run("nix-store", "--dump", above.real(path)) for path in built}
    assert lab.store.build("everything", seed="stale") == built
    lab.import_(*built)
    above.collect()
    assert (above.written(), above.whiteouts()) == (set(), [])
    assert above.build("everything", "--max-jobs", "0", seed="stale") == built
    assert not any(above.is_above(path) for path in built)
    assert {path: lab.nix.run("nix-store", "--dump", above.real(path)) for path in built} == before

    above.collect()
    lab.cidfs.run("remove", "--force", *built)
    assert above.build("everything", seed="stale") == built
    assert all(above.is_above(path) for path in built)
    above.run("nix-store", "--verify", "--check-contents")
    assert above.whiteouts() == []
