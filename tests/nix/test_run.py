"""Programs run out of the mount, with libraries from it, and files of it can be mapped."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import World
from .tool import Cidfs, Mount, mounted

_LIBRARY = r"""
static const char table[1 << 20] = {1, 2, 3, [1 << 19] = 42, [(1 << 20) - 1] = 7};
int counter = 5;
int answer(int at) { return table[at] + counter++; }
"""

_PROGRAM = r"""
#include <stdio.h>
#include <string.h>
int answer(int);
int main(int count, char **arguments) {
    int first = answer(0), second = answer(1 << 19), third = answer((1 << 20) - 1);
    printf("%d %d %d %s\n", first, second, third, count > 1 ? arguments[1] : "");
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[8192];
    while (maps && fgets(line, sizeof line, maps))
        if (strstr(line, "libanswer.so")) fputs(line, stdout);
    return 3;
}
"""


@pytest.fixture(scope="module")
def program(new_cidfs: Callable[[], Cidfs], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compile a program and a library of its own, add both, and return where a mount shows them."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.fail("these tests need a C compiler", pytrace=False)
    at = tmp_path_factory.mktemp("program").resolve()
    (at / "tool").mkdir()
    (at / "answer.c").write_text(_LIBRARY)
    (at / "main.c").write_text(_PROGRAM)
    library, main = at / "tool" / "libanswer.so", at / "tool" / "main"
    shared = ["-shared", "-fPIC", "-Wl,-soname,libanswer.so"]
    subprocess.run([compiler, *shared, "-o", library, at / "answer.c"], check=True)
    subprocess.run([compiler, "-o", main, at / "main.c", library, "-Wl,-rpath,$ORIGIN"], check=True)
    cidfs = new_cidfs()
    (path,) = cidfs.run("add", at / "tool").lines
    shutil.rmtree(at / "tool")
    with mounted(cidfs, at / "mnt") as mount:
        yield mount.path(path)


def test_a_program_runs_with_a_library_beside_it(program: Path) -> None:
    done = subprocess.run([program / "main", "word"], capture_output=True, check=False)
    assert done.stderr == b""
    first, *maps = done.stdout.decode().splitlines()
    assert (done.returncode, first) == (3, "6 48 14 word")
    assert maps
    assert all(line.endswith(f" {program}/libanswer.so") for line in maps)


def test_a_program_runs_many_times_at_once(program: Path) -> None:
    def run(number: int) -> bytes:
        done = subprocess.run([program / "main", str(number)], capture_output=True, check=False)
        return done.stdout.partition(b"\n")[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(40))) == [b"6 48 14 %d" % number for number in range(40)]


def test_busybox_runs_out_of_the_closure(world: World, mount: Mount) -> None:
    (leaf,) = (path for path in world.store.closure([world.top]) if path.endswith("-leaf-1"))
    where = mount.path(leaf) / "bin"
    for shell in ([where / "busybox", "sh"], [where / "sh"]):
        command = [*map(str, shell), "-c", "echo from $0; exit 5", leaf]
        done = subprocess.run(command, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (5, f"from {leaf}\n".encode(), b"")


def test_a_file_without_the_executable_bit_does_not_run(world: World, mount: Mount) -> None:
    with pytest.raises(PermissionError):
        subprocess.run([mount.path(world.trees["modes"]) / "file-644"], check=False)
    assert not os.access(mount.path(world.trees["modes"]) / "file-644", os.X_OK)


def test_an_executable_at_the_top_level_runs(world: World, mount: Mount) -> None:
    done = subprocess.run([mount.path(world.trees["executable"])], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"top level\n")


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
@pytest.mark.parametrize("name", ["noise", "hole"])
def test_a_mapped_file_has_the_bytes_that_nix_has(world: World, mount: Mount, name: str, flags: int) -> None:
    """Page by page from the back, then whole: faults come in no order that a read-ahead likes."""
    wanted = (world.store.real(world.trees["big"]) / name).read_bytes()
    with (
        (mount.path(world.trees["big"]) / name).open("rb") as file,
        mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped,
    ):
        for page in reversed(range(0, len(wanted), 7 * mmap.PAGESIZE)):
            assert mapped[page : page + 16] == wanted[page : page + 16]
        assert mapped[:] == wanted


def test_a_private_mapping_can_be_written_to_and_the_file_stays(world: World, mount: Mount) -> None:
    path = mount.path(world.trees["big"]) / "noise"
    before = path.read_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:5] = b"other"
        assert mapped[:5] == b"other"
    assert path.read_bytes() == before
