"""results.tsv: five columns, one row a baseline and one an experiment; made of records, read from others' files."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._chain import LedgerError, Record

FINAL = ("keep", "discard", "crash")
COLUMNS = ("commit", "memory_gb", "status", "description")  # and between the first two, the metric's name


class History(list[Record]):
    """Records, oldest first, and the rows that they make; appended to, and nothing else."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        super().__init__()
        self.rows: list[Record] = []  # for each row, the record that it tells of
        self._texts: list[str] = []
        self._place: dict[int, int] = {}  # row of an experiment, by number
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Add a record: a row at the end, or in the place of an earlier outcome of the same experiment."""
        super().append(record)
        if not is_final(record):
            return
        place = self._place.get(record["number"]) if record["number"] else None
        if place is None:
            self._place[record["number"]] = len(self.rows)
            self.rows.append(record)
        else:
            self.rows[place] = record
            del self._texts[place:]  # it was among the last

    def table(self, metric: str) -> str:
        """Return results.tsv; only rows that are new since the last call are made."""
        self._texts += map(_row, self.rows[len(self._texts) :])
        return "\n".join(["\t".join((COLUMNS[0], metric, *COLUMNS[1:])), *self._texts, ""])


def is_final(record: Record) -> bool:
    """Return whether `record` makes a row: a baseline, an imported row, or the outcome of an experiment."""
    if record["kind"] in ("experiment", "confirm"):
        return record["verdict"]["outcome"] in FINAL
    return record["kind"] in ("baseline", "import")


def status_of(record: Mapping[str, Any]) -> str:
    """Return the status that the row of a final record shows."""
    if record["verdict"]:
        return str(record["verdict"]["outcome"])
    return "keep" if record["result"]["status"] == "ok" else "crash"


def _row(record: Record) -> str:
    status, result = status_of(record), record["result"]
    ranked = status != "crash"  # a crash's zeros are no score
    score, memory_gb = (result["score"], result["memory_gb"]) if ranked else (0.0, 0.0)
    return f"{record['commit'][:7]}\t{score:.6f}\t{memory_gb:.1f}\t{status}\t{record['description']}"


def read_table(text: str, source: str, metric: str) -> list[dict[str, Any]]:
    """Return the rows of a results.tsv as {commit, score, memory_gb, status, description}; a crash has no score.

    Raises LedgerError, naming `source` and the line, for anything else than the five columns of `metric`.
    """
    wanted = (COLUMNS[0], metric, *COLUMNS[1:])
    lines = [line.rstrip("\r") for line in text.removeprefix("\N{BOM}").split("\n")]
    if tuple(lines[0].split("\t")) != wanted:
        raise LedgerError(f"{source}, line 1: {lines[0][:100]!r} are not the columns {', '.join(wanted)}, set by tabs")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(wanted):
            raise LedgerError(f"{source}, line {number}: {line[:100]!r} has {len(cells)} cells, not {len(wanted)}")
        commit, score, memory_gb, status, description = map(one_line, cells)
        if status not in FINAL:
            raise LedgerError(f"{source}, line {number}: {status!r} is none of the statuses {', '.join(FINAL)}")
        if not re.fullmatch(r"[0-9A-Za-z]{4,64}", commit):
            raise LedgerError(f"{source}, line {number}: {commit!r} is not the name of a commit")
        row: dict[str, Any] = {"commit": commit, "score": None, "memory_gb": 0.0}
        if status != "crash":
            row["score"], row["memory_gb"] = _number(score), _number(memory_gb)
            if not row["score"]:
                raise LedgerError(f"{source}, line {number}: {score!r} is no score to {status}; is it a crash?")
            if row["memory_gb"] is None:
                raise LedgerError(f"{source}, line {number}: {memory_gb!r} is not a size in GB")
        rows.append(row | {"status": status, "description": description})
    return rows


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def one_line(text: str) -> str:
    """Return `text` with each run of spaces, tabs, newlines and control characters made one space."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
