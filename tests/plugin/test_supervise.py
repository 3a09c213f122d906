"""Proves that `supervise.run` reports what a command did and leaves no process behind, however it ends.

Needs real processes; orphans that change session are followed on Linux only. All ways to end are tried on all kinds of
trees in tests/processes/test_matrix.py.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_autoresearch import _supervisor, supervise
from tests.plugin.lab import survivors
from tests.plugin.trees import LEFT_BEHIND, environment, named

linux = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., supervise.Outcome]:
    """Return `supervise.run` of a Python program in a folder of its own."""

    def run(code: str, *, timeout_s: float = 30.0, stdin: bytes = b"", **given: Any) -> supervise.Outcome:
        return supervise.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdin=stdin,
            log=tmp_path / "run.log",
            timeout_s=timeout_s,
            **{"on_event": lambda event: None, **given},
        )

    return run


@linux
def test_what_a_command_leaves_behind_is_ended(call: Callable[..., supervise.Outcome], tmp_path: Path) -> None:
    outcome = call(LEFT_BEHIND)
    assert (outcome.timed_out, outcome.returncode, outcome.survivors) == (False, 0, ())
    assert (tmp_path / "pids").read_text() and named(tmp_path) == []


@linux
def test_killed_supervisor_takes_everything_with_it(call: Callable[..., supervise.Outcome], tmp_path: Path) -> None:
    kill = "; import signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    outcome = call(LEFT_BEHIND + kill)
    assert (outcome.returncode, outcome.timed_out, outcome.survivors) == (None, False, ())
    assert (tmp_path / "pids").read_text() and survivors(named(tmp_path)) == []


def test_events_and_exit_code(call: Callable[..., supervise.Outcome], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    lines = [{"event": "phase", "phase": "train"}, {"event": "result", "n": 1}]
    code = "import os, sys; os.write(int(os.environ['AUTORESEARCH_CHANNEL']), sys.stdin.buffer.read()); sys.exit(7)"
    stdin = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    outcome = call(code, stdin=stdin, on_event=seen.append)
    assert seen == lines
    assert (outcome.returncode, outcome.phase, outcome.results, outcome.garbled) == (7, "train", (lines[1],), 0)


def test_garbage_on_the_channel_is_counted(call: Callable[..., supervise.Outcome]) -> None:
    garbage = [b"no json", b"[1]", b'{"event": 5}', b"[" * 100_000, b"\xff\xfe", b"x" * 3_000_000, b""]
    stdin = b"\n".join([*garbage, b'{"event": "result"}', b"half a line"])
    code = """
import os, sys
data = sys.stdin.buffer.read()
while data:
    data = data[os.write(int(os.environ["AUTORESEARCH_CHANNEL"]), data):]
"""
    outcome = call(code, stdin=stdin)
    assert outcome.garbled == len(garbage)
    assert outcome.results == ({"event": "result"},)


def test_each_phase_has_the_whole_time(call: Callable[..., supervise.Outcome]) -> None:
    code = """
import os, time
for phase in ("one", "two", "three", "four"):
    os.write(int(os.environ["AUTORESEARCH_CHANNEL"]), b'{"event": "phase", "phase": "%s"}\\n' % phase.encode())
    time.sleep(0.6)
"""
    outcome = call(code, timeout_s=2.0)
    assert (outcome.timed_out, outcome.phase, outcome.returncode) == (False, "four", 0)
    assert call(code, timeout_s=2.0, on_event=None, stdin=b"").returncode == 1  # no channel: KeyError


def test_a_flood_of_events_does_not_hold_up_the_deadline(call: Callable[..., supervise.Outcome]) -> None:
    code = "import os\nwhile True: os.write(int(os.environ['AUTORESEARCH_CHANNEL']), b'{\"event\": \"x\"}\\n' * 99)"
    assert call(code, timeout_s=1.0).timed_out


def test_log_keeps_beginning_and_end_of_a_flood(call: Callable[..., supervise.Outcome], tmp_path: Path) -> None:
    call("import sys; print('first'); sys.stdout.write('x' * 50_000_000); print('\\nlast')")
    log = tmp_path / "run.log"
    assert log.stat().st_size < _supervisor.LOG_BYTES + 2 * _supervisor.TAIL_BYTES + 100
    assert log.read_bytes().startswith(b"first\n") and b"bytes of output left out" in log.read_bytes()
    assert supervise.tail(log, lines=1) == "last"


def test_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        supervise.run(
            ["no-such-program"], cwd=tmp_path, env={}, stdin=b"", log=tmp_path / "log", timeout_s=5, on_event=None
        )


def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "PYTEST_ADDOPTS", "PYTHONPATH", "PYTHONSTARTUP", "KEPT"):
        monkeypatch.setenv(name, "x")
    assert {"GIT_DIR", "PYTEST_ADDOPTS", "PYTHONPATH", "PYTHONSTARTUP", "KEPT"} & {
        *supervise.clean_environment("PYTHON")
    } == {"KEPT"}
