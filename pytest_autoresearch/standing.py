"""What the runs so far say: each commit's scores, and the noise of one commit from run to run.

Folded one record at a time, so that it costs the same after 10 runs and after 100,000. No I/O.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from .records import Policy, Standing

EXTRA_SHARE = 0.15  # of all runs: what confirmations and champion re-runs may cost
UNPICKED = ("baseline", "champion", "claim")  # kinds of run that were asked for whatever the score had been


@dataclass(slots=True)
class _Commit:
    """The runs of one commit under one fingerprint."""

    picked: list[tuple[float, float]] = field(default_factory=list)  # (score, memory_gb) of an experiment's first run
    fresh: list[tuple[float, float]] = field(default_factory=list)  # of every later one
    unpicked: list[float] = field(default_factory=list)
    total: float = 0.0  # of the fresh scores


@dataclass(slots=True)
class _Machine:
    """All commits under one fingerprint, and the squares of their fresh scores about each commit's mean."""

    commits: dict[str, _Commit] = field(default_factory=dict)
    squares: float = 0.0
    freedom: int = 0


class Known:
    """The ledger's runs, folded."""

    def __init__(self) -> None:
        self._machines: dict[str, _Machine] = {}
        self._fingerprint: Mapping[str, Any] | None = None  # of the last run, most often the next one's
        self._machine = _Machine()  # under it
        self._runs = 0  # claims aside: they come after the night
        self._confirmations = 0
        self._extra = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the next run of the ledger."""
        kind, result = record["kind"], record["result"]
        self._runs += kind != "claim"
        self._confirmations += kind == "confirm"
        self._extra += kind in ("confirm", "champion")
        if result["status"] != "ok":
            return
        if result["fingerprint"] is not self._fingerprint:
            self._fingerprint = result["fingerprint"]
            self._machine = self._machines.setdefault(_key(result["fingerprint"]), _Machine())
        machine = self._machine
        commit = machine.commits.get(record["commit"])
        if commit is None:
            commit = machine.commits[record["commit"]] = _Commit()
        run = (result["score"], result["memory_gb"])
        if kind == "experiment":
            commit.picked.append(run)
            return
        if commit.fresh:  # Welford: the squares grow by the product of the distances to the old and the new mean
            before = commit.total / len(commit.fresh)
            machine.squares += (run[0] - before) ** 2 * len(commit.fresh) / (len(commit.fresh) + 1)
            machine.freedom += 1
        commit.fresh.append(run)
        commit.total += run[0]
        if kind in UNPICKED:
            commit.unpicked.append(run[0])

    def standing(self, commit: str, fingerprint: Mapping[str, Any], policy: Policy) -> Standing:
        """Return what is known of `commit` under `fingerprint`.

        An experiment's first run earned its place by being good, so it counts only until a fresh run is there, and not
        for sigma. sigma^2 = (squares + prior_freedom * prior_sigma^2) / (freedom + prior_freedom), 0 without either:
        the pooled variance of all fresh repeats, shrunk to the prior. One more run may be afforded while confirmations
        and champion re-runs stay within 15 % of all runs, and the first confirmation always.
        """
        machine = self._machines.get(_key(fingerprint), _Machine())
        runs = machine.commits.get(commit, _Commit())
        counted = runs.fresh or runs.picked
        squares, freedom = self.spread(fingerprint)
        freedom += policy.prior_freedom
        squares += policy.prior_freedom * policy.prior_sigma**2
        return Standing(
            scores=tuple(score for score, _ in counted),
            memory_gb=fmean(memory for _, memory in counted) if counted else 0.0,
            sigma=math.sqrt(squares / freedom) if freedom else 0.0,
            freedom=freedom,
            tainted=bool(runs.picked) and not runs.fresh,
            may_confirm=self._confirmations == 0 or self._extra + 1 <= EXTRA_SHARE * (self._runs + 1),
        )

    def spread(self, fingerprint: Mapping[str, Any]) -> tuple[float, float]:
        """Return the sum of squares of all fresh scores about their commit's mean, and its degrees of freedom."""
        machine = self._machines.get(_key(fingerprint), _Machine())
        return machine.squares, machine.freedom

    def unpicked(self, commit: str, fingerprint: Mapping[str, Any]) -> list[float]:
        """Return the scores of `commit` that no verdict hung on, oldest first: what a claim may rest on."""
        machine = self._machines.get(_key(fingerprint), _Machine())
        return machine.commits.get(commit, _Commit()).unpicked


def _key(fingerprint: Mapping[str, Any]) -> str:
    return json.dumps(dict(fingerprint), sort_keys=True)  # as it is on disk: a tuple equals its list
