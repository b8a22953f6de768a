"""What Nix pays for cidfs below it: single questions, and a build of many derivations in an overlay above.

One chroot store of Nix with small paths is imported, and everything is done with it in three ways: cidfs with
its metadata socket; the store's own folder below, as Nix reads it by itself; and that folder with Nix's own
daemon on a socket, which tells what asking over a socket costs at all. They take turns within each round, a
round begins with another one, and medians count: a build waits for the machine in too many ways for one that
was lucky to tell anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, TypeVar
from urllib.parse import quote

from benchmark import machine
from benchmark.machine import BenchError, run
from benchmark.measures import Results, Size
from benchmark.peers import Cidfs
from cidfs.formats import nar

T = TypeVar("T")

SOURCE: Final = Path(__file__).with_name("asker.c")
NIX_ENV: Final = Path(__file__).parent.parent / "nix-env"
LONG: Final = 900.0
FEATURES: Final = "nix-command local-overlay-store read-only-local-store"  # ca-derivations ask thrice as much
IS_VALID_PATH: Final = 1
QUERY_PATH_INFO: Final = 26
BASE32: Final = "0123456789abcdfghijklmnpqrsvwxyz"
DERIVATIONS: Final = """\
{ tools, count }:
builtins.genList (number: derivation {
  name = "built-${toString number}";
  system = builtins.currentSystem;
  builder = "${tools}/busybox";
  args = [ "sh" "-c" "echo ${toString number} > $out" ];
}) count
"""


@dataclass(frozen=True, slots=True)
class Lower:
    """What an overlay stands on. uri is how Nix knows it; None where cidfs mounts the overlay and says it."""

    name: str
    folder: Path
    uri: str | None


class Nix:
    """Nix's commands, with everything of their own in a folder."""

    def __init__(self, prefix: Path, folder: Path) -> None:
        self.prefix = prefix
        self._folder = folder

    def command(self, *words: str | Path) -> list[str | Path]:
        """Return a command line in Nix's own environment."""
        enter = '. "$0" "$1" "$2" && shift 2 && exec "$@"'
        return ["bash", "-c", enter, NIX_ENV, self.prefix, self._folder, *words]

    def run(self, *words: str | Path) -> str:
        """Run a command to its end and return what it said."""
        return run(self.command(*words), LONG).output


class OnTop:
    """The measures with Nix on top."""

    def __init__(self, folder: Path, size: Size, results: Results, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._size = size
        self._results = results
        self._say = say
        self._peer = Cidfs(folder / "cidfs", [])
        self._root = folder / "root"
        self._socket = folder / "daemon.sock"
        self._paths: list[str] = []

    def measure(self, prefix: Path | None) -> None:
        """Make the stores and measure all; what fails is named and the rest goes on."""
        try:
            if prefix is None:
                raise BenchError("there is no Nix: CIDFS_TEST_NIX must name its prefix")
            if os.geteuid():
                raise BenchError("only root may mount overlays")
            self._folder.mkdir(parents=True)
            nix = Nix(prefix, self._folder / "nix")
            self._make(nix)
            with self._served(nix):
                steps = (("questions", self._ask), ("builds", lambda: self._build(nix)))
                for name, step in steps:
                    try:
                        step()
                    except BenchError as e:
                        self._fail(name, e)
        except (BenchError, OSError) as e:
            self._fail("set-up", e)
        finally:
            self._peer.unmount()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _fail(self, name: str, error: Exception) -> None:
        self._results.failures[f"nix: {name}"] = str(error)
        self._say(f"  {name} failed: {error}")

    # --- the stores

    def _make(self, nix: Nix) -> None:
        """Make a chroot store of small paths that refer to one another, and a cidfs with the same paths."""
        began = time.monotonic()
        store = self._root / "nix" / "store"
        store.mkdir(parents=True)
        lines: list[str] = []
        for number in range(self._size.known):
            digest = hashlib.sha256(b"path %d" % number).digest()
            path = f"/nix/store/{''.join(BASE32[byte & 31] for byte in digest)}-path-{number}"
            data = b"contents of path %d\n" % number * 8
            file = self._root / path[1:]
            file.write_bytes(data)
            file.chmod(0o444)
            os.utime(file, (1, 1))
            head, tail = nar.write_file_head(len(data), False), nar.write_file_tail(len(data))
            archive = b"".join((nar.HEADER, head, data, tail))
            references = sorted({self._paths[number // part] for part in (2, 3, 5)} if number else ())
            lines += [path, hashlib.sha256(archive).hexdigest(), str(len(archive)), ""]
            lines += [str(len(references)), *references]
            self._paths.append(path)
        facts = self._folder / "facts"
        facts.write_text("".join(f"{line}\n" for line in lines))
        load = f'exec nix-store --store {self._root} --load-db < "{facts}"'
        nix.run("sh", "-c", load)
        # beside a log of what was written lately, Nix does not read a database that it may not write
        with contextlib.closing(sqlite3.connect(self._root / "nix/var/nix/db/db.sqlite")) as database:
            database.execute("pragma journal_mode = delete")
        self._peer.prepare()
        run(self._peer.command("import", "--all", "--from", self._root), LONG)
        self._peer.use([path.rpartition("/")[2] for path in self._paths])
        self._say(f"  {len(self._paths):,} paths in both stores after {time.monotonic() - began:.1f} s")

    @contextlib.contextmanager
    def _served(self, nix: Nix) -> Iterator[None]:
        """Have cidfs mounted, and Nix's daemon listening."""
        self._peer.mount()
        command: list[str | Path] = [
            "env",
            f"NIX_DAEMON_SOCKET_PATH={self._socket}",
            "nix-daemon",
            "--store",
            self._root,
        ]
        daemon = machine.start(nix.command(*command), self._folder / "daemon.log")
        try:
            deadline = time.monotonic() + 30
            while not self._socket.exists():
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"nix-daemon: {(self._folder / 'daemon.log').read_text()[-200:]}")
                time.sleep(0.01)
            yield
        finally:
            machine.end(daemon)

    # --- questions

    def _ask(self) -> None:
        """Ask both sockets the same, one question after the other on one connection."""
        program = self._folder / "asker"
        run(["gcc", "-O2", "-o", program, SOURCE], 60)
        known, unknown = self._folder / "known", self._folder / "unknown"
        known.write_text("".join(f"{path}\n" for path in sorted(self._paths)))
        names = [f"/nix/store/{'0' * 26}{number:06}-absent.drv" for number in range(len(self._paths))]
        unknown.write_text("".join(f"{name}\n" for name in names))
        sockets = {"cidfs": self._peer.store / "nix.sock", "nix-daemon": self._socket}
        kinds = {
            "nix_valid_us": (IS_VALID_PATH, known, len(self._paths)),
            "nix_absent_us": (IS_VALID_PATH, unknown, 0),
            "nix_info_us": (QUERY_PATH_INFO, known, len(self._paths)),
        }
        for turn in range(self._size.asks + 1):
            for key, (operation, listed, yes) in kinds.items():
                for name in _turned(list(sockets), turn):
                    where = sockets[name]  # by its name alone: an address has room for 107 characters
                    command: list[str | Path] = [program, where.name, str(operation), listed, "1"]
                    words = run(command, 60, cwd=where.parent).output.split()
                    if words[:2] != [str(len(self._paths)), str(yes)]:
                        raise BenchError(f"{name}: asked and answered with yes: {words[:2]}")
                    if turn:  # the first warms both up
                        self._results.add(key, name, float(words[2]))
        for key in kinds:
            ours, theirs = self._medians(key, "cidfs", "nix-daemon")
            self._results.add(key.replace("_us", "_ratio"), "cidfs", ours / theirs)
            self._say(f"  {key}: {ours:.1f} µs, nix-daemon {theirs:.1f} µs: {ours / theirs:.2f} times")

    def _medians(self, key: str, *names: str) -> list[float]:
        return [median(self._results.values[key][name]) for name in names]

    # --- builds

    def _build(self, nix: Nix) -> None:
        """Build many small derivations above each lower, each time in an empty overlay."""
        tools = self._folder / "tools"
        tools.mkdir()
        shutil.copy(nix.prefix / "bin" / "busybox", tools)
        (self._folder / "derivations.nix").write_text(DERIVATIONS)
        real = self._root / "nix" / "store"
        lowers = [
            Lower("cidfs", self._peer.point, None),
            Lower("plain folder", real, f"{self._root}?read-only=true"),
            Lower("nix-daemon", real, f"unix://{self._socket}?real={real}"),
        ]
        for turn in range(self._size.builds):
            self._results.calibrate()
            for lower in _turned(lowers, turn):
                counted = turn == 0 and lower.uri is None
                before = self._requests() if counted else 0
                self._results.add("nix_build_s", lower.name, self._build_above(nix, lower, tools))
                if counted:
                    asked = self._requests() - before
                    self._results.add("nix_build_questions", lower.name, asked)
        ours, plain, theirs = self._medians("nix_build_s", *(lower.name for lower in lowers))
        self._results.add("nix_build_ratio", "cidfs", ours / plain)
        self._results.add("nix_build_ratio", "nix-daemon", theirs / plain)
        self._say(
            f"  {self._size.derivations} derivations, {asked:,} questions: {ours:.2f} s, above a plain folder"
            f" {plain:.2f} s, with nix-daemon {theirs:.2f} s"
        )

    def _build_above(self, nix: Nix, lower: Lower, tools: Path) -> float:
        place = self._folder / "above"
        merged, upper, work = place / "merged/nix/store", place / "upper", place / "work"
        for folder in (merged, upper, work):
            folder.mkdir(parents=True)
        try:
            if lower.uri is None:
                options: list[str | Path] = ["--upper", upper, "--work", work, "--mount", lower.folder]
                said = run(self._peer.command("overlay", merged, *options), 60).output.splitlines()
                (uri,) = (line for line in said if line.startswith("local-overlay://"))
            else:
                layers = f"lowerdir={lower.folder},upperdir={upper},workdir={work}"
                run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], 60)
                uri = (
                    f"local-overlay://?root={place}/merged&lower-store={quote(lower.uri, safe='')}"
                    f"&upper-layer={upper}"
                )
            words: list[str | Path] = ["nix-build", "--store", uri, self._folder / "derivations.nix", "-Q"]
            words += ["--no-out-link", "--option", "experimental-features", FEATURES, "--arg", "tools", tools]
            words += ["--arg", "count", str(self._size.derivations)]
            usage = run(nix.command(*words), LONG)
            built = sum(line.startswith("/nix/store/") for line in usage.output.splitlines())
            if built != self._size.derivations:
                raise BenchError(f"{lower.name}: {built} paths were built: {usage.output[-300:]}")
            return usage.wall
        finally:
            if machine.is_mounted(merged):
                run(["umount", merged], 60)
            shutil.rmtree(place)

    def _requests(self) -> int:
        """Return how many questions cidfs has answered."""
        time.sleep(2)  # it counts them up once a second
        said = run(self._peer.command("stats", "--json"), 60).output
        found: int = json.loads(said)["daemon"]["nix"]["requests"]
        return found


def _turned(found: list[T], turn: int) -> list[T]:
    """Return a list that begins with another one each time."""
    at = turn % len(found)
    return found[at:] + found[:at]
