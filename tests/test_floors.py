"""The structure that the design promises: imports point down only, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cidfs

PACKAGE = Path(cidfs.__file__).parent
FLOORS = [
    {"cidfs", "cidfs.errors", "cidfs.config", "cidfs.control", "cidfs.faults", "cidfs.board"},
    {"cidfs.formats"},
    {"cidfs.local", "cidfs.remote"},
    {"cidfs.engine"},
    {"cidfs.mount", "cidfs.nix"},
    {"cidfs.daemon"},
    {"cidfs.daemon_process"},
    {"cidfs.holder"},
    {"cidfs.background", "cidfs.doctor"},
    {"cidfs.cli"},
    {"cidfs.__main__"},
]
PURE = {"trio", "lmdb", "pyfuse3", "socket", "subprocess", "asyncio", "pathlib", "os"}


def _modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path))
    return found


def _floor(module: str) -> int:
    best = -1
    for number, names in enumerate(FLOORS):
        for name in names:
            if module == name or (name != "cidfs" and module.startswith(name + ".")):
                best = number
    assert best >= 0, f"{module} stands on no floor; add it to FLOORS"
    return best


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            base = node.module or ""
            found.add(base)
            if base == "cidfs" or base.startswith("cidfs."):
                known = {name for name, _ in _modules()}
                found |= {f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in known}
    return found


@pytest.mark.parametrize(("module", "path"), _modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_no_floor_reaches_up(module: str, path: Path) -> None:
    for imported in _imports(path):
        if imported.split(".")[0] != "cidfs" or imported == "cidfs":
            continue
        assert _floor(imported) <= _floor(module), f"{module} imports {imported}, which stands above it"


def test_local_and_remote_know_nothing_of_each_other() -> None:
    """They stand side by side: what goes on between this disk and others is the engine's to say."""
    sides = {"cidfs.local", "cidfs.remote"}
    seen = set()
    for module, path in _modules():
        side = ".".join(module.split(".")[:2])
        if side in sides:
            seen.add(side)
            (other,) = sides - {side}
            assert not any(name == other or name.startswith(f"{other}.") for name in _imports(path)), module
    assert seen == sides


@pytest.mark.parametrize(
    ("module", "path"), [m for m in _modules() if m[0].startswith("cidfs.formats")], ids=lambda v: str(v)
)
def test_formats_do_no_io(module: str, path: Path) -> None:
    touched = {name.split(".")[0] for name in _imports(path)} & PURE
    assert not touched, f"{module} imports {touched}"


@pytest.mark.parametrize(("module", "path"), _modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_module_says_what_it_owns(module: str, path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{module} has no docstring"


def test_a_reach_upwards_would_be_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from cidfs.mount import view\nimport cidfs.cli.main\n")
    assert {"cidfs.mount.view", "cidfs.cli.main"} <= _imports(bad)
    assert _floor("cidfs.mount.view") > _floor("cidfs.local.store")
