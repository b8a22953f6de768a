"""Processes of their own for the tests: they publish, hold locks, rebuild, and die where they are told to.

Started by the standard library's fork server, so that each has one thread and nothing open. What a child says
comes as values through a pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec

from cidfs.errors import CidfsError, DiskFailed
from cidfs.formats.realisation import Realisation
from cidfs.formats.store_path import StorePath
from cidfs.local import journal as journal_module
from cidfs.local import publish as publish_module
from cidfs.local.collect import collect
from cidfs.local.files import sync_folder
from cidfs.local.rebuild import rebuild
from cidfs.local.rows import Place
from cidfs.local.state import StateFolder
from cidfs.local.store import LocalStore
from tests.local.disk import KILLED, Disk, Plan
from tests.local.support import Package, Writers, append, candidates, few_urandom, names, publish, row_of

P = ParamSpec("P")
SECONDS: Final = 60.0
FAILED: Final = 3
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "trio", "tests.local.children"])


class Child:
    """A running child."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process = process
        self.pipe = pipe

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(self._process.pid)

    def hear(self) -> Any:
        """Return the next thing that it says."""
        assert self.pipe.poll(SECONDS), f"process {self.pid} said nothing"
        return self.pipe.recv()

    def tell(self, word: object = None) -> None:
        """Let it go on."""
        self.pipe.send(word)

    def stop(self) -> None:
        """Stop it, and wait until it is."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.join(SECONDS)

    def is_alive(self) -> bool:
        """Say whether it still runs."""
        return bool(self._process.is_alive())

    def end(self) -> int:
        """Wait for its end and return its exit code."""
        self._process.join(SECONDS)
        assert self._process.exitcode is not None, f"process {self.pid} did not end"
        return int(self._process.exitcode)

    def said(self) -> list[Any]:
        """Return all that it said and was not heard yet; after its end."""
        words = []
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                words.append(self.pipe.recv())
        return words


def start(action: Callable[Concatenate[Connection, P], None], *args: P.args, **kwargs: P.kwargs) -> Child:
    """Start an action of this module in a process of its own."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_run, args=(action, theirs, args, kwargs))
    process.start()
    theirs.close()
    return Child(process, ours)


@contextlib.contextmanager
def running(
    action: Callable[Concatenate[Connection, P], None], *args: P.args, **kwargs: P.kwargs
) -> Iterator[Child]:
    """Start an action, and kill it at the end of the block if it still runs."""
    child = start(action, *args, **kwargs)
    try:
        yield child
    finally:
        child.kill()
        child.pipe.close()


def run(
    action: Callable[Concatenate[Connection, P], None], *args: P.args, **kwargs: P.kwargs
) -> tuple[int, list[Any]]:
    """Run an action to its end; return exit code and what it said."""
    with running(action, *args, **kwargs) as child:
        code = child.end()
        return code, child.said()


def _run(action: Callable[..., None], pipe: Connection, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    try:
        action(pipe, *args, **kwargs)
    except CidfsError as e:
        pipe.send((type(e).__name__, str(e)))
        sys.exit(FAILED)


def crash(
    root: Path,
    plan: Plan,
    action: Callable[Concatenate[Connection, Path, P], None],
    *args: P.args,
    **kwargs: P.kwargs,
) -> tuple[int, list[Any]]:
    """Run an action on a disk with a plan; where that has a power loss, root is then what the disk kept."""
    code, said = run(on_disk, root, plan, action, args, kwargs)
    if plan.lost:
        if plan.memory:
            Path(plan.memory).unlink(missing_ok=True)
        root.rename(root.with_name(f"{root.name}-before-{os.urandom(4).hex()}"))
        Path(plan.lost).rename(root)
    assert code in (0, KILLED, FAILED), (code, said)
    return code, said


# --- what children do


def on_disk(
    pipe: Connection, root: Path, plan: Plan, action: Callable[..., None], args: Any, kwargs: Any
) -> None:
    """Do another action on a disk that may fail."""

    def pause() -> None:
        pipe.send("paused")
        pipe.recv()

    os.urandom = few_urandom
    disk = Disk(root, plan, pause)
    disk.install()
    try:
        action(pipe, root, *args, **kwargs)
    finally:
        pipe.send(("steps", disk.log, disk.syncs))
        disk.end()


def create(pipe: Connection, root: Path, store_dir: str = "/nix/store") -> None:
    """Make a store, or open the one that is there."""
    with LocalStore.open(root, create=True, store_dir=store_dir) as store:
        pipe.send(("created", store.state.format.id, store.store_dir))


def create_inside(pipe: Connection, root: Path) -> None:
    """Make a store in a folder that is not there."""
    create(pipe, root / "state")


def publish_groups(
    pipe: Connection,
    root: Path,
    groups: Sequence[Sequence[Package]],
    inode_step: int | None = None,
    lock_timeout: float = 30,
) -> None:
    """Publish groups, and report each that is done: (done, base by name)."""
    if inode_step is not None:
        module: Any = publish_module
        module.INODE_STEP = inode_step
    with LocalStore.open(root, write=True, lock_timeout=lock_timeout) as store:
        for group in groups:
            publish(store, *group)
            pipe.send(("done", {name: row_of(store, name).base for name in names(group)}))


def publish_and_die(pipe: Connection, root: Path, group: Sequence[Package]) -> None:
    """Publish, but die between the commit in LMDB and the journal."""
    module: Any = journal_module.Journal
    module.append = lambda self, data: os._exit(KILLED)
    publish_groups(pipe, root, [group])


def put_realisations(pipe: Connection, root: Path, groups: Sequence[Sequence[Realisation]]) -> None:
    """Put groups of realisations, and report each that is done: (put, ids)."""
    with LocalStore.open(root, write=True) as store:
        for group in groups:
            store.put_realisations(group)
            pipe.send(("put", [each.id for each in group]))


def put_and_die(pipe: Connection, root: Path, group: Sequence[Realisation]) -> None:
    """Put realisations, but die between the commit in LMDB and the journal."""
    module: Any = journal_module.Journal
    module.append = lambda self, data: os._exit(KILLED)
    put_realisations(pipe, root, [group])


def look_up_when_told(pipe: Connection, root: Path, write: bool) -> None:
    """Open a store; whenever told an id, say what it came to."""
    with LocalStore.open(root, write=write) as store:
        pipe.send("open")
        while identity := pipe.recv():
            if write:
                store.refresh()
            pipe.send(store.realisation(identity))


def put_when_told(pipe: Connection, root: Path, value: Realisation) -> None:
    """Open a store; when told, put a realisation, and say what became of it."""
    with LocalStore.open(root, write=True) as store:
        pipe.send("open")
        pipe.recv()
        pipe.send(store.put_realisations([value]))


def rebuild_it(pipe: Connection, root: Path, accept_loss: bool = False, lock_timeout: float = 30) -> None:
    """Rebuild the index, and report the problems."""
    report = rebuild(StateFolder.open(root), lock_timeout=lock_timeout, accept_loss=accept_loss)
    pipe.send(("rebuilt", report.problems))


def lose_index(pipe: Connection, root: Path) -> None:
    """Take the index away, for good."""
    shutil.rmtree(root / "index")
    sync_folder(root)


def with_little_memory(pipe: Connection, root: Path, item: Package) -> None:
    """Publish and read with 20 GiB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (20 << 30, 20 << 30))
    with LocalStore.open(root, write=True) as store:
        publish(store, item)
    with LocalStore.open(root) as store:
        pipe.send(("done", row_of(store, item.record.path.name).serial))


def publish_when_full(pipe: Connection, root: Path, small: Package, large: Package) -> None:
    """Fill a pack until no more can be written; then publish what stood in it before."""
    with LocalStore.open(root, write=True) as store:
        writers = Writers.of(store)
        new: dict[bytes, Place] = {}
        candidate = append(store, writers, small, new)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            append(store, writers, large, {})
        except DiskFailed as e:
            pipe.send(("full", str(e)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writers.own.sync()
        writers.manifests.sync()
        store.put_places("chunks", list(new.items()), writers.own)
        manifest = (candidate.record.manifest, candidate.manifest_place)
        store.put_places("manifests", [manifest], writers.manifests)
        store.publish([candidate])
        name = small.record.path.name
        pipe.send(("done", {name: row_of(store, name).base}))
        writers.close()


def refresh_when_told(pipe: Connection, root: Path) -> None:
    """Open a store for writing; whenever told to, look for a new index, and say whether there was one."""
    with LocalStore.open(root, write=True, lock_timeout=0.1) as store:
        pipe.send("open")
        while name := pipe.recv():
            pipe.send((store.refresh(), row_of(store, name).serial))


def hold_write_lock(pipe: Connection, root: Path) -> None:
    """Hold the write lock, and a write transaction of LMDB, until told to go on."""
    with (
        LocalStore.open(root, write=True) as store,
        store.transaction() as index,
        index.write() as txn,
    ):
        txn.put_number("held", 1)
        pipe.send("held")
        pipe.recv()


def hold_pack(pipe: Connection, root: Path, kind: int, item: tuple[bytes, bytes]) -> None:
    """Append a frame to a pack and keep the pack until told to go on; say its name."""
    with LocalStore.open(root, write=True) as store:
        writer = store.pack_writer(kind)
        place = writer.append(item[0], 0, item[1], len(item[1]))
        writer.sync()
        pipe.send(place)
        pipe.recv()
        writer.close()


def hold_lease(pipe: Connection, root: Path, kind: str) -> None:
    """Take a lease and hold it until told to go on."""
    with LocalStore.open(root) as store:
        lease = store.lease(kind, mountpoint="/m")
        pipe.send(lease.path)
        pipe.recv()
        lease.release()
        pipe.send("released")
        pipe.recv()


def ingest_groups(pipe: Connection, root: Path, groups: Sequence[Sequence[Package]]) -> None:
    """Publish groups under a lease, as an ingest does, with a step between looking up and publishing."""
    with LocalStore.open(root, write=True) as store:
        lease = store.lease("ingest")
        for group in groups:
            found = candidates(store, *group)
            sync_folder(root)  # an ingest may wait here for long, and holds no lock
            store.publish(found)
            pipe.send(("done", {name: row_of(store, name).base for name in names(group)}))
        lease.release()


def remove_paths(pipe: Connection, root: Path, items: Sequence[StorePath]) -> None:
    """Remove paths, and report those that are gone: (removed, names)."""

    def gone(paths: Sequence[StorePath]) -> None:
        pipe.send(("removed", [path.name for path in paths]))

    with LocalStore.open(root, write=True, lock_timeout=10) as store:
        absent = store.remove(items, on_removed=gone)
        pipe.send(("removed", [path.name for path in absent]))


def collect_it(pipe: Connection, root: Path, lock_timeout: float = 10) -> None:
    """Collect what nobody needs, and report the problems."""
    with LocalStore.open(root, write=True, lock_timeout=lock_timeout) as store:
        pipe.send(("collected", collect(store).problems))
