"""Proves that nothing that happens in a line of research breaks what must always hold of it.

A state machine proposes better, worse, equal and crashing changes, kills nights at any step, starts them again, tries
edits by hand and edits the user's files beside it all, on a real repository. After each of these every invariant
holds, and for each there is a planted bug (plants.py) that breaks it. Needs git; forks.py says how a night is run.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.plugin.forks import LOOP, STATE, Idea, Nights, build, copy, git, outcomes, records, train, user_view

HUNT = settings.get_current_profile_name() == "hunt"
LIMITS = settings(
    max_examples=200 if HUNT else 6,
    stateful_step_count=30 if HUNT else 8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
KILLS = st.lists(st.integers(0, 90), max_size=2)  # the steps before which starts one after the other are killed
FINAL = ("keep", "discard", "crash")


def blob(text: str) -> str:
    """Return git's name for a file with this text."""
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Line(RuleBasedStateMachine):
    """One line of research, and what is expected of it."""

    nights: ClassVar[Nights]
    template: ClassVar[Path]  # a repository in which nothing has been run
    plant: ClassVar[str] = ""

    @initialize()
    def begin(self) -> None:
        """Begin with one experiment of each kind."""
        self.top = self.nights.home / "project"
        copy(self.template, self.top)
        self.ideas: list[Idea] = []
        self.expected: list[str] = []  # the outcome of each idea
        self.kept: list[Idea] = []
        self.champion = (1.0, train(noise=0.01))
        self.ledger = b""
        for outcome in FINAL:
            self.have(outcome)
        self.user = user_view(self.top)

    def have(self, outcome: str) -> None:
        """Have an idea that will be kept, discarded, or crash; of one that is "close" the rule has to say."""
        number = len(self.ideas) + 1
        best = self.champion[0]
        score = {"keep": best * 0.9, "close": best - 0.01}.get(outcome, best * 1.5)
        mode = "bang" if outcome == "crash" else "ok"
        idea = Idea(description=f"idea {number}", text=train(score, mode=mode, noise=0.0, more=f"N = {number}\n"))
        self.ideas.append(idea)
        self.expected.append(outcome)
        if outcome == "keep":
            self.kept.append(idea)
            self.champion = (score, idea.text)

    def night(self, *kills: int) -> None:
        """Run what is not done yet; each kill is followed by another start."""
        for kill in (*(() if self.plant else kills), None):
            ended = self.nights.run(self.top, *LOOP, ideas=self.ideas, kill=kill, plant=self.plant)
            assert ended.killed or ended.code == 1, ended.out
        if self.expected[-1] == "close":
            self.expected[-1] = outcomes(self.top)[-1]
            if self.expected[-1] == "keep":
                self.kept.append(self.ideas[-1])
                self.champion = (self.champion[0] - 0.01, self.ideas[-1].text)

    @rule(kills=KILLS)
    def keep(self, kills: list[int]) -> None:
        """Propose what is better."""
        self.have("keep")
        self.night(*kills)

    @rule(kills=KILLS)
    def discard(self, kills: list[int]) -> None:
        """Propose what is worse."""
        self.have("discard")
        self.night(*kills)

    @rule(kills=KILLS)
    def close(self, kills: list[int]) -> None:
        """Propose what is too close to call in one run."""
        self.have("close")
        self.night(*kills)

    @rule(kills=KILLS)
    def crash(self, kills: list[int]) -> None:
        """Propose what does not run."""
        self.have("crash")
        self.night(*kills)

    @rule(kill=st.integers(0, 40))
    def killed_start(self, kill: int) -> None:
        """Start a loop that has nothing to do, and kill it."""
        self.night(kill)

    @rule(
        name=st.sampled_from(["untracked.txt", "ignored.log", "staged.txt", "modified.txt", "new/file.txt"]),
        how=st.sampled_from(["edit", "edit and stage", "remove", "make executable"]),
        text=st.sampled_from(["", "mine\n", "mine too\n"]),
    )
    def user_edits(self, name: str, how: str, text: str) -> None:
        """Let the user work beside the loop."""
        path = self.top / name
        if how == "remove":
            path.unlink(missing_ok=True)
        elif how == "make executable":
            if path.exists():
                path.chmod(0o755)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            if how == "edit and stage":
                git(self.top, "add", "-f", name)
        self.user = user_view(self.top)

    @rule()
    def user_commits(self) -> None:
        """Let the user commit what is staged."""
        git(self.top, "commit", "-q", "--allow-empty", "-m", "the user's")
        self.user = user_view(self.top)

    @rule()
    def user_tidies(self) -> None:
        """Let the user remove what looks superfluous: the loop's worktree and git's loose objects."""
        git(self.top, "clean", "-q", "-f", "-f", "-d", "-x", ".autoresearch")
        git(self.top, "gc", "-q", "--prune=now")
        self.night()

    # ---- what must always hold

    def holds(self, name: str, *same: Any) -> None:
        assert same[0] == same[1], f"{name}: {same[0]!r} is not {same[1]!r}"

    @invariant()
    def users_files_stay(self) -> None:
        self.holds("users files stay", user_view(self.top), self.user)

    @invariant()
    def ledger_only_grows(self) -> None:
        now = (self.top / STATE / "ledger.jsonl").read_bytes()
        self.holds("ledger only grows", now[: len(self.ledger)], self.ledger)
        self.ledger = now

    @invariant()
    def every_experiment_has_one_verdict(self) -> None:
        got = [
            (record["number"], record["description"], record["verdict"]["outcome"])
            for record in records(self.top)
            if record["verdict"] and record["verdict"]["outcome"] in FINAL
        ]
        numbers = range(1, len(self.ideas) + 1)
        names = [idea.description for idea in self.ideas]
        self.holds("every experiment has one verdict", got, list(zip(numbers, names, self.expected, strict=True)))

    @invariant()
    def branch_is_the_chain_of_keeps(self) -> None:
        log = git(self.top, "log", "--first-parent", "--format=%s", "autoresearch/lab").splitlines()
        names = [idea.description for idea in reversed(self.kept)]
        self.holds("branch is the chain of keeps", log, [*names, "project"])
        head = git(self.top, "rev-parse", "autoresearch/lab:train.py")
        self.holds("branch is the chain of keeps", head, blob(self.champion[1]))

    @invariant()
    def worktree_holds_the_champion(self) -> None:
        text = (self.top / ".autoresearch/lab/train.py").read_text()
        self.holds("worktree holds the champion", text, self.champion[1])
        changed = git(self.top / ".autoresearch/lab", "status", "--porcelain", "--", ":!results.tsv")
        self.holds("worktree holds the champion", changed, "")

    @invariant()
    def every_attempt_is_retrievable(self) -> None:
        for number, idea in enumerate(self.ideas, 1):
            ref = self.top / f".git/refs/autoresearch/lab/{number:04d}"
            known = ref.exists() or f"lab/{number:04d}\n" in git(self.top, "for-each-ref", "refs/autoresearch/") + "\n"
            self.holds("every attempt is retrievable", known, True)
            there = git(self.top, "rev-parse", f"refs/autoresearch/lab/{number:04d}:train.py")
            self.holds("every attempt is retrievable", there, blob(idea.text))

    @invariant()
    def results_show_every_experiment(self) -> None:
        rows = (self.top / ".autoresearch/lab/results.tsv").read_text().splitlines()[1:]
        shown = [tuple(row.split("\t")[3:]) for row in rows]
        names = [idea.description for idea in self.ideas]
        wanted = [("keep", "baseline")] * 3 + list(zip(self.expected, names, strict=True))
        self.holds("results show every experiment", shown, wanted)

    @invariant()
    def no_run_has_anothers_seed(self) -> None:
        seeds = [record["seed"] for record in records(self.top)]
        self.holds("no run has anothers seed", len(seeds), len(set(seeds)))

    @invariant()
    def nothing_lies_about(self) -> None:
        lying = [str(path) for path in self.top.glob(".git/autoresearch/lab/runs/*/*") if path.suffix != ".log"]
        lying += [str(path) for path in (self.top / ".autoresearch").rglob("*.autoresearch-new")]
        self.holds("nothing lies about", lying, [])


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Line]]:
    """Return the machine with a warmed interpreter."""
    home = tmp_path_factory.mktemp("machine")
    Line.template = home / "template"
    build(Line.template, train(noise=0.01))
    with Nights(home / "home") as Line.nights:
        once = Line()
        once.begin()
        once.night()
        copy(once.top, Line.template)
        yield Line


def test_what_must_always_hold(line: type[Line]) -> None:
    run_state_machine_as_test(line, settings=LIMITS)


BUGS = {
    "users files stay": ["checkout is reset", "checkout is cleaned"],
    "every experiment has one verdict": ["verdicts are recorded twice"],
    "ledger only grows": ["ledger is rewritten"],
    "branch is the chain of keeps": ["discards are kept"],
    "worktree holds the champion": ["candidate stays"],
    "every attempt is retrievable": ["attempts are forgotten"],
    "results show every experiment": ["results lag"],
    "no run has anothers seed": ["seeds repeat"],
    "nothing lies about": ["run folders stay"],
}


@pytest.mark.parametrize(("name", "plant"), [(name, plant) for name, plants in BUGS.items() for plant in plants])
def test_a_planted_bug_breaks(line: type[Line], monkeypatch: pytest.MonkeyPatch, name: str, plant: str) -> None:
    monkeypatch.setattr(line, "plant", plant)
    only = settings(LIMITS, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError, match=f"^{name}: "):
        run_state_machine_as_test(line, settings=only)
