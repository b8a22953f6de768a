"""The metadata socket under attack: good ones are answered, memory stays flat, the silent are let go.

One mount for all. Silent connections are opened first and looked at last: their deadline passes meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cidfs.errors import RemoteRefused
from cidfs.nix import requests as r
from cidfs.nix.client import Client, Connection
from cidfs.nix.wire import MAX_ITEMS, number, text
from tests.commands import Store, wait_until
from tests.system.forks import forked_store_in, forking
from tests.system.hostile_socket import (
    ATTACKS,
    GREETING,
    MAGIC,
    PATIENCE,
    VERSION,
    await_end,
    connect,
    greet,
)
from tests.system.support import make_files, noise

GOOD = 32
BAD = 32
ABSENT = "/nix/store/00000000000000000000000000000000-absent"
SMALL = {b"bin/tool": b"#!/bin/sh\n", b"text": b"some text\n" * 100, b"empty": b"", b"folder/": b""}


@dataclass(frozen=True)
class Served:
    """A mounted store with a small path and a large one; nobody changes it."""

    store: Store
    small: str
    big: str
    nars: dict[str, bytes]
    metadata: int

    @property
    def socket(self) -> Path:
        return self.store.state / "nix.sock"

    def connect(self) -> Connection:
        return Connection(self.socket, PATIENCE)

    def resident(self) -> int:
        """Return the metadata process's memory, in bytes."""
        for line in Path(f"/proc/{self.metadata}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no Pss")

    def used(self) -> tuple[int, int]:
        """Return how many threads and descriptors the metadata process has."""
        proc = Path(f"/proc/{self.metadata}")
        return len(os.listdir(proc / "task")), len(os.listdir(proc / "fd"))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    folder = Path(tempfile.mkdtemp(prefix="cidfs-socket-"))
    try:
        with forking() as forks, forked_store_in(folder, forks) as store:
            sources = [make_files(folder / "small", SMALL)]
            sources.append(make_files(folder / "big", {b"noise": noise("big", 3_000_000)}))
            names = store.add(*sources)
            (folder / "mnt").mkdir()
            store.mount(folder / "mnt")
            small, big = (f"/nix/store/{name}" for name in names)
            nars = {path: store.run("nar", path).stdout for path in (small, big)}
            yield Served(store, small, big, nars, store.stats()["daemon"]["nix"]["pid"])
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Quiet:
    """Connections that were opened before anything else in this file, and say nothing more."""

    idle: Connection
    silent: dict[str, socket.socket]


@pytest.fixture(scope="module", autouse=True)
def quiet(served: Served) -> Iterator[Quiet]:
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(served.connect())  # the first: silent for longer than any other
        assert idle.is_valid(served.small)
        silent = {
            "no word": connect(served.socket),
            "half a magic": connect(served.socket),
            "half a handshake": connect(served.socket),
            "half a request": greet(served.socket),
        }
        for peer in silent.values():
            stack.enter_context(peer)
        silent["half a magic"].sendall(MAGIC[:4])
        silent["half a handshake"].sendall(MAGIC + VERSION)
        silent["half a request"].sendall(number(r.IS_VALID_PATH) + number(20) + b"/nix")
        yield Quiet(idle, silent)


def ask_much(served: Served, rounds: int) -> None:
    """Ask for all kinds of things on one connection; each answer must be right."""
    with served.connect() as peer:
        for _ in range(rounds):
            assert peer.is_valid(served.small)
            assert not peer.is_valid(ABSENT)
            info = peer.path_info(served.big)
            assert info is not None
            assert info.nar_size == len(served.nars[served.big])
            assert peer.path_info(ABSENT) is None
            assert peer.valid_paths((ABSENT, served.big, served.small)) == (served.big, served.small)
            assert peer.path_from_hash_part(served.small[11:43]) == served.small
        assert b"".join(peer.nar(served.small)) == served.nars[served.small]
        assert set(peer.all_valid_paths()) == {served.small, served.big}


def test_good_ones_are_answered_while_as_many_misbehave(served: Served) -> None:
    held: list[socket.socket] = []
    over = threading.Event()

    def drip(peer: socket.socket) -> None:
        """Send a byte now and then, of a request that does not end."""
        while not over.wait(0.02):
            with contextlib.suppress(OSError):
                peer.send(b"x")

    def come_and_go() -> None:
        for attack in itertools.cycle(ATTACKS.values()):
            if over.is_set():
                return
            attack(served.socket, served.big).close()

    with ThreadPoolExecutor(GOOD + BAD) as pool:
        try:
            for attack in itertools.islice(itertools.cycle(ATTACKS.values()), BAD - 2):
                held.append(attack(served.socket, served.big))
            dripping = greet(served.socket)
            dripping.sendall(number(r.IS_VALID_PATH) + number(60_000))
            held.append(dripping)
            bad = [pool.submit(drip, dripping), pool.submit(come_and_go)]
            good = [pool.submit(ask_much, served, 20) for _ in range(GOOD)]
            for each in good:
                each.result(PATIENCE)
        finally:
            over.set()
            for peer in held:
                peer.close()
        for each in bad:
            each.result(PATIENCE)


def test_memory_stays_flat_over_thousands_of_hostile_connections(served: Served, quiet: Quiet) -> None:
    def attack(times: int) -> None:
        for _ in range(times):
            for each in ATTACKS.values():
                each(served.socket, served.big).close()
        # one is left: the one that is idle; the silent ones may be or not
        wait_until(lambda: served.used()[0] <= threads + len(quiet.silent), PATIENCE, "all have ended")

    threads = 3  # the process's own two, and the idle connection's
    attack(20)
    before, (_, descriptors) = served.resident(), served.used()
    attack(1000 if Store.long else 80)
    assert served.resident() - before < 8 << 20
    assert served.used()[1] < descriptors + 20
    ask_much(served, 1)


def test_of_one_user_s_long_requests_two_are_taken_at_a_time(served: Served) -> None:
    """The others wait in their sockets, where they take no memory of the process."""
    piece = text(ABSENT) * 1000
    with contextlib.ExitStack() as stack:
        sent = {stack.enter_context(greet(served.socket)): 0 for _ in range(10)}
        for peer in sent:
            peer.sendall(number(r.QUERY_VALID_PATHS) + number(MAX_ITEMS))
            peer.setblocking(False)

        def two_are_far() -> bool:
            for peer in sent:
                with contextlib.suppress(BlockingIOError):
                    sent[peer] += peer.send(piece)
            return sorted(sent.values())[-2] > 4 << 20

        wait_until(two_are_far, PATIENCE, "two are taken")
        assert sorted(sent.values())[-3] < 1 << 20
        with served.connect() as good:
            assert good.valid_paths((ABSENT, served.big)) == (served.big,)
    ask_much(served, 1)


def test_what_cannot_be_is_named_before_the_connection_ends(served: Served) -> None:
    for name, words in {
        "huge": number(r.IS_VALID_PATH) + number(2**63),
        "count": number(r.QUERY_VALID_PATHS) + number(2**40),
        "padding": number(r.IS_VALID_PATH) + number(3) + b"abc\0\0x\0\0",
    }.items():
        with greet(served.socket) as peer:
            peer.sendall(words)
            said = await_end(peer)
        assert said.startswith(number(r.ERROR)), name
        assert b"at most" in said or b"padded" in said, said


@pytest.mark.parametrize("operation", ["AddToStore", "AddToStoreNar", "CollectGarbage", "BuildDerivation"])
def test_a_write_is_refused_with_a_line_that_says_what_to_do(served: Served, operation: str) -> None:
    with served.connect() as peer:
        with pytest.raises(RemoteRefused, match=f"read-only: {operation} is refused here.*cidfs add"):
            peer.ask(r.Refused(operation))
        with pytest.raises(ConnectionError):
            peer.is_valid(served.small)


def test_the_refusal_arrives_although_the_client_sends_on(served: Served) -> None:
    """What the client still writes is taken, so that it comes to read why."""
    with greet(served.socket) as peer:
        peer.sendall(number(39) + text(ABSENT))
        for _ in range(64):
            peer.sendall(bytes(65536))
        peer.shutdown(socket.SHUT_WR)
        assert b"AddToStoreNar is refused here" in await_end(peer)


def test_a_nar_over_the_socket_is_what_cidfs_nar_says(served: Served) -> None:
    with served.connect() as peer:
        for path in (served.small, served.big, served.small):
            assert b"".join(peer.nar(path)) == served.nars[path]
            assert peer.is_valid(path)
        with pytest.raises(RemoteRefused, match="is not valid"):
            peer.ask(r.NarFromPath(ABSENT))
        assert peer.is_valid(served.small), "asking for what is not there ends nothing"


def session(served: Served) -> tuple[bytes, list[r.Request], list[object]]:
    """Return what a client sends from its first byte on, its requests, and what they must be answered."""
    requests: list[r.Request] = [
        r.SetOptions(),
        r.IsValidPath(served.small),
        r.IsValidPath(ABSENT),
        r.QueryValidPaths((served.big, ABSENT)),
        r.QueryPathFromHashPart(served.big[11:43]),
        r.Acknowledge(served.small),
        r.QueryReferrers(served.small),
    ]
    answers: list[object] = [None, True, False, (served.big,), served.big, True, ()]
    client = greeted()
    return GREETING + b"".join(map(client.ask, requests)), requests, answers


def greeted() -> Client:
    """Return a client that has heard a greeting of protocol 1.37."""
    client = Client(37, frozenset())
    last = number(r.LAST)
    client.feed(number(r.SERVER_MAGIC) + VERSION + text("cidfs") + number(2) + last)
    assert client.next() is None
    client.output()
    assert client.handshaken
    return client


def answers_in(data: bytes, requests: list[r.Request]) -> list[object]:
    """Return the answers that came behind the greeting."""
    client = Client(37, frozenset())
    client.feed(data)
    assert client.next() is None
    found = []
    for request in requests:
        client.ask(request)
        answer = client.next()
        assert answer is not None, request
        found.append(answer.value)
    assert client.take() == b""
    return found


def test_requests_that_come_all_at_once_are_answered_in_their_order(served: Served) -> None:
    sent, requests, wanted = session(served)
    times = 300
    many = sent + sent[len(GREETING) :] * (times - 1)
    with connect(served.socket) as peer, ThreadPoolExecutor(1) as pool:

        def send() -> None:
            peer.sendall(many)
            peer.shutdown(socket.SHUT_WR)

        sending = pool.submit(send)
        said = await_end(peer)
        sending.result(PATIENCE)
    assert answers_in(said, requests * times) == wanted * times


def test_requests_may_come_byte_by_byte(served: Served) -> None:
    sent, requests, wanted = session(served)
    with connect(served.socket) as peer:
        for at in range(len(sent)):
            peer.send(sent[at : at + 1])
        peer.shutdown(socket.SHUT_WR)
        assert answers_in(await_end(peer), requests) == wanted


def test_whoever_only_looks_whether_anybody_listens_does_no_wrong(served: Served) -> None:
    before = served.store.stats()["daemon"]["nix"]
    for _ in range(10):
        connect(served.socket).close()
    wait_until(
        lambda: (
            served.store.stats()["daemon"]["nix"]["connections_total"] >= before["connections_total"] + 10
        ),
        PATIENCE,
    )
    wait_until(lambda: served.used()[0] <= 3 + 4, PATIENCE)
    # of those that were silent meanwhile, four at most have been ended
    assert served.store.stats()["daemon"]["nix"]["broken"] <= before["broken"] + 4


def test_the_silent_are_let_go_and_the_idle_is_not(served: Served, quiet: Quiet) -> None:
    said = {name: await_end(peer) for name, peer in quiet.silent.items()}
    assert said["no word"] == said["half a magic"] == said["half a request"] == b""
    assert said["half a handshake"].startswith(number(r.SERVER_MAGIC))
    # it has been silent for longer than any of these
    assert quiet.idle.is_valid(served.small)
    assert not quiet.idle.is_valid(ABSENT)
