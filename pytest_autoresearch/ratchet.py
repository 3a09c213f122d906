"""The keep rule: pure functions from scores to a verdict. No I/O, no clock, no randomness."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from .records import Policy, Result, Standing, Verdict

KEEP_SIGMAS = 3.0  # a net gain above this is kept at once
DISCARD_SIGMAS = 1.0  # one below this is discarded at once; between the two a second run decides
CONFIRM_SIGMAS = 0.5  # what that second run must gain
SINGLE_RUN_SIGMAS = 2.5  # the one threshold when no second run may be afforded
RUNS = 2  # of one candidate at most, machine failures aside
RERUN_EVERY = 20  # proposals: how often the champion is run again
MEMORY_STEP_GB = 0.1  # as results.tsv prints it; smaller differences are the allocator's noise

Outcome = Literal["keep", "discard", "crash", "confirm"]


def decide(standing: Standing, runs: Sequence[Result], lines_added: int, policy: Policy) -> Verdict:
    """Return the verdict on a candidate after `runs`, its results so far (one, or two after a "confirm").

    Scores, `sigma` and the policy's prices share the metric's unit. gain = champion's mean - last score (the
    other way round when more is better); price = lines_added * line_price + memory_added * memory_price;
    net gain = gain - max(price, 0).

    The ladder: S = sigma * sqrt(1 + 1/n), the standard deviation of a gain over the mean of n champion runs. A net
    gain of at most 1 S is a discard, one above 3 S a keep. Between them one more run is asked for and decides alone,
    since the first one was singled out for being good: it must gain 0.5 S. Where no second run may be afforded the
    bar is 2.5 S. What these bars let through is measured by benchmarks/ratchet.py.

    A price below minus the champion's own standard error sigma / sqrt(n) is a simplification, kept at an equal score:
    at once if it is not worse at all; if it is worse by less than that standard error, when a second run is not.
    A smaller saving is none: what the comparison may hide would cost more.

    Strict: any net gain above zero is kept, and an equal score at a negative price.

    A score that is absent, not finite, or not positive is a crash, never a record. If the champion itself, sigma
    or the price cannot be compared (no scores, NaN), nothing is kept.
    """
    for run in runs:
        if not _ranks(run.score) or run.status != "ok":
            reason = run.reason or f"no score to rank: {run.score}"
            return Verdict(outcome="crash", reason=reason)
    last = runs[-1]
    assert last.score is not None  # _ranks
    scores = [score for score in standing.scores if _ranks(score)]
    if not scores:
        return Verdict(outcome="discard", reason="the champion has no score to compare with")
    mean, sigma = fmean(scores), standing.sigma
    gain = (mean - last.score) if policy.direction == "min" else (last.score - mean)
    memory_added = last.memory_gb - standing.memory_gb
    if abs(memory_added) < MEMORY_STEP_GB:
        memory_added = 0.0
    price = lines_added * policy.line_price + memory_added * policy.memory_price
    if not (math.isfinite(gain) and math.isfinite(price) and math.isfinite(sigma) and sigma >= 0):
        return Verdict(outcome="discard", reason=f"cannot be compared: gain {gain}, price {price}, sigma {sigma}")
    if policy.rule == "strict":
        outcome, reason = _strict(gain, price)
    else:
        outcome, reason = _ladder(
            gain, price, sigma, len(scores), first=len(runs) == 1, may_confirm=standing.may_confirm
        )
    return Verdict(outcome=outcome, reason=reason, gain=gain, price=price, sigma=sigma)


def settled(verdict: Verdict, runs: int) -> Verdict:
    """Return `verdict`, or a discard where a candidate that was run `runs` times is still to be confirmed."""
    if verdict.outcome == "confirm" and runs >= RUNS:
        return Verdict(outcome="discard", reason=f"still undecided after {runs} runs: {verdict.reason}")
    return verdict


def _strict(gain: float, price: float) -> tuple[Outcome, str]:
    toll = max(price, 0.0)
    if gain - toll > 0 or (price < 0 and gain >= 0):
        return "keep", f"gain {gain:.4f} beats price {price:.4f} (strict)"
    return "discard", f"gain {gain:.4f} does not beat price {toll:.4f} (strict)"


def _ladder(
    gain: float, price: float, sigma: float, runs: int, *, first: bool, may_confirm: bool
) -> tuple[Outcome, str]:
    """Return outcome and reason for finite figures; `runs` is the number of the champion's."""
    spread, error = sigma * math.sqrt(1 + 1 / runs), sigma / math.sqrt(runs)
    toll = max(price, 0.0)
    net, simpler = gain - toll, price < 0 and -price >= error
    figures = f"gain {gain:.4f}, price {price:.4f}, sigma {sigma:.4f}"

    def bar(sigmas: float) -> str:
        return f"price {toll:.4f} + {sigmas:g} S = {toll + sigmas * spread:.4f}"

    if not first:
        if net > CONFIRM_SIGMAS * spread:
            return "keep", f"confirmed by a fresh run: gain {gain:.4f} beats {bar(CONFIRM_SIGMAS)}"
        if simpler and net >= 0:
            return "keep", f"simpler at an equal score, twice: {figures}"
        return "discard", f"not confirmed by a fresh run: gain {gain:.4f} does not beat {bar(CONFIRM_SIGMAS)}"
    if net > KEEP_SIGMAS * spread:
        return "keep", f"gain {gain:.4f} beats {bar(KEEP_SIGMAS)}"
    if simpler and net >= 0:
        return "keep", f"simpler at an equal score: {figures}"
    if simpler and net < -error:
        return "discard", f"simpler, but worse by {-gain:.4f}; the champion's standard error is {error:.4f}"
    if not simpler and net <= DISCARD_SIGMAS * spread:
        return "discard", f"gain {gain:.4f} does not beat {bar(DISCARD_SIGMAS)}"
    if may_confirm:
        return "confirm", f"too close to call in one run: {figures}"
    if net > SINGLE_RUN_SIGMAS * spread:
        return "keep", f"gain {gain:.4f} beats {bar(SINGLE_RUN_SIGMAS)}, no second run left"
    return "discard", f"gain {gain:.4f} does not beat {bar(SINGLE_RUN_SIGMAS)}, no second run left"


def _ranks(score: float | None) -> bool:
    return score is not None and math.isfinite(score) and score > 0
