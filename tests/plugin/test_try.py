"""Proves `--autoresearch-try`: the edit in the checkout becomes one experiment; 0 kept, 1 not, 4 nothing to try.

Needs git and the fake trainer of lab.py.
"""

import pytest

from tests.plugin.lab import TRAIN, Lab, Night, interrupt, survivors


@pytest.fixture
def checkout(lab: Lab) -> Lab:
    """Return a project whose research branch is checked out."""
    lab.git("checkout", "-q", "-b", "autoresearch/lab")
    return lab


def attempt(lab: Lab, description: str, **constants: str) -> Night:
    """Edit constants of train.py and try the edit."""
    text = lab.read("train.py")
    for line in text.splitlines():
        name = line.split(" ")[0]
        if name in constants:
            text = text.replace(line, f"{name} = {constants[name]}")
    lab.write("train.py", text)
    return lab.pytest("--autoresearch-try", description)


def test_baselines_then_keep_then_discard(checkout: Lab) -> None:
    lab = checkout
    first = lab.pytest("--autoresearch-try", "baseline")
    assert first.code == 0, first.out
    assert [record["kind"] for record in lab.runs] == ["baseline"] * 3
    kept = attempt(lab, "rate nearer", RATE="0.03")
    assert kept.code == 0, kept.out
    assert "    1  rate nearer: val_bpb 1.074000  gain +0.010000  keep: " in kept.out
    assert lab.git("log", "-1", "--format=%s") == "rate nearer"
    assert lab.git("status", "--porcelain") == ""
    assert lab.results.splitlines()[-1].endswith("keep\trate nearer")
    discarded = attempt(lab, "rate away", RATE="0.09")
    assert discarded.code == 1
    assert "RATE = 0.03" in lab.read("train.py")
    assert "git show refs/autoresearch/lab/0002" in discarded.out
    assert "RATE = 0.09" in lab.git("show", "refs/autoresearch/lab/0002")
    assert lab.git("log", "-1", "--format=%s") == "rate nearer"
    crashed = attempt(lab, "crash", MODE='"crash"')
    assert crashed.code == 1 and "ValueError: too wide" in crashed.out
    assert "run.log" in crashed.out and 'MODE = "ok"' in lab.read("train.py")
    assert lab.read("results.tsv").splitlines()[-1].split("\t")[1:] == ["0.000000", "0.0", "crash", "crash"]


def test_the_first_try_runs_the_baselines_itself(checkout: Lab) -> None:
    assert attempt(checkout, "rate nearer", RATE="0.03").code == 0
    assert checkout.verdicts == ["keep"] and len(checkout.runs) == 4


def test_nothing_to_try(checkout: Lab) -> None:
    checkout.pytest("--autoresearch-try", "baseline")
    same = checkout.pytest("--autoresearch-try", "nothing")
    assert same.code == 4 and "means the same as the champion's" in same.error
    attempt(checkout, "rate away", RATE="0.09")
    again = attempt(checkout, "rate away again", RATE="0.09")
    assert again.code == 4 and "experiment 1 (discard)" in again.error
    assert "RATE = 0.09" in checkout.read("train.py")  # the edit is not taken away
    assert checkout.verdicts == ["discard"]


def test_beside_a_branch_of_ones_own(lab: Lab) -> None:
    lab.write("train.py", TRAIN.replace("0.04", "0.03"))
    night = lab.pytest("--autoresearch-try", "rate nearer", "--autoresearch-tag=lab")
    assert night.code == 0, night.out
    assert lab.git("symbolic-ref", "--short", "HEAD") == "main"
    assert lab.git("log", "-1", "--format=%s") == "project"
    assert "RATE = 0.03" in lab.git("show", "autoresearch/lab:train.py")


def test_ctrl_c_leaves_the_edit(checkout: Lab) -> None:
    checkout.pytest("--autoresearch-try", "baseline")
    checkout.write("train.py", TRAIN.replace('"ok"', '"hang"'))
    process = checkout.start("--autoresearch-try", "hang")
    with process:
        tree = checkout.hanging(process)
        interrupt(process)
        interrupt(process)
        process.communicate(timeout=60)
    assert survivors(tree) == []
    assert process.returncode == 2
    assert '"hang"' in checkout.read("train.py") and checkout.verdicts == []


def test_a_second_run_settles_a_close_call(checkout: Lab) -> None:
    hook = """
from pytest_autoresearch.records import Verdict

def pytest_autoresearch_decide(standing, runs):
    return Verdict(outcome="confirm" if len(runs) == 1 else "keep", reason="asked twice")
"""
    checkout.write("conftest.py", hook)
    night = attempt(checkout, "close", RATE="0.0399")
    assert night.code == 0, night.out
    assert [(r["kind"], r["number"], r["run"]) for r in checkout.runs[3:]] == [("experiment", 1, 1), ("confirm", 1, 2)]
    assert checkout.runs[3]["seed"] != checkout.runs[4]["seed"]
    assert checkout.results.count("close") == 1
