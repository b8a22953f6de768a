"""A mount below an overlay: names in the merged root, other mounts of the host, and its own interpreter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cidfs.mount import mountinfo
from cidfs.nix.client import Connection
from tests.commands import ROOT, Store, environment, wait_until
from tests.system.support import alive, error_of, make_files, mount, mounted, noise, parent_of, umount

pytestmark = pytest.mark.usefixtures("root")

SECONDS = 60.0
HASH = "0123456789abcdfghijklmnpqrsvwxyz"


@dataclass(frozen=True)
class Lab:
    """A store with a mount and an overlay on it."""

    store: Store
    lower: Path
    merged: Path
    upper: Path

    def add(self, name: str) -> str:
        """Add a small tree of a name of its own; return its base name."""
        folder = make_files(self.store.state.parent / "trees" / name, {b"file": name.encode()})
        (base,) = self.store.add(folder)
        return base

    def is_valid(self, base: str) -> bool:
        """Say whether Nix is told on a new connection that a path is valid."""
        with Connection(self.store.state / "nix.sock", SECONDS) as new:
            return new.is_valid(f"/nix/store/{base}")

    def whiteouts(self) -> list[str]:
        """Return the names of the whiteouts in the upper."""
        return [e.name for e in os.scandir(self.upper) if not (e.is_dir() or e.is_file() or e.is_symlink())]


@pytest.fixture
def lab(store: Store, tmp_path: Path) -> Iterator[Lab]:
    here = tmp_path.resolve()
    for name in ("lower", "root/nix/store", "upper", "work"):
        (here / name).mkdir(parents=True)
    merged = here / "root/nix/store"
    store.mount(here / "lower")
    store.run("overlay", merged, "--upper", here / "upper", "--work", here / "work")
    yield Lab(store, here / "lower", merged, here / "upper")
    while mountinfo.mounted_at(merged) is not None:
        umount(merged)


def flags_at(folder: Path) -> list[tuple[str, ...]]:
    """Return the flags of all mounts at a folder, oldest first."""
    return [info.flags for info in mountinfo.mounts() if info.mountpoint == str(folder)]


def make_names(merged: Path, number: int) -> None:
    """Make, as Nix does, locks, outputs and links of all kinds of names in the merged root; take them out."""
    part = f"{number:04d}{HASH[4:]}"
    for name in (
        f"{part}-tool-1.0.lock",
        f"{part}-tool-1.0.drv.lock",
        f"{part}-tool-1.0.drv.chroot",
        f"{part}-Cargo.lock",
        f".tmp-{number}",
        f"add-{number}",
        "x" * 255,
        "with space\n",
    ):
        place = merged / name
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        os.unlink(place)
        place.mkdir()
        (place / "inside").write_text("built")
        os.rename(place, merged / f"{part}-moved")
        (merged / f"{part}-moved" / "inside").unlink()
        (merged / f"{part}-moved").rmdir()
        place.symlink_to("anywhere")
        place.unlink()


def test_any_name_can_be_made_whatever_the_daemon_is_busy_with(lab: Lab) -> None:
    """It reads, grows, and is told to use another index, and then finds that damaged."""
    lab.store.log_expected = True
    big = make_files(lab.store.state.parent / "big", {b"%d" % i: noise(i, 3 << 20) for i in range(8)})
    (name,) = lab.store.add(big)
    over = threading.Event()
    failed: list[BaseException] = []

    def read() -> None:
        while not over.is_set():
            for i in range(8):
                with open(lab.lower / name / str(i), "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    file.read()

    def grow() -> None:
        for i in range(4):
            assert (lab.merged / lab.add(f"grown-{i}") / "file").read_text() == f"grown-{i}"
            lab.store.run("rebuild")

    def work(what: object) -> None:
        try:
            assert callable(what)
            what()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(each,)) for each in (read, grow)]
    for thread in threads:
        thread.start()
    number = 0
    while threads[1].is_alive():
        make_names(lab.merged, number % 9000)
        number += 1
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert number > 10
    # rows that are not what they were: absent, and no error
    (index,) = [p for p in (lab.store.state / "index").iterdir() if p.is_dir()]
    raw = bytearray((index / "data.mdb").read_bytes())
    at = raw.find(name[:32].encode())
    with open(index / "data.mdb", "r+b") as file:
        while at >= 0:
            file.seek(at + 40)
            file.write(b"damaged?")
            at = raw.find(name[:32].encode(), at + 1)
    for number in range(20):
        make_names(lab.merged, 9000 + number)
    assert lab.whiteouts() == []


def test_growth_below_a_read_only_bind_as_nixos_makes_it(lab: Lab) -> None:
    mount("--bind", lab.merged, lab.merged)
    mount("-o", "remount,ro,bind", lab.merged)
    before = flags_at(lab.merged)
    names = [lab.add(f"early-{i}") for i in range(2)]
    lab.store.run("remove", "--force", *names)
    for name in names:
        wait_until(lambda name=name: not (lab.merged / name).exists(), SECONDS)  # and it is remembered
    for i, name in enumerate(names):
        assert lab.add(f"early-{i}") == name
        assert lab.is_valid(name)
        assert (lab.merged / name / "file").read_text() == f"early-{i}"
    assert lab.store.stats()["daemon"]["overlays"]["remounts"] > 0
    assert flags_at(lab.merged) == before
    # as nix-daemon does it: writable, in a namespace of its own
    script = (
        f"mount -o remount,rw,bind {lab.merged} && mkdir {lab.merged}/built && touch {lab.merged}/built/it"
    )
    subprocess.run(["unshare", "-m", "--propagation", "private", "sh", "-ec", script], check=True)
    assert (lab.upper / "built/it").exists()
    assert flags_at(lab.merged) == before
    umount(lab.merged)


def test_an_overlay_whose_mount_was_ended_is_named_and_can_be_taken_down(lab: Lab) -> None:
    lab.store.log_expected = True
    base = lab.add("tree")
    (daemon,) = lab.store.daemon_pids()
    parent = parent_of(daemon)
    os.kill(parent, signal.SIGTERM)
    wait_until(lambda: not alive(parent), SECONDS)
    lab.store.mounts.clear()
    assert error_of((lab.merged / base).stat) == "ENOTCONN"
    assert f"`cidfs umount {lab.merged}`" in lab.store.log_text()
    said = lab.store.run("doctor", code=19).stdout.decode()
    assert f"{lab.merged}: the overlay is dead" in said
    lab.store.run("umount", lab.merged)
    assert mounted(lab.merged) == []
    lab.store.mount(lab.lower)
    lab.store.run("overlay", lab.merged, "--upper", lab.upper, "--work", lab.upper.with_name("work"))
    assert (lab.merged / base / "file").read_text() == "tree"


def test_nothing_is_mounted_where_it_would_break_an_overlay(lab: Lab) -> None:
    here = lab.upper.parent
    for place in (lab.merged, lab.upper, here / "work"):
        assert f"the overlay at {lab.merged}" in lab.store.error("mount", place, code=22)
    (here / "again").mkdir()
    for upper in (lab.upper, lab.upper / "inside", here / "work"):
        words: list[str | Path] = [
            "overlay",
            here / "again",
            "--upper",
            upper,
            "--work",
            here.with_name(f"{here.name}-work"),
        ]
        assert str(lab.merged) in lab.store.error(*words, code=22)
    assert mounted(here / "again") == []


def test_what_the_host_unmounts_is_gone_from_all_processes(store: Store, tmp_path: Path) -> None:
    here = tmp_path.resolve()
    for name in ("shared", "lower"):
        (here / name).mkdir()
    mount("-t", "tmpfs", "shared", here / "shared")
    mount("--make-shared", here / "shared")
    try:
        (here / "shared/stick").mkdir()
        mount("-t", "tmpfs", "stick", here / "shared/stick")
        store.mount(here / "lower")
        (daemon,) = store.daemon_pids()
        pids = daemon, parent_of(daemon), store.stats()["daemon"]["nix"]["pid"]
        assert all(mounted(here / "shared/stick", pid) for pid in pids)
        umount(here / "shared/stick")
        assert [mounted(here / "shared/stick", pid) for pid in pids] == [[], [], []]
    finally:
        umount("-R", here / "shared")


def test_its_own_interpreter_may_lie_below_the_overlay(store: Store, tmp_path: Path) -> None:
    """The store directory holds all that runs the mount; then the overlay is mounted over it."""
    store.log_expected = True  # a process is killed
    here = tmp_path.resolve()
    store_dir = here / "nix/store"
    home = store_dir / f"{HASH}-python"
    parts = {"usr": Path("/usr"), "packages": Path(sysconfig.get_path("purelib")), "source": ROOT}
    for name in (*parts, "lower", "upper", "work"):
        (home / name if name in parts else here / name).mkdir(parents=True)
    program = Path(sys.executable).resolve()
    if not program.is_relative_to("/usr"):
        parts["usr"] = Path(sys.base_prefix)
    for name, folder in parts.items():
        mount("--bind", folder, home / name)
    config = here / "cidfs.toml"
    config.write_text(f'[store]\nstore_dir = "{store_dir}"\n')
    tree = make_files(here / "tree", {b"file": b"in the store"})
    common = ["--config", str(config)]
    try:
        (base,) = [Path(line).name for line in store.lines(*common, "add", tree)]
        python = home / "usr" / program.relative_to(parts["usr"])
        inside: list[str | Path] = [python, "-m", "cidfs", "--state", store.state]
        more = {
            "PYTHONHOME": str(home / "usr"),
            "PYTHONPATH": f"{home}/source:{home}/packages",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        env = {**environment(), **more}
        subprocess.run([*inside, *common, "mount", here / "lower"], check=True, env=env)
        store.mounts.append(here / "lower")
        (daemon,) = store.daemon_pids()
        assert str(home) in Path(f"/proc/{daemon}/maps").read_text()
        parent = parent_of(daemon)
        layers = ("--upper", here / "upper", "--work", here / "work", "--mount", here / "lower")
        store.run(*common, "overlay", store_dir, *layers)
        assert not home.exists()  # nothing of what they run on can be seen any more

        with Connection(store.state / "nix.sock", SECONDS) as early:
            assert early.is_valid(f"{store_dir}/{base}")
            assert (store_dir / base / "file").read_text() == "in the store"
            tree2 = make_files(here / "tree2", {b"file": b"later"})
            (store_dir / "looked-up").exists()
            (later,) = [Path(line).name for line in store.lines(*common, "add", tree2)]
            assert early.is_valid(f"{store_dir}/{later}")
            assert (store_dir / later / "file").read_text() == "later"
        nix = store.stats()["daemon"]["nix"]["pid"]
        os.kill(nix, signal.SIGKILL)
        wait_until(lambda: not alive(nix), SECONDS)
        with Connection(store.state / "nix.sock", SECONDS) as again:
            assert again.is_valid(f"{store_dir}/{later}")
        store.run(*common, "remove", "--force", later)
        wait_until(lambda: not (store_dir / later).exists(), SECONDS)
        assert [Path(line).name for line in store.lines(*common, "add", tree2)] == [later]
        with Connection(store.state / "nix.sock", SECONDS) as new:
            assert new.is_valid(f"{store_dir}/{later}")  # absent before: the overlay was told
        assert (store_dir / later / "file").read_text() == "later"
        store.run(*common, "umount", store_dir)
        store.run(*common, "umount", here / "lower")
        store.mounts.clear()
        for pid in (daemon, parent):
            wait_until(lambda pid=pid: not alive(pid), SECONDS)
        assert list(store.state.glob("nix.sock*")) == []
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            while (top := mountinfo.mounted_at(store_dir)) is not None and top.type == "overlay":
                umount("-l", store_dir)
        for name in parts:
            umount("-l", home / name)
