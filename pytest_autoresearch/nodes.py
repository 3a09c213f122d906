"""An experiment as a pytest item, so that reports, junit properties and --maxfail work as for any test."""

import secrets
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .lock import LockError, Snapshot
from .records import Result, Verdict
from .settings import Settings

if TYPE_CHECKING:
    from .bench import Bench

HOOKS = "autoresearch-experiments"  # name of the registered ExperimentHooks


class Crashed(Exception):
    """A crash of the candidate: shown as its one line and the tail of its log, without a traceback of ours."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


class Experiment(pytest.Item):
    """One candidate, or one baseline, run by `trial`, which sets `verdict` and raises Crashed on a crash."""

    def __init__(self, *, trial: "Callable[[Experiment], None]", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trial = trial
        self.verdict: Verdict | None = None
        self.results: list[Result] = []  # of its runs, oldest first
        self.veto = ""  # why setup or teardown forbid a keep
        self.error: Exception | None = None  # ends the session: nothing that the candidate did
        self._started = False

    def runtest(self) -> None:
        """Run the trial; an error that is not the candidate's is kept for the protocol to raise."""
        try:
            if self._started:
                raise pytest.UsageError(
                    f"{self.nodeid} is to run again: an experiment runs once; remove the mark or plugin that repeats it"
                )
            self._started = True
            self.trial(self)
        except Crashed:
            raise
        except Exception as exc:
            self.error = exc
            raise

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return a crash's line and its detail; our own errors as pytest shows them."""
        if isinstance(excinfo.value, Crashed):
            return "\n\n".join(part for part in (str(excinfo.value), excinfo.value.detail) if part)
        if isinstance(excinfo.value, pytest.UsageError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return where the item stands."""
        return self.path, None, self.name

    def record(self, result: Result) -> None:
        """Add one run's figures to the report (junit properties)."""
        self.results.append(result)
        figures = {**result.metrics, "status": result.status, "memory_gb": result.memory_gb, "trust": result.trust}
        if result.reason:
            figures["reason"] = result.reason
        known = dict(self.user_properties)
        self.user_properties[:] = [*{**known, **figures}.items()]


class ExperimentFile(pytest.File):
    """A mutable file; collecting it yields one run of it, judged outside this process, without importing it."""

    def collect(self) -> Iterator[Experiment]:
        """Yield the file's single run."""
        register_hooks(self.config)
        yield Experiment.from_parent(self, name="run", trial=_run_once)


def run_item(session: pytest.Session, item: Experiment) -> None:
    """Run an item that was not collected, by the ordinary protocol."""
    session.items.append(item)
    session.testscollected += 1
    session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)


@contextmanager
def temporary_bench(settings: Settings) -> "Iterator[tuple[Bench, dict[str, bytes]]]":
    """Yield a bench that passed its check, in a temporary folder, and the mutable files of the work tree."""
    from .bench import Bench

    root = settings.root
    try:
        lock = Snapshot.take(root, settings.immutable)
    except LockError as exc:
        raise pytest.UsageError(str(exc)) from None
    with tempfile.TemporaryDirectory(prefix="autoresearch-") as home:
        bench = Bench(settings, lock, Path(home))
        bench.check()
        yield bench, {name: (root / name).read_bytes() for name in settings.mutable}


def _run_once(item: Experiment) -> None:
    from . import settings as settings_
    from .lockfile import settle
    from .report.terminal import Live

    settings = settings_.read(item.config)
    with temporary_bench(settings) as (bench, files), Live(item.config, item.name, bench.terms.budget_s) as live:
        settle(settings.root, bench.lock, bench.terms, settings.lock_digest)
        marks = bench.lock.marks(settings.root)
        result = bench.run(files, name="run", seed=secrets.randbits(31), on_event=live.event)
    item.record(result)
    if changed := bench.lock.touched(settings.root, marks):
        raise Crashed(f"locked files changed during the run: {', '.join(changed)}")
    if result.kind == "contract":
        raise pytest.UsageError(result.reason)
    if result.status != "ok":
        raise Crashed(result.reason, result.detail)


def register_hooks(config: pytest.Config) -> None:
    """Register what experiments need of pytest, once."""
    if not config.pluginmanager.has_plugin(HOOKS):
        config.pluginmanager.register(ExperimentHooks(), HOOKS)


class ExperimentHooks:
    """How experiments are timed, reported and counted."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item) -> bool | None:
        """Keep pytest-timeout off experiments: its way out would leave their processes behind."""
        return True if isinstance(item, Experiment) else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """End the session with the error that an experiment kept for it."""
        result = yield
        if isinstance(item, Experiment) and item.error is not None:
            raise item.error
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Report a discard as pytest reports an expected failure, and note what vetoes a keep."""
        report = yield
        if isinstance(item, Experiment):
            if report.when == "call" and item.verdict is not None and item.verdict.outcome == "discard":
                report.outcome = "skipped"
                report.wasxfail = item.verdict.reason
            elif report.when != "call" and report.failed and not item.veto:
                said = call.excinfo.exconly() if call.excinfo else report.outcome
                item.veto = f"{report.when} failed: {' '.join(said.split())}"[:300]
        return report

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """Show a discard as such."""
        if getattr(report, "when", "") == "call" and self._is_discard(report):
            return "discarded", "d", "DISCARDED"
        return None

    def _is_discard(self, report: Any) -> bool:
        return ("verdict", "discard") in report.user_properties and report.skipped

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the figures of mutable files that were run like tests."""
        for category in terminalreporter.stats.values():
            for report in category:
                if getattr(report, "when", "") == "call" and report.nodeid.endswith("::run"):
                    figures = ((str(name), value) for name, value in report.user_properties)
                    numbers = [f"{name}: {value}" for name, value in figures if isinstance(value, int | float)]
                    if numbers:
                        terminalreporter.section(report.nodeid, "-")
                        for line in numbers:
                            terminalreporter.write_line(line)
