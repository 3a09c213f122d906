"""Runs of the champion that no verdict hangs on: baselines first, one every 20 proposals, at the end for a claim."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest

from .ledger import Record, candidate_of, champion_record, results_tsv
from .nodes import Crashed, Experiment
from .ratchet import RERUN_EVERY
from .records import Result
from .standing import UNPICKED

if TYPE_CHECKING:
    from .research import Research

BASELINES = 3  # runs of a champion that has none under the present fingerprint
CLAIM = 3  # runs of the last champion
RETRIES = 2  # of a run that the machine spoilt


class Repeats:
    """The champion's own runs in one line of research."""

    def __init__(self, research: "Research") -> None:
        self._research = research

    def baselines(self) -> None:
        """Run the champion until its score and its spread are known under the present fingerprint."""
        research, fingerprint = self._research, self._research.terms.fingerprint
        own = [record for record in research.ledger.runs if record["commit"] == research.workspace.champion]
        known = [record["kind"] for record in own if record["result"]["fingerprint"] == fingerprint]
        if any(kind not in UNPICKED for kind in known):
            return  # it became champion under this fingerprint
        if own and not known:
            before = own[-1]["result"]["fingerprint"]
            differ = sorted(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
            research.say(f"  the champion has no score under this {', '.join(differ)}: its own baselines come first")
        for _ in range(BASELINES - known.count("baseline")):
            result = self._again("baseline")
            if result.status != "ok":
                log = research.bench.home / f"0000-{research.ledger.next_run(0)}" / "run.log"
                names = ", ".join(research.settings.mutable)
                raise pytest.UsageError(f"the champion's {names} does not run here: {result.reason} (see {log})")

    def rerun(self) -> None:
        """Run the champion again where the last run that no verdict hung on is 20 proposals ago."""
        research = self._research
        since: set[int] = set()
        for record in reversed(research.ledger.runs):
            if record["kind"] in UNPICKED:
                break
            since.add(record["number"])
        if research.policy.rule == "ladder" and len(since) >= RERUN_EVERY:
            self._again("champion")

    def claim(self) -> None:
        """Run the last champion until its gain over the baselines rests on fresh runs alone."""
        for _ in range(self._missing()):
            if self._again("claim").status != "ok":
                return

    def claim_s(self) -> float:
        """Return about how many seconds a claim would take now."""
        seconds = self._research.seconds
        return self._missing() * fmean(seconds) if seconds else 0.0

    def known(self) -> list[Record]:
        """Return the records of all baselines under the present fingerprint, oldest first."""
        return [
            record
            for record in self._research.ledger.runs
            if record["kind"] == "baseline" and record["result"]["fingerprint"] == self._research.terms.fingerprint
        ]

    @property
    def first(self) -> Mapping[str, Any] | None:
        """The metrics of the first baseline under the present fingerprint."""
        return next((record["result"]["metrics"] for record in self.known()), None)

    def _missing(self) -> int:
        """Return how many runs are missing to a claim; none where nothing was kept since the baselines."""
        research, known = self._research, self.known()
        if not known or known[0]["commit"] == research.workspace.champion:
            return 0
        return max(
            0, CLAIM - len(research.ledger.known.unpicked(research.workspace.champion, research.terms.fingerprint))
        )

    def _again(self, kind: str) -> Result:
        """Run the champion with a fresh seed as an item and record it; a failed baseline is not recorded."""
        research = self._research
        made = champion_record(research.ledger.runs)
        candidate = research.workspace.baseline()
        if kind != "baseline" and made is not None and made["verdict"]:
            candidate = candidate_of(made)
        number, run = candidate.number, research.ledger.next_run(candidate.number)
        seed = research.ledger.seed(number, run)
        files = research.workspace.files(candidate.commit)

        def trial(item: Experiment) -> None:
            for left in reversed(range(RETRIES + 1)):
                result = research.run(item, candidate, files, run, seed, heldout=kind == "baseline")
                if not result.infrastructure or not left:
                    break
                research.say(f"  {item.name}: {result.reason}: once more")
            if changed := research.locked_files_changed():
                result = Result(status="crash", kind="lock", reason=changed)
            item.record(result)
            if result.status != "ok" and kind != "baseline":
                raise Crashed(result.reason, result.detail)

        which = f"{run}" if kind == "baseline" else f"{number}-{run}"
        item = research.protocol(f"{kind}[{which}]", trial)
        if not item.results or item.veto:
            raise pytest.UsageError(f"the {kind} run did not take place: {item.veto or 'its setup was skipped'}")
        result = item.results[-1]
        if result.status == "ok" or kind != "baseline":
            metric = research.settings.metric
            research.append(kind, candidate, run, seed, result, None)
            research.workspace.write_results(results_tsv(research.ledger.history, metric))
            shown = result.reason if result.score is None else f"{metric} {result.score:.6f}"
            research.say(f"  {kind} {which}: {shown}")
            research.stop_if_asked()
        return result
