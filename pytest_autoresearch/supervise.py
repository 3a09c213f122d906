"""One process tree with a deadline and a lifeline; nothing of it survives.

1. `run` starts this file as a small supervisor, in a session of its own, and hands it the command through a pipe.
2. The supervisor adopts every orphan below it (Linux), starts the command and copies its output to a capped log.
3. The command reports on a private channel whose number is in the environment; `run` parses it and keeps the deadline.
4. The command ends, the deadline passes, Ctrl-C arrives or this process dies: the pipe closes, and the supervisor kills
   everything below itself, escaped sessions and double forks included, before it ends.
"""

import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import _supervisor
from ._supervisor import SURVIVOR_S

EVENT_BYTES = 1_000_000  # a longer line on the channel is no event
GRACE_S = 10.0  # for a command to end after it gave its result
TOKEN = "AUTORESEARCH_TREE"  # in the environment of everything that one `run` starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended and what it reported; every process that it started is gone, or listed in `survivors`."""

    returncode: int | None  # negative: the signal; None when it was ended from outside
    timed_out: bool
    phase: str  # the last that the command reported
    results: tuple[dict[str, Any], ...]
    garbled: int  # lines on the channel that were no event
    elapsed_s: float
    survivors: tuple[int, ...] = ()


def clean_environment(*prefixes: str) -> dict[str, str]:
    """Return this process's environment without the variables of git, pytest, coverage, and those with `prefixes`."""
    dropped = ("GIT_", "PYTEST_", "COV_CORE_", "COVERAGE_", "AUTORESEARCH_CHANNEL", *prefixes)
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


def tail(log: Path, lines: int = 30, limit: int = 4_000) -> str:
    """Return the last lines of a log, at most `limit` characters; empty when there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 4 * limit))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])[-limit:]


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: bytes,
    log: Path,
    timeout_s: float,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Run `command` to its end or for `timeout_s` a phase, then end everything that it started.

    Without `on_event` it gets no channel: it can report nothing and has one phase. Raises FileNotFoundError when
    there is no such program. Whatever else is raised (KeyboardInterrupt), the tree is ended first.
    """
    started, token = time.monotonic(), secrets.token_hex(16)
    spec = {
        "command": list(command),
        "cwd": str(cwd),
        "env": {**env, TOKEN: token},
        "log": str(log),
        "listen": on_event is not None,
        "stdin": stdin.decode("latin-1"),
    }
    channel, their_end = os.pipe()
    try:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", _supervisor.__file__, str(their_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[their_end],
            start_new_session=True,
        )
    except BaseException:
        os.close(channel)
        raise
    finally:
        os.close(their_end)
    lifeline, status = supervisor.stdin, supervisor.stdout
    assert lifeline is not None and status is not None
    events = _Events(on_event or (lambda event: None))
    timed_out = False
    with open(channel, "rb", buffering=0) as reports, _end_on_exit(supervisor, lifeline, status):
        with suppress(BrokenPipeError):
            lifeline.write(json.dumps(spec).encode() + b"\n")
            lifeline.flush()
        report = bytearray()
        selector = selectors.DefaultSelector()
        selector.register(reports, selectors.EVENT_READ)
        selector.register(status, selectors.EVENT_READ)
        deadline = time.monotonic() + timeout_s
        while True:
            if (left_s := deadline - time.monotonic()) <= 0:
                if lifeline.closed:
                    break  # the supervisor itself hangs: it is killed below
                timed_out = not events.results
                lifeline.close()  # the supervisor ends the tree and then itself
                deadline = time.monotonic() + 2 * SURVIVOR_S
                continue
            ready = [key.fileobj for key, _ in selector.select(left_s)]
            if reports in ready:
                data = os.read(reports.fileno(), 65_536)
                if not data:
                    selector.unregister(reports)
                for event in events.feed(data):
                    if event == "phase" and not lifeline.closed:
                        deadline = time.monotonic() + timeout_s
                    elif event == "result" and not lifeline.closed:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
            if status in ready:
                data = os.read(status.fileno(), 65_536)
                report += data
                if not data:
                    break
        os.set_blocking(reports.fileno(), False)
        with suppress(BlockingIOError):
            while data := os.read(reports.fileno(), 65_536):  # what was reported before the end
                list(events.feed(data))
    # A killed supervisor says nothing. The command died with it, but not what had escaped to a session of its own.
    said: dict[str, Any] = {"returncode": None}
    said |= json.loads(report) if report.endswith(b"\n") else {"survivors": _sweep(token)}
    if error := said.get("error"):
        raise FileNotFoundError(error)
    return Outcome(
        returncode=said["returncode"],
        timed_out=timed_out,
        phase=events.phase,
        results=tuple(events.results),
        garbled=events.garbled,
        elapsed_s=time.monotonic() - started,
        survivors=tuple(said["survivors"]),
    )


@contextmanager
def _end_on_exit(supervisor: "subprocess.Popen[bytes]", lifeline: IO[bytes], status: IO[bytes]) -> Iterator[None]:
    """Close the lifeline and wait for the supervisor, also when another Ctrl-C comes while waiting."""
    interrupted: KeyboardInterrupt | None = None
    try:
        yield
    finally:
        with suppress(OSError):
            lifeline.close()
        patience_s: float | None = 2 * SURVIVOR_S
        while supervisor.returncode is None:
            try:
                supervisor.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                patience_s = None
            except KeyboardInterrupt as exc:
                interrupted = exc
        status.close()
    if interrupted is not None:
        raise interrupted


def _sweep(token: str) -> list[int]:
    """Kill every process that carries the token of a run; return what is left."""
    import psutil

    def ours() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(TOKEN) == token:
                    found.append(process)
        return found

    deadline = time.monotonic() + SURVIVOR_S
    while left := ours():
        if time.monotonic() > deadline:
            return [process.pid for process in left]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.1)
    return []


class _Events:
    """Splits the channel into events; a line that is none is counted and dropped."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.phase = ""
        self.results: list[dict[str, Any]] = []
        self.garbled = 0
        self._on_event = on_event
        self._pending = bytearray()
        self._overlong = False

    def feed(self, data: bytes) -> Iterator[str]:
        self._pending += data
        while (end := self._pending.find(b"\n")) >= 0:
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            if self._overlong or len(line) > EVENT_BYTES:
                self._overlong = False
                self.garbled += 1
            elif name := self._event(line):
                yield name
        if len(self._pending) > EVENT_BYTES:
            self._pending.clear()
            self._overlong = True

    def _event(self, line: bytes) -> str:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        name = event.get("event") if isinstance(event, dict) else None
        if not isinstance(name, str):
            self.garbled += 1
            return ""
        if name == "phase":
            self.phase = str(event.get("phase", ""))[:40]
        elif name == "result":
            self.results.append(event)
        self._on_event(event)
        return name
