"""`--autoresearch-status`: the state of a line of research as one JSON object, for agents and scripts.

It reads the ledger and git, and writes and locks nothing, so it may be asked for while a loop runs.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest

from .. import settings as settings_
from .._git import Plumbing, WorkspaceError
from ..ledger import Ledger, LedgerError, Record, champion_record, status_of
from ..propose.tuner import find
from ..records import Policy
from ..settings import Settings

ROWS = 20  # last ones that are shown, and near misses
NEAR_SIGMAS = 2.0
TRIED = 500  # experiments, of which the constants are looked up
CONSTANTS = re.compile(rb"^[A-Z][A-Z0-9_]*[ \t]*=.*", re.MULTILINE)  # whole files would take seconds


def main(config: pytest.Config) -> int:
    """Print the state; return 0."""
    settings, ledger = settings_.read(config), open_ledger(config)
    try:
        state = state_of(settings, ledger)
    except WorkspaceError as error:
        raise pytest.UsageError(str(error)) from error
    print(json.dumps(state, indent=2))
    return 0


def open_ledger(config: pytest.Config) -> Ledger:
    """Read the ledger of `--autoresearch-tag`, or else of the branch that is checked out, or the one last written.

    Raises UsageError, in one line, where there is none or it is damaged.
    """
    settings, given = settings_.read(config), config.getoption("autoresearch_tag")
    git = Plumbing(settings.root)
    try:
        home = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir")) / "autoresearch"
        branch = git.maybe("symbolic-ref", "--quiet", "--short", "HEAD") or ""
        found = {path.parent.name: path for path in home.glob("*/ledger.jsonl")}
        tag = given or branch.removeprefix(settings.branch_prefix + "/")
        if tag not in found and not given:
            tag = max(found, key=lambda tag: found[tag].stat().st_mtime_ns, default="")
        if tag not in found:
            of = f" of tag {tag!r} (there is: {', '.join(sorted(found)) or 'nothing'})" if given else ""
            raise pytest.UsageError(
                f"there is no research{of} in {settings.root} yet: pytest --autoresearch-loop begins it"
            )
        return Ledger.read(found[tag])
    except (WorkspaceError, LedgerError) as error:
        raise pytest.UsageError(str(error)) from error


def state_of(settings: Settings, ledger: Ledger) -> dict[str, Any]:
    """Return what is known, in JSON's types; scores, gains and sigma in the metric's unit."""
    tag, history = ledger.path.parent.name, ledger.history
    branch = f"{settings.branch_prefix}/{tag}"
    git = Plumbing(settings.root)
    policy = next((Policy(**run["policy"]) for run in reversed(ledger.runs) if run["policy"]), settings.policy)
    ran = next((run for run in reversed(ledger.runs) if run["result"]["status"] == "ok"), None)
    fingerprint: dict[str, Any] = ran["result"]["fingerprint"] if ran else {}
    made = champion_record(ledger.runs)
    standing = ledger.known.standing(made["commit"] if made else "", fingerprint, policy)
    champion = None
    if made:
        champion = {
            **{name: made[name] for name in ("number", "commit", "description")},
            "kept_commit": git.maybe("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}"),
            "scores": list(standing.scores),
            "mean": fmean(standing.scores) if standing.scores else None,
            "tainted": standing.tainted,
        }
    decided = [record for record in history.rows if record["kind"] in ("experiment", "confirm")]
    kinds, outcomes = Counter(run["kind"] for run in ledger.runs), Counter(map(status_of, decided))
    return {
        "tag": tag,
        "branch": branch,
        "metric": settings.metric,
        "direction": settings.direction,
        "running": _running(ledger.path.parent.parent / "loop.lock"),
        "champion": champion,
        "noise": {"sigma": standing.sigma, "freedom": standing.freedom},
        "counts": {
            "imported": len(ledger.imported),
            "runs": len(ledger.runs),
            "baselines": kinds["baseline"],
            "experiments": len(decided),
            **{outcome: outcomes[outcome] for outcome in ("keep", "discard", "crash")},
        },
        "rows": [_row(record) for record in history.rows[-ROWS:]],
        "near_misses": _near_misses(decided, tag),
        "tried": _tried(git, settings.mutable, decided[-TRIED:], fingerprint.get("profile")),
    }


def _row(record: Record) -> dict[str, Any]:
    row = {name: record[name] for name in ("number", "commit", "description")}
    verdict, result = record["verdict"] or {}, record["result"]
    figures = {"score": result["score"], "memory_gb": result["memory_gb"], "gain": verdict.get("gain")}
    return {**row, "status": status_of(record), **figures, "reason": verdict.get("reason", "")}


def _near_misses(decided: Sequence[Record], tag: str) -> list[dict[str, Any]]:
    """Return the discards within 2 sigma of the champion of their time, the nearest first."""
    near = []
    for record in decided:
        gain, sigma = record["verdict"]["gain"], record["verdict"]["sigma"]
        if status_of(record) == "discard" and None not in (gain, sigma) and gain >= -NEAR_SIGMAS * sigma:
            near.append(record)
    near.sort(key=lambda record: -record["verdict"]["gain"])
    return [
        {
            **{name: record[name] for name in ("number", "commit", "description")},
            "ref": f"refs/autoresearch/{tag}/{record['number']:04d}"
            + f"-{record['attempt']}" * (record["attempt"] > 1),
            "score": record["result"]["score"],
            **{name: record["verdict"][name] for name in ("gain", "sigma")},
        }
        for record in near[:ROWS]
    ]


def _tried(
    git: Plumbing, mutable: Sequence[str], decided: Sequence[Record], profile: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Return, by constant, what the last experiments made of it; constants that span lines are not seen."""
    commits = list(dict.fromkeys(commit for record in decided for commit in (record["parent"], record["commit"])))
    names = [f"{commit}:./{name}" for commit in commits for name in mutable]
    contents = dict(zip(names, _blobs(git, names), strict=True))

    @cache  # most lines are the same in all of them
    def constants(name: str, line: bytes) -> list[tuple[str, int | float]]:
        title = "{}" if len(mutable) == 1 else f"{name}:{{}}"
        return [(title.format(constant.key[1]), constant.value) for constant in find({name: line}, profile)]

    @cache
    def values(commit: str) -> dict[str, int | float]:
        lines = ((name, line) for name in mutable for line in CONSTANTS.findall(contents[f"{commit}:./{name}"]))
        return dict(pair for name, line in lines for pair in constants(name, line))

    tried: dict[str, list[dict[str, Any]]] = {}
    for record in decided:
        before, after, verdict = values(record["parent"]), values(record["commit"]), record["verdict"]
        for title in before.keys() & after.keys():
            if before[title] != after[title]:
                change = {"number": record["number"], "from": before[title], "to": after[title]}
                tried.setdefault(title, []).append({**change, "gain": verdict["gain"], "outcome": verdict["outcome"]})
    return dict(sorted(tried.items()))


def _blobs(git: Plumbing, names: Sequence[str]) -> list[bytes]:
    """Return the contents that git has under `names`, empty where it has none, in one process."""
    with tempfile.TemporaryFile() as file:
        file.write("".join(f"{name}\n" for name in names).encode())
        file.seek(0)
        data = git.raw("cat-file", "--batch", stdin=file)
    blobs, at = [], 0
    for _ in names:
        end = data.index(b"\n", at)
        words = data[at:end].split()
        size = int(words[-1]) if words[-1].isdigit() else -1  # "<name> missing" has no content
        blobs.append(data[end + 1 : end + 1 + max(size, 0)])
        at = end + 1 + size + 1
    return blobs


def _running(lock: Path) -> int | None:
    """Return the process of the loop or try that holds the repository's lock, for whichever tag; taking no lock."""
    try:
        pid = int(lock.read_text())
        held = any(Path(file.path) == lock for file in psutil.Process(pid).open_files())
    except (OSError, ValueError, psutil.Error):
        return None
    return pid if held else None
