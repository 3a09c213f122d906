"""One line of research: baselines, experiments, and the order in which an experiment becomes a fact.

1. The candidate is a commit that no branch points to; its files are read back from the object database.
2. It runs as a pytest item: `bench` runs it, the decide hook judges it, once more with a fresh seed if asked.
   What the machine did to a run is not the candidate's: it runs again. Where the runner verifies, it looks once more
   at what is to be kept.
3. When its teardown is done, the locked files are compared again: neither a failed teardown nor a changed
   file lets a keep pass.
4. The ledger has the record on disk; only then does git move.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from . import compiled
from .bench import Bench
from .gate import signature
from .ledger import Ledger, candidate_of, one_line, prior, result_of, results_tsv, run_record, status_of
from .lock import Snapshot, differences, startup_files
from .lockfile import settle
from .nodes import Crashed, Experiment, ExperimentFile, run_item
from .propose import NoProposal
from .ratchet import settled
from .records import INFRASTRUCTURE, Candidate, Result, Standing, Verdict
from .repeats import RETRIES, Repeats
from .report.terminal import Live, gap_lines, outcome_line
from .settings import Settings
from .workspace import Workspace, WorkspaceError

REPAIRS = 2  # of a crash by the agent that made it
REPAIRABLE = ("contract", "error", "memory", "diverged", "timeout", "overrun", "score")  # kinds of crash
SAME_WORK = 0.02  # two runs of the same files that differ by more did not have the same machine
PROPOSALS = 1_000  # seeds of proposals are drawn beyond those of runs
DETAIL_CHARS = 4_000  # of a crash's end that its proposer is shown


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
            line for line in (self.ledger.repaired, workspace.resume(self.ledger.history, settings.metric)) if line
        ]
        self.first = len(self.ledger.runs)  # records before it are of earlier calls
        self.lock = Snapshot.take(workspace.workdir, settings.immutable)
        self._marks = self.lock.marks(workspace.workdir)
        self._startup = startup_files()
        self.bench = Bench(settings, self.lock, workspace.state / "runs")
        self.terms = self.bench.check()
        self.locked = settle(workspace.workdir, self.lock, self.terms, settings.lock_digest)
        sigma, freedom = prior(workspace.state, self.terms.fingerprint)
        self.policy = replace(settings.policy, prior_sigma=sigma, prior_freedom=freedom)
        self._file = ExperimentFile.from_parent(session, path=settings.root / settings.mutable[0])
        self._signatures: dict[str, str] = {}
        self.seconds: list[float] = []  # that runs took in this call
        self.repeats = Repeats(self)

    @property
    def standing(self) -> Standing:
        """What is known of the champion."""
        return self.ledger.known.standing(self.workspace.champion, self.terms.fingerprint, self.policy)

    def propose(
        self, number: int, refused: Sequence[str], crashed: tuple[Candidate, Result] | None = None
    ) -> Candidate | Refused:
        """Ask for one proposal, or for the repair of one that crashed; return it as a candidate, or why it is none."""
        workspace = self.workspace
        if self._foreign_changes():  # what a candidate did while it ran is not this proposer's doing
            self._restore_foreign()
        why_not = "the proposer had no idea"
        crash, attempt = "", 1
        if crashed:
            candidate, result = crashed
            workspace.load(candidate.commit)
            crash, attempt = f"{result.reason}\n{result.detail[-DETAIL_CHARS:]}", candidate.attempt + 1
        try:
            description = self.session.config.hook.pytest_autoresearch_propose(
                settings=self.settings,
                workdir=workspace.workdir,
                history=self.ledger.history,
                number=number,
                seed=self.ledger.seed(number, PROPOSALS * attempt + len(refused)),
                refused=refused,
                crash=crash,
            )
        except NoProposal as exc:
            description, why_not = None, str(exc)
        foreign = self._foreign_changes()
        if foreign:
            self._restore_foreign()
        if description is None and not foreign:
            workspace.restore()
            return Refused(reason=why_not)
        description = one_line(description or "")[:200] or "change without a description"
        try:
            candidate = workspace.candidate(number, description, attempt)
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

    def _foreign_changes(self) -> list[str]:
        """Return one line for each thing done in the loop's worktree beyond editing mutable files."""
        workspace = self.workspace
        if workspace.in_place:
            return []
        lines = workspace.foreign_changes()
        named = {line.partition(": ")[2] for line in lines}
        # What git does not see: files that it does not track, or takes for unchanged
        unseen = differences(self.lock.entries, self.lock.now(workspace.workdir))
        return lines + [line for name, line in unseen.items() if workspace.prefix + name not in named]

    def _restore_foreign(self) -> None:
        self.workspace.restore_foreign()
        self.lock.restore(self.workspace.workdir, self.workspace.state)

    def not_new(self, candidate: Candidate) -> str:
        """Return why `candidate` is no experiment, or nothing."""
        names, own = ", ".join(self.settings.mutable), self._signature(candidate.commit)
        if own == self._signature(self.workspace.champion):
            return f"{names} means the same as the champion's"
        for record in reversed(self.ledger.runs):
            result = record["result"]
            here = result["fingerprint"] == self.terms.fingerprint or result["status"] != "ok"
            ran = here and result["kind"] not in (*INFRASTRUCTURE, "foreign", "interrupted", "setup")
            if ran and record["signature"] == own:
                before = f"experiment {record['number']} ({status_of(record)})" if record["number"] else "the baselines"
                return f"{names} means the same as in {before}"
        return ""

    def same(self, one: Candidate, other: Candidate) -> bool:
        """Return whether two candidates mean the same."""
        return self._signature(one.commit) == self._signature(other.commit)

    def _signature(self, commit: str) -> str:
        if commit not in self._signatures:
            self._signatures[commit] = signature(self.workspace.files(commit))
        return self._signatures[commit]

    def finish_pending(self) -> bool:
        """Give its next run to an experiment that was interrupted before it; return whether there was one."""
        if (record := self.ledger.pending()) is None:
            return False
        candidate = candidate_of(record)
        self.experiment(candidate, earlier=self._ran(candidate))
        return True

    def drop_pending(self) -> None:
        """Close an experiment whose next run will not come, because the file has been edited since."""
        if record := self.ledger.pending():
            reason = "interrupted before its next run"
            verdict = Verdict(outcome="crash", reason=reason)
            result = Result(status="crash", kind="interrupted", reason=reason)
            self._record("confirm", candidate_of(record), record["run"] + 1, record["seed"], result, verdict)

    def _ran(self, candidate: Candidate) -> list[Result]:
        """Return the runs of a candidate that the machine did not spoil."""
        results: list[Result] = []
        for record in reversed(self.ledger.runs):
            if record["commit"] != candidate.commit:
                break
            results.insert(0, result_of(record))
        return [result for result in results if not result.infrastructure]

    def experiment(self, candidate: Candidate, *, earlier: Sequence[Result] = (), forbidden: str = "") -> Verdict:
        """Run a candidate as an item, record its verdict, and only then keep it or restore the champion."""
        self.workspace.hold(candidate)
        number = candidate.number
        results = list(earlier)
        files = {} if forbidden else self.workspace.files(candidate.commit)
        spoilt = 0

        def once(item: Experiment, run: int) -> Result:
            """Return the candidate's next run, ranked by `item.verdict`."""
            nonlocal spoilt
            seed = self.ledger.seed(number, run)
            if forbidden:
                result = Result(status="crash", kind="foreign", reason=forbidden)
            else:
                result = self.run(item, candidate, files, run, seed)
            item.verdict = self._decide(item, candidate, [*results, result])
            if item.verdict.outcome == "keep" and self.terms.verifies:
                result = self._verify(item, files, f"{number:04d}-{run}", seed, result)
                if result.status != "ok":
                    item.verdict = Verdict(outcome="crash", reason=result.reason)
            if result.infrastructure:
                spoilt += 1
                if spoilt <= RETRIES:
                    item.verdict = Verdict(outcome="retry", reason=f"{result.reason}: once more")
                elif result.kind == "disk":  # nothing can be run any more, and no candidate is to blame
                    raise pytest.UsageError(f"experiment {number} cannot be run: {result.reason}; then start again")
            else:
                results.append(result)
            item.record(result)
            return result

        def trial(item: Experiment) -> None:
            item.user_properties += [("commit", candidate.commit), ("description", candidate.description)]
            while True:
                run = self.ledger.next_run(number)
                result = once(item, run)
                assert item.verdict is not None
                if item.verdict.outcome not in ("confirm", "retry"):
                    break
                kind = "confirm" if len(results) > 1 else "experiment"
                self.append(kind, candidate, run, self.ledger.seed(number, run), result, item.verdict)
                self.say(outcome_line(candidate, result, item.verdict, self.settings.metric))
            figures = {"verdict": item.verdict.outcome, "reason": item.verdict.reason, "gain": item.verdict.gain}
            item.user_properties += [(name, value) for name, value in figures.items() if value is not None]
            if item.verdict.outcome == "crash":
                raise Crashed(item.verdict.reason, result.detail)

        item = self.protocol(str(number), trial)
        verdict = item.verdict
        if not item.results:
            item.results.append(Result(status="crash", kind="setup", reason=item.veto or "its setup was skipped"))
            verdict = Verdict(outcome="crash", reason=item.results[-1].reason)
        assert verdict is not None
        veto = item.veto or self.locked_files_changed()
        if veto and verdict.outcome != "crash":
            verdict = Verdict(outcome="crash", reason=veto)
            if not item.veto:
                self.session.testsfailed += 1  # the report said otherwise, before this was known
        run = self.ledger.next_run(number)
        kind = "confirm" if len(results) > 1 else "experiment"
        self._record(kind, candidate, run, self.ledger.seed(number, run), item.results[-1], verdict, veto)
        self.stop_if_asked()
        return verdict

    def import_history(self, path: Path) -> int:
        """Begin the history with the rows of a results.tsv; return how many are new."""
        before = len(self.ledger.imported)
        metric = self.settings.metric
        self.ledger.import_results(path.read_text(encoding="utf-8", errors="replace"), str(path), metric)
        self.workspace.write_results(results_tsv(self.ledger.history, metric))
        return len(self.ledger.imported) - before

    def crash_to_repair(self, candidate: Candidate) -> tuple[Candidate, Result] | None:
        """Return the experiment that has just ended, if it is a crash that its agent may repair."""
        record = self.ledger.runs[-1]
        crashed = record["verdict"]["outcome"] == "crash" and record["result"]["kind"] in REPAIRABLE
        if self.settings.agent is None or not crashed or candidate.attempt > REPAIRS:
            return None
        return candidate, result_of(record)

    def _decide(self, item: Experiment, candidate: Candidate, results: list[Result]) -> Verdict:
        if changed := self.locked_files_changed():
            item.veto = item.veto or changed  # on record, whoever puts them back before the teardown
            return Verdict(outcome="crash", reason=changed)
        if results[-1].status != "ok":
            return Verdict(outcome="crash", reason=results[-1].reason)
        verdict: Verdict = self.session.config.hook.pytest_autoresearch_decide(
            standing=self.standing, runs=tuple(results), lines_added=candidate.lines_added, policy=self.policy
        )
        return settled(verdict, len(results))

    def locked_files_changed(self) -> str:
        """Return what was done to the locked files since the present item began, edits undone included, or nothing."""
        changed = self.lock.touched(self.workspace.workdir, self._marks)
        return f"locked files changed: {', '.join(changed)}"[:300] if changed else ""

    def append(
        self,
        kind: str,
        candidate: Candidate,
        run: int,
        seed: int,
        result: Result,
        verdict: Verdict | None,
        veto: str = "",
    ) -> dict[str, Any]:
        record = run_record(
            kind=kind,
            candidate=candidate,
            run=run,
            seed=seed,
            signature=self._signature(candidate.commit),
            policy=self.policy if verdict else None,
            veto=veto,
            result=result,
            verdict=verdict,
        )
        self.ledger.append(record)
        return record

    def _record(
        self,
        kind: str,
        candidate: Candidate,
        run: int,
        seed: int,
        result: Result,
        verdict: Verdict,
        veto: str = "",
    ) -> None:
        record = self.append(kind, candidate, run, seed, result, verdict, veto)
        metric = self.settings.metric
        if verdict.outcome == "keep":
            self.workspace.keep(self.ledger.history, metric)
        elif result.kind != "interrupted":
            for line in self.workspace.restore():
                self.say(f"  {line}")
        self.workspace.write_results(results_tsv(self.ledger.history, metric))
        self.session.config.hook.pytest_autoresearch_finished(settings=self.settings, record=record)
        self.say(outcome_line(candidate, result, verdict, metric))
        if verdict.outcome == "keep":
            for line in gap_lines(self.ledger.runs, metric, self.settings.direction, self.terms.fingerprint)[-1:]:
                self.say(f"       {line}")

    def run(
        self,
        item: Experiment,
        candidate: Candidate,
        files: dict[str, bytes],
        run: int,
        seed: int,
        heldout: bool = False,
    ) -> Result:
        began = time.monotonic()
        with self._live(item) as live:
            result = self.bench.run(
                files,
                name=f"{candidate.number:04d}-{run}",
                seed=seed,
                heldout=heldout,
                baseline=self.repeats.first,
                compiled=self._compiled(),
                on_event=live.event,
            )
        self.seconds.append(time.monotonic() - began)
        if environment := list(differences(self._startup, startup_files()).values()):
            raise pytest.UsageError(
                f"what Python itself runs at its start was changed during the loop: {', '.join(environment)[:300]}: "
                "this run does not count; see who did that, then start again"
            )
        earlier = (record for record in reversed(self.ledger.runs) if record["commit"] == candidate.commit)
        alike = (record["result"] for record in earlier if record["result"]["fingerprint"] == result.fingerprint)
        before = next((said["work"] for said in alike if said["status"] == "ok"), 0.0)
        if before and result.work and abs(result.work / before - 1) > SAME_WORK:
            change = f"{result.work / before - 1:+.1%} work against the last run of the same files"
            said = f"{change}: the machine changed, not the candidate"
            if self.terms.steady:
                return replace(result, status="crash", score=None, kind="busy", reason=said)
            self.say(f"  {item.name}: {said}")
        return result

    def _verify(self, item: Experiment, files: dict[str, bytes], name: str, seed: int, result: Result) -> Result:
        with self._live(item) as live:
            live.event({"event": "phase", "phase": "verify"})
            return self.bench.verify(
                files, result, name=name, seed=seed, baseline=self.repeats.first, compiled=self._compiled()
            )

    def _compiled(self) -> dict[str, Any]:
        """Name the compile cache of this line's start on this machine; only its first baseline may fill it."""
        baselines = self.repeats.known()
        start = baselines[0]["commit"] if baselines else self.workspace.champion
        trusted = not baselines and all(status_of(record) != "keep" for record in self.ledger.runs)
        return compiled.request(self.workspace.state.parent, start, self.terms.fingerprint, fill=trusted)

    def _live(self, item: Experiment) -> Live:
        return Live(self.session.config, f"  {item.name:>3}", self.terms.budget_s)

    def protocol(self, name: str, trial: Callable[[Experiment], None]) -> Experiment:
        """Run `trial` as an item."""
        item = Experiment.from_parent(self._file, name=name, trial=trial)
        self._marks = self.lock.marks(self.workspace.workdir)
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

    def log_of(self, number: int) -> Path:
        """Return where the log of an experiment's first run is kept."""
        return self.bench.home / f"{number:04d}-1" / "run.log"
