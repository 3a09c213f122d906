"""The durable record of a night: one JSON object a line, fsynced before git moves; results.tsv is a view of it."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from .ratchet import noise
from .records import SCHEMA, Candidate, Result, Standing, Verdict

EXTRA_SHARE = 0.15  # of all runs: what confirmations may cost
RUN_KEYS = {"kind", "number", "run", "commit", "parent", "description", "lines_added", "time", "result", "verdict"}
Record = dict[str, Any]


class LedgerError(Exception):
    """A ledger that cannot be read or written, in one line."""


@dataclass(slots=True, kw_only=True)
class Ledger:
    """One night's runs, in memory and on disk. The caller holds the repository's lock."""

    path: Path
    secret: str  # hex; every seed of the night derives from it
    runs: list[Record] = field(default_factory=list)  # oldest first
    repaired: str | None = None  # one line, when a torn last record was cut off

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """Read the ledger at `path`, or begin one; cut off a last record that was never wholly written.

        Raises LedgerError, naming file and line, for damage anywhere else.
        """
        repaired = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise LedgerError(f"cannot read the ledger {path}: {error.strerror}") from error
        lines = data.splitlines(keepends=True)
        if lines and not (lines[-1].endswith(b"\n") and _is_json(lines[-1])):
            torn = lines.pop()
            _cut(path, len(data) - len(torn))
            repaired = f"cut off a torn last record ({len(torn)} bytes) of {path}"
        records: list[Record] = []
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None or (record["type"] == "night") != (number == 1):
                raise LedgerError(f"{path}, line {number} is damaged: restore it, or use --autoresearch-tag NEW")
            records.append(record)
        if not records:
            night = {"schema": SCHEMA, "type": "night", "tag": path.parent.name}
            records = [{**night, "secret": secrets.token_hex(16), "time": _now()}]
            _append(path, json.dumps(records[0]))
        return cls(path=path, secret=str(records[0]["secret"]), runs=records[1:], repaired=repaired)

    def append(self, record: Record) -> None:
        """Write one run's record; on return it is on disk. Raises LedgerError with nothing of it written."""
        line = json.dumps(record, ensure_ascii=False)
        _append(self.path, line)
        self.runs.append(json.loads(line))  # as the next start will read it

    def seed(self, number: int, run: int) -> int:
        """Return the seed, in [0, 2**31), of one run of one experiment; unknown to whoever lacks the secret."""
        digest = hashlib.sha256(f"{self.secret}/{number}/{run}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def next_number(self) -> int:
        """Return the number of the next experiment, counted from 1."""
        return max((record["number"] for record in self.runs), default=0) + 1

    def next_run(self, number: int) -> int:
        """Return the number of the next run of one experiment (0 for baselines), counted from 1."""
        return max((record["run"] for record in self.runs if record["number"] == number), default=0) + 1

    def pending(self) -> Record | None:
        """Return the last record if it asked for a second run that never came."""
        last = self.runs[-1] if self.runs else None
        return last if last and last["verdict"] and last["verdict"]["outcome"] == "confirm" else None

    def standing(self, commit: str, fingerprint: Mapping[str, Any]) -> Standing:
        """Return what is known of the candidate `commit` from runs under an equal fingerprint.

        An experiment's first run earned its place by being good, so it counts only until a fresh run is there.
        sigma pools all repeats of any one commit. A confirmation may be afforded while it keeps them within
        15 % of all runs, and the first one always.
        """
        # Through JSON and back, as the records came: a tuple equals its list.
        wanted = json.loads(json.dumps(dict(fingerprint)))
        alike = [r for r in self.runs if r["result"]["status"] == "ok" and r["result"]["fingerprint"] == wanted]
        groups: dict[str, list[float]] = {}
        for record in alike:
            groups.setdefault(record["commit"], []).append(record["result"]["score"])
        own = [record for record in alike if record["commit"] == commit]
        fresh = [record for record in own if record["kind"] != "experiment"] or own
        confirmations = sum(record["kind"] == "confirm" for record in self.runs)
        return Standing(
            scores=tuple(record["result"]["score"] for record in fresh),
            memory_gb=fmean(record["result"]["memory_gb"] for record in fresh) if fresh else 0.0,
            sigma=noise(groups.values()),
            may_confirm=confirmations == 0 or confirmations + 1 <= EXTRA_SHARE * (len(self.runs) + 1),
        )


def run_record(
    *,
    kind: Literal["baseline", "experiment", "confirm"],
    candidate: Candidate,
    run: int,
    seed: int,
    result: Result,
    verdict: Verdict | None,
    time: str | None = None,
) -> Record:
    """Return the ledger's record of one run; `verdict` is None for a baseline, `time` ISO 8601 (default: now)."""
    record = {"schema": SCHEMA, "type": "run", "kind": kind, "run": run, "seed": seed, "time": time or _now()}
    record |= asdict(candidate) | {"description": one_line(candidate.description)}
    return record | {"result": asdict(result), "verdict": asdict(verdict) if verdict else None}


def candidate_of(record: Record) -> Candidate:
    """Return the candidate whose run `record` tells of."""
    return Candidate(**{name: record[name] for name in Candidate.__dataclass_fields__})


def result_of(record: Record) -> Result:
    """Return what the runner said of the run that `record` tells of."""
    return Result(**record["result"])


def champion_record(runs: Sequence[Record]) -> Record | None:
    """Return the record that made the champion: the last keep, or else the last baseline."""
    for record in reversed(runs):
        if record["verdict"] and record["verdict"]["outcome"] == "keep":
            return record
    return next((record for record in reversed(runs) if record["kind"] == "baseline"), None)


def results_tsv(runs: Sequence[Record], metric: str) -> str:
    """Return the table of finished runs: one row a baseline, one an experiment with its final status."""
    rows = [f"commit\t{one_line(metric)}\tmemory_gb\tstatus\tdescription"]
    for record in runs:
        result, verdict = record["result"], record["verdict"]
        status = verdict["outcome"] if verdict else "keep" if result["status"] == "ok" else "crash"
        if status == "confirm":
            continue
        figures = "0.000000\t0.0" if status == "crash" else f"{result['score']:.6f}\t{result['memory_gb']:.1f}"
        rows.append(f"{record['commit'][:7]}\t{figures}\t{status}\t{one_line(record['description'])}")
    return "\n".join(rows) + "\n"


def one_line(text: str) -> str:
    """Return `text` with each run of spaces, tabs, newlines and control characters made one space."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(line: bytes) -> Record | None:
    """Return the record in `line`, or None if it holds none that this version can read."""
    record = json.loads(line) if _is_json(line) else None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    whole = {"night": {"secret"}, "run": RUN_KEYS}.get(str(record.get("type")))
    return record if whole is not None and whole <= record.keys() else None


def _append(path: Path, text: str) -> None:
    """Append one line in one write; on return the line and the file's entry in its folder are on disk."""
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    created = not path.exists()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(0, "the disk took only part of the record")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)  # what was not recorded must not be found later
                raise
        finally:
            os.close(descriptor)
        if created:
            _sync_folder(path.parent)
    except OSError as error:
        raise LedgerError(f"cannot write the ledger {path}: {error.strerror}") from error


def _cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
