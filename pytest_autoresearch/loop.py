"""The two modes, registered on demand: the research loop, and one try of the edit in the work tree.

A mode collects no tests; it builds each experiment as an item when its turn comes and runs the ordinary protocol.
"""

import importlib.util
import math
import os
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from . import nodes
from . import settings as settings_
from .ledger import LedgerError, candidate_of, champion_record, status_of
from .lock import LockError
from .lockfile import FILE
from .mode import NAME, Mode
from .propose.adopt import Adoption
from .records import Candidate
from .report import terminal as report
from .report.claim import claim_lines
from .research import Refused, Research
from .settings import Settings
from .workspace import Workspace, WorkspaceError

PATIENCE = 5  # refused proposals in a row that end a loop which has an end
PAUSE_S, LONGEST_PAUSE_S = 0.05, 60.0  # after a refused proposal, doubled each time: never spin


def register(config: pytest.Config, mode: str) -> None:
    """Register the mode of the option `mode`; raise a UsageError for what cannot work."""
    settings_.refuse_impossible(config, mode)
    settings = settings_.read(config)
    if mode == "--autoresearch-loop":
        proposers = config.pluginmanager.hook.pytest_autoresearch_propose.get_hookimpls()
        if settings.agent is None and len(proposers) == 1 and importlib.util.find_spec("optuna") is None:
            raise pytest.UsageError(
                "the built-in tuner needs optuna: pip install optuna, or give --autoresearch-agent COMMAND"
            )
    plugin = Try(config, settings) if mode == "--autoresearch-try" else Loop(config, settings)
    nodes.register_hooks(config)
    config.pluginmanager.register(plugin, NAME)


class _Mode(Mode, ABC):
    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        super().__init__(config, settings)
        self.research: Research | None = None
        self.ended = ""  # why the loop ended by itself

    @abstractmethod
    def open(self) -> Workspace:
        """Open the workspace."""

    @abstractmethod
    def run(self, research: Research) -> None:
        """Run this mode's experiments."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the mode; a fault of the repository or the set-up ends it with one line and exit code 4."""
        try:
            with self.open() as workspace:
                try:
                    self.research = Research(session, self.settings, workspace, self.say)
                    self.run(self.research)
                except BaseException:
                    if not workspace.in_place:  # a half-run candidate must not lie about; a try's edit is the user's
                        with suppress(WorkspaceError):
                            workspace.restore_foreign()
                            workspace.restore()
                    raise
        except (WorkspaceError, LedgerError, LockError) as exc:
            raise pytest.UsageError(str(exc)) from exc
        return True

    def header(self, research: Research) -> None:
        """Say what is compared with what, and how to stop."""
        settings, workspace, terms = self.settings, research.workspace, research.terms
        better = "lower" if settings.direction == "min" else "higher"
        profile = f", profile {terms.profile}" if terms.profile else ""
        device = f", device {settings.device}" if settings.device != "auto" else ""
        trust = f", trust: {terms.trust}" if terms.trust else ""
        where = "this checkout" if workspace.in_place else os.path.relpath(workspace.workdir, settings.root)
        self.say(f"autoresearch: branch {workspace.branch}, in {where}; changes {', '.join(settings.mutable)}")
        self.say(
            f"  {settings.metric}, {better} is better; {terms.budget_s:g} s of training a run{profile}{device}{trust}"
        )
        lock, in_file = research.locked
        of = FILE if in_file else f"the files as they are, as there is no {FILE}:"
        self.say(f"  locked: {of} {lock.digest}")
        if lock.data and not lock.covers(terms.profile):
            self.say(f"  the data of profile {terms.profile} is not in {FILE}: what it is now counts for this call")
        for line in research.repaired:
            self.say(f"  {line}")
        if differs := research.lock.changed(settings.root):
            self.say(f"  locked files differ between your checkout and the branch, which counts: {', '.join(differs)}")
        if research.ledger.runs:
            number = research.ledger.next_number() - 1
            self.say(f"  goes on from experiment {number}, champion {workspace.champion[:7]}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show the closing table and the next commands; never raise."""
        if self.research is None:
            return
        try:
            self._summary(terminalreporter, self.research)
        except Exception as exc:
            terminalreporter.write_line(f"autoresearch: the summary could not be shown: {exc!r}")

    def _summary(self, terminal: Any, research: Research) -> None:
        settings, ledger, workspace = self.settings, research.ledger, research.workspace
        now = ledger.runs[research.first :]
        if not now:
            return
        terminal.section(f"autoresearch {workspace.tag}")
        new = {id(run) for run in now}
        shown = [row for row in ledger.history.rows if id(row) in new or status_of(row) == "keep"]
        writer = terminal._tw
        for line in report.table(shown, settings.metric, settings.direction, writer.fullwidth, writer.hasmarkup):
            terminal.write_line(line)
        self._claim(terminal, research)
        for line in report.second_split(ledger.runs, settings.metric, settings.direction, research.terms.fingerprint):
            terminal.write_line(line)
        if self.ended:
            terminal.write_line(f"ended: {self.ended}")
        self.next_steps(terminal, research, now)

    def _claim(self, terminal: Any, research: Research) -> None:
        record = champion_record(research.ledger.runs)
        if record is None:
            return
        for line in claim_lines(self.settings, research.ledger, record, research.standing, research.terms.fingerprint):
            terminal.write_line(line)
        counted = [*research.repeats.known(), record]
        trusts = {run["result"]["trust"] or "not stated" for run in counted}
        terminal.write_line(f"  trust of these runs: {', '.join(sorted(trusts))}")

    @abstractmethod
    def next_steps(self, terminal: Any, research: Research, now: list[dict[str, Any]]) -> None:
        """Hand over the next commands."""


class Loop(_Mode):
    """Propose, run, keep or not; again, until something ends it."""

    adoption: Adoption | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_autoresearch_propose(self, workdir: Path, history: Sequence[dict[str, Any]]) -> str | None:
        """Propose what another machine kept, where that is asked for."""
        return self.adoption.propose(workdir, history) if self.adoption else None

    def open(self) -> Workspace:
        """Open the loop's own worktree."""
        settings = self.settings
        return Workspace.for_loop(
            settings.root, mutable=settings.mutable, prefix=settings.branch_prefix, tag=settings.tag
        )

    def run(self, research: Research) -> None:
        """Run baselines if there are none, then experiments, and at the end what a claim needs."""
        hours = self.settings.hours
        deadline = time.monotonic() + hours * 3600 if hours else math.inf
        self.header(research)
        self.say("  stop with Ctrl-C: what is running is dropped, and the same command goes on from here")
        if self.settings.history is not None and (count := research.import_history(self.settings.history)):
            self.say(f"  imported {count} rows of {self.settings.history}: history, which nothing is compared with")
        if self.settings.adopt is not None:
            self.adoption = Adoption(self.settings, research.workspace.workdir)
        research.repeats.baselines()
        self.ended = self._night(research, deadline)
        research.repeats.claim()

    def _night(self, research: Research, deadline: float) -> str:
        """Run experiments until something ends them; return what did."""
        settings = self.settings
        done = int(research.finish_pending())
        refused: list[str] = []
        while True:
            research.repeats.rerun()
            if settings.max_experiments is not None and done >= settings.max_experiments:
                return f"{done} experiment{'s' * (done != 1)}, as --autoresearch-max asked"
            if time.monotonic() + research.repeats.claim_s() >= deadline:
                return f"{settings.hours:g} hours, as --autoresearch-hours asked"
            if self.adoption is not None:
                if not self.adoption.left(research.ledger.history):
                    return f"all that was kept on {self.adoption.branch} is through"
            elif (settings.hours or settings.max_experiments) and len(refused) >= PATIENCE:
                return f"{PATIENCE} proposals in a row that were no experiment; the last: {refused[-1]}"
            elif refused:
                time.sleep(min(LONGEST_PAUSE_S, PAUSE_S * 2 ** min(len(refused), 20)))
            number = research.ledger.next_number()
            proposal = research.propose(number, refused)
            if isinstance(proposal, Candidate):
                self._experiment(research, proposal)
            elif proposal.reason:
                refused.append(proposal.reason)
                self.say(f"  {number:>3}  no experiment: {proposal.reason}")
                continue
            refused.clear()
            done += 1

    def _experiment(self, research: Research, candidate: Candidate) -> None:
        """Run a candidate, and after a crash what its agent makes of it."""
        while True:
            research.experiment(candidate)
            if (crashed := research.crash_to_repair(candidate)) is None:
                return
            repaired = research.propose(candidate.number, [], crashed)
            if isinstance(repaired, Refused):
                self.say(f"  {candidate.number:>3}  not repaired: {repaired.reason}")
                return
            candidate = repaired

    def next_steps(self, terminal: Any, research: Research, now: list[dict[str, Any]]) -> None:
        """Hand over how to look at the branch, take a discarded change, and go on."""
        branch, tag = research.workspace.branch, research.workspace.tag
        mutable = shlex.join(self.settings.mutable)
        steps = [
            (f"git log {branch}", "what was kept, and why"),
            (f"git diff HEAD..{branch} -- {mutable}", "the champion against your checkout"),
        ]
        discards = [run for run in now if run["verdict"] and run["verdict"]["outcome"] == "discard"]
        if discards:
            near = max(discards, key=lambda run: run["verdict"]["gain"] or 0.0)
            ref = f"refs/autoresearch/{tag}/{near['number']:04d}"
            steps.append((f"git cherry-pick -n {ref}", f"take a discarded change: {near['description']}"))
        arguments = [str(argument) for argument in self.config.invocation_params.args]
        if not any(argument.startswith("--autoresearch-tag") for argument in arguments):
            arguments += ["--autoresearch-tag", tag]
        steps.append((f"pytest {shlex.join(arguments)}", "go on from here"))
        terminal.write_line("next:")
        for command, what in steps:
            terminal.write_line(f"  {command}  # {what}")


class Try(_Mode):
    """One experiment with the edit that is in the checkout."""

    def open(self) -> Workspace:
        """Open the checkout itself."""
        settings = self.settings
        return Workspace.for_try(
            settings.root, mutable=settings.mutable, prefix=settings.branch_prefix, tag=settings.tag
        )

    def run(self, research: Research) -> None:
        """Run the edit once; count anything but a keep as pytest counts a failure."""
        self.header(research)
        runs, ledger = research.ledger.runs, research.ledger
        pending = ledger.pending()
        number = pending["number"] if pending else ledger.next_number()
        candidate = research.workspace.candidate(ledger.next_number(), self.config.getoption("autoresearch_try"))
        if pending and research.same(candidate, candidate_of(pending)):
            research.repeats.baselines()
            research.finish_pending()
        else:
            research.drop_pending()
            number = candidate.number
            unchanged = research.not_new(candidate)
            if unchanged and runs:
                raise pytest.UsageError(f"{unchanged}: there is nothing to try; edit it first")
            research.repeats.baselines()
            if unchanged:
                self.say(f"  {unchanged}: its baselines are recorded; edit it, then try the edit")
                return
            research.experiment(candidate)
        last = ledger.runs[-1]
        if last["number"] != number or last["verdict"]["outcome"] != "keep":
            research.session.testsfailed = research.session.testsfailed or 1

    def next_steps(self, terminal: Any, research: Research, now: list[dict[str, Any]]) -> None:
        """Say where the tried edit went."""
        last, mutable = now[-1], ", ".join(self.settings.mutable)
        if last["kind"] == "baseline":
            return
        ref = f"refs/autoresearch/{research.workspace.tag}/{last['number']:04d}"
        if last["verdict"]["outcome"] == "keep":
            terminal.write_line(f"kept on {research.workspace.branch}: edit {mutable} further")
        else:
            terminal.write_line(f"not kept: {mutable} is the champion's again; git show {ref} has the edit")
            terminal.write_line(f"log: {research.log_of(last['number'])}")
