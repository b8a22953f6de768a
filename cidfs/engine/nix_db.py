"""Read the database of a Nix store: which paths are valid, and what Nix knows of them.

Read-only and beside a running Nix. Schema 10 of Nix's `db.sqlite` (`libstore/schema.sql`): ValidPaths and
Refs. Synchronous.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cidfs.errors import FormatError, PathAbsent, SourceError
from cidfs.formats.digest import parse_sha256
from cidfs.formats.store_path import StorePath, parse_store_path

BUSY_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class ValidPath:
    """A row of Nix's database. references and deriver are base names."""

    path: StorePath
    nar_hash: bytes
    nar_size: int | None
    references: tuple[str, ...]
    deriver: str
    signatures: tuple[str, ...]
    ca: str


class NixDatabase:
    """The database of the Nix store below a root folder (`/` for the machine's own)."""

    def __init__(self, root: Path, store_dir: str) -> None:
        self.root = root
        self.store_dir = store_dir
        self.path = root / Path(store_dir).parent.relative_to("/") / "var/nix/db/db.sqlite"
        self._stack = contextlib.ExitStack()
        try:
            self._db = self._connect()
            self._db.execute("select count(*) from (select 1 from ValidPaths limit 1)").fetchone()
        except sqlite3.Error as e:
            self.close()
            raise SourceError(f"{self.path}: cannot be read as Nix's database: {e}") from e
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        if not self.path.is_file():
            raise SourceError(
                f"{self.root}: no Nix store here ({self.path} is not there); name its root with --from"
            )
        with self.path.open("rb") as file:
            with_log = file.read(20)[18:19] == b"\x02"
        # without a write-ahead log, Nix excludes others by a file beside the database, as we must then; where
        # none can be made, SQLite would take that for a lock and wait
        if with_log or os.access(self.path.parent, os.W_OK):
            with contextlib.suppress(sqlite3.OperationalError):
                return self._open(self.path, "mode=ro" if with_log else "mode=ro&vfs=unix-dotfile")
        # both need to write beside the database; on a read-only medium nobody does: work on a copy
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cidfs-nix-db-")))
        for suffix in ("", "-wal", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{self.path}{suffix}", folder / f"db.sqlite{suffix}")
        return self._open(folder / "db.sqlite", "mode=rw")

    def _open(self, path: Path, mode: str) -> sqlite3.Connection:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_SECONDS)
        self._stack.callback(db.close)
        db.execute("begin")  # one state of the database for the whole import, whatever Nix does meanwhile
        db.execute("select id from ValidPaths limit 1").fetchone()
        return db

    def close(self) -> None:
        """Close the database."""
        self._stack.close()

    def __enter__(self) -> NixDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def physical(self, path: StorePath) -> Path:
        """Return where a path's files lie on this machine."""
        return self.root / Path(self.store_dir).relative_to("/") / path.base_name

    def rows(self, query: str, *parameters: object) -> list[Any]:
        """Return the rows of a query; raise SourceError where the database cannot be read."""
        try:
            return self._db.execute(query, parameters).fetchall()
        except sqlite3.Error as e:
            raise SourceError(f"{self.path}: cannot be read: {e}") from e

    def info(self, path: StorePath) -> ValidPath:
        """Return what Nix knows of a path; raise PathAbsent when it is not valid there."""
        found = self.rows(
            "select id, hash, deriver, narSize, sigs, ca from ValidPaths where path = ?",
            path.full(self.store_dir),
        )
        if not found:
            raise PathAbsent(f"{path.full(self.store_dir)}: not a valid path of the Nix store at {self.root}")
        number, nar_hash, deriver, nar_size, sigs, ca = found[0]
        references = self.rows(
            "select v.path from Refs r join ValidPaths v on v.id = r.reference where r.referrer = ?", number
        )
        try:
            return ValidPath(
                path=path,
                nar_hash=parse_sha256(nar_hash),
                nar_size=nar_size or None,
                references=tuple(sorted(self._base_name(r[0]) for r in references)),
                deriver=self._base_name(deriver) if deriver else "",
                signatures=tuple((sigs or "").split()),
                ca=ca or "",
            )
        except FormatError as e:
            raise FormatError(f"{self.path}: {path}: {e}") from None

    def _base_name(self, text: str) -> str:
        return parse_store_path(text, self.store_dir).base_name

    def all_paths(self) -> Iterator[StorePath]:
        """Yield every valid path."""
        for (text,) in self.rows("select path from ValidPaths order by path"):
            yield parse_store_path(text, self.store_dir)

    def ordered(self, paths: Sequence[StorePath], *, closure: bool) -> list[ValidPath]:
        """Return what is known of paths, references before referrers.

        With closure, of all that they refer to.
        """
        chosen = set(paths)
        known: dict[StorePath, ValidPath] = {}
        order: list[ValidPath] = []
        for path in paths:
            stack: list[tuple[StorePath, bool]] = [(path, False)]
            while stack:
                here, children_done = stack.pop()
                if children_done:
                    order.append(known[here])
                    continue
                if here in known:
                    continue
                known[here] = info = self.info(here)
                stack.append((here, True))
                for name in reversed(info.references):
                    reference = parse_store_path(name, self.store_dir)
                    if reference not in known and (closure or reference in chosen):
                        stack.append((reference, False))
        return order
