"""ls, cat, info and nar: the same contents without a mount, by path, base name, inside path and CID."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cidfs.formats.digest import digest_of, parse_cid
from tests.commands import Failed, Store, environment
from tests.system.conftest import Mounted
from tests.system.support import at_once, nar_of

ABSENT = "ffffffffffffffffffffffffffffffff-absent"
NO_CID = "bafkr4i" + "a" * 52


@pytest.fixture(scope="session")
def facts(awkward: Mounted) -> dict[str, object]:
    """What `info --json` says of the awkward tree."""
    known: dict[str, object] = json.loads(awkward.store.run("info", "--json", awkward.name).stdout)
    return known


def forms(awkward: Mounted, facts: dict[str, object], inside: str = "") -> list[str]:
    """Return all the ways to name a path, or what is inside."""
    return [f"{outer}{inside}" for outer in (f"/nix/store/{awkward.name}", awkward.name, str(facts["cid"]))]


def test_ls_lists_the_store_paths(awkward: Mounted) -> None:
    assert awkward.store.lines("ls") == [f"/nix/store/{awkward.name}"]
    (line,) = awkward.store.lines("ls", "-l")
    files = [node for node in awkward.nodes.values() if node.digest]
    assert line.split() == [
        str(len(files)),
        "files",
        str(sum(node.size for node in files)),
        f"/nix/store/{awkward.name}",
    ]


def test_ls_lists_what_is_inside_under_every_name(awkward: Mounted, facts: dict[str, object]) -> None:
    expected = b"".join(name + b"\n" for name in sorted(os.listdir(os.fsencode(awkward.source))))
    for done in at_once(lambda form: awkward.store.run("ls", form), forms(awkward, facts)):
        assert done.stdout == expected
    assert awkward.store.lines("ls", f"{awkward.name}/bin") == ["big tool", "tool"]
    assert awkward.store.lines("ls", f"{awkward.name}/bin/tool") == ["tool"]
    assert awkward.store.lines("ls", f"{awkward.name}/empty-folder/") == []


def test_ls_shows_modes_sizes_and_targets(awkward: Mounted) -> None:
    lines = awkward.store.run("ls", "-l", awkward.name).stdout.split(b"\n")
    shown = {line[24:]: line[:23].split() for line in lines if len(line) > 24}
    assert shown[b"plain"] == [b"-r--r--r--", b"6"]
    assert shown[b"bin"] == [b"dr-xr-xr-x", b"0"]
    assert shown[b"link -> plain"] == [b"lrwxrwxrwx", b"5"]
    assert shown[b"zeros"] == [b"-r--r--r--", b"1048576"]


def test_cat_writes_a_file_under_every_name(awkward: Mounted, facts: dict[str, object]) -> None:
    for inside in ("/many chunks", "/repeats"):
        expected = (awkward.source / inside[1:]).read_bytes()
        for done in at_once(lambda form: awkward.store.run("cat", form), forms(awkward, facts, inside)):
            assert done.stdout == expected
    assert awkward.store.run("cat", f"{awkward.name}/empty").stdout == b""
    odd = os.fsdecode(b"not-utf8-\xff\xfe\xe9")
    assert awkward.store.run("cat", f"{awkward.name}/{odd}").stdout == b"latin"


def test_cat_writes_a_chunk_by_its_cid(awkward: Mounted) -> None:
    known = json.loads(awkward.store.run("info", "--json", f"{awkward.name}/many chunks").stdout)
    data = (awkward.source / "many chunks").read_bytes()
    assert known["size"] == len(data)
    assert len(known["chunks"]) > 10
    pieces = [awkward.store.run("cat", cid).stdout for cid in known["chunks"][:3]]
    assert data.startswith(b"".join(pieces))
    assert [digest_of(piece) for piece in pieces] == [parse_cid(cid) for cid in known["chunks"][:3]]


def test_a_file_that_is_a_store_path_has_a_cid_that_cat_takes(store: Store) -> None:
    file = store.state.parent / "a-file"
    file.write_bytes(b"contents")
    (name,) = store.add(file)
    cid = json.loads(store.run("info", "--json", name).stdout)["cid"]
    for form in (f"/nix/store/{name}", name, cid):
        assert store.run("cat", form).stdout == b"contents"
    assert store.lines("ls", name) == [name]


def test_nar_writes_what_nix_would(awkward: Mounted, facts: dict[str, object]) -> None:
    expected = b"".join(nar_of(os.fsencode(awkward.source)))
    for done in at_once(lambda form: awkward.store.run("nar", form), forms(awkward, facts)):
        assert done.stdout == expected
    assert facts["nar_size"] == len(expected)


def test_info_shows_what_is_known(awkward: Mounted, facts: dict[str, object]) -> None:
    base = (awkward.mountpoint / awkward.name).stat().st_ino
    files = [node for node in awkward.nodes.values() if node.digest]
    assert facts["path"] == f"/nix/store/{awkward.name}"
    assert (facts["nodes"], facts["files"]) == (len(awkward.nodes), len(files))
    assert facts["size"] == sum(node.size for node in files)
    assert (facts["inode_base"], facts["serial"], facts["closure_complete"]) == (base, 1, True)
    assert (facts["references"], facts["referrers"], facts["signatures"]) == ([], [], [])
    assert str(facts["ca"]).startswith("fixed:r:sha256:")
    text = awkward.store.run("info", awkward.name).stdout.decode()
    for key in ("cid", "nar_hash", "path"):
        assert str(facts[key]) in text
    inside = json.loads(awkward.store.run("info", "--json", f"{awkward.name}/bin/tool").stdout)
    assert inside["inode"] == (awkward.path / "bin/tool").stat().st_ino
    assert (inside["inside"], inside["type"], inside["size"]) == ("bin/tool", "-r-xr-xr-x", 10)
    by_cid = json.loads(awkward.store.run("info", "--json", str(facts["cid"])).stdout)
    assert by_cid == {key: facts[key] for key in by_cid}


@pytest.mark.parametrize("command", ["ls", "cat", "info", "nar"])
def test_what_is_not_there_is_one_line_and_exit_code_4(awkward: Mounted, command: str) -> None:
    absent = (ABSENT, f"/nix/store/{ABSENT}/inside", f"{awkward.name}/absent", NO_CID)
    for each, line in zip(
        absent, at_once(lambda a: awkward.store.error(command, a, code=4), absent), strict=True
    ):
        assert each.partition("/")[0][:20] in line


def test_what_cannot_be_a_path_is_refused(awkward: Mounted) -> None:
    assert "/usr/bin" in awkward.store.error("ls", "/usr/bin", code=2)
    assert "plain" in awkward.store.error("info", "plain", code=2)
    assert "directory" in awkward.store.error("cat", f"{awkward.name}/bin", code=2)
    assert "symlink" in awkward.store.error("cat", f"{awkward.name}/link", code=2)
    assert "inside" in awkward.store.error("nar", f"{awkward.name}/bin", code=2)


@pytest.mark.parametrize("words", ["nar {path}", "cat {path}/zeros", "ls {path}/many", "ls", "info {path}"])
def test_a_closed_pipe_ends_it_without_a_word(awkward: Mounted, words: str) -> None:
    command = awkward.store.command(*words.format(path=awkward.name).split())
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False, timeout=60
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_behind_standard_output_is_said(awkward: Mounted) -> None:
    command = awkward.store.command("nar", awkward.name)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False, timeout=60
        )
    lines = done.stderr.decode().splitlines()
    if done.returncode == 0 or len(lines) != 1 or "No space left" not in lines[0]:
        raise Failed(f"{done.returncode}: {lines}")


def test_an_option_beats_the_environment_which_beats_the_settings(awkward: Mounted, tmp_path: Path) -> None:
    config = tmp_path / "cidfs.toml"
    config.write_text(f'[store]\nstate = "{tmp_path}/of-the-settings"\n')
    expected = f"/nix/store/{awkward.name}\n".encode()
    command = [sys.executable, "-m", "cidfs"]

    def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*command, *words], capture_output=True, env=environment(variables), check=False, timeout=60
        )

    by_option = run("--state", awkward.store.state, "ls", CIDFS_STATE=f"{tmp_path}/of-the-environment")
    assert by_option.stdout == expected
    by_environment = run("--config", config, "ls", CIDFS_STATE=str(awkward.store.state))
    assert by_environment.stdout == expected
    by_settings = run("ls", CIDFS_CONFIG=str(config))
    assert by_settings.returncode == 10
    assert b"of-the-settings" in by_settings.stderr
    assert run("--version").stdout.startswith(b"cidfs ")
