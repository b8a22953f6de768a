"""Random adds, removals, collections, rebuilds and mounts, held against a model of what must be there.

Each command runs in a process of its own, some two at once, some killed on the way. After each round the
names in index and mounts are compared; at random moments, and at the end, every byte that the mounts show.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.commands import Store, unmount_left_over
from tests.system.forks import ForkedStore, Forks, forking
from tests.system.model_support import (
    FILES,
    KILL_AT_A_CALL,
    NAMES,
    NO_ROOM,
    SECONDS,
    SHAPES,
    Model,
    Mount,
    Spec,
    Tree,
    Trees,
    publish,
)
from tests.system.support import nar_of

ROUNDS = 200 if Store.long else 25
STEPS = 25  # rounds with one store
MOUNTS = 2
CALLS = 25  # a command that is killed makes about as many calls

SPECS = st.builds(
    Spec,
    st.sampled_from(NAMES),
    st.sampled_from(SHAPES),
    st.lists(st.sampled_from(FILES), min_size=1, max_size=4, unique=True).map(lambda f: tuple(sorted(f))),
    st.integers(0, 2),
)
SOME_SPECS = st.lists(SPECS, min_size=1, max_size=3)
BESIDE = ("gc", "rebuild", "add", "remove")


class StoreMachine(RuleBasedStateMachine):
    """A store, its mounts, and the model beside it."""

    forks: ClassVar[Forks]
    rounds: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="cidfs-model-"))
        self.store = ForkedStore(self.folder / "state", self.forks)
        self.model = Model(self.store)
        self.trees = Trees(self.folder)
        self.specs: list[Spec] = []
        self.mounts_made = 0
        self.journal_is_whole = True  # nobody was killed between a commit and the journal since
        self.idle = True

    # --- bringing in

    def _trees(self, specs: Sequence[Spec]) -> list[Tree]:
        self.specs += [s for s in specs if s not in self.specs]
        return list({tree.base_name: tree for tree in map(self.trees.of, specs)}.values())

    @initialize(chance=st.integers(0, 99), specs=SOME_SPECS)
    def begin(self, chance: int, specs: list[Spec]) -> None:
        """Begin; not with the first example, which hypothesis makes of the simplest choices alone."""
        self.idle = chance == 0
        if not self.idle:
            self._add(self._trees(specs))

    @rule(data=st.data())
    def one_round(self, data: st.DataObject) -> None:
        """Do one thing. One rule for all, for hypothesis leaves out half of the rules each time."""
        if self.idle:
            return
        type(self).rounds += 1
        mounts, published = self.model.mounts, self.model.published
        if mounts and published and data.draw(st.booleans(), "hold open"):
            self.hold_open(data)
        possible = ["add", "again", "again", "gc", "gc", "rebuild", "verify", "import", "compare"]
        possible += ["two at once"] * 4
        possible += ["remove"] * 4 + ["publish"] * 2 if published else []
        possible += ["mount"] * 3 if len(mounts) < MOUNTS else []
        possible += ["umount"] if mounts else []
        match data.draw(st.sampled_from(possible), "round"):
            case "add":
                self._add(self._trees(data.draw(SOME_SPECS, "trees")))
            case "again":
                again = st.lists(st.sampled_from(self.specs), min_size=1, max_size=3)
                self._add(self._trees(data.draw(again, "trees")))
            case "import":
                self.import_a_nar(data.draw(SPECS, "tree"))
            case "publish":
                self.publish_with_references(data)
            case "remove":
                self.remove(data)
            case "gc":
                self.gc(look_before=data.draw(st.booleans()), again=data.draw(st.booleans()))
            case "rebuild":
                self.rebuild(index_is_lost=data.draw(st.booleans(), "the index is lost"))
            case "verify":
                self.store.run("verify", timeout=SECONDS)
            case "mount":
                self.mount(list_root=data.draw(st.booleans(), "list root"))
            case "umount":
                self._umount(data.draw(st.sampled_from(range(len(mounts))), "which"))
            case "compare":
                self.compare()
            case _:
                self.two_at_once(data)

    def _add(self, trees: list[Tree]) -> None:
        done = self.store.run("add", *(t.path for t in trees), timeout=SECONDS)
        assert done.stdout.decode().splitlines() == [t.full for t in trees]
        self.model.settle(come=trees)
        self.journal_is_whole = True

    def import_a_nar(self, spec: Spec) -> None:
        (tree,) = self._trees([spec])
        nar = b"".join(nar_of(os.fsencode(tree.path)))
        words = ("import", "-", "--name", tree.full)
        done = self.store.run(*words, stdin=nar, timeout=SECONDS)
        assert done.stdout.decode().splitlines() == [tree.full]
        self.model.settle(come=[tree])
        self.journal_is_whole = True

    def publish_with_references(self, data: st.DataObject) -> None:
        spec = data.draw(SPECS, "tree")
        present = sorted(self.model.published)
        wanted = []
        for variant in range(data.draw(st.integers(1, 2), "how many")):
            chosen = data.draw(st.lists(st.sampled_from(present), min_size=1, max_size=2), "references")
            tree = self.trees.of(spec._replace(variant=variant), chosen)
            present.append(tree.base_name)
            wanted.append(tree)
        printed = publish(self.store, *((t.path, t.base_name, t.references) for t in wanted))
        assert printed == [t.base_name for t in wanted]
        self.model.settle(come=wanted)
        self.journal_is_whole = True

    # --- taking out

    def remove(self, data: st.DataObject) -> None:
        option = data.draw(st.sampled_from(["", "--referrers", "--force"]), "option")
        asked = data.draw(
            st.lists(st.sampled_from(self.model.names()), min_size=1, max_size=3, unique=True), "paths"
        )
        there = {name for name in asked if name in self.model.published}
        leaving = self.model.with_referrers(there) if option == "--referrers" else there
        staying = {r for name in there for r in self.model.referrers(name)} - leaving
        refused = bool(staying) and option != "--force"
        code = 9 if refused else 4 if len(there) < len(asked) else 0
        words = ["remove", *asked, *([option] if option else [])]
        printed = self.store.run(*words, code=code, timeout=SECONDS).stdout.decode().splitlines()
        gone = [Path(line).name for line in printed]
        assert set(gone) == (set() if refused else leaving)
        assert len(gone) == len(set(gone))
        for number, name in enumerate(gone):
            assert not self.model.referrers(name) & set(gone[number + 1 :]), "referrers go first"
        self.model.settle(gone=gone)
        self.journal_is_whole = self.journal_is_whole or not refused

    def gc(self, look_before: bool, again: bool) -> None:
        said = self._figures("--dry-run") if look_before else {}
        done = self._figures()
        assert not look_before or said == done
        self.model.settle()
        self.model.compare_packs()
        self.model.compare_litter()
        self.journal_is_whole = True
        if again:
            left = self._figures("--dry-run")
            assert not any(
                left[name] for name in left if name not in ("paths", "entries", "held", "held_bytes")
            ), left

    def _figures(self, *options: str) -> dict[str, object]:
        figures = json.loads(self.store.run("gc", "--json", *options, timeout=SECONDS).stdout)
        assert figures["problems"] == []
        assert figures["paths"] == len(self.model.published)
        return dict(figures)

    # --- the rest

    def rebuild(self, index_is_lost: bool) -> None:
        if index_is_lost and self.journal_is_whole:
            shutil.rmtree(self.store.state / "index")
        self.store.run("rebuild", timeout=SECONDS)
        self.model.settle()
        self.journal_is_whole = True

    def mount(self, list_root: bool) -> None:
        self.mounts_made += 1
        path = self.folder / f"mnt-{self.mounts_made}"
        path.mkdir()
        self.store.mount(path, *(["--list-root"] if list_root else []))
        self.model.mounts.append(Mount(path, list_root))

    def _umount(self, number: int) -> None:
        mount = self.model.mounts.pop(number)
        mount.let_go()
        self.store.umount(mount.path)

    def hold_open(self, data: st.DataObject) -> None:
        """Open paths in a mount; they are read when it ends, whatever becomes of them."""
        mount = data.draw(st.sampled_from(range(len(self.model.mounts))), "mount")
        for name in data.draw(st.sets(st.sampled_from(sorted(self.model.published)), min_size=1), "paths"):
            self.model.mounts[mount].hold(self.model.published[name])

    def compare(self) -> None:
        """Read everything; also what `ls` says."""
        assert self.store.lines("ls") == [f"/nix/store/{name}" for name in sorted(self.model.published)]
        for mount in self.model.mounts:
            self.model.compare_contents(mount)

    # --- several at once

    def two_at_once(self, data: st.DataObject) -> None:
        """Run two commands side by side, the first perhaps until it is killed."""
        first = data.draw(st.sampled_from(["add", "gc", "rebuild", "remove"]), "first")
        beside = data.draw(st.sampled_from(BESIDE), "beside")
        killed_at = data.draw(st.one_of(st.none(), st.integers(1, CALLS)), "killed at call")
        coming: list[Tree] = []
        going: list[str] = []
        commands: list[list[str | Path]] = []
        for word in (first, beside):
            arguments: list[str | Path] = []
            if word == "add":
                chosen = self._trees(data.draw(SOME_SPECS, "trees"))
                coming += chosen
                arguments += [t.path for t in chosen]
            elif word == "remove":
                new = {t.base_name for t in coming}
                going += sorted(self.model.with_referrers(sorted(self.model.published)[:1]))
                going = [name for name in going if name not in new] or ["0" * 32 + "-none"]
                arguments += [*going, "--force"]
            commands.append([word, *arguments])
        no_room = first == "gc" and killed_at is None and data.draw(st.booleans(), "no room to copy")
        hook = KILL_AT_A_CALL.format(at=killed_at) if killed_at is not None else NO_ROOM if no_room else ""
        self._run_both(commands, hook)
        self.model.settle(come=coming, gone=going, unsure=killed_at is not None)
        self.model.compare_names(at_once=False)

    def _run_both(self, commands: list[list[str | Path]], hook: str) -> None:
        removes = [words for words in commands if words[0] == "remove"]
        may_be_absent = len(removes) == 2 or any("-none" in str(words) for words in removes)
        processes = [self.store.start(*commands[0], hook=hook), self.store.start(*commands[1])]
        for number, process in enumerate(processes):
            _, err = process.communicate(timeout=SECONDS)
            killed = process.returncode == -signal.SIGKILL and number == 0 and "SIGKILL" in hook
            absent = process.returncode == 4 and may_be_absent
            assert killed or absent or process.returncode == 0, (commands[number], err.decode())
            if killed:
                self.journal_is_whole = False

    # --- always

    @invariant()
    def names_agree(self) -> None:
        self.model.compare_names()

    def teardown(self) -> None:
        if self.idle:
            shutil.rmtree(self.folder)
            return
        try:
            if sys.exc_info()[0] is not None:
                return  # it has failed already
            self.compare()
            while self.model.mounts:
                self._umount(0)
            self.gc(look_before=False, again=True)
            self.store.run("verify", timeout=SECONDS)
        finally:
            for mount in self.model.mounts:
                for fd, _ in mount.held:
                    os.close(fd)
            left = self.store.end()
            unmount_left_over(self.folder)
            log = self.store.log_text()
            shutil.rmtree(self.folder)
        self._assert_quiet_end(left, log)

    @staticmethod
    def _assert_quiet_end(left: list[int], log: str) -> None:
        assert not left, f"daemons did not end: {left}"
        assert not log, f"a daemon logged: {log}"


def test_what_is_there_is_what_the_model_says() -> None:
    chosen = settings(
        max_examples=2,  # the first is idle
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to shrink what takes a minute would take hours
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    StoreMachine.rounds = 0
    with forking() as StoreMachine.forks:
        while StoreMachine.rounds < ROUNDS:
            run_state_machine_as_test(StoreMachine, settings=chosen)
