"""What a connection of the metadata socket is told while the store grows and shrinks below an overlay.

The rules by themselves, without a Nix: what was absent stays absent, what is valid is whole and to be seen.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cidfs.nix import requests as r
from cidfs.nix.client import Client, Connection
from cidfs.nix.validity import MAX_ABSENT
from tests.commands import wait_until
from tests.local.support import key_of, path_of
from tests.system.forks import Forks, forking

from .ground import PATIENCE, STORE_DIR, Ground, full, ground_in

SLOW = "the daemon does not answer"  # in time: on a machine with much else to do
LOOKS = """
import os, sys
absent = sys.argv[1:]
while True:
    absent = [name for name in absent if not os.path.exists(name)]
    print("looked for all that is absent", flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """A process to fork commands from."""
    with forking() as here:
        yield here


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Ground]:
    """The ground of all tests that break nothing."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with ground_in(tmp_path_factory.mktemp("connections").resolve(), forks) as here:
        yield here
        complaints = [line for line in here.store.log_text().splitlines() if SLOW not in line]
    assert not complaints


@pytest.fixture
def own_ground(tmp_path: Path, forks: Forks) -> Iterator[Ground]:
    """A ground for one test, whose daemons may complain."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with ground_in(tmp_path.resolve(), forks) as here:
        yield here


# --- absent stays absent


def test_absent_stays_absent_on_its_connection_and_is_valid_on_a_new_one(ground: Ground) -> None:
    name, other = ground.new(), ground.new()
    with ground.connect() as before:
        assert not before.is_valid(name)
        assert not ground.at(name).exists()
        ground.publish(name)
        ground.await_valid(name)
        ground.publish(other)
        ground.await_valid(other)
        assert before.hears_of(name, other) == [other]
    with ground.connect() as after:
        assert after.hears_of(name, other) == [name, other]


@pytest.mark.parametrize("how", ["path_info", "valid_paths", "path_from_hash_part"])
def test_in_whatever_way_it_was_asked_for(ground: Ground, how: str) -> None:
    name = ground.new()
    with ground.connect() as before:
        match how:
            case "path_info":
                assert before.connection.path_info(full(name)) is None
            case "valid_paths":
                assert before.which(name) == []
            case _:
                assert before.connection.path_from_hash_part(path_of(name).hash_part) == ""
        ground.publish(name)
        ground.await_valid(name)
        assert before.hears_of(name) == []


def test_what_refers_to_something_absent_is_absent_too_however_indirectly(ground: Ground) -> None:
    leaf, mid, top, other = (ground.new(name) for name in ("leaf", "mid", "top", "other"))
    with ground.connect() as before:
        assert not before.is_valid(leaf)
        ground.publish(top, mid)
        ground.publish(mid, leaf, mid)
        ground.publish(other)
        ground.await_valid(other)
        assert not ground.at(top).exists()
        with ground.connect() as between:
            assert between.which(top, other) == [other]
            ground.publish(leaf)
            ground.await_valid(leaf, mid, top)
            assert between.hears_of(leaf, mid, other) == sorted([leaf, mid, other])
            assert between.hears_of(top) == []
        assert before.hears_of(top, mid, leaf, other) == [other]
    with ground.connect() as after:
        assert after.hears_of(top, mid, leaf, other) == sorted([top, mid, leaf, other])


def test_a_path_without_its_closure_is_nowhere_until_it_is_whole(ground: Ground) -> None:
    leaf, top, witness = ground.new("leaf"), ground.new("top"), ground.new("witness")
    ground.publish(top, leaf)
    ground.publish(witness)
    ground.await_valid(witness)  # what was published before it was looked at too
    with ground.connect() as connection:
        assert connection.hears_of(top, leaf) == []
    assert not ground.at(top).exists()
    ground.publish(leaf)
    ground.await_valid(top, leaf)


def test_listings_tell_of_nothing_that_is_absent(ground: Ground) -> None:
    leaf, derivation, absent, top, other = (
        ground.new(name) for name in ("leaf", "derivation", "absent", "top", "other")
    )
    ground.publish(leaf)
    with ground.connect() as before:
        assert not before.is_valid(absent)
        assert not before.is_valid(derivation)
        ground.publish(derivation)
        ground.publish(absent, leaf)
        ground.publish(top, leaf, absent)
        ground.publish(other, leaf, other, deriver=derivation)
        ground.await_valid(top, other, derivation)
        ask = before.connection
        assert ask.referrers(full(leaf)) == (full(other),)
        assert ask.referrers(full(other)) == (full(other),)
        assert ask.referrers(full(absent)) == ()
        assert ask.ask(r.QueryValidDerivers(full(other))) == ()
        assert {full(top), full(absent), full(derivation)}.isdisjoint(ask.all_valid_paths())
    with ground.connect() as after:
        ask = after.connection
        assert set(ask.referrers(full(leaf))) == set(map(full, (top, absent, other)))
        assert ask.referrers(full(absent)) == (full(top),)
        assert ask.ask(r.QueryValidDerivers(full(other))) == (full(derivation),)
        assert set(map(full, (top, absent, other))) <= set(ask.all_valid_paths())


def test_what_a_listing_leaves_out_was_not_asked_for(ground: Ground) -> None:
    leaf, top = ground.new("leaf"), ground.new("top")
    ground.publish(leaf)
    absent = ground.new("absent")
    ground.publish(top, leaf, absent)
    with ground.connect() as connection:
        assert connection.connection.referrers(full(leaf)) == ()
        assert full(top) not in connection.connection.all_valid_paths()
        ground.publish(absent)
        ground.await_valid(top)
        assert connection.hears_of(top, absent) == sorted([top, absent])


def test_more_absent_names_than_are_remembered(ground: Ground) -> None:
    old, new, last, later = (ground.new(name) for name in ("old", "new", "last", "later"))
    ground.publish(old)
    ground.await_valid(old)
    many = [f"{STORE_DIR}/{i:032}-none" for i in range(MAX_ABSENT)]
    with ground.connect() as before:
        for i in range(0, len(many), 10_000):
            assert before.connection.valid_paths(many[i : i + 10_000]) == ()
        assert not before.is_valid(last)
        for name in (last, later):
            ground.publish(name)
        ground.publish(new, old, last)
        ground.await_valid(last, later, new)
        assert before.which(last, new, later) == [], "nobody can say that they were not absent"
        assert before.which(old) == [old], "it was there before the connection was"
        assert before.hears_of(old, last, new, later) == [old]


# --- valid is to be seen


def test_what_is_valid_is_to_be_seen_at_that_moment(ground: Ground) -> None:
    names = [ground.new("growing") for _ in range(100)]
    before = ground.store.stats()["daemon"]["overlays"]["remounts"]
    command = [sys.executable, "-c", LOOKS, *(str(ground.at(name)) for name in names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as looks:
        assert looks.stdout is not None
        for name in names:
            assert looks.stdout.readline() == b"looked for all that is absent\n"
            ground.publish(name)
            ground.await_valid(name)
        looks.kill()
    assert ground.store.stats()["daemon"]["overlays"]["remounts"] > before
    assert [name for name in names if not ground.is_seen(name)] == []


def test_overlays_that_come_and_go(ground: Ground) -> None:
    names = [ground.new() for _ in range(4)]
    ground.publish(names[0])
    ground.await_valid(names[0])
    ground.store.run("umount", ground.merged)
    try:
        ground.publish(names[1])
        wait_until(lambda: ground.is_valid(names[1]), PATIENCE, "valid without an overlay")
        ground.white_out(names[0])
        ground.white_out(names[2])
        assert not ground.is_valid(names[3])
    finally:
        ground.mount_overlay()
    ground.await_unveiled(names[0])
    ground.await_valid(*names[:2])
    assert ground.is_whited_out(names[2]), "nothing is below it"
    ground.publish(names[2])
    ground.publish(names[3])
    ground.await_unveiled(names[2])
    ground.await_valid(*names)


# --- whiteouts, and what is just being built


def test_a_whiteout_stays_while_a_connection_counts_the_path_as_absent(ground: Ground) -> None:
    name, other = ground.new(), ground.new()
    with ground.connect() as builder:
        assert not builder.is_valid(name)
        ground.publish(name)
        ground.publish(other)
        ground.await_valid(name, other)
        shutil.rmtree(ground.at(name))  # as Nix does with what is not valid for it
        shutil.rmtree(ground.at(other))
        assert ground.is_whited_out(name)
        ground.await_unveiled(other)
        with ground.connect() as another:
            assert another.hears_of(name) == []
            assert ground.is_whited_out(name)
            assert builder.hears_of(name) == []
        builder.close()
        ground.await_unveiled(name)
    ground.await_valid(name)


def test_a_whiteout_is_gone_before_anybody_hears_that_the_path_is_valid(ground: Ground) -> None:
    names = [ground.publish(ground.new()) for _ in range(20)]
    ground.await_valid(*names)
    for name in names:
        shutil.rmtree(ground.at(name))
        ground.await_valid(name)
        assert not ground.is_whited_out(name)


@pytest.mark.parametrize("what", ["its lock", "its output", "a reference's lock"])
def test_what_is_just_being_built_is_absent_for_all(ground: Ground, what: str) -> None:
    leaf, top = ground.new("leaf"), ground.new("top")
    built = leaf if what == "a reference's lock" else top
    with ground.connect() as builder:
        assert not builder.is_valid(built)
        place = ground.at(built) if what == "its output" else Path(f"{ground.at(built)}.lock")
        place.write_text("")
        ground.publish(leaf)
        ground.publish(top, leaf)
        witness = ground.publish(ground.new())
        ground.await_valid(witness)
        with ground.connect() as another:
            assert another.hears_of(top) == []
        place.unlink()
        if what != "its output":  # the kernel leaves a whiteout there: it sees the path below
            ground.await_valid(top, leaf)
    ground.await_valid(top, leaf)
    if what != "its output":
        place.touch()
        ground.await_valid(top, leaf)  # nobody builds it
        place.unlink()


def test_a_copy_above_hides_nothing(ground: Ground) -> None:
    name = ground.new()
    ground.at(name).mkdir()
    (ground.at(name) / "name").write_text(name)
    ground.publish(name)
    ground.await_valid(name)


# --- removal, damage, and processes that die


def test_removed_by_force_and_added_again(ground: Ground) -> None:
    name = ground.publish(ground.new())
    top = ground.publish(ground.new("top"), name)
    ground.await_valid(top, name)
    with ground.connect() as before:
        assert before.hears_of(top, name) == sorted([name, top])
        ground.store.run("remove", "--force", full(name))
        with ground.connect() as between:
            assert between.hears_of(name, top) == []
            assert not before.is_valid(name)
            wait_until(lambda: not ground.at(name).exists(), PATIENCE, "it has gone from the overlay")
            ground.publish(name)
            ground.await_valid(name, top)
            assert between.hears_of(name, top) == []
            assert not before.is_valid(name)


def test_a_damaged_row_and_a_rebuilt_index(own_ground: Ground) -> None:
    ground = own_ground
    names = [ground.publish(ground.new()) for _ in range(3)]
    late = ground.new("late")
    ground.await_valid(*names)
    with ground.connect() as before:
        assert before.which(*names[1:]) == names[1:]
        assert not before.is_valid(late)
        assert not ground.at(late).exists()
        with ground.writer.transaction() as index, index.write() as txn:
            txn.raw.put(key_of(names[0]), b"damaged", db=txn.index.db["paths"])
        assert not before.is_valid(names[0])
        assert before.which(*names[1:]) == names[1:]
        ground.store.run("rebuild")
        ground.publish(late)
        ground.await_valid(*names, late)
        assert before.hears_of(*names, late) == names[1:]


def test_the_metadata_process_dies(own_ground: Ground) -> None:
    ground = own_ground
    names = [ground.publish(ground.new()) for _ in range(2)]
    late = ground.new("late")
    ground.await_valid(*names)
    with ground.connect() as before:
        assert not before.is_valid(late)
        ground.publish(late)
        ground.await_valid(late)
        shutil.rmtree(ground.at(late))
        os.kill(ground.store.stats()["daemon"]["nix"]["pid"], signal.SIGKILL)
        ground.await_valid(*names)
        with pytest.raises(OSError, match=r"closed|reset|[Bb]roken"):
            before.is_valid(late)
    ground.await_unveiled(late)
    ground.await_valid(late, ground.publish(ground.new()))
    assert ground.store.stats()["daemon"]["nix"]["restarts"] == 1


# --- what is told besides


def test_nothing_counts_as_built_here(ground: Ground) -> None:
    name = ground.publish(ground.new())
    ground.await_valid(name)
    came = bytearray()

    class Listening(Client):
        def feed(self, data: bytes) -> None:
            came.extend(data)
            super().feed(data)

    with Connection(ground.store.state / "nix.sock", PATIENCE, Listening()) as connection:
        came.clear()
        info = connection.path_info(full(name))
    assert info is not None
    numbers = [int.from_bytes(came[i : i + 8], "little") for i in range(len(came) - 32, len(came), 8)]
    assert numbers == [info.nar_size, 0, 0, 0]  # ultimate, no signatures, no content address
