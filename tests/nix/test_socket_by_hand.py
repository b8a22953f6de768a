"""The commands of Nix that people send to the metadata socket itself: those that read work, no others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .lab import Lab
from .real_nix import CLOSURE, ChrootStore
from .trees import differences, snapshot

_REFUSAL = "cidfs serves this store read-only"
_ABSENT = f"/nix/store/{'0' * 32}-absent"
_BRIDGE = """\
import os, socket, threading

peer = socket.socket(socket.AF_UNIX)
peer.connect({socket!r})


def outward():
    while data := os.read(0, 65536):
        peer.sendall(data)
    peer.shutdown(socket.SHUT_WR)


threading.Thread(target=outward, daemon=True).start()
with open(1, "wb", buffering=0) as out:
    while data := peer.recv(65536):
        while data:
            data = data[out.write(data) :]
"""


@pytest.fixture(scope="module")
def remote(lab: Lab) -> ChrootStore:
    """Return the store that the socket alone is: Nix reads what it needs of files in the mount."""
    return ChrootStore(lab.nix, lab.at / "remote", lab.remote)


@pytest.fixture(scope="module")
def far(lab: Lab) -> ChrootStore:
    """Return the same store as from another machine: all comes through the socket, files as archives."""
    bridge, program = lab.at / "bridge", lab.at / "bridge.py"
    program.write_text(_BRIDGE.format(socket=str(lab.socket)))
    bridge.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}"\n')  # its name may have blanks
    bridge.chmod(0o755)
    return ChrootStore(lab.nix, lab.at / "far", f"ssh-ng://localhost?remote-program={bridge}")


def test_queries_are_answered_as_by_the_store_that_was_imported(lab: Lab, remote: ChrootStore) -> None:
    top, mid = lab.output("top"), lab.output("mid")
    for query in ("requisites", "references", "referrers", "referrers-closure", "deriver", "hash", "size"):
        for path in (top, mid):
            asked = ("nix-store", "--query", f"--{query}", path)
            assert set(remote.run(*asked).split()) == set(lab.store.run(*asked).split()), query
    deriver = lab.store.run("nix-store", "--query", "--deriver", top)
    assert remote.run("nix-store", "--query", "--valid-derivers", top) == deriver
    assert remote.run("nix-store", "--query", "--outputs", deriver) == top
    assert remote.run("nix", "path-info", top) == top
    hash_part = Path(top).name.partition("-")[0]
    assert remote.run("nix", "store", "path-from-hash-part", hash_part) == top
    assert remote.run("nix-store", "--realise", top) == top
    remote.run("nix-store", "--check-validity", *lab.outputs)
    assert "cidfs" in remote.attempt("nix", "store", "info").stderr.decode()
    derivation = json.loads(remote.run("nix", "derivation", "show", deriver))
    assert derivation == json.loads(lab.store.run("nix", "derivation", "show", deriver))


def test_all_that_was_imported_is_listed_with_what_is_known_of_it(lab: Lab, remote: ChrootStore) -> None:
    closure = lab.store.closure([*lab.outputs, *lab.ca_outputs])
    infos = remote.path_infos()
    assert {path: infos[path] for path in closure} == lab.store.path_infos(closure)
    assert sorted(remote.run("nix", "path-info", "--all").split()) == sorted(infos)
    assert {Path(path).name for path in infos} <= lab.cidfs.listed()


def test_an_absent_path_is_not_valid(remote: ChrootStore) -> None:
    commands = (
        ("nix", "path-info"),
        ("nix-store", "--query", "--requisites"),
        ("nix-store", "--check-validity"),
    )
    for command in commands:
        assert f"path '{_ABSENT}' is not valid" in remote.refuse(*command, _ABSENT), command


@pytest.mark.parametrize("way", ["remote", "far"])
def test_files_can_be_listed_read_verified_and_copied(
    lab: Lab, way: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store: ChrootStore = request.getfixturevalue(way)
    top = lab.output("top")
    listed = ("nix", "store", "ls", "--long", "--recursive", top)
    assert store.run(*listed) == lab.store.run(*listed)
    text = lab.store.real(top) / "references"
    assert store.run("nix", "store", "cat", f"{top}/references") == text.read_text().strip()
    assert store.nix.run("nix", "store", "dump-path", "--store", store.address, top) == lab.store.dump(top)
    store.run("nix", "store", "verify", "--no-trust", "--all")

    copy = ChrootStore(lab.nix, tmp_path / "copy")
    lab.nix.run("nix", "copy", "--from", store.address, "--to", copy.root, "--no-check-sigs", *lab.outputs)
    closure = lab.store.closure(lab.outputs)
    assert sorted(copy.path_infos()) == sorted(closure)
    for path in closure:
        assert differences(snapshot(copy.real(path)), snapshot(lab.store.real(path))) == [], path
    copy.run("nix-store", "--verify", "--check-contents")


def test_what_would_write_is_refused_with_a_clear_line(
    lab: Lab, remote: ChrootStore, scratch_file: Path, tmp_path: Path
) -> None:
    top = lab.output("top")
    deriver = lab.store.run("nix-store", "--query", "--deriver", top)
    key = tmp_path / "key"
    key.write_bytes(lab.nix.run("nix", "key", "generate-secret", "--key-name", "test-key-1"))
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("nix", "store", "add", scratch_file),
        ("nix-store", "--add", scratch_file),
        ("nix-store", "--delete", top),
        ("nix-store", "--gc"),
        ("nix-store", "--gc", "--print-dead"),
        ("nix", "store", "gc"),
        ("nix-store", "--optimise"),
        ("nix-store", "--verify", "--check-contents"),
        ("nix-store", "--realise", deriver),
        ("nix", "store", "sign", "--key-file", key, top),
        ("nix-build", CLOSURE, "--no-out-link", "-A", "top", "--arg", "tools", lab.store.tools),
    )
    for command in commands:
        said = remote.refuse(*command)
        (line,) = (line for line in said.splitlines() if _REFUSAL in line)
        assert line.strip().startswith("error: "), said
        assert "local-overlay://" in line
    assert "not supported" in remote.refuse("nix-store", "--repair-path", top)

    other = ChrootStore(lab.nix, tmp_path / "other")
    path = other.add(scratch_file)
    done = lab.nix.attempt(
        "nix", "copy", "--from", other.root, "--to", remote.address, "--no-check-sigs", path
    )
    assert (done.returncode, _REFUSAL in done.stderr.decode()) == (1, True)
    assert not lab.is_shown(path)
    assert remote.run("nix", "path-info", top) == top


@pytest.fixture
def scratch_file(tmp_path: Path) -> Path:
    file = tmp_path / "scratch"
    file.write_text("nowhere else\n")
    return file
