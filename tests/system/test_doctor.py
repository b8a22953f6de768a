"""`cidfs doctor`: what is wrong is found, each thing with what to do, whatever does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cidfs.doctor import bounded, findings, nix
from cidfs.doctor.findings import FAILURE, OK, WARNING, Finding
from cidfs.errors import Unhealthy, exit_code
from cidfs.local.journal import Journal
from tests.commands import Failed, Store, environment, unmount_left_over, wait_until
from tests.system.forks import Forks, forked_store_in
from tests.system.quick import forks
from tests.system.support import alive, make_files, mount, mounted, umount

__all__ = ["forks"]

UNHEALTHY = exit_code(Unhealthy())
OF_THIS_MACHINE = {"settings", "room"}  # its Nix may be set up in any way, its disk be nearly full
HOLD_THE_LOCK = """
import signal, sys
from pathlib import Path
from cidfs.local.state import StateFolder
with StateFolder.open(Path(sys.argv[1])).write_lock(60):
    print("held", flush=True)
    signal.pause()
"""
LET_GO = """awk -v inside="$1/" '$3 ~ /^(fuse|overlay)/ && index($2, inside) != 1 {print $2}' \\
    /proc/self/mounts | tac | xargs -r umount -l"""


@dataclass(frozen=True)
class Place:
    """A store with one path that is mounted, and an overlay on the mount."""

    store: Store
    name: str

    @property
    def folder(self) -> Path:
        return self.store.state.parent

    @property
    def mountpoint(self) -> Path:
        return self.folder / "mnt"

    @property
    def merged(self) -> Path:
        return self.folder / "root/nix/store"

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    def mount(self) -> None:
        self.store.mount(self.mountpoint)

    def overlay(self) -> None:
        self.store.run("overlay", self.merged, "--upper", self.upper, "--work", self.folder / "work")

    def daemon(self) -> tuple[int, int, int]:
        """Return the processes of the mount: the daemon, its parent, the metadata process."""

        def both() -> tuple[int, int] | None:
            stats = self.store.stats()["daemon"]
            return (stats["pid"], stats["nix"]["pid"]) if stats["nix"]["pid"] else None

        wait_until(lambda: both() is not None, 60)
        found = both()
        assert found is not None
        (lease,) = (self.store.state / "run").glob("holder-*.lease")
        return found[0], json.loads(lease.read_text())["pid"], found[1]


def examine(store: Store) -> list[Finding]:
    """Return what `doctor --json` found; the exit code must fit."""
    done = store.execute(["doctor", "--json"], b"", None, 120)
    answer = json.loads(done.stdout)
    found = [Finding(**each) for each in answer["findings"]]
    assert answer["schema"] == 1
    assert answer["state"] == str(store.state)
    assert answer["failures"] == findings.count(found, FAILURE)
    assert done.returncode == (UNHEALTHY if answer["failures"] else 0), done.stderr.decode()
    assert all(finding.advice for finding in found if finding.level != OK)
    return found


def wrong(store: Store, *checks: str, apart: int = 0) -> dict[str, Finding]:
    """Wait until just these checks have found something that is not well, one thing each; return it.

    At a busy moment an answer may be late, and that is found, too. Without what other processes than apart
    have in mount namespaces of their own: each Nix that runs in another test has copies of all mounts, and
    goes on with what was unmounted meanwhile.
    """
    found: list[Finding] = []

    def is_so() -> bool:
        found[:] = [
            f
            for f in examine(store)
            if f.level != OK and f.check not in OF_THIS_MACHINE and _apart(f) in (0, apart)
        ]
        return sorted(f.check for f in found) == sorted(checks)

    with contextlib.suppress(Failed):
        wait_until(is_so, 60)
    assert sorted(f.check for f in found) == sorted(checks), found
    return {finding.check: finding for finding in found}


def _apart(finding: Finding) -> int:
    """Return the process with a mount namespace of its own that a finding is about; 0 for none."""
    named = re.search(r": (?:process|an overlay in the mount namespace of process) (\d+) \(", finding.what)
    return int(named[1]) if finding.check == "overlay" and named else 0


@contextlib.contextmanager
def place_in(folder: Path, forks: Forks) -> Iterator[Place]:
    with forked_store_in(folder.resolve(), forks) as store:
        make_files(store.state.parent / "tree", {b"file": b"contents"})
        (name,) = store.add(store.state.parent / "tree")
        here = Place(store, name)
        here.mountpoint.mkdir()
        here.merged.mkdir(parents=True)
        here.mount()
        here.overlay()
        yield here
        unmount_left_over(here.merged.parent)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Place]:
    """A place that every test leaves as it was."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with place_in(tmp_path_factory.mktemp("doctor"), forks) as here:
        here.store.log_expected = True
        yield here


@pytest.fixture
def place(tmp_path: Path, forks: Forks, root: None) -> Iterator[Place]:
    """A place that a test may break."""
    with place_in(tmp_path, forks) as here:
        here.store.log_expected = True
        yield here


@pytest.fixture
def store(tmp_path: Path, forks: Forks) -> Iterator[Store]:
    """A store that is not mounted."""
    with forked_store_in(tmp_path.resolve(), forks) as here:
        yield here


# --- mounts


def test_all_is_well(lasting: Place) -> None:
    lasting.daemon()  # all of its processes are there
    assert wrong(lasting.store) == {}
    found = examine(lasting.store)
    assert {f.check for f in found} >= {
        *("kernel", "fuse", "store", "room", "lock", "index", "journal"),
        *("daemon", "mount", "holder", "nix", "overlay", "whiteout"),
    }
    lines = lasting.store.lines("doctor")
    assert f"ok       mount: {lasting.mountpoint}: answers" in lines
    assert f"ok       overlay: {lasting.merged}: answers" in lines


def test_a_stopped_daemon_is_found_and_can_be_given_up(place: Place) -> None:
    daemon, _, _ = place.daemon()
    connections = place.folder / "connections"
    connections.mkdir()
    mount("-t", "fusectl", "fusectl", connections)
    os.kill(daemon, signal.SIGSTOP)
    try:
        reader = subprocess.Popen(["cat", place.mountpoint / place.name / "file"], stderr=subprocess.PIPE)
        wait_until(lambda: "request_wait" in Path(f"/proc/{reader.pid}/wchan").read_text(), 60)
        found = wrong(place.store, "daemon")
        advice = found["daemon"].advice
        assert f"`kill -CONT {daemon}`" in advice
        abort = Path(advice.partition("echo 1 > ")[2].rstrip("`"))
        assert (abort.parent.parent, abort.name) == (connections, "abort")
        assert reader.poll() is None
        abort.write_text("1")
        _, complaint = reader.communicate(timeout=60)
        assert reader.returncode == 1
        assert b"connection abort" in complaint or b"not connected" in complaint
    finally:
        os.kill(daemon, signal.SIGCONT)
        umount(connections)
    wait_until(lambda: not alive(daemon), 60)


def test_processes_that_died_are_found_and_the_advice_mends_it(place: Place) -> None:
    store = place.store
    daemon, _, metadata = place.daemon()
    os.kill(metadata, signal.SIGKILL)
    wait_until(lambda: store.stats()["daemon"]["nix"]["restarts"] == 1, 60)
    place.daemon()
    found = wrong(store, "nix", "log")
    assert "died 1 time," in found["nix"].what
    assert "metadata process died" in found["log"].what

    (store.state / "nix.sock").unlink()
    found = wrong(store, "nix", "nix", "log")
    assert "was removed" in found["nix"].what

    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not mounted(place.mountpoint), 60)
    found = wrong(store, "mount", "nix", "overlay", "log")
    assert "daemon died" in found["mount"].what
    assert f"mount {place.mountpoint}`" in found["mount"].advice
    assert f"umount {place.merged}`" in found["overlay"].advice

    store.run("mount", place.mountpoint)  # without taking the dead overlay down first
    found = wrong(store, "overlay", "log")
    assert (found["overlay"].level, found["log"].level) == (FAILURE, WARNING)
    store.run("umount", place.merged)
    place.overlay()
    for log in (store.state / "run").glob("*.log"):
        log.unlink()
    assert wrong(store) == {}


def test_a_dead_parent_is_found(place: Place) -> None:
    _, parent, metadata = place.daemon()
    os.kill(parent, signal.SIGKILL)
    wait_until(lambda: not alive(parent), 60)
    found = wrong(place.store, "holder")
    assert found["holder"].level == FAILURE
    assert "parent" in found["holder"].what
    umount(place.merged)
    place.store.umount(place.mountpoint)
    wait_until(lambda: not alive(metadata), 60)


def test_a_dead_mount_is_found(place: Place) -> None:
    """One whose parent died too: nobody has taken it from sight."""
    daemon, parent, metadata = place.daemon()
    umount(place.merged)
    for pid in (parent, daemon):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not alive(pid), 60)
    wait_until(lambda: not alive(metadata), 60)
    found = wrong(place.store, "mount", "log")
    assert found["log"].level == WARNING
    assert "a dead mount" in found["mount"].what
    assert f"umount {place.mountpoint}`" in found["mount"].advice
    place.store.umount(place.mountpoint)


# --- overlays


def test_a_whiteout_over_a_published_path_is_found(lasting: Place) -> None:
    _, _, metadata = lasting.daemon()
    os.kill(metadata, signal.SIGSTOP)  # it would take it out
    try:
        os.mknod(lasting.upper / lasting.name, 0o020000, 0)
        os.mknod(lasting.upper / f"{'0' * 32}-other", 0o020000, 0)  # of nothing that is published
        found = wrong(lasting.store, "nix", "whiteout")
        assert found["whiteout"].level == WARNING
        assert lasting.name in found["whiteout"].what
        assert "other" not in found["whiteout"].what
        assert f"kill -CONT {metadata}" in found["nix"].advice
    finally:
        os.kill(metadata, signal.SIGCONT)
        (lasting.upper / f"{'0' * 32}-other").unlink()
    wait_until(lambda: not (lasting.upper / lasting.name).exists(), 60)
    assert wrong(lasting.store) == {}


def test_an_overlay_that_nix_would_refuse_is_found(lasting: Place) -> None:
    other = lasting.folder / "other"
    for name in ("merged", "upper", "work"):
        (other / name).mkdir(parents=True)
    (other / "link").symlink_to(lasting.mountpoint)
    options = f"lowerdir={other}/link,upperdir={other}/upper,workdir={other}/work"
    mount("-t", "overlay", "-o", options, "overlay", other / "merged")
    try:
        found = wrong(lasting.store, "overlay")
        assert found["overlay"].level == WARNING
        assert f"{other}/link" in found["overlay"].what
    finally:
        umount(other / "merged")
        shutil.rmtree(other)
    assert wrong(lasting.store) == {}


def test_an_overlay_that_is_covered_is_found(lasting: Place) -> None:
    mount("-t", "tmpfs", "tmpfs", lasting.merged)
    try:
        found = wrong(lasting.store, "overlay")
        assert found["overlay"].level == FAILURE
        assert "tmpfs" in found["overlay"].what
    finally:
        umount(lasting.merged)


def test_an_overlay_that_was_made_read_only_is_found(lasting: Place) -> None:
    mount("-o", "remount,ro", lasting.merged)
    try:
        found = wrong(lasting.store, "overlay")
        assert found["overlay"].level == FAILURE
        assert "read-only" in found["overlay"].what
    finally:
        mount("-o", "remount,rw", lasting.merged)
    assert wrong(lasting.store) == {}


def test_a_read_only_mount_of_the_overlay_over_it_is_none_of_that(lasting: Place) -> None:
    mount("--bind", lasting.merged, lasting.merged)
    mount("-o", "remount,ro,bind", lasting.merged)
    try:
        assert wrong(lasting.store) == {}
    finally:
        umount(lasting.merged)


def test_an_overlay_in_another_namespace_is_found(lasting: Place) -> None:
    other = lasting.folder / "other"
    for name in ("merged", "upper", "work"):
        (other / name).mkdir(parents=True)
    options = f"lowerdir={lasting.mountpoint},upperdir={other}/upper,workdir={other}/work"
    with apart(f"mount -t overlay -o {options} overlay {other}/merged", lasting.folder) as pid:
        found = wrong(lasting.store, "overlay", apart=pid)
        assert found["overlay"].level == WARNING
        assert f"process {pid} " in found["overlay"].what
        assert f"nsenter -t {pid} " in found["overlay"].advice
    shutil.rmtree(other)


def test_who_goes_on_with_a_dead_overlay_is_found(place: Place) -> None:
    """As nix-daemon does, which has a mount namespace of its own."""
    daemon, parent, _ = place.daemon()
    with apart(f"test -d {place.merged}", place.folder) as pid:
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: not mounted(place.mountpoint), 60)
        place.store.run("umount", place.merged)
        place.mount()
        wait_until(lambda: not alive(parent), 60)
        place.overlay()
        place.daemon()
        found = wrong(place.store, "overlay", "log", apart=pid)
        assert found["overlay"].level == FAILURE
        assert f"process {pid} " in found["overlay"].what
    wrong(place.store, "log")


@contextlib.contextmanager
def apart(script: str, folder: Path) -> Iterator[int]:
    """Run a shell in a mount namespace of its own, and yield its number when a script is done there.

    It has no copy of mounts outside of a folder: those would not end as long as it runs.
    """
    script = f"{LET_GO} && {script} && echo done && exec cat"
    command = ["unshare", "-m", "--propagation", "private", "sh", "-ec", script, "sh", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        yield process.pid


# --- the state folder


def test_no_store(store: Store) -> None:
    found = [f for f in examine(store) if f.level == FAILURE]
    assert [f.check for f in found] == ["store"]
    assert "no store here" in found[0].what
    assert not store.state.exists()
    line = store.error("doctor", code=UNHEALTHY)
    assert "1 failure" in line


def test_a_store_that_is_not_mounted_is_well(store: Store, tmp_path: Path) -> None:
    store.add(make_files(tmp_path / "tree", {b"file": b"x"}))
    found = examine(store)
    assert [f.what for f in found if f.check == "mount"] == [f"{store.state}: the store is not mounted"]
    assert not [f for f in found if f.level == FAILURE]


def test_a_writer_that_was_stopped_is_found(lasting: Place) -> None:
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(lasting.store.state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        os.kill(process.pid, signal.SIGSTOP)
        found = wrong(lasting.store, "lock")
        assert found["lock"].level == FAILURE
        assert f"kill -CONT {process.pid}" in found["lock"].advice
        process.kill()
    assert wrong(lasting.store) == {}


def test_an_index_that_is_older_than_the_journal_or_damaged_is_found(store: Store, tmp_path: Path) -> None:
    store.add(make_files(tmp_path / "one", {b"file": b"1"}))
    shutil.copytree(store.state / "index", tmp_path / "old")
    store.add(make_files(tmp_path / "two", {b"file": b"2"}))
    assert wrong(store) == {}
    shutil.rmtree(store.state / "index")
    shutil.copytree(tmp_path / "old", store.state / "index")
    found = wrong(store, "index")
    assert "older than the journal" in found["index"].what
    (data,) = (store.state / "index").glob("*/data.mdb")
    os.truncate(data, data.stat().st_size // 2)
    found = wrong(store, "index")
    assert "rebuild" in found["index"].advice
    store.run("rebuild")
    assert wrong(store) == {}


def test_a_journal_that_has_lost_its_end_is_found(store: Store, tmp_path: Path) -> None:
    store.add(make_files(tmp_path / "one", {b"file": b"1"}))
    assert Journal(store.state / "journal").last_serial() == 1
    (last,) = (store.state / "journal").iterdir()
    os.truncate(last, 0)
    found = wrong(store, "journal")
    assert found["journal"].level == FAILURE


def test_what_was_left_behind_is_found(store: Store, tmp_path: Path) -> None:
    store.log_expected = True
    store.add(make_files(tmp_path / "one", {b"file": b"1"}))
    (store.state / "index" / "rebuild-1-ab").mkdir()
    (store.state / "run" / "mount-1.log").write_text("first\nlast words\n")
    (store.state / "ballast").unlink()
    found = {f.check: f for f in examine(store) if f.level == WARNING}
    assert {"leftover", "log"} <= set(found)
    assert found["log"].what.endswith("2 lines; the last one: last words")
    assert "gc" in found["leftover"].advice
    assert "room" in found


# --- the parts


def test_a_look_that_does_not_end_is_given_up() -> None:
    def look() -> Iterator[Finding]:
        yield Finding("one", OK, "seen")
        time.sleep(600)

    found = bounded.look("two", look, 0.5)
    assert [(f.check, f.level) for f in found] == [("one", OK), ("two", FAILURE)]
    assert bounded.errno_of(lambda: time.sleep(600), 0.1) is None


def test_a_look_that_ends_the_process_is_a_failure() -> None:
    def look() -> Iterator[Finding]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield Finding("one", OK, "never")

    def broken() -> Iterator[Finding]:
        yield Finding("one", OK, "seen")
        raise LookupError

    (found,) = bounded.look("two", look, 60)
    assert (found.check, found.level) == ("two", FAILURE)
    assert [f.level for f in bounded.look("two", broken, 60)] == [OK, FAILURE]
    assert bounded.errno_of(lambda: os.lstat("/none/at/all"), 60) == 2
    assert bounded.errno_of(lambda: None, 60) == 0


@pytest.mark.parametrize(
    ("text", "with_overlay", "levels"),
    [
        ("store = local-overlay://?root=/x\n", False, [WARNING]),
        ("auto-optimise-store = true # all of it\n", True, [WARNING]),
        ("auto-optimise-store = true\n", False, [OK]),
        ("# store = local-overlay://\nstore = daemon\n", True, [OK]),
    ],
)
def test_what_nix_conf_must_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, with_overlay: bool, levels: list[str]
) -> None:
    monkeypatch.setenv("NIX_CONF_DIR", str(tmp_path))
    assert list(nix.settings(with_overlay)) == []
    (tmp_path / "nix.conf").write_text(text)
    assert [f.level for f in nix.settings(with_overlay)] == levels


def test_errors_are_what_and_what_to_do() -> None:
    found = findings.of_error("index", Unhealthy("/s: is gone; run this;\nthen that"))
    assert found == Finding("index", FAILURE, "/s: is gone", "run this; then that")
    assert found.line == "failure  index: /s: is gone; run this; then that"
