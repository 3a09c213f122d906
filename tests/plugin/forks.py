"""Nights of research in a fraction of a second, killed where a test says: a warmed interpreter forks once for each.

A fork (forked.py) runs pytest with the plugin in a real repository with real git. Three things in it are not real: the
clock stands still and the ledger's secret is known, so that an interrupted night can be compared to the last byte with
an uninterrupted one; and the runner is a function that computes the score from constants in the candidate.

A fork counts its steps: everything that changes a file below the repository, git commands included. Told to be killed
at step n, it sends itself SIGKILL before that step, so n = 0, 1, 2, ... are all states that a kill can leave.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
STATE = ".git/autoresearch/lab"  # of tag `lab`
LOOP = ("--autoresearch-loop", "--autoresearch-tag=lab")


def train(score: float = 1.0, *, mode: str = "ok", noise: float = 0.001, more: str = "") -> str:
    """Return a train.py that the fake runner scores near `score`: at most `noise` away, by the run's seed.

    On the machine called "fast" it is half of that. `mode` says what else happens: "busy" is the machine's fault, "busy
    at first" of the first run only, "elsewhere" a run on another machine; anything but "ok" is a crash of that name.
    """
    return f'SCORE = {score!r}\nNOISE = {noise!r}\nMODE = "{mode}"\n{more}'


@dataclass(frozen=True, kw_only=True)
class Idea:
    """What the fake proposer makes of the champion."""

    description: str
    text: str  # of the whole train.py


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a fork ended."""

    code: int  # 1 at the end of the ideas, another of pytest's exit codes, or -9
    steps: tuple[str, ...]  # that it did, in words
    out: str

    @property
    def killed(self) -> bool:
        """Return whether it was killed."""
        return self.code == -signal.SIGKILL


@dataclass
class Nights:
    """The warmed interpreter; a context manager. Start nights in it one after another."""

    home: Path  # scratch, and HOME for git
    _server: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_", "GIT_"))}
        env |= {"HOME": str(self.home), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "GIT_CONFIG_NOSYSTEM": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.plugin.forked"],
            cwd=ROOT,
            env={**env, "COLUMNS": "140"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None and self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def run(
        self,
        top: Path,
        *args: str,
        ideas: Sequence[Idea] = (),
        kill: int | None = None,
        images: Path | None = None,
        after: str = "",
        plant: str = "",
        machine: str = "lab",
    ) -> Ended:
        """Run pytest in `top` until the proposer is out of `ideas` (idea n is for experiment n), or to step `kill`.

        `images` gets, for each step before which the files differ from those before the last, a copy of them, named
        by the step's number: what a kill there leaves. `after` counts steps from the first "proposal" or "run" on.
        `plant` names one of the bugs in plants.py.
        """
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        ask = {
            "top": str(top),
            "args": args,
            "ideas": [[idea.description, idea.text] for idea in ideas],
            "kill": kill,
            "images": str(images) if images else "",
            "after": after,
            "plant": plant,
            "machine": machine,
            "log": str(self.home / "log"),
            "steps": str(self.home / "steps"),
        }
        self._server.stdin.write(json.dumps(ask) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        steps = tuple((self.home / "steps").read_text().splitlines())
        return Ended(code=code, steps=steps, out=(self.home / "log").read_text(errors="replace"))


def git(top: Path, *args: str) -> str:
    """Run git and return what it says."""
    done = subprocess.run(["git", "-C", str(top), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def build(top: Path, text: str = "", *, ini: Sequence[str] = ()) -> Path:
    """Make a repository with one commit, its train.py `text`, and files of the user's in every state."""
    top.mkdir(parents=True)
    for name, content in {
        "train.py": text or train(),
        "runner.py": "raise SystemExit('never run')\n",
        "pytest.ini": "\n".join(
            ["[pytest]", "autoresearch_runner = fake", "autoresearch_immutable =", "    runner.py", *ini, ""]
        ),
        ".gitignore": "*.log\n",
        "modified.txt": "committed\n",
        "staged.txt": "committed\n",
    }.items():
        (top / name).write_text(content)
    git(top, "init", "-q", "-b", "main", "--template=")
    git(top, "config", "user.name", "Ada")
    git(top, "config", "user.email", "ada@example.org")
    git(top, "config", "gc.auto", "0")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "project")
    (top / "modified.txt").write_text("modified\n")
    (top / "staged.txt").write_text("staged\n")
    git(top, "add", "staged.txt")
    (top / "untracked.txt").write_text("untracked\n")
    (top / "ignored.log").write_text("ignored\n")
    return top


def copy(source: Path, target: Path) -> None:
    """Make `target` a copy of the repository `source`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def records(top: Path) -> list[dict[str, Any]]:
    """Return the ledger's run records."""
    path = top / STATE / "ledger.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["type"] == "run"]


def outcomes(top: Path) -> list[str]:
    """Return what became of each run, kind and outcome in one word where there is a verdict."""
    return [record["verdict"]["outcome"] if record["verdict"] else record["kind"] for record in records(top)]


def user_view(top: Path) -> dict[str, Any]:
    """Return all that is the user's: HEAD, branches of others, index, and every file outside .git and .autoresearch."""
    files = {}
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in (".git", ".autoresearch")]
        for name in names:
            path = Path(folder, name)
            what = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            files[str(path.relative_to(top))] = (stat.S_IMODE(path.lstat().st_mode), what)
    return {
        "HEAD": (top / ".git/HEAD").read_text(),
        "main": git(top, "rev-parse", "main"),
        "index": git(top, "ls-files", "--stage", "-t"),
        "files": files,
    }


def view(top: Path) -> dict[str, Any]:
    """Return everything that an interrupted night must leave as an uninterrupted one."""
    loop = top / ".autoresearch/lab"
    seen = user_view(top)
    seen["refs"] = git(top, "for-each-ref", "--format=%(refname) %(objectname)")
    seen["worktrees"] = git(top, "worktree", "list", "--porcelain")
    if loop.exists():
        seen["loop's index"] = git(loop, "ls-files", "--stage")
        seen["loop's status"] = git(loop, "status", "--porcelain", "--ignored")
        seen["loop's files"] = {path.relative_to(loop): path.read_bytes() for path in loop.rglob("*") if path.is_file()}
    state = top / ".git/autoresearch"
    seen["state"] = {
        path.relative_to(state): b"" if path.name == "loop.lock" else path.read_bytes()
        for path in state.rglob("*")
        if path.is_file()
    }
    return seen


def differences(one: Mapping[str, Any], other: Mapping[str, Any], at: str = "") -> list[str]:
    """Return one line for each thing that differs between two views."""
    lines = []
    for name in dict.fromkeys([*one, *other]):
        first, second = one.get(name), other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            lines += differences(first, second, f"{at}{name}: ")
        elif first != second:
            lines.append(f"{at}{name}: {str(first)[-300:]!r} != {str(second)[-300:]!r}")
    return lines
