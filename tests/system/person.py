"""An ordinary user who runs cidfs: another uid, no groups, a home of his own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.commands import ROOT, TIMEOUT, Failed

NOBODY = 65534


class Person:
    """Somebody with few rights, and how he runs programs."""

    def __init__(self, uid: int, home: Path, python: list[str], path: list[str]) -> None:
        self.uid = uid
        self.home = home
        self.python = python
        self.environment = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_LIBRARY_PATH": str(Path(python[0]).parent.parent / "lib"),
        }

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
        """Run a program as this user."""
        other = os.geteuid() == 0
        return subprocess.run(
            [str(w) for w in words],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT,
            env=self.environment,
            cwd=self.home,
            check=False,
            user=self.uid if other else None,
            group=self.uid if other else None,
            extra_groups=[] if other else None,
        )

    def cidfs(self, *words: str | Path, code: int = 0) -> list[str]:
        """Run cidfs as this user; return the lines of its standard output, of its errors if it must fail."""
        done = self.run(*self.python, "-m", "cidfs", *words)
        if done.returncode != code:
            raise Failed(f"{words}: exit code {done.returncode}, not {code}\n{done.stderr.decode()}")
        return (done.stderr if code else done.stdout).decode().splitlines()


def make_person(folder: Path, programs: Path) -> Person:
    """Return an ordinary user whose home is made in a folder; the one who runs the tests if he is one.

    The interpreter, the libraries and this checkout may lie where only their owner gets. They are copied into
    the folder programs then; hard links where that is possible.
    """
    home = folder / "home"
    home.mkdir()
    path = [str(ROOT), *_libraries()]
    if os.geteuid() != 0:
        return Person(os.geteuid(), home, [sys.executable], path)
    os.chown(home, NOBODY, NOBODY)
    person = Person(NOBODY, home, [sys.executable], path)
    if _can_run(person):
        return person
    python = programs / "bin/python3"
    if not python.exists():
        _copy_programs(programs, python)
    copied = [str(programs / "checkout"), str(programs / "libraries")]
    person = Person(NOBODY, home, [str(python)], copied)
    if not _can_run(person):
        raise Failed(f"user {NOBODY} cannot run {python}: the tests need a Python that others can run")
    return person


def _libraries() -> list[str]:
    return [p for p in sys.path if p.endswith("-packages") and os.path.isdir(p)]


def _can_run(person: Person) -> bool:
    try:
        done = person.run(*person.python, "-c", "import cidfs.cli.main")
    except PermissionError:
        return False
    return done.returncode == 0


def _copy_programs(programs: Path, python: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    left_out = shutil.ignore_patterns("site-packages", "dist-packages", "test")
    standard = sysconfig.get_path("stdlib")
    shutil.copytree(standard, programs / "lib" / version, copy_function=_link, ignore=left_out, symlinks=True)
    for library in _libraries():
        shutil.copytree(library, programs / "libraries", copy_function=_link, dirs_exist_ok=True)
    for part in ("cidfs", "tests/system"):
        shutil.copytree(ROOT / part, programs / "checkout" / part, copy_function=_link)
    python.parent.mkdir()
    base = getattr(sys, "_base_executable", sys.executable)
    _link(os.path.realpath(base), str(python))
    shared = os.path.join(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if os.path.exists(shared):
        _link(shared, str(programs / "lib" / os.path.basename(shared)))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
