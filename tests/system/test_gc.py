"""`cidfs gc`: what it frees, what it leaves, and what may happen beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.local.support import flip, pack_files
from tests.system.support import alive, describe, make_files, noise
from tests.system.test_at_once import wait_until_stopped

SMALL_PACKS = "from cidfs.formats import pack\npack.ROLL_SIZE = 1 << 20"
STOP = """
import signal, threading
import cidfs.local.{module} as module
def stop_once(owner, name):
    whole = getattr(owner, name)
    def stopping(*args, **more):
        setattr(owner, name, whole)
        {before}
        result = whole(*args, **more)
        {after}
        return result
    setattr(owner, name, stopping)
stop_once(module.{owner}, "{name}")
"""
_HALT = "signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)"


def stop_before(where: str) -> str:
    """Return a hook that stops a process before it first calls MODULE.CLASS.METHOD of the local floor."""
    module, owner, name = where.split(".")
    return STOP.format(module=module, owner=owner, name=name, before=_HALT, after="")


def stop_after(where: str) -> str:
    """Return a hook that stops a process when it has first called MODULE.CLASS.METHOD."""
    module, owner, name = where.split(".")
    return STOP.format(module=module, owner=owner, name=name, before="", after=_HALT)


def tree(store: Store, name: str, **files: bytes) -> Path:
    """Make a small tree beside the store."""
    contents = {b"plain": name.encode(), b"large": noise(name, 300_000), b"shared": noise("shared", 200_000)}
    contents |= {key.encode(): data for key, data in files.items()}
    return make_files(store.state.parent / name, contents)


def figures(store: Store, *options: str) -> dict[str, Any]:
    """Collect, and return the figures without the counts of what is there."""
    found = json.loads(store.run("gc", "--json", *options).stdout)
    assert found.pop("problems") == []
    return {key: value for key, value in found.items() if key not in ("paths", "entries")}


def nothing_left(store: Store) -> bool:
    """Say whether a collection would find nothing to do."""
    return not any(figures(store, "--dry-run").values())


def stopped(store: Store, *words: str | Path, hook: str) -> subprocess.Popen[bytes]:
    """Start a command and wait until its hook has stopped it."""
    process = store.start(*words, hook=hook)
    wait_until_stopped(process)
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process as a power cut would."""
    process.kill()
    process.communicate()


def go_on(store: Store, process: subprocess.Popen[bytes]) -> list[str]:
    """Let a stopped process go on to its end; return what it printed."""
    process.send_signal(signal.SIGCONT)
    return store.finish(process)[0]


def contents(state: Path, *passed_over: str) -> dict[str, tuple[int, bytes]]:
    """Return times and bytes of all files of a store, by path; lock.mdb has a place for each reader."""
    return {
        str(path.relative_to(state)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(state.rglob("*"))
        if path.name not in ("lock.mdb", *passed_over) and path.parent.name != "index"
    }


def pack_bytes(store: Store) -> int:
    """Return the size of all packs."""
    return sum(p.stat().st_size for p in (store.state / "packs").glob("*/*/*"))


def test_what_nobody_needs_goes_and_the_rest_stays(store: Store, mountpoint: Path) -> None:
    trees = [tree(store, name) for name in "abc"]
    names = store.add(*trees)
    whole = pack_bytes(store)
    assert nothing_left(store)
    store.run("remove", names[0], names[2])
    before = contents(store.state)
    said = figures(store, "--dry-run")
    line = store.run("gc", "--dry-run")
    assert line.stdout.startswith(b"would free ")
    assert line.stderr == b""
    assert contents(store.state) == before
    assert figures(store) == said
    assert said["dead_manifests"] == 2
    assert 600_000 < said["dead_bytes"] < 700_000
    assert 600_000 < whole - pack_bytes(store) == said["sparse_bytes"]
    assert store.lines("gc") == ["freed 0 B: 0 packs, 0 leftovers; 0 dead frames of 0 B; 1 store path stay"]
    store.mount(mountpoint)
    assert describe(mountpoint / names[1]) == describe(trees[1])
    store.run("remove", names[1])
    store.run("gc")
    store.umount(mountpoint)
    assert nothing_left(store) is False  # the mount had it
    store.run("gc")
    assert pack_bytes(store) == 0
    assert store.add(*trees) == names
    store.run("verify")


def test_what_killed_processes_left_goes(store: Store, mountpoint: Path) -> None:
    (name,) = store.add(tree(store, "kept"))
    lost = tree(store, "lost")
    size = pack_bytes(store)
    for hook in (
        stop_after("packs.PackWriter.append_many"),
        stop_before("publish.Publisher.publish"),
        "import os\nos.link = lambda *names: os.kill(os.getpid(), 9)",  # a pack that has no name yet
    ):
        process = store.start("add", lost, hook=f"{SMALL_PACKS}\n{hook}")
        if "link" not in hook:
            wait_until_stopped(process)
            process.kill()
        assert store.finish(process, code=-9)[0] == []
        if "link" not in hook:  # as if it could not be appended to any more
            for path in pack_files(store.state, "own"):
                path.with_name(path.name + ".bad").touch()
    kill(stopped(store, "rebuild", hook=stop_before("rebuild._Rebuild._finish")))
    (store.state / "journal" / "9.tmp-1234-abcdef").write_bytes(b"half a checkpoint")
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    os.kill(pid, signal.SIGKILL)
    store.umount(mountpoint)
    left = [p for p in store.state.rglob("*") if p.name.endswith((".new", ".lease", ".sock", ".bad"))]
    left += (store.state / "index").glob("rebuild-*")
    assert len({p.suffix for p in left} | {p.name[:7] for p in left if p.is_dir()}) >= 5, left

    said = figures(store, "--dry-run")
    assert all(p.exists() for p in left)
    assert figures(store) == said
    assert said["leftovers"] >= 6
    assert not [p for p in left if p.exists() and p.suffix != ".bad"]
    assert not list((store.state / "run").iterdir())
    assert nothing_left(store)
    assert pack_bytes(store) < size + 1000
    store.run("verify")
    assert store.add(tree(store, "kept")) == [name]


def test_sealed_packs_are_copied_where_much_of_them_is_dead(store: Store, mountpoint: Path) -> None:
    trees = [tree(store, name, more=noise(f"more {name}", 500_000)) for name in "abcd"]
    adding = store.start("add", *trees, hook=SMALL_PACKS)
    names = [Path(line).name for line in store.finish(adding)[0]]
    packs = pack_files(store.state, "own")
    assert len(packs) >= 3
    store.mount(mountpoint)
    held = os.open(mountpoint / names[1] / "more", os.O_RDONLY)
    store.run("remove", names[0], names[2])
    kept = os.stat(mountpoint / names[1]).st_ino
    store.run("gc")
    assert pack_files(store.state, "own") == packs  # the mount is older than the removal
    store.umount(mountpoint) if held < 0 else os.close(held)
    store.umount(mountpoint)
    store.mount(mountpoint)
    held = os.open(mountpoint / names[1] / "more", os.O_RDONLY)
    said = figures(store, "--dry-run")
    assert said["sparse"] >= 2
    assert figures(store) == said
    after = pack_files(store.state, "own")
    assert len(set(packs) - set(after)) == said["sparse"] + said["packs"] - 1  # and one of manifests
    assert os.pread(held, 1 << 20, 0) == noise("more b", 500_000)
    os.close(held)
    for name, source in zip(names[1::2], trees[1::2], strict=True):
        assert describe(mountpoint / name) == describe(source)
    assert os.stat(mountpoint / names[1]).st_ino == kept
    assert nothing_left(store)
    store.run("verify")


def test_a_mount_older_than_the_removal_reads_on(store: Store, mountpoint: Path) -> None:
    """Nothing of it was read before; a rebuild comes in between, too."""
    sources = [tree(store, "a"), tree(store, "b")]
    names = store.add(*sources)
    store.mount(mountpoint)
    held = [os.open(mountpoint / name, os.O_PATH | os.O_DIRECTORY) for name in names]
    collecting = stopped(store, "gc", hook=stop_before("survey.Survey.mark"))
    store.run("remove", names[0])  # while it is decided what is needed
    go_on(store, collecting)
    store.run("remove", names[1])
    store.run("gc")
    assert describe(f"/proc/self/fd/{held[0]}/.") == describe(sources[0])
    shutil.rmtree(store.state / "index")
    store.run("rebuild")
    store.run("gc")
    assert describe(f"/proc/self/fd/{held[1]}/.") == describe(sources[1])
    for fd in held:
        os.close(fd)
    store.umount(mountpoint)
    assert figures(store)["ranges"] == 2
    assert pack_bytes(store) == 0


def test_the_journal_forgets_what_is_gone(store: Store) -> None:
    trees = [make_files(store.state.parent / f"t{i}", {b"f": b"%d" % i}) for i in range(40)]
    names = store.add(*trees)
    store.run("remove", *names[1:])
    files = list((store.state / "journal").iterdir())
    before = sum(f.stat().st_size for f in files)
    store.run("gc")
    (after,) = (store.state / "journal").iterdir()
    assert after not in files
    assert after.stat().st_size < before / 10
    shutil.rmtree(store.state / "index")
    store.run("rebuild")
    assert store.lines("ls") == [f"/nix/store/{names[0]}"]
    added = store.add(*trees)
    assert added == names
    store.run("verify")


def test_one_collection_at_a_time(store: Store) -> None:
    store.add(tree(store, "a"))
    first = stopped(store, "gc", hook=stop_before("survey.Survey.mark"))
    line = store.error("--lock-timeout", "0.5", "gc", code=13)
    assert f"process {first.pid} (" in line
    assert "gc" in line
    assert "stopped)" in line
    waiting = store.start("gc")
    assert store.run("gc", "--dry-run").stdout.startswith(b"would free ")
    assert go_on(store, first)[0].startswith("freed ")
    assert store.finish(waiting)[0][0].startswith("freed ")


# --- beside adds


@pytest.mark.parametrize(
    "where", ["packs.PackWriter.append_many", "packs.PackWriter.sync", "store.LocalStore.put_places"]
)
def test_what_a_running_add_has_found_stays_for_it(store: Store, mountpoint: Path, where: str) -> None:
    """It has looked its chunks up, and is stopped: what it found is removed and collected meanwhile."""
    old = tree(store, "old")
    (name,) = store.add(old)
    new = make_files(store.state.parent / "new", {b"as-before": noise("old", 300_000), b"z": noise("z", 9)})
    adding = stopped(store, "add", new, hook=stop_after(where))
    store.run("remove", name)
    done = store.run("gc")
    assert b"may be needed by an add" in done.stderr
    assert figures(store)["waiting"] >= 1
    (added,) = go_on(store, adding)
    store.mount(mountpoint)
    assert describe(mountpoint / Path(added).name) == describe(new)
    assert figures(store)["waiting"] == 0
    assert nothing_left(store)
    store.run("verify")


def test_a_dry_run_beside_an_add_finds_nothing_wrong(store: Store) -> None:
    """What is committed is in the journal a moment later; that may be between two looks."""
    store.add(tree(store, "a"))
    adding = stopped(store, "add", tree(store, "b"), hook=stop_before("publish.Publisher._say"))
    looking = stopped(store, "gc", "--dry-run", hook=stop_after("journal.Journal.replay"))
    go_on(store, adding)
    assert go_on(store, looking)[0].startswith("would free ")


# --- where something is wrong


def _cut_the_journal(store: Store) -> None:
    (path,) = (store.state / "journal").iterdir()
    flip(path, 60)


def _damage_a_manifest(store: Store) -> None:
    (path,) = pack_files(store.state, "manifest")
    flip(path, path.stat().st_size - 20)


def _lose_a_row(store: Store) -> None:
    with LocalStore.open(store.state, write=True) as opened, opened.transaction() as index:
        (digest, _), *_ = opened.places("chunks")
        with index.env.begin(write=True) as txn:
            txn.delete(digest, db=index.db["chunks"])


def _lose_the_index(store: Store) -> None:
    shutil.rmtree(store.state / "index")


@pytest.mark.parametrize(
    ("damage", "code"),
    [(_cut_the_journal, 16), (_damage_a_manifest, 16), (_lose_a_row, 12), (_lose_the_index, 12)],
)
def test_nothing_goes_where_it_is_not_sure_what_is_needed(store: Store, damage: Any, code: int) -> None:
    names = store.add(*(tree(store, name) for name in "abc"))
    store.run("remove", names[0])
    damage(store)
    before = contents(store.state, "gc.lock", "write.lock", "data.mdb")
    for option in ("--dry-run", "--json"):
        line = store.error("gc", option, code=code)
        assert "verify" in line or "rebuild" in line
    assert contents(store.state, "gc.lock", "write.lock", "data.mdb") == before


def test_a_daemon_that_ends_is_not_waited_for(store: Store, mountpoint: Path) -> None:
    """The lease of a killed daemon counts no more."""
    (name,) = store.add(tree(store, "a"))
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    store.run("remove", name)
    os.kill(pid, signal.SIGKILL)
    while alive(pid):
        pass
    store.run("gc")
    assert pack_bytes(store) == 0
