"""Proves that `supervise.run` reports what a command did and leaves no process behind, however it ends.

Needs real processes and signals; orphans that change session are followed on Linux only.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_autoresearch import _supervisor, supervise
from tests.plugin.lab import survivors, until

# Each writes the pid of the process that is hard to end, then blocks.
BLOCK = "import signal, time; [time.sleep(600) for _ in iter(int, 1)]"
REPORT = "open(os.environ['PIDS'], 'a').write(f'{child}\\n')"
TREES = {
    "child": f"import os; child = os.getpid(); {REPORT}; {BLOCK}",
    "deaf grandchild": (
        "import os, signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"child = subprocess.Popen([sys.executable, '-c', {BLOCK!r}]).pid; {REPORT}; {BLOCK}"
    ),
    "new session": (
        "import os, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {BLOCK!r}], start_new_session=True).pid; {REPORT}; {BLOCK}"
    ),
    "double fork": (
        "import os, signal\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    child = os.fork() or os.getpid(); {REPORT}\n"
        "signal.pause()"
    ),
    "left behind": (
        "import os, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {BLOCK!r}], start_new_session=True).pid; {REPORT}"
    ),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., supervise.Outcome]:
    """Return `supervise.run` of a Python program in a folder of its own."""

    def run(code: str, *, timeout_s: float = 30.0, stdin: bytes = b"", **given: Any) -> supervise.Outcome:
        return supervise.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PIDS": str(tmp_path / "pids")},
            stdin=stdin,
            log=tmp_path / "run.log",
            timeout_s=timeout_s,
            **{"on_event": lambda event: None, **given},
        )

    return run


def named(folder: Path) -> list[psutil.Process]:
    """Return the processes that a tree named and that still exist."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


@linux
@pytest.mark.parametrize("tree", TREES)
def test_deadline_ends_the_whole_tree(call: Callable[..., supervise.Outcome], tmp_path: Path, tree: str) -> None:
    outcome = call(TREES[tree], timeout_s=1.5)
    assert outcome.timed_out == (tree != "left behind")
    assert not outcome.survivors
    assert (tmp_path / "pids").read_text()
    assert named(tmp_path) == []


PARENT = """
import os, sys
from pathlib import Path
from pytest_autoresearch import supervise
supervise.run([sys.executable, "-c", os.environ["TREE"]], cwd=Path.cwd(), env=dict(os.environ), stdin=b"",
              log=Path("run.log"), timeout_s=600)
"""


@linux
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("tree", ["deaf grandchild", "double fork"])
def test_death_of_the_parent_ends_the_whole_tree(tmp_path: Path, tree: str, number: str) -> None:
    import signal

    root = Path(supervise.__file__).parents[1]
    env = {**os.environ, "PIDS": str(tmp_path / "pids"), "TREE": TREES[tree], "PYTHONPATH": str(root)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with parent:
        until(parent, lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
        below = [*psutil.Process(parent.pid).children(recursive=True), *named(tmp_path)]
        parent.send_signal(signal.Signals[number])
        assert parent.wait(60) != 0
        assert survivors(below) == []


@linux
def test_killed_supervisor_takes_everything_with_it(call: Callable[..., supervise.Outcome], tmp_path: Path) -> None:
    kill = "; import signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    outcome = call(TREES["left behind"] + kill)
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
