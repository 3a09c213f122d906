"""The durable record of a night: one JSON object a line, fsynced before git moves; results.tsv is a view of it."""

import gc
import hashlib
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ._chain import Chain, LedgerError, Record
from ._results import History, is_final, one_line, read_table, status_of
from .records import LEDGER_SCHEMA, Candidate, Policy, Result, Verdict
from .standing import Known

__all__ = [
    "History",
    "Ledger",
    "LedgerError",
    "Record",
    "candidate_of",
    "champion_record",
    "is_final",
    "one_line",
    "prior",
    "result_of",
    "results_tsv",
    "run_record",
    "status_of",
]

MANY = 100_000  # objects: fewer cost the collector nothing to speak of
PRIOR_FREEDOM = 10.0  # at most, for what earlier nights say: the present one soon says it better


@dataclass(slots=True, kw_only=True)
class Ledger:
    """One night's runs, in memory and on disk. Who appends holds the repository's lock."""

    secret: str = ""  # hex; every seed of the night derives from it
    runs: list[Record] = field(default_factory=list)  # oldest first
    imported: list[Record] = field(default_factory=list)  # rows of something else's results.tsv, in a run's shape
    history: History = field(default_factory=History)  # imported, then runs: what proposers see
    known: Known = field(default_factory=Known)
    repaired: str | None = None  # one line, when a torn last record was cut off
    _chain: Chain
    _number: int = 0  # the highest
    _next_run: dict[int, int] = field(default_factory=dict)  # by number
    _fingerprint: dict[str, Any] | None = None  # of the last run
    _policy: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """Read the ledger at `path` to go on with it, or begin one; a last record that was torn is cut off.

        Raises LedgerError, naming file and lines, for damage anywhere else.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"cannot write the ledger {path}: {error.strerror}") from error
        ledger = cls(_chain=Chain(path=path))
        ledger._load()
        chain = ledger._chain
        if chain.torn:
            ledger.repaired = f"cut off a torn last record ({chain.torn} bytes) of {path}"
        chain.mend()
        if not chain.count:
            night = {"schema": LEDGER_SCHEMA, "type": "night", "tag": path.parent.name}
            ledger.append({**night, "secret": secrets.token_hex(16), "time": _now()})
        return ledger

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Read the ledger at `path`, which a loop may be appending to, and change nothing; raises LedgerError."""
        ledger = cls(_chain=Chain(path=path))
        ledger._load()
        if not ledger._chain.count:
            raise LedgerError(f"there is no ledger {path}")
        return ledger

    def _load(self) -> None:
        with _loading():
            for record in self._chain.read():
                if record.get("schema") != LEDGER_SCHEMA or (record["type"] == "night") != (self._chain.count == 1):
                    raise LedgerError(
                        f"{self.path}, line {self._chain.count} is of another version than {LEDGER_SCHEMA}: "
                        "begin another with --autoresearch-tag NEW"
                    )
                self._add(record)

    @property
    def path(self) -> Path:
        """Where the ledger is."""
        return self._chain.path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one run's record; on return it is on disk. Raises LedgerError with nothing of it written."""
        self._add(self._chain.append(record))

    def import_results(self, text: str, source: str, metric: str) -> None:
        """Begin the history with the rows of `text`, a results.tsv that something else wrote; `source` names it.

        They are shown and never ranked. The same rows again change nothing. Raises LedgerError for what is no such
        table, and where there are runs or other rows already.
        """
        rows = read_table(text, source, metric)
        if rows == [record["row"] for record in self.imported]:
            return
        if self.imported or self.runs:
            has = f"the rows of {self.imported[0]['source']}" if self.imported else "runs"
            raise LedgerError(f"{source} cannot be imported, {self.path} has {has} already: use --autoresearch-tag NEW")
        what = {"schema": LEDGER_SCHEMA, "type": "import", "source": one_line(source), "time": _now()}
        self.append({**what, "rows": rows})  # one record, so that a kill leaves all of them or none

    def _add(self, record: Record) -> None:
        if record["type"] == "night":
            self.secret = record["secret"]
            return
        if record["type"] == "import":
            self.imported = [_imported(row, record) for row in record["rows"]]
            for one in self.imported:
                self.history.append(one)
            return
        result, number = record["result"], record["number"]
        # Neighbours of equal value hold one object: a quarter of the memory.
        if result["fingerprint"] == self._fingerprint:
            result["fingerprint"] = self._fingerprint
        if record["policy"] == self._policy:
            record["policy"] = self._policy
        self._fingerprint, self._policy = result["fingerprint"], record["policy"]
        self.runs.append(record)
        self.history.append(record)
        self.known.add(record)
        if record["run"] >= self._next_run.get(number, 0):
            self._next_run[number] = record["run"] + 1
        if number > self._number:
            self._number = number

    def seed(self, number: int, run: int) -> int:
        """Return the seed, in [0, 2**31), of one run of one experiment; unknown to whoever lacks the secret."""
        digest = hashlib.sha256(f"{self.secret}/{number}/{run}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def next_number(self) -> int:
        """Return the number of the next experiment, counted from 1."""
        return self._number + 1

    def next_run(self, number: int) -> int:
        """Return the number of the next run of one experiment (0 for baselines), counted from 1."""
        return self._next_run.get(number, 1)

    def pending(self) -> Record | None:
        """Return the last record if it asked for another run that never came."""
        last = self.runs[-1] if self.runs else None
        return last if last and last["verdict"] and last["verdict"]["outcome"] in ("confirm", "retry") else None


def run_record(
    *,
    kind: str,
    candidate: Candidate,
    run: int,
    seed: int,
    result: Result,
    verdict: Verdict | None,
    signature: str = "",
    policy: Policy | None = None,
    veto: str = "",
    time: str | None = None,
) -> Record:
    """Return the ledger's record of one run.

    `kind` is baseline, experiment, confirm, champion or claim; `verdict` and `policy` are None for all but experiment
    and confirm. `signature` is the gate's, of the candidate's files; `veto` what overruled the rule; `time` is ISO 8601
    (default: now).
    """
    record = {"schema": LEDGER_SCHEMA, "type": "run", "kind": kind, "run": run, "seed": seed, "time": time or _now()}
    record |= asdict(candidate) | {"description": one_line(candidate.description)}
    record |= {"signature": signature, "policy": asdict(policy) if policy else None, "veto": veto}
    return record | {"result": asdict(result), "verdict": asdict(verdict) if verdict else None}


def candidate_of(record: Record) -> Candidate:
    """Return the candidate whose run `record` tells of."""
    return Candidate(**{name: record[name] for name in Candidate.__dataclass_fields__})


def result_of(record: Record) -> Result:
    """Return what the runner said of the run that `record` tells of."""
    return Result(**record["result"])


def champion_record(history: Sequence[Record]) -> Record | None:
    """Return the record that made the champion: the last keep, or else the last baseline; imported rows never do."""
    for record in reversed(history):
        if record["kind"] != "import" and record["verdict"] and record["verdict"]["outcome"] == "keep":
            return record
    return next((record for record in reversed(history) if record["kind"] == "baseline"), None)


def results_tsv(history: Sequence[Record], metric: str) -> str:
    """Return the table of what is decided: one row an imported row, a baseline, or an experiment with its outcome."""
    return (history if isinstance(history, History) else History(history)).table(metric)


def prior(state: Path, fingerprint: Mapping[str, Any]) -> tuple[float, float]:
    """Return sigma and its degrees of freedom as the ledgers beside the one in `state` know them; (0, 0) without any.

    sigma^2 = their squares / their freedom, summed over the nights under `fingerprint`; the freedom is worth at most
    PRIOR_FREEDOM. A ledger that cannot be read says nothing.
    """
    squares, freedom = 0.0, 0.0
    for path in sorted(state.parent.glob("*/ledger.jsonl")):
        if path.parent == state:
            continue
        try:
            spread = Ledger.read(path).known.spread(fingerprint)
        except LedgerError:
            continue
        squares, freedom = squares + spread[0], freedom + spread[1]
    return (math.sqrt(squares / freedom), min(freedom, PRIOR_FREEDOM)) if freedom else (0.0, 0.0)


def _imported(row: Mapping[str, Any], record: Record) -> Record:
    """Return an imported row in the shape of an experiment's last run, as number 0."""
    status, score = row["status"], row["score"]
    candidate = Candidate(number=0, commit=row["commit"], parent="", description=row["description"], lines_added=0)
    result = Result(status="ok" if status != "crash" else "crash", score=score, memory_gb=row["memory_gb"])
    verdict = Verdict(outcome=status, reason=f"imported from {record['source']}")
    known = {"source": record["source"], "row": row}
    one = run_record(
        kind="import", candidate=candidate, run=0, seed=0, result=result, verdict=verdict, time=record["time"]
    )
    return one | {"type": "import"} | known


@contextmanager
def _loading() -> Iterator[None]:
    """Spare the garbage collector what is loaded, which none of it is: it would double the time of 100,000 records."""
    enabled, before = gc.isenabled(), gc.get_count()[0]
    gc.disable()
    try:
        yield
    finally:
        if gc.get_count()[0] - before > MANY:
            gc.freeze()
        if enabled:
            gc.enable()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
