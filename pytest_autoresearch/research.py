"""One line of research: baselines, experiments, and the order in which an experiment becomes a fact.

1. The candidate is a commit that no branch points to; its files are read back from the object database.
2. It runs as a pytest item: `bench` runs it, the decide hook judges it, once more with a fresh seed if asked.
   Where the runner verifies, it looks once more at what is to be kept.
3. When its teardown is done, the locked files are compared again: neither a failed teardown nor a changed
   file lets a keep pass.
4. The ledger has the record on disk; only then does git move.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .bench import Bench
from .gate import signature
from .ledger import Ledger, candidate_of, one_line, result_of, results_tsv, run_record
from .lock import Snapshot
from .nodes import Crashed, Experiment, ExperimentFile, run_item
from .propose import NoProposal
from .records import Candidate, Result, Verdict
from .report.terminal import Live, gap_lines, outcome_line
from .settings import Settings
from .workspace import Workspace, WorkspaceError

BASELINES = 3  # runs of a champion that has none under the present fingerprint
RUNS = 2  # of one candidate at most
PROPOSALS = 1_000  # seeds of proposals are drawn beyond those of runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A proposal that is no experiment."""

    reason: str


class Research:
    """The open workspace, ledger and bench of one tag."""

    def __init__(
        self, session: pytest.Session, settings: Settings, workspace: Workspace, say: Callable[[str], None]
    ) -> None:
        self.session = session
        self.settings = settings
        self.workspace = workspace
        self.say = say
        self.ledger = Ledger.open(workspace.state / "ledger.jsonl")
        self.repaired = [
            line for line in (self.ledger.repaired, workspace.resume(self.ledger.runs, settings.metric)) if line
        ]
        self.first = len(self.ledger.runs)  # records before it are of earlier calls
        self.lock = Snapshot.take(workspace.workdir, settings.locked(workspace.workdir))
        self.bench = Bench(settings, self.lock, workspace.state / "runs")
        self.terms = self.bench.check()
        self._file = ExperimentFile.from_parent(session, path=settings.root / settings.mutable[0])
        self._signatures: dict[str, str] = {}

    def baselines(self) -> None:
        """Run the champion until its score and its spread are known under the present fingerprint."""
        commit, fingerprint = self.workspace.champion, self.terms.fingerprint
        known = [
            record
            for record in self.ledger.runs
            if record["commit"] == commit and record["result"]["fingerprint"] == fingerprint
        ]
        if any(record["kind"] != "baseline" for record in known):
            return  # it became champion on this machine
        for _ in range(BASELINES - len(known)):
            self._baseline()
            self.stop_if_asked()

    def _baseline(self) -> None:
        candidate = self.workspace.baseline()
        run = self.ledger.next_run(0)
        seed = self.ledger.seed(0, run)
        files = self.workspace.files(candidate.commit)

        def trial(item: Experiment) -> None:
            result = self._run(item, files, f"0000-{run}", seed, heldout=True)
            item.record(result)
            if result.status != "ok":
                log = self.bench.home / f"0000-{run}" / "run.log"
                raise pytest.UsageError(
                    f"the champion's {', '.join(self.settings.mutable)} does not run here: {result.reason} (see {log})"
                )

        item = self._protocol(f"baseline[{run}]", trial)
        if not item.results or item.veto:
            raise pytest.UsageError(f"the baseline did not run: {item.veto or 'its setup was skipped'}")
        result = item.results[-1]
        self.ledger.append(
            run_record(kind="baseline", candidate=candidate, run=run, seed=seed, result=result, verdict=None)
        )
        self.workspace.write_results(results_tsv(self.ledger.runs, self.settings.metric))
        self.say(f"  baseline {run}: {self.settings.metric} {result.score:.6f}")

    def known_baselines(self) -> list[dict[str, Any]]:
        """Return the records of all baselines under the present fingerprint, oldest first."""
        return [
            record
            for record in self.ledger.runs
            if record["kind"] == "baseline"
            and record["result"]["status"] == "ok"
            and record["result"]["fingerprint"] == self.terms.fingerprint
        ]

    def propose(self, number: int, refused: Sequence[str]) -> Candidate | Refused:
        """Ask for one proposal; return it as a candidate, not run, or why it is none."""
        workspace = self.workspace
        why_not = "the proposer had no idea"
        try:
            description = self.session.config.hook.pytest_autoresearch_propose(
                settings=self.settings,
                workdir=workspace.workdir,
                history=self.ledger.runs,
                number=number,
                seed=self.ledger.seed(number, PROPOSALS + len(refused)),
                refused=refused,
            )
        except NoProposal as exc:
            description, why_not = None, str(exc)
        foreign = workspace.foreign_changes()
        if foreign:
            workspace.restore_foreign()
        if description is None and not foreign:
            workspace.restore()
            return Refused(reason=why_not)
        description = one_line(description or "")[:200] or "change without a description"
        try:
            candidate = workspace.candidate(number, description)
        except WorkspaceError as exc:
            workspace.restore()
            return Refused(reason=str(exc))
        if foreign:
            self.experiment(candidate, forbidden=f"changed what is not its own: {', '.join(foreign)}"[:300])
            return Refused(reason="")
        if reason := self.not_new(candidate):
            workspace.restore()
            return Refused(reason=reason)
        return candidate

    def not_new(self, candidate: Candidate) -> str:
        """Return why `candidate` is no experiment, or nothing."""
        names, own = ", ".join(self.settings.mutable), self._signature(candidate.commit)
        if own == self._signature(self.workspace.champion):
            return f"{names} means the same as the champion's"
        for record in self.ledger.runs:
            ran = record["kind"] == "experiment" and record["result"]["kind"] != "foreign"
            if ran and record["parent"] == candidate.parent and own == self._signature(record["commit"]):
                outcome = record["verdict"]["outcome"]
                return f"{names} means the same as in experiment {record['number']} ({outcome})"
        return ""

    def same(self, one: Candidate, other: Candidate) -> bool:
        """Return whether two candidates mean the same."""
        return self._signature(one.commit) == self._signature(other.commit)

    def _signature(self, commit: str) -> str:
        if commit not in self._signatures:
            self._signatures[commit] = signature(self.workspace.files(commit))
        return self._signatures[commit]

    def finish_pending(self) -> bool:
        """Give the second run to an experiment that was interrupted before it; return whether there was one."""
        if (record := self.ledger.pending()) is None:
            return False
        self.experiment(candidate_of(record), earlier=[result_of(record)])
        return True

    def drop_pending(self) -> None:
        """Close an experiment whose second run will not come, because the file has been edited since."""
        if record := self.ledger.pending():
            reason = "interrupted before its second run"
            verdict = Verdict(outcome="crash", reason=reason)
            result = Result(status="crash", kind="interrupted", reason=reason)
            self._record("confirm", candidate_of(record), 2, record["seed"], result, verdict)

    def experiment(self, candidate: Candidate, *, earlier: Sequence[Result] = (), forbidden: str = "") -> Verdict:
        """Run a candidate as an item, record its verdict, and only then keep it or restore the champion."""
        number = candidate.number
        results = list(earlier)
        files = {} if forbidden else self.workspace.files(candidate.commit)

        def trial(item: Experiment) -> None:
            item.user_properties += [("commit", candidate.commit), ("description", candidate.description)]
            while True:
                run = len(results) + 1
                seed = self.ledger.seed(number, run)
                if forbidden:
                    result = Result(status="crash", kind="foreign", reason=forbidden)
                else:
                    result = self._run(item, files, f"{number:04d}-{run}", seed)
                results.append(result)
                item.verdict = self._decide(candidate, results)
                if item.verdict.outcome == "keep" and self.terms.verifies:
                    result = results[-1] = self._verify(item, files, f"{number:04d}-{run}", seed, result)
                    if result.status != "ok":
                        item.verdict = Verdict(outcome="crash", reason=result.reason)
                item.record(result)
                if item.verdict.outcome != "confirm":
                    break
                self._append("experiment", candidate, run, result, item.verdict)
                self.say(outcome_line(candidate, result, item.verdict, self.settings.metric))
            figures = {"verdict": item.verdict.outcome, "reason": item.verdict.reason, "gain": item.verdict.gain}
            item.user_properties += [(name, value) for name, value in figures.items() if value is not None]
            if item.verdict.outcome == "crash":
                raise Crashed(item.verdict.reason, results[-1].detail)

        item = self._protocol(str(number), trial)
        verdict = item.verdict
        if len(results) == len(earlier):
            results.append(Result(status="crash", kind="setup", reason=item.veto or "its setup was skipped"))
            verdict = Verdict(outcome="crash", reason=results[-1].reason)
        assert verdict is not None
        veto = item.veto or self._locked_files_changed()
        if veto and verdict.outcome != "crash":
            verdict = Verdict(outcome="crash", reason=veto)
            if not item.veto:
                self.session.testsfailed += 1  # the report said otherwise, before this was known
        run = len(results)
        seed = self.ledger.seed(number, run)
        kind = "confirm" if run > 1 else "experiment"
        self._record(kind, candidate, run, seed, results[-1], verdict)
        self.stop_if_asked()
        return verdict

    def _decide(self, candidate: Candidate, results: list[Result]) -> Verdict:
        if changed := self._locked_files_changed():
            return Verdict(outcome="crash", reason=changed)
        if results[-1].status != "ok":
            return Verdict(outcome="crash", reason=results[-1].reason)
        verdict: Verdict = self.session.config.hook.pytest_autoresearch_decide(
            standing=self.ledger.standing(self.workspace.champion, self.terms.fingerprint),
            runs=tuple(results),
            lines_added=candidate.lines_added,
            policy=self.settings.policy,
        )
        if verdict.outcome == "confirm" and len(results) >= RUNS:
            return Verdict(outcome="discard", reason=f"still undecided after {RUNS} runs: {verdict.reason}")
        return verdict

    def _locked_files_changed(self) -> str:
        changed = self.lock.changed(self.workspace.workdir)
        return f"locked files changed: {', '.join(changed)}"[:300] if changed else ""

    def _append(self, kind: Any, candidate: Candidate, run: int, result: Result, verdict: Verdict) -> dict[str, Any]:
        record = run_record(
            kind=kind,
            candidate=candidate,
            run=run,
            seed=self.ledger.seed(candidate.number, run),
            result=result,
            verdict=verdict,
        )
        self.ledger.append(record)
        return record

    def _record(self, kind: str, candidate: Candidate, run: int, seed: int, result: Result, verdict: Verdict) -> None:
        record = self._append(kind, candidate, run, result, verdict)
        metric = self.settings.metric
        if verdict.outcome == "keep":
            self.workspace.keep(self.ledger.runs, metric)
        elif result.kind != "interrupted":
            for line in self.workspace.restore():
                self.say(f"  {line}")
        self.workspace.write_results(results_tsv(self.ledger.runs, metric))
        self.session.config.hook.pytest_autoresearch_finished(settings=self.settings, record=record)
        self.say(outcome_line(candidate, result, verdict, metric))
        if verdict.outcome == "keep":
            for line in gap_lines(self.ledger.runs, metric, self.settings.direction, self.terms.fingerprint)[-1:]:
                self.say(f"       {line}")

    def _run(self, item: Experiment, files: dict[str, bytes], name: str, seed: int, heldout: bool = False) -> Result:
        with self._live(item) as live:
            return self.bench.run(
                files, name=name, seed=seed, heldout=heldout, baseline=self._first_baseline(), on_event=live.event
            )

    def _verify(self, item: Experiment, files: dict[str, bytes], name: str, seed: int, result: Result) -> Result:
        with self._live(item) as live:
            live.event({"event": "phase", "phase": "verify"})
            return self.bench.verify(files, result, name=name, seed=seed, baseline=self._first_baseline())

    def _live(self, item: Experiment) -> Live:
        return Live(self.session.config, f"  {item.name:>3}", self.terms.budget_s)

    def _first_baseline(self) -> dict[str, Any] | None:
        """Return the metrics of the first baseline under the present fingerprint."""
        return next((record["result"]["metrics"] for record in self.known_baselines()), None)

    def _protocol(self, name: str, trial: Callable[[Experiment], None]) -> Experiment:
        item = Experiment.from_parent(self._file, name=name, trial=trial)
        try:
            run_item(self.session, item)
        finally:
            self.bench.clear()
        return item

    def stop_if_asked(self) -> None:
        """End as pytest's own loop does, for --maxfail, -x, a session timeout or a plugin's wish."""
        if self.session.shouldfail:
            raise self.session.Failed(self.session.shouldfail)
        if self.session.shouldstop:
            raise self.session.Interrupted(self.session.shouldstop)

    def champion_scores(self) -> tuple[float, ...]:
        """Return the champion's scores under the present fingerprint, oldest first."""
        return self.ledger.standing(self.workspace.champion, self.terms.fingerprint).scores

    def log_of(self, number: int) -> Path:
        """Return where the log of an experiment's first run is kept."""
        return self.bench.home / f"{number:04d}-1" / "run.log"
