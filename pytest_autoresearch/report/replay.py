"""`--autoresearch-replay`: every verdict of a line of research, reached again from its ledger alone."""

from collections.abc import Iterator

import pytest

from ..ledger import Ledger, Record, result_of
from ..ratchet import settled
from ..records import Policy, Result, Verdict
from ..standing import Known
from .status import open_ledger


def main(config: pytest.Config) -> int:
    """Print what differs; return 1 if anything does."""
    ledger = open_ledger(config)
    verdicts = sum(record["verdict"] is not None for record in ledger.runs)
    different = 0
    for record, now in differences(config, ledger):
        different += 1
        print(
            f"experiment {record['number']}, run {record['run']}: the ledger says {_words(record['verdict'])}, "
            f"the rule now says {_words(now)}"
        )
    tag = ledger.path.parent.name
    print(f"{tag}: {verdicts} verdicts reached again from {len(ledger.runs)} runs, {different or 'none'} different")
    return int(different > 0)


def differences(config: pytest.Config, ledger: Ledger) -> Iterator[tuple[Record, Record]]:
    """Yield the records whose verdict the decide hook does not reach again, each with the verdict it does reach.

    What the hook sees is folded from earlier records, by the policy that the record names. A verdict that something
    else forced (a crash of the run, a failed teardown, a locked file that changed) must be a crash.
    """
    known, champion = Known(), ""
    runs: list[Result] = []  # of the candidate at hand, as far as the machine did not spoil them
    commit = ""
    for record in ledger.runs:
        result, said = result_of(record), record["verdict"]
        runs, commit = (runs if record["commit"] == commit else []), record["commit"]
        if not result.infrastructure:
            runs.append(result)
        if said is not None:
            policy = Policy(**record["policy"])
            now = Verdict(outcome="crash", reason=record["veto"] or result.reason)
            if result.infrastructure and said["outcome"] == "retry":
                now = Verdict(outcome="retry", reason=said["reason"])
            elif result.status == "ok" and not record["veto"]:
                now = config.hook.pytest_autoresearch_decide(
                    standing=known.standing(champion, result.fingerprint, policy),
                    runs=tuple(runs),
                    lines_added=record["lines_added"],
                    policy=policy,
                )
                now = settled(now, len(runs))
            figures = {name: getattr(now, name) for name in ("outcome", "gain", "price", "sigma")}
            if any(said[name] != figure for name, figure in figures.items()):
                yield record, {**figures, "reason": now.reason}
        known.add(record)
        if record["kind"] == "baseline" or (said and said["outcome"] == "keep"):
            champion = record["commit"]


def _words(verdict: Record) -> str:
    gain = "" if verdict["gain"] is None else f", gain {verdict['gain']:+.6f}, sigma {verdict['sigma']:.6f}"
    return f"{verdict['outcome']} ({verdict['reason']}{gain})"
