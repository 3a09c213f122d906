"""`--autoresearch-laws`: every locked law holds, whatever checkout, home and environment would make of a pytest run.

1. The checkout's immutable files must be those of oracle.lock. They are written to a temporary folder: nothing else of
   the checkout is there.
2. A process of its own runs `tests/laws` in that copy: no configuration, no conftest.py above the laws, no plugin but
   Hypothesis's, a new home, and of the environment no more than KEPT.
3. `_laws`, a plugin in that process, tells how each case ends. What is skipped, expected to fail, deselected or not
   collected has failed; so has a law of which another number of cases passed than oracle.lock has.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from . import supervise
from .lock import LockError, Snapshot
from .lockfile import FILE, MEND, Lock
from .settings import immutable_patterns

LAWS = "tests/laws"
CASE_TIMEOUT_S = 1_800.0  # of one case; HYPOTHESIS_PROFILE=hunt makes them long
PROGRESS_S = 10.0  # between two lines where there is no terminal
SHOWN = 50  # lines of what is wrong
PHASES = {"setup", "call", "teardown"}
KEPT = {"CI", "HYPOTHESIS_PROFILE", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SYSTEMROOT", "TZ", "USER"}  # and LC_*
KEPT |= {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}


@dataclass(kw_only=True)
class Seen:
    """What the process of the laws said of them."""

    cases: set[str] = field(default_factory=set)  # node ids
    passed: dict[str, set[str]] = field(default_factory=dict)  # node id -> phases
    wrong: dict[str, str] = field(default_factory=dict)  # node id -> how, and why

    def event(self, event: Mapping[str, Any]) -> None:
        """Note one event."""
        name, case = str(event.get("event")), str(event.get("id"))
        if name in ("case", "passed"):
            self.cases.add(case)
        if name == "passed":
            self.passed.setdefault(case, set()).add(str(event.get("when")))
        if name == "wrong":
            why = str(event.get("why") or "")
            self.wrong.setdefault(case, f"{event.get('how')}: {case}" + (f": {why}" if why else ""))

    def whole(self) -> list[str]:
        """Return the cases that passed from setup to teardown, and nothing else was said of."""
        return [case for case, phases in self.passed.items() if phases >= PHASES and case not in self.wrong]

    def problems(self, laws: Mapping[str, int]) -> list[str]:
        """Return one line for each thing that is not as `laws`, {law: number of cases}, wants it."""
        lines = [self.wrong[case] for case in sorted(self.wrong)]
        found, held = Counter(map(law_of, self.cases)), Counter(map(law_of, self.whole()))
        failed = Counter(map(law_of, self.wrong))
        for law in sorted(laws.keys() | found.keys()):
            if law not in laws:
                lines.append(f"not in {FILE}: {law}")
            elif not found[law] and not failed[law]:
                lines.append(f"not collected: {law}")
            elif found[law] != laws[law] and not failed[law]:
                lines.append(f"{found[law]} cases and not {laws[law]}: {law}")
            elif held[law] != laws[law] and not failed[law]:
                lines.append(f"not run: {laws[law] - held[law]} of {laws[law]} cases of {law}")
        return lines


def law_of(case: str) -> str:
    """Return a case's law: its node id without parameters."""
    path, colons, name = case.partition("::")
    return path + colons + name.partition("[")[0]


def collect(root: Path, patterns: Sequence[str]) -> dict[str, int]:
    """Return {law: number of cases} of the laws under `root`; raise a UsageError where one cannot be collected."""
    snapshot, seen = Snapshot.take(root, patterns), Seen()
    if not any(name.startswith(f"{LAWS}/") for name in snapshot.entries):
        return {}
    outcome, log = _run(snapshot, ["--collect-only", "-q"], seen.event)
    ending = _ending(outcome)
    if seen.wrong or (ending and _status(outcome) != pytest.ExitCode.NO_TESTS_COLLECTED):
        why = "; ".join(seen.wrong[case] for case in sorted(seen.wrong)) or f"{ending}: {log.rpartition(chr(10))[2]}"
        raise pytest.UsageError(f"the laws below {LAWS} cannot be locked: {why}")
    return dict(sorted(Counter(map(law_of, seen.cases)).items()))


def main(config: pytest.Config) -> int:
    """Run the locked laws; return 0 where every one holds, 1 where not, 2 on Ctrl-C."""
    root = config.rootpath
    try:
        lock = Lock.read(root)
        if lock is None:
            raise pytest.UsageError(f"there is no {FILE} in {root}: make it with `pytest --autoresearch-lock=update`")
        given = config.getini("autoresearch_immutable")
        if config.inipath is not None and not config.inipath.is_relative_to(root):
            given = [*lock.files, LAWS]  # as in CI, with `-c /dev/null`: the project's own configuration was not read
        snapshot = Snapshot.take(root, immutable_patterns(given))
        lines = lock.file_differences(snapshot.entries)
    except LockError as error:
        raise pytest.UsageError(str(error)) from None
    if lines:
        return _report(lines, f"{FILE} does not hold and no law was run: {MEND}")
    if not lock.laws:
        raise pytest.UsageError(
            f"{FILE} in {root} lists no law: write one below {LAWS}, then run `pytest --autoresearch-lock=update`"
        )
    total, profile = sum(lock.laws.values()), os.environ.get("HYPOTHESIS_PROFILE")
    said = f"running {len(lock.laws)} laws in {total} cases, from a copy of what {FILE} locks in {root}"
    print(f"{said}, with HYPOTHESIS_PROFILE={profile}" if profile else said, flush=True)
    progress = Progress(total)
    try:
        outcome, log = _run(snapshot, _handed_on(config), progress.event)
    except KeyboardInterrupt:
        progress.clear()
        print(f"interrupted after {progress.done} of {total} cases")
        return 2
    progress.clear()
    lines, ending = progress.seen.problems(lock.laws), _ending(outcome)
    if ending and (_status(outcome) != pytest.ExitCode.TESTS_FAILED or not lines):
        lines.insert(0, ending if progress.running is None else f"{ending}, in {progress.running}")
    if lines:
        print(log)
        return _report(lines, f"the laws do not hold: {len(progress.seen.whole())} of {total} cases passed")
    print(f"all laws hold: {total} cases in {outcome.elapsed_s:.0f} s; {FILE} has digest {lock.digest}")
    return 0


def _report(lines: Sequence[str], summary: str) -> int:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    for line in [*lines[:SHOWN], *more, summary]:
        print(line)
    return 1


def _handed_on(config: pytest.Config) -> list[str]:
    """Return the options that the process of the laws gets too: where to report, and how many processes to use."""
    given, options = config.known_args_namespace, []
    for name, option in {"xmlpath": ["--junitxml"], "report_log": ["-p", "pytest_reportlog", "--report-log"]}.items():
        if path := getattr(given, name, None):
            path = config.invocation_params.dir / os.path.expanduser(os.path.expandvars(path))
            options += [*option[:-1], f"{option[-1]}={path}"]
    if processes := getattr(given, "numprocesses", None):
        options += ["-p", "xdist", f"-n{processes}"]
    return options


def _run(
    snapshot: Snapshot, options: Sequence[str], on_event: Callable[[dict[str, Any]], None]
) -> tuple[supervise.Outcome, str]:
    """Run pytest on the laws of a snapshot; return how it ended and the end of what it printed."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-laws-") as made:
        place = Path(made).resolve()
        copy, home, ini, log = place / "locked", place / "home", place / "laws.ini", place / "laws.log"
        try:
            snapshot.write(copy)
            home.mkdir()
            ini.write_text("[pytest]\n")
        except OSError as error:
            raise pytest.UsageError(f"cannot copy the locked files to {place}: {error.strerror}") from error
        plugins = ["pytest_autoresearch._laws", "no:cacheprovider"]
        if importlib.util.find_spec("_hypothesis_pytestplugin"):
            plugins.append("_hypothesis_pytestplugin")
        command = [sys.executable, "-P", "-s", "-m", "pytest", *(word for name in plugins for word in ("-p", name))]
        where = [f"-c{ini}", f"--rootdir={copy}", f"--confcutdir={copy / LAWS}"]
        outcome = supervise.run(
            [*command, *where, "--color=no", "--continue-on-collection-errors", *options, LAWS],
            cwd=copy,
            env=_environment(copy, home),
            stdin=b"",
            log=log,
            timeout_s=CASE_TIMEOUT_S,
            on_event=on_event,
        )
        return outcome, supervise.tail(log, lines=200, limit=20_000)


def _environment(copy: Path, home: Path) -> dict[str, str]:
    """Return what the laws see of the environment, with `copy` to import from and a `home` without any file."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("LC_")}
    python = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**kept, **python, "HOME": str(home), "TMPDIR": str(home), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _ending(outcome: supervise.Outcome) -> str:
    """Say how the process of the laws ended, where it did not end well; the laws' own failures end it with 1."""
    if outcome.timed_out:
        return f"nothing ended within {CASE_TIMEOUT_S:g} s"
    if len(outcome.results) != 1:
        return f"the laws' process ended (exit code {outcome.returncode}) without a result"
    if outcome.garbled:
        return "the laws' process reported what is no event"
    if outcome.returncode != 0 or _status(outcome) != 0:
        return f"the laws' process ended with exit code {outcome.returncode} (pytest said {_status(outcome)})"
    return ""


def _status(outcome: supervise.Outcome) -> object:
    """Return the exit status that pytest itself reported, once."""
    return outcome.results[0].get("exitstatus") if len(outcome.results) == 1 else None


class Progress:
    """Counts the cases while they run: a line rewritten in place on a terminal, one every few seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self.seen = Seen()
        self.done = 0
        self.running: str | None = None  # the case that is being run
        self._total = total
        self._rewrites = sys.stdout.isatty()
        self._started = self._shown = time.monotonic()

    def event(self, event: dict[str, Any]) -> None:
        """Note and show one event."""
        self.seen.event(event)
        if event["event"] == "phase":
            self.running = str(event.get("phase"))
        elif event["event"] == "done":
            self.running, self.done = None, self.done + 1
        now = time.monotonic()
        line = f"{self.done} of {self._total} cases, {now - self._started:.0f} s"
        if self._rewrites:
            shown = f"{line}  {self.running or ''}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{shown}", end="", flush=True)
        elif now - self._shown >= PROGRESS_S:
            self._shown = now
            print(line, flush=True)

    def clear(self) -> None:
        """Take the live line away."""
        if self._rewrites:
            print("\r\033[K", end="", flush=True)
