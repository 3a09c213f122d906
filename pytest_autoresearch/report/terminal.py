"""The terminal: a live line for the run in progress, one line per experiment, and the closing table."""

import io
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pytest

from .. import heldout
from ..ledger import one_line, status_of
from ..records import Candidate, Result, Verdict

if TYPE_CHECKING:
    from rich.table import Table

MARKS = (0.25, 0.5, 0.75)  # of the budget: where a terminal that cannot rewrite its line gets a new one
REWRITE_S = 0.2  # at most one rewrite in this time
PHASES = {
    "start": "starting",
    "train": "training",
    "score": "scoring",
    "audit": "auditing",
    "verify": "verifying what is to be kept",
}


class Live:
    """Shows the run in progress: rewritten in place on a terminal, a few plain lines elsewhere."""

    def __init__(self, config: pytest.Config, label: str, budget_s: float) -> None:
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._terminal: Any = config.pluginmanager.getplugin("terminalreporter")
        self._label = label
        self._budget_s = budget_s
        self._rewrites = bool(self._terminal and self._terminal.isatty())
        self._marks = list(MARKS)
        self._shown = 0.0

    def __enter__(self) -> Self:
        self._rewrite("starting", force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rewrites:
            self._write("", erase=True)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event of the runner; what it does not carry is left out."""
        if event.get("event") == "phase":
            phase = PHASES.get(str(event.get("phase")))
            if phase == "scoring" and not self._rewrites:
                self._write(f"{self._label}  scoring")
            elif phase:
                self._rewrite(phase, force=True)
        elif event.get("event") == "progress":
            elapsed_s, line = self._progress(event)
            if self._rewrites:
                self._rewrite(line)
            elif self._marks and elapsed_s >= self._marks[0] * self._budget_s:
                self._marks = [mark for mark in self._marks if elapsed_s < mark * self._budget_s]
                self._write(f"{self._label}  {line}")

    def _progress(self, event: Mapping[str, Any]) -> tuple[float, str]:
        def number(name: str) -> float | None:
            value = event.get(name)
            return float(value) if isinstance(value, int | float) else None

        scored, of = number("scored"), number("of")
        if scored is not None and of is not None:
            return 0.0, f"scored {scored:.0f} of {of:.0f} rows"
        if "condition" in event:
            return 0.0, f"scored: {one_line(str(event['condition']))}"
        elapsed_s, budget_s = number("elapsed_s") or 0.0, number("budget_s") or self._budget_s
        parts = [f"{elapsed_s:.0f} of {budget_s:.0f} s"]
        if (step := number("step")) is not None:
            parts.append(f"step {step:.0f}")
        if (loss := number("loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (rate := number("tokens_per_s")) is not None:
            parts.append(f"{rate / 1e3:.1f}k tok/s")
        return elapsed_s, "  ".join(parts)

    def _rewrite(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if self._rewrites and (force or now - self._shown >= REWRITE_S):
            self._shown = self._shown if force else now
            self._write(f"{self._label}  {text}", erase=True)

    def _write(self, text: str, erase: bool = False) -> None:
        if self._terminal is None:
            return
        with self._capture.global_and_fixture_disabled() if self._capture else nullcontext():
            if erase:
                self._terminal.rewrite(text[: self._terminal._tw.fullwidth - 1], erase=True)
            else:
                self._terminal.write_line(text)
            self._terminal.flush()


def outcome_line(candidate: Candidate, result: Result, verdict: Verdict, metric: str) -> str:
    """Return the one line that says what became of an experiment."""
    if verdict.outcome == "crash" or result.score is None:
        return f"  {candidate.number:>3}  {candidate.description}: {verdict.outcome}: {verdict.reason}"
    gain = "" if verdict.gain is None else f"  gain {verdict.gain:+.6f}"
    return (
        f"  {candidate.number:>3}  {candidate.description}: {metric} {result.score:.6f}{gain}"
        f"  {verdict.outcome}: {verdict.reason}"
    )


def table(records: Sequence[Mapping[str, Any]], metric: str, direction: str, width: int, color: bool) -> list[str]:
    """Return the lines of the closing table: a row for each of the ledger's `records` that makes one, oldest first."""
    from rich.text import Text

    grid = _grid()
    for title, side in (("#", "right"), ("commit", "left"), (metric, "right"), ("gain", "right"), ("best", "right")):
        grid.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    grid.add_column("GB", justify="right", no_wrap=True)
    grid.add_column("trust", no_wrap=True)
    grid.add_column("status", no_wrap=True)
    grid.add_column("description", ratio=1, overflow="fold")
    best: float | None = None
    for record in records:
        verdict, result = record["verdict"], record["result"]
        outcome = status_of(record)
        score, gain = result.get("score"), verdict.get("gain") if verdict else None
        if score is not None and outcome == "keep":
            better = best is None or (score < best if direction == "min" else score > best)
            best = score if better else best
        style = {"keep": "green", "discard": "yellow", "crash": "red"}[outcome]
        grid.add_row(
            str(record["number"] or ""),
            record["commit"][:7],
            "" if score is None else f"{score:.6f}",
            "" if gain is None else f"{gain:+.6f}",
            "" if best is None else f"{best:.6f}",
            f"{result.get('memory_gb', 0.0):.1f}",
            result.get("trust", ""),
            Text(outcome, style=style),
            Text(record["description"]),
        )
    return _lines(grid, width, color)


def gap_lines(
    runs: Sequence[Mapping[str, Any]], metric: str, direction: str, fingerprint: Mapping[str, Any]
) -> list[str]:
    """Return a line for each keep: how its gap to the second split compares with the baselines'."""
    lines = []
    for gap in heldout.gaps(runs, metric, direction, fingerprint):
        limit = "no noise known" if math.isinf(gap.limit) else f"noise explains {gap.limit:.6f}"
        warning = "POSSIBLE CONTAMINATION: " if gap.suspicious else ""
        lines.append(
            f"{warning}experiment {gap.number}: gap to {heldout.name_of(metric)} {gap.gap:+.6f}, {gap.jump:+.6f} "
            f"against the baselines ({limit})"
        )
    return lines


def second_split(
    runs: Sequence[Mapping[str, Any]], metric: str, direction: str, fingerprint: Mapping[str, Any]
) -> list[str]:
    """Return the closing lines on the second split: suspicious keeps, the last keep, looks at each split."""
    looks = heldout.looks(runs, metric)
    if not looks[heldout.name_of(metric)]:
        return []
    gaps = gap_lines(runs, metric, direction, fingerprint)
    shown = [line for line in gaps[:-1] if line.startswith("POSSIBLE")] + gaps[-1:]
    return [*shown, "looks at each split so far: " + ", ".join(f"{name} {count}" for name, count in looks.items())]


def conditions(rows: Sequence[Mapping[str, Any]], width: int, color: bool) -> list[str]:
    """Return the lines of the determinism table; scores are shown to the last bit."""
    from rich.text import Text

    grid = _grid()
    for title in ("condition", "value", "difference", "guarantee", "holds"):
        grid.add_column(title, justify="right" if title == "difference" else "left", overflow="fold")
    for row in rows:
        difference = row.get("difference")
        number = f"{difference:.3g}" if isinstance(difference, int | float) else str(difference)
        verdict = Text("yes", style="green") if row["holds"] else Text("NO", style="red")
        words = [Text(str(row.get(name, ""))) for name in ("condition", "value", "guarantee")]
        grid.add_row(words[0], words[1], number, words[2], verdict)
    return _lines(grid, width, color)


def _grid() -> "Table":
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)


def _lines(grid: "Table", width: int, color: bool) -> list[str]:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, no_color=not color, legacy_windows=False)
    console.print(grid)
    return [line.rstrip() for line in stream.getvalue().rstrip().splitlines()]
