"""Running the judge as its own process, the way the plugin does, on a small corpus made for the tests.

Most of a short run is importing torch, once for each of four processes. The judges of the tests are forked from one
process that has imported it, so that this costs a test nothing; their trainers and scorers start as ever.
"""

import atexit
import functools
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A judge that starts scorers only when there is something to score, and hopes for the best for a shorter time
JUDGE = """
from oracle import _processes, _wire, judge
judge.EARLY_SCORERS = 0
_processes.GOODBYE_S, _wire.SEND_S = 5.0, 2.0
judge.main()
"""
ROWS = 64
# The same on the first rows of val only, which is an eighth
FEW_ROWS = f"""
from oracle.prepared import Prepared
every_row = Prepared.val_rows
Prepared.val_rows = lambda self, split="val": every_row(self, split)[:{ROWS}]
{JUDGE}
"""
# Forks a process for each order that comes with descriptors for stdin, output and channel. It ends with its parent.
WARM = """
import json, os, signal, socket, sys, traceback
import oracle.judge, oracle.audit, oracle.determinism, oracle.report, oracle.scoring
control = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    order, fds, _, _ = socket.recv_fds(control, 1_000_000, 3)
    if not order:
        break
    if os.fork() == 0:
        control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd, number in zip(fds, (0, 1)):
            os.dup2(fd, number)
        os.dup2(1, 2)
        order = json.loads(order)
        os.environ.clear()
        os.environ.update(order["env"], AUTORESEARCH_CHANNEL=str(fds[2]))
        os.chdir(order["cwd"])
        done = os.dup(fds[2])
        try:
            exec(order["code"], {})
            os.write(done, b'{"event": "done"}\\n')
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    for fd in fds:
        os.close(fd)
"""


@functools.cache
def warm() -> socket.socket:
    """Return the one connection to a process that has imported what a judge imports."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "100000"}  # as the judge sets it
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WARM, str(theirs.fileno())], env=env, pass_fds=[theirs.fileno()]
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def write_corpus(folder: Path, documents: int = 6_000, words: int = 60) -> None:
    """Write documents of made-up words with enough structure that a model can learn something."""
    chance = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    lexicon = ["".join(chance.choices(letters, range(26, 0, -1), k=chance.randint(2, 9))) for _ in range(4_000)]
    weights = [1 / (rank + 5) for rank in range(len(lexicon))]
    for part in range(documents // 500):
        directory = folder / f"part{part}"
        directory.mkdir(parents=True)
        for number in range(500):
            text = " ".join(chance.choices(lexicon, weights, k=words))
            (directory / f"{number}.txt").write_text(f"{part}.{number} {text}.\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one run of the judge left behind."""

    result: dict[str, Any]
    events: list[dict[str, Any]]
    log: str
    scratch: Path


def judge(
    directory: Path,
    cache: Path,
    source: str = "",
    *,
    code: str = JUDGE,
    cold: bool = False,
    root: Path = ROOT,
    **request: Any,
) -> Judged:
    """Judge `source` as train.py below `directory`: by `code` in a warm judge, or by a `cold` one out of `root`."""
    candidate, scratch = directory / "candidate", directory / "scratch"
    candidate.mkdir(parents=True, exist_ok=True)  # verify follows a run in the same place
    scratch.mkdir(exist_ok=True)
    (candidate / "train.py").write_text(source)
    order = {
        "schema": 1,
        "op": "run",
        "candidate": str(candidate),
        "scratch": str(scratch),
        "profile": "tiny",
        "budget_s": 0.5,
        "seed": 7,
        **request,
    }
    reading, writing = os.pipe()
    env = {**os.environ, "PYTHONPATH": str(root), "AUTORESEARCH_CACHE": str(cache)}
    (directory / "request").write_text(json.dumps(order))
    with open(reading, encoding="utf-8") as channel:
        with (directory / "run.log").open("wb") as log, (directory / "request").open("rb") as stdin:
            if cold:
                env["AUTORESEARCH_CHANNEL"] = str(writing)
                command = [sys.executable, "-P", "-m", "oracle.judge"]
                process = subprocess.Popen(
                    command, stdin=stdin, stdout=log, stderr=log, pass_fds=[writing], env=env, cwd=directory
                )
            else:
                task = json.dumps({"code": code, "env": env, "cwd": str(directory)}).encode()
                socket.send_fds(warm(), [task], [stdin.fileno(), log.fileno(), writing])
        os.close(writing)
        events = [json.loads(line) for line in channel]
    text = (directory / "run.log").read_text(errors="replace")
    if cold:
        assert process.wait() == 0, text
    else:
        assert events and events.pop() == {"event": "done"}, text
    *events, result = events
    assert result.pop("event") == "result"
    return Judged(result=result, events=events, log=text, scratch=scratch)
