"""A file of JSON lines of which each holds the digest of the line before, and beside it the digest of the last one.

A line: `{"prev": "<SHA-256 of the previous line with its newline, empty in the first>", ...}`. The head, one line
beside the file: `<number of lines> <SHA-256 of the last>`. Line first, head after, so that a file left between the two
is a line longer than its head says; where a head says more than the file holds, lines are missing.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson  # reads 100,000 records in a third of json's time

Record = dict[str, Any]
NAMED = 10  # lines, in one message


class LedgerError(Exception):
    """A ledger that cannot be read or written, in one line."""


@dataclass(slots=True, kw_only=True)
class Chain:
    """The end of such a file: what the next line links to."""

    path: Path
    count: int = 0
    digest: str = ""  # of the last line
    torn: int = 0  # bytes after it, of a line that was never wholly written

    def read(self) -> Iterator[Record]:
        """Yield the records of the file, none without one, and come to its end.

        Raises LedgerError, naming the lines, where one was changed, is missing or stands in another's place.
        """
        try:
            head = _read_head(self.path)  # first: a loop at work appends to the file, then replaces the head
            claimed = head[0] if head else 0
            if not self.path.exists() and not claimed:
                return
            with open(self.path, "rb") as file:
                for line in file:
                    record = _loads(line) if line.endswith(b"\n") else None
                    if record is None and self.count >= claimed and not file.read(1):
                        self.torn = len(line)
                        return
                    if record is None or record["prev"] != self.digest:
                        raise _damaged(self.path, head)
                    self.count, self.digest = self.count + 1, _digest(line)
                    if head and self.count == claimed and self.digest != head[1]:
                        raise _damaged(self.path, head)
                    yield record
        except OSError as error:
            raise LedgerError(f"cannot read the ledger {self.path}: {error.strerror}") from error
        if self.count < claimed:
            raise _damaged(self.path, head)

    def mend(self) -> None:
        """Cut off a torn line, and let the head say what the file holds; raises LedgerError."""
        try:
            if self.torn:
                with open(self.path, "r+b") as file:
                    file.truncate(self.path.stat().st_size - self.torn)
                    os.fsync(file.fileno())
                self.torn = 0
            if self.count and _read_head(self.path) != (self.count, self.digest):
                _write_head(self.path, self.count, self.digest)
        except OSError as error:
            raise LedgerError(f"cannot write the ledger {self.path}: {error.strerror}") from error

    def append(self, record: Mapping[str, Any]) -> Record:
        """Write one line; return its record as it will be read. On return it is on disk, on LedgerError nothing is."""
        text = json.dumps({"prev": self.digest, **record}, ensure_ascii=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        digest = _digest(line)
        try:
            created = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(0, "the disk took only part of the record")
                    os.fsync(descriptor)
                    if created:
                        _sync_folder(self.path.parent)
                    _write_head(self.path, self.count + 1, digest)
                except OSError:
                    os.ftruncate(descriptor, size)  # what was not recorded must not be found later
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LedgerError(f"cannot write the ledger {self.path}: {error.strerror}") from error
        self.count, self.digest = self.count + 1, digest
        read = _loads(line)
        assert read is not None
        return read


def head_of(path: Path) -> Path:
    """Return where the head of the chain in `path` is kept."""
    return path.with_suffix(".head")


def _read_head(path: Path) -> tuple[int, str] | None:
    """Return (lines, digest of the last), or None without a head; a head of another form raises LedgerError."""
    head = head_of(path)
    try:
        words = head.read_bytes().decode("ascii", "replace").split()
    except FileNotFoundError:
        return None
    if len(words) != 2 or not words[0].isdecimal() or len(words[1]) != 64:
        raise LedgerError(f"{head} is damaged: restore it, or remove it if you know that the end of {path} is whole")
    return int(words[0]), words[1]


def _write_head(path: Path, count: int, digest: str) -> None:
    head = head_of(path)
    new = head.with_name(head.name + ".new")
    with open(new, "w") as file:
        file.write(f"{count} {digest}\n")
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave an empty head
    os.replace(new, head)


def _faults(lines: list[bytes], head: tuple[int, str] | None) -> list[str]:
    """Return what is wrong with lines that are not a whole chain, naming them by number, counted from 1."""
    digests = [_digest(line) for line in lines]
    records = [_loads(line) for line in lines]
    count, claimed = len(lines), head[0] if head else 0
    follow = {record["prev"]: index for index, record in enumerate(records) if record}
    order: list[int] = []
    digest = ""
    while digest in follow and len(order) < count:
        order.append(follow[digest])
        digest = digests[order[-1]]
    moved = [place for place, index in enumerate(order) if place != index]
    if moved and len(order) == count:  # all there
        return [_say(moved, "is out of order", "are out of order")]

    # From the end: a line that is changed itself proves nothing about the one before.
    at = {digest: index for index, digest in enumerate(digests)}
    wanted = {claimed - 1: head[1]} if head and claimed <= count else {}
    changed = {index for index, record in enumerate(records) if record is None}
    moved, gaps = [], []
    for index in reversed(range(count)):
        record = records[index]
        if record is None or wanted.get(index, digests[index]) != digests[index]:
            changed.add(index)
        elif index == 0:
            if record["prev"]:
                gaps.append(0)
        elif at.get(record["prev"], index - 1) != index - 1:
            moved.append(index)
        elif record["prev"] not in at and claimed > count:
            gaps.append(index)
        else:
            wanted[index - 1] = record["prev"]
    found = []
    if changed:
        found.append(_say(changed, "was changed", "were changed"))
    if moved:
        found.append(_say(moved, "is out of order", "are out of order"))
    if claimed > count and len(gaps) <= 1:
        first = gaps[0] if gaps else count
        found.append(_say(range(first, first + claimed - count), "is missing", "are missing"))
    elif gaps:
        found.append(f"lines are missing before what is now {_say(gaps, '', '').rstrip()}")
    return found


def _say(indices: Collection[int], one: str, many: str) -> str:
    """Return what is to be said of lines, which people count from 1."""
    shown = ", ".join(str(index + 1) for index in sorted(indices)[:NAMED])
    more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
    return f"line {shown} {one}" if len(indices) == 1 else f"lines {shown}{more} {many}"


def _damaged(path: Path, head: tuple[int, str] | None) -> LedgerError:
    with open(path, "rb") as file:
        faults = "; ".join(_faults(file.readlines(), head))
    return LedgerError(f"{path} is damaged ({faults}): restore it, or begin another with --autoresearch-tag NEW")


def _loads(line: bytes) -> Record | None:
    """Return the record in `line`, or None where there is none."""
    try:
        record = orjson.loads(line)
    except ValueError:
        try:
            record = json.loads(line)  # orjson refuses NaN and half a surrogate pair, which a runner may have sent
        except ValueError:
            return None
    return record if isinstance(record, dict) and isinstance(record.get("prev"), str) else None


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
