"""`cidfs import` from a Nix store: what comes along, what is known of it, and beside what it works."""

from __future__ import annotations

import base64
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Thread

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .conftest import World
from .real_nix import ChrootStore, Nix, PathInfo
from .tool import Cidfs
from .trees import AWKWARD_NAMES


def _base_names(paths: object) -> set[str]:
    assert isinstance(paths, (list, tuple, set, frozenset, dict))
    return {path.rpartition("/")[2] for path in paths}


def _known(store: ChrootStore, cidfs: Cidfs, path: str) -> PathInfo:
    """Return what cidfs says about a path, in Nix's words."""
    fields = cidfs.info(path)
    to_sri = ["nix", "hash", "convert", "--hash-algo", "sha256", "--to", "sri", fields["nar_hash"]]
    return PathInfo(
        nar_hash=store.nix.run(*to_sri).decode().strip(),
        nar_size=fields["nar_size"],
        references=frozenset(fields["references"]),
        deriver=fields["deriver"] or None,
        signatures=frozenset(fields["signatures"]),
        ca=fields["ca"] or None,
    )


def test_a_path_comes_with_its_closure(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    cidfs = new_cidfs()
    closure = world.store.closure([world.top])
    assert len(closure) > 3
    printed = cidfs.run("import", "--from", world.store.root, world.top, "--closure").lines
    assert sorted(printed) == sorted(closure)
    assert cidfs.listed() == _base_names(closure)


def test_the_closure_is_what_comes_when_nothing_is_said(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    cidfs = new_cidfs()
    cidfs.run("import", "--from", world.store.root, world.top)
    assert cidfs.listed() == _base_names(world.store.closure([world.top]))


def test_without_the_closure_a_path_comes_alone(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    cidfs = new_cidfs()
    printed = cidfs.run("import", "--from", world.store.root, world.top, "--no-closure").lines
    assert printed == [world.top]
    assert cidfs.listed() == _base_names([world.top])
    assert cidfs.run("nar", world.top).out == world.store.dump(world.top)


def test_several_paths_come_with_all_their_closures(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    cidfs = new_cidfs()
    chosen = [world.top, world.trees["file"], *world.ca_outputs]
    by_base_name = [path.rpartition("/")[2] for path in chosen]
    cidfs.run("import", "--from", world.store.root, *by_base_name)
    assert cidfs.listed() == _base_names(world.store.closure(chosen))


def test_a_closure_with_derivations_comes_whole(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    cidfs = new_cidfs()
    deriver = world.infos[world.top].deriver
    assert deriver is not None
    cidfs.run("import", "--from", world.store.root, deriver)
    closure = world.store.closure([deriver])
    assert {path.rpartition("-")[2] for path in closure} >= {"1.drv", "tools"}
    assert cidfs.listed() == _base_names(closure)


def test_all_brings_every_valid_path(world: World, imported: Cidfs) -> None:
    assert imported.listed() == _base_names(world.infos)


def test_importing_again_changes_nothing(world: World, imported: Cidfs) -> None:
    before = _known(world.store, imported, world.top)
    imported.run("import", "--all", "--from", world.store.root)
    assert imported.listed() == _base_names(world.infos)
    assert _known(world.store, imported, world.top) == before


def test_what_nix_knows_of_a_path_is_known_after_the_import(world: World, imported: Cidfs) -> None:
    """References (to itself, too), deriver, signatures, and every kind of content address."""
    chosen = [*world.outputs, world.trees["names"], world.trees["link"]]
    chosen += [path for path in world.infos if path.endswith(("-mid-ca", "-outer-1", "-top-1.drv"))]
    kinds = {(world.infos[path].ca or "none").rpartition(":sha256:")[0] for path in chosen}
    assert kinds == {"", "text", "fixed:r", "fixed"}
    assert any(path in world.infos[path].references for path in chosen)
    assert sum(bool(world.infos[path].signatures) for path in chosen) == 2
    with ThreadPoolExecutor(2) as pool:
        known = dict(
            zip(chosen, pool.map(lambda path: _known(world.store, imported, path), chosen), strict=True)
        )
    assert known == {path: world.infos[path] for path in chosen}


def test_a_signature_still_verifies_after_the_import(world: World, imported: Cidfs) -> None:
    """Over the fingerprint as Nix defines it, made of nothing but what cidfs says."""
    known = _known(world.store, imported, world.top)
    (signature,) = known.signatures
    to_base32 = ["nix", "hash", "convert", "--hash-algo", "sha256", "--to", "nix32", known.nar_hash]
    nar_hash = world.store.nix.run(*to_base32).decode().strip()
    references = ",".join(sorted(known.references))
    fingerprint = f"1;{world.top};sha256:{nar_hash};{known.nar_size};{references}"
    key_name, _, key = world.public_key.partition(":")
    name, _, signed = signature.partition(":")
    assert name == key_name == "test-key-1"
    public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(key))
    public_key.verify(base64.b64decode(signed), fingerprint.encode())


def test_a_signature_that_came_later_comes_with_the_next_import(
    new_store: ChrootStore, new_cidfs: Callable[[], Cidfs], tmp_path: Path
) -> None:
    (top,) = new_store.build("top")
    cidfs = new_cidfs()
    cidfs.run("import", "--from", new_store.root, top)
    assert cidfs.info(top)["signatures"] == []
    key = tmp_path / "key"
    key.write_bytes(new_store.nix.run("nix", "key", "generate-secret", "--key-name", "late-1"))
    new_store.nix.run("nix", "store", "sign", "--store", new_store.root, "--key-file", key, top)
    cidfs.run("import", "--from", new_store.root, top)
    assert _known(new_store, cidfs, top) == new_store.path_infos([top])[top]


def test_of_two_builds_of_one_path_the_first_stays(
    nix: Nix, new_store: ChrootStore, new_cidfs: Callable[[], Cidfs], tmp_path: Path
) -> None:
    """What is not reproducible has one path and two contents; a published name is never replaced."""
    other = ChrootStore(nix, tmp_path.resolve() / "other")
    (path,) = new_store.build("luck")
    assert other.build("luck") == [path]
    assert other.dump(path) != new_store.dump(path)
    cidfs = new_cidfs()
    cidfs.run("import", "--from", new_store.root, path)
    assert path.rpartition("/")[2] in cidfs.refuse("import", "--from", other.root, path).complaints[0]
    assert cidfs.run("nar", path).out == new_store.dump(path)
    assert _known(new_store, cidfs, path) == new_store.path_infos([path])[path]


def test_ls_and_cat_show_a_path_without_a_mount(world: World, imported: Cidfs) -> None:
    assert imported.run("cat", f"{world.top}/Ab").out == b"big\n"
    big = world.store.real(world.trees["big"]) / "noise"
    assert imported.run("cat", f"{world.trees['big']}/noise").out == big.read_bytes()
    shown = imported.run("ls", world.trees["names"]).out
    assert shown == b"".join(name + b"\n" for name in sorted([*AWKWARD_NAMES, b"dirs"]))
    names = world.trees["names"].encode()
    assert imported.run("ls", names + b"/dirs/new\nline").out == b"new\nline\n"
    assert imported.run("cat", names + b"/dirs/latin\xe9/latin\xe9").out == b"latin\xe9"


@pytest.mark.parametrize("wanted", [f"/nix/store/{'0' * 32}-nothing", "nonsense", "/etc/passwd"])
def test_a_path_that_nix_does_not_know_is_refused(world: World, imported: Cidfs, wanted: str) -> None:
    assert wanted in imported.refuse("import", "--from", world.store.root, wanted).complaints[0]


def test_a_directory_that_is_in_the_store_but_not_valid_is_refused(
    new_store: ChrootStore, world: World, new_cidfs: Callable[[], Cidfs]
) -> None:
    """What a broken build left behind is there to see, yet is no path."""
    new_store.add(world.sources / "file")
    left = "/nix/store/11111111111111111111111111111111-left-behind"
    new_store.real(left).mkdir()
    cidfs = new_cidfs()
    cidfs.refuse("import", "--from", new_store.root, left)
    cidfs.run("import", "--all", "--from", new_store.root)
    assert cidfs.listed() == _base_names([world.trees["file"]])


def test_a_root_without_a_nix_store_is_refused(
    new_cidfs: Callable[[], Cidfs], tmp_path: Path, world: World
) -> None:
    (tmp_path / "empty").mkdir()
    cidfs = new_cidfs()
    assert "empty" in cidfs.refuse("import", "--all", "--from", tmp_path / "empty").complaints[0]
    assert "absent" in cidfs.refuse("import", "--from", tmp_path / "absent", world.top).complaints[0]


def test_an_import_leaves_the_nix_store_as_it_was(
    new_store: ChrootStore, new_cidfs: Callable[[], Cidfs]
) -> None:
    new_store.build("everything")

    def standing() -> dict[Path, tuple[int, int, int]]:
        parts = (new_store.root / "nix" / part for part in ("store", "var/nix/db"))
        found = (path for part in parts for path in part.rglob("*"))
        stats = {path: path.lstat() for path in found if not path.name.endswith(("-shm", "-wal"))}
        return {path: (stat.st_mode, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}

    before = standing()
    new_cidfs().run("import", "--all", "--from", new_store.root)
    assert standing() == before
    new_store.nix.run("nix-store", "--store", new_store.root, "--verify", "--check-contents")


@contextmanager
def _busy(store: ChrootStore, sources: Path) -> Iterator[None]:
    """Let Nix build and add in the store, without a pause, until the end of the block."""
    stop = Event()
    failures: list[Exception | AssertionError] = []
    first = Event()

    def work() -> None:
        try:
            for number in count(1):
                if stop.is_set():
                    return
                store.add(sources / "modes", f"modes-{number}")
                store.build("mid", seed=f"busy-{number}", ca=number % 2 == 0)
                first.set()
        except (Exception, AssertionError) as failure:
            failures.append(failure)
        finally:
            first.set()

    thread = Thread(target=work)
    thread.start()
    try:
        assert first.wait(60)
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_an_import_beside_a_building_nix_is_whole(
    new_store: ChrootStore, world: World, new_cidfs: Callable[[], Cidfs]
) -> None:
    cidfs = new_cidfs()
    with _busy(new_store, world.sources):
        for _ in range(3):
            before = _base_names(new_store.path_infos())
            cidfs.run("import", "--all", "--from", new_store.root)
            assert cidfs.listed() >= before
    cidfs.run("import", "--all", "--from", new_store.root)
    infos = new_store.path_infos()
    assert cidfs.listed() == _base_names(infos)
    cidfs.run("verify")


def _start(cidfs: Cidfs, *arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        cidfs.command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cidfs.environment,
    )


def test_two_imports_at_once_both_succeed(world: World, new_cidfs: Callable[[], Cidfs]) -> None:
    cidfs = new_cidfs()
    both = [_start(cidfs, "import", "--all", "--from", world.store.root) for _ in range(2)]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in both]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert cidfs.listed() == _base_names(world.infos)
    cidfs.run("verify")


@contextmanager
def _held_open(database: Path) -> Iterator[None]:
    """Read from the database within a transaction, so that nobody can move the write-ahead log into it."""
    with closing(sqlite3.connect(database)) as holder:
        holder.execute("begin")
        holder.execute("select count(*) from ValidPaths").fetchone()
        yield


def _in_main_file_alone(database: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{database}?immutable=1", uri=True)) as reader:
        return {row[0] for row in reader.execute("select path from ValidPaths")}


def test_paths_that_are_in_the_write_ahead_log_only_are_imported(
    new_store: ChrootStore, world: World, new_cidfs: Callable[[], Cidfs]
) -> None:
    new_store.add(world.sources / "file")
    cidfs = new_cidfs()
    with _held_open(new_store.database):
        late = new_store.add(world.sources / "names")
        assert late not in _in_main_file_alone(new_store.database)
        assert cidfs.run("import", "--from", new_store.root, late).lines == [late]
        cidfs.run("import", "--all", "--from", new_store.root)
    assert cidfs.listed() == _base_names([late, world.trees["file"]])


def test_paths_that_a_crash_left_in_the_write_ahead_log_are_imported(
    new_store: ChrootStore, world: World, new_cidfs: Callable[[], Cidfs], tmp_path: Path
) -> None:
    """The log without its shared memory and without a process, as it stands after a power cut."""
    new_store.add(world.sources / "file")
    crashed = tmp_path / "crashed"
    with _held_open(new_store.database):
        late = new_store.add(world.sources / "names")
        left_out = shutil.ignore_patterns("*-shm", ".links")
        shutil.copytree(new_store.root, crashed, symlinks=True, ignore=left_out)
    assert (crashed / "nix/var/nix/db/db.sqlite-wal").stat().st_size > 0
    cidfs = new_cidfs()
    assert cidfs.run("import", "--from", crashed, late).lines == [late]


def test_a_store_on_a_read_only_file_system_can_be_imported(
    new_store: ChrootStore, world: World, new_cidfs: Callable[[], Cidfs]
) -> None:
    path = new_store.add(world.sources / "empties")
    cidfs = new_cidfs()
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, str(new_store.root)]
    done = subprocess.run(
        [*private, *cidfs.command("import", "--from", new_store.root, path)],
        capture_output=True,
        env=cidfs.environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split() == [path]
    assert cidfs.run("nar", path).out == new_store.dump(path)


def test_a_store_whose_nix_is_another_user_of_the_database_keeps_working(
    nix: Nix, new_store: ChrootStore, world: World, new_cidfs: Callable[[], Cidfs]
) -> None:
    """An import takes no lock that would make Nix wait or fail."""
    cidfs = new_cidfs()
    first = new_store.add(world.sources / "big")
    importing = _start(cidfs, "import", "--from", new_store.root, first)
    added = [new_store.add(world.sources / "file", f"beside-{number}") for number in range(20)]
    out, err = importing.communicate(timeout=60)
    assert (importing.returncode, out.decode().split()) == (0, [first]), err
    nix.run("nix-store", "--store", new_store.root, "--check-validity", first, *added)
