"""Nix builds and collects above a mount that grows below it, by the very paths that it is building."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.commands import Store

from .lab import Lab, OverlayStore
from .tool import wait_until
from .trees import differences, snapshot

GROWING = Path(__file__).with_name("growing.nix")
PATIENCE = 60.0
ROUNDS = 5
LONG_ROUNDS = 200
AT_ONCE = 2
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
    """A lab, and the gate that holds builds of leaves up until they are let through."""

    lab: Lab
    gate: Path

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

    def close(self) -> None:
        for file in self.gate.iterdir():
            file.unlink()

    def grow(self, prefix: str, count: int) -> list[Family]:
        """Build families in the chroot store; the gate is closed again then."""
        seeds = [f"{prefix}{i}" for i in range(count)]
        self.open(*seeds)
        build = self.lab.store.run
        users = build(*self.words("user", *seeds)).split()
        leaves, tops = (build(*self.words(which, *seeds)).split() for which in ("leaf", "top"))
        self.close()
        return [Family(*each) for each in zip(seeds, leaves, tops, users, strict=True)]

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
    def importing(self, *paths: str) -> Iterator[None]:
        """Add paths below meanwhile."""
        cidfs = self.lab.cidfs
        command = cidfs.command("import", "--from", self.lab.store.root, *paths)
        with subprocess.Popen(command, env=cidfs.environment, stdout=subprocess.DEVNULL) as process:
            yield
        assert process.returncode == 0

    def check(self, store: OverlayStore, *paths: str) -> None:
        """Compare what the overlay shows of some paths with the chroot store."""
        for path in paths:
            assert differences(snapshot(self.lab.store.real(path)), snapshot(store.real(path))) == []


@pytest.fixture(scope="module")
def field(lab: Lab) -> Field:
    gate = lab.at / "gate"
    gate.mkdir(exist_ok=True)
    return Field(lab, gate)


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


def finish(process: subprocess.Popen[bytes]) -> list[str]:
    """Wait for a Nix to end well, and return what it printed."""
    out, err = process.communicate(timeout=2 * PATIENCE)
    said = err.decode(errors="replace")
    assert process.returncode == 0, f"{process.args!r} ended with {process.returncode}: {said}"
    assert [word for word in COMPLAINTS if word in said] == [], said
    return out.decode().split()


def collect(store: OverlayStore) -> str:
    """Collect garbage, and return what Nix says."""
    done = store.attempt("nix-store", "--gc")
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    assert [word for word in COMPLAINTS if word in said] == [], said
    if "BUG" in said or store.written(): print("GC", said, store.written(), file=open("/tmp/t2.bug", "a"))
    return said


def await_no_whiteouts(store: OverlayStore) -> None:
    wait_until("no whiteout is left", lambda: store.whiteouts() == [], PATIENCE)


def test_what_is_added_while_it_is_built_and_collected(field: Field, above: OverlayStore) -> None:
    rounds = LONG_ROUNDS if Store.long else ROUNDS
    families = field.grow("grown", rounds * AT_ONCE)
    while_locked = 0
    locked = partial(is_locked, above)
    for number in range(rounds):
        here = families[number * AT_ONCE : (number + 1) * AT_ONCE]
        seeds, leaves = [each.seed for each in here], [each.leaf for each in here]
        tops = [each.top for each in here]
        reached = [field.gate / f"{seed}.reached" for seed in seeds]
        with ExitStack() as stack:
            first = stack.enter_context(field.building(above, "top", *seeds))
            wait_until("the leaves are locked", lambda: all(map(locked, leaves)), PATIENCE)
            if number % 2:
                wait_until("their builders run", lambda: all(map(Path.exists, reached)), PATIENCE)
            builds = [first]
            if number % 3 == 0:
                builds.append(stack.enter_context(field.building(above, "top", *seeds)))
            before = [locked(leaf) for leaf in leaves]
            field.add(*leaves)
            after = [locked(leaf) for leaf in leaves]
            while_locked += sum(a and b for a, b in zip(before, after, strict=True))
            if number % 3 == 1:  # one that knows of nothing that was absent before
                builds.append(stack.enter_context(field.building(above, "user", *seeds)))
            field.open(*seeds)
            printed = [finish(build) for build in builds]
        assert printed[0] == tops
        field.check(above, *leaves, *tops)
        await_no_whiteouts(above)
        with field.importing(*[each.user for each in here]):
            collect(above)
        await_no_whiteouts(above)
        field.check(above, *leaves, *tops, *[each.user for each in here])
    above.run("nix-store", "--verify", "--check-contents")
    assert above.whiteouts() == []
    assert while_locked >= rounds
