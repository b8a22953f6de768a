"""Daemons that are stopped, descriptors that are closed or full, a next-inode that is gone."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import Store


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "greeting").write_text("hello\n")
    return folder


def _shell(store: Store, words: str, redirection: str) -> subprocess.CompletedProcess[bytes]:
    command = f"{shlex.join(store.command(*shlex.split(words)))} {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)


def test_a_mount_point_with_a_stopped_daemon_is_refused_at_once(
    store: Store, mountpoint: Path, package: Path
) -> None:
    store.add(package)
    store.mount(mountpoint)
    (pid,) = store.daemon_pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "mounted there already" in store.error("mount", mountpoint, code=22, timeout=30)
        assert store.lines("ls")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert os.listdir(mountpoint) == [".links"]


@pytest.mark.parametrize("words", ["ls", "stats", "stats --json", "verify"])
def test_commands_work_with_closed_descriptors(store: Store, package: Path, words: str) -> None:
    store.add(package)
    for redirection in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = _shell(store, words, redirection)
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr + done.stdout


def test_an_error_with_closed_or_full_standard_error_keeps_its_exit_code(store: Store) -> None:
    for redirection in ("2>&-", "2>/dev/full"):
        done = _shell(store, "ls", redirection)
        assert (done.returncode, done.stdout) == (10, b"")


def test_a_mount_may_be_started_with_all_descriptors_closed(
    store: Store, mountpoint: Path, package: Path
) -> None:
    (base,) = store.add(package)
    assert _shell(store, f"mount {shlex.quote(str(mountpoint))}", "<&- >&- 2>&-").returncode == 0
    store.mounts.append(mountpoint)
    assert (mountpoint / base / "greeting").read_text() == "hello\n"


def test_verify_names_a_damaged_next_inode(store: Store, package: Path) -> None:
    store.add(package)
    (store.state / "next-inode").write_bytes(b"")
    assert b"next-inode" in store.run("verify", code=16).stdout
