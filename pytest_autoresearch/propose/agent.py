"""The proposer that is somebody else's program: it reads what to do on stdin and edits the mutable files."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .. import supervise
from ..ledger import champion_record, is_final, one_line
from ..settings import Settings
from . import NoProposal

ROWS = 20  # of history
OUTPUT_LINES = 200  # at its end that are searched for the description

BRIEF = """
---
# The task now

You are in experiment {number} of a running loop. Edit {mutable} in the current directory, and nothing else: one idea,
readable as a diff. Do not run it, do not commit, do not call pytest: the loop does all of that when you end.
The last line that you print is the description of your change (one line, at most 200 characters).

Champion: {champion}. {metric}: {better} is better.

The last experiments, oldest first (number, {metric}, gain over the champion of the time, verdict, description, reason):
{rows}

{refused}{crash}When ideas run dry: read the files again, combine two near misses (discards with a gain near zero), try
the opposite of what failed, try something radical, try removing things. Never stop, never ask: nobody is there to
answer.
"""

REPAIR = """Your last change crashed. The files hold it as you left it: repair it, the same idea, and describe it again.
If it cannot work, change nothing. It ended with:
{crash}

"""


def propose(
    settings: Settings,
    workdir: Path,
    history: Sequence[dict[str, Any]],
    number: int,
    refused: Sequence[str],
    crash: str,
) -> str:
    """Run the agent's command in `workdir`; return the last line it printed. `crash`: see the hook.

    Raises NoProposal when it fails or outlasts `agent_timeout_s`; whatever it started is ended in any case.
    """
    assert settings.agent is not None
    program = workdir / settings.program
    text = program.read_text(encoding="utf-8", errors="replace") if program.is_file() else ""
    with tempfile.TemporaryDirectory(prefix="autoresearch-agent-") as folder:
        log = Path(folder) / "agent.log"
        try:
            outcome = supervise.run(
                settings.agent,
                cwd=workdir,
                env={**supervise.clean_environment(), "PWD": os.fspath(workdir)},
                stdin=(text + brief(settings, history, number, refused, crash)).encode(),
                log=log,
                timeout_s=settings.agent_timeout_s,
            )
        except FileNotFoundError as exc:
            raise pytest.UsageError(f"--autoresearch-agent: {exc}") from None
        printed = [line for line in map(one_line, supervise.tail(log, OUTPUT_LINES).splitlines()) if line]
    if outcome.timed_out:
        raise NoProposal(f"the agent's command was ended after {settings.agent_timeout_s:g} s")
    if outcome.returncode:
        raise NoProposal(f"the agent's command failed (exit code {outcome.returncode}): {' '.join(printed[-1:])}"[:300])
    return printed[-1][:200] if printed else ""


def brief(
    settings: Settings, history: Sequence[dict[str, Any]], number: int, refused: Sequence[str], crash: str
) -> str:
    """Return what the agent reads after program.md: the task, the champion and the last experiments."""
    rows = []
    for record in [record for record in history if is_final(record)][-ROWS:]:
        verdict, score = record["verdict"] or {"outcome": "keep", "reason": ""}, record["result"]["score"]
        figures = [f"{score:.6f}" if score is not None else "-"]
        figures.append(f"{verdict['gain']:+.6f}" if verdict.get("gain") is not None else "-")
        words = [verdict["outcome"], record["description"], verdict["reason"]]
        rows.append("\t".join([str(record["number"]), *figures, *words]))
    made = champion_record(history)
    champion = f"{made['description']}, {made['result']['score']:.6f}" if made else "the file as it is"
    said = "".join(f"- {reason}\n" for reason in refused[-5:])
    return BRIEF.format(
        number=number,
        mutable=", ".join(settings.mutable),
        champion=champion,
        metric=settings.metric,
        better="lower" if settings.direction == "min" else "higher",
        rows="\n".join(rows),
        crash=REPAIR.format(crash=crash) if crash else "",
        refused=f"Your last proposals were not run:\n{said}\n" if said else "",
    )
