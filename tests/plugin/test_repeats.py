"""Proves when the champion runs again, what a claim rests on, and that the machine's failures are nobody's experiments.

Needs git and the fake trainer of lab.py.
"""

from pathlib import Path

import pytest

from pytest_autoresearch import ratchet
from tests.plugin.lab import PROPOSE, Lab

BETTER = ("rate nearer", "RATE = 0.04", "RATE = 0.03")
NOISE = 'WARMUP_RATIO = 0.1  # of the budget\nNOISE = "in the last digits"'


def kinds(lab: Lab) -> list[str]:
    return [run["kind"] for run in lab.runs]


@pytest.mark.parametrize(("rule", "again"), [("ladder", ["champion"]), ("strict", [])])
def test_the_champion_runs_again_after_20_proposals(lab: Lab, rule: str, again: list[str]) -> None:
    worse = [(f"rate {n}", "RATE = 0.04", f"RATE = 0.{n}") for n in range(50, 50 + ratchet.RERUN_EVERY + 1)]
    lab.plan(*worse)
    night = lab.loop(f"--autoresearch-rule={rule}", experiments=len(worse))
    assert night.code == 0, night.out
    assert kinds(lab) == ["baseline"] * 3 + ["experiment"] * 20 + again + ["experiment"]
    shown = (lab.root / ".autoresearch/lab/results.tsv").read_text().splitlines()
    assert len(shown) == 1 + 3 + 21  # the champion's further runs are no rows
    assert "nothing was kept, nothing is claimed" in night.out


def test_a_claim_rests_on_three_fresh_runs_of_the_champion_and_says_its_error(lab: Lab) -> None:
    lab.write("train.py", lab.read("train.py").replace("WARMUP_RATIO = 0.1  # of the budget", NOISE))
    lab.commit("noise")
    lab.plan(BETTER)
    night = lab.loop()
    assert kinds(lab) == ["baseline"] * 3 + ["experiment"] + ["claim"] * 3
    assert len({run["seed"] for run in lab.runs}) == 7
    assert "noise: the same files score val_bpb with a standard deviation of 0.0000" in night.out
    assert "(4 degrees of freedom)" in night.out
    assert "claim: val_bpb: baseline 1.08" in night.out and "champion 1.07" in night.out
    assert "(standard error; fresh runs only)" in night.out and night.out.count("claim 1-") == 3
    assert lab.loop().out.count("claim 1-") == 0  # one that can be made already is not made again


def test_under_strict_a_champion_is_said_to_flatter_until_its_claim(lab: Lab) -> None:
    lab.plan(BETTER, ("crash", '"ok"', '"crash"'))
    night = lab.loop("--autoresearch-rule=strict", "-x", experiments=2)  # ends before the claim
    assert "no claim yet: the champion was picked for this score, so it flatters; in simulated nights by" in night.out


def test_an_earlier_night_says_what_the_noise_is(lab: Lab) -> None:
    lab.write("train.py", lab.read("train.py").replace("WARMUP_RATIO = 0.1  # of the budget", NOISE))
    lab.commit("noise")
    lab.plan(BETTER)
    lab.loop()
    night = lab.pytest("--autoresearch-loop", "--autoresearch-tag=next", "--autoresearch-max=1")
    assert "(8 degrees of freedom)" in night.out  # 2 of the baselines, 2 of the claim, 4 of the night before


def test_other_conditions_get_baselines_of_their_own(lab: Lab) -> None:
    lab.plan(BETTER, ("rate away", "RATE = 0.03", "RATE = 0.09"))
    lab.loop()
    night = lab.loop("-o", "autoresearch_budget_s=5")
    assert "the champion has no score under this budget: its own baselines come first" in night.out
    assert kinds(lab)[7:] == ["baseline"] * 3 + ["experiment"]
    assert "baseline 1.074000 (3 runs); nothing was kept" in night.out


def test_what_the_machine_spoils_runs_again_and_is_not_charged(lab: Lab) -> None:
    lab.plan(BETTER, ("flaky", '"ok"', '"flaky"'))
    night = lab.loop(experiments=2)
    assert night.code == 0, night.out
    assert lab.verdicts == ["keep", "retry", "discard"]
    assert "once more" in night.out and "2 experiments, as --autoresearch-max asked" in night.out
    seeds = [run["seed"] for run in lab.runs if run["number"] == 2]
    assert len(set(seeds)) == len(seeds) == 2


def test_a_kill_between_a_spoilt_run_and_the_next_charges_nobody(lab: Lab) -> None:
    kill = (
        "\n\ndef pytest_runtest_setup(item):\n    import pytest_autoresearch.research as r, os, signal\n"
        "    said = r.outcome_line\n"
        "    def stop(*a):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    r.outcome_line = stop if os.environ.get('LAB_STOP') else said\n"
    )
    lab.write("conftest.py", PROPOSE + kill)
    lab.plan(("flaky", '"ok"', '"flaky"'))
    lab.commit("kill")
    lab.env["LAB_STOP"] = "1"
    assert lab.loop().code == -9
    assert lab.verdicts == ["retry"]
    lab.env["LAB_STOP"] = ""
    night = lab.loop()
    assert lab.verdicts == ["retry", "discard"], night.out


DECIDE = """

def pytest_autoresearch_decide(standing, runs):
    from pytest_autoresearch.records import Verdict
    return Verdict(outcome="discard", reason="no")
"""


def test_replay_reaches_every_verdict_again_from_the_ledger_alone(lab: Lab) -> None:
    lab.plan(BETTER, ("flaky", '"ok"', '"flaky"'), ("crash", '"flaky"', '"crash"'), ("zero", '"ok"', '"zero"'))
    lab.loop(experiments=4)
    (lab.root / ".autoresearch").rename(lab.root / "moved")
    night = lab.pytest("--autoresearch-replay", "--autoresearch-tag=lab")
    assert night.code == 0, night.out
    said = f"lab: {len(lab.verdicts)} verdicts reached again from {len(lab.runs)} runs, none different"
    assert night.out.strip() == said


def test_replay_names_what_differs(lab: Lab) -> None:
    lab.plan(BETTER)
    lab.loop()
    Path(lab.root / "conftest.py").write_text(PROPOSE + DECIDE)
    night = lab.pytest("--autoresearch-replay", "--autoresearch-tag=lab")
    assert night.code == 1
    assert night.out.startswith("experiment 1, run 1: the ledger says keep (gain 0.0100 beats")
    assert "the rule now says discard (no)" in night.out
