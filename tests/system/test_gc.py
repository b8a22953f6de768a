"""`cidfs gc`: what it frees, what it leaves, and what may happen beside it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.local.support import copy_store, flip, pack_files
from tests.system.model_support import NO_ROOM
from tests.system.quick import forks, store
from tests.system.support import describe, make_files, noise
from tests.system.test_at_once import wait_until_stopped

__all__ = ["forks", "store"]

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

STOP_WITH_A_NAMELESS_PACK = f"""
import os, signal, threading
from cidfs.local.packs import PackWriter
PackWriter._try_take = lambda *_: None
os.link = lambda *_: {_HALT}
"""


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


@contextlib.contextmanager
def held(*folders: Path) -> Iterator[list[bytes]]:
    """Hold folders open, looking into nothing; return where they can be looked into later."""
    fds = [os.open(folder, os.O_PATH | os.O_DIRECTORY) for folder in folders]
    try:
        yield [b"/proc/self/fd/%d/." % fd for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


def pack_bytes(store: Store) -> int:
    """Return the size of all packs."""
    return sum(p.stat().st_size for p in (store.state / "packs").glob("*/*/*"))


def test_what_nobody_needs_goes_and_the_rest_stays(store: Store, mountpoint: Path) -> None:
    trees = [tree(store, name) for name in "abc"]
    names = store.add(*trees)
    whole = pack_bytes(store)
    store.run("remove", names[0], names[2])
    before = contents(store.state)
    looked = store.run("gc", "--dry-run")
    assert looked.stdout.startswith(b"would free ")
    assert len(looked.stdout.splitlines()) == 1
    assert looked.stderr == b""
    said = figures(store, "--dry-run")
    assert contents(store.state) == before
    assert figures(store) == said
    assert said["dead_manifests"] == 2
    assert 600_000 < said["dead_bytes"] < 700_000
    assert 600_000 < whole - pack_bytes(store) <= said["sparse_bytes"] < whole - pack_bytes(store) + 100
    (line,) = store.lines("gc")
    assert line.startswith("freed 0 B: 0 packs, 0 leftovers; 0 dead frames of 0 B; 1 store path stay")
    store.mount(mountpoint)
    assert describe(mountpoint / names[1]) == describe(trees[1])
    store.run("remove", names[1])
    store.umount(mountpoint)
    store.run("gc")
    assert pack_bytes(store) == 0
    assert store.add(*trees) == names
    store.run("verify")


def test_what_killed_processes_left_goes(store: Store, mountpoint: Path) -> None:
    store.add(tree(store, "kept"))
    size = pack_bytes(store)
    for word, hook in (
        ("add", STOP_WITH_A_NAMELESS_PACK),
        ("add", stop_after("packs.PackWriter.append_many")),  # frames without rows
        ("add", stop_before("publish.Publisher.publish")),  # rows that no path needs
        ("rebuild", stop_before("rebuild._Rebuild._finish")),
    ):
        words = [word, tree(store, "lost")] if word == "add" else [word]
        kill(stopped(store, *words, hook=hook))
    (store.state / "journal" / "9.tmp-1234-abcdef").write_bytes(b"half a checkpoint")
    (store.state / "packs/own/00" / f"{'00' * 12}.bad").touch()
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    os.kill(pid, signal.SIGKILL)
    store.umount(mountpoint)
    for log in (store.state / "run").glob("*.log"):
        log.unlink()  # it goes when the system has taken note of its process's end
    litter = [p for p in store.state.rglob("*") if p.suffix in (".new", ".lease", ".sock", ".bad")]
    litter += (store.state / "index").glob("rebuild-*")
    assert {p.suffix for p in litter} == {".new", ".lease", ".sock", ".bad", ""}

    said = figures(store, "--dry-run")
    assert all(p.exists() for p in litter)
    assert figures(store) == said
    assert said["leftovers"] >= len(litter)
    assert not any(p.exists() for p in litter)
    assert os.listdir(store.state / "run") == []
    assert len(os.listdir(store.state / "journal")) == 1
    assert pack_bytes(store) < size + 1000
    assert nothing_left(store)
    store.run("verify")


def test_sealed_packs_are_copied_where_much_of_them_is_dead(store: Store, mountpoint: Path) -> None:
    trees = [tree(store, name, more=noise(f"more {name}", 500_000)) for name in "abcd"]
    adding = store.start("add", *trees, hook=SMALL_PACKS)
    names = [Path(line).name for line in store.finish(adding)[0]]
    packs = pack_files(store.state, "own")
    assert len(packs) >= 3
    store.run("remove", names[0], names[2])
    store.mount(mountpoint)
    with open(mountpoint / names[1] / "more", "rb", buffering=0) as opened:
        said = figures(store, "--dry-run")
        assert said["sparse"] >= 2
        assert figures(store) == said
        after = pack_files(store.state, "own")
        assert len(set(packs) - set(after)) == said["sparse"] + said["packs"] - 1  # and one of manifests
        assert opened.read(1 << 20) == noise("more b", 500_000)
    for name, source in zip(names[1::2], trees[1::2], strict=True):
        assert describe(mountpoint / name) == describe(source)
    assert nothing_left(store)
    store.run("verify")


def test_a_mount_older_than_the_removal_reads_on(store: Store, mountpoint: Path) -> None:
    """Nothing of it was read before; a rebuild comes in between, too."""
    sources = [tree(store, "a"), tree(store, "b")]
    names = store.add(*sources)
    store.mount(mountpoint)
    with held(mountpoint / names[0], mountpoint / names[1]) as (first, second):
        collecting = stopped(store, "gc", hook=stop_before("survey.Survey.mark"))
        store.run("remove", names[0])  # while it is decided what is needed
        go_on(store, collecting)
        store.run("remove", names[1])
        store.run("gc")
        assert describe(first) == describe(sources[0])
        shutil.rmtree(store.state / "index")
        store.run("rebuild")
        store.run("gc")
        assert describe(second) == describe(sources[1])
    store.umount(mountpoint)
    assert figures(store)["ranges"] == 2
    assert pack_bytes(store) == 0


def test_a_removal_in_the_midst_of_a_checkpoint_stays_for_mounts(store: Store, mountpoint: Path) -> None:
    """It is committed, and not in the journal yet, when the collection looks there."""
    sources = [tree(store, "a"), tree(store, "b")]
    names = store.add(*sources)
    store.run("remove", names[1])
    store.mount(mountpoint)
    hooks = [stop_before("collect._Collection._checkpoint")]
    hooks += [stop_after("collect._Collection._removed_entries")]
    with held(mountpoint / names[0]) as (folder,):
        collecting = stopped(store, "gc", hook="\n".join(hooks))
        removing = stopped(store, "remove", names[0], hook=stop_before("publish.Publisher._say"))
        collecting.send_signal(signal.SIGCONT)
        wait_until_stopped(collecting)
        go_on(store, removing)
        go_on(store, collecting)
        shutil.rmtree(store.state / "index")
        store.run("rebuild")
        assert describe(folder) == describe(sources[0])


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


PLACES = ("packs.PackWriter.append_many", "packs.PackWriter.sync", "store.LocalStore.put_places")


@pytest.mark.parametrize("where", PLACES if Store.long else PLACES[:1])
def test_what_a_running_add_has_found_stays_for_it(store: Store, mountpoint: Path, where: str) -> None:
    """It has looked its chunks up, and is stopped: what it found is removed and collected meanwhile."""
    old = tree(store, "old")
    (name,) = store.add(old)
    new = make_files(store.state.parent / "new", {b"as-before": noise("old", 300_000), b"z": noise("z", 9)})
    adding = stopped(store, "add", new, hook=stop_after(where))
    store.run("remove", name)
    done = store.run("gc")
    assert b"may be needed by an add" in done.stderr
    (added,) = go_on(store, adding)
    store.mount(mountpoint)
    assert describe(mountpoint / Path(added).name) == describe(new)
    assert figures(store)["waiting"] == 0
    assert nothing_left(store)


def test_a_rebuild_does_not_believe_in_what_was_freed_meanwhile(store: Store, mountpoint: Path) -> None:
    """It has read the packs when a collection without room to copy frees parts of them in place."""
    trees = [tree(store, name) for name in "abc"]
    names = store.add(*trees)
    store.run("remove", names[1])
    rebuilding = stopped(store, "rebuild", hook=stop_after("pack_scan.PackScan.read_all"))
    store.finish(store.start("gc", hook=NO_ROOM))
    go_on(store, rebuilding)
    assert store.add(*trees) == names
    store.mount(mountpoint)
    for name, source in zip(names, trees, strict=True):
        assert describe(mountpoint / name) == describe(source)


def test_a_dry_run_beside_an_add_finds_nothing_wrong(store: Store) -> None:
    """What is committed is in the journal a moment later; that may be between two looks."""
    store.add(tree(store, "a"))
    adding = stopped(store, "add", tree(store, "b"), hook=stop_before("publish.Publisher._say"))
    looking = stopped(store, "gc", "--dry-run", hook=stop_after("journal.Journal.replay"))
    go_on(store, adding)
    assert go_on(store, looking)[0].startswith("would free ")


# --- where something is wrong


def _damage_the_journal(state: Path) -> None:
    (path,) = (state / "journal").iterdir()
    flip(path, 60)


def _damage_a_manifest(state: Path) -> None:
    (path,) = pack_files(state, "manifest")
    flip(path, path.stat().st_size - 20)


def _lose_a_row(state: Path) -> None:
    with LocalStore.open(state, write=True) as opened, opened.transaction() as index:
        (digest, _), *_ = opened.places("chunks")
        with index.env.begin(write=True) as txn:
            txn.delete(digest, db=index.db["chunks"])


def _lose_the_index(state: Path) -> None:
    shutil.rmtree(state / "index")


def test_nothing_goes_where_it_is_not_sure_what_is_needed(store: Store) -> None:
    names = store.add(*(tree(store, name) for name in "abc"))
    store.run("remove", names[0])
    for damage, code in (
        (_damage_the_journal, 16),
        (_damage_a_manifest, 16),
        (_lose_a_row, 12),
        (_lose_the_index, 12),
    ):
        hurt = Store(copy_store(store.state, store.state.parent / damage.__name__))
        damage(hurt.state)
        before = contents(hurt.state, "gc.lock", "write.lock", "data.mdb")
        line = hurt.error("gc", code=code)
        assert "verify" in line or "rebuild" in line
        assert contents(hurt.state, "gc.lock", "write.lock", "data.mdb") == before
    store.run("gc")
