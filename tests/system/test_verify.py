"""The command line of verify and rebuild; verify beside those who change the store."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cidfs.formats.digest import parse_cid
from tests.commands import Store, environment
from tests.system.support import make_files, noise
from tests.system.test_damage import chunks_of, flip

BUSY = """
import sys
from pathlib import Path
import trio
from cidfs.engine.ingest import ingest
from cidfs.engine.sources import DiskSource
from cidfs.engine.wanted import Wanted
from cidfs.local.collect import collect
from cidfs.local.rebuild import rebuild
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.system.support import make_files, noise

state, room = Path(sys.argv[1]), Path(sys.argv[2])
number, kept = 0, []
while not (room / "enough").exists():
    for _ in range(3):
        number += 1
        tree = room / f"busy-{number}"
        files = {b"own": noise(number, 50_000), b"shared": noise(number // 4, 200_000)}
        make_files(tree, files)
        with LocalStore.open(state, write=True) as store:
            kept += [o.path for o in trio.run(ingest, store, [Wanted(DiskSource(str(tree)), name=tree.name)])]
    with LocalStore.open(state, write=True) as store:
        store.remove(kept[:2])
        del kept[:2]
        collect(store)
    if number % 6 == 0:
        rebuild(StateFolder.open(state), lock_timeout=30)
    print(number, flush=True)
"""

ENDLESS = """
from cidfs.engine import verify_paths
def pieces(store, manifest):
    print("reading", flush=True)
    while True:
        yield bytes(1 << 20)
verify_paths.nar_pieces = pieces
"""


def test_each_form_says_what_it_read(store: Store) -> None:
    folder = store.state.parent
    store.add(make_files(folder / "a", {b"x": noise("x", 400_000)}), make_files(folder / "b", {b"y": b"y"}))
    done = store.run("verify")
    assert done.stdout == b""
    assert b"verified 2 packs with " in done.stderr
    assert b"2 store paths: all is well" in done.stderr
    assert b"2 store paths (no chunk read): all is well" in store.run("verify", "--quick").stderr
    done = store.run("verify", "--sample", "3", "--seed", "5")
    assert done.stderr.decode().splitlines() == [
        "a sample of 3, chosen with --seed 5",
        "verified 2 store paths (3 chunks read): all is well",
    ]
    assert b"with --seed " in store.run("verify", "--sample", "100%").stderr
    known = json.loads(store.run("verify", "--json").stdout)
    assert (known["schema"], known["paths"], known["problems"], known["findings"]) == (1, 2, 0, [])
    assert known["frames"] > 2


@pytest.mark.parametrize(
    "words",
    [
        ("--quick", "--sample", "5%"),
        ("--sample", "0"),
        ("--sample", "0%"),
        ("--sample", "101%"),
        ("--sample", "many"),
        ("--seed", "1"),
        ("--from", "/"),
        ("--sample", "5%", "bafkr4ib3qcg5hmdg6kalkgytjatlzenrt54zby2sfldeukuxxztg5qwzpa"),
    ],
)
def test_options_that_do_not_go_together_are_refused(store: Store, words: tuple[str, ...]) -> None:
    store.error("verify", *words, code=2)


def test_damage_as_lines_and_as_json_and_its_repair(store: Store) -> None:
    folder = store.state.parent
    tree = make_files(folder / "tree", {b"x\nx": noise("x", 30_000), b"sub/y": b"y"})
    (name,) = store.add(tree)
    full = f"/nix/store/{name}"
    [cid] = chunks_of(store, f"{name}/sub/y")
    pack = flip(store, "chunks", parse_cid(cid))
    done = store.run("verify", code=16)
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith(f"{pack}: ")
    assert lines[1:] == [f"{full}: chunk {cid} is damaged: in sub/y"]
    assert done.stderr.decode().splitlines() == [
        f"cidfs: {store.state}: 2 problems found; 1 store path verified",
    ]
    known = json.loads(store.run("verify", "--json", code=16).stdout)
    [finding] = known["findings"]
    assert known["problems"] == 2
    assert (finding["kind"], finding["what"], finding["where"]) == ("chunk", cid, str(pack))
    assert (finding["paths"], finding["repaired"]) == ([f"{full}/sub/y"], False)
    flip(store, "chunks", parse_cid(chunks_of(store, f"{name}/x\nx")[0]))
    assert "in x\\nx" in store.run("verify", name, code=16).stdout.decode()

    assert b"no other copy is here" in store.run("verify", "--repair", code=16).stdout
    assert "no such file" in store.error("verify", "--repair", "--from", folder / "none", code=3)
    done = store.run("verify", "--repair", "--from", tree, "--json")
    known = json.loads(done.stdout)
    assert known["problems"] == 0
    assert [finding["repaired"] for finding in known["findings"]] == [True, True]
    assert b"all is well" not in done.stderr
    assert b"2 problems found and repaired" in done.stderr
    assert b"all is well" in store.run("verify").stderr
    assert store.run("cat", f"{name}/sub/y").stdout == b"y"
    store.run("rebuild")
    store.run("verify")


def test_a_rebuild_that_lost_a_manifest_says_so(store: Store) -> None:
    tree = make_files(store.state.parent / "tree", {b"x": b"x"})
    (name,) = store.add(tree)
    cid = json.loads(store.run("info", "--json", name).stdout)["cid"]
    flip(store, "manifests", parse_cid(cid))
    done = store.run("rebuild", code=16)
    assert "verify --repair --from" in done.stderr.decode().splitlines()[-1]
    assert b"repaired" in store.run("verify", "--repair", "--from", tree).stdout
    store.run("rebuild")
    store.run("verify")


def test_verify_beside_adds_removals_collections_and_rebuilds_finds_nothing(store: Store) -> None:
    folder = store.state.parent
    store.add(make_files(folder / "stays", {b"%d" % i: noise(i, 300_000) for i in range(10)}))
    busy = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(store.state), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    store.processes.append(busy)  # it is killed with the store, however this ends
    assert busy.stdout is not None
    assert busy.stdout.readline()
    for words in ((), ("--quick",), ("--sample", "50%"), (), ("--repair",)) * (5 if Store.long else 1):
        done = store.run("verify", *words)
        assert done.stdout == b""
    assert busy.poll() is None
    (folder / "enough").touch()
    _, err = busy.communicate(timeout=60)
    assert (busy.returncode, err) == (0, b"")
    store.run("verify")


def test_verify_is_interrupted_in_the_middle_of_a_path(store: Store, tmp_path: Path) -> None:
    (name,) = store.add(make_files(tmp_path / "tree", {b"x": noise(1, 3_000_000)}))
    running = store.start("verify", name, hook=ENDLESS)
    assert running.stdout is not None
    assert running.stdout.readline() == b"reading\n"
    running.send_signal(signal.SIGINT)
    _, err = store.finish(running, code=130, timeout=30)
    assert err == ["cidfs: interrupted; what was reported as done is done"]
