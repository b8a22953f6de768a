"""What the metadata socket lets nobody have: all connections, for ever, and bytes that are wrong.

Deadlines and limits are short here; all else is as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cidfs.errors import ProtocolError, RemoteRefused
from cidfs.formats.digest import parse_cid
from cidfs.formats.frames import HEADER_SIZE
from cidfs.local.packs import pack_path
from cidfs.local.store import LocalStore
from cidfs.nix import requests as r
from cidfs.nix.client import Connection
from cidfs.nix.wire import number, text
from tests.commands import Store, wait_until
from tests.local.support import flip
from tests.system.forks import Forks, forked_store_in, forking
from tests.system.hostile_socket import PATIENCE, await_end, greet, never_reads
from tests.system.person import NOBODY
from tests.system.support import make_files, noise

SOMEBODY = 12345
HOOK = """
from cidfs.nix import shares, socket
socket.WHOLE_SECONDS = socket.SEND_SECONDS = 1.0
shares.MAX_OF_ONE_USER, shares.MAX_OF_OTHERS, shares.MAX_CONNECTIONS = 3, 4, 8
"""


@dataclass(frozen=True)
class Strict:
    """A mounted store whose socket has short deadlines and low limits."""

    store: Store
    path: str

    @property
    def socket(self) -> Path:
        return self.store.state / "nix.sock"

    def connect(self, user: int = 0) -> Connection:
        """Connect as a user, who is known by what he was when he connected."""
        os.seteuid(user)
        try:
            return Connection(self.socket, PATIENCE)
        finally:
            os.seteuid(0)

    def is_turned_away(self, user: int = 0) -> bool:
        try:
            self.connect(user).close()
        except ConnectionError:
            return True
        return False


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with forking() as here:
        yield here


@pytest.fixture(scope="module")
def strict(forks: Forks) -> Iterator[Strict]:
    folder = Path(tempfile.mkdtemp(prefix="cidfs-limits-"))
    folder.chmod(0o755)  # an ordinary user must get to the socket
    where = folder / "mnt"
    where.mkdir()
    try:
        with forked_store_in(folder, forks) as store:
            (name,) = store.add(make_files(folder / "big", {b"noise": noise("big", 3_000_000)}))
            process = store.start("mount", where, "--foreground", hook=HOOK)
            assert process.stderr is not None
            assert any(b"mounted" in line for line in process.stderr)
            yield Strict(store, f"/nix/store/{name}")
            store.run("umount", where)
            _, said = store.finish(process)
    finally:
        shutil.rmtree(folder)
    warnings = [line for line in said if " WARNING " in line or " ERROR " in line]
    told = [line.partition("connections of user ")[2].partition(" ")[0] for line in warnings]
    assert len(told) == len(set(told)), f"who is turned away is named once: {said}"
    assert set(told) <= {str(NOBODY), str(SOMEBODY), "0"}, said


def await_hang_up(peer: socket.socket) -> None:
    """Wait until the other side has closed, though there is more to read."""
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    assert poll.poll(PATIENCE * 1000), "not closed"


@pytest.mark.usefixtures("root")
def test_who_trickles_or_does_not_read_is_let_go(strict: Strict) -> None:
    with strict.connect() as good, greet(strict.socket) as dripping:
        not_reading = never_reads(strict.socket, strict.path)
        dripping.sendall(number(r.IS_VALID_PATH) + number(60_000))
        with not_reading, contextlib.suppress(ConnectionError):
            while True:
                dripping.send(b"x")
                assert good.is_valid(strict.path)
                if select.select([dripping], [], [], 0.01)[0]:
                    break
            await_hang_up(not_reading)
        assert await_end(dripping) == b""
        assert good.is_valid(strict.path), "the one that is idle goes on"


@pytest.mark.usefixtures("root")
def test_a_user_has_his_share_of_connections_and_no_more(strict: Strict) -> None:
    with contextlib.ExitStack() as stack:
        his = [stack.enter_context(strict.connect(NOBODY)) for _ in range(3)]
        assert strict.is_turned_away(NOBODY)
        another = stack.enter_context(strict.connect(SOMEBODY))
        assert strict.is_turned_away(SOMEBODY), "all others together have a limit too"
        roots = [stack.enter_context(strict.connect()) for _ in range(4)]
        assert strict.is_turned_away()
        for peer in (*his, another, *roots):
            assert peer.is_valid(strict.path)
        roots[0].close()
        wait_until(lambda: not strict.is_turned_away(), PATIENCE, "a closed one makes room")
        his[0].close()
        wait_until(lambda: not strict.is_turned_away(NOBODY), PATIENCE, "a closed one makes room")


def damage(store: Store, path: str) -> None:
    """Flip a bit in the first chunk of a file."""
    cid = json.loads(store.run("info", "--json", path).stdout)["chunks"][0]
    with LocalStore.open(store.state) as opened:
        place = opened.place("chunks", parse_cid(cid))
    assert place is not None
    pack = pack_path(store.state, place.kind, place.pack)
    flip(pack, place.offset + HEADER_SIZE + place.stored // 2)


@pytest.fixture
def store(forks: Forks, tmp_path: Path) -> Iterator[Store]:
    with forked_store_in(tmp_path, forks) as here:
        yield here


def test_a_damaged_nar_ends_the_connection_and_has_no_wrong_bytes(store: Store, mountpoint: Path) -> None:
    store.log_expected = True
    folder = store.state.parent
    sources = [make_files(folder / "small", {b"file": noise("small", 5_000)})]
    sources.append(make_files(folder / "big", {b"a": noise("a", 1_000_000), b"b": noise("b", 900_000)}))
    small, big = (f"/nix/store/{name}" for name in store.add(*sources))
    nars = {path: store.run("nar", path).stdout for path in (small, big)}
    damage(store, f"{small}/file")
    damage(store, f"{big}/b")
    store.mount(mountpoint)
    for _ in range(3):
        with Connection(store.state / "nix.sock", PATIENCE) as peer, pytest.raises(RemoteRefused):
            list(peer.nar(small))
        with greet(store.state / "nix.sock") as plain:
            plain.sendall(number(r.NAR_FROM_PATH) + text(big))
            came = await_end(plain)
        head = number(r.LAST)
        assert came.startswith(head)
        assert len(head) + 500_000 < len(came) < len(nars[big])
        assert nars[big].startswith(came[len(head) :])
        broken = pytest.raises((ConnectionError, ProtocolError))
        with Connection(store.state / "nix.sock", PATIENCE) as peer, broken:
            list(peer.nar(big))
    with Connection(store.state / "nix.sock", PATIENCE) as peer:
        assert peer.is_valid(small), "what is known of it is not damaged"
    assert len(store.log_text().splitlines()) == 2, store.log_text()
