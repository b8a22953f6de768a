"""The processes of a mount, and who may die: the parent, the daemon, and the one that answers Nix."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cidfs.nix.client import Connection
from tests.commands import Store, wait_until
from tests.system.support import alive, make_files, mounted, parent_of

NOWHERE = "/nix/store/00000000000000000000000000000000-nowhere"
SECONDS = 60.0


def connection(store: Store) -> Connection:
    """Connect as Nix does."""
    return Connection(store.state / "nix.sock", SECONDS)


def add(store: Store, name: str) -> str:
    """Add a small tree of a name of its own; return its store path."""
    folder = make_files(store.state.parent / name, {b"file": name.encode()})
    (base,) = store.add(folder)
    return f"/nix/store/{base}"


def metadata_process(store: Store) -> int:
    """Return the process that answers Nix, as the daemon knows it."""
    pid: int = store.stats()["daemon"]["nix"]["pid"]
    return pid


@pytest.fixture
def processes(store: Store, mountpoint: Path) -> Iterator[tuple[int, int, int]]:
    """Mount; return the processes: parent, daemon, and the one that answers Nix. None may be left."""
    store.mount(mountpoint)
    (daemon,) = store.daemon_pids()
    found = parent_of(daemon), daemon, metadata_process(store)
    yield found
    if store.mounts:
        store.umount(mountpoint)
    for pid in found:
        wait_until(lambda pid=pid: not alive(pid), SECONDS)
    assert mounted(mountpoint) == []
    assert list(store.state.glob("nix.sock*")) == []


def test_when_the_daemon_dies_nix_is_answered_and_the_dead_mount_goes_from_sight(
    store: Store, mountpoint: Path, processes: tuple[int, int, int]
) -> None:
    store.log_expected = True
    path = add(store, "tree")
    with connection(store) as before:
        assert before.is_valid(path)
        assert not before.is_valid(NOWHERE)
        os.kill(processes[1], signal.SIGKILL)
        wait_until(lambda: mounted(mountpoint) == [], SECONDS)
        assert os.listdir(mountpoint) == []
        assert before.is_valid(path)
        assert not before.is_valid(NOWHERE)
        later = add(store, "later")  # nobody can show it any more
        assert not before.is_valid(later)
        with connection(store) as after:
            assert after.is_valid(path)
            assert after.path_info(path) is not None
            assert not after.is_valid(later)
        wait_until(lambda: "mounts again" in store.log_text(), SECONDS)
        assert f"cidfs --state {store.state} mount {mountpoint}" in store.log_text()
        assert alive(processes[0])
        store.umount(mountpoint)  # ends what is left


def test_a_mount_whose_daemon_died_can_be_made_again_at_once(
    store: Store, mountpoint: Path, processes: tuple[int, int, int]
) -> None:
    store.log_expected = True
    path = add(store, "tree")
    os.kill(processes[1], signal.SIGKILL)
    wait_until(lambda: mounted(mountpoint) == [], SECONDS)
    later = add(store, "later")
    store.run("mount", mountpoint)
    assert not alive(processes[0])  # the old one has made room
    with connection(store) as again:
        assert again.is_valid(path)
        assert again.is_valid(later)
    assert (mountpoint / Path(later).name / "file").read_bytes() == b"later"


def test_a_dead_metadata_process_is_started_again_and_who_connects_meanwhile_waits(
    store: Store, mountpoint: Path, processes: tuple[int, int, int]
) -> None:
    store.log_expected = True
    path = add(store, "tree")
    for times in (1, 2, 3):
        with connection(store) as broken:
            assert broken.is_valid(path)
            pid = metadata_process(store)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not alive(pid), SECONDS)
            with pytest.raises(OSError):  # noqa: PT011 (reset, a broken pipe, or an end)
                broken.is_valid(path)
        with connection(store) as again:
            assert again.is_valid(path)
        assert store.stats()["daemon"]["nix"]["restarts"] == times
    assert (mountpoint / Path(path).name / "file").read_bytes() == b"tree"


def test_when_the_parent_dies_the_mount_lives_on_and_ends_as_a_whole(
    store: Store, mountpoint: Path, processes: tuple[int, int, int]
) -> None:
    store.log_expected = True
    path = add(store, "tree")
    os.kill(processes[0], signal.SIGKILL)
    wait_until(lambda: not alive(processes[0]), SECONDS)
    later = add(store, "later")
    with connection(store) as after:
        assert after.is_valid(path)
        assert after.is_valid(later)  # no overlay that would have to be told
    assert (mountpoint / Path(later).name / "file").read_bytes() == b"later"
    store.umount(mountpoint)
    for pid in processes:
        wait_until(lambda pid=pid: not alive(pid), SECONDS)
    for left in store.state.glob("nix.sock*"):  # what its parent would have taken away
        left.unlink()


def test_a_stopped_daemon_delays_only_what_is_new(
    store: Store, mountpoint: Path, processes: tuple[int, int, int]
) -> None:
    store.log_expected = True
    path = add(store, "tree")
    with connection(store) as early:
        assert early.is_valid(path)  # so it is confirmed
    os.kill(processes[1], signal.SIGSTOP)
    try:
        later = add(store, "later")
        with connection(store) as meanwhile:
            assert meanwhile.is_valid(path)
            assert not meanwhile.is_valid(later)
            assert not meanwhile.is_valid(NOWHERE)
    finally:
        os.kill(processes[1], signal.SIGCONT)

    def is_valid_now() -> bool:
        with connection(store) as new:
            return new.is_valid(later)

    wait_until(is_valid_now, SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_ends_all(
    store: Store, mountpoint: Path, processes: tuple[int, int, int], number: signal.Signals
) -> None:
    os.kill(processes[0], signal.SIGHUP)  # the terminal has gone: no reason to end
    with connection(store) as open_one:
        assert not open_one.is_valid(NOWHERE)
        os.kill(processes[0], number)
        for pid in processes:
            wait_until(lambda pid=pid: not alive(pid), SECONDS)
        with pytest.raises(OSError):  # noqa: PT011 (reset, a broken pipe, or an end)
            open_one.is_valid(NOWHERE)
    assert mounted(mountpoint) == []
    store.mounts.clear()


def test_all_processes_of_a_mount_are_small(store: Store, processes: tuple[int, int, int]) -> None:
    """Their own memory and their share of what they have in common; 41 MB were measured."""
    path = add(store, "tree")
    with connection(store) as one:
        assert one.is_valid(path)
    shares = 0
    for pid in processes:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        shares += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    assert shares < 120 << 10, f"{shares} kB"
