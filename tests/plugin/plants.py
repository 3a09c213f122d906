"""Bugs to plant in a night of forks.py: a test that they do not turn red proves nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_autoresearch import _git
from pytest_autoresearch.bench import Bench
from pytest_autoresearch.ledger import Ledger
from pytest_autoresearch.workspace import Workspace


def _before(owner: Any, name: str, act: Callable[..., object]) -> None:
    """Do `act`, with the same arguments, before each call of a method."""
    real = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        act(self, *args, **kwargs)
        return real(self, *args, **kwargs)

    setattr(owner, name, call)


def _after(owner: Any, name: str, act: Callable[..., object]) -> None:
    """Do `act`, with the same arguments, after each call of a method."""
    real = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        act(self, *args, **kwargs)
        return result

    setattr(owner, name, call)


def git_before_ledger() -> None:
    """Move the branch before the record is on disk."""
    opened: list[Workspace] = []
    _after(Workspace, "resume", lambda self, *args: opened.append(self))

    def early(self: Ledger, record: Any) -> None:
        if record.get("verdict") and record["verdict"]["outcome"] == "keep":
            opened[-1].keep([*self.runs, record], "val_bpb")

    _before(Ledger, "append", early)


def git_never_catches_up() -> None:
    """Let a start leave the branch where the kill left it."""
    real = _git.Plumbing.run
    proposed: list[Any] = []
    _before(Workspace, "candidate", lambda *args: proposed.append(args))

    def run(self: _git.Plumbing, *args: Any, **kwargs: Any) -> Any:
        moves = args[0] == "update-ref" and any(str(arg).startswith("refs/heads/") for arg in args)
        return (0, b"", "") if moves and not proposed and len(args[-1]) == 40 else real(self, *args, **kwargs)

    _git.Plumbing.run = run  # type: ignore[method-assign]


def second_run_forgotten() -> None:
    """Let a start forget that a candidate waits for another run."""
    Ledger.pending = lambda self: None  # type: ignore[method-assign]


def run_folders_stay() -> None:
    """Leave the folders of a run that was killed."""
    Bench.clear = lambda self: None  # type: ignore[method-assign]


def torn_record_believed() -> None:
    """Count a record as written when half of it is."""
    real = os.fsync

    def sync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("ledger.jsonl"):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 40)
        real(descriptor)

    os.fsync = sync  # type: ignore[assignment]


def discards_are_kept() -> None:
    """Move the branch for a discard too."""

    def restore(self: Workspace) -> list[str]:
        self._git(
            "update-ref", f"refs/heads/{self.branch}", self._git("commit-tree", f"{self.head}^{{tree}}", "-m", "x")
        )
        return []

    Workspace.restore = restore  # type: ignore[method-assign]


def verdicts_are_recorded_twice() -> None:
    """Append a discard once more."""
    real = Ledger.append

    def append(self: Ledger, record: Any) -> None:
        real(self, record)
        if record.get("verdict") and record["verdict"]["outcome"] == "discard":
            real(self, record)

    Ledger.append = append  # type: ignore[method-assign]


def ledger_is_rewritten() -> None:
    """Touch what was recorded before."""

    def rewrite(self: Ledger, record: Any) -> None:
        if record.get("verdict"):
            self.path.write_bytes(self.path.read_bytes().replace(b'"kind": "baseline"', b'"kind":  "baseline"'))

    _after(Ledger, "append", rewrite)


def candidate_stays() -> None:
    """Leave a discarded candidate in the work tree."""
    Workspace.restore = lambda self: []  # type: ignore[method-assign]
    Workspace.restore_foreign = lambda self: None  # type: ignore[method-assign]


def checkout_is_reset() -> None:
    """Revert as the reference does, in the user's checkout."""
    top = Path.cwd()
    _after(Workspace, "restore", lambda self: _git.Plumbing(top)("reset", "-q", "--hard"))


def checkout_is_cleaned() -> None:
    """Remove what git does not know, in the user's checkout."""
    top = Path.cwd()
    _after(Workspace, "restore", lambda self: _git.Plumbing(top)("clean", "-q", "-f", "-d", "-e", ".autoresearch"))


def attempts_are_forgotten() -> None:
    """Keep no ref of a candidate that was discarded."""

    def forget(self: Workspace) -> None:
        for ref in self._git("for-each-ref", "--format=%(refname)", "refs/autoresearch/").split():
            self._git("update-ref", "-d", ref)

    _after(Workspace, "restore", forget)


def results_lag() -> None:
    """Write results.tsv before its last row is there."""
    real = Workspace.write_results

    def write(self: Workspace, text: str) -> None:
        real(self, "".join(text.splitlines(keepends=True)[:-1]))

    Workspace.write_results = write  # type: ignore[method-assign]


def seeds_repeat() -> None:
    """Give every run of a candidate the same seed."""
    Ledger.seed = lambda self, number, run: 7  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    name.replace("_", " "): plant
    for name, plant in globals().items()
    if callable(plant) and getattr(plant, "__module__", "") == __name__ and not name.startswith("_")
}
