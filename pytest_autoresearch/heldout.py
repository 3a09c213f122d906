"""The second split: never ranked on, scored on baselines and keeps only, so that its gap shows what the first hides."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

# How many standard deviations of n + 1 values leave as much above them as 3 of a normal distribution do (0.135 %):
# Student's t, for n = 1, 2, ...; beyond the list its last entry, a little too careful, is used.
SIGMAS = (235.8, 19.21, 9.22, 6.62, 5.51, 4.90, 4.53, 4.28, 4.09, 3.96, 3.85, 3.76, 3.69, 3.64, 3.59)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How much worse than the ranked split a keep does on the second one."""

    number: int  # of the experiment
    gap: float  # in units of the metric, positive when the second split is worse
    jump: float  # over the baselines' mean gap
    limit: float  # of what noise explains; infinite where nothing is known of it

    @property
    def suspicious(self) -> bool:
        """Whether noise does not explain the jump: the ranked split may have been learned."""
        return self.jump > self.limit


def name_of(metric: str) -> str:
    """Return the metric of the second split: `heldout_bpb` for `val_bpb` (`val_` is replaced, else put before)."""
    return "heldout_" + metric.removeprefix("val_")


def gaps(
    runs: Sequence[Mapping[str, Any]], metric: str, direction: str, fingerprint: Mapping[str, Any]
) -> Iterator[Gap]:
    """Yield the gap of every keep of the ledger under `fingerprint` whose second split was scored, oldest first.

    jump = gap - mean gap of the baselines. Its noise: s, the standard deviation of all earlier gaps, baselines and
    unsuspicious keeps, about their own mean. A jump is suspicious above t * s * sqrt(1 + 1 / baselines), where t is
    what 3 is for a known s: Student's t for as many degrees of freedom as s has. With three baselines alone that is
    19 s, with ten gaps 4 s: at most one honest keep in 740 is flagged, and what is small is only seen late.
    A gap that grows slowly widens s and is not flagged: the jumps themselves show that.
    """
    baselines: list[float] = []
    earlier: list[float] = []
    for record in runs:
        result, verdict = record["result"], record["verdict"]
        second = result["metrics"].get(name_of(metric))
        alike = result["status"] == "ok" and result["fingerprint"] == fingerprint
        if not alike or not isinstance(second, int | float):
            continue
        gap = second - result["score"] if direction == "min" else result["score"] - second
        if record["kind"] == "baseline":
            baselines.append(gap)
            earlier.append(gap)
        elif verdict["outcome"] == "keep" and baselines:
            spread = stdev(earlier) if len(earlier) > 1 else 0.0
            sigmas = SIGMAS[min(len(earlier) - 1, len(SIGMAS)) - 1] if spread else math.inf
            found = Gap(
                number=record["number"],
                gap=gap,
                jump=gap - fmean(baselines),
                limit=sigmas * spread * math.sqrt(1 + 1 / len(baselines)) if spread else math.inf,
            )
            if not found.suspicious:
                earlier.append(gap)
            yield found


def looks(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[str, int]:
    """Return how many runs of the ledger learned their score on each split."""
    names = (metric, name_of(metric))
    return {name: sum(name in record["result"]["metrics"] for record in runs) for name in names}
