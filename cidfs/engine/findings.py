"""What verification finds: damaged things, the store paths that each touches, and what was repaired of them.

`Ledger` is shared by the threads that read; all else is values. Bounded: what is found beyond the limits is
counted and not kept.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cidfs.formats.digest import cid_text
from cidfs.formats.store_path import StorePath
from cidfs.local.rows import Place

FINDINGS_SHOWN: Final = 1000  # of each kind
TOUCHES_SHOWN: Final = 10_000
TOUCHES_OF_ONE: Final = 100
DAMAGE_KEPT: Final = 100_000
KINDS: Final = ("index", "inodes", "journal", "pack", "manifest", "chunk", "path")
_MANY: Final = {"index": "differences in the index", "inodes": "inode limits", "journal": "journal entries"}


@dataclass(slots=True)
class Finding:
    """One damaged thing. line: for people; paths: what it touches, as store path or file inside one.

    repaired: how, empty while it is not.
    """

    kind: str
    what: str
    where: str
    line: str
    paths: list[str] = field(default_factory=list)
    more_paths: int = 0
    repaired: str = ""
    hint: str = ""
    kept: bool = True

    @property
    def text(self) -> str:
        """The line, with what became of it."""
        if self.repaired:
            return f"{self.line}; repaired: {self.repaired}"
        return f"{self.line}; {self.hint}" if self.hint else self.line

    def as_json(self) -> dict[str, Any]:
        """Return it as a program reads it."""
        known = {"kind": self.kind, "what": self.what, "where": self.where, "text": self.line}
        return {**known, "paths": self.paths, "more_paths": self.more_paths, "repaired": bool(self.repaired)}


@dataclass(frozen=True, slots=True)
class Touch:
    """A line that says how damage touches a store path."""

    path: StorePath
    line: str


@dataclass(slots=True)
class Bad:
    """A chunk or manifest that cannot be read. place: where its row points, None without a row."""

    database: str
    digest: bytes
    place: Place | None
    finding: Finding
    needed: bool = False  # by a store path


class Ledger:
    """All that was found so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.findings: list[Finding] = []
        self.touches: list[Touch] = []
        self.touched: set[StorePath] = set()
        self.mended: set[StorePath] = set()  # of these, those that are right again
        self.bad: dict[str, dict[bytes, Bad]] = {"chunks": {}, "manifests": {}}
        self.bad_packs: dict[bytes, Finding] = {}  # damaged where nothing reads: mended by moving the rest
        self.more: Counter[str] = Counter()
        self.more_bad = 0
        self.more_touches = 0
        self._counts: Counter[str] = Counter()
        self._packs: dict[str, Finding] = {}

    def add(self, kind: str, what: str, where: str, line: str) -> Finding:
        """Take a finding."""
        finding = Finding(kind, what, where, line)
        with self._lock:
            self._keep(finding)
        return finding

    def _keep(self, finding: Finding) -> None:
        self._counts[finding.kind] += 1
        if self._counts[finding.kind] <= FINDINGS_SHOWN:
            self.findings.append(finding)
        else:
            finding.kept = False
            self.more[finding.kind] += 1

    def set_repaired(self, finding: Finding, how: str) -> None:
        """Note that what was found is right again."""
        if not finding.repaired and not finding.kept:
            self.more[finding.kind] -= 1
        finding.repaired = how

    def add_bad(self, database: str, digest: bytes, place: Place | None, where: str, line: str) -> Bad:
        """Take a chunk or manifest that cannot be read, once; all those of a pack that is gone are one."""
        kind = database.removesuffix("s")
        with self._lock:
            old = self.bad[database].get(digest)
            if old is not None:
                return old
            if line.endswith(PACK_GONE):
                finding = self._packs.get(where)
                if finding is None:
                    finding = self._packs[where] = Finding("pack", where, where, line)
                    self._keep(finding)
            else:
                finding = Finding(kind, cid_text(digest), where, f"{line}: {kind} {cid_text(digest)}")
                self._keep(finding)
            bad = Bad(database, digest, place, finding)
            if len(self.bad[database]) < DAMAGE_KEPT:
                self.bad[database][digest] = bad
            else:
                self.more_bad += 1
            return bad

    def touch(self, path: StorePath, name: str, bad: Bad, files: Sequence[str], more: int) -> None:
        """Note that something damaged touches a store path: these files in it, and so many more."""
        finding = bad.finding
        with self._lock:
            bad.needed = True
            shown = [f"{name}/{file}" if file else name for file in files] or [name]
            room = max(0, TOUCHES_OF_ONE - len(finding.paths))
            finding.paths += shown[:room]
            finding.more_paths += len(shown[room:]) + more
            if len(self.touched) < DAMAGE_KEPT:
                self.touched.add(path)

    def add_line(self, path: StorePath, line: str) -> None:
        """Take a line that says how a store path is touched."""
        with self._lock:
            if len(self.touches) < TOUCHES_SHOWN:
                self.touches.append(Touch(path, line))
            else:
                self.more_touches += 1

    def add_from(self, other: Ledger) -> bool:
        """Take what another ledger has and this one lacks; say whether that was any damage."""
        new = False
        taken: set[int] = set()  # one finding may be of many chunks
        for database, found in other.bad.items():
            for digest, bad in found.items():
                if digest not in self.bad[database]:
                    new = True
                    self.bad[database][digest] = bad
                    if id(bad.finding) not in taken:
                        taken.add(id(bad.finding))
                        self._keep(bad.finding)
        known = {touch.line for touch in self.touches}
        for touch in other.touches:
            if touch.line not in known:
                self.add_line(touch.path, touch.line)
        lines = {finding.line for finding in self.findings}
        for finding in other.findings:
            if finding.kind == "path" and finding.line not in lines:
                self._keep(finding)
        return new


PACK_GONE: Final = "the pack is gone"


@dataclass
class Report:
    """What was read and what was found."""

    paths: int = 0
    frames: int = 0
    packs: int = 0
    bytes: int = 0
    chunks: int = 0  # read as a sample
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def findings(self) -> list[Finding]:
        """What was found, in a stable order."""
        return sorted(self.ledger.findings, key=lambda f: (KINDS.index(f.kind), f.line))

    @property
    def problems(self) -> list[str]:
        """A line for each damaged thing and for each store path that it touches."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        for finding in self.findings:
            yield finding.text
        for kind in KINDS:
            if self.ledger.more[kind]:
                yield f"and {self.ledger.more[kind]:,} more {_MANY.get(kind, f'{kind}s')}"
        for touch in sorted(self.ledger.touches, key=lambda t: str(t.path)):
            yield f"{touch.line}; repaired" if touch.path in self.ledger.mended else touch.line
        if self.ledger.more_touches:
            yield f"and {self.ledger.more_touches:,} more store paths that damage touches"

    @property
    def left(self) -> int:
        """How many problems there are that were not repaired, lines that were left out among them."""
        ledger = self.ledger
        found = sum(not finding.repaired for finding in ledger.findings)
        found += sum(touch.path not in ledger.mended for touch in ledger.touches)
        return found + sum(ledger.more.values()) + ledger.more_touches

    @property
    def repaired(self) -> int:
        """How many findings were repaired."""
        return sum(bool(f.repaired) for f in self.ledger.findings)
