"""The keep rule's error rates over simulated nights of known truth, as the README states them. Needs nothing."""

from statistics import fmean

import pytest

from benchmarks.ratchet import REGIMES, Night, night
from pytest_autoresearch import ratchet

NIGHTS = 300
STATED = 2.0  # false keeps in 100 proposals of which none is an improvement, at most


def nights(rule: str, regime: str, count: int = NIGHTS) -> list[Night]:
    return [night(rule, REGIMES[regime], sigma=1.0, scale=1.0, seed=seed) for seed in range(count)]


def false_keeps(regime: str = "null") -> float:
    return fmean(one.false_keeps for one in nights("ladder", regime))


def test_the_rate_of_false_keeps_is_at_most_the_stated_one() -> None:
    assert 0.5 < false_keeps() <= STATED


@pytest.mark.parametrize(
    ("constant", "value"), [("CONFIRM_SIGMAS", -10.0), ("DISCARD_SIGMAS", 0.0), ("KEEP_SIGMAS", 1.5)]
)
def test_a_laxer_rule_breaks_the_stated_rate(monkeypatch: pytest.MonkeyPatch, constant: str, value: float) -> None:
    monkeypatch.setattr(ratchet, constant, value)
    assert false_keeps() > STATED


def test_a_claim_is_not_optimistic_and_a_strict_champions_score_is() -> None:
    ladder, strict = nights("ladder", "middle"), nights("strict", "middle")
    assert abs(fmean(one.claim_optimism for one in ladder)) < 0.2  # its standard error is 0.05
    assert fmean(one.optimism for one in strict) > 1.2
    assert fmean(one.false_keeps for one in strict) > 3 * fmean(one.false_keeps for one in ladder)
