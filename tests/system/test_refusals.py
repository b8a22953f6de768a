"""What cannot be done is said in one line, with an exit code of its own, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cidfs.local.index import Index
from tests.commands import Store, wait_until
from tests.system.person import Person
from tests.system.support import (
    alive,
    at_once,
    describe,
    error_of,
    make_files,
    mount,
    mounted,
    nar_of,
    noise,
    parent_of,
    running,
    umount,
)

ABSENT = "ffffffffffffffffffffffffffffffff-absent"
EVERY_COMMAND = ("add", "ls", "cat", "info", "nar", "stats", "verify", "rebuild", "mount", "import")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return mode and size of all that is in a folder."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                info = os.lstat(os.path.join(here, name))
            except OSError as e:
                found[os.path.join(here, name)] = (0, e.errno or 0)  # a dead mount
                continue
            found[os.path.join(here, name)] = (info.st_mode, info.st_size if name in files else 0)
    return found


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Fail when files, mounts or processes came or went."""
    before = contents(folder), mounted(folder), running(folder)
    yield
    after = contents(folder), mounted(folder), running(folder)
    assert after == before


@pytest.fixture
def tree(store: Store) -> Path:
    """A small tree to add."""
    return make_files(store.state.parent / "tree", {b"file": b"contents"})


def words_of(command: str, tree: Path, mountpoint: Path) -> list[str]:
    """Return a command with arguments that would do in a good store."""
    if command == "import":
        return ["import", "-", "--name", "imported"]
    arguments: dict[str, list[str | Path]] = {
        "add": [tree],
        "mount": [mountpoint],
        "cat": [f"{ABSENT}/x"],
        "info": [ABSENT],
        "nar": [ABSENT],
    }
    return [command, *(str(word) for word in arguments.get(command, ()))]


# --- mount points


def test_a_mount_point_that_is_absent_or_a_file(store: Store, tree: Path) -> None:
    store.add(tree)
    with nothing_left(store.state.parent):
        for place in (tree / "nowhere", tree / "file", tree / "file/below", tree / "no/where"):
            assert str(place) in store.error("mount", place, code=21)
            assert str(place) in store.error("mount", "--foreground", place, code=21)


def test_a_busy_mount_point_names_the_store_that_is_there(store: Store, tree: Path, mountpoint: Path) -> None:
    (name,) = store.add(tree)
    store.mount(mountpoint)
    other = Store(store.state.parent / "other-state")
    with nothing_left(store.state.parent):
        assert str(store.state) in store.error("mount", mountpoint, code=22)
        assert str(store.state) in other.error("mount", mountpoint, code=22)
    assert describe(mountpoint / name) == describe(tree)


@pytest.mark.parametrize("inside", [".", "file"])
def test_a_mount_in_use_is_not_taken_down_unless_lazily(
    store: Store, tree: Path, mountpoint: Path, inside: str
) -> None:
    (name,) = store.add(tree)
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    fd = os.open(mountpoint / name / inside, os.O_RDONLY)
    try:
        with nothing_left(store.state.parent):
            line = store.error("umount", mountpoint, code=22)
        assert "--lazy" in line
        store.run("umount", "--lazy", mountpoint)
        assert mounted(mountpoint) == []
        if inside == "file":
            assert os.pread(fd, 100, 0) == b"contents"
    finally:
        os.close(fd)
    store.mounts.clear()
    wait_until(lambda: not alive(pid))


def test_umount_takes_down_nothing_but_cidfs(store: Store, tree: Path, mountpoint: Path) -> None:
    store.add(tree)
    with nothing_left(store.state.parent):
        for place in (mountpoint, tree / "nowhere", tree / "file"):
            assert "nothing is mounted" in store.error("umount", place, code=21)
    if os.geteuid() == 0:
        mount("-t", "tmpfs", "none", mountpoint)
        with nothing_left(store.state.parent):
            assert "tmpfs" in store.error("umount", mountpoint, code=21)
        umount(mountpoint)


def test_a_dead_mount_says_how_to_clean_up_and_that_works(store: Store, tree: Path, mountpoint: Path) -> None:
    (name,) = store.add(tree)
    store.mount(mountpoint)
    store.log_expected = True
    (pid,) = store.daemon_pids()
    os.kill(parent_of(pid), signal.SIGKILL)  # else that takes it from sight
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: error_of(lambda: os.stat(mountpoint)) == "ENOTCONN")
    with nothing_left(store.state.parent):
        assert f"`cidfs umount {mountpoint}`" in store.error("mount", mountpoint, code=22)
    assert store.stats()["daemons"] == []
    store.umount(mountpoint)
    assert mounted(mountpoint) == []
    store.mount(mountpoint)
    assert describe(mountpoint / name) == describe(tree)
    store.umount(mountpoint)
    assert not [path for path in (store.state / "run").iterdir() if path.suffix != ".log"]
    assert not (store.state / "nix.sock").exists()


# --- what is not there


def test_a_path_that_is_not_published(store: Store, tree: Path) -> None:
    store.add(tree)
    with nothing_left(store.state.parent):
        commands = ("cat", "info", "nar", "verify", "ls")
        for line in at_once(lambda c: store.error(c, f"/nix/store/{ABSENT}", code=4), commands):
            assert ABSENT in line


def nix_store(root: Path) -> Path:
    """Make a Nix store without paths, as far as its database goes."""
    folder = root / "nix/var/nix/db"
    folder.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(folder / "db.sqlite")) as db:
        db.execute(
            "create table ValidPaths (id integer primary key, path text, hash text, registrationTime integer,"
            " deriver text, narSize integer, ultimate integer, sigs text, ca text)"
        )
        db.execute("create table Refs (referrer integer, reference integer)")
        db.commit()
    return root


def test_what_cannot_be_imported(store: Store, tree: Path) -> None:
    folder = store.state.parent
    root = nix_store(folder / "root")
    nar = b"".join(nar_of(os.fsencode(tree)))
    store.add(tree)
    (other,) = store.lines("add", "--name", "other", tree / "file")
    with nothing_left(folder):
        assert ABSENT in store.error("import", ABSENT, "--from", root, code=4)
        assert "Nix store" in store.error("import", ABSENT, "--from", tree, code=3)
        assert store.error("import", "/usr/bin", "--from", root, code=2)
        assert store.error("import", "--from", root, code=2)
        assert store.error("import", "-", code=2)
        assert store.error("import", "-", "--name", "x", "--nar-hash", "no hash", code=2, stdin=nar)
        wrong = store.error(
            "import", "-", "--name", "x", "--nar-hash", "sha256:" + "0" * 64, code=5, stdin=nar
        )
        assert "NAR hash" in wrong
    assert store.run("import", "--all", "--from", root).stdout == b""
    broken = (nar[:-8], nar + b"x", b"", b"not a NAR", nar.replace(b"regular", b"regulax"))
    for line in at_once(lambda b: store.error("import", "-", "--name", "x", code=7, stdin=b), broken):
        assert "standard input" in line
    conflict = store.error("import", "-", "--name", other, code=6, stdin=nar)
    assert "other contents" in conflict
    assert len(store.lines("ls")) == 2
    store.run("verify")


# --- which store


def test_a_store_of_another_version(store: Store, tree: Path, mountpoint: Path) -> None:
    store.add(tree)
    form = json.loads((store.state / "format").read_text())
    (store.state / "format").write_text(json.dumps({**form, "version": 2, "novelty": [1]}))
    with nothing_left(store.state.parent):
        commands = [words_of(command, tree, mountpoint) for command in EVERY_COMMAND]
        for line in at_once(lambda words: store.error(*words, code=11), commands):
            assert "version 2" in line
    (store.state / "format").write_text(json.dumps({**form, "features": ["novelty"]}))
    assert "novelty" in store.error("ls", code=11)
    (store.state / "format").write_text("{")
    assert str(store.state / "format") in store.error("ls", code=7)


def test_an_index_of_another_schema(store: Store, tree: Path, mountpoint: Path) -> None:
    store.add(tree)
    index = Index(store.state / "index/1", 1, write=True)
    with index.write() as txn:
        txn.put_number("schema", 99)
    index.close()
    with nothing_left(store.state.parent):
        commands = [words_of(command, tree, mountpoint) for command in EVERY_COMMAND if command != "rebuild"]
        for line in at_once(lambda words: store.error(*words, code=11), commands):
            assert "schema 99" in line


def test_no_store_is_said_and_none_is_made(store: Store, tree: Path) -> None:
    with nothing_left(store.state.parent):
        makers = ("add", "mount", "import")
        commands = [words_of(command, tree, tree) for command in EVERY_COMMAND if command not in makers]
        for line in at_once(lambda words: store.error(*words, code=10), commands):
            assert str(store.state) in line
        for other in (tree, tree / "file"):
            for command in ("ls", "rebuild"):
                assert str(other) in Store(other).error(command, code=10)


def test_a_folder_with_other_things_in_it_is_not_made_a_store(
    store: Store, tree: Path, mountpoint: Path
) -> None:
    foreign = make_files(store.state.parent / "foreign", {b"letters/to-mother": b"Dear mother"})
    with nothing_left(store.state.parent):
        for command in ("add", "mount", "import"):
            words = words_of(command, tree, mountpoint)
            assert "letters" in Store(foreign).error(*words, code=10)
            assert str(tree / "file") in Store(tree / "file").error(*words, code=10)


def test_a_store_for_another_store_directory(store: Store, tree: Path, mountpoint: Path) -> None:
    store.add(tree)
    config = store.state.parent / "cidfs.toml"
    config.write_text('[store]\nstore_dir = "/other/store"\n')
    with nothing_left(store.state.parent):
        for command in ("add", "mount"):
            line = store.error("--config", config, *words_of(command, tree, mountpoint), code=10)
            assert "/other/store" in line


def test_settings_that_cannot_be_are_refused(store: Store, tree: Path) -> None:
    config = store.state.parent / "cidfs.toml"
    commands: list[list[str | Path]] = [
        ["nonsense"],
        ["add"],
        ["add", "--nonsense", tree],
        ["mount", "--transport", "x", tree],
        ["--config", config, "add", tree],
    ]
    texts = ('[store]\nstat = "x"\n', "[stor]\n", "[store\n", '[store]\nstore_dir = "nix"\n', "\xff")
    for number, text in enumerate(texts):
        wrong = config.with_name(f"{number}.toml")
        wrong.write_text(text, encoding="latin-1")
        commands.append(["--config", wrong, "add", tree])
    with nothing_left(store.state.parent):
        at_once(lambda words: store.error(*words, code=2), commands)
    assert not store.state.exists()


# --- permissions


@pytest.mark.usefixtures("root", "fuse_for_all")
def test_a_user_without_permission(person: Person, public: Path) -> None:
    tree = make_files(public / "tree", {b"file": b"contents"})
    store = Store(public / "state")
    (name,) = store.add(tree)
    own = person.home / "mnt"
    own.mkdir()
    os.chown(own, person.uid, person.uid)

    def refused(words: Sequence[str | Path]) -> list[str]:
        return person.cidfs("--state", store.state, *words, code=14)

    commands: list[Sequence[str | Path]] = [
        ("add", tree),
        ("ls",),
        ("verify",),
        ("rebuild",),
        ("mount", own),
        ("mount", "--foreground", own),
        ("cat", f"{name}/file"),
        ("info", name),
        ("nar", name),
        ("stats",),
    ]
    with nothing_left(public):
        store.state.chmod(0o700)
        closed = at_once(refused, commands)
        store.state.chmod(0o755)
        readable = at_once(refused, commands[:5])
    for (line,) in closed + readable:
        assert line.startswith("cidfs: ")
        assert str(store.state) in line
    (public / "closed").mkdir(mode=0o700)
    with nothing_left(public):
        (line,) = person.cidfs("--state", public / "new-state", "add", tree, code=14)
        assert str(public / "new-state") in line
        (line,) = person.cidfs("--state", public / "closed/state", "add", tree, code=14)
        (line,) = person.cidfs("--state", person.home / "state", "mount", public / "tree", code=14)
        assert "write" in line
        (line,) = person.cidfs("--state", person.home / "state", "mount", public / "closed/mnt", code=14)
    shutil.rmtree(store.state)


@pytest.mark.usefixtures("root")
def test_a_user_does_not_take_down_the_mount_of_another(person: Person, public: Path) -> None:
    tree = make_files(public / "tree", {b"file": noise(1, 1000)})
    store = Store(public / "state")
    mountpoint = public / "mnt"
    mountpoint.mkdir()
    (name,) = store.add(tree)
    store.mount(mountpoint)
    with nothing_left(public):
        (line,) = person.cidfs("umount", mountpoint, code=14)
        assert str(mountpoint) in line
    assert describe(mountpoint / name) == describe(tree)
    assert person.run("cat", mountpoint / name / "file").stdout == noise(1, 1000)  # allow_other
    assert store.end() == []
