"""`cidfs import --from file://…`: binary caches that a real Nix wrote, with every compression."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cidfs.formats.digest import parse_sha256

from .conftest import World
from .tool import Cidfs

COMPRESSIONS = ("none", "xz", "zstd", "bzip2", "gzip", "br")
SECOND_KEY = "second-key-1"


def _base_names(paths: object) -> set[str]:
    assert isinstance(paths, (list, tuple, set, frozenset, dict))
    return {path.rpartition("/")[2] for path in paths}


def _copy(world: World, folder: Path, *paths: str, options: str = "") -> str:
    """Let Nix write a binary cache, and return its URL."""
    url = f"file://{folder}"
    chosen = paths or ("--all",)
    world.store.nix.run("nix", "copy", "--from", world.store.root, "--to", f"{url}{options}", *chosen)
    return url


@pytest.fixture(scope="module")
def everything(world: World, work: Path) -> str:
    """The whole store in a cache; Nix signs the narinfos of what is built as it writes them."""
    key = work / "second-key"
    key.write_bytes(world.store.nix.run("nix", "key", "generate-secret", "--key-name", SECOND_KEY))
    return _copy(world, work / "cache-all", options=f"?compression=none&secret-key={key}")


@pytest.fixture(scope="module")
def second_key(world: World, work: Path, everything: str) -> str:
    secret = (work / "second-key").read_bytes()
    return world.store.nix.run("nix", "key", "convert-secret-to-public", stdin=secret).decode().strip()


@pytest.fixture(scope="module")
def from_cache(everything: str, second_key: str, new_cidfs: Callable[[], Cidfs]) -> Cidfs:
    """Everything of that cache, imported."""
    cidfs = new_cidfs()
    cidfs.run("import", "--all", "--from", everything, "--trusted-key", second_key)
    return cidfs


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_nix_compressed_is_unpacked(
    world: World, tmp_path: Path, new_cidfs: Callable[[], Cidfs], compression: str
) -> None:
    small = [world.trees["names"], world.trees["empties"], world.trees["file"]]
    url = _copy(world, tmp_path / "cache", *small, options=f"?compression={compression}")
    narinfos = list((tmp_path / "cache").glob("*.narinfo"))
    assert [f"Compression: {compression}\n" in path.read_text() for path in narinfos] == [True] * 3
    cidfs = new_cidfs()
    assert cidfs.run("import", *small, "--from", url, "--no-check-sigs").lines == small
    assert cidfs.run("nar", small[0]).out == world.store.dump(small[0])


def test_what_nix_compressed_on_several_threads_is_unpacked(
    world: World, tmp_path: Path, new_cidfs: Callable[[], Cidfs]
) -> None:
    """In several blocks, and with listings beside the narinfos."""
    big = world.trees["big"]
    options = "?compression=xz&parallel-compression=true&compression-level=0&write-nar-listing=true"
    url = _copy(world, tmp_path / "cache", big, options=options)
    assert list((tmp_path / "cache").glob("*.ls"))
    cidfs = new_cidfs()
    assert cidfs.run("import", "--all", "--from", url).lines == [big], "its content address proves it"
    assert cidfs.run("nar", big).out == world.store.dump(big)


def test_all_of_a_cache_comes_and_every_path_is_that_of_nix(world: World, from_cache: Cidfs) -> None:
    assert from_cache.listed() == _base_names(world.infos)
    from_cache.run("verify")
    for path in (world.top, world.trees["big"]):
        assert from_cache.run("nar", path).out == world.store.dump(path)


def test_what_a_cache_says_of_a_path_is_known_after_the_import(world: World, from_cache: Cidfs) -> None:
    """What Nix itself says, with the signature that it made for the cache; every kind of content address."""
    ends = ("-top-1", "-mid-ca", "-outer-1", "-flat-1", "-names")
    chosen = [path for path in world.infos if path.endswith(ends)]
    assert len(chosen) == len(ends)
    kinds = set()
    for path in chosen:
        ours, theirs = from_cache.info(path), world.infos[path]
        assert parse_sha256(ours["nar_hash"]) == parse_sha256(theirs.nar_hash)
        assert (ours["nar_size"], frozenset(ours["references"])) == (theirs.nar_size, theirs.references)
        assert (ours["deriver"] or None, ours["ca"] or None) == (theirs.deriver, theirs.ca)
        assert {s for s in ours["signatures"] if not s.startswith(SECOND_KEY)} == theirs.signatures
        assert len(ours["signatures"]) == len(theirs.signatures) + 1
        assert ours["closure_complete"] is True
        kinds.add(ours["ca"].rpartition(":sha256:")[0])
    assert kinds == {"", "text", "fixed:r", "fixed"}


def test_importing_again_reads_nothing_and_changes_nothing(
    world: World, everything: str, second_key: str, from_cache: Cidfs
) -> None:
    before = from_cache.stats()["store"]
    nar = Path(everything.removeprefix("file://")) / "nar"
    os.rename(nar, nar.with_name("away"))
    try:
        from_cache.run("import", "--all", "--from", everything, "--trusted-key", second_key)
    finally:
        os.rename(nar.with_name("away"), nar)
    after = from_cache.stats()["store"]
    for field in ("paths", "chunks", "manifests", "stored_bytes", "next_inode"):
        assert after[field] == before[field]


def test_a_path_comes_with_its_closure_references_first(
    world: World, everything: str, second_key: str, new_cidfs: Callable[[], Cidfs]
) -> None:
    cidfs = new_cidfs()
    closure = world.store.closure([world.top])
    printed = cidfs.run("import", world.top, "--from", everything, "--trusted-key", second_key).lines
    assert sorted(printed) == sorted(closure)
    for path in printed:
        before = printed[: printed.index(path) + 1]
        assert world.infos[path].references <= set(before)
    assert cidfs.info(world.top)["closure_complete"] is True


def test_without_the_closure_a_path_comes_alone(
    world: World, everything: str, second_key: str, new_cidfs: Callable[[], Cidfs]
) -> None:
    cidfs = new_cidfs()
    words = ("import", world.top, "--from", everything, "--trusted-key", second_key, "--no-closure")
    assert cidfs.run(*words).lines == [world.top]


def test_what_nobody_trusted_signed_is_refused_with_what_to_do(
    world: World, everything: str, second_key: str, new_cidfs: Callable[[], Cidfs], tmp_path: Path
) -> None:
    cidfs = new_cidfs()
    refused = cidfs.refuse("import", world.top, "--from", everything)
    assert refused.code == 8
    for word in (SECOND_KEY, "--trusted-key", "--no-check-sigs", "public_keys"):
        assert word in refused.complaints[0]
    other = second_key.replace(SECOND_KEY, "other-1")
    assert cidfs.refuse("import", world.top, "--from", everything, "--trusted-key", other).code == 8
    assert cidfs.listed() == set()
    settings = tmp_path / "cidfs.toml"
    settings.write_text(f'[trust]\npublic_keys = ["{other}", "{second_key}"]\n')
    cidfs.environment["CIDFS_CONFIG"] = str(settings)
    cidfs.run("import", world.top, "--from", everything)
    assert cidfs.listed() == _base_names(world.store.closure([world.top]))


def test_the_settings_may_ask_for_no_signatures(
    world: World, everything: str, new_cidfs: Callable[[], Cidfs], tmp_path: Path
) -> None:
    cidfs = new_cidfs()
    (tmp_path / "cidfs.toml").write_text("[trust]\nrequire_signatures = false\n")
    cidfs.environment["CIDFS_CONFIG"] = str(tmp_path / "cidfs.toml")
    cidfs.run("import", world.top, "--from", everything)
    assert cidfs.listed() == _base_names(world.store.closure([world.top]))


def test_everything_comes_but_what_is_bad_a_line_each(
    world: World, tmp_path: Path, new_cidfs: Callable[[], Cidfs]
) -> None:
    folder = tmp_path / "cache"
    url = _copy(world, folder, world.top, world.trees["names"], options="?compression=zstd")
    key = world.public_key.strip()
    leaf = next(p for p in world.store.closure([world.top]) if p.endswith("-leaf-1"))
    names = world.trees["names"]

    def narinfo(path: str) -> Path:
        return folder / f"{path.rpartition('/')[2][:32]}.narinfo"

    narinfo(leaf).write_text("no narinfo\n")
    packed = folder / narinfo(names).read_text().partition("URL: ")[2].partition("\n")[0]
    packed.write_bytes(packed.read_bytes()[:-10])
    cidfs = new_cidfs()
    done = cidfs.attempt("import", "--all", "--from", url, "--trusted-key", key)
    assert done.lines == [world.top], "the only one that is signed by that key and whole"
    unsigned = [p for p in world.store.closure([world.top]) if p not in (leaf, world.top)]
    assert len(done.complaints) == 2 + len(unsigned)
    for path in (leaf, names, *unsigned):
        assert sum(path.rpartition("/")[2][:32] in line for line in done.complaints) == 1, done
    assert done.code in (5, 7, 8)
    assert cidfs.listed() == _base_names([world.top])


def test_a_plain_import_of_a_bad_path_publishes_nothing_of_it(
    world: World, tmp_path: Path, new_cidfs: Callable[[], Cidfs]
) -> None:
    folder = tmp_path / "cache"
    names, empties = world.trees["names"], world.trees["empties"]
    url = _copy(world, folder, names, empties, options="?compression=none")
    (info,) = (p for p in folder.glob("*.narinfo") if names in p.read_text())
    packed = folder / info.read_text().partition("URL: ")[2].partition("\n")[0]
    data = bytearray(packed.read_bytes())
    data[-200] ^= 1
    packed.write_bytes(data)
    cidfs = new_cidfs()
    refused = cidfs.refuse("import", names, "--from", url, "--no-check-sigs")
    assert refused.code in (5, 7)
    assert names.rpartition("/")[2] in refused.complaints[0]
    assert cidfs.listed() == set()
    cidfs.run("import", empties, "--from", url)


def test_what_is_not_in_the_cache_is_absent(
    world: World, everything: str, new_cidfs: Callable[[], Cidfs]
) -> None:
    absent = f"/nix/store/{'0' * 32}-nothing"
    refused = new_cidfs().refuse("import", absent, "--from", everything)
    assert (refused.code, absent in refused.complaints[0]) == (4, True)


def test_urls_that_cannot_be_read_are_refused(
    tmp_path: Path, world: World, everything: str, new_cidfs: Callable[[], Cidfs]
) -> None:
    cidfs = new_cidfs()
    (tmp_path / "empty").mkdir()
    for url, code in (
        ("https://cache.example.org", 2),
        (f"file://{tmp_path}/absent", 3),
        (f"file://{tmp_path}/empty", 3),
    ):
        refused = cidfs.refuse("import", "--all", "--from", url)
        assert refused.code == code, refused
        assert url in refused.complaints[0]
    assert cidfs.refuse("import", "--all", "--from", world.store.root, "--no-check-sigs").code == 2
    assert cidfs.refuse("import", "--all", "--from", everything, "--trusted-key", "nonsense").code == 2
    (tmp_path / "empty" / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    assert cidfs.refuse("import", "--all", "--from", f"file://{tmp_path}/empty").code == 3
    plain = cidfs.refuse("import", "--all", "--from", tmp_path / "empty")
    assert (plain.code, f"file://{tmp_path}/empty" in plain.complaints[0]) == (2, True)
