"""The daemon as a process: its namespace, its end, what it tells systemd, and how its start fails."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Store, wait_until
from tests.system.support import (
    alive,
    describe,
    error_of,
    make_files,
    mount,
    mounted,
    noise,
    parent_of,
    umount,
)

NOTIFY_SECONDS = 60


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder whose mounts reach other namespaces, as all of them do where systemd runs."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path / "shared"
    folder.mkdir()
    mount("-t", "tmpfs", "shared", folder)
    mount("--make-shared", folder)
    yield folder
    umount("-R", folder)


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket such as systemd listens at."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(NOTIFY_SECONDS)
        yield listener


def left_in_run(store: Store) -> list[str]:
    """Return what is in run/ besides logs, and of the socket for Nix."""
    found = [path.name for path in (store.state / "run").iterdir() if path.suffix != ".log"]
    return found + [path.name for path in store.state.glob("nix.sock*")]


def wait_until_nothing_is_left(store: Store) -> None:
    """Wait for the end of all processes of a mount."""
    wait_until(lambda: left_in_run(store) == [])


def small_tree(store: Store) -> Path:
    """Make a tree in the store's folder."""
    return make_files(store.state.parent / "tree", {b"file": noise(1, 100_000), b"sub/file": b"x"})


# --- its namespace


@pytest.mark.usefixtures("root")
def test_the_daemon_lives_in_a_mount_namespace_of_its_own(store: Store, mountpoint: Path) -> None:
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert mounted(mountpoint) != []
    assert mounted(mountpoint, pid) == []  # or it would keep itself alive
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_mounts_on_the_store_directory_do_not_reach_it_and_unmounts_elsewhere_do(
    store: Store, mountpoint: Path, shared: Path
) -> None:
    tree = small_tree(store)
    config = store.state.parent / "cidfs.toml"
    config.write_text(f'[store]\nstore_dir = "{shared}/store"\n')
    for name in ("store", "before", "after", "upper", "work"):
        (shared / name).mkdir()
    (shared / "store/interpreter").write_text("what the daemon runs on")
    mount("-t", "tmpfs", "before", shared / "before")
    (line,) = store.lines("--config", config, "add", tree)
    assert line.startswith(f"{shared}/store/")
    store.run("--config", config, "mount", mountpoint)
    store.mounts.append(mountpoint)
    (pid,) = store.daemon_pids()
    inside = Path(f"/proc/{pid}/root{shared}")
    assert mounted(shared / "before", pid) != []

    options = f"lowerdir={mountpoint},upperdir={shared}/upper,workdir={shared}/work"
    mount("-t", "overlay", "-o", options, "none", shared / "store")
    assert describe(Path(line)) == describe(tree)  # through the overlay, at its place
    assert not (shared / "store/interpreter").exists()
    assert (inside / "store/interpreter").read_text() == "what the daemon runs on"
    assert [m[2] for m in mounted(shared / "store")] == ["overlay"]

    mount("-t", "tmpfs", "after", shared / "after")
    wait_until(lambda: mounted(shared / "after", pid) != [])  # what is mounted elsewhere gets there
    for name in ("before", "after"):
        umount(shared / name)
        assert mounted(shared / name) == []
        assert mounted(shared / name, pid) == []  # and is not kept
    busy = store.error("umount", mountpoint, code=22)
    assert f"{shared}/store" in busy
    assert describe(Path(line)) == describe(tree)
    umount(shared / "store")
    assert "overlay" not in [m[2] for m in mounted(shared, pid)]
    store.umount(mountpoint)
    assert not alive(pid)


@pytest.mark.usefixtures("root")
def test_a_daemon_keeps_no_other_mount_alive(store: Store) -> None:
    """Where the host's mounts are private, its unmounts do not reach other namespaces."""
    folder = store.state.parent
    (name,) = store.add(small_tree(store))
    for each in ("first", "second", "merged", "upper", "work"):
        (folder / each).mkdir()
    store.mount(folder / "first")
    (first,) = store.daemon_pids()
    options = f"lowerdir={folder}/first,upperdir={folder}/upper,workdir={folder}/work"
    mount("-t", "overlay", "-o", options, "none", folder / "merged")
    store.mount(folder / "second")
    assert (folder / "merged" / name / "sub/file").read_bytes() == b"x"
    umount(folder / "merged")
    store.umount(folder / "first")
    assert not alive(first)
    assert (folder / "second" / name / "sub/file").read_bytes() == b"x"


# --- its end


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.usefixtures("root")
def test_the_systems_own_umount_ends_the_daemon(store: Store, mountpoint: Path, lazy: bool) -> None:
    (name,) = store.add(small_tree(store))
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    assert (mountpoint / name / "sub/file").read_bytes() == b"x"
    umount(*(["-l"] if lazy else []), mountpoint)
    wait_until(lambda: not alive(pid))
    wait_until_nothing_is_left(store)
    store.mounts.clear()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_cleans_up(store: Store, mountpoint: Path, number: signal.Signals) -> None:
    (name,) = store.add(small_tree(store))
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    assert (mountpoint / name / "sub/file").read_bytes() == b"x"
    os.kill(pid, signal.SIGHUP)  # the terminal has gone: no reason to end
    fd = os.open(mountpoint / name / "file", os.O_RDONLY)  # somebody is using it
    try:
        os.kill(pid, number)
        wait_until(lambda: not alive(pid))
        assert mounted(mountpoint) == []
        assert error_of(lambda: os.pread(fd, 10, 0)) == "ENOTCONN"
    finally:
        os.close(fd)
    assert list(mountpoint.iterdir()) == []
    wait_until_nothing_is_left(store)
    store.mounts.clear()


def test_a_dead_mount_whose_parent_died_too_is_cleared_by_umount(store: Store, mountpoint: Path) -> None:
    tree = small_tree(store)
    (name,) = store.add(tree)
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    os.kill(parent_of(pid), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    wait_until(lambda: error_of(lambda: os.listdir(mountpoint)) == "ENOTCONN")
    assert store.add(tree) == [name]  # nobody else minds
    assert store.stats()["daemon"] is None
    store.umount(mountpoint)
    assert os.listdir(mountpoint) == []
    wait_until(lambda: "no more answers" in store.log_text())
    store.mount(mountpoint)
    assert describe(mountpoint / name) == describe(tree)
    # what the killed ones left has gone: two leases, a control socket, the socket for Nix and its lock
    assert len(left_in_run(store)) == 5
    store.log_expected = True


# --- its start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_it_tells_systemd_and_ends_with_0(
    store: Store, mountpoint: Path, notified: socket.socket, number: signal.Signals
) -> None:
    tree = small_tree(store)
    (name,) = store.add(tree)
    address = {"NOTIFY_SOCKET": notified.getsockname()}
    process = store.start("mount", "--foreground", mountpoint, env=address)
    assert notified.recv(100) == b"READY=1"
    assert describe(mountpoint / name) == describe(tree)
    assert parent_of(store.stats()["daemon"]["pid"]) == process.pid
    process.send_signal(number)
    assert notified.recv(100) == b"STOPPING=1"
    lines, errors = store.finish(process)
    assert lines == []
    assert len(errors) == 3, errors  # mounted, ending, unmounted
    assert mounted(mountpoint) == []
    assert left_in_run(store) == []


def test_in_the_foreground_umount_ends_it_with_0(
    store: Store, mountpoint: Path, notified: socket.socket
) -> None:
    store.add(small_tree(store))
    process = store.start("mount", "--foreground", mountpoint, env={"NOTIFY_SOCKET": notified.getsockname()})
    assert notified.recv(100) == b"READY=1"
    store.run("umount", mountpoint)
    assert notified.recv(100) == b"STOPPING=1"
    store.finish(process)
    assert left_in_run(store) == []


def test_it_tells_an_abstract_socket_too_and_goes_on_without_any(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0cidfs-test-{os.getpid()}")
        listener.settimeout(NOTIFY_SECONDS)
        store.run("mount", mountpoint, env={"NOTIFY_SOCKET": f"@cidfs-test-{os.getpid()}"})
        assert listener.recv(100) == b"READY=1"
        store.run("umount", mountpoint)
        assert listener.recv(100) == b"STOPPING=1"
    store.run("mount", mountpoint, env={"NOTIFY_SOCKET": "/nowhere/at/all"})
    store.mounts.append(mountpoint)
    assert os.listdir(mountpoint) == [".links"]


def test_errors_of_the_start_reach_the_caller(store: Store, mountpoint: Path) -> None:
    store.add(small_tree(store))
    (store.state / "index/current").unlink()
    for words in (["mount"], ["mount", "--foreground"]):
        assert "rebuild" in store.error(*words, mountpoint, code=12)
    (store.state / "run").rmdir()
    (store.state / "run").touch()
    store.run("rebuild")
    for words in (["mount"], ["mount", "--foreground"]):
        assert f"{store.state}/run" in store.error(*words, mountpoint, code=15)
    assert mounted(mountpoint) == []
    (store.state / "run").unlink()
    (store.state / "run").mkdir()
    store.mount(mountpoint)


def test_a_daemon_started_from_a_shell_that_ends_goes_on_and_holds_nothing_of_it(
    store: Store, mountpoint: Path
) -> None:
    (name,) = store.add(small_tree(store))
    process = store.start("mount", mountpoint)
    store.mounts.append(mountpoint)
    lines, errors = store.finish(process)  # which waits until nobody holds its pipes any more
    assert (lines, errors) == ([], [])
    (pid,) = store.daemon_pids()
    parent = parent_of(pid)
    assert process.pid not in (pid, parent)
    for each in (pid, parent, store.stats()["daemon"]["nix"]["pid"]):
        assert os.getsid(each) == parent
        for fd in (0, 1):
            assert os.readlink(f"/proc/{each}/fd/{fd}") == "/dev/null"
        assert os.readlink(f"/proc/{each}/fd/2").startswith(f"{store.state}/run/")
    assert (mountpoint / name / "sub/file").read_bytes() == b"x"
