"""What a night may claim: the gain of its last champion over its baselines, with the error that noise leaves."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..ledger import Ledger, Record
from ..records import Standing
from ..settings import Settings

FLATTERY = (1.1, 2.3)  # sigmas: what a champion's score promises too much under strict (benchmarks/ratchet.py, sigma 1)


def claim_lines(
    settings: Settings, ledger: Ledger, made: Record, standing: Standing, fingerprint: Mapping[str, Any]
) -> list[str]:
    """Return the closing lines: noise and what it hides, then the claim or what is missing to it.

    `made` is the record that made the champion. The claim's standard error is sigma * sqrt(1/champion runs +
    1/baselines), counting fresh runs only.
    """
    metric, sigma = settings.metric, standing.sigma
    begun = (run for run in ledger.runs if run["kind"] == "baseline" and run["result"]["fingerprint"] == fingerprint)
    first = next(begun, None)
    if first is None:
        return []
    start = ledger.known.unpicked(first["commit"], fingerprint)
    fresh = ledger.known.unpicked(made["commit"], fingerprint)
    lines = [
        f"noise: the same files score {metric} with a standard deviation of {sigma:.6f} from run to run "
        f"({standing.freedom:g} degrees of freedom); a gain below {sigma * math.sqrt(1 + 1 / len(start)):.6f} in one "
        f"run is none"
    ]
    if made["commit"] == first["commit"]:
        return [*lines, f"{metric}: baseline {fmean(start):.6f} ({_runs(start)}); nothing was kept, nothing is claimed"]
    scores = fresh or standing.scores
    gain = fmean(start) - fmean(scores)
    gain = gain if settings.direction == "min" else -gain
    told = (
        f"{metric}: baseline {fmean(start):.6f} ({_runs(start)}), champion {fmean(scores):.6f} "
        f"({_runs(scores)}, {made['commit'][:7]}): gain {gain:+.6f}"
    )
    if not fresh:
        lines.append(told)
        flatters = "  no claim yet: the champion was picked for this score, so it flatters"
        if settings.policy.rule == "strict":
            flatters += f"; in simulated nights by {FLATTERY[0]} to {FLATTERY[1]} standard deviations under strict"
        return [*lines, flatters]
    error = sigma * math.sqrt(1 / len(start) + 1 / len(fresh))
    lines.append(f"claim: {told} ± {error:.6f} (standard error; fresh runs only)")
    if abs(gain) < 2 * error:
        lines.append("  that is within two standard errors of nothing: run longer, or lower the noise")
    return lines


def _runs(scores: Sequence[float]) -> str:
    return f"{len(scores)} run{'s' * (len(scores) != 1)}"
