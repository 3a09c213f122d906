"""Several machines on one line of research: their branches side by side, and what one kept judged on another.

Needs git and the fake runner of lab.py; the machines are two clones of one repository that push and fetch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_autoresearch.ledger import Ledger
from tests.plugin.lab import PROPOSE, TRAIN, Lab, Night

NEARER = ("rate nearer", "RATE = 0.04", "RATE = 0.03")
WIDER = ("wider", "WIDTH = 64", "WIDTH = 128")
WORSE = ("rate away", "RATE = 0.04", "RATE = 0.05")


@pytest.fixture
def ada(lab: Lab) -> Lab:
    """The first machine, whose loop's tag is `lab-ada`."""
    lab.write("conftest.py", PROPOSE)
    lab.write("train.py", TRAIN.replace("RATE = 0.04", "\n\nRATE = 0.04"))  # so that changes do not touch each other
    lab.commit("plan")
    lab.git("init", "-q", "--bare", str(lab.top.parent / "hub"))
    lab.git("remote", "add", "origin", str(lab.top.parent / "hub"))
    lab.git("push", "-q", "origin", "main")
    return lab


@pytest.fixture
def bob(ada: Lab, tmp_path: Path) -> Lab:
    """The second machine."""
    ada.git("clone", "-q", "-b", "main", str(tmp_path / "hub"), str(tmp_path / "bob"))
    home = tmp_path / "bob home"
    home.mkdir()
    env = {**ada.env, "HOME": str(home), "LAB_PLAN": str(home / "plan"), "LAB_REQUESTS": str(home / "requests")}
    bob = replace(ada, top=tmp_path / "bob", env=env)
    bob.git("config", "user.name", "Bob")
    bob.git("config", "user.email", "bob@example.org")
    return bob


def loop(lab: Lab, tag: str, *edits: tuple[str, str, str]) -> Night:
    """Run a plan to its end and push what was kept."""
    lab.plan(*edits)
    night = lab.pytest("--autoresearch-loop", f"--autoresearch-tag={tag}", f"--autoresearch-max={len(edits)}")
    assert night.code == 0, night.out
    lab.git("push", "-q", "origin", f"autoresearch/{tag}")
    return night


def adopt(lab: Lab, tag: str, branch: str) -> Night:
    return lab.pytest(f"--autoresearch-adopt={branch}", f"--autoresearch-tag={tag}")


def runs(bob: Lab) -> list[dict[str, Any]]:
    return Ledger.read(bob.top / ".git/autoresearch/lab-bob/ledger.jsonl").runs


def log(lab: Lab, branch: str) -> list[str]:
    return lab.git("log", "--reverse", "--format=%s", f"main..{branch}").splitlines()


def test_what_one_machine_kept_is_judged_on_another_and_both_are_compared(ada: Lab, bob: Lab) -> None:
    loop(ada, "lab-ada", WORSE, NEARER, WIDER, ("both", "RATE = 0.03", "RATE = 0.02"))
    nearer, wider, both = ada.git("log", "--reverse", "--format=%h", "--abbrev=7", "main..autoresearch/lab-ada").split()
    loop(bob, "lab-bob", ("rate near", "RATE = 0.04", "RATE = 0.025"))  # which is where Ada's changes meet his
    bob.git("fetch", "-q")
    night = adopt(bob, "lab-bob", "autoresearch/lab-ada")
    assert night.code == 0, night.out
    for change in (f"{nearer}: rate nearer", f"{both}: both"):
        line = f"adopt autoresearch/lab-ada {change}: does not apply to the champion (1 conflict in train.py)"
        assert night.out.count(line) == 1, night.out  # not asked again
    assert "ended: all that was kept on autoresearch/lab-ada is through" in night.out
    kept = ["rate near", f"adopt autoresearch/lab-ada {wider}: wider"]
    assert log(bob, "autoresearch/lab-bob") == kept
    assert "RATE = 0.025" in bob.git("show", "autoresearch/lab-bob:train.py")
    assert "WIDTH = 128" in bob.git("show", "autoresearch/lab-bob:train.py")
    before = len(runs(bob))
    again = adopt(bob, "lab-bob", "origin/autoresearch/lab-ada")  # tried by that name or another: once
    assert f"{nearer}: rate nearer: does not apply" in again.out, again.out
    assert len(runs(bob)) == before and log(bob, "autoresearch/lab-bob") == kept

    compared = bob.pytest("--autoresearch-compare", "autoresearch/lab-ada", "autoresearch/lab-bob")
    assert compared.code == 0, compared.out
    rows = [line.split() for line in compared.out.splitlines()]
    of_ada, of_bob = (next(row for row in rows if row[:1] == [f"autoresearch/lab-{who}"]) for who in ("ada", "bob"))
    # branch, experiments, kept, baseline, runs, noise, champion, score, gain, from
    assert of_ada[1:6] == ["4", "3", "1.084000", "3", "0.000000"]
    assert of_ada[7:] == ["1.000000*", "+0.084000", "results.tsv"]
    assert of_bob[1:6] == ["2", "2", "1.084000", "3", "0.000000"]
    assert of_bob[7:] == ["1.005000", "+0.079000", "ledger"]  # fresh runs of the claim
    changes = {" ".join(row[:-1]): row[-1] for row in rows if row[-1:] and row[-1].startswith("+0.0")}
    assert changes["wider +0.064000"] == "+0.064000"  # on both, under the name that it had first
    assert changes["rate nearer"] == changes["both"] == "+0.010000" and changes["rate near"] == "+0.015000"
    assert "rate away" not in compared.out and "scores of different machines are not compared" in compared.out


def test_what_is_worse_here_is_discarded_here_and_what_is_here_is_no_experiment(ada: Lab, bob: Lab) -> None:
    loop(ada, "lab-ada", WIDER, NEARER)
    bob.write("runner.py", bob.read("runner.py").replace('["WIDTH"] - 128', '["WIDTH"] - 64'))  # another machine
    bob.commit("another machine")
    loop(bob, "lab-bob", NEARER)
    bob.git("fetch", "-q")
    night = adopt(bob, "lab-bob", "autoresearch/lab-ada")
    assert night.code == 0, night.out
    assert runs(bob)[-1]["verdict"]["outcome"] == "discard"
    assert ": wider: " in night.out and ": rate nearer: the champion has it already" in night.out
    assert log(bob, "autoresearch/lab-bob")[-1] == "rate nearer"


@pytest.mark.parametrize("option", ["--autoresearch-adopt", "--autoresearch-compare"])
def test_a_branch_that_is_not_meant(option: str, ada: Lab, bob: Lab) -> None:
    def said(name: str) -> str:
        return bob.pytest(option, name, *(["--autoresearch-tag=lab-bob"] if option.endswith("adopt") else [])).error

    assert said("autoresearch/nowhere") == (
        f"ERROR: {option}: there is no branch 'autoresearch/nowhere' here: `git fetch` it, or correct the name"
    )
    for remote in ("one", "two"):
        bob.git("update-ref", f"refs/remotes/{remote}/autoresearch/x", "HEAD")
    assert said("autoresearch/x") == (
        f"ERROR: {option}: 'autoresearch/x' is a branch of several remotes: "
        "name one/autoresearch/x or two/autoresearch/x"
    )
    if option == "--autoresearch-adopt":
        assert said("main") == f"ERROR: {option}: nothing was kept on main that is not here already"
        assert said("autoresearch/lab-bob") == (
            f"ERROR: {option}: autoresearch/lab-bob is the branch that is worked on: name another machine's"
        )
