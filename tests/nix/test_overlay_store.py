"""A real Nix above the mount: what is below is known and used, what is new lands above, and can go again."""

from __future__ import annotations

from pathlib import Path

import pytest

from .lab import Lab, OverlayStore
from .real_nix import one

_QUERIES = (
    "--requisites",
    "--references",
    "--referrers",
    "--referrers-closure",
    "--deriver",
    "--valid-derivers",
    "--hash",
    "--size",
)


def test_what_is_below_is_known_and_its_contents_are_right(lab: Lab, above: OverlayStore) -> None:
    top, mid = lab.output("top"), lab.output("mid")
    assert above.run("nix", "path-info", top) == top
    for query in _QUERIES:
        for path in (top, mid):
            asked = ("nix-store", "--query", query, path)
            assert set(above.run(*asked).split()) == set(lab.store.run(*asked).split()), query
    deriver = lab.store.run("nix-store", "--query", "--deriver", top)
    assert above.run("nix-store", "--query", "--outputs", deriver) == top
    hash_part = Path(top).name.partition("-")[0]
    assert above.run("nix", "store", "path-from-hash-part", hash_part) == top
    above.run("nix-store", "--verify-path", *above.closure([top]))
    assert above.written() == set()


def test_what_is_below_is_not_built_again(lab: Lab) -> None:
    """In a store with an empty database: what a derivation was built to is known from below, too."""
    with lab.overlay() as store:
        for seed, outputs in (("1", lab.outputs), ("ca", lab.ca_outputs)):
            built = store.build("everything", "--max-jobs", "0", seed=seed, ca=seed == "ca")
            assert built == list(outputs)
            assert store.written() == set()
        store.run("nix-store", "--verify", "--check-contents")
        assert store.whiteouts() == []


@pytest.mark.parametrize("ca", [False, True], ids=["by-input", "by-content"])
def test_what_is_new_lands_above_and_can_be_deleted_and_collected(
    lab: Lab, above: OverlayStore, tmp_path: Path, ca: bool
) -> None:
    seed = "new-ca" if ca else "new"
    built = above.build("everything", seed=seed, ca=ca)
    assert {Path(path).name for path in built} <= above.written()
    assert not any(lab.is_shown(path) for path in built)
    top, mid = one(built, f"-top-{seed}"), one(built, f"-mid-{seed}")
    above.run("nix-store", "--verify-path", *above.closure([top]))
    above.run("nix-store", "--verify", "--check-contents")

    assert f"annot delete path '{mid}'" in above.refuse("nix-store", "--delete", mid)
    assert above.is_above(mid)
    assert above.real(mid).is_dir()
    above.run("nix-store", "--delete", top)
    assert not above.is_above(top)
    assert not above.real(top).exists()

    (tmp_path / "added").write_text(seed)
    added = above.run("nix-store", "--add", tmp_path / "added")
    assert above.above(added).read_text() == seed

    for _ in range(3):
        done = above.attempt("nix-store", "--gc")
        assert (done.returncode, b"BUG" in done.stderr) == (0, False), done.stderr
        assert above.written() == set()
    assert above.whiteouts() == []
    assert above.run("nix", "path-info", lab.output("top")) == lab.output("top")


def test_a_wrong_store_uri_is_refused(lab: Lab, above: OverlayStore, tmp_path: Path) -> None:
    """Nix compares its own with the mount: a folder for another one in the URI is found out."""
    for right in (f"root={above.root}", f"real%3D{lab.mount.at}", f"upper-layer={above.upper}"):
        key = right.partition("/")[0]
        assert above.address.count(right) == 1, above.address
        wrong = above.address.replace(right, f"{key}{tmp_path}")
        done = lab.nix.attempt("nix", "store", "info", "--store", wrong)
        assert done.returncode == 1
        assert b"mounted incorrectly" in done.stderr
    assert b"local-overlay" in lab.nix.attempt("nix", "store", "info", "--store", above.address).stderr
