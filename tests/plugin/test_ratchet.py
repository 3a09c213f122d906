"""The keep rule: the published examples, and what must hold for any numbers whatever. Needs nothing."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_autoresearch.ratchet import decide, settled
from pytest_autoresearch.records import Policy, Result, Standing, Verdict

CHAMPION = 0.997


def ok(score: float | None, memory_gb: float = 40.0) -> Result:
    return Result(status="ok", score=score, memory_gb=memory_gb)


def standing(mean: float = CHAMPION, sigma: float = 0.001, may_confirm: bool = True) -> Standing:
    return Standing(scores=(mean,) * 3, memory_gb=40.0, sigma=sigma, may_confirm=may_confirm)


def verdict(*scores: float | None, lines: int = 0, may_confirm: bool = True, sigma: float = 0.001) -> Verdict:
    return decide(standing(sigma=sigma, may_confirm=may_confirm), [ok(score) for score in scores], lines, Policy())


@pytest.mark.parametrize(
    ("score", "lines_added", "memory_added_gb", "outcome"),
    [
        (0.993, 5, 0, "keep"),
        (0.996, 20, 0, "discard"),
        (0.997, -15, 0, "keep"),
        (0.992, 10, 0, "keep"),
        (0.000, 0, 0, "crash"),
        (1.005, 0, 0, "discard"),
        (0.996, -60, 0, "keep"),
        (CHAMPION - 0.050, 0, 2, "keep"),
        (CHAMPION - 0.002, 0, 10, "discard"),
        (CHAMPION, 0, -5, "keep"),
        (CHAMPION - 0.010, 0, 1, "keep"),
    ],
)
@pytest.mark.parametrize("may_confirm", [True, False])
def test_published_examples(
    score: float, lines_added: int, memory_added_gb: float, outcome: str, may_confirm: bool
) -> None:
    got = decide(standing(may_confirm=may_confirm), [ok(score, 40 + memory_added_gb)], lines_added, Policy())
    assert got.outcome == outcome, got.reason


def test_reason_has_the_numbers() -> None:
    got = verdict(0.9925, lines=5)
    assert got.reason == "gain 0.0045 beats price 0.0005 + 3 S = 0.0040"
    assert got.price == pytest.approx(0.0005)
    assert got.gain == pytest.approx(0.0045)
    assert got.sigma == 0.001


@pytest.mark.parametrize(
    ("runs", "lines", "may_confirm", "outcome"),
    [
        # three champion runs: S = sigma * sqrt(4/3) = 0.00115
        ([0.9959], 0, True, "discard"),  # 0.95 S
        ([0.9948], 0, True, "confirm"),  # 1.9 S
        ([0.9948, 0.9964], 0, True, "keep"),  # the second run gains 0.52 S
        ([0.9948, 0.9965], 0, True, "discard"),  # 0.43 S
        ([0.9948, 0.9964], 5, True, "discard"),  # enough, but not with its price
        ([0.9935], 0, True, "keep"),  # 3.03 S
        ([0.9945], 0, False, "discard"),  # 2.2 S where 2.5 is the bar
        ([0.9941], 0, False, "keep"),  # 2.51 S
    ],
)
def test_ladder(runs: list[float], lines: int, may_confirm: bool, outcome: str) -> None:
    assert verdict(*runs, lines=lines, may_confirm=may_confirm).outcome == outcome


@pytest.mark.parametrize(
    ("runs", "lines", "may_confirm", "outcome"),
    [
        ([0.9972], -15, True, "confirm"),  # worse by luck, perhaps
        ([0.9972, 0.9970], -15, True, "keep"),
        ([0.9972, 0.9971], -15, True, "discard"),
        ([0.9972], -15, False, "discard"),
        ([0.9976], -15, True, "discard"),  # beyond the champion's standard error, 0.00058
        ([0.9970], -1, True, "discard"),  # one line does not pay for what a run may hide: no simplification
        ([0.9958], -1, True, "confirm"),  # but no obstacle either: 1.04 S
    ],
)
def test_simplification(runs: list[float], lines: int, may_confirm: bool, outcome: str) -> None:
    assert verdict(*runs, lines=lines, may_confirm=may_confirm).outcome == outcome


def test_without_noise_any_net_gain_is_kept() -> None:
    assert verdict(0.9969, sigma=0.0).outcome == "keep"
    assert verdict(0.9970, sigma=0.0).outcome == "discard"
    assert verdict(0.9970, sigma=0.0, lines=-1).outcome == "keep"


def test_a_champion_known_from_one_run_asks_for_more() -> None:
    one = Standing(scores=(CHAMPION,), memory_gb=40.0, sigma=0.001)
    many = Standing(scores=(CHAMPION,) * 100, memory_gb=40.0, sigma=0.001)
    assert [decide(known, [ok(0.9958)], 0, Policy()).outcome for known in (one, many)] == ["discard", "confirm"]


@pytest.mark.parametrize(
    ("score", "lines", "outcome"),
    [(0.99699, 0, "keep"), (0.997, 0, "discard"), (0.997, -1, "keep"), (0.9966, 5, "discard"), (0.998, -50, "discard")],
)
def test_strict_keeps_any_net_gain(score: float, lines: int, outcome: str) -> None:
    assert decide(standing(sigma=0.1), [ok(score)], lines, Policy(rule="strict")).outcome == outcome


def test_a_rule_that_never_decides_discards_after_two_runs() -> None:
    undecided = Verdict(outcome="confirm", reason="who knows")
    assert settled(undecided, 1) is undecided
    assert settled(undecided, 2).outcome == "discard"


def test_memory_below_a_tenth_of_a_gigabyte_is_no_saving() -> None:
    assert decide(standing(sigma=0.0), [ok(CHAMPION, 39.93)], 0, Policy()).outcome == "discard"


def test_a_crash_keeps_its_reason() -> None:
    crash = Result(status="crash", kind="error", reason="ZeroDivisionError: division by zero")
    assert decide(standing(), [crash], 0, Policy()).reason == "ZeroDivisionError: division by zero"
    assert decide(standing(), [ok(0.9949), crash], 0, Policy()).outcome == "crash"


def test_a_champion_that_never_ranked_is_never_beaten() -> None:
    for scores in [(), (math.nan,), (0.0, -1.0, math.inf)]:
        champion = Standing(scores=scores, memory_gb=0.0, sigma=0.0)
        assert decide(champion, [ok(0.5)], 0, Policy()).outcome == "discard"


wild = st.floats() | st.floats(0.5, 2.0)
results = st.builds(
    Result,
    status=st.sampled_from(["ok", "ok", "ok", "crash", "unusable"]),
    score=st.none() | wild,
    memory_gb=wild,
)
champions = st.builds(
    Standing,
    scores=st.lists(wild, max_size=4).map(tuple),
    memory_gb=wild,
    sigma=wild | st.floats(0.0, 0.2),
    may_confirm=st.booleans(),
)
policies = st.builds(Policy, direction=st.sampled_from(["min", "max"]))
some_runs = st.lists(results, min_size=1, max_size=2)
lines = st.integers(-500, 500)


@given(champions, some_runs, lines, policies)
@example(Standing(scores=(math.nan,), memory_gb=0.0, sigma=0.0), [ok(math.nan)], 0, Policy())
@example(Standing(scores=(1.0,), memory_gb=0.0, sigma=math.nan), [ok(0.5)], -9, Policy())
@example(Standing(scores=(1.0,), memory_gb=40.0, sigma=math.inf), [ok(0.5), ok(0.5)], 0, Policy())
@example(Standing(scores=(1.0,), memory_gb=math.nan, sigma=0.1), [ok(0.5)], 0, Policy())
def test_any_numbers_get_a_verdict_and_only_a_paid_gain_is_kept(
    champion: Standing, runs: list[Result], lines_added: int, policy: Policy
) -> None:
    got = decide(champion, runs, lines_added, policy)
    assert got.reason and "\n" not in got.reason
    bad = any(r.status != "ok" or r.score is None or not math.isfinite(r.score) or r.score <= 0 for r in runs)
    assert (got.outcome == "crash") == bad
    if got.outcome == "keep":
        assert got.gain is not None and got.price is not None and got.sigma is not None
        assert math.isfinite(got.gain) and math.isfinite(got.price) and math.isfinite(got.sigma)
        assert got.gain > max(got.price, 0.0) or (got.gain >= 0 and got.price < 0)
    if got.outcome == "confirm":
        assert len(runs) == 1 and champion.may_confirm


tame = st.floats(0.5, 1.5)
RANK = {"discard": 0, "confirm": 1, "keep": 2}


@given(
    st.lists(tame, min_size=1, max_size=4), st.floats(0, 0.2), st.booleans(), lines, policies, tame, tame, st.booleans()
)
def test_a_better_score_never_gets_a_worse_verdict(
    scores: list[float],
    sigma: float,
    may_confirm: bool,
    lines_added: int,
    policy: Policy,
    one: float,
    other: float,
    second: bool,
) -> None:
    champion = Standing(scores=tuple(scores), memory_gb=1.0, sigma=sigma, may_confirm=may_confirm)
    before = [ok(0.9, 1.0)] if second else []
    worse, better = sorted((one, other), reverse=policy.direction == "min")
    low, high = (decide(champion, [*before, ok(score, 1.0)], lines_added, policy) for score in (worse, better))
    assert RANK[low.outcome] <= RANK[high.outcome]


@given(st.integers(1, 99), st.integers(1, 99), st.integers(0, 20), lines)
def test_more_is_better_is_the_mirror_of_less_is_better(mean: int, score: int, sigma: int, lines_added: int) -> None:
    def outcome(flip: bool) -> str:
        # In sixty-fourths, so that reflecting at 100 is exact.
        champion, own = ((100 - value if flip else value) / 64 for value in (mean, score))
        policy = Policy(direction="max" if flip else "min", line_price=1 / 64)
        return decide(standing(champion, sigma / 64), [ok(own)], lines_added, policy).outcome

    assert outcome(False) == outcome(True)
