"""Loaded in the process that runs the locked laws: tells its parent (laws.py) which cases there are and how each ends.

It refuses hooks that come from the pristine copy itself: a conftest.py beside the laws may hold fixtures, but nothing
that decides which laws run or how they are reported.
"""

import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import IO, Any

import pytest

from ._supervisor import CHANNEL

COPY = os.path.join(os.path.realpath(os.getcwd()), "")  # where this process was started
REASON_CHARS = 300


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Raise a UsageError for a plugin of the copy that has hooks, the moment it is registered."""
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    path = os.path.realpath(getattr(module, "__file__", None) or os.devnull)
    if path.startswith(COPY) and (hooks := manager.get_hookcallers(plugin)):
        names = ", ".join(sorted(hook.name for hook in hooks))
        raise pytest.UsageError(
            f"{path.removeprefix(COPY)} has the pytest hook {names}: the locked laws run without hooks of their own; "
            "keep fixtures there and nothing else"
        )


def pytest_configure(config: pytest.Config) -> None:
    """Take the channel from the environment, so that nothing that a law starts inherits it."""
    channel = os.environ.pop(CHANNEL, None)
    if channel is not None:  # a worker of xdist has none: its controller reports
        os.set_inheritable(int(channel), False)
        config.pluginmanager.register(_Reporter(os.fdopen(int(channel), "w", buffering=1)))


class _Reporter:
    def __init__(self, channel: IO[str]) -> None:
        self._channel = channel
        self._status: int | None = None

    def _say(self, event: str, **what: Any) -> None:
        self._channel.write(json.dumps({"event": event, **what}) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._say("case", id=item.nodeid)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            self._say("wrong", id=item.nodeid, how="deselected")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._say("wrong", id=report.nodeid, how="not collected", why=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say("phase", phase=nodeid)  # each case has the whole timeout

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail"):
            how = "xpassed" if report.passed else "xfailed"
            self._say("wrong", id=report.nodeid, how=how, why=report.wasxfail)
        elif report.passed:
            self._say("passed", id=report.nodeid, when=report.when)
        else:
            self._say("wrong", id=report.nodeid, how=report.outcome, why=_reason(report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._say("done", id=nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._status = int(exitstatus)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self._status is not None:
            self._say("result", exitstatus=self._status)
        self._channel.close()


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return why a test did not pass in one line."""
    said = report.longrepr
    if isinstance(said, tuple):  # skipped: path, line, reason
        text = str(said[2]).removeprefix("Skipped: ")
    else:
        crash = getattr(said, "reprcrash", None)
        text = crash.message if crash else _last_line(str(said or ""))
    return " ".join(text.split())[:REASON_CHARS]


def _last_line(text: str) -> str:
    lines = text.split("\n")
    marked = [line[1:] for line in lines if line.startswith("E ")]  # pytest's mark of what the error says
    return (marked or [line for line in lines if line.strip()] or [""])[-1]
