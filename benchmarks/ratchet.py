"""The keep rule's error rates: simulated nights of known truth, judged by the very functions that judge real ones.

    python -m benchmarks.ratchet [NIGHTS]

A night is three baselines and 100 proposals, each with a true effect that the rule does not see; a score is the truth
plus normal noise. The rules: ladder (with its confirmations and champion re-runs), strict (any lower score), and a
threshold of 2 sigma on one run. All see the same effects and the same noise of first runs. Effects and sigma are in
mbpb; the last block has tiny's own sigma (--tiny-sigma) and ten times the effects, about what is found there.
"""

import argparse
import math
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any

from benchmarks.machine import machine
from pytest_autoresearch.ratchet import RERUN_EVERY, decide
from pytest_autoresearch.records import Policy, Result, Standing, Verdict
from pytest_autoresearch.standing import Known

PROPOSALS, BASELINES, CLAIM = 100, 3, 3
START = 1000.0  # mbpb
# regime: share of proposals that are improvements, and their mean gain; the others cost 3 on average, or nothing
REGIMES = {"rich": (0.20, 3.0), "middle": (0.10, 1.5), "late": (0.04, 0.75), "null": (0.0, 0.0)}
NOTHING = 0.5  # of the proposals that do not improve: their effect is zero
COST = 3.0
SIGMAS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """What one night came to, against the truth."""

    gain: float  # true, of the last champion over the first
    keeps: float
    false_keeps: float  # kept changes that are no improvement
    optimism: float  # what the champion's score promises beyond the true gain
    claim_optimism: float  # what the claim promises beyond it
    extra: float  # runs beyond one a proposal and the baselines, the claim aside
    sigma: float  # the estimate at the night's end over the true one


def two_sigma(standing: Standing, runs: Sequence[Result], lines_added: int, policy: Policy) -> Verdict:
    """Keep what beats the champion's last score by 2 sigma in one run."""
    gain = fmean(standing.scores) - (runs[-1].score or math.nan)
    return Verdict(outcome="keep" if gain > 2 * standing.sigma else "discard", reason="")


RULES: dict[str, tuple[Callable[..., Verdict], Policy]] = {
    "ladder": (decide, Policy()),
    "strict": (decide, Policy(rule="strict")),
    "2 sigma": (two_sigma, Policy()),
}


def night(rule: str, regime: tuple[float, float], sigma: float, scale: float, seed: int) -> Night:
    """Simulate one night."""
    judge, policy = RULES[rule]
    truths, noise, again = (random.Random(f"{seed}/{what}") for what in ("effect", "noise", "again"))
    share, size = regime
    known, level, champion, since, keeps, false, extra = Known(), START, "0", 0, 0, 0, 0

    def run(kind: str, commit: str, truth: float, source: random.Random) -> Result:
        result = Result(status="ok", score=truth + source.gauss(0.0, sigma))
        known.add({"kind": kind, "commit": commit, "result": {**RAW, "score": result.score}})
        return result

    for _ in range(BASELINES):
        run("baseline", champion, level, noise)
    for number in range(1, PROPOSALS + 1):
        draw = truths.random()
        effect = truths.expovariate(1 / size) if draw < share else 0.0
        effect -= truths.expovariate(1 / COST) if draw > share + (1 - share) * NOTHING else 0.0
        truth, commit, runs, kind = level - scale * effect, str(number), [], "experiment"
        while True:
            runs.append(run(kind, commit, truth, noise if kind == "experiment" else again))
            # what the rule sees is the champion's standing; this run's own commit has none
            verdict = judge(known.standing(champion, {}, policy), runs, 0, policy)
            if verdict.outcome != "confirm":
                break
            kind, extra = "confirm", extra + 1
        if verdict.outcome == "keep":
            keeps, false = keeps + 1, false + (effect <= 0)
            level, champion = truth, commit
        since += 1
        if rule == "ladder" and since >= RERUN_EVERY:
            run("champion", champion, level, again)
            since, extra = 0, extra + 1
    standing = known.standing(champion, {}, policy)
    start = fmean(known.unpicked("0", {}))
    gain = START - level
    fresh = fmean(level + again.gauss(0.0, sigma) for _ in range(CLAIM))
    return Night(
        gain=gain,
        keeps=keeps,
        false_keeps=false,
        optimism=start - fmean(standing.scores) - gain,
        claim_optimism=start - fresh - gain if champion != "0" else 0.0,
        extra=extra,
        sigma=standing.sigma / sigma,
    )


RAW = {"status": "ok", "memory_gb": 0.0, "fingerprint": {}}


def cell(arguments: tuple[str, str, float, float, int]) -> list[Night]:
    """Simulate all nights of one rule, regime and sigma."""
    rule, regime, sigma, scale, nights = arguments
    return [night(rule, REGIMES[regime], sigma, scale, seed) for seed in range(nights)]


def figure(values: Sequence[float]) -> str:
    """Return mean and standard error."""
    return f"{fmean(values):8.3f} ±{stdev(values) / math.sqrt(len(values)):6.3f}"


def row(nights: Sequence[Night]) -> dict[str, str]:
    """Return the table's figures of one cell; the false discovery rate pools all keeps, its error is by night."""
    cells = {field.name: figure([getattr(one, field.name) for one in nights]) for field in fields(Night)}
    keeps, false = (sum(getattr(one, name) for one in nights) for name in ("keeps", "false_keeps"))
    rate = false / keeps if keeps else math.nan
    residuals = [one.false_keeps - rate * one.keeps for one in nights]  # the ratio estimator's
    error = stdev(residuals) / math.sqrt(len(nights)) / (keeps / len(nights)) if keeps else math.nan
    cells["fdr"] = f"{100 * rate:7.1f} ±{100 * error:5.1f}"
    return cells


COLUMNS = {
    "gain": "true gain",
    "keeps": "keeps",
    "false_keeps": "false keeps",
    "fdr": "false of keeps %",
    "optimism": "score's optimism",
    "claim_optimism": "claim's optimism",
    "extra": "extra runs",
    "sigma": "sigma est./true",
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nights", nargs="?", type=int, default=4_000, help="nights a cell (default: 4000)")
    parser.add_argument("--tiny-sigma", type=float, default=25.0, help="measured sigma of the tiny profile, mbpb")
    arguments = parser.parse_args()
    blocks: list[tuple[str, float, float]] = [(f"{sigma:g}", sigma, 1.0) for sigma in SIGMAS]
    blocks.append(("tiny", arguments.tiny_sigma, 10.0))
    keys: list[Any] = [(name, regime, rule) for name, _, _ in blocks for regime in REGIMES for rule in RULES]
    sizes = {name: (sigma, scale) for name, sigma, scale in blocks}
    print(f"{machine()}; {arguments.nights:,} nights of {PROPOSALS} proposals a row; mean ± standard error")
    print(f"{'sigma':<6}{'regime':<8}{'rule':<9}" + "".join(f"{title:>18}" for title in COLUMNS.values()))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = [(rule, regime, *sizes[name], arguments.nights) for name, regime, rule in keys]
        for (name, regime, rule), nights in zip(keys, pool.map(cell, work), strict=True):
            figures = row(nights)
            print(f"{name:<6}{regime:<8}{rule:<9}" + "".join(f"{figures[key]:>18}" for key in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
