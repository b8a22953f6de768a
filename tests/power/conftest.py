"""Stores in memory with few folders, as for the tests of the local floor; the recorder, compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.conftest import empty_store, room, root, small  # noqa: F401
from tests.local.support import copy_store
from tests.power.material import Material, make_material
from tests.power.runner import Runner, build, runner


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorder."""
    return build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="module")
def commands(library: Path) -> Iterator[Runner]:
    """A runner of command lines."""
    with runner(library) as here:
        yield here


@pytest.fixture(scope="module")
def material(commands: Runner, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:  # noqa: F811
    """What to add and import."""
    folder = tmp_path_factory.mktemp("material")
    return make_material(folder, commands, copy_store(empty_store, folder / "state"))
