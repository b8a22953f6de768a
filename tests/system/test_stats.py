"""stats: the figures of the store, with and without daemons."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from cidfs.control import DaemonStats
from tests.commands import Store
from tests.system.support import describe, error_of, make_files, noise, status_bytes

STORE_FIELDS = {
    "state",
    "store_dir",
    "paths",
    "nodes",
    "files",
    "chunks",
    "manifests",
    "packs",
    "logical_bytes",
    "unique_bytes",
    "stored_bytes",
    "manifest_bytes",
    "index_bytes",
    "disk_bytes",
    "dedup_factor",
    "compression_factor",
    "overall_factor",
    "next_serial",
    "next_inode",
    "damaged_rows",
}


def test_without_a_daemon_stats_says_what_the_store_holds(store: Store) -> None:
    store.add(make_files(store.state.parent / "tree", {b"a": bytes(100_000), b"b": bytes(100_000)}))
    found = store.stats()
    assert (found["schema"], found["daemon"], found["daemons"]) == (1, None, [])
    figures = found["store"]
    assert set(figures) == STORE_FIELDS
    assert (figures["state"], figures["store_dir"]) == (str(store.state), "/nix/store")
    assert (figures["paths"], figures["nodes"], figures["files"], figures["manifests"]) == (1, 3, 2, 1)
    assert figures["chunks"] == 1
    assert figures["logical_bytes"] == 200_000
    assert figures["unique_bytes"] == 100_000
    assert 0 < figures["stored_bytes"] < 1000
    assert (figures["dedup_factor"], figures["packs"], figures["next_serial"]) == (2.0, 2, 2)
    assert figures["compression_factor"] > 100
    used = sum(
        os.stat(Path(folder) / name).st_blocks * 512
        for part in ("packs", "index", "journal")
        for folder, _, names in os.walk(store.state / part)
        for name in names
    )
    assert figures["disk_bytes"] == used
    text = store.run("stats").stdout.decode()
    assert f"Store {store.state}" in text
    assert "2.00x" in text
    assert "Daemon" not in text


def test_of_an_empty_store_all_is_nothing(store: Store, mountpoint: Path) -> None:
    store.mount(mountpoint)
    figures = store.stats()["store"]
    counted = ("paths", "nodes", "files", "chunks", "manifests", "packs", "logical_bytes", "stored_bytes")
    assert [figures[key] for key in counted] == [0] * len(counted)
    assert (figures["dedup_factor"], figures["next_serial"], figures["next_inode"]) == (1.0, 1, 16)


def test_a_daemon_says_what_it_was_asked_and_how_long_it_took(store: Store, mountpoint: Path) -> None:
    tree = make_files(
        store.state.parent / "tree",
        {b"big": noise(1, 3 << 20), b"sub/small": b"small", b"sub/empty": b""},
    )
    os.symlink("big", tree / "link")
    (name,) = store.add(tree)
    store.mount(mountpoint)
    before = store.stats()["daemon"]
    assert before["bytes_read"] == before["damaged"] == before["chunk_reads"] == 0
    assert describe(mountpoint / name) == describe(tree)
    assert error_of(lambda: os.lstat(mountpoint / "x")) == "ENOENT"
    os.statvfs(mountpoint)

    daemon = store.stats()["daemon"]
    assert set(daemon) == set(DaemonStats.__struct_fields__)
    assert daemon["pid"] == store.daemon_pids()[0]
    assert (daemon["mountpoint"], daemon["transport"]) == (str(mountpoint), "pyfuse3")
    assert daemon["uptime"] >= before["uptime"] > 0
    requests = daemon["requests"]
    counts = {kind: each["count"] for kind, each in requests.items()}
    assert counts["lookup"] >= 2
    assert counts["readlink"] == 1
    assert counts["opendir"] == 2
    assert counts["readdir"] >= 2
    assert counts["open"] == 3
    assert counts["read"] >= 3
    assert counts["statfs"] >= 1
    for kind, each in requests.items():
        assert each["errors"] == 0, kind
        assert 0 < each["p50_us"] <= each["p90_us"] <= each["p99_us"] <= each["max_us"], kind
    assert (3 << 20) + 5 <= daemon["bytes_read"] <= 4 << 20  # the kernel may ask for a page twice
    assert daemon["chunk_reads"] == store.stats()["store"]["chunks"]
    assert daemon["manifest_reads"] == 1
    assert 3 << 20 <= daemon["cached_bytes"] <= 80 << 20
    resident = status_bytes(daemon["pid"], "VmRSS")
    assert 0 < daemon["memory"] <= resident + (8 << 20)

    assert describe(mountpoint / name) == describe(tree)  # from the kernel's memory
    again = store.stats()["daemon"]
    assert again["bytes_read"] - daemon["bytes_read"] < 1 << 20
    assert again["requests"]["lookup"]["count"] == counts["lookup"]
    text = store.run("stats").stdout.decode()
    assert f"Daemon {daemon['pid']} at {mountpoint}" in text
    assert all(kind in text for kind in requests)


def test_several_mounts_of_one_store_at_once(store: Store) -> None:
    folder = store.state.parent
    tree = make_files(folder / "tree", {b"file": noise(1, 500_000), b"sub/file": b"x"})
    (name,) = store.add(tree)
    places = [folder / f"mnt-{i}" for i in range(3)]
    for i, place in enumerate(places):
        place.mkdir()
        store.mount(place, *(["--list-root"] if i == 1 else []))
    for place in places:
        assert describe(place / name) == describe(tree)
    assert [len(os.listdir(place)) for place in places] == [1, 2, 1]
    found = store.stats()
    assert {d["mountpoint"] for d in found["daemons"]} == {str(place) for place in places}
    assert len({d["pid"] for d in found["daemons"]}) == 3
    assert found["daemon"] in found["daemons"]
    assert {d["bytes_read"] for d in found["daemons"]} == {500_001}
    store.umount(places[1])  # each goes by itself, in any order
    assert len(store.stats()["daemons"]) == 2
    assert (places[0] / name / "sub/file").read_bytes() == b"x"
    store.umount(places[0])
    assert (places[2] / name / "sub/file").read_bytes() == b"x"
    store.umount(places[2])
    assert store.stats()["daemons"] == []


def test_a_daemon_that_does_not_answer_is_named_and_the_rest_shown(store: Store, mountpoint: Path) -> None:
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        done = store.run("stats", "--json")
    finally:
        os.kill(pid, signal.SIGCONT)
    found = json.loads(done.stdout)
    assert (found["daemon"], found["store"]["paths"]) == (None, 0)
    (line,) = done.stderr.decode().splitlines()
    assert f"process {pid}" in line
    assert str(mountpoint) in line


def test_watching_goes_on_until_interrupted(store: Store) -> None:
    store.add(make_files(store.state.parent / "tree", {b"a": b"x"}))
    watching = store.start("stats", "--json", "--watch")
    assert watching.stdout is not None
    first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
    assert first == second == store.stats()
    watching.send_signal(signal.SIGINT)
    _, errors = store.finish(watching, code=130)
    assert len(errors) == 1
