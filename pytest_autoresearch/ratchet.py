"""The keep rule: pure functions from scores to a verdict. No I/O, no clock, no randomness."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from .records import Policy, Result, Standing, Verdict

KEEP_SIGMAS = 3.0  # a net gain above this is kept at once
DISCARD_SIGMAS = 1.0  # one below this is discarded at once; between the two a second run decides
SINGLE_RUN_SIGMAS = 2.5  # the one threshold when no second run may be afforded
MEMORY_STEP_GB = 0.1  # as results.tsv prints it; smaller differences are the allocator's noise

Outcome = Literal["keep", "discard", "crash", "confirm"]


def decide(standing: Standing, runs: Sequence[Result], lines_added: int, policy: Policy) -> Verdict:
    """Return the verdict on a candidate after `runs`, its results so far (one, or two after a "confirm").

    Scores, `sigma` and the policy's prices share the metric's unit. gain = champion's mean - last score (the
    other way round when more is better); price = lines_added * line_price + memory_added * memory_price.

    The ladder: net gain = gain - max(price, 0). At most 1 sigma is a discard, above 3 sigma a keep. Between them
    one more run is asked for and decides alone, since the first one was singled out for being good; where no
    second run may be afforded the bar is 2.5 sigma.

    A candidate with a negative price is a simplification, kept at an equal score: within the champion's own
    standard error sigma / sqrt(n). A single run at that bar would let one in three candidates that are 1 sigma
    worse slip in, so it is kept at once only if it is not worse at all and saves at least that standard error
    (what the comparison may hide is then paid for); else the second run must not be worse either.

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
    mean, sigma = statistics.mean(scores), standing.sigma
    gain = (mean - last.score) if policy.direction == "min" else (last.score - mean)
    memory_added = last.memory_gb - standing.memory_gb
    if abs(memory_added) < MEMORY_STEP_GB:
        memory_added = 0.0
    price = lines_added * policy.line_price + memory_added * policy.memory_price
    if not (math.isfinite(gain) and math.isfinite(price) and math.isfinite(sigma) and sigma >= 0):
        return Verdict(outcome="discard", reason=f"cannot be compared: gain {gain}, price {price}, sigma {sigma}")

    outcome, reason = _climb(
        gain, price, sigma, sigma / math.sqrt(len(scores)), first=len(runs) == 1, may_confirm=standing.may_confirm
    )
    return Verdict(outcome=outcome, reason=reason, gain=gain, price=price, sigma=sigma)


def _climb(
    gain: float, price: float, sigma: float, error: float, *, first: bool, may_confirm: bool
) -> tuple[Outcome, str]:
    """Return outcome and reason for finite figures; `error` is the standard error of the champion's mean."""
    toll = max(price, 0.0)
    net, simpler = gain - toll, price < 0
    figures = f"gain {gain:.4f}, price {price:.4f}, sigma {sigma:.4f}"

    def above(sigmas: float) -> str:
        return f"price {toll:.4f} + {sigmas:g} sigma {sigmas * sigma:.4f}"

    if not first:
        if net > 0:
            return "keep", f"confirmed by a fresh run: gain {gain:.4f} beats price {toll:.4f}"
        if simpler and net >= 0:
            return "keep", f"simpler at an equal score, twice: {figures}"
        return "discard", f"not confirmed by a fresh run: {figures}"
    if net > KEEP_SIGMAS * sigma:
        return "keep", f"gain {gain:.4f} beats {above(KEEP_SIGMAS)}"
    if simpler and net >= 0 and -price >= error:
        return "keep", f"simpler at an equal score: {figures}"
    if simpler and net < -error:
        return "discard", f"simpler, but worse by {-gain:.4f}, the champion's standard error is {error:.4f}"
    if not simpler and net <= DISCARD_SIGMAS * sigma:
        return "discard", f"gain {gain:.4f} does not beat {above(DISCARD_SIGMAS)}"
    if may_confirm:
        return "confirm", f"too close to call in one run: {figures}"
    if net > SINGLE_RUN_SIGMAS * sigma:
        return "keep", f"gain {gain:.4f} beats {above(SINGLE_RUN_SIGMAS)}, no second run left"
    return "discard", f"gain {gain:.4f} does not beat {above(SINGLE_RUN_SIGMAS)}, no second run left"


def noise(groups: Iterable[Sequence[float]]) -> float:
    """Return the pooled standard deviation of repeated scores, one group a commit; 0.0 without repeats.

    sqrt(sum of squared deviations from each group's mean / sum of (size - 1)).
    """
    squares, freedom = 0.0, 0
    for group in groups:
        if len(group) > 1:
            mean = statistics.mean(group)
            squares += math.fsum((score - mean) ** 2 for score in group)
            freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def _ranks(score: float | None) -> bool:
    return score is not None and math.isfinite(score) and score > 0
