"""A repair that is killed has lost nothing, and is run again; a mount sees what it brought back."""

from __future__ import annotations

import signal
from pathlib import Path

import trio

from cidfs.cli.output import steps_progress
from cidfs.engine.verify import verify
from cidfs.formats.digest import parse_cid
from cidfs.local.store import LocalStore
from tests.commands import Store
from tests.system.support import describe, error_of, make_files, noise
from tests.system.test_damage import chunks_of, flip

DIE = """
import os
from {module} import {owner}
whole = {owner}.{name}
left = [{calls}]
def dying(self, *args, **more):
    left[0] -= 1
    if left[0] < 0 and {before}:
        os.kill(os.getpid(), 9)
    result = whole(self, *args, **more)
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return result
{owner}.{name} = dying
"""
STEPS = [
    ("cidfs.local.packs", "PackWriter", "append_many", 2, False),
    ("cidfs.local.packs", "PackWriter", "sync", 0, False),
    ("cidfs.local.index", "WriteTxn", "settle", 0, True),
    ("cidfs.local.index", "WriteTxn", "settle", 0, False),
    ("cidfs.engine.repair", "_Mender", "commit", 0, False),
]


def problems(store: Store) -> list[str]:
    """Verify in this process."""
    with LocalStore.open(store.state) as opened, steps_progress() as steps:
        return trio.run(verify, opened, None, steps).problems


def test_a_repair_that_is_killed_at_any_step_is_run_again(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    files = {b"%d" % i: noise(i, 90_000) for i in range(6)}
    tree = make_files(store.state.parent / "tree", files)
    (name,) = store.add(tree)
    store.mount(mountpoint)
    for cid in chunks_of(store, f"{name}/3") + chunks_of(store, f"{name}/5"):
        flip(store, "chunks", parse_cid(cid))
    assert error_of((mountpoint / name / "5").read_bytes) == "EIO"
    before = problems(store)
    assert len(before) == 2 * len(chunks_of(store, f"{name}/3") + chunks_of(store, f"{name}/5"))
    for number, (module, owner, method, calls, first) in enumerate(STEPS):
        hook = DIE.format(module=module, owner=owner, name=method, calls=calls, before=first)
        killed = store.start("verify", "--repair", "--from", tree, hook=hook)
        assert store.finish(killed, code=-signal.SIGKILL)[0] == []
        if number < len(STEPS) - 1:
            assert problems(store) == before
    assert problems(store) == []
    assert describe(mountpoint / name) == describe(tree)
    store.run("rebuild")
    assert problems(store) == []
    assert describe(mountpoint / name) == describe(tree)
