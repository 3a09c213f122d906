"""--autoresearch-status says in JSON what the ledger holds and changes nothing, beside a running loop too. Needs git.

And --autoresearch-import, which begins that ledger.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pytest_autoresearch.ledger import Ledger, run_record
from pytest_autoresearch.records import Candidate, Policy, Result, Verdict
from tests.plugin.lab import Lab, interrupt, survivors

HERE = {"machine": "lab", "profile": "tiny"}
OLD = (
    "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
    "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
    "d4e5f6g\t0.000000\t0.0\tcrash\tdouble model width (OOM)\n"
)


def status(lab: Lab, *args: str) -> dict[str, Any]:
    """Return what pytest prints, which must be one JSON object and nothing else."""
    command, env = lab.command("--autoresearch-status", *args)
    done = subprocess.run(command, cwd=lab.root, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    said = json.loads(done.stdout)
    assert isinstance(said, dict)
    return said


def fingerprints(top: Path) -> dict[str, tuple[str, int]]:
    """Return digest and time of every file."""
    files = [path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {os.fspath(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def edit(lab: Lab, parent: str, old: str, new: str) -> str:
    """Return a commit on `parent` with `old` made `new` in train.py."""
    lab.git("checkout", "-q", "--detach", parent)
    lab.write("train.py", lab.read("train.py").replace(old, new))
    lab.commit(new)
    commit = lab.git("rev-parse", "HEAD")
    lab.git("checkout", "-q", "main")
    return commit


class Book:
    """A ledger of tag `lab`, written by hand over real commits."""

    def __init__(self, lab: Lab) -> None:
        self.ledger = Ledger.open(lab.top / ".git/autoresearch/lab/ledger.jsonl")

    def run(
        self,
        number: int,
        commit: str,
        parent: str,
        score: float | None,
        outcome: Any = None,
        *,
        kind: str = "experiment",
        gain: float | None = None,
        attempt: int = 1,
    ) -> None:
        """Append one run; sigma was 0.01."""
        candidate = Candidate(
            number=number, commit=commit, parent=parent, description=f"idea {number}", lines_added=0, attempt=attempt
        )
        verdict = Verdict(outcome=outcome, reason="so", gain=gain, price=0.0, sigma=0.01) if outcome else None
        result = Result(status="ok" if score else "crash", score=score, memory_gb=0.5, fingerprint=HERE)
        self.ledger.append(
            run_record(
                kind=kind,
                candidate=candidate,
                run=self.ledger.next_run(number),
                seed=1,
                policy=Policy() if outcome else None,
                result=result,
                verdict=verdict,
            )
        )


def test_every_field_of_a_night(lab: Lab) -> None:
    head = lab.git("rev-parse", "HEAD")
    lab.git("branch", "autoresearch/lab", head)
    book = Book(lab)
    for score in (1.0, 1.02):
        book.run(0, head, head, score, kind="baseline")
    rate = edit(lab, head, "RATE = 0.04", "RATE = 0.02")
    both = edit(lab, head, "WIDTH = 64  # units\nRATE = 0.04", "WIDTH = 128  # units\nRATE = 0.08")
    code = edit(lab, head, "raise SystemExit", "raise  SystemExit")
    far = edit(lab, head, "RATE = 0.04", "RATE = 0.5")
    book.run(1, both, head, 1.025, "discard", gain=-0.015)
    book.run(2, code, head, None, "crash")
    book.run(2, code, head, 1.02, "discard", gain=-0.01, attempt=2)
    book.run(3, rate, head, 0.9, "confirm", gain=0.11)
    book.run(3, rate, head, 0.92, "keep", gain=0.09, kind="confirm")
    book.run(4, far, rate, None, "crash")
    book.run(5, far, head, 1.2, "discard", gain=-0.28)
    book.run(3, rate, head, 0.94, kind="champion")
    lab.git("update-ref", "refs/heads/autoresearch/lab", rate)
    before = fingerprints(lab.top)

    said = status(lab, "--autoresearch-tag=lab")

    rows, near, noise = said.pop("rows"), said.pop("near_misses"), said.pop("noise")
    assert said == {
        "tag": "lab",
        "branch": "autoresearch/lab",
        "metric": "val_bpb",
        "direction": "min",
        "running": None,
        "champion": {
            "number": 3,
            "commit": rate,
            "description": "idea 3",
            "kept_commit": rate,
            "scores": [0.92, 0.94],
            "mean": pytest.approx(0.93),
            "tainted": False,
        },
        "counts": {
            "imported": 0,
            "runs": 10,
            "baselines": 2,
            "experiments": 5,
            "keep": 1,
            "discard": 3,
            "crash": 1,
        },
        "tried": {
            "RATE": [
                {"number": 1, "from": 0.04, "to": 0.08, "gain": -0.015, "outcome": "discard"},
                {"number": 3, "from": 0.04, "to": 0.02, "gain": 0.09, "outcome": "keep"},
                {"number": 4, "from": 0.02, "to": 0.5, "gain": None, "outcome": "crash"},
                {"number": 5, "from": 0.04, "to": 0.5, "gain": -0.28, "outcome": "discard"},
            ],
            "WIDTH": [{"number": 1, "from": 64, "to": 128, "gain": -0.015, "outcome": "discard"}],
        },
    }
    assert noise == {"sigma": pytest.approx(0.02 / 2**0.5), "freedom": 2}
    assert [(row["number"], row["status"], row["score"]) for row in rows] == [
        (0, "keep", 1.0),
        (0, "keep", 1.02),
        (1, "discard", 1.025),
        (2, "discard", 1.02),
        (3, "keep", 0.92),
        (4, "crash", None),
        (5, "discard", 1.2),
    ]
    known = {"description": "idea 2", "commit": code, "ref": "refs/autoresearch/lab/0002-2"}
    assert near[0] == {"number": 2, **known, "score": 1.02, "gain": -0.01, "sigma": 0.01}
    assert [one["number"] for one in near] == [2, 1]
    assert fingerprints(lab.top) == before


def test_only_the_last_rows_are_shown(lab: Lab) -> None:
    head = lab.git("rev-parse", "HEAD")
    book = Book(lab)
    for number in range(1, 31):
        book.run(number, "f" * 40, head, 1.0, "discard", gain=-0.001 * number)  # a commit that git has not
    said = status(lab)
    assert [row["number"] for row in said["rows"]] == list(range(11, 31))
    assert [one["number"] for one in said["near_misses"]] == list(range(1, 21))
    assert (said["champion"], said["tried"], said["tag"]) == (None, {}, "lab")


def test_after_a_real_night_without_torch_and_optuna(lab: Lab) -> None:
    lab.plan(("lower rate", "RATE = 0.04", "RATE = 0.03"), ("break", 'MODE = "ok"', 'MODE = "crash"'))
    assert lab.loop("--autoresearch-rule=strict", experiments=2).code == 1
    for name in ("torch", "optuna"):
        lab.write(f"{name}.py", "raise SystemExit('imported')\n")
    said = status(lab)
    head = lab.git("rev-parse", "autoresearch/lab")
    assert (said["champion"]["number"], said["champion"]["kept_commit"]) == (1, head)
    assert {name: [one["to"] for one in tries] for name, tries in said["tried"].items()} == {"RATE": [0.03]}
    assert (said["counts"]["keep"], said["counts"]["crash"]) == (1, 1)
    assert "crash" in [row["status"] for row in said["rows"]]


def test_beside_a_running_loop(tmp_path: Path) -> None:
    lab = Lab.build(tmp_path / "project")
    lab.plan(("hang", 'MODE = "ok"', 'MODE = "hang"'))
    process = lab.start("--autoresearch-loop", "--autoresearch-tag=lab", "--autoresearch-max=1")
    processes = lab.hanging(process)
    before = fingerprints(lab.top)
    said = status(lab)
    assert said["running"] == process.pid
    assert said["champion"]["number"] == said["counts"]["experiments"] == 0
    assert fingerprints(lab.top) == before
    interrupt(process)
    process.communicate()
    assert survivors(processes) == []
    assert status(lab)["running"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is no research in {root} yet: pytest --autoresearch-loop begins it"),
        (["--autoresearch-tag=x"], "there is no research of tag 'x' (there is: nothing) in {root} yet: pytest --auto"),
    ],
)
def test_nothing_there_is_one_line(lab: Lab, args: list[str], message: str) -> None:
    before = fingerprints(lab.top)
    night = lab.pytest("--autoresearch-status", *args)
    assert night.code == 4
    assert night.error.startswith("ERROR: " + message.format(root=lab.root))
    assert fingerprints(lab.top) == before


def test_the_tag_is_the_branchs_else_the_latest(lab: Lab) -> None:
    for tag in ("new", "lab", "old"):
        Ledger.open(lab.top / f".git/autoresearch/{tag}/ledger.jsonl")
    for age, tag in enumerate(("new", "lab", "old")):
        os.utime(lab.top / f".git/autoresearch/{tag}/ledger.jsonl", (2_000_000_000 - age,) * 2)
    assert status(lab)["tag"] == "new"
    lab.git("switch", "-q", "-c", "autoresearch/lab")
    assert status(lab)["tag"] == "lab"
    assert status(lab, "--autoresearch-tag=old")["tag"] == "old"


def test_a_damaged_ledger_is_one_line(lab: Lab) -> None:
    book = Book(lab)
    book.run(0, "f" * 40, "f" * 40, 1.0, kind="baseline")
    path = book.ledger.path
    path.write_bytes(path.read_bytes().replace(b'"score": 1.0', b'"score": 2.0'))
    night = lab.pytest("--autoresearch-status")
    assert night.code == 4
    assert "is damaged (line 2 was changed): restore it" in night.error


def test_an_imported_table_begins_the_history(lab: Lab) -> None:
    old = lab.write("old results.tsv", OLD)
    lab.plan(("lower rate", "RATE = 0.04", "RATE = 0.03"), ("higher rate", "RATE = 0.03", "RATE = 0.05"))
    for _ in range(2):  # the second imports nothing and keeps nothing
        night = lab.loop("--autoresearch-rule=strict", f"--autoresearch-import={old}")
    assert night.code == 0, night.out
    assert lab.results.startswith(OLD)
    assert lab.results.endswith("\tkeep\tlower rate")
    said = status(lab)
    assert (said["counts"]["imported"], said["champion"]["number"]) == (2, 1)
    assert said["rows"][1]["description"] == "double model width (OOM)"


def test_a_bad_row_is_one_line(lab: Lab) -> None:
    old = lab.write("old.tsv", OLD.replace("keep", "kept"))
    night = lab.loop(f"--autoresearch-import={old}")
    assert night.code == 4
    assert night.error.startswith(f"ERROR: {old}, line 2: 'kept' is none of the statuses keep, discard, crash")
