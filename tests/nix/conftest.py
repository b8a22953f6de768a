"""One Nix, one chroot store with everything in it, one import of it and one mount, for the whole session."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from tests.system.forks import forking

from .lab import Lab, OverlayStore, lab_in
from .real_nix import ChrootStore, Nix, PathInfo
from .tool import Cidfs, Mount, mount_points, mounted
from .trees import TREES


@dataclass(frozen=True)
class World:
    """A chroot store, and what was put into it; nobody changes it after it was made."""

    store: ChrootStore
    sources: Path
    trees: dict[str, str]
    outputs: tuple[str, ...]
    ca_outputs: tuple[str, ...]
    top: str
    public_key: str
    infos: dict[str, PathInfo]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory for everything that is made here; nothing may be mounted in it in the end."""
    directory = tmp_path_factory.mktemp("nix").resolve()
    yield directory
    left = mount_points(directory)
    for point in reversed(left):
        subprocess.run(["umount", "--lazy", point], check=False)
    assert left == [], "still mounted after the tests"


def _nix(variable: str, work: Path) -> Nix:
    hint = f"the tests with a real Nix need {variable}: run tools/test"
    prefix = os.environ.get(variable, "")
    if not prefix:
        pytest.fail(hint, pytrace=False)
    programs = ("nix", "nix-store", "nix-build", "busybox")
    if not all(os.access(Path(prefix, "bin", program), os.X_OK) for program in programs):
        pytest.fail(f"{hint} ({prefix} is no Nix)", pytrace=False)
    found = Nix(Path(prefix).resolve(), work)
    done = found.attempt("nix", "--version")
    if done.returncode or not done.stdout.startswith(b"nix "):
        pytest.fail(f"{hint} (nix --version fails in {prefix})", pytrace=False)
    return found


@pytest.fixture(scope="session")
def nix(work: Path) -> Nix:
    return _nix("CIDFS_TEST_NIX", work / "nix")


@pytest.fixture(scope="session")
def root() -> None:
    """Let only root run a test."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def labs(work: Path, root: None) -> Iterator[Callable[[str], Lab]]:
    """Return what gives the lab of a Nix, by the variable that names it; made when it is first asked for."""
    with ExitStack() as stack:
        forks = stack.enter_context(forking())

        @cache
        def lab_of(variable: str) -> Lab:
            at = work / f"lab-{variable.lower()}"
            at.mkdir()
            return stack.enter_context(lab_in(at, _nix(variable, at / "nix"), forks))

        yield lab_of


@pytest.fixture(params=["CIDFS_TEST_NIX", "CIDFS_TEST_NIX_OLD"], ids=["new", "old"], scope="module")
def lab(request: pytest.FixtureRequest, labs: Callable[[str], Lab]) -> Lab:
    """Return a mount below real overlays: of either Nix in turn, and one for all tests with it."""
    return labs(request.param)


@pytest.fixture(scope="module")
def above(lab: Lab) -> Iterator[OverlayStore]:
    """Return an overlay store on the lab's mount; all that a file's tests leave in it can be collected."""
    with lab.overlay() as store:
        yield store
        store.collect()
        assert (store.written(), store.whiteouts()) == (set(), [])


@pytest.fixture
def new_store(nix: Nix, tmp_path: Path) -> ChrootStore:
    """Return an empty chroot store for one test."""
    return ChrootStore(nix, tmp_path.resolve() / "root")


@pytest.fixture(scope="session")
def scratch(nix: Nix, work: Path) -> ChrootStore:
    """Return a chroot store to ask Nix for a path's name in; nothing is imported from it."""
    return ChrootStore(nix, work / "scratch")


@pytest.fixture(scope="session")
def new_cidfs(work: Path) -> Callable[[], Cidfs]:
    """Return what makes a cidfs with an empty state folder."""
    numbers = count(1)
    return lambda: Cidfs(work / f"state-{next(numbers)}")


@pytest.fixture(scope="session")
def world(nix: Nix, work: Path) -> World:
    sources = work / "sources"
    sources.mkdir()
    store = ChrootStore(nix, work / "root")
    trees: dict[str, str] = {}
    for name, build in TREES.items():
        source = os.fsencode(sources) + b"/" + os.fsencode(name)
        build(source)
        trees[name] = store.add(source)
    outputs = store.build("everything")
    ca_outputs = store.build("everything", seed="ca", ca=True)
    top = next(path for path in outputs if path.endswith("-top-1"))
    key = work / "key"
    key.write_bytes(nix.run("nix", "key", "generate-secret", "--key-name", "test-key-1"))
    public_key = nix.run("nix", "key", "convert-secret-to-public", stdin=key.read_bytes()).decode()
    nix.run("nix", "store", "sign", "--store", store.root, "--key-file", key, top, trees["names"])
    nix.run("nix-store", "--store", store.root, "--optimise")
    infos = store.path_infos()
    return World(store, sources, trees, tuple(outputs), tuple(ca_outputs), top, public_key, infos)


@pytest.fixture(scope="session")
def imported(world: World, new_cidfs: Callable[[], Cidfs]) -> Cidfs:
    """Return a cidfs that has everything of the world's store."""
    cidfs = new_cidfs()
    cidfs.run("import", "--all", "--from", world.store.root)
    return cidfs


@pytest.fixture(scope="session")
def mount(imported: Cidfs, work: Path) -> Iterator[Mount]:
    """Mount what was imported, with a root that can be listed."""
    with mounted(imported, work / "mnt", "--list-root") as mount:
        yield mount
