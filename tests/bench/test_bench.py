"""The benchmark itself: ratios and wanted figures, the reader, deadlines, and a run on a tiny corpus."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark import machine, report
from benchmark.corpus import given
from benchmark.machine import BenchError, run
from benchmark.reader import Reader, choose

TOOLS = Path(__file__).parent.parent.parent / "tools"

VALUES = {
    "ingest": {"cidfs": [200.0, 250.0, 240.0], "casync": [90.0, 100.0], "restic": [130.0]},
    "stored_mb": {"cidfs": [480.0], "restic": [500.0]},
    "walk_cold": {"cidfs": [50_000.0], "squashfuse_ll": [25_000.0]},
    "daemon_peak_mb": {"cidfs": [120.0, 160.0]},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small releases of two packages; two of them differ little."""
    folder = tmp_path_factory.mktemp("corpus")
    for package in ("one", "two"):
        for version in range(2):
            release = folder / f"{package}-{version}"
            (release / "lib").mkdir(parents=True)
            (release / "lib" / "big.so").write_bytes(bytes(range(256)) * 5000 + str(version).encode() * 999)
            for number in range(40):
                (release / "lib" / f"{number}.py").write_text(f"{package} {version % 2} {number}\n" * 30)
            (release / "link").symlink_to("lib/1.py")
    return folder


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[None]:
    """Nothing of a test is mounted after it."""
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text(errors="surrogateescape")


def bench(folder: Path, corpus: Path, *words: str) -> list[str | Path]:
    """Return a command line of the benchmark on a given corpus."""
    places: list[str | Path] = ["--cache", folder / "cache", "--out", folder / "out", "--corpus", corpus]
    return [sys.executable, "-m", "benchmark", "--quick", *places, *words]


def alive_in(group: int) -> list[str]:
    """Return the processes of a group that still run; who ended and was not waited for does not."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                found.append(folder.name)
    return found


def test_the_best_value_counts_and_above_one_is_better() -> None:
    assert report.best(VALUES, "ingest", "cidfs") == 250
    assert report.best(VALUES, "daemon_peak_mb", "cidfs") == 120
    assert report.best(VALUES, "ingest", "borg") is None
    assert report.ratio(VALUES, "ingest", "casync") == 2.5
    assert report.ratio(VALUES, "stored_mb", "restic") == pytest.approx(500 / 480)
    assert report.ratio(VALUES, "walk_cold", "casync") is None


def test_wanted_figures_are_reached_not_reached_or_not_measured() -> None:
    found = {figure.title: figure for figure in report.figures(VALUES)}
    at_casync = found["ingest, MB/s beside casync's"]
    assert (at_casync.got, at_casync.reached) == (2.5, True)
    at_restic = found["ingest, MB/s beside restic's"]
    assert at_restic.got == pytest.approx(250 / 130)
    assert at_restic.reached is False
    size = found["stored size beside restic's"]
    assert size.got == pytest.approx(480 / 500)
    assert size.reached is True
    assert found["mounting the larger index, s"].reached is None
    text = report.figures_text(list(found.values()))
    assert "NOT REACHED" in text
    assert "not measured" in text


def test_tables_have_a_row_a_measure_and_a_column_a_peer() -> None:
    peers = ["cidfs", "casync", "restic", "squashfuse_ll"]
    head, *rows = report.table(VALUES, peers).splitlines()
    assert head.split() == peers
    assert [row.split("  ")[0] for row in rows] == [
        "ingest",
        "stored size, with index",
        "walk and stat, cold",
        "daemon memory, peak",
    ]
    assert rows[0].split()[-4:] == ["250", "100", "130", "-"]
    assert report.ratios(VALUES, peers).splitlines()[1].split() == ["ingest", "2.50", "1.92", "-"]
    assert "| ingest, MB/s | 250 | **2.50** (100) | **1.92** (130) |  |" in report.markdown(VALUES, peers)
    json.dumps(report.as_data(VALUES, peers))


def test_repeated_measures_tell_the_noise() -> None:
    assert report.spread({"a": {"cidfs": [9.0, 10.0, 11.0]}}) == pytest.approx(0.2)
    assert report.spread({"a": {"cidfs": [9.0]}}) == 0


def test_the_reader_counts_what_there_is(corpus: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    releases = given(corpus)
    lists = choose(releases, small=100, big=2 << 20, plenty=1 << 20, roots=10_000)
    assert (len(lists.roots), len(lists.small), len(lists.big)) == (4, 100, 2)
    written = lists.write(tmp_path / "lists", [release.name for release in releases])
    entries = sum(len(names) + len(folders) for _, folders, names in os.walk(corpus)) - 4
    for readers in (1, 2):
        walked = reader.run("walk", readers, corpus, written["roots"], 30)
        assert walked.entries == entries
        read = reader.run("read", readers, corpus, written["small"], 30)
        sizes = [(releases[at].path / rest).stat().st_size for at, rest in lists.small]
        assert (read.entries, read.bytes) == (100, sum(sizes))
        assert read.seconds > 0
    assert reader.run("stat", 1, corpus, written["roots"], 30).entries == 4


def test_the_reader_fails_when_it_cannot_read_all(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("one-0/lib/1.py\none-0/lib/no such file\n")
    with pytest.raises(BenchError, match="no such file"):
        Reader(tmp_path).run("read", 2, corpus, tmp_path / "list", 30)


def test_a_command_that_hangs_is_ended_with_all_below_it(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(BenchError, match="not done after 1 s"):
        run(["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 60 & wait"], 1)
    assert time.monotonic() - began < 20
    group = int((tmp_path / "pid").read_text())
    while alive_in(group):
        assert time.monotonic() - began < 20


def test_a_command_s_cost_is_that_of_all_its_processes() -> None:
    text = "import time; x = str(1) * (80 << 20); time.sleep(0.3); print(len(x))"
    work = shlex.join([sys.executable, "-c", text])
    usage = run(["sh", "-c", f"{work} & {work} & wait"], 30)
    assert usage.output.split() == [str(80 << 20)] * 2
    assert usage.peak > 150_000_000
    assert usage.cpu > 0.01


def test_what_is_mounted_is_known_without_touching_it() -> None:
    assert machine.is_mounted(Path("/proc"))
    assert not machine.is_mounted(Path("/proc/self"))
    assert machine.file_system_of(Path("/proc/self")).startswith("proc")


@pytest.mark.usefixtures("mounts")
def test_a_run_in_small(corpus: Path, tmp_path: Path) -> None:
    """cidfs and one peer on a given corpus: every measure of both, and the results in files."""
    done = subprocess.run(
        bench(tmp_path, corpus, "--peer", "ext4", "--only", "ingest", "--only", "read", "--only", "memory"),
        env={**os.environ, "PYTHONPATH": f"{TOOLS}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Times better than" in done.stdout
    data = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert data["failures"] == {}
    assert data["machine"]["cores"] == os.cpu_count()
    assert set(data["versions"]) >= {"cidfs", "ext4", "lmdb", "pyfuse3", "python"}
    for measure in ("ingest", "stored_mb", "walk_cold", "small_warm", "big2_cold"):
        assert set(data["values"][measure]) == {"cidfs", "ext4"}, measure
    assert data["values"]["daemon_peak_mb"]["cidfs"][0] > 10
    assert data["best"]["stored_mb"]["ext4"] > 5  # four files of 1.3 MB
    assert not list((tmp_path / "cache").glob("run-*"))


def test_what_nix_pays_is_told_by_medians() -> None:
    values = {"nix_build_s": {"cidfs": [4.0, 9.0, 5.0], "plain folder": [4.0]}, "ingest": {"cidfs": [1.0]}}
    head, row = report.nix_text(values).splitlines()
    assert head.split("  ")[-1] == "nix-daemon"
    cells = ["a build of many derivations, s", "5 (4 to 9)", "4 (4 to 4)", "-"]
    assert " ".join(row.split()) == " ".join(cells)
    assert f"| {' | '.join(cells)} |" in report.markdown(values, ["cidfs"])
    assert report.nix_text({"ingest": {"cidfs": [1.0]}}) == ""


@pytest.mark.usefixtures("mounts")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount overlays")
def test_a_run_in_small_with_nix_on_top(corpus: Path, tmp_path: Path) -> None:
    if not os.environ.get("CIDFS_TEST_NIX"):
        pytest.fail("the tests with a real Nix need CIDFS_TEST_NIX: run tools/test", pytrace=False)
    done = subprocess.run(
        bench(tmp_path, corpus, "--peer", "ext4", "--only", "nix", "--repeat", "1"),
        env={**os.environ, "PYTHONPATH": f"{TOOLS}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "With Nix on top" in done.stdout
    data = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert data["failures"] == {}
    for measure in ("nix_valid_us", "nix_absent_us", "nix_info_us"):
        assert set(data["values"][measure]) == {"cidfs", "nix-daemon"}, measure
    assert set(data["values"]["nix_build_s"]) == {"cidfs", "plain folder", "nix-daemon"}
    assert data["values"]["nix_build_questions"]["cidfs"][0] > 10
    assert not list((tmp_path / "cache").glob("run-*"))


@pytest.mark.usefixtures("mounts")
def test_a_run_that_is_stopped_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    with (
        subprocess.Popen(
            bench(tmp_path, corpus, "--peer", "ext4", "--only", "read"),
            env={**os.environ, "PYTHONPATH": f"{TOOLS}:{os.environ.get('PYTHONPATH', '')}"},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        contextlib.ExitStack() as at_last,
    ):
        at_last.callback(process.kill)  # leaving the block waits for it without a deadline
        assert process.stderr is not None
        for line in process.stderr:
            if "walk cidfs" in line:
                break
        process.terminate()
        assert "stopped" in process.stderr.read()
        assert process.wait(60) == 130
    assert not list((tmp_path / "cache").glob("run-*"))
