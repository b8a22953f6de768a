"""The corpus: real package releases, each unpacked into a directory of its own.

What there is of a package is asked of apt and pip when the corpus is made; what was chosen is written down,
so that a later run has the same. Each release appears under its name in one rename: a run that was stopped
goes on where it was. Owns the corpus folder; one process at a time (flock).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

from benchmark.machine import BenchError, Usage, run, sizes

LEAST_RELEASES: Final = 60
LEAST_PACKAGES: Final = 15
MOST_BYTES: Final = 2_500_000_000
QUICK_BYTES: Final = 230_000_000
DEADLINE: Final = 300.0

# Wheels for one Python and one kind of machine, whatever runs here: they are unpacked, never run.
WHEELS: Final = [
    "--only-binary=:all:",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
]


@dataclass(frozen=True, slots=True)
class Package:
    """A package to be had in several releases; for apt, a name, or a pattern of names with the version."""

    tool: str
    name: str
    releases: int
    quick: bool = False


PACKAGES: Final = [
    Package("pip", "sqlalchemy", 5, quick=True),
    Package("pip", "networkx", 4, quick=True),
    Package("pip", "babel", 3, quick=True),
    Package("pip", "lxml", 4, quick=True),
    Package("pip", "pip", 4, quick=True),
    Package("apt", "perl-modules-5.36", 2, quick=True),
    Package("pip", "django", 5),
    Package("pip", "numpy", 5),
    Package("pip", "scipy", 3),
    Package("pip", "pandas", 4),
    Package("pip", "matplotlib", 4),
    Package("pip", "scikit-learn", 4),
    Package("pip", "sympy", 4),
    Package("pip", "pillow", 4),
    Package("pip", "cryptography", 4),
    Package("pip", "plotly", 3),
    Package("pip", "mypy", 4),
    Package("pip", "sphinx", 3),
    Package("apt", "^linux-headers-[0-9.]+-[0-9]+-common$", 4),
    Package("apt", "libssl-dev", 3),
    Package("apt", "python3.11-minimal", 2),
]


@dataclass(frozen=True, slots=True)
class Release:
    """One unpacked release: its folder, and what it holds."""

    path: Path
    package: str
    bytes: int
    files: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name


def measure(path: Path, package: str) -> Release:
    """Return a folder as a release."""
    files = sum(len(names) for _, _, names in os.walk(path))
    return Release(path, package, sizes(path)[0], files)


def given(folder: Path) -> list[Release]:
    """Return the directories in a folder as releases."""
    found = [measure(path, path.name) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not found:
        raise BenchError(f"{folder}: holds no directories; each one is to be a release")
    return found


class Corpus:
    """The corpus in a folder, which is made or completed as needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chosen = folder / "chosen.json"

    def get(self, *, quick: bool) -> list[Release]:
        """Return the releases, those of the quick form first; raise BenchError when they are too few."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._get(quick)

    def _get(self, quick: bool) -> list[Release]:
        packages = [package for package in PACKAGES if package.quick or not quick]
        limit = QUICK_BYTES if quick else MOST_BYTES
        found: list[Release] = []
        have = 0
        for package, version in self._wanted(packages):
            name = _name_of(package, version)
            path = self._folder / "releases" / name
            try:
                self._have(package, version, path)
            except (BenchError, OSError, zipfile.BadZipFile) as e:
                print(f"corpus: {name} is left out: {e}", file=sys.stderr)
                continue
            release = measure(path, package.name)
            if have + release.bytes > limit:
                continue
            have += release.bytes
            found.append(release)
        count, kinds = len(found), len({release.package for release in found})
        if not quick and (count < LEAST_RELEASES or kinds < LEAST_PACKAGES):
            raise BenchError(
                f"corpus: {count} releases of {kinds} packages where {LEAST_RELEASES} of {LEAST_PACKAGES} are"
                " needed; see above what could not be had, and run this again"
            )
        if quick and count < 6:
            raise BenchError(f"corpus: only {count} releases could be had; see above, and run this again")
        return sorted(found, key=lambda release: release.name)

    def _wanted(self, packages: list[Package]) -> Iterator[tuple[Package, str]]:
        """Yield releases: the newest of each package first, so that a bound on the size cuts off old ones."""
        columns = [[(package, version) for version in self._versions(package)] for package in packages]
        for row in zip_longest(*columns):
            yield from (one for one in row if one is not None)

    def _versions(self, package: Package) -> list[str]:
        """Return the versions that were chosen of a package; ask for them when it is the first time."""
        chosen: dict[str, list[str]] = json.loads(self._chosen.read_text()) if self._chosen.exists() else {}
        if package.name not in chosen:
            try:
                every = _pip_versions(package) if package.tool == "pip" else _apt_versions(package)
            except BenchError as e:
                print(f"corpus: {package.name} is left out: {e}", file=sys.stderr)
                return []
            chosen[package.name] = every[: package.releases]
            temporary = self._chosen.with_suffix(".new")
            temporary.write_text(json.dumps(chosen, indent=1))
            temporary.replace(self._chosen)
        return chosen[package.name]

    def _have(self, package: Package, version: str, path: Path) -> None:
        if path.is_dir():
            return
        print(f"corpus: getting {path.name}", file=sys.stderr)
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="getting-") as name:
            here = Path(name)
            tree = here / "tree"
            tree.mkdir()
            if package.tool == "pip":
                _pip("download", "-q", "--no-deps", *WHEELS, "-d", here, f"{package.name}=={version}")
                (wheel,) = here.glob("*.whl")
                _unpack_wheel(wheel, tree)
            else:
                # apt drops its privileges for a download, and must be able to write where it runs
                here.chmod(0o777)
                run(["apt-get", "-qq", "download", version], DEADLINE, cwd=here)
                (archive,) = here.glob("*.deb")
                run(["dpkg-deb", "-x", archive, tree], DEADLINE)
            tree.rename(path)


def _name_of(package: Package, version: str) -> str:
    """Return a release's folder name, of characters that a store path may have."""
    whole = version if package.tool == "apt" else f"{package.name}-{version}"
    return re.sub(r"[^0-9A-Za-z+._-]", "_", whole)


def _pip(*words: str | Path) -> Usage:
    env = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return run([sys.executable, "-m", "pip", "--no-input", *words], DEADLINE, env=env)


def _pip_versions(package: Package) -> list[str]:
    """Return versions, newest first: neighbours and older lines in turn, as stores hold them."""
    output = _pip("index", "versions", *WHEELS, package.name).output
    listed = re.search(r"Available versions: (.*)", output)
    if listed is None:
        raise BenchError("pip lists no versions")
    versions = [word for word in listed[1].split(", ") if re.fullmatch(r"[0-9.]+", word)]
    newest_of_line: dict[str, str] = {}
    for version in versions:
        newest_of_line.setdefault(".".join(version.split(".")[:2]), version)
    lines = list(newest_of_line.values())
    close = [version for version in versions[1:4] if version not in lines]
    mixed = [one for pair in zip_longest(lines[:8], close) for one in pair if one is not None]
    return list(dict.fromkeys(mixed))


def _apt_versions(package: Package) -> list[str]:
    """Return `name=version`, or names that carry the version, as the suites have them, newest first."""
    if package.name.startswith("^"):
        output = run(["apt-cache", "search", "--names-only", package.name], DEADLINE).output
        names = [line.split()[0] for line in output.splitlines() if line.strip()]
        return sorted(names, key=_numbers, reverse=True)
    output = run(["apt-cache", "madison", package.name], DEADLINE).output
    rows = [[cell.strip() for cell in line.split("|")] for line in output.splitlines()]
    versions = dict.fromkeys(row[1] for row in rows if len(row) == 3 and row[2].endswith("Packages"))
    if not versions:
        raise BenchError("apt knows no version (is its list of packages up to date?)")
    return [f"{package.name}={version}" for version in versions]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _unpack_wheel(wheel: Path, tree: Path) -> None:
    """Unpack a wheel with its executable bits."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree)
        for info in archive.infolist():
            if (info.external_attr >> 16) & stat.S_IXUSR and not info.is_dir():
                os.chmod(tree / info.filename, 0o755)
