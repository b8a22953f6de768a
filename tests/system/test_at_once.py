"""Several processes at once: adds, imports, readers, and one that is stopped where it hurts most."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from cidfs.local.packs import CACHE
from cidfs.local.store import LocalStore
from tests.commands import Store, environment, wait_until
from tests.system.support import alive, describe, error_of, make_files, nar_of, noise

SHARED = 3 << 20

STOP_IN_THE_TRANSACTION = """
import signal, threading
from cidfs.local.index import WriteTxn
settle = WriteTxn.settle
def stop(txn):
    if {database!r} in txn._touched:
        WriteTxn.settle = settle
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    settle(txn)
WriteTxn.settle = stop
"""


def overlapping_tree(folder: Path, number: int) -> Path:
    """Make a tree of which half is in every other one, at the same place."""
    return make_files(
        folder / f"tree-{number}",
        {
            b"a-shared": noise("shared", SHARED),
            b"b-shifted": noise("shared", SHARED)[number * 1000 :],
            b"own": noise(number, 1 << 20),
            b"small/%d" % number: b"%d" % number,
            b"small/empty": b"",
            b"repeats": noise(number, 30_000) * 9,
        },
    )


def wait_until_stopped(process: subprocess.Popen[bytes]) -> None:
    """Wait until a child has stopped itself."""
    seen: os.waitid_result | None = None

    def stopped() -> bool:
        nonlocal seen
        seen = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return seen is not None

    wait_until(stopped, 120)
    assert seen is not None
    assert seen.si_code == os.CLD_STOPPED, process.communicate()[1].decode()


def assert_sound(store: Store) -> None:
    """Verify, and compare what the index counts with what is there."""
    store.run("verify")
    with LocalStore.open(store.state) as opened:
        totals = opened.totals()
        rows = [row for _, row in opened.pack_rows()]
        chunks = list(opened.places("chunks"))
        manifests = list(opened.places("manifests"))
        paths = list(opened.paths())
    assert sum(row.frames for row in rows if row.kind <= CACHE) == len(chunks) == totals.chunks
    assert sum(row.frames for row in rows if row.kind > CACHE) == len(manifests) == totals.manifests
    assert sum(place.length for _, place in chunks) == totals.unique
    assert sum(place.stored for _, place in chunks) == totals.stored
    assert sum(path.row.size for path in paths) == totals.logical
    assert sum(path.row.files for path in paths) == totals.files
    assert sum(path.row.count for path in paths) == totals.nodes
    assert totals.paths == len(paths)
    assert totals.damaged_rows == 0


def test_adds_and_an_import_at_once_lose_nothing_and_a_reader_never_sees_half(
    store: Store, mountpoint: Path
) -> None:
    folder = store.state.parent
    trees = [overlapping_tree(folder, number) for number in range(9)]
    names = Store(folder / "other-state").add(*trees)
    (folder / "names").write_text(json.dumps(dict(zip(names, map(str, trees), strict=True))))
    (folder / "nar").write_bytes(b"".join(nar_of(os.fsencode(trees[8]))))
    store.mount(mountpoint)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "tests.system.watcher", str(mountpoint), str(folder / "names")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    store.processes.append(watcher)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == b"watching\n"
    with open(folder / "nar", "rb") as nar:
        writers = [
            store.start("add", *trees[0:6]),
            store.start("add", *trees[2:8]),
            store.start("import", "-", "--name", "tree-8", stdin=nar.fileno()),
        ]
    printed = [store.finish(writer)[0] for writer in writers]
    expected = [f"/nix/store/{name}" for name in names]
    assert printed == [expected[0:6], expected[2:8], expected[8:9]]
    store.finish(watcher)
    assert_sound(store)
    figures = store.stats()["store"]
    assert figures["paths"] == 9
    sizes = [sum(node.size for node in describe(tree).values()) for tree in trees]
    assert figures["logical_bytes"] == sum(sizes)
    assert figures["unique_bytes"] < sum(sizes) / 2


def test_a_stopped_writer_stops_no_reader_and_is_named(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    first = make_files(folder / "first", {b"cold": noise(1, 5 << 20), b"sub/colder": noise(2, 100_000)})
    trees = [make_files(folder / f"tree-{i}", {b"file": noise(i, 400_000)}) for i in range(3, 6)]
    names = Store(folder / "other-state").add(*trees)
    (name,) = store.add(first)
    store.mount(mountpoint)
    stopped = store.start("add", trees[0], hook=STOP_IN_THE_TRANSACTION.format(database="paths"))
    wait_until_stopped(stopped)

    line = store.error("--lock-timeout", "1", "add", trees[1], code=13)
    assert f"process {stopped.pid} (" in line
    assert "stopped)" in line
    assert describe(mountpoint / name) == describe(first)
    for other in names:
        assert error_of(partial(os.lstat, mountpoint / other)) == "ENOENT"
    assert store.lines("ls") == [f"/nix/store/{name}"]
    assert store.stats()["daemon"]["requests"]["read"]["count"] > 0
    again = folder / "again"
    again.mkdir()
    store.mount(again)
    assert (again / name / "sub/colder").read_bytes() == noise(2, 100_000)
    waiting = store.start("add", trees[2])

    stopped.send_signal(signal.SIGCONT)
    assert store.finish(stopped)[0] == [f"/nix/store/{names[0]}"]
    assert store.finish(waiting)[0] == [f"/nix/store/{names[2]}"]
    assert store.add(trees[1]) == names[1:2]
    for other, tree in zip(names, trees, strict=True):
        assert describe(mountpoint / other) == describe(tree)
    assert_sound(store)


def test_a_writer_killed_in_its_transaction_leaves_nothing_half(store: Store, mountpoint: Path) -> None:
    folder = store.state.parent
    tree = make_files(folder / "tree", {b"file": noise(1, 3 << 20), b"other": b"x"})
    (name,) = Store(folder / "other-state").add(tree)
    store.mount(mountpoint)
    for database in ("chunks", "manifests", "paths"):
        killed = store.start("add", tree, hook=STOP_IN_THE_TRANSACTION.format(database=database))
        wait_until_stopped(killed)
        killed.kill()
        killed.communicate()
        assert not alive(killed.pid)
        assert error_of(lambda: os.lstat(mountpoint / name)) == "ENOENT"
        store.run("verify")
    assert store.add(tree) == [name]
    assert describe(mountpoint / name) == describe(tree)
    assert_sound(store)
