"""What the recorded commands work on: folders to add, a NAR, a Nix store made by hand.

Chunks are shared between some of them, so that a removal leaves packs of which a part is still needed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.engine.test_nix_db import SCHEMA
from tests.local.support import noise, package
from tests.power.runner import Runner
from tests.system.support import nar_of

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")
NIX: Mapping[str, Mapping[str, bytes]] = {
    "base": {"lib": noise("lib", 40_000), "text": b"text\n" * 500},
    "top": {"bin": noise("bin", 20_000), "shared": noise("shared", 30_000)},
}


@dataclass
class Material:
    """Folders by name, the store path that each gets, and the same for the NAR and the Nix store."""

    folder: Path
    paths: dict[str, str]

    def source(self, name: str) -> Path:
        """Return the folder of a name."""
        return self.folder / "sources" / name

    def of(self, *names: str) -> list[str]:
        """Return the store paths of names."""
        return [self.paths[name] for name in names]

    @property
    def nar(self) -> Path:
        """A NAR; its name is `piped`."""
        return self.folder / "piped.nar"

    @property
    def nix_root(self) -> Path:
        """The root of a Nix store with `base` and `top`."""
        return self.folder / "nix-root"


def make_material(folder: Path, commands: Runner, empty: Path) -> Material:
    """Make all of it; the paths are those that adding them to an empty store gives."""
    material = Material(folder, {})
    for name in NAMES:
        here = material.source(name)
        here.mkdir(parents=True)
        (here / "own").write_bytes(noise(name, 50_000))
        (here / "shared").write_bytes(noise("shared", 30_000))
        (here / "text").write_bytes(b"what everybody writes\n" * 3000)
        (here / "folder").mkdir()
        (here / "folder" / "small").write_bytes(name.encode())
    piped = folder / "piped"
    piped.mkdir()
    (piped / "file").write_bytes(noise("piped", 45_000))
    material.nar.write_bytes(b"".join(nar_of(str(piped).encode())))
    for name in NAMES:
        material.paths[name] = commands.run(empty, "add", material.source(name)).good().out[0]
    material.paths["piped"] = (
        commands.run(empty, "import", "-", "--name", "piped", stdin=material.nar).good().out[0]
    )
    material.paths.update(make_nix_store(material.nix_root))
    return material


def make_nix_store(root: Path) -> dict[str, str]:
    """Make a Nix store in which everything refers to `base`; return store path by name."""
    folder = root / "nix/var/nix/db"
    folder.mkdir(parents=True)
    paths = {}
    with closing(sqlite3.connect(folder / "db.sqlite", isolation_level=None)) as db:
        db.executescript(SCHEMA)
        for name, files in NIX.items():
            record = package(name, files, ["base"]).record
            paths[name] = record.path.full("/nix/store")
            where = root / "nix/store" / record.path.base_name
            where.mkdir(parents=True)
            for file, data in files.items():
                (where / file).write_bytes(data)
            db.execute(
                "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 1, ?)",
                (paths[name], "sha256:" + record.nar_hash.hex(), record.nar_size),
            )
            db.execute(
                "insert into Refs select a.id, b.id from ValidPaths a, ValidPaths b"
                " where a.path = ? and b.path = ?",
                (paths[name], paths["base"]),
            )
    return paths
