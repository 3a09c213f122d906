"""Proves the tuner: which literals it edits, that it edits nothing else, never repeats itself and is deterministic.

Needs git for what it reads back; no process is run but git.
"""

import ast
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_autoresearch.propose import tuner
from pytest_autoresearch.records import Policy
from pytest_autoresearch.settings import Settings

SOURCE = """\
import os
# Größe: a comment with more bytes than characters
PROFILE = "tiny"
DEPTH = {"tiny": 2, "climbmix": 8}[PROFILE]  # transformer blocks
BATCH = {"tiny": 2**4, "climbmix": 128}[PROFILE]
WIDTH = 128; HEAD_DIM = 64  # two in a line
MATRIX_LR = 0.04  # ü
WEIGHT_DECAY = 0.0
SOFTCAP = -15.0
ADAM_BETA2 = 0.95
WARMDOWN_RATIO = 0.5
SEED = 42
FLAG = True
NAME = "text"
lower = 3
def f(X=5):
    Y = 7
"""


def settings(root: Path) -> Settings:
    return Settings(
        root=root,
        metric="val_bpb",
        policy=Policy(),
        budget_s=None,
        timeout_s=None,
        mutable=("train.py",),
        immutable=(),
        runner=("judge",),
        device="auto",
        profile=None,
        branch_prefix="autoresearch",
        tag="lab",
        agent=None,
        agent_timeout_s=1.0,
        program="program.md",
        max_experiments=None,
        hours=None,
        require=None,
        adopt=None,
        history=None,
        lock_digest=None,
    )


class Notebook:
    """A repository with one file, and the history of what was tried in it."""

    def __init__(self, root: Path, source: str = SOURCE) -> None:
        self.root = root
        self.history: list[dict[str, Any]] = []
        self.git("init", "-q")
        self.git("config", "user.name", "Ada")
        self.git("config", "user.email", "ada@example.org")
        self.write(source)
        self.base = self.commit()
        self.record("baseline", self.base, 1.0, None)

    def git(self, *args: str) -> str:
        return subprocess.run(["git", *args], cwd=self.root, capture_output=True, text=True, check=True).stdout.strip()

    def write(self, source: str) -> None:
        (self.root / "train.py").write_text(source, encoding="utf-8")

    def read(self) -> str:
        return (self.root / "train.py").read_text(encoding="utf-8")

    def commit(self) -> str:
        self.git("add", "train.py")
        self.git("commit", "-q", "-m", "x")
        return self.git("rev-parse", "HEAD")

    def record(self, kind: str, commit: str, score: float, verdict: dict[str, Any] | None) -> None:
        result = {"score": score, "fingerprint": {"profile": "tiny"}}
        self.history.append({"kind": kind, "commit": commit, "parent": self.base, "result": result, "verdict": verdict})

    def propose(self, seed: int) -> str | None:
        return tuner.propose(settings(self.root), self.root, self.history, seed)

    def discard(self, gain: float) -> None:
        """Record what is in the file as a discard, and restore."""
        self.record("experiment", self.commit(), 1.0 - gain, {"outcome": "discard", "gain": gain, "sigma": 0.001})
        self.git("reset", "-q", "--hard", self.base)


@pytest.fixture
def notebook(tmp_path: Path) -> Notebook:
    return Notebook(tmp_path)


def test_finds_literals_of_the_profile_in_use() -> None:
    found = {c.key[1]: c.value for c in tuner.find({"train.py": SOURCE.encode()}, "tiny")}
    assert found == {
        "DEPTH": 2,
        "WIDTH": 128,
        "HEAD_DIM": 64,
        "MATRIX_LR": 0.04,
        "WEIGHT_DECAY": 0.0,
        "SOFTCAP": -15.0,
        "ADAM_BETA2": 0.95,
        "WARMDOWN_RATIO": 0.5,
    }
    big = {c.key[1]: c.value for c in tuner.find({"train.py": SOURCE.encode()}, "climbmix")}
    assert (big["DEPTH"], big["BATCH"]) == (8, 128)
    assert list(tuner.find({"train.py": b"DEPTH = (", "data.txt": b"DEPTH = 1"}, None)) == []


def test_edits_one_or_two_literals_and_nothing_else(notebook: Notebook) -> None:
    for seed in range(30):
        description = notebook.propose(seed)
        assert description is not None
        before, after = SOURCE.splitlines(), notebook.read().splitlines()
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert 1 <= len(changed) <= 2
        for part in description.split(", "):
            name, _, new = part.partition(" ")
            assert any(name in line and new.split(" -> ")[1] in line for _, line in changed), (description, changed)
        for old, new in changed:
            assert old.partition("#")[2] == new.partition("#")[2]
        ast.parse(notebook.read())
        notebook.write(SOURCE)


def test_same_history_and_seed_same_proposal(notebook: Notebook) -> None:
    first = notebook.propose(5), notebook.read()
    notebook.write(SOURCE)
    assert (notebook.propose(5), notebook.read()) == first


def test_never_proposes_the_same_twice_and_widens(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, "DEPTH = 2\n")
    seen = [notebook.read()]
    for seed in range(12):
        assert notebook.propose(seed) is not None
        assert notebook.read() not in seen
        seen.append(notebook.read())
        notebook.discard(-1.0)
    assert max(int(text.split()[2]) for text in seen) > 4  # beyond the plain range


def test_combines_near_misses(notebook: Notebook) -> None:
    for name, old, new, gain in [
        ("DEPTH", '"tiny": 2', '"tiny": 3', -0.0001),
        ("WIDTH", "WIDTH = 128", "WIDTH = 256", -0.0002),
        ("far", "MATRIX_LR = 0.04", "MATRIX_LR = 0.09", -0.5),
        ("far", "MATRIX_LR = 0.04", "MATRIX_LR = 0.08", -0.5),
    ]:
        notebook.write(SOURCE.replace(old, new))
        notebook.discard(gain)
        assert name
    assert notebook.propose(0) == "DEPTH 2 -> 3, WIDTH 128 -> 256"


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [
        ("WIDTH", 128, lambda v: v in (32, 64, 128, 256, 512)),
        ("DEPTH", 2, lambda v: isinstance(v, int) and 1 <= v <= 4),
        ("STEPS", 100, lambda v: isinstance(v, int) and 50 <= v <= 150),
        ("LR", 0.04, lambda v: 0.01 <= v <= 0.16),
        ("CAP", -15.0, lambda v: -60 <= v <= -3.7),
        ("WARMDOWN_RATIO", 0.5, lambda v: 0 <= v <= 1),
        ("FINAL_LR_FRAC", 0.0, lambda v: 0 <= v <= 0.5),
        ("ADAM_BETA2", 0.95, lambda v: 0.79 <= v < 0.99),
        ("WEIGHT_DECAY", 0.0, lambda v: 0 <= v <= 0.2),
    ],
)
def test_ranges(name: str, value: float, holds: Callable[[Any], bool]) -> None:
    constant = tuner.Constant(key=("train.py", name), value=value, start=0, end=0, by_profile=False)
    values = [tuner.value_at(constant, step / 10, 1.0) for step in range(-10, 11)]
    assert all(map(holds, values)), values
    assert len(set(values)) > 2
    assert tuner.value_at(constant, 0.0, 1.0) == value
    for u in (-1.0, 0.0, 1.0):
        assert tuner.value_at(constant, tuner.coordinate(constant, tuner.value_at(constant, u, 1.0)), 1.0) == (
            tuner.value_at(constant, u, 1.0)
        )
