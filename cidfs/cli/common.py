"""What the commands share: the settings in force, opening the store, finding what an argument names."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cidfs import control
from cidfs.config import Settings, load
from cidfs.errors import ChunkMissing, FormatError, NotPermitted, PathAbsent, UsageError
from cidfs.formats.digest import looks_like_cid, parse_cid
from cidfs.formats.manifest import Manifest, Node
from cidfs.formats.store_path import StorePath, parse_store_path
from cidfs.local import room
from cidfs.local.leases import MOUNT
from cidfs.local.rows import PathRow
from cidfs.local.store import LocalStore


@dataclass
class Globals:
    """The options before the command."""

    config: Path | None = None
    state: Path | None = None
    debug: bool = False
    lock_timeout: float | None = None

    def settings(self) -> Settings:
        """Return the settings in force."""
        return load(self.config, self.state)

    def open_store(self, *, write: bool = False, create: bool = False) -> LocalStore:
        """Open the store that the settings name."""
        settings = self.settings()
        timeout = settings.store.lock_timeout if self.lock_timeout is None else self.lock_timeout
        root = Path(settings.store.state)
        if write:
            refuse_foreign(root)
        if create:
            store = LocalStore.open(
                root, write=write, create=True, store_dir=settings.store.store_dir, lock_timeout=timeout
            )
        else:
            store = LocalStore.open(root, write=write, lock_timeout=timeout)
        if write:
            room.restore(root)  # given up once on a full disk, perhaps
        return store


def tell_mounts(store: LocalStore) -> None:
    """Have running mounts look at once what was published and removed, and wait until they have.

    They look by themselves within a second; one that does not answer is left to that.
    """
    for path, info in store.state.leases():
        if info.kind == MOUNT:
            with contextlib.suppress(OSError):
                control.have_done(path.with_suffix(".sock"), control.Request("refresh"))


def refuse_foreign(root: Path) -> None:
    """Raise NotPermitted where root would leave files in another's store that its owner cannot use."""
    try:
        owner = (root / "format").stat().st_uid
    except OSError:
        return
    if os.geteuid() == 0 and owner not in (0, os.getuid()):
        who = f"user {owner}"
        with contextlib.suppress(KeyError):
            who = pwd.getpwuid(owner).pw_name
        raise NotPermitted(f"{root}: the store belongs to {who}; run as its owner, or change that (chown -R)")


GLOBALS = Globals()


@dataclass(frozen=True)
class Located:
    """What an argument names.

    A manifest, a node in it, and the published path that it was named by, if it was.
    """

    manifest: Manifest
    digest: bytes
    index: int
    path: StorePath | None
    row: PathRow | None

    @property
    def node(self) -> Node:
        """The node that is named."""
        return self.manifest.node(self.index)


def locate(store: LocalStore, text: str) -> Located:
    """Find `/nix/store/<hash>-<name>[/inside]`, its base name, or a manifest's CID.

    Raise PathAbsent or FormatError.
    """
    outer, inside = _split(store, text)
    path: StorePath | None = None
    row: PathRow | None = None
    if looks_like_cid(outer):
        digest = cid(outer)
        try:
            manifest = store.read_manifest(digest)
        except ChunkMissing:
            raise PathAbsent(f"{outer}: no manifest of this CID in {store.state.root}") from None
    else:
        path = store_path(outer, store.store_dir)
        row = published(store, path)
        digest = row.manifest
        manifest = store.read_manifest(digest)
    index = manifest.resolve(inside)
    if index is None:
        raise PathAbsent(f"{text}: {outer} has no {inside.decode(errors='replace')!r}")
    return Located(manifest, digest, index, path, row)


@contextlib.contextmanager
def removed_meanwhile(store: LocalStore, found: Located) -> Iterator[None]:
    """Raise PathAbsent for a chunk that is missing because its path was removed while it was read."""
    try:
        yield
    except ChunkMissing:
        row = store.find_path(found.path) if found.path is not None else found.row
        if row == found.row:
            raise
        raise PathAbsent(f"{found.path}: was removed while it was read") from None


def cid(text: str) -> bytes:
    """Return the digest of a CID that was given as an argument; raise UsageError when it is none."""
    try:
        return parse_cid(text)
    except FormatError as e:
        raise UsageError(str(e)) from None


def published(store: LocalStore, path: StorePath) -> PathRow:
    """Return the row of a published path; raise PathAbsent."""
    row = store.find_path(path)
    if row is None:
        raise PathAbsent(f"{path.full(store.store_dir)}: not in the store at {store.state.root}")
    return row


def store_path(text: str, store_dir: str) -> StorePath:
    """Return the store path that an argument names; raise UsageError when it cannot be one."""
    try:
        return parse_store_path(text, store_dir)
    except FormatError as e:
        raise UsageError(str(e)) from None


def _split(store: LocalStore, text: str) -> tuple[str, bytes]:
    prefix = store.store_dir + "/"
    rest = text[len(prefix) :] if text.startswith(prefix) else text
    outer, _, inside = rest.partition("/")
    if rest.startswith("/") or not looks_like_cid(outer):
        store_path(text if rest.startswith("/") else outer, store.store_dir)  # raises, with the reason
    return outer, inside.encode(errors="surrogateescape")
