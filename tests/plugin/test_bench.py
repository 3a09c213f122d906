"""Proves what `Bench` makes of a runner's answer: only a whole answer is a result, what a runner owes and does not give
is the judge's failure, and a full disk is the machine's only while it is full without the candidate's files.

Needs a fake runner that does what the candidate's file says; the disks need the right to mount a small tmpfs.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_autoresearch import settings
from pytest_autoresearch.bench import Bench
from pytest_autoresearch.lock import Snapshot
from pytest_autoresearch.records import Result
from tests.shortage import small_disk

RUNNER = """
import json, os, sys
request = json.loads(sys.stdin.readline())

def say(status="ok", **what):
    answer = {"event": "result", "schema": 1, "status": status, "metrics": {"val_bpb": 1.0}, **what}
    os.write(int(os.environ["AUTORESEARCH_CHANNEL"]), json.dumps(answer).encode() + b"\\n")

def fill():
    try:
        with open(request["scratch"] + "/ballast", "wb", buffering=0) as file:
            while True: file.write(bytes(2**20))
    except OSError as error:
        return str(error)

if request["op"] == "check":
    say()
else:
    exec(open(request["candidate"] + "/train.py").read())
"""
FULL = "[Errno 28] No space left on device"


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., Result]:
    """Let the runner do `code`, in a folder of the bench's own or in `home`."""
    pytester.makepyfile(runner=RUNNER, train="")
    runner = "autoresearch_runner = {python} -I -S runner.py"
    pytester.makeini(f"[pytest]\n{runner}\nautoresearch_immutable = runner.py\n")
    chosen = settings.read(pytester.parseconfig())
    lock = Snapshot.take(chosen.root, chosen.immutable)

    def one(code: str, home: Path = pytester.path / "runs") -> Result:
        bench = Bench(chosen, lock, home)
        bench.check()
        return bench.run({"train.py": code.encode()}, name="run", seed=1)

    return one


def test_work_is_read(run: Callable[..., Result]) -> None:
    assert run("say(work=12_288)").work == 12_288.0
    assert run("say()").work == 0.0


ANSWERS = {
    "nothing": ("print('KeyError: 1'); sys.exit(3)", "judge", "the runner gave no result (exit code 3): KeyError: 1"),
    "twice": ("say(); say()", "judge", "the runner gave two results"),
    "then fails": ("say(); sys.exit(1)", "judge", "the runner gave a result and then failed (exit code 1)"),
    "a crash": ("say('crash', kind='diverged', reason='loss')", "diverged", "loss"),
    "a system out of memory": ("say('crash', kind='killed', reason='signal 9')", "killed", "signal 9"),
    "work is NaN": ("say(work=float('nan'))", "score", "work = nan is not an amount"),
    "negative work": ("say(work=-1)", "score", "work = -1 is not an amount"),
    "work is text": ("say(work='7')", "score", "work = '7' is not an amount"),
    "no room, with room": (
        f"say('crash', kind='disk', reason={FULL!r})",
        "error",
        f"the disk was full until this run's own files were removed: {FULL}",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_score_has_its_kind(run: Callable[..., Result], name: str) -> None:
    code, kind, reason = ANSWERS[name]
    result = run(code)
    assert (result.status, result.kind, result.reason) == ("crash", kind, reason)
    assert result.infrastructure == (kind in ("judge", "killed"))


def test_a_disk_that_stays_full_is_the_machines_failure(run: Callable[..., Result], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=32m") as disk:
        for code, reason in {
            "say('crash', kind='error', reason=fill())": FULL,
            "sys.exit(3)": "the runner gave no result (exit code 3)",
        }.items():
            result = run(code, disk)
            assert (result.kind, result.infrastructure) == ("disk", True)
            assert result.reason == f"less than 64 MB can be written to {disk}: {reason}"
        assert run("say()", disk).status == "ok"


def test_a_disk_that_only_the_candidate_filled_is_its_own_failure(run: Callable[..., Result], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=100m") as disk:
        assert run("say('crash', kind='error', reason=fill())", disk).kind == "error"
        assert run("say('crash', kind='disk', reason=fill())", disk).kind == "error"


def test_a_run_directory_without_room_is_no_reason_to_end_the_night(run: Callable[..., Result], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        result = run("say()" + "#" * 2**21, disk)
    assert result.kind == "disk"
    assert result.reason == f"cannot make the run directory {disk / 'run'}: No space left on device"
