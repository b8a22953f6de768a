"""Overlays: `cidfs overlay`, `cidfs remount`, `cidfs umount` of one, and what the kernel does of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cidfs.errors import (
    MountFailed,
    MountPointAbsent,
    NotPermitted,
    UsageError,
    exit_code,
)
from cidfs.mount import mountinfo
from cidfs.mount.overlay import overlay_at, reconfigure, take_out, whiteouts
from cidfs.mount.overlay_plan import OverlayPlan, mount_overlay, plan, store_uri
from tests.commands import Store, environment, wait_until
from tests.system.quick import forks, store
from tests.system.support import alive, error_of, make_files, mount, mounted, umount

__all__ = ["forks", "store"]

ROLES = ("merged", "upper", "work", "mount")
REMOUNT = "from cidfs.__main__ import remount; remount()"


@dataclass(frozen=True)
class Layers:
    """An overlay of three folders, without cidfs."""

    lower: Path
    upper: Path
    merged: Path


@pytest.fixture
def layers(tmp_path: Path, root: None) -> Iterator[Layers]:
    here = tmp_path.resolve() / "three layers"
    for name in ("lower", "upper", "work", "merged", "again"):
        (here / name).mkdir(parents=True)
    options = f"lowerdir={here}/lower,upperdir={here}/upper,workdir={here}/work"
    mount("-t", "overlay", "-o", options, "overlay", here / "merged")
    yield Layers(here / "lower", here / "upper", here / "merged")
    for line in reversed(mountinfo.mounts()):
        if line.mountpoint.startswith(f"{here}/"):
            umount(line.mountpoint)


def flags_of(folder: Path) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Return place, flags and options of all mounts at a folder or below it."""
    return [
        (info.mountpoint, info.flags, info.options)
        for info in mountinfo.mounts()
        if f"{info.mountpoint}/".startswith(f"{folder}/")
    ]


# --- the kernel's part: remounting and whiteouts


def test_a_remounted_overlay_forgets_which_names_were_absent(layers: Layers) -> None:
    late = layers.merged / "late"
    assert error_of(late.stat) == "ENOENT"
    (layers.lower / "late").write_text("late")
    assert error_of(late.stat) == "ENOENT", "the kernel has looked again by itself"
    reconfigure(str(layers.merged))
    assert late.read_text() == "late"
    assert list(layers.upper.iterdir()) == []


def test_a_remount_leaves_a_read_only_mount_above_and_the_overlay_below_as_they_are(layers: Layers) -> None:
    other = layers.merged.parent / "again"
    mount("--bind", layers.merged, other)
    mount("--bind", layers.merged, layers.merged)
    mount("-o", "remount,ro,bind", layers.merged)
    before = flags_of(layers.merged.parent)
    assert [flags[0] for _, flags, _ in before] == ["rw", "rw", "ro"]
    assert error_of((layers.merged / "late").stat) == "ENOENT"
    (layers.lower / "late").write_text("late")
    reconfigure(str(layers.merged))
    assert (layers.merged / "late").read_text() == "late"
    assert flags_of(layers.merged.parent) == before
    assert list(layers.upper.iterdir()) == []
    (other / "written").write_text("x")
    assert (layers.merged / "written").read_text() == "x"
    assert error_of((layers.merged / "refused").mkdir) == "EROFS"


def test_only_overlays_are_remounted(layers: Layers) -> None:
    (layers.merged / "inside").mkdir()
    for where in (layers.lower, layers.lower / "none"):
        with pytest.raises(MountPointAbsent, match=str(where)):
            reconfigure(str(where))
    with pytest.raises(MountFailed, match="inside"):
        reconfigure(str(layers.merged / "inside"))


def test_whiteouts_are_found_and_taken_out(layers: Layers) -> None:
    names = [b"new\nline", b"latin\xe9", b"plain"]
    make_files(layers.lower, {name: name for name in names})
    merged = os.fsencode(layers.merged)
    for name in names:
        os.unlink(os.path.join(merged, name))
    (layers.merged / "kept").write_text("kept")
    upper = str(layers.upper)
    assert sorted(whiteouts(upper)) == sorted(names)
    assert whiteouts(upper, [b"kept", b"none", b"plain"]) == [b"plain"]
    assert not take_out(upper, b"kept")
    assert not take_out(upper, b"none")
    assert [take_out(upper, name) for name in names] == [True] * 3
    assert not take_out(upper, b"plain")
    reconfigure(str(layers.merged))
    assert sorted(os.listdir(merged)) == sorted([b"kept", *names])
    assert os.listdir(upper) == ["kept"]


def test_a_device_of_another_number_is_no_whiteout(layers: Layers) -> None:
    os.mknod(layers.upper / "null", 0o020666, os.makedev(1, 3))
    assert whiteouts(str(layers.upper)) == []
    assert not take_out(str(layers.upper), b"null")


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/a", b"a\0b"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(UsageError):
        take_out(str(tmp_path), name)


def test_an_upper_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "link").symlink_to("upper")
    for where in ("link", "none"):
        with pytest.raises(MountFailed, match=where):
            take_out(str(tmp_path / where), b"name")
        with pytest.raises(MountFailed, match=where):
            whiteouts(str(tmp_path / where))


# --- the store URI


def a_plan(merged: str, store_dir: str = "/nix/store") -> OverlayPlan:
    return OverlayPlan(Path(merged), Path("/u"), Path("/w"), Path("/m%"), store_dir)


@pytest.mark.parametrize(
    ("merged", "store_dir", "upper", "lower"),
    [
        ("/r/nix/store", "/nix/store", {"root": ["/r"]}, {}),
        ("/nix/store", "/nix/store", {}, {}),
        ("/elsewhere", "/nix/store", {"real": ["/elsewhere"]}, {}),
        (
            "/r/nix/store",
            "/my/store",
            {"store": ["/my/store"], "real": ["/r/nix/store"]},
            {"store": ["/my/store"]},
        ),
    ],
)
def test_nix_is_told_where_it_all_is(
    merged: str, store_dir: str, upper: dict[str, list[str]], lower: dict[str, list[str]]
) -> None:
    uri = store_uri(a_plan(merged, store_dir), Path("/s é&?"), state=Path("/d b"), hook="/h")
    assert uri.startswith("local-overlay://?")
    found = parse_qs(uri.partition("?")[2], strict_parsing=True)
    below = urlsplit(found.pop("lower-store")[0])
    assert found == {**upper, "state": ["/d b"], "upper-layer": ["/u"], "remount-hook": ["/h"]}
    assert (below.scheme, unquote(below.path)) == ("unix", "/s é&?")
    assert parse_qs(below.query) == {**lower, "real": ["/m%"]}


# --- what is refused


def plan_of(folders: dict[str, Path]) -> OverlayPlan:
    merged, upper, work, below = (folders[role] for role in ROLES)
    return plan(merged, upper, work, below, "/nix/store")


@pytest.mark.parametrize("name", ["a b", "a,b", "a:b", "a\\b", "a\tb", "a+b", "a(b", "a[b", "a$"])
@pytest.mark.parametrize("role", ROLES)
def test_names_that_nix_would_not_find_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, role: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folders = {key: tmp_path / key for key in ROLES}
    folders[role] /= name
    with pytest.raises(UsageError, match="path") as refused:
        plan_of(folders)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("outer", "inner"), list(permutations(ROLES, 2)))
@pytest.mark.parametrize("below", ["", "x"])
def test_folders_in_one_another_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str, inner: str, below: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folders = {key: tmp_path / key for key in ROLES}
    folders[inner] = folders[outer] / below
    with pytest.raises(UsageError, match="must not be"):
        plan_of(folders)


def test_only_root_mounts_overlays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPermitted):
        plan(tmp_path / "m", tmp_path / "u", tmp_path / "w", tmp_path / "c", "/nix/store")


@pytest.mark.usefixtures("root")
def test_a_file_system_that_can_be_no_upper_is_refused(tmp_path: Path) -> None:
    here = tmp_path.resolve()
    (here / "ram").mkdir()
    mount("-t", "ramfs", "ram", here / "ram")
    try:
        unfit = OverlayPlan(here / "m", here / "ram/u", here / "ram/w", here / "c", "/nix/store")
        with pytest.raises(UsageError, match="extended attributes"):
            mount_overlay(unfit)
        assert os.listdir(here / "ram/w") == []
        parted = OverlayPlan(here / "m", here / "u", here / "ram/w", here / "c", "/nix/store")
        with pytest.raises(UsageError, match="same mount"):
            mount_overlay(parted)
        (here / "w").mkdir()
        (here / "w" / "mine").touch()
        used = OverlayPlan(here / "m", here / "u", here / "w", here / "c", "/nix/store")
        with pytest.raises(UsageError, match="'mine'"):
            mount_overlay(used)
    finally:
        umount(here / "ram")


# --- the commands


@dataclass(frozen=True)
class Place:
    """A mounted store, and the folders for an overlay on it."""

    store: Store
    lower: Path
    merged: Path
    upper: Path
    work: Path

    def words(self) -> tuple[str | Path, ...]:
        return ("overlay", self.merged, "--upper", self.upper, "--work", self.work)

    def add(self, name: str) -> str:
        (base,) = self.store.add(make_files(self.store.state.parent / name, {b"file": name.encode()}))
        return base


@pytest.fixture
def place(store: Store, mountpoint: Path, root: None) -> Iterator[Place]:
    here = store.state.parent.resolve()
    (here / "root/nix/store").mkdir(parents=True)
    found = Place(store, mountpoint, here / "root/nix/store", here / "up/per", here / "work")
    found.add("first")
    store.mount(mountpoint)
    yield found
    if overlay_at(found.merged) is not None:
        store.run("umount", found.merged)


def test_an_overlay_is_mounted_named_used_remounted_and_taken_down(place: Place) -> None:
    store, merged = place.store, place.merged
    (uri,) = store.lines(*place.words())
    query = parse_qs(uri.removeprefix("local-overlay://?"), strict_parsing=True)
    hook = query.pop("remount-hook", [])
    assert query == {
        "root": [str(store.state.parent / "root")],
        "lower-store": [f"unix://{store.state}/nix.sock?real={place.lower}"],
        "upper-layer": [str(place.upper)],
    }
    assert all(os.access(program, os.X_OK) for program in hook)
    ((source, _, kind, options),) = mounted(merged)
    assert (source, kind) == ("overlay", "overlay")
    assert {f"lowerdir={place.lower}", f"upperdir={place.upper}"} <= set(options.split(","))

    (merged / "written").mkdir()
    assert os.listdir(place.upper) == ["written"]
    name = place.add("second")
    store.run("remount", merged)
    assert (merged / name / "file").read_text() == "second"

    assert str(merged) in store.error("umount", place.lower, code=22)
    with open(merged / name / "file"):
        assert "--lazy" in store.error("umount", merged, code=22)
    store.run("umount", merged)
    assert mounted(merged) == []
    store.error("umount", merged, code=21)
    store.run(*place.words())  # with the upper and work folder of before
    assert (merged / "written").is_dir()


def test_what_cannot_be_is_one_line(place: Place) -> None:
    store, merged, work = place.store, place.merged, ("--work", place.work)
    free = merged.parent / "free"
    free.mkdir()
    store.error("overlay", merged, "--upper", place.lower / "u", *work, code=2)
    store.error("overlay", merged.parent / "none", "--upper", place.upper, *work, code=21)
    store.error(*place.words(), "--mount", free, code=21)
    store.error("remount", merged, code=21)
    store.error("remount", place.lower, code=21)
    assert not place.upper.exists()
    store.run(*place.words())
    assert "already" in store.error(*place.words(), code=22)
    store.error("overlay", free, "--upper", place.upper, "--work", merged.parent / "w", code=22)


def test_which_mount_is_below_must_be_clear(place: Place) -> None:
    store = place.store
    other = place.merged.parent / "other"
    other.mkdir()
    store.mount(other)
    assert "--mount" in store.error(*place.words(), code=2)
    assert "--nix-socket" in store.error(*place.words(), "--mount", other, code=20)  # it has none
    (uri,) = store.lines(
        *place.words(), "--mount", other, "--nix-socket", "/run/s.sock", "--nix-state", "/var/s"
    )
    query = parse_qs(uri.removeprefix("local-overlay://?"), strict_parsing=True)
    assert query["lower-store"] == [f"unix:///run/s.sock?real={other}"]
    assert query["state"] == ["/var/s"]
    store.run("umount", place.merged)
    store.umount(other)
    store.umount(place.lower)
    assert "cidfs mount" in store.error(*place.words(), code=21)


def test_a_read_only_mount_over_the_overlay_goes_with_it(place: Place) -> None:
    place.store.run(*place.words())
    mount("--bind", place.merged, place.merged)
    mount("-o", "remount,ro,bind", place.merged)
    place.store.run("umount", place.merged)
    assert mounted(place.merged) == []


def test_a_lazy_umount_takes_an_overlay_from_sight_while_it_is_used(place: Place) -> None:
    place.store.run(*place.words())
    (place.merged / "used").write_text("used")
    with open(place.merged / "used") as file:
        place.store.run("umount", "--lazy", place.merged)
        assert mounted(place.merged) == []
        assert file.read() == "used"


def test_the_remount_hook(place: Place) -> None:
    place.store.run(*place.words())

    def hook(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", REMOUNT, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)

    assert error_of((place.merged / "late").stat) == "ENOENT"
    (place.upper / "late").write_text("put there behind the overlay's back")
    assert error_of((place.merged / "late").stat) == "ENOENT"
    done = hook(place.merged)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (place.merged / "late").exists()
    done = hook(place.lower)
    assert done.returncode == exit_code(MountPointAbsent())
    assert done.stderr == f"cidfs: {place.lower}: no overlay is mounted there\n"
    assert hook().returncode == exit_code(UsageError())


def test_a_remount_waits_for_look_ups_under_way(place: Place) -> None:
    """What a look-up was told before the remount is not what is known after it."""
    place.store.run(*place.words())
    (daemon,) = place.store.daemon_pids()
    started = []

    def start(code: str) -> int:
        command = [sys.executable, "-c", code, str(place.merged)]
        started.append(subprocess.Popen(command, env=environment()))
        return started[-1].pid

    def waits_in(pid: int, *where: str) -> bool:
        assert alive(pid), "it did not wait"
        return any(name in Path(f"/proc/{pid}/wchan").read_text() for name in where)

    os.kill(daemon, signal.SIGSTOP)
    try:
        asks = start("import os, sys; os.path.exists(f'{sys.argv[1]}/{\"0\" * 32}-asked')")
        wait_until(lambda: waits_in(asks, "request_wait_answer"))
        remounts = start(REMOUNT)
        wait_until(lambda: waits_in(remounts, "path_openat", "open_last_lookups", "rwsem"))
    finally:
        os.kill(daemon, signal.SIGCONT)
        codes = [process.wait(30) for process in started]
    assert codes == [0, 0]


@pytest.mark.usefixtures("root")
def test_overlays_on_something_else_are_none_of_its_business(store: Store, layers: Layers) -> None:
    assert overlay_at(layers.merged) is None
    assert "overlay" in store.error("umount", layers.merged, code=21)
    assert mountinfo.mounted_at(layers.merged) is not None
