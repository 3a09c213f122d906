"""Proves the kill matrix: however a run under pytest ends, nothing of any kind of process tree survives it.

Each way to end is tried on all trees at once, each under a pytest of its own: the loop with a fake runner that turns
into the tree, or, where pytest-timeout must fire, a test that calls `supervise.run` (it never fires on experiments).
Needs Linux and git; the full disk needs the right to mount a small tmpfs.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pytest_autoresearch import _supervisor
from tests.plugin.lab import Lab, survivors, until
from tests.plugin.trees import TREES, is_up, named
from tests.shortage import small_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")

PATIENCE_S = 4  # of deadlines and timeouts: the trees must be up by then
LOG_BYTES = _supervisor.LOG_BYTES + 2 * _supervisor.TAIL_BYTES + 4_096  # and a word or two of the judge's own
RUNNER = """
import json, os, sys
request = json.loads(sys.stdin.readline())
if request["op"] == "check":
    answer = {"event": "result", "schema": 1, "status": "ok", "budget_s": 600}
    os.write(int(os.environ["AUTORESEARCH_CHANNEL"]), json.dumps(answer).encode() + b"\\n")
    sys.exit()
if os.path.exists(os.environ["RUNNER"]):
    sys.exit(3)  # what the machine spoilt runs again: once up is enough
with open(os.environ["RUNNER"], "w") as file:
    file.write(f"{os.getpid()} {os.getppid()}")
if "FILL" in os.environ:
    try:
        with open(request["scratch"] + "/ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(100_000))
    except OSError:
        pass
exec(os.environ["TREE"])
"""
TEST = """
import os, sys
from pathlib import Path
from pytest_autoresearch import supervise

def test_it():
    command = [sys.executable, "-S", "-c", os.environ["TREE"]]
    supervise.run(command, cwd=Path.cwd(), env=dict(os.environ), stdin=b"", log=Path("run.log"), timeout_s=600)
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tree under one pytest."""

    lab: Lab
    process: "subprocess.Popen[str]"

    @property
    def home(self) -> Path:
        """Return where the tree reports."""
        return Path(self.lab.env["HOME"])

    @property
    def runner(self) -> tuple[int, int]:
        """Return the process ids of the runner and of its supervisor."""
        pid, parent = (self.home / "runner").read_text().split()
        return int(pid), int(parent)


@dataclass(frozen=True, kw_only=True)
class After:
    """What was left of it."""

    code: int
    out: str
    survivors: list[psutil.Process]
    log_bytes: int
    folders: set[str]


def nothing(case: Case) -> None:
    """Wait for what is bound to happen."""


def send(number: signal.Signals, times: int = 1) -> Callable[[Case], None]:
    """Send a signal to pytest."""

    def act(case: Case) -> None:
        for _ in range(times):
            case.process.send_signal(number)

    return act


def full(case: Case) -> None:
    """Make sure that the disk is full; the deadline does the rest."""
    free = os.statvfs(case.lab.top / ".git/autoresearch/lab/runs").f_bavail
    assert free == 0, free


LOOP = ("--autoresearch-loop", "--autoresearch-tag=lab")
DEADLINE = (*LOOP, "-o", f"autoresearch_timeout_s={PATIENCE_S}")
TIMEOUT = ("test_it.py", "-p", "timeout", f"--timeout={PATIENCE_S}")
# how a run ends: arguments of pytest, what is done once the tree is up, exit code
ENDINGS: dict[str, tuple[tuple[str, ...], Callable[[Case], None], set[int]]] = {
    "deadline": (DEADLINE, nothing, {4}),
    "Ctrl-C": (LOOP, send(signal.SIGINT), {2}),
    "Ctrl-C twice": (LOOP, send(signal.SIGINT, 2), {1, 2, 3, -signal.SIGINT}),  # wherever the second one strikes
    "SIGTERM": (LOOP, send(signal.SIGTERM), {-signal.SIGTERM}),
    "SIGKILL of pytest": (LOOP, send(signal.SIGKILL), {-signal.SIGKILL}),
    "SIGKILL of the runner": (LOOP, lambda case: os.kill(case.runner[0], signal.SIGKILL), {4}),
    "SIGKILL of the supervisor": (LOOP, lambda case: os.kill(case.runner[1], signal.SIGKILL), {4}),
    "pytest-timeout, signal": ((*TIMEOUT, "--timeout-method=signal"), nothing, {1}),
    "pytest-timeout, thread": ((*TIMEOUT, "--timeout-method=thread"), nothing, {1}),
    "full disk": (DEADLINE, full, {4}),
}


@pytest.fixture(scope="module", params=ENDINGS)
def aftermath(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, After]]:
    """Start every tree, end each in the same way, and return what was left of each."""
    args, act, _ = ENDINGS[request.param]
    cases: dict[str, Case] = {}
    with ExitStack() as stack:
        for tree, code in TREES.items():
            lab = Lab.build(tmp_path_factory.mktemp("matrix") / "project")
            home = Path(lab.env["HOME"])
            lab.env |= {"PIDS": str(home / "pids"), "RUNNER": str(home / "runner"), "TREE": code}
            lab.write("runner.py", RUNNER)
            lab.write("test_it.py", TEST)
            lab.commit("matrix")
            if act is full:
                lab.env["FILL"] = "yes"
                stack.enter_context(small_disk(lab.top / ".git/autoresearch/lab/runs", "size=1m"))
            process = stack.enter_context(lab.start(*args))
            stack.callback(process.kill)
            cases[tree] = Case(lab=lab, process=process)
        watched: dict[str, list[psutil.Process]] = {}
        for tree, case in cases.items():
            until(case.process, lambda case=case: is_up(case.home))
            watched[tree] = [*psutil.Process(case.process.pid).children(recursive=True), *named(case.home)]
        for case in cases.values():
            act(case)
        left: dict[str, After] = {}
        for tree, case in cases.items():
            out, _ = case.process.communicate(timeout=60)
            left[tree] = After(
                code=case.process.returncode,
                out=out,
                survivors=survivors(watched[tree]),
                log_bytes=sum(path.stat().st_size for path in case.lab.top.rglob("run.log")),
                folders=case.lab.folders,
            )
        yield left


@pytest.mark.parametrize("tree", TREES)
def test_nothing_survives(aftermath: dict[str, After], tree: str, request: pytest.FixtureRequest) -> None:
    after, ending = aftermath[tree], request.node.callspec.params["aftermath"]
    assert after.code in ENDINGS[ending][2], after.out
    assert after.survivors == []
    assert after.log_bytes <= LOG_BYTES
    if tree == "flood" and ending != "full disk" and not ending.endswith(("runner", "supervisor")):  # those run again
        assert (
            after.log_bytes >= _supervisor.LOG_BYTES
            or "failed" in after.out
            or "SIGKILL" in after.out
            or after.code == 4
        )
    if after.code > 0 and ending != "Ctrl-C twice":  # pytest itself was there to clear up
        assert after.folders <= {"run.log"}
