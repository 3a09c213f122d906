"""Proves what is done around a score: verification before a keep, the second split, trust, determinism's table.

Needs git and the fake runner of lab.py, which verifies and promises trust where a test tells it to.
"""

import math
import random
import shutil
from pathlib import Path
from statistics import NormalDist

import pytest

from pytest_autoresearch import heldout
from tests.plugin.lab import TRAIN, Lab

BETTER = ("rate nearer", "RATE = 0.04", "RATE = 0.03")
WORSE = ("rate away", "RATE = 0.04", "RATE = 0.05")


def test_only_what_is_to_be_kept_is_verified(lab: Lab) -> None:
    lab.promise(verifies=True, trust="split")
    lab.plan(WORSE, BETTER)
    night = lab.loop(experiments=2)
    assert night.code == 0 and lab.verdicts == ["discard", "keep"], night.out
    (asked,) = lab.requests("verify")
    (keep,) = [run for run in lab.runs if run["verdict"] and run["verdict"]["outcome"] == "keep"]
    ran = lab.requests("run")[:5]  # before the claim's
    assert {**asked, **ran[-1], "op": "verify"} == {**asked, "heldout": False, "data": {}}
    assert asked["score"] == keep["result"]["score"] and asked["seed"] == keep["seed"]
    assert asked["weights_sha256"] == keep["result"]["weights_sha256"] == f"weights {keep['seed']}"
    assert [request["heldout"] for request in ran] == [True] * 3 + [False] * 2
    first = lab.runs[0]["result"]["metrics"]
    assert [request["baseline"] for request in [*ran, asked]] == [None, *[first] * 5] and first["heldout_bpb"]
    assert keep["result"]["metrics"]["audit_rows"] == 512
    assert keep["result"]["metrics"]["val_bpb"] == keep["result"]["score"] == 1.074
    assert lab.folders == {"run.log", "verify.log"}
    assert "trust: split" in night.out and "trust of these runs: split" in night.out
    assert "looks at each split so far: val_bpb 8, heldout_bpb 4" in night.out


def test_what_fails_its_verification_is_a_crash(lab: Lab) -> None:
    lab.promise(verifies=True)
    lab.plan(("cheat", '"ok"', '"cheat"'))
    night = lab.loop("--junitxml=../j.xml")
    assert night.code == 1 and lab.verdicts == ["crash"], night.out
    result = lab.runs[-1]["result"]
    assert (result["status"], result["kind"], result["score"]) == ("crash", "audit", None)
    assert result["metrics"]["val_bpb"] == 0.9  # what it claimed
    assert lab.runs[-1]["verdict"]["reason"] == "it looks ahead in row 3 at position 7"
    assert lab.properties("../j.xml")["1"]["reason"] == "it looks ahead in row 3 at position 7"
    assert "baseline 1.084000 (3 runs); nothing was kept" in night.out
    assert lab.git("log", "-1", "--format=%s", "autoresearch/lab") == "plan"
    assert lab.folders == {"run.log", "verify.log"}


def test_the_next_start_removes_what_a_kill_left(lab: Lab) -> None:
    lab.promise(verifies=True)
    lab.plan(BETTER)
    kill = "\n\ndef pytest_autoresearch_decide():\n    import os\n    os.kill(os.getpid(), 9)\n"
    lab.write("conftest.py", lab.read("conftest.py") + kill)
    lab.commit("kill")
    assert lab.loop().code == -9
    assert {"locked", "candidate", "scratch"} < lab.folders
    lab.write("conftest.py", "")
    lab.loop("--autoresearch-hours=0.00000001")
    assert lab.folders == {"run.log"}


def test_a_jump_of_the_gap_is_reported(lab: Lab) -> None:
    lab.promise(verifies=True)
    lab.plan(BETTER, ("wider", "WIDTH = 64", "WIDTH = 128"), ("learned by heart", '"ok"', '"learned"'))
    night = lab.loop(experiments=3)
    assert lab.verdicts == ["keep"] * 3, night.out  # reported, not vetoed
    warnings = [line for line in night.out.splitlines() if "POSSIBLE CONTAMINATION" in line]
    assert len(warnings) == 2 and all("experiment 3: gap to heldout_bpb +0.55" in line for line in warnings)
    assert "looks at each split so far: val_bpb 9, heldout_bpb 6" in night.out


def test_the_gap_flags_few_honest_keeps_and_every_large_jump() -> None:
    chance = random.Random(1)

    def night(jump: float) -> list[heldout.Gap]:
        def run(kind: str, extra: float = 0.0) -> dict[str, object]:
            score = chance.gauss(1.8, 0.01)
            metrics = {"val_bpb": score, "heldout_bpb": score + chance.gauss(0.03, 0.002) + extra}
            result = {"status": "ok", "score": score, "metrics": metrics, "fingerprint": {}}
            verdict = None if kind == "baseline" else {"outcome": "keep"}
            return {"kind": kind, "number": 1, "result": result, "verdict": verdict}

        runs = [*(run("baseline") for _ in range(3)), *(run("experiment") for _ in range(7)), run("experiment", jump)]
        return list(heldout.gaps(runs, "val_bpb", "min", {}))

    honest = [gap for _ in range(400) for gap in night(0.0)]
    assert sum(gap.suspicious for gap in honest) < 0.006 * len(honest)
    assert all(night(0.04)[-1].suspicious for _ in range(100))
    assert list(heldout.gaps([], "val_bpb", "min", {})) == []
    assert heldout.name_of("val_bpb") == "heldout_bpb" and heldout.name_of("loss") == "heldout_loss"


def test_the_factors_are_students_t() -> None:
    tail = 1 - NormalDist().cdf(3)
    for freedom, factor in enumerate(heldout.SIGMAS, 1):
        if freedom == 1:
            assert 0.5 - math.atan(factor) / math.pi == pytest.approx(tail, rel=1e-3)
            continue
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        step = 1e-4  # of u in x = factor / u, so that the whole tail is summed
        grid = ((i + 0.5) * step for i in range(10_000))
        area = sum((1 + (factor / u) ** 2 / freedom) ** (-(freedom + 1) / 2) * factor / u**2 for u in grid)
        assert scale * area * step == pytest.approx(tail, rel=0.02), freedom


def test_trust_below_what_is_required_runs_nothing(lab: Lab) -> None:
    lab.promise(trust="split", trust_reason="no sandbox here: install bubblewrap")
    for args in (("--autoresearch-loop", "--autoresearch-tag=lab"), ("--autoresearch-try=x",), ("train.py",)):
        night = lab.pytest(*args, "--autoresearch-require=sealed")
        assert night.code == 4, night.out
        assert "'sealed' is asked for, but the runner's runs here are split: no sandbox here" in night.error
    assert lab.pytest("train.py", "--autoresearch-require=split").code == 0
    assert lab.runs == []


def test_trust_below_what_was_promised_is_a_crash(lab: Lab) -> None:
    lab.promise(trust="split")
    lab.plan(("careless", '"ok"', '"careless"'))
    assert lab.loop().code == 1
    assert lab.runs[-1]["verdict"]["reason"] == "trust inproc, but the check promised split"
    assert lab.runs[0]["result"]["trust"] == "split"


@pytest.mark.parametrize(("mode", "code", "says"), [("ok", 0, "1 passed"), ("broken", 1, "breaks: one thread")])
def test_determinism_is_shown(lab: Lab, mode: str, code: int, says: str) -> None:
    shutil.rmtree(lab.root / ".git")
    lab.write("train.py", TRAIN.replace('"ok"', f'"{mode}"'))
    night = lab.pytest("--autoresearch-determinism", env={"PATH": "/nonexistent"})
    assert night.code == code and says in night.out, night.out
    rows = [line.split() for line in night.out.splitlines() if "0x1.8" in line]
    assert [row[-1] for row in rows] == ["yes", "yes" if code == 0 else "NO"]


def test_determinism_of_what_does_not_run(lab: Lab) -> None:
    lab.write("train.py", TRAIN.replace('"ok"', '"crash"'))
    night = lab.pytest("--autoresearch-determinism")
    assert night.code == 1 and "ValueError: too wide" in night.out
    lab.write("train.py", "def train(:\n")
    assert lab.pytest("--autoresearch-determinism").code == 4
    lab.write("NO_DATA", "")
    night = lab.pytest("--autoresearch-determinism", "-o", "autoresearch_immutable=runner.py\nNO_DATA")
    assert night.code == 4 and "no data for profile tiny" in night.error


def test_a_run_directory_that_cannot_be_made_is_one_line(lab: Lab) -> None:
    folder = Path(lab.top, ".git/autoresearch/lab/runs")
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    night = lab.loop()
    assert night.code == 4 and "cannot make the run directory" in night.error
