"""The mode that shows what repeats: one training, many scorings, a table. It needs no git."""

import secrets
from typing import Any

import pytest

from . import nodes
from . import settings as settings_
from .lockfile import settle
from .mode import NAME, Mode
from .nodes import Crashed, Experiment
from .records import Result
from .report import terminal as report


def register(config: pytest.Config, mode: str) -> None:
    """Register the mode; raise a UsageError for what cannot work."""
    settings_.refuse_impossible(config, mode)
    settings = settings_.read(config)
    nodes.register_hooks(config)
    config.pluginmanager.register(Determinism(config, settings), NAME)


class Determinism(Mode):
    """Train the mutable file of the work tree once and score it under every condition of the runner's."""

    rows: tuple[dict[str, Any], ...] = ()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the one item."""
        path = self.settings.root / self.settings.mutable[0]
        file = nodes.ExperimentFile.from_parent(session, path=path)
        nodes.run_item(session, Experiment.from_parent(file, name="determinism", trial=self._trial))
        return True

    def _trial(self, item: Experiment) -> None:
        settings = self.settings
        with nodes.temporary_bench(settings) as (bench, files):
            settle(settings.root, bench.lock, bench.terms, settings.lock_digest)
            self.say(f"determinism: {item.path.name} is trained once and scored under each condition")
            with report.Live(self.config, item.name, bench.terms.budget_s) as live:
                answer = bench.determinism(files, seed=secrets.randbits(31), on_event=live.event)
        if isinstance(answer, Result):
            raise (
                pytest.UsageError(answer.reason) if answer.kind == "contract" else Crashed(answer.reason, answer.detail)
            )
        self.rows = tuple(answer)
        if broken := [str(row.get("condition")) for row in answer if not row["holds"]]:
            raise Crashed(f"a guarantee breaks: {', '.join(broken)}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show the table; never raise."""
        if not self.rows:
            return
        try:
            terminalreporter.section("determinism")
            writer = terminalreporter._tw
            for line in report.conditions(self.rows, writer.fullwidth, writer.hasmarkup):
                terminalreporter.write_line(line)
        except Exception as exc:
            terminalreporter.write_line(f"autoresearch: the table could not be shown: {exc!r}")
