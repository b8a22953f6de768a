"""Verification of ten times the paths: no more memory to speak of, and time that does not grow by the square.

How much time it really takes is the benchmark's to say: here other work on the machine counts too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cidfs.local.store import LocalStore
from tests.commands import Store, environment
from tests.local.support import candidates, package

MEASURE = """
import resource, sys, threading
from pathlib import Path
import trio
from cidfs.cli.output import Steps
from cidfs.engine.verify import Depth, verify
from cidfs.local.store import LocalStore

peak, ended = [0], threading.Event()
def watch():
    while not ended.wait(0.01):
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.partition("RssAnon:")[2].split()[0]))
def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
threading.Thread(target=watch, daemon=True).start()
with LocalStore.open(Path(sys.argv[1])) as store:
    before = spent()
    report = trio.run(verify, store, None, Steps(None), Depth(quick=sys.argv[2] == "quick"))
    after = spent()
ended.set()
print(len(report.problems), report.paths, after - before, peak[0] // 1024)
"""
CHUNKS = 10
GROUP = 250


def make(root: Path, paths: int) -> None:
    """Fill a store with paths, each of them with chunks of its own and with references."""
    with LocalStore.open(root, write=True, create=True) as store:
        for start in range(0, paths, GROUP):
            group = [
                package(
                    f"p{i}",
                    {f"file-{k}": b"%d-%d" % (i, k) for k in range(CHUNKS)},
                    [f"p{j}" for j in range(max(0, i - 3), i)],
                )
                for i in range(start, min(paths, start + GROUP))
            ]
            store.publish(candidates(store, *group))


def measure(root: Path, form: str) -> tuple[int, float, int]:
    """Verify in a process of its own; return paths, seconds of processor time, megabytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root), form],
        capture_output=True,
        env=environment(),
        timeout=3600,
        check=True,
    )
    found = re.fullmatch(r"0 (\d+) ([0-9.e-]+) (\d+)\n", done.stdout.decode())
    assert found, done.stdout
    return int(found[1]), float(found[2]), int(found[3])


@pytest.mark.parametrize("form", ["quick", "full"])
def test_ten_times_the_paths_take_no_more_memory_and_not_the_square_of_the_time(
    scaled: tuple[Path, Path], form: str
) -> None:
    small, large = (measure(root, form) for root in scaled)
    assert large[0] == 10 * small[0]
    assert large[1] <= 40 * small[1], (small, large)
    pack_and_cache = 64 if form == "full" else 0
    assert large[2] <= small[2] + 10 + pack_and_cache, (small, large)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stores, the second with ten times the paths of the first."""
    folder = tmp_path_factory.mktemp("scaled")
    count = 10_000 if Store.long else 300
    for name, paths in (("small", count), ("large", 10 * count)):
        make(folder / name, paths)
    return folder / "small", folder / "large"
