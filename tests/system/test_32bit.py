"""A 32-bit program without large-file support gets along with a store of many paths."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

from tests.commands import Store
from tests.system.support import at_once

PATHS = 10_000
BATCH = 2_500
SOURCE = Path(__file__).parent / "look32.c"


@pytest.fixture
def look32(tmp_path: Path) -> Path:
    """The 32-bit program, compiled."""
    if platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} does not run 32-bit programs for certain")
    program = tmp_path / "look32"
    done = subprocess.run(
        ["gcc", "-m32", "-Wall", "-Werror", "-o", program, SOURCE], capture_output=True, check=False
    )
    if done.returncode:
        pytest.fail(
            f"gcc -m32 fails, install gcc-multilib (tools/test does): {done.stderr.decode()[-500:]}",
            pytrace=False,
        )
    return program


def run(program: Path, *words: str | Path, stdin: bytes = b"") -> list[list[str]]:
    """Run the program and return the words of its lines; it must not fail."""
    done = subprocess.run([program, *words], input=stdin, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return [line.split(" ", 2) for line in done.stdout.decode().splitlines()]


def add_many(store: Store) -> list[str]:
    """Add thousands of small paths, several batches at once, and return their base names."""
    folder = store.state.parent / "many"
    trees = []
    for number in range(PATHS):
        tree = folder / f"p{number:05}"
        tree.mkdir(parents=True)
        (tree / "file").write_bytes(b"%d" % number)
        trees.append(tree)
    batches = at_once(lambda i: store.add(*trees[i : i + BATCH]), range(0, PATHS, BATCH))
    return [name for batch in batches for name in batch]


def test_it_finds_every_file_of_ten_thousand_paths(store: Store, mountpoint: Path, look32: Path) -> None:
    names = add_many(store)
    assert len(set(names)) == PATHS
    store.mount(mountpoint, "--list-root")

    files = "".join(f"{mountpoint}/{name}/file\n" for name in names)
    seen = run(look32, "stat", stdin=files.encode())
    assert [words[1:] for words in seen] == [[str(len(str(i))), str(i)[0]] for i in range(PATHS)]
    numbers = [int(words[0]) for words in seen]
    assert len(set(numbers)) == PATHS
    assert max(numbers) < 1 << 31
    for i in (0, PATHS // 2, PATHS - 1):
        assert (mountpoint / names[i] / "file").stat().st_ino == numbers[i]

    assert {words[1] for words in run(look32, "list", mountpoint / names[-1])} == {"file"}
    listed = {words[1]: int(words[0]) for words in run(look32, "list", mountpoint)}
    assert set(listed) == {".links", *names}
    assert listed[names[0]] == os.stat(mountpoint / names[0]).st_ino
    folders = run(look32, "stat", stdin="".join(f"{mountpoint}/{name}\n" for name in names).encode())
    assert [int(words[0]) for words in folders] == [listed[name] for name in names]
    assert store.stats()["store"]["paths"] == PATHS


def test_numbers_still_fit_after_many_rebuilds(store: Store, mountpoint: Path, look32: Path) -> None:
    folder = store.state.parent
    names = []
    for number in range(3):
        tree = folder / f"tree-{number}"
        tree.mkdir()
        (tree / "file").write_bytes(b"x")
        names += store.add(tree)
        store.run("rebuild")  # each leaves the range out that a writer might have been using
    store.mount(mountpoint, "--list-root")
    files = "".join(f"{mountpoint}/{name}/file\n" for name in names).encode()
    numbers = [int(words[0]) for words in run(look32, "stat", stdin=files)]
    assert numbers == sorted(numbers)
    assert numbers[-1] < 4 << 20
    assert {int(words[0]) for words in run(look32, "list", mountpoint)} >= {n - 1 for n in numbers}
