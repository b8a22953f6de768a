"""What a connection of the metadata socket is told while the store grows and shrinks below an overlay.

The rules by themselves, without a Nix: what was absent stays absent, what is valid is whole and to be seen.
Store paths are published by this process; daemon and metadata process are others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cidfs.local.store import LocalStore
from cidfs.nix import requests as r
from cidfs.nix.client import Client, Connection
from cidfs.nix.validity import MAX_ABSENT
from tests.commands import Store, wait_until
from tests.local.support import key_of, package, path_of, publish
from tests.system.forks import Forks, forked_store_in, forking

PATIENCE = 60.0
SLOW = "the daemon does not answer"  # in time: on a machine with much else to do
STORE_DIR = "/nix/store"
LOOKS = """
import os, sys
absent = sys.argv[1:]
while True:
    absent = [name for name in absent if not os.path.exists(name)]
    print("looked for all that is absent", flush=True)
"""


def full(name: str) -> str:
    """Return the absolute store path that is meant by a name."""
    return f"{STORE_DIR}/{path_of(name).base_name}"


@dataclass(frozen=True)
class Lab:
    """A mounted store with an overlay above it, and a writer in this process."""

    store: Store
    writer: LocalStore
    folder: Path
    names: Iterator[int]

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    @property
    def merged(self) -> Path:
        return self.folder / "merged/nix/store"

    def at(self, name: str) -> Path:
        """Return where a path is in the overlay."""
        return self.merged / path_of(name).base_name

    def above(self, name: str) -> Path:
        """Return where a path would be in the upper."""
        return self.upper / path_of(name).base_name

    def new(self, name: str = "p") -> str:
        """Return a name that was not used before."""
        return f"{name}-{next(self.names)}"

    def publish(self, name: str, *references: str, deriver: str = "") -> str:
        """Publish a path in which its name stands."""
        deriver = path_of(deriver).base_name if deriver else ""
        publish(self.writer, package(name, references=references, deriver=deriver))
        return name

    def connect(self) -> Told:
        return Told(self.store.state / "nix.sock")

    def mount_overlay(self) -> None:
        self.store.run("overlay", self.merged, "--upper", self.upper, "--work", self.folder / "work")

    def is_seen(self, name: str) -> bool:
        """Say whether a path is in the overlay, with what it should hold."""
        try:
            return (self.at(name) / "name").read_text() == name
        except FileNotFoundError:
            return False

    def is_valid(self, *names: str) -> bool:
        """Say whether all of some paths are valid on a new connection."""
        with self.connect() as connection:
            return all(connection.is_valid(name) for name in names)

    def await_valid(self, *names: str) -> None:
        """Wait until a new connection counts paths as valid; they must be seen then.

        A daemon that has no time is waited for on another connection: what was absent stays so.
        """
        wait_until(lambda: self.is_valid(*names), PATIENCE, f"{names} are valid")
        assert [name for name in names if not self.is_seen(name)] == []

    def is_whited_out(self, name: str) -> bool:
        try:
            info = os.lstat(self.above(name))
        except FileNotFoundError:
            return False
        return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0

    def white_out(self, name: str) -> None:
        os.mknod(self.above(name), stat.S_IFCHR, 0)

    def await_unveiled(self, *names: str) -> None:
        """Wait until nothing hides paths any more."""
        for name in names:
            wait_until(lambda name=name: not self.is_whited_out(name), PATIENCE, f"{name} is not hidden")
            wait_until(lambda name=name: self.is_seen(name), PATIENCE, f"{name} is seen")


class Told:
    """A connection that is asked by the names that tests give to paths."""

    def __init__(self, socket: Path) -> None:
        self.connection = Connection(socket, PATIENCE)

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def close(self) -> None:
        self.connection.close()

    def is_valid(self, name: str) -> bool:
        return self.connection.is_valid(full(name))

    def which(self, *names: str) -> list[str]:
        """Return which of some names are valid, asked in one request."""
        found = set(self.connection.valid_paths(map(full, names)))
        return [name for name in names if full(name) in found]

    def hears_of(self, *names: str) -> list[str]:
        """Return which of some names are told of, in whatever way that can be asked."""
        everything = set(self.connection.all_valid_paths())
        heard = set(self.which(*names))
        for name in names:
            info = self.connection.path_info(full(name))
            by_hash = self.connection.path_from_hash_part(path_of(name).hash_part)
            assert by_hash in ("", full(name))
            answers = [self.is_valid(name), info is not None, by_hash != "", full(name) in everything]
            assert answers == [name in heard] * 4, f"{name}: {answers}"
        return sorted(heard)


@contextlib.contextmanager
def lab_in(folder: Path, forks: Forks) -> Iterator[Lab]:
    """A lab on a tmpfs of its own; whatever happens, all that is mounted is taken down.

    An upper layer can be on a tmpfs wherever the tests run. The daemons may complain.
    """
    ground = folder / "ground"
    ground.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", ground], check=True)
    try:
        with forked_store_in(ground, forks) as store:
            (ground / "mnt").mkdir()
            (ground / "merged/nix/store").mkdir(parents=True)
            store.mount(ground / "mnt")
            store.log_expected = True
            with LocalStore.open(store.state, write=True) as writer:
                lab = Lab(store, writer, ground, itertools.count())
                lab.mount_overlay()
                try:
                    yield lab
                finally:
                    store.run("umount", "--lazy", lab.merged)
    finally:
        subprocess.run(["umount", "--lazy", ground], check=True)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """A process to fork commands from."""
    with forking() as here:
        yield here


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Lab]:
    """The lab of all tests that break nothing."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab_in(tmp_path_factory.mktemp("connections").resolve(), forks) as here:
        yield here
        complaints = [line for line in here.store.log_text().splitlines() if SLOW not in line]
    assert not complaints


@pytest.fixture
def own_lab(tmp_path: Path, forks: Forks) -> Iterator[Lab]:
    """A lab for one test, whose daemons may complain."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab_in(tmp_path.resolve(), forks) as here:
        yield here


# --- absent stays absent


def test_absent_stays_absent_on_its_connection_and_is_valid_on_a_new_one(lab: Lab) -> None:
    name, other = lab.new(), lab.new()
    with lab.connect() as before:
        assert not before.is_valid(name)
        assert not lab.at(name).exists()
        lab.publish(name)
        lab.await_valid(name)
        lab.publish(other)
        lab.await_valid(other)
        assert before.hears_of(name, other) == [other]
    with lab.connect() as after:
        assert after.hears_of(name, other) == [name, other]


@pytest.mark.parametrize("how", ["path_info", "valid_paths", "path_from_hash_part"])
def test_in_whatever_way_it_was_asked_for(lab: Lab, how: str) -> None:
    name = lab.new()
    with lab.connect() as before:
        match how:
            case "path_info":
                assert before.connection.path_info(full(name)) is None
            case "valid_paths":
                assert before.which(name) == []
            case _:
                assert before.connection.path_from_hash_part(path_of(name).hash_part) == ""
        lab.publish(name)
        lab.await_valid(name)
        assert before.hears_of(name) == []


def test_what_refers_to_something_absent_is_absent_too_however_indirectly(lab: Lab) -> None:
    leaf, mid, top, other = (lab.new(name) for name in ("leaf", "mid", "top", "other"))
    with lab.connect() as before:
        assert not before.is_valid(leaf)
        lab.publish(top, mid)
        lab.publish(mid, leaf, mid)
        lab.publish(other)
        lab.await_valid(other)
        assert not lab.at(top).exists()
        with lab.connect() as between:
            assert between.which(top, other) == [other]
            lab.publish(leaf)
            lab.await_valid(leaf, mid, top)
            assert between.hears_of(leaf, mid, other) == sorted([leaf, mid, other])
            assert between.hears_of(top) == []
        assert before.hears_of(top, mid, leaf, other) == [other]
    with lab.connect() as after:
        assert after.hears_of(top, mid, leaf, other) == sorted([top, mid, leaf, other])


def test_a_path_without_its_closure_is_nowhere_until_it_is_whole(lab: Lab) -> None:
    leaf, top, witness = lab.new("leaf"), lab.new("top"), lab.new("witness")
    lab.publish(top, leaf)
    lab.publish(witness)
    lab.await_valid(witness)  # what was published before it was looked at too
    with lab.connect() as connection:
        assert connection.hears_of(top, leaf) == []
    assert not lab.at(top).exists()
    lab.publish(leaf)
    lab.await_valid(top, leaf)


def test_listings_tell_of_nothing_that_is_absent(lab: Lab) -> None:
    leaf, derivation, absent, top, other = (
        lab.new(name) for name in ("leaf", "derivation", "absent", "top", "other")
    )
    lab.publish(leaf)
    with lab.connect() as before:
        assert not before.is_valid(absent)
        assert not before.is_valid(derivation)
        lab.publish(derivation)
        lab.publish(absent, leaf)
        lab.publish(top, leaf, absent)
        lab.publish(other, leaf, other, deriver=derivation)
        lab.await_valid(top, other, derivation)
        ask = before.connection
        assert ask.referrers(full(leaf)) == (full(other),)
        assert ask.referrers(full(other)) == (full(other),)
        assert ask.referrers(full(absent)) == ()
        assert ask.ask(r.QueryValidDerivers(full(other))) == ()
        assert {full(top), full(absent), full(derivation)}.isdisjoint(ask.all_valid_paths())
    with lab.connect() as after:
        ask = after.connection
        assert set(ask.referrers(full(leaf))) == set(map(full, (top, absent, other)))
        assert ask.referrers(full(absent)) == (full(top),)
        assert ask.ask(r.QueryValidDerivers(full(other))) == (full(derivation),)
        assert set(map(full, (top, absent, other))) <= set(ask.all_valid_paths())


def test_what_a_listing_leaves_out_was_not_asked_for(lab: Lab) -> None:
    leaf, top = lab.new("leaf"), lab.new("top")
    lab.publish(leaf)
    absent = lab.new("absent")
    lab.publish(top, leaf, absent)
    with lab.connect() as connection:
        assert connection.connection.referrers(full(leaf)) == ()
        assert full(top) not in connection.connection.all_valid_paths()
        lab.publish(absent)
        lab.await_valid(top)
        assert connection.hears_of(top, absent) == sorted([top, absent])


def test_more_absent_names_than_are_remembered(lab: Lab) -> None:
    old, new, last, later = (lab.new(name) for name in ("old", "new", "last", "later"))
    lab.publish(old)
    lab.await_valid(old)
    many = [f"{STORE_DIR}/{i:032}-none" for i in range(MAX_ABSENT)]
    with lab.connect() as before:
        for i in range(0, len(many), 10_000):
            assert before.connection.valid_paths(many[i : i + 10_000]) == ()
        assert not before.is_valid(last)
        for name in (last, later):
            lab.publish(name)
        lab.publish(new, old, last)
        lab.await_valid(last, later, new)
        assert before.hears_of(last, new) == []
        assert not before.is_valid(later), "nobody can say that it was not absent"
        assert before.hears_of(old) == [old], "it was there before the connection was"


# --- valid is to be seen


def test_what_is_valid_is_to_be_seen_at_that_moment(lab: Lab) -> None:
    names = [lab.new("growing") for _ in range(100)]
    before = lab.store.stats()["daemon"]["overlays"]["remounts"]
    command = [sys.executable, "-c", LOOKS, *(str(lab.at(name)) for name in names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as looks:
        assert looks.stdout is not None
        for name in names:
            assert looks.stdout.readline() == b"looked for all that is absent\n"
            lab.publish(name)
            lab.await_valid(name)
        looks.kill()
    assert lab.store.stats()["daemon"]["overlays"]["remounts"] > before
    assert [name for name in names if not lab.is_seen(name)] == []


def test_overlays_that_come_and_go(lab: Lab) -> None:
    names = [lab.new() for _ in range(4)]
    lab.publish(names[0])
    lab.await_valid(names[0])
    lab.store.run("umount", lab.merged)
    try:
        lab.publish(names[1])
        wait_until(lambda: lab.is_valid(names[1]), PATIENCE, "valid without an overlay")
        lab.white_out(names[0])
        lab.white_out(names[2])
        assert not lab.is_valid(names[3])
    finally:
        lab.mount_overlay()
    lab.await_unveiled(names[0])
    lab.await_valid(*names[:2])
    assert lab.is_whited_out(names[2]), "nothing is below it"
    lab.publish(names[2])
    lab.publish(names[3])
    lab.await_unveiled(names[2])
    lab.await_valid(*names)


# --- whiteouts, and what is just being built


def test_a_whiteout_stays_while_a_connection_counts_the_path_as_absent(lab: Lab) -> None:
    name, other = lab.new(), lab.new()
    with lab.connect() as builder:
        assert not builder.is_valid(name)
        lab.publish(name)
        lab.publish(other)
        lab.await_valid(name, other)
        shutil.rmtree(lab.at(name))  # as Nix does with what is not valid for it
        shutil.rmtree(lab.at(other))
        assert lab.is_whited_out(name)
        lab.await_unveiled(other)
        with lab.connect() as another:
            assert another.hears_of(name) == []
            assert lab.is_whited_out(name)
            assert builder.hears_of(name) == []
        builder.close()
        lab.await_unveiled(name)
    lab.await_valid(name)


def test_a_whiteout_is_gone_before_anybody_hears_that_the_path_is_valid(lab: Lab) -> None:
    names = [lab.publish(lab.new()) for _ in range(20)]
    lab.await_valid(*names)
    for name in names:
        shutil.rmtree(lab.at(name))
        lab.await_valid(name)
        assert not lab.is_whited_out(name)


@pytest.mark.parametrize("what", ["its lock", "its output", "a reference's lock"])
def test_what_is_just_being_built_is_absent_for_all(lab: Lab, what: str) -> None:
    leaf, top = lab.new("leaf"), lab.new("top")
    built = leaf if what == "a reference's lock" else top
    with lab.connect() as builder:
        assert not builder.is_valid(built)
        place = lab.at(built) if what == "its output" else Path(f"{lab.at(built)}.lock")
        place.write_text("")
        lab.publish(leaf)
        lab.publish(top, leaf)
        witness = lab.publish(lab.new())
        lab.await_valid(witness)
        with lab.connect() as another:
            assert another.hears_of(top) == []
        place.unlink()
        if what != "its output":  # the kernel leaves a whiteout there: it sees the path below
            lab.await_valid(top, leaf)
    lab.await_valid(top, leaf)
    if what != "its output":
        place.touch()
        lab.await_valid(top, leaf)  # nobody builds it
        place.unlink()


def test_a_copy_above_hides_nothing(lab: Lab) -> None:
    name = lab.new()
    lab.at(name).mkdir()
    (lab.at(name) / "name").write_text(name)
    lab.publish(name)
    lab.await_valid(name)


# --- removal, damage, and processes that die


def test_removed_by_force_and_added_again(lab: Lab) -> None:
    name = lab.publish(lab.new())
    top = lab.publish(lab.new("top"), name)
    lab.await_valid(top, name)
    with lab.connect() as before:
        assert before.hears_of(top, name) == sorted([name, top])
        lab.store.run("remove", "--force", full(name))
        with lab.connect() as between:
            assert between.hears_of(name, top) == []
            assert not before.is_valid(name)
            wait_until(lambda: not lab.at(name).exists(), PATIENCE, "it has gone from the overlay")
            lab.publish(name)
            lab.await_valid(name, top)
            assert between.hears_of(name, top) == []
            assert not before.is_valid(name)


def test_a_damaged_row_and_a_rebuilt_index(own_lab: Lab) -> None:
    lab = own_lab
    names = [lab.publish(lab.new()) for _ in range(3)]
    late = lab.new("late")
    lab.await_valid(*names)
    with lab.connect() as before:
        assert before.which(*names[1:]) == names[1:]
        assert not before.is_valid(late)
        assert not lab.at(late).exists()
        with lab.writer.transaction() as index, index.write() as txn:
            txn.raw.put(key_of(names[0]), b"damaged", db=txn.index.db["paths"])
        assert not before.is_valid(names[0])
        assert before.which(*names[1:]) == names[1:]
        lab.store.run("rebuild")
        lab.publish(late)
        lab.await_valid(*names, late)
        assert before.hears_of(*names, late) == names[1:]


def test_the_metadata_process_dies(own_lab: Lab) -> None:
    lab = own_lab
    names = [lab.publish(lab.new()) for _ in range(2)]
    late = lab.new("late")
    lab.await_valid(*names)
    with lab.connect() as before:
        assert not before.is_valid(late)
        lab.publish(late)
        lab.await_valid(late)
        shutil.rmtree(lab.at(late))
        os.kill(lab.store.stats()["daemon"]["nix"]["pid"], signal.SIGKILL)
        lab.await_valid(*names)
        with pytest.raises(OSError, match=r"closed|reset|[Bb]roken"):
            before.is_valid(late)
    lab.await_unveiled(late)
    lab.await_valid(late, lab.publish(lab.new()))
    assert lab.store.stats()["daemon"]["nix"]["restarts"] == 1


# --- what is told besides


def test_nothing_counts_as_built_here(lab: Lab) -> None:
    name = lab.publish(lab.new())
    lab.await_valid(name)
    came = bytearray()

    class Listening(Client):
        def feed(self, data: bytes) -> None:
            came.extend(data)
            super().feed(data)

    with Connection(lab.store.state / "nix.sock", PATIENCE, Listening()) as connection:
        came.clear()
        info = connection.path_info(full(name))
    assert info is not None
    numbers = [int.from_bytes(came[i : i + 8], "little") for i in range(len(came) - 32, len(came), 8)]
    assert numbers == [info.nar_size, 0, 0, 0]  # ultimate, no signatures, no content address
