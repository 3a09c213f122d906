"""The nouns that the loop, the ratchet and the ledger share. Plain frozen records; no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1  # version of the runner's messages
LEDGER_SCHEMA = 2  # version of the ledger's records
TRUST = ("inproc", "split", "sealed")  # how far a candidate was kept from its score, least first
INFRASTRUCTURE = ("disk", "judge", "killed", "busy")  # kinds of crash that are the machine's, not the candidate's


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One version of the mutable files, stored as a commit that no branch points to."""

    number: int  # 0 is the baseline; experiments count from 1
    commit: str  # full hash; refs/autoresearch/<tag>/<number> keeps it
    parent: str  # the champion's commit that it was derived from
    description: str  # one line, no tabs
    lines_added: int  # net lines added to the mutable files against the parent
    attempt: int = 1  # repairs of a crashed idea are its attempts 2 and 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the runner said of one run. `score` is None unless `status` is "ok"."""

    status: Literal["ok", "crash", "unusable"]
    score: float | None = None
    memory_gb: float = 0.0
    kind: str = ""  # of a crash: contract, error, timeout, diverged, ...
    reason: str = ""  # one line
    detail: str = ""  # the tail of the traceback or of the log
    trust: str = ""  # one of TRUST; empty where the runner does not say
    work: float = 0.0  # done within the budget, in the runner's unit (tokens); 0 where it does not say
    weights_sha256: str = ""  # of what was trained and scored, where the runner says
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def infrastructure(self) -> bool:
        """Whether the machine failed rather than the candidate."""
        return self.status == "crash" and self.kind in INFRASTRUCTURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is known of the champion under the current fingerprint."""

    scores: tuple[float, ...]  # fresh runs of the champion's commit, oldest first; its first run until there is one
    memory_gb: float
    sigma: float  # run-to-run standard deviation of one commit: the ledger's repeats, shrunk to the policy's prior
    freedom: float = 0.0  # degrees of freedom of sigma, the prior's included
    tainted: bool = False  # the one score is the run that the champion was kept for, so it flatters
    may_confirm: bool = True  # False when the cap on extra runs is spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a verdict is reached; prices are in units of the metric."""

    direction: Literal["min", "max"] = "min"
    rule: Literal["ladder", "strict"] = "ladder"
    line_price: float = 0.0001  # per net line added
    memory_price: float = 0.001  # per GB of peak memory added
    prior_sigma: float = 0.0  # what this machine's earlier nights say of sigma
    prior_freedom: float = 0.0  # and the degrees of freedom that this is worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """keep, discard or crash, with the numbers that led to it.

    Two ask for another run first: "confirm" as the score is too close to call, "retry" as the machine failed.
    """

    outcome: Literal["keep", "discard", "crash", "confirm", "retry"]
    reason: str  # one line
    gain: float | None = None  # of the last run over the champion's mean, positive is better
    price: float | None = None
    sigma: float | None = None
