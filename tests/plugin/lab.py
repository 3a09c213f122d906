"""A laboratory: a real git repository with a fake trainer and runner, and pytest run in it as a user runs it.

The fake train.py holds constants; the fake runner, a script that speaks the runner's protocol in about 50 ms, reads
them without importing the file and computes the score, or does what MODE says: crash, hang, print garbage, and so on.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WAIT_S = 60.0  # a bound on every wait, never a pace

TRAIN = """\
WIDTH = 64  # units
RATE = 0.04  # learning rate
WARMUP_RATIO = 0.1  # of the budget
MODE = "ok"
raise SystemExit("train.py must never be imported")
"""

RUNNER = r"""
import ast, json, os, sys, time
from pathlib import Path

request = json.loads(sys.stdin.readline())
channel = os.fdopen(int(os.environ["AUTORESEARCH_CHANNEL"]), "w", buffering=1)

def say(event, **what):
    channel.write(json.dumps({"event": event, **what}) + "\n")

FINGERPRINT = {"machine": "lab", "profile": request["profile"] or "tiny", "budget": request["budget_s"]}

def result(status, **what):
    say("result", schema=1, status=status, **what)
    sys.exit(0)

if request["profile"] not in (None, "tiny", "big"):
    result("unusable", reason=f"unknown profile {request['profile']!r}: use tiny or big")
if request["device"] not in ("auto", "cpu"):
    result("unusable", reason=f"there is no device {request['device']}")
if (Path.cwd() / "NO_DATA").exists():
    result("unusable", reason="no data for profile tiny: run `python -m oracle.prepare --profile tiny`")
with open(os.environ["LAB_REQUESTS"], "a") as requests:
    requests.write(json.dumps(request) + "\n")
if request["op"] == "check":
    promises = json.loads(os.environ.get("LAB_PROMISES", "{}"))
    result("ok", **{"budget_s": 30.0, "profile": "tiny", "fingerprint": FINGERPRINT, **promises})
source = (Path(request["candidate"]) / "train.py").read_text()
constants = {}
try:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
except SyntaxError as exc:
    result("crash", kind="contract", reason=f"train.py line {exc.lineno}: {exc.msg}", detail="Traceback: SyntaxError")
mode = constants["MODE"]
weights = Path(request["scratch"]) / "weights"
gap = (0.55 if mode == "learned" else 0.05) + request["seed"] % 1000 * 1e-6
if request["op"] == "verify":
    if mode == "cheat":
        result("crash", kind="audit", reason="it looks ahead in row 3 at position 7")
    assert weights.read_text() == request["weights_sha256"]
    metrics = {"val_bpb": 0.1, "heldout_bpb": request["score"] + gap, "audit_rows": 512}
    result("ok", metrics=metrics, trust="split", fingerprint=FINGERPRINT)
if request["op"] == "determinism":
    if mode == "crash":
        result("crash", kind="error", reason="ValueError: too wide")
    row = {"condition": "a fresh process", "value": (1.5).hex(), "difference": 0.0, "guarantee": "bit-equal"}
    result("ok", table=[{**row, "holds": True}, {**row, "condition": "one thread", "holds": mode != "broken"}])
print("training", mode, flush=True)
say("phase", phase="start")
say("phase", phase="train")
say("progress", elapsed_s=15.0, budget_s=30.0, step=7, loss=3.25, tokens_per_s=12345.0)
if mode == "crash":
    result("crash", kind="error", reason="ValueError: too wide", detail="Traceback (most recent call last): too wide")
spoilt = Path(os.environ["LAB_REQUESTS"] + ".spoilt")
if mode == "flaky" and not spoilt.exists():  # the machine's fault: only once
    spoilt.touch()
    os._exit(9)
if mode == "exit":
    print("KeyError: 'lost'", flush=True)
    sys.exit(3)
if mode == "garbage":
    channel.write("no json\n" + "x" * 2_000_000 + "\n[1]\n{\"event\": 5}\n")
if mode == "two":
    say("result", schema=1, status="ok", metrics={"val_bpb": 0.1}, memory_gb=1.0, fingerprint=FINGERPRINT)
if mode == "loud":
    sys.stdout.write("y" * 30_000_000 + "\n")
    print("the end is near", flush=True)
    sys.exit(1)
if mode == "hang":
    import subprocess
    escapee = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(os.environ["LAB_PIDS"]).write_text(f"{os.getpid()} {escapee.pid}\n")
    time.sleep(600)
if mode == "meddle":
    Path(os.environ["LAB_MEDDLE"]).write_text("changed by the candidate\n")
if mode == "undo":
    path = Path(os.environ["LAB_MEDDLE"])
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.write_text("changed for a moment\n")
    path.write_bytes(before[0])
    os.utime(path, ns=(before[1], before[1]))
say("phase", phase="score")
noise = request["seed"] % 1000 * 1e-7 if "NOISE" in constants else 0.0
score = {"nan": float("nan"), "zero": 0.0, "negative": -1.0, "text": "1.0", "cheat": 0.9, "learned": 0.9}.get(mode)
if score is None:
    score = 1.0 + abs(constants["RATE"] - 0.02) + abs(constants["WIDTH"] - 128) / 1000 + noise
weights.write_text(f"weights {request['seed']}")
metrics = {"val_bpb": score, "num_steps": 7, "depth": 2}
if request["heldout"]:
    metrics["heldout_bpb"] = score + gap
result("ok", metrics=metrics, memory_gb=constants.get("MEMORY", 0.5), weights_sha256=weights.read_text(),
       trust="inproc" if mode == "careless" else "split", fingerprint=FINGERPRINT)
"""

PROPOSE = """\
# proposes the edits of the file named by LAB_PLAN, one a line: description <tab> old <tab> new
import os
from pathlib import Path

def pytest_autoresearch_propose(settings, workdir, history, number, seed, refused):
    plan = Path(os.environ["LAB_PLAN"]).read_text().splitlines()
    at = number - 1 + len(refused)
    if at >= len(plan):
        return None
    description, old, new = plan[at].split("\\t")
    path = workdir / "train.py"
    assert old in path.read_text(), (old, path.read_text())
    path.write_text(path.read_text().replace(old, new))
    return description
"""


@dataclass(frozen=True, kw_only=True)
class Night:
    """What one call of pytest left."""

    code: int
    out: str

    @property
    def error(self) -> str:
        """Return the one ERROR line."""
        lines = [line for line in self.out.splitlines() if line.startswith("ERROR: ")]
        assert len(lines) == 1, self.out
        return lines[0]


@dataclass(kw_only=True)
class Lab:
    """A project in its own git repository."""

    top: Path
    folder: str = ""  # of the project below `top`
    env: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Return pytest's rootdir."""
        return self.top / self.folder

    @classmethod
    def build(cls, top: Path, *, folder: str = "", train: str = TRAIN, ini: Sequence[str] = ()) -> "Lab":
        """Make the repository with one commit."""
        lab = cls(top=top, folder=folder)
        lab.root.mkdir(parents=True)
        home = top.parent / f"{top.name} home"
        home.mkdir()
        lab.env = {
            "HOME": str(home),
            "LAB_PIDS": str(home / "pids"),
            "LAB_PLAN": str(home / "plan"),
            "LAB_REQUESTS": str(home / "requests"),
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        lab.write("train.py", train)
        lab.write("runner.py", RUNNER)
        runner = ["autoresearch_runner = {python} -I -S runner.py", "autoresearch_immutable =", "    runner.py"]
        lab.write("pytest.ini", "\n".join(["[pytest]", *runner, *ini]) + "\n")
        lab.git("init", "-q", "-b", "main", str(top))
        lab.git("config", "user.name", "Ada")
        lab.git("config", "user.email", "ada@example.org")
        lab.commit("project")
        return lab

    def write(self, name: str, text: str) -> Path:
        """Write a file of the project."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def read(self, name: str) -> str:
        """Read a file of the project."""
        return (self.root / name).read_text()

    def plan(self, *edits: tuple[str, str, str]) -> None:
        """Let a conftest.py propose these edits (description, old, new) in turn."""
        if not (self.root / "conftest.py").exists():
            self.write("conftest.py", PROPOSE)
            self.commit("plan")
        Path(self.env["LAB_PLAN"]).write_text("".join("\t".join(edit) + "\n" for edit in edits))

    def git(self, *args: str) -> str:
        """Run git in the project and return what it says."""
        env = {**os.environ, **self.env}
        done = subprocess.run(["git", *args], cwd=self.root, env=env, capture_output=True, text=True, check=True)
        return done.stdout.rstrip("\n")

    def commit(self, message: str) -> None:
        """Commit everything."""
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def command(self, *args: str) -> tuple[list[str], dict[str, str]]:
        """Return the command line and environment of a pytest call."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        env |= {"COLUMNS": "140", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **self.env}  # only what a test asks for
        plugins = ["-p", "pytest_autoresearch.plugin", "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", *plugins, *args], env

    def pytest(self, *args: str, env: Mapping[str, str] | None = None) -> Night:
        """Run pytest in the project to its end."""
        command, environment = self.command(*args)
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**environment, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        return Night(code=done.returncode, out=done.stdout)

    def loop(self, *args: str, experiments: int = 1) -> Night:
        """Run the loop with tag `lab`."""
        return self.pytest("--autoresearch-loop", "--autoresearch-tag=lab", f"--autoresearch-max={experiments}", *args)

    def start(self, *args: str) -> "subprocess.Popen[str]":
        """Start pytest; the caller ends it."""
        command, env = self.command(*args)
        return subprocess.Popen(
            command, cwd=self.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def hanging(self, process: "subprocess.Popen[str]") -> list[psutil.Process]:
        """Wait for a run in MODE hang and return everything below pytest, its escapee included."""
        path = Path(self.env["LAB_PIDS"])
        until(process, lambda: path.exists() and path.read_text().endswith("\n"))
        named = [psutil.Process(int(pid)) for pid in path.read_text().split()]
        return list({*named, *psutil.Process(process.pid).children(recursive=True)})

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Return the ledger's run records."""
        path = self.top / ".git/autoresearch/lab/ledger.jsonl"
        if not path.exists():
            return []
        return [record for record in map(json.loads, path.read_text().splitlines()) if record["type"] == "run"]

    def promise(self, **given: Any) -> None:
        """Let the runner's check say this too."""
        self.env["LAB_PROMISES"] = json.dumps(given)

    def requests(self, op: str) -> list[dict[str, Any]]:
        """Return what the runner was asked to do."""
        lines = Path(self.env["LAB_REQUESTS"]).read_text().splitlines()
        return [request for request in map(json.loads, lines) if request["op"] == op]

    @property
    def folders(self) -> set[str]:
        """Return what is left in the run directories."""
        return {path.name for path in self.top.glob(".git/autoresearch/lab/runs/*/*")}

    @property
    def verdicts(self) -> list[str]:
        """Return the outcome of every run that is no baseline."""
        return [record["verdict"]["outcome"] for record in self.runs if record["verdict"]]

    @property
    def results(self) -> str:
        """Return results.tsv as the branch's head has it."""
        return self.git("show", "autoresearch/lab:./results.tsv")

    def properties(self, junit: str) -> dict[str, dict[str, str]]:
        """Return the junit properties of each test case."""
        cases = ET.parse(self.root / junit).getroot().iter("testcase")
        return {
            str(case.get("name")): {str(p.get("name")): str(p.get("value")) for p in case.iter("property")}
            for case in cases
        }


def until(process: "subprocess.Popen[str]", ready: Any) -> None:
    """Wait until `ready()`; fail when the process ends first or the bound passes."""
    while not ready():
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            assert time.time() - psutil.Process(process.pid).create_time() < WAIT_S, "nothing happened"
            continue
        assert process.stdout is not None
        raise AssertionError(f"pytest ended with {process.returncode}: {process.stdout.read()}")


def alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that is dead but not yet reaped by init does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def survivors(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return which processes still run after a bounded wait."""
    deadline = time.monotonic() + WAIT_S
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.02)
    return left


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Send what Ctrl-C sends to pytest."""
    process.send_signal(signal.SIGINT)


def counts(out: str) -> dict[str, int]:
    """Return the numbers of pytest's last line."""
    return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", out.splitlines()[-1])}
