"""The model of a store: what must be there, held against what is there.

Knows trees, references, inode numbers, mounts and what is held open in them; runs no command of its own. Also
a program: publishes trees with references through the library.

    python -m tests.system.model_support STATE

reads from standard input a JSON list of [tree, base name, references] and prints the paths' base names.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trio

from cidfs.engine.ingest import ingest
from cidfs.engine.sources import DiskSource
from cidfs.engine.wanted import Wanted
from cidfs.formats.digest import nix32_encode
from cidfs.formats.frames import HEADER_SIZE
from cidfs.formats.store_path import fixed_output_path, parse_base_name
from cidfs.local.marks import prefix_of
from cidfs.local.store import LocalStore
from tests.commands import Store, environment, wait_until
from tests.system.support import Node, describe, digest_of, make_files, nar_hash, noise

DEAD_SHARE = 4  # a collection leaves less than one part in so many of a pack dead
SEEN_WITHIN = 10.0
SECONDS = 60.0  # for a command

KILL_AT_A_CALL = """
import os, signal
left = [{at}]
def dying(name):
    whole = getattr(os, name)
    def act(*args, **more):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **more)
    setattr(os, name, act)
for name in ("pwrite", "fdatasync", "fsync", "rename", "link", "unlink"):
    dying(name)
"""

NO_ROOM = "from cidfs.local import room\nroom.free_bytes = lambda root: 0"

# --- trees


class Spec(NamedTuple):
    """What a tree is to hold."""

    name: str
    shape: str  # folder, file, tool or link
    files: tuple[str, ...]
    variant: int


SHAPES = ("folder", "folder", "folder", "file", "tool", "link")
NAMES = ("a", "b", "c.drv", "d-1.0")
FILES = ("small", "empty", "none/", "bin/tool", "deep/er/link", "repeats", "large", "mid-1", "mid-2", "mid-3")


def _contents(file: str, variant: int) -> bytes:
    match file:
        case "small" | "bin/tool":
            return b"%s %d\n" % (file.encode(), variant)
        case "repeats":
            return noise("r", 30_000) * 5
        case "large":
            return noise(f"large {variant}", 400_000)
        case "mid-1" | "mid-2" | "mid-3":  # they share their middle, at other offsets
            head = noise(f"{file} {variant}", 20_000 + len(file) * 7 * (variant + 1))
            return head + noise("middle", 150_000) + noise(f"end {file}", 9_000)
        case _:
            return b""


def make_tree(spec: Spec, where: Path) -> Path:
    """Make a tree on disk."""
    match spec.shape:
        case "file" | "tool":
            where.write_bytes(b"".join(_contents(f, spec.variant) for f in spec.files))
            where.chmod(0o755 if spec.shape == "tool" else 0o644)
        case "link":
            where.symlink_to("/nowhere/" + "+".join(spec.files).replace("/", "-"))
        case _:
            where.mkdir()
            plain = [f for f in spec.files if f != "deep/er/link"]
            make_files(where, {f.encode(): _contents(f, spec.variant) for f in plain})
            if len(plain) < len(spec.files):
                (where / "deep/er").mkdir(parents=True)
                (where / "deep/er/link").symlink_to(f"../../{spec.files[0]}")
            if "bin/tool" in spec.files:
                (where / "bin/tool").chmod(0o755)
    return where


@dataclass(frozen=True)
class Tree:
    """A tree on disk, and the store path that it is to become."""

    path: Path
    base_name: str
    nodes: dict[bytes, Node]
    references: frozenset[str] = frozenset()

    @property
    def full(self) -> str:
        """The whole store path."""
        return f"/nix/store/{self.base_name}"


class Trees:
    """All trees that were made so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Spec, frozenset[str]], Tree] = {}

    def of(self, spec: Spec, references: Iterable[str] = ()) -> Tree:
        """Return the tree of a spec; with references, as a package that is not named by its contents."""
        known = (spec, frozenset(references))
        if known not in self._made:
            folder = self._folder / f"tree-{len(self._made)}"
            folder.mkdir()
            path = make_tree(spec, folder / spec.name)
            base = fixed_output_path(bytes.fromhex(nar_hash(path)), spec.name).base_name
            if known[1]:
                base = base_name(f"{base} {sorted(known[1])}", spec.name)
            self._made[known] = Tree(path, base, describe(path), known[1])
        return self._made[known]


# --- what is there, and what must be there


class Seen(NamedTuple):
    """A node as a reader of a mount sees it."""

    node: Node
    inode: int


def see(top: Path | str) -> dict[bytes, Seen]:
    """Return all that is below a path and itself, as it is: real modes, every byte read."""
    found: dict[bytes, Seen] = {}
    start = os.fsencode(top)
    waiting = [b""]
    while waiting:
        here = waiting.pop()
        path = start + here
        info = os.lstat(path)
        target, digest, size = b"", "", info.st_size
        if stat.S_ISDIR(info.st_mode):
            waiting += [here + b"/" + name for name in os.listdir(path)]
        elif stat.S_ISLNK(info.st_mode):
            target = os.readlink(path)
        else:
            digest = digest_of(path)
        assert (info.st_uid, info.st_gid, info.st_nlink, int(info.st_mtime)) == (0, 0, 1, 1), path
        found[here] = Seen(Node(info.st_mode, size, target, digest), info.st_ino)
    return found


@dataclass(eq=False)
class Publication:
    """A path that is or was published: one stay of it, with its inode range."""

    tree: Tree
    base: int
    count: int
    manifest: bytes
    chunks: frozenset[int]
    numbers: dict[bytes, int] = field(default_factory=dict)
    known_to: frozenset[Mount] = frozenset()  # the mounts that ran when it was removed

    def check(self, seen: dict[bytes, Seen]) -> None:
        """Compare all of it with what a reader saw."""
        name = self.tree.base_name
        nodes = {path: each.node for path, each in seen.items()}
        assert nodes == self.tree.nodes, f"{name} has other contents"
        for path, each in seen.items():
            assert self.base <= each.inode < self.base + self.count, f"{name}{path!r}: inode {each.inode}"
            assert self.numbers.setdefault(path, each.inode) == each.inode, f"{name}{path!r}: another inode"
        assert len({each.inode for each in seen.values()}) == len(seen) == self.count


@dataclass(eq=False)
class Mount:
    """A running mount."""

    path: Path
    list_root: bool
    held: list[tuple[int, Publication]] = field(default_factory=list)

    def hold(self, publication: Publication) -> None:
        """Open a path, reading nothing of it."""
        path = self.path / publication.tree.base_name
        if not path.is_symlink():
            flags = os.O_PATH | os.O_DIRECTORY if path.is_dir() else os.O_RDONLY
            self.held.append((os.open(path, flags), publication))

    def let_go(self) -> None:
        """Read all that is held, removed or not, and close it."""
        held, self.held = self.held, []
        try:
            for fd, publication in held:
                if os.path.isdir(f"/proc/self/fd/{fd}"):
                    publication.check(see(f"/proc/self/fd/{fd}/."))
                else:
                    assert digest_of(Path(f"/proc/self/fd/{fd}")) == publication.tree.nodes[b""].digest
        finally:
            for fd, _ in held:
                os.close(fd)


class Model:
    """What must be in a store, and the comparisons."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.published: dict[str, Publication] = {}
        self.removed: list[Publication] = []
        self.mounts: list[Mount] = []

    # --- what commands do to it

    def referrers(self, name: str) -> set[str]:
        """Return the published paths that refer to one, itself left out."""
        return {n for n, p in self.published.items() if name in p.tree.references and n != name}

    def with_referrers(self, names: Iterable[str]) -> set[str]:
        """Return paths and all that refers to them, directly or not."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.referrers(name)
        return found

    def settle(self, *, come: Iterable[Tree] = (), gone: Iterable[str] = (), unsure: bool = False) -> None:
        """Take in what a command has done, and hold the index against it.

        unsure: each of these changes may not have happened.
        """
        coming = {tree.base_name: tree for tree in come}
        going = set(gone)
        with LocalStore.open(self.store.state) as opened:
            rows = {p.path.base_name: p.row for p in opened.paths()}
            for name, publication in list(self.published.items()):
                row = rows.get(name)
                same = row is not None and row.base == publication.base
                assert same or name in going, f"{name} is gone, or was published anew"
                assert not same or unsure or name not in going, f"{name} was removed and is there"
                if not same:
                    publication.known_to = frozenset(self.mounts)
                    self.removed.append(publication)
                    del self.published[name]
            for name, row in rows.items():
                if name not in self.published:
                    assert name in coming, f"{name} is there, and nobody added it"
                    chunks = frozenset(opened.read_manifest(row.manifest).prefixes())
                    assert row.count == len(coming[name].nodes)
                    new = Publication(coming[name], row.base, row.count, row.manifest, chunks)
                    self._is_fresh(new)
                    self.published[name] = new
            assert unsure or set(coming) <= set(self.published)

    def _is_fresh(self, new: Publication) -> None:
        for old in (*self.published.values(), *self.removed):
            apart = new.base >= old.base + old.count or old.base >= new.base + new.count
            assert apart, f"inode numbers {new.base}.. of {new.tree.base_name} were given out before"

    # --- comparing

    def names(self) -> list[str]:
        """Return all names that were ever published."""
        return sorted({p.tree.base_name for p in self.removed} | set(self.published))

    def compare_names(self, *, at_once: bool = True) -> None:
        """Compare the names that each mount has; at_once: nobody may have to wait for it."""
        for mount in self.mounts:
            for name in self.names():
                path = mount.path / name
                if not at_once or name in self.published:
                    wait_until(
                        lambda p=path, n=name: os.path.lexists(p) == (n in self.published),
                        SEEN_WITHIN,
                        f"{name} is {'' if name in self.published else 'not '}in {mount.path}",
                    )
                assert os.path.lexists(path) == (name in self.published), f"{path}: removed, and there"
                if name in self.published:
                    assert os.lstat(path).st_ino == self.published[name].base
            listed = set(os.listdir(mount.path)) - {".links"}
            assert listed == (set(self.published) if mount.list_root else set())

    def compare_contents(self, mount: Mount) -> None:
        """Compare all that a mount shows, byte by byte."""
        for name, publication in self.published.items():
            publication.check(see(mount.path / name))

    def compare_packs(self) -> None:
        """After a collection that nobody disturbed: what is needed is stored, and hardly anything else."""
        needed = [*self.published.values()]
        needed += [p for p in self.removed if p.known_to & set(self.mounts)]
        with LocalStore.open(self.store.state) as opened:
            for database, wanted in (
                ("chunks", {c for p in needed for c in p.chunks}),
                ("manifests", {prefix_of(p.manifest) for p in needed}),
            ):
                places = list(opened.places(database))
                assert {prefix_of(digest) for digest, _ in places} == wanted, database
            live = {identity: row.stored + row.frames * HEADER_SIZE for identity, row in opened.pack_rows()}
        files = {p.name: p.stat().st_size for p in (self.store.state / "packs").glob("*/*/*")}
        assert set(files) == {identity.hex() for identity in live}, "a pack that nobody knows, or none at all"
        for identity, size in live.items():
            dead = files[identity.hex()] - 16 - size
            assert dead * DEAD_SHARE < files[identity.hex()], f"{identity.hex()}: {dead} bytes are dead"

    def compare_litter(self) -> None:
        """After a collection: nothing that dead processes left."""
        state = self.store.state
        current = (state / "index" / "current").read_text().split()[0]
        assert sorted(os.listdir(state / "index")) == sorted(["current", current])
        assert len(os.listdir(state / "journal")) == 1
        leases = [len(list((state / "run").glob(f"{kind}-*.lease"))) for kind in ("mount", "holder")]
        assert leases == [len(self.mounts)] * 2
        assert (state / "nix.sock").exists() <= bool(self.mounts)
        for path in state.rglob("*"):
            assert not path.name.endswith((".new", ".bad")), path
            assert ".tmp-" not in path.name, path


# --- publishing with references


def publish(store: Store, *wanted: tuple[Path, str, Iterable[str]]) -> list[str]:
    """Publish trees under given base names with given references, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.model_support", str(store.state)],
        input=json.dumps([(str(tree), name, sorted(refs)) for tree, name, refs in wanted]).encode(),
        capture_output=True,
        env=environment(),
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split()


def base_name(text: str, name: str) -> str:
    """Return a store path's base name that stands for a text."""
    return f"{nix32_encode(hashlib.sha256(text.encode()).digest()[:20])}-{name}"


async def _publish(state: Path, wanted: list[tuple[str, str, list[str]]]) -> None:
    with LocalStore.open(state, write=True, create=True) as store:
        sources = [
            Wanted(DiskSource(tree), path=parse_base_name(name), references=tuple(references))
            for tree, name, references in wanted
        ]
        for outcome in await ingest(store, sources):
            assert not outcome.conflict, outcome.conflict
            print(outcome.path.base_name)


if __name__ == "__main__":
    trio.run(_publish, Path(sys.argv[1]), json.load(sys.stdin))
