"""Nix builds and collects above a mount that grows below it, by the very paths that it is building."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cidfs.nix.client import Connection
from tests.commands import Store

from .lab import Lab, OverlayStore
from .tool import wait_until
from .trees import differences, snapshot

GROWING = Path(__file__).with_name("growing.nix")
PATIENCE = 60.0
ROUNDS = 5
LONG_ROUNDS = 100
AT_ONCE = 2
BATCH = 25  # as many are built in one go
PARTS = 3
LONG_PARTS = 30
COMPLAINTS = (
    "Stale file handle",
    "Assertion",
    "is not valid",
    "No such file",
    "not empty",
    "terminate called",
)


@dataclass(frozen=True)
class Family:
    """Three paths that were built in the chroot store: `top` refers to `leaf`, and `user` to both."""

    seed: str
    leaf: str
    top: str
    user: str


@dataclass(frozen=True)
class Field:
    """A lab, and the gate that holds builds of leaves up until they are let through.

    salt makes the paths other ones than those of any other run: a collection of Nix spares what the
    environment of any process of the machine names, also that of another store's builder.
    """

    lab: Lab
    gate: Path
    salt: str

    def words(self, attribute: str, *seeds: str) -> list[str | Path]:
        """Return the command that builds an attribute of growing.nix for some seeds."""
        return [
            "nix-build", GROWING, "--no-out-link", "-Q", "-A", attribute,
            "--max-jobs", "4", "--option", "extra-sandbox-paths", f"/gate={self.gate}",
            "--option", "build-poll-interval", "1",
            "--arg", "tools", self.lab.store.tools, "--argstr", "seeds", ",".join(seeds),
        ]  # fmt: skip

    def open(self, *seeds: str) -> None:
        for seed in seeds:
            (self.gate / f"{seed}.open").touch()

    def await_builders(self, seeds: list[str]) -> None:
        """Wait until the builders of some leaves stand before the gate."""
        reached = [self.gate / f"{seed}.reached" for seed in seeds]
        wait_until("their builders run", lambda: all(file.exists() for file in reached), PATIENCE)

    def close(self) -> None:
        for file in self.gate.iterdir():
            file.unlink()

    def grow(self, prefix: str, count: int) -> list[Family]:
        """Build families in the chroot store; the gate is closed again then."""
        found = []
        for start in range(0, count, BATCH):
            seeds = [f"{prefix}{i}-{self.salt}" for i in range(start, min(start + BATCH, count))]
            self.open(*seeds)
            users, leaves, tops = (self.build(which, *seeds) for which in ("user", "leaf", "top"))
            found += [Family(*each) for each in zip(seeds, leaves, tops, users, strict=True)]
        self.close()
        return found

    def build(self, attribute: str, *seeds: str) -> list[str]:
        """Build in the chroot store, and return the paths in the order of the seeds."""
        return self.lab.store.run(*self.words(attribute, *seeds)).split()

    @contextmanager
    def building(self, store: OverlayStore, attribute: str, *seeds: str) -> Iterator[subprocess.Popen[bytes]]:
        """Build in an overlay store, in a process of its own."""
        program, *rest = self.words(attribute, *seeds)
        command = [self.lab.nix.prefix / "bin" / program, *rest, "--store", store.address]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.lab.nix.environment
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def add(self, *paths: str, closure: bool = True) -> None:
        """Add paths of the chroot store below; they are published then, and not yet valid for everybody."""
        options = () if closure else ("--no-closure",)
        self.lab.cidfs.run("import", "--from", self.lab.store.root, *options, *paths)

    @contextmanager
    def adding(self, *paths: str) -> Iterator[None]:
        """Add paths below meanwhile."""
        cidfs = self.lab.cidfs
        command = cidfs.command("import", "--from", self.lab.store.root, *paths)
        with subprocess.Popen(command, env=cidfs.environment, stdout=subprocess.DEVNULL) as process:
            yield
        assert process.returncode == 0

    def is_valid(self, path: str) -> bool:
        """Say whether a path is valid for who connects now."""
        with Connection(self.lab.socket, PATIENCE) as connection:
            return connection.is_valid(path)

    def check(self, store: OverlayStore, *paths: str) -> None:
        """Compare what the overlay shows of some paths with the chroot store."""
        for path in paths:
            assert differences(snapshot(self.lab.store.real(path)), snapshot(store.real(path))) == []


@pytest.fixture(scope="module")
def field(lab: Lab) -> Field:
    gate = lab.at / "gate"
    gate.mkdir(exist_ok=True)
    return Field(lab, gate, secrets.token_hex(4))


@pytest.fixture(scope="module")
def above(lab: Lab) -> Iterator[OverlayStore]:
    """Return an overlay store for all tests with a Nix."""
    with lab.overlay() as store:
        yield store


def is_locked(store: OverlayStore, path: str) -> bool:
    """Say whether somebody holds Nix's lock of a path."""
    try:
        lock = os.open(f"{store.real(path)}.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def await_locks(store: OverlayStore, paths: list[str]) -> None:
    wait_until("they are locked", lambda: all(is_locked(store, path) for path in paths), PATIENCE)


def finish(process: subprocess.Popen[bytes]) -> list[str]:
    """Wait for a Nix to end well, and return what it printed."""
    out, err = process.communicate(timeout=2 * PATIENCE)
    said = err.decode(errors="replace")
    assert process.returncode == 0, f"{process.args!r} ended with {process.returncode}: {said}"
    assert [word for word in COMPLAINTS if word in said] == [], said
    return out.decode().split()


def collect(store: OverlayStore) -> str:
    """Collect garbage, and return what Nix says of it."""
    done = store.attempt("nix-store", "--gc")
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    assert [word for word in COMPLAINTS if word in said] == [], said
    return said


def collect_all(store: OverlayStore) -> None:
    """Collect until the upper is empty: what is added meanwhile may take a collection more, or two."""
    said = ""
    for _ in range(2):
        if store.written():
            said += collect(store)
    assert store.written() == set(), said


def await_no_whiteouts(store: OverlayStore) -> None:
    wait_until("no whiteout is left", lambda: store.whiteouts() == [], PATIENCE)


def test_what_is_added_while_it_is_built_and_collected(field: Field, above: OverlayStore) -> None:
    rounds = LONG_ROUNDS if Store.long else ROUNDS
    families = field.grow("grown", rounds * AT_ONCE)
    while_locked = 0
    for number in range(rounds):
        here = families[number * AT_ONCE : (number + 1) * AT_ONCE]
        seeds, leaves = [each.seed for each in here], [each.leaf for each in here]
        tops, users = [each.top for each in here], [each.user for each in here]
        with ExitStack() as stack:
            builds = [stack.enter_context(field.building(above, "top", *seeds))]
            await_locks(above, leaves)
            if number % 2:
                field.await_builders(seeds)
            if number % 3 == 0:
                builds.append(stack.enter_context(field.building(above, "top", *seeds)))
            before = [is_locked(above, leaf) for leaf in leaves]
            field.add(*leaves)
            after = [is_locked(above, leaf) for leaf in leaves]
            while_locked += sum(a and b for a, b in zip(before, after, strict=True))
            if number % 3 == 1:  # one that was not there when they were absent
                builds.append(stack.enter_context(field.building(above, "user", *seeds)))
            field.open(*seeds)
            printed = [finish(build) for build in builds]
        assert printed[0] == tops
        field.check(above, *leaves, *tops)
        await_no_whiteouts(above)
        with field.adding(*users):
            collect(above)
        collect_all(above)
        await_no_whiteouts(above)
        field.check(above, *leaves, *tops, *users)
    above.run("nix-store", "--verify", "--check-contents")
    assert above.whiteouts() == []
    assert while_locked >= rounds


def test_parts_that_are_added_later(field: Field, above: OverlayStore) -> None:
    families = field.grow("parts", LONG_PARTS if Store.long else PARTS)
    for number, family in enumerate(families):
        seed = family.seed
        hold = number % 2 == 0
        if not hold:
            field.open(seed)
        field.add(family.top, closure=False)
        with ExitStack() as stack:
            builds = [stack.enter_context(field.building(above, "user", seed))]
            if hold:
                field.await_builders([seed])
            with field.adding(family.leaf):
                builds.append(stack.enter_context(field.building(above, "user", seed)))
            field.open(seed)
            assert [finish(build) for build in builds] == [[family.user]] * 2
        field.check(above, family.leaf, family.top, family.user)
        await_no_whiteouts(above)
    collect(above)
    collect_all(above)


def test_a_connection_that_heard_of_a_part_too_early_holds_nobody_up(
    field: Field, above: OverlayStore
) -> None:
    (family,) = field.grow("early", 1)
    with Connection(field.lab.socket, PATIENCE) as early:
        assert not early.is_valid(family.leaf)
        field.add(family.top, closure=False)
        field.add(family.leaf)
        wait_until("it is valid", lambda: field.is_valid(family.top), PATIENCE)
        with field.building(above, "user", family.seed) as build:
            assert finish(build) == [family.user]
        assert early.valid_paths([family.leaf, family.top]) == ()
        assert (above.is_above(family.leaf), above.is_above(family.top)) == (False, False)
    field.check(above, family.leaf, family.top, family.user)
    collect(above)
    collect_all(above)
    await_no_whiteouts(above)


def test_what_is_to_be_built_later_is_used_by_another_before(field: Field, above: OverlayStore) -> None:
    """A Nix that was told that a path is absent finds, when it comes to it, that another relies on it."""
    seed = f"later-{field.salt}"
    field.open(seed)
    (late,) = field.build("late", seed)
    field.close()
    with field.building(above, "late", seed) as first:
        field.await_builders([seed])
        field.add(late)
        wait_until("it is valid", lambda: field.is_valid(late), PATIENCE)
        with field.building(above, "last", seed) as second:
            field.await_builders([f"last-{seed}"])
            field.open(seed)
            assert finish(first) == [late]
            field.open(f"last-{seed}")
            (last,) = finish(second)
    assert (above.real(last) / "text").read_text() == f"late {seed}\n"
    assert not above.is_above(late)
    field.check(above, late)
    collect(above)
    collect_all(above)
    await_no_whiteouts(above)
