"""`oracle.lock`: the digests of everything a score depends on, in a file that a person reads and commits.

One line a thing, sorted: `version NAME VERSION` of what computes, `data SHA256 BYTES PROFILE/NAME` of prepared data,
`file SHA256 BYTES MODE PATH` of the immutable files, `law CASES NODE-ID` of the locked laws. Nothing but
`--autoresearch-lock=update` writes it; `--autoresearch-lock=check` compares, as the loop does before it begins.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ._files import WorkspaceError, write
from .lock import Entry, LockError, Snapshot, differences

if TYPE_CHECKING:
    from .bench import Bench, Terms

FILE = "oracle.lock"
HEADER = """\
# What scores depend on. `pytest --autoresearch-lock=check` compares it, `pytest --autoresearch-lock=update` writes it.
"""
MEND = "put them back, or if the change is meant run `pytest --autoresearch-lock=update` and commit"
SHOWN = 5  # names in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """The content of an oracle.lock."""

    files: Mapping[str, Entry] = field(default_factory=dict)  # path relative to the rootdir; not oracle.lock itself
    data: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # "tiny/val.npy" -> sha256, bytes
    versions: Mapping[str, str] = field(default_factory=dict)
    laws: Mapping[str, int] = field(default_factory=dict)  # node id without parameters -> cases

    @classmethod
    def parse(cls, text: str, source: str) -> "Lock":
        """Read what `text` wrote; raise LockError naming the line that is none."""
        files, data, versions, laws = {}, {}, {}, {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line or line.startswith("#"):
                continue
            if found := re.fullmatch(r"file ([0-9a-f]{64}) +(\d+) (\d{6}) (.+)", line):
                files[found[4]] = Entry(sha256=found[1], size=int(found[2]), mode=found[3])
            elif found := re.fullmatch(r"data ([0-9a-f]{64}) +(\d+) (\S+/.+)", line):
                data[found[3]] = (found[1], int(found[2]))
            elif found := re.fullmatch(r"version (\S+) (\S+)", line):
                versions[found[1]] = found[2]
            elif found := re.fullmatch(r"law +(\d+) (.+)", line):
                laws[found[2]] = int(found[1])
            else:
                raise LockError(f"{source}, line {number}: {line[:60]!r} is no entry: restore the file from git")
        return cls(files=files, data=data, versions=versions, laws=laws)

    @classmethod
    def read(cls, root: Path) -> "Lock | None":
        """Read `root`'s oracle.lock; None where there is none, LockError where it is damaged."""
        path = root / FILE
        try:
            return cls.parse(path.read_text(encoding="utf-8", errors="surrogateescape"), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LockError(f"cannot read {path}: {error.strerror}") from error

    def text(self) -> str:
        """Return the file's content."""
        lines = [
            *(f"version {name} {self.versions[name]}" for name in sorted(self.versions)),
            *(f"data {self.data[name][0]} {self.data[name][1]:>10} {name}" for name in sorted(self.data)),
            *(f"file {e.sha256} {e.size:>8} {e.mode} {name}" for name, e in sorted(self.files.items())),
            *(f"law {self.laws[name]:>4} {name}" for name in sorted(self.laws)),
        ]
        if split := [line for line in lines if len(line.splitlines()) > 1]:
            raise LockError(f"{split[0]!r} would be two lines of {FILE}: rename that file")
        return HEADER + "".join(f"{line}\n" for line in lines)

    @property
    def digest(self) -> str:
        """Return the sha256 of the file's content: what a person pins."""
        return hashlib.sha256(self.text().encode("utf-8", "surrogateescape")).hexdigest()

    def file_differences(self, entries: Mapping[str, Entry]) -> list[str]:
        """Return one line for each file that is not as it is locked."""
        return list(differences(self.files, _locked(entries)).values())

    def covers(self, profile: str | None) -> bool:
        """Return whether a profile's data is locked."""
        return any(name.startswith(f"{profile}/") for name in self.data)

    def differences(self, now: "Lock", profile: str | None) -> list[str]:
        """Return one line for each thing that is not as it is locked; of data, those of `profile` alone count."""
        lines = self.file_differences(now.files)
        if self.covers(profile):
            for name in sorted(self.data.keys() | now.data.keys()):
                if name.startswith(f"{profile}/") and self.data.get(name) != now.data.get(name):
                    what = "missing" if name not in now.data else "changed" if name in self.data else "added"
                    lines.append(f"{what}: data {name}")
        for name in sorted(self.versions.keys() | now.versions.keys()):
            locked, here = (lock.versions.get(name, "none") for lock in (self, now))
            if locked != here:
                lines.append(f"changed: version of {name} ({locked} -> {here})")
        return lines


def _locked(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if name != FILE}


def of(snapshot: Snapshot, terms: "Terms", laws: Mapping[str, int]) -> Lock:
    """Return the lock of what is here now; `terms` is the runner's answer about data and versions."""
    return Lock(
        files=_locked(snapshot.entries),
        data={f"{terms.profile}/{name}": (said["sha256"], said["bytes"]) for name, said in terms.data.items()},
        versions={**terms.versions, "pytest-autoresearch": version("pytest-autoresearch")},
        laws=laws,
    )


def refuse_changed_files(root: Path, patterns: Sequence[str]) -> None:
    """Raise a UsageError where the immutable files under `root` are not those of its oracle.lock, if it has one."""
    try:
        if (lock := Lock.read(root)) is not None:
            _refuse(root, lock.file_differences(Snapshot.take(root, patterns).entries))
    except LockError as error:
        raise pytest.UsageError(str(error)) from None


def settle(root: Path, snapshot: Snapshot, terms: "Terms", pinned: str | None) -> tuple[Lock, bool]:
    """Return the lock that holds for the runs to come, and whether `root` has it in a file.

    Raises a UsageError where something is not as it is locked, or the lock is not the one that a person `pinned`.
    """
    try:
        lock = Lock.read(root)
    except LockError as error:
        raise pytest.UsageError(str(error)) from None
    now = of(snapshot, terms, lock.laws if lock else {})
    if lock is not None:
        _refuse(root, lock.differences(now, terms.profile))
    digest = (lock or now).digest
    if pinned not in (None, digest):
        what = FILE if lock else f"what {FILE} would be"
        raise pytest.UsageError(
            f"--autoresearch-lock-digest: {what} in {root} has digest {digest}, not {pinned}: see what changed "
            f"(`git log -p {FILE}`) before you pin another"
        )
    return lock or now, lock is not None


def _refuse(root: Path, lines: Sequence[str]) -> None:
    if lines:
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise pytest.UsageError(f"{root} is not what {FILE} locks: {', '.join(lines[:SHOWN])}{more}: {MEND}")


def main(config: pytest.Config) -> int:
    """Check or update oracle.lock; return 1 where the check finds a difference."""
    from . import settings as settings_
    from .nodes import temporary_bench

    settings = settings_.read(config)
    asked = config.known_args_namespace.autoresearch_lock
    if asked not in ("check", "update"):
        raise pytest.UsageError(f"--autoresearch-lock: {asked!r} is not check or update")
    try:
        old = Lock.read(settings.root)
        if asked == "check":
            if old is None:
                raise pytest.UsageError(
                    f"there is no {FILE} in {settings.root}: make it with `pytest --autoresearch-lock=update`"
                )
            lines = old.file_differences(Snapshot.take(settings.root, settings.immutable).entries)
            if lines:  # the runner is among the locked files: nothing that it says counts now
                return _report(lines, f"{FILE} does not hold; data and versions were not looked at")
        with temporary_bench(settings) as (bench, _):
            return _check(old, bench) if asked == "check" and old else _update(old, bench)
    except (LockError, WorkspaceError) as error:
        raise pytest.UsageError(str(error)) from None


def _check(lock: Lock, bench: "Bench") -> int:
    terms, pinned = bench.terms, bench.settings.lock_digest
    lines = lock.differences(of(bench.lock, terms, lock.laws), terms.profile)
    if pinned not in (None, lock.digest):
        lines.append(f"changed: the lock itself ({pinned} is asked for, {lock.digest} is here)")
    if lines:
        return _report(lines, f"{FILE} does not hold")
    data = sum(name.startswith(f"{terms.profile}/") for name in lock.data)
    said = f"{data} files of data" if data else "no data"
    print(f"{FILE} holds: {len(lock.files)} files, {said} of profile {terms.profile}, {len(lock.versions)} versions")
    print(f"digest {lock.digest}")
    return 0


def _report(lines: Sequence[str], summary: str) -> int:
    for line in lines:
        print(line)
    print(f"{summary}: {MEND}")
    return 1


def _update(old: Lock | None, bench: "Bench") -> int:
    from .laws import collect

    root, terms = bench.settings.root, bench.terms
    new = of(bench.lock, terms, collect(root, bench.settings.immutable))
    if old is not None:
        others = {name: said for name, said in old.data.items() if not name.startswith(f"{terms.profile}/")}
        new = replace(new, data={**others, **new.data})
        for line in old.differences(new, terms.profile):
            print(line)
    changed = new != old
    if changed:
        write(root / FILE, new.text().encode("utf-8", "surrogateescape"))
    print(f"{FILE} {'is written: read it, and commit it' if changed else 'is as it was'}")
    print(f"digest {new.digest}")
    return 0
