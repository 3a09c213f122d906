"""A small locked project, what an adversary plants in it or around it, and `pytest --autoresearch-laws` run on it."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_autoresearch.lock import Snapshot
from pytest_autoresearch.lockfile import FILE, Lock
from pytest_autoresearch.settings import immutable_patterns
from tests.plugin.lab import WAIT_S, Night

LAW_FILE = "tests/laws/test_double.py"
LAW = """\
import pytest

from oracle.double import double


@pytest.mark.parametrize("x", [0, 3])
def test_each(x):
    assert double(x) == x + x


def test_one():
    assert double(1) == 2
"""
LAWS = {f"{LAW_FILE}::test_each": 2, f"{LAW_FILE}::test_one": 1}
ORACLE = "def double(x):\n    return x * 2\n"
BROKEN = ORACLE.replace("2", "3")  # as long, so that bytecode of the one can pass for the other's
CONFIG = '[tool.pytest.ini_options]\naddopts = "-ra"\n'
RAN = """
import sys
with open("{root}/cheated", "a") as ran:
    ran.write(" ".join(sys.orig_argv) + "\\n")
"""
CHEAT = f"{RAN}\nimport _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n"
PATTERNS = immutable_patterns([])
PYTEST = str(Path(sys.executable).with_name("pytest"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """What is done to a project after it was locked; {root} stands for its folder, {home} for the user's home."""

    files: Mapping[str, str] = field(default_factory=dict)  # path -> content
    gone: Sequence[str] = ()  # paths that are removed
    locked: bool = False  # the lock's digests are made anew after it, as by someone who may; its laws stay
    env: Mapping[str, str] = field(default_factory=dict)
    args: Sequence[str] = ()
    broken: bool = False  # the oracle is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project with two laws in three cases, locked, and then planted in."""

    root: Path
    home: Path

    @classmethod
    def build(cls, place: Path, plant: Plant) -> "Project":
        """Make it below `place`."""
        project = cls(root=place / "project", home=place / "home")
        project.home.mkdir(parents=True)
        oracle = BROKEN if plant.broken else ORACLE
        project.write({"oracle/__init__.py": "", "oracle/double.py": oracle, "train.py": "DEPTH = 4\n"})
        project.write({"pyproject.toml": CONFIG, LAW_FILE: LAW, "tests/laws/__init__.py": ""})
        project.lock()
        project.write(plant.files)
        for name in plant.gone:
            (project.root / name).unlink()
        if plant.locked:
            project.lock()
        return project

    def fill(self, text: str) -> str:
        """Put the folders in."""
        return text.replace("{root}", str(self.root)).replace("{home}", str(self.home))

    def write(self, files: Mapping[str, str]) -> None:
        """Write files of the project."""
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.fill(text).encode())

    def lock(self, laws: Mapping[str, int] = LAWS, patterns: Sequence[str] = PATTERNS) -> None:
        """Write the lock of the files as they are."""
        entries = Snapshot.take(self.root, patterns).entries
        files = {name: entry for name, entry in entries.items() if name != FILE}
        (self.root / FILE).write_text(Lock(files=files, laws=laws).text())

    def start(self, plant: Plant, command: Sequence[str] = (PYTEST,)) -> "subprocess.Popen[str]":
        """Start `pytest --autoresearch-laws`."""
        dropped = ("PYTEST_", "PYTHON", "COV", "HYPOTHESIS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        return subprocess.Popen(
            [*command, "--autoresearch-laws", *map(self.fill, plant.args)],
            cwd=self.root,
            env={**env, "HOME": str(self.home), **{name: self.fill(value) for name, value in plant.env.items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def cheated(self) -> str:
        """Return the command lines of the processes that a cheat ran in."""
        path = self.root / "cheated"
        return path.read_text() if path.exists() else ""


def ended(process: "subprocess.Popen[str]") -> Night:
    """Wait for pytest's end."""
    out, _ = process.communicate(timeout=WAIT_S)
    return Night(code=process.returncode, out=out)
