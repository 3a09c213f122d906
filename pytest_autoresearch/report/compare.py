"""`--autoresearch-compare`: the branches of several machines side by side, from git and the ledgers that are here.

A machine's ledger stays with it; what its branch shows is results.tsv as of the last keep.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from .. import settings as settings_
from .._branches import Branch, find, kept
from .._git import Plumbing, WorkspaceError
from .._results import read_table
from ..ledger import Ledger, LedgerError, champion_record
from ..propose.adopt import ADOPTED
from ..settings import Settings
from .terminal import _grid, _lines

OPTION = "--autoresearch-compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one branch says of its machine's night; gains are positive where the score got better."""

    branch: str
    source: str  # "ledger" or "results.tsv"
    experiments: int
    baselines: tuple[float, ...]
    champion: str  # candidate commit
    scores: tuple[float, ...]  # of the champion: fresh runs, or else the one that it was kept for
    fresh: bool
    gain: float | None  # of the champion over the baselines' mean
    kept: tuple[tuple[str, float | None], ...]  # description, gain over the champion before it; oldest first
    tried: Mapping[str, str]  # description -> outcome of what was not kept


def main(config: pytest.Config) -> int:
    """Print the tables of the branches that are named; return 0."""
    settings = settings_.read(config)
    git = Plumbing(settings.root)
    try:
        branches = [find(git, name, OPTION) for name in config.getoption("autoresearch_compare")]
        machines = [_machine(git, settings, branch) for branch in branches]
    except (WorkspaceError, LedgerError) as error:
        raise pytest.UsageError(f"{OPTION}: {error}") from None
    width, color = shutil.get_terminal_size((120, 24)).columns, sys.stdout.isatty()
    for line in tables(machines, settings.metric, width, color):
        print(line)
    return 0


def _machine(git: Plumbing, settings: Settings, branch: Branch) -> Machine:
    metric = settings.metric
    common = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir"))
    path = common / "autoresearch" / branch.name.removeprefix(f"{settings.branch_prefix}/") / "ledger.jsonl"
    ledger = Ledger.read(path) if branch.ref == f"refs/heads/{branch.name}" and path.exists() else None
    if ledger is not None:
        text: str | None = ledger.history.table(metric)
    else:
        text = git.maybe("cat-file", "blob", f"{branch.ref}:./results.tsv")
    rows = read_table(text + "\n", f"results.tsv of {branch.name}", metric) if text else []
    # Rows before the branch's own, imported from elsewhere, have baselines and keeps too: of commits not on the branch
    commits = {commit[:7] for commit in git("rev-list", branch.ref).split()}
    baselines = [row["score"] for row in rows if row["description"] == "baseline" and row["commit"] in commits]
    baselines = [score for score in baselines if score is not None]
    listed = {row["commit"] for row in rows if row["status"] == "keep"}
    own = [change for change in kept(git, branch.ref, metric) if change.candidate[:7] in listed]
    best = fmean(baselines) if baselines else None
    changes = []
    for change in own:
        changes.append((change.description, _gain(settings, best, change.score)))
        best = change.score
    scores, fresh = [best] if best is not None else [], False
    if ledger is not None and (made := champion_record(ledger.runs)) is not None:
        unpicked = ledger.known.unpicked(made["commit"], made["result"]["fingerprint"])
        scores, fresh = unpicked or scores, bool(unpicked)
    start = fmean(baselines) if baselines else None
    return Machine(
        branch=branch.name,
        source="results.tsv" if ledger is None else "ledger",
        experiments=sum(row["description"] != "baseline" for row in rows),
        baselines=tuple(baselines),
        champion=own[-1].candidate if own else "",
        scores=tuple(scores),
        fresh=fresh,
        gain=_gain(settings, start, fmean(scores)) if scores else None,
        kept=tuple(changes),
        tried={row["description"]: row["status"] for row in rows if row["status"] != "keep"},
    )


def _gain(settings: Settings, before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    return before - after if settings.direction == "min" else after - before


def tables(machines: Sequence[Machine], metric: str, width: int, color: bool) -> Iterator[str]:
    """Yield the lines of both tables: a row a machine, and a row a kept change with its gain on each machine."""
    grid = _grid()
    for title in ("branch", "experiments", "kept", "baseline", "runs", "noise", "champion", metric, "gain", "from"):
        left = title in ("branch", "champion", "from")
        grid.add_column(title, justify="left" if left else "right", overflow="fold")
    for machine in machines:
        noise = stdev(machine.baselines) if len(machine.baselines) > 1 else None
        score = fmean(machine.scores) if machine.scores else None
        shown = _number(score) + ("" if machine.fresh or not machine.champion else "*")
        cells: list[Any] = [machine.branch, machine.experiments, len(machine.kept)]
        cells += [_number(fmean(machine.baselines) if machine.baselines else None), len(machine.baselines)]
        cells += [_number(noise), machine.champion[:7] or "baseline", shown, _number(machine.gain, "+")]
        grid.add_row(*map(str, cells), machine.source)
    yield from _lines(grid, width, color)
    yield "Each gain is over the machine's own baselines: scores of different machines are not compared."
    if any(machine.champion and not machine.fresh for machine in machines):
        yield "* the run that the champion was kept for: it flatters"
    changes = _grid()
    changes.add_column("kept change", overflow="fold", ratio=1)
    gains: dict[str, dict[str, str]] = {}
    for machine in machines:
        changes.add_column(machine.branch.rpartition("/")[2], justify="right", overflow="fold")
        for description, gain in machine.kept:
            cells_of = gains.setdefault(_original(description), {})
            cells_of[machine.branch] = ", ".join(filter(None, (cells_of.get(machine.branch), _number(gain, "+"))))
    for machine in machines:
        for description, outcome in machine.tried.items():
            if _original(description) in gains:
                gains[_original(description)].setdefault(machine.branch, outcome)
    for description, by_branch in gains.items():
        changes.add_row(description, *(by_branch.get(machine.branch, "") for machine in machines))
    if gains:
        yield ""
        yield from _lines(changes, width, color)
    yield "next:"
    for machine in machines:
        if machine.kept:
            yield f"  pytest --autoresearch-adopt {machine.branch}  # on another machine: judge its changes there"


def _original(description: str) -> str:
    """Return the description of a change as the machine gave it that had it first."""
    while adopted := ADOPTED.match(description):
        description = description[adopted.end() :]
    return description


def _number(number: float | None, sign: str = "") -> str:
    return "" if number is None else f"{number:{sign}.6f}"
