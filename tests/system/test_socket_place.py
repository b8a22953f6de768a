"""Where Nix finds the metadata socket, who may use it, and what is not taken away to make room for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cidfs.control import SocketAddress
from cidfs.nix.client import Connection
from tests.commands import Store, wait_until
from tests.system.forks import ForkedStore, forked_store_in, forking
from tests.system.hostile_socket import PATIENCE, connect
from tests.system.person import NOBODY
from tests.system.support import make_files


@pytest.fixture(scope="module")
def served() -> Iterator[ForkedStore]:
    """A store with one path that is mounted at `mnt` beside it."""
    folder = Path(tempfile.mkdtemp(prefix="cidfs-place-"))
    folder.chmod(0o755)  # an ordinary user must get to the socket
    try:
        with forking() as forks, forked_store_in(folder, forks) as store:
            store.add(make_files(folder / "source", {b"file": b"text"}))
            (folder / "mnt").mkdir()
            store.mount(folder / "mnt")
            yield store
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def second(served: Store, tmp_path: Path) -> Iterator[Path]:
    """A folder for another mount of the store, which is taken down in the end."""
    where = tmp_path / "second"
    where.mkdir()
    yield where
    if where in served.mounts:
        served.umount(where)


def path_in(store: Store) -> str:
    (path,) = store.lines("ls")
    return path


def sockets(store: Store) -> set[str]:
    """Return the sockets that the mounts of a store say that they have."""
    return {daemon["nix"]["socket"] for daemon in store.stats()["daemons"] if daemon["nix"] is not None}


def test_the_socket_is_for_everybody(served: ForkedStore) -> None:
    path = served.state / "nix.sock"
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o666


@pytest.mark.usefixtures("root")
def test_an_ordinary_user_is_answered(served: ForkedStore) -> None:
    os.seteuid(NOBODY)
    try:
        peer = Connection(served.state / "nix.sock", PATIENCE)
    finally:
        os.seteuid(0)
    with peer:
        assert peer.client.trusted is False
        assert peer.all_valid_paths() == (path_in(served),)


def test_a_second_mount_has_no_socket_and_says_so(served: ForkedStore, second: Path) -> None:
    said = served.run("mount", second).stderr.decode()
    served.mounts.append(second)
    assert said == (
        f"cidfs: {second}: another mount of this store has its socket for Nix; this one has none"
        " (--nix-socket gives it one)\n"
    )
    assert sockets(served) == {str(served.state / "nix.sock")}
    served.umount(second)
    with Connection(served.state / "nix.sock", PATIENCE) as peer:
        assert peer.is_valid(path_in(served)), "that of the first is still there"


def test_a_second_mount_may_have_a_socket_of_its_own(served: ForkedStore, second: Path) -> None:
    own = second.with_name("own.sock")
    assert served.run("mount", "--nix-socket", own, second).stderr == b""
    served.mounts.append(second)
    assert sockets(served) == {str(served.state / "nix.sock"), str(own)}
    assert stat.S_IMODE(own.stat().st_mode) == 0o666
    with Connection(own, PATIENCE) as peer:
        assert peer.is_valid(path_in(served))
    served.umount(second)
    assert os.listdir(own.parent) == [second.name], "socket and lock are gone"


def test_a_socket_is_not_taken_from_another_mount(served: ForkedStore, second: Path) -> None:
    taken = served.state / "nix.sock"
    line = served.error("mount", "--nix-socket", taken, second, code=22)
    assert line == f"cidfs: {taken}: another mount listens there; choose another --nix-socket"
    assert not os.path.ismount(second)
    with Connection(taken, PATIENCE) as peer:
        assert peer.is_valid(path_in(served))


def test_what_is_no_stale_socket_is_left_alone(served: ForkedStore, second: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    line = served.error("mount", "--nix-socket", file, second, code=22)
    assert line == f"cidfs: {file}: what is there is no socket; choose another --nix-socket"
    assert file.read_text() == "precious"

    foreign = tmp_path / "foreign"
    with socket.socket(socket.AF_UNIX) as listener:
        with SocketAddress(foreign) as address:
            listener.bind(address)
        listener.listen()
        line = served.error("mount", "--nix-socket", foreign, second, code=22)
        assert line == f"cidfs: {foreign}: another process listens there; choose another --nix-socket"
        connect(foreign).close()

    nowhere = tmp_path / "no" / "folder" / "sock"
    line = served.error("mount", "--nix-socket", nowhere, second, code=20)
    assert line.startswith(f"cidfs: {nowhere}: cannot listen there: No such file or directory")
    assert sorted(os.listdir(tmp_path)) == ["file", "foreign", "second"], "no lock is left"


def test_sockets_of_killed_processes_are_replaced(served: ForkedStore, second: Path) -> None:
    """All processes of a mount at once: nobody can clean up."""
    served.log_expected = True
    own = second.with_name("own.sock")
    served.run("mount", "--nix-socket", own, second)
    served.mounts.append(second)
    leases = [json.loads(path.read_text()) for path in (served.state / "run").glob("*.lease")]
    pids = [lease["pid"] for lease in leases if lease["mountpoint"] == str(second)]
    pids += [d["nix"]["pid"] for d in served.stats()["daemons"] if d["mountpoint"] == str(second)]
    with contextlib.ExitStack() as stack:
        ends = [os.pidfd_open(pid) for pid in pids]
        for fd in ends:
            stack.callback(os.close, fd)
        for pid in sorted(pids):  # the parent first: it starts nobody again
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(_runs, pids)), PATIENCE, "all have ended")
    assert stat.S_ISSOCK(own.stat().st_mode)
    with pytest.raises(ConnectionRefusedError):
        connect(own)
    served.umount(second)
    served.run("mount", "--nix-socket", own, second)
    served.mounts.append(second)
    with Connection(own, PATIENCE) as peer:
        assert peer.is_valid(path_in(served))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
