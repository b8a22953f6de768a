"""The client of Nix's worker protocol against Nix's own daemon: what it says is what Nix says elsewhere."""

from __future__ import annotations

import base64
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cidfs.control import SocketAddress
from cidfs.errors import RemoteRefused
from cidfs.nix import requests as r
from cidfs.nix.client import Client, Connection

from .conftest import World
from .real_nix import TIMEOUT, ChrootStore


@contextmanager
def daemon(store: ChrootStore, path: Path) -> Iterator[Path]:
    """Have a Nix daemon answer the first who connects to a socket."""

    def answer(listener: socket.socket) -> int:
        peer, _ = listener.accept()
        with peer:
            program = store.nix.prefix / "bin" / "nix-daemon"
            command = [str(program), "--stdio", "--store", str(store.root)]
            return subprocess.run(
                command,
                stdin=peer.fileno(),
                stdout=peer.fileno(),
                env=store.nix.environment,
                timeout=TIMEOUT,
                check=False,
            ).returncode

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(TIMEOUT)
        with SocketAddress(path) as address:
            listener.bind(address)
        listener.listen()
        done = pool.submit(answer, listener)
        yield path
        assert done.result(TIMEOUT) == 0


@pytest.mark.parametrize("minor", [38, 30, 21])
def test_path_infos_of_a_daemon_are_nix_s(world: World, tmp_path: Path, minor: int) -> None:
    with (
        daemon(world.store, tmp_path / "socket") as path,
        Connection(path, TIMEOUT, Client(minor)) as connection,
    ):
        assert connection.client.minor == minor
        assert set(connection.all_valid_paths()) == set(world.infos)
        for name, known in world.infos.items():
            info = connection.path_info(name)
            assert info is not None
            assert "sha256-" + base64.b64encode(info.nar_hash).decode() == known.nar_hash
            assert info.nar_size == known.nar_size
            assert set(info.references) == known.references
            assert info.deriver == (known.deriver or "")
            assert set(info.signatures) == known.signatures
            assert info.ca == (known.ca or "")


def test_a_daemon_answers_all_that_can_be_asked(world: World, tmp_path: Path) -> None:
    top, absent = world.top, world.top + "x"
    with (
        daemon(world.store, tmp_path / "socket") as path,
        Connection(path, TIMEOUT) as connection,
        closing(sqlite3.connect(world.store.database)) as database,
    ):
        assert connection.is_valid(top)
        assert not connection.is_valid(absent)
        assert connection.path_info(absent) is None
        assert connection.valid_paths([absent, top]) == (top,)
        hash_part = Path(top).name[:32]
        assert connection.path_from_hash_part(hash_part) == top
        assert connection.path_from_hash_part("0" * 32) == ""
        reference = min(world.infos[top].references - {top})
        assert top in connection.referrers(reference)
        derivers = connection.ask(r.QueryValidDerivers(top))
        assert derivers == (world.infos[top].deriver,)
        assert connection.ask(r.QueryDerivationOutputMap(derivers[0])) == {"out": top}
        assert b"".join(connection.nar(top)) == world.store.dump(top)
        assert connection.ask(r.QueryMissing((top, absent))) == r.Missing(unknown=(absent,))
        assert connection.ask(r.BuildPaths((top,), True)) == {top: 2}
        assert connection.ask(r.BuildPaths((top,), False)) is True
        with pytest.raises(RemoteRefused, match=Path(absent).name):
            connection.ask(r.BuildPaths((absent,), False))
        assert connection.ask(r.SetOptions()) is None
        assert connection.ask(r.QuerySubstitutable()) == ()
        assert connection.ask(r.Acknowledge(top)) is True
        assert connection.ask(r.Acknowledge("")) is True
        kept = {path for _, path in connection.ask(r.FindRoots())}
        assert top in kept  # for as long as the connection stands
        if r.REALISATION_WITH_PATH not in connection.client.features:
            rows = database.execute(
                "select drvPath, outputName, path from Realisations join ValidPaths v on v.id = outputPath"
            ).fetchall()
            assert {path for _, _, path in rows} >= set(world.ca_outputs)
            for derivation, output, out_path in rows:
                found = connection.realisation(f"{derivation}!{output}")
                assert found is not None
                assert found.id == f"{derivation}!{output}"
                assert found.out_path == Path(out_path).name
            assert connection.realisation(f"sha256:{'0' * 64}!out") is None


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Connection(tmp_path / "socket", TIMEOUT)
