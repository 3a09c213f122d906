"""What the ledger's runs say of noise and champion, folded run by run. Needs nothing."""

import math
from statistics import fmean, variance
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_autoresearch.records import Policy, Standing
from pytest_autoresearch.standing import Known

MACHINE = {"cpu": "one", "cores": 2}
KINDS = ("baseline", "experiment", "confirm", "champion", "claim")


def run(kind: str, commit: str, score: float, machine: dict[str, Any] = MACHINE, status: str = "ok") -> dict[str, Any]:
    result = {"status": status, "score": score, "memory_gb": score / 2, "fingerprint": machine}
    return {"kind": kind, "commit": commit, "result": result}


def known(*runs: dict[str, Any]) -> Known:
    folded = Known()
    for record in runs:
        folded.add(record)
    return folded


def standing(commit: str, *runs: dict[str, Any], policy: Policy | None = None) -> Standing:
    return known(*runs).standing(commit, MACHINE, policy or Policy())


runs = st.lists(
    st.builds(
        run,
        st.sampled_from(KINDS),
        st.sampled_from("abc"),
        st.floats(0.5, 2.0),
        st.sampled_from([MACHINE, {"cpu": "other", "cores": 2}]),
        st.sampled_from(["ok", "ok", "ok", "crash"]),
    ),
    max_size=30,
)


@given(runs)
def test_sigma_pools_the_variances_of_all_fresh_repeats_of_this_machine(records: list[dict[str, Any]]) -> None:
    groups: dict[str, list[float]] = {}
    for record in records:
        result = record["result"]
        if result["status"] == "ok" and result["fingerprint"] == MACHINE and record["kind"] != "experiment":
            groups.setdefault(record["commit"], []).append(result["score"])
    freedom = sum(len(group) - 1 for group in groups.values())
    squares = sum(variance(group) * (len(group) - 1) for group in groups.values() if len(group) > 1)
    got = standing("a", *records)
    assert got.freedom == freedom
    assert got.sigma == pytest.approx(math.sqrt(squares / freedom) if freedom else 0.0, abs=1e-9)
    assert got.scores == tuple(groups.get("a", [])) or (got.tainted and "a" not in groups)


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=5), st.floats(0.0, 1.0), st.integers(1, 9))
def test_a_prior_counts_as_so_many_degrees_of_freedom(scores: list[float], sigma: float, freedom: int) -> None:
    policy = Policy(prior_sigma=sigma, prior_freedom=freedom)
    got = standing("a", *[run("baseline", "a", score) for score in scores], policy=policy)
    squares = variance(scores) * (len(scores) - 1) + freedom * sigma**2
    assert got.freedom == len(scores) - 1 + freedom
    assert got.sigma == pytest.approx(math.sqrt(squares / got.freedom), abs=1e-9)


def test_the_run_that_a_champion_was_kept_for_counts_until_a_fresh_one_is_there() -> None:
    kept = run("experiment", "b", 0.9)
    alone = standing("b", run("baseline", "a", 1.0), kept)
    assert alone.scores == (0.9,) and alone.tainted and alone.memory_gb == 0.45
    again = standing("b", run("baseline", "a", 1.0), kept, run("champion", "b", 0.96))
    assert again.scores == (0.96,) and not again.tainted and again.memory_gb == 0.48


def test_a_claim_rests_on_runs_that_no_verdict_hung_on() -> None:
    folded = known(*[run(kind, "b", score) for kind, score in zip(KINDS, (1.0, 0.9, 0.91, 0.95, 0.96), strict=True)])
    assert folded.unpicked("b", MACHINE) == [1.0, 0.95, 0.96]
    assert folded.unpicked("b", {"cpu": "other"}) == []


def test_a_tuple_in_a_fingerprint_equals_its_list() -> None:
    folded = known(run("baseline", "a", 1.0, {"gpus": ["x", "y"]}))
    assert folded.standing("a", {"gpus": ("x", "y")}, Policy()).scores == (1.0,)


@pytest.mark.parametrize(
    ("confirmations", "others", "more"),
    [(0, 3, True), (1, 3, False), (1, 12, True), (1, 11, False), (3, 23, True), (3, 22, False)],
)
def test_confirmations_stay_within_15_percent_of_all_runs_but_the_first(
    confirmations: int, others: int, more: bool
) -> None:
    records = [run("baseline", "a", 1.0)] * others + [run("confirm", "b", 1.0)] * confirmations
    assert standing("a", *records).may_confirm is more
    assert standing("a", *records, *[run("claim", "a", 1.0)] * 3).may_confirm is more  # claims are no part of it


def test_mean_memory_is_that_of_the_counted_runs() -> None:
    got = standing("a", run("baseline", "a", 1.0), run("baseline", "a", 2.0))
    assert got.memory_gb == fmean([0.5, 1.0])
