"""The proposer of what another machine kept: its changes one by one, oldest first, each judged here.

A change is what a kept commit did to the mutable files, merged into the champion's as `git merge-file` does it.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from .._branches import Kept, find, kept
from .._git import Plumbing
from ..settings import Settings
from . import NoProposal

ADOPTED = re.compile(r"adopt (\S+) ([0-9a-f]{7}): ")  # how the description of such a proposal begins


class Adoption:
    """The kept changes of the branch that `--autoresearch-adopt` names, as far as they are not tried here."""

    def __init__(self, settings: Settings, workdir: Path) -> None:
        """Find the changes that the loop's branch does not have; raise a UsageError for a branch that has none."""
        assert settings.adopt is not None
        option = "--autoresearch-adopt"
        self._git = Plumbing(workdir)
        self._mutable = settings.mutable
        own = f"refs/heads/{settings.branch_prefix}/{settings.tag}"
        branch = find(self._git, settings.adopt, option)
        if branch.ref == own:
            raise pytest.UsageError(f"{option}: {branch.name} is the branch that is worked on: name another machine's")
        self.branch = branch.name
        self._left = {change.commit[:7]: change for change in kept(self._git, branch.ref, settings.metric, own)}
        if not self._left:
            raise pytest.UsageError(f"{option}: nothing was kept on {branch.name} that is not here already")
        self._read = 0  # records of the history

    def left(self, history: Sequence[Mapping[str, Any]]) -> int:
        """Return how many changes have neither been proposed by this object nor been tried according to `history`."""
        for record in history[self._read :]:
            if tried := ADOPTED.match(record["description"]):
                self._left.pop(tried[2], None)
        self._read = len(history)
        return len(self._left)

    def propose(self, workdir: Path, history: Sequence[Mapping[str, Any]]) -> str:
        """Apply the oldest change that is left to the champion in `workdir`; return its description.

        Raises NoProposal for one that does not apply, and asks for none twice.
        """
        if not self.left(history):
            raise NoProposal(f"all that was kept on {self.branch} is through")
        change = self._left.pop(next(iter(self._left)))
        description = f"adopt {self.branch} {change.commit[:7]}: {change.description}"
        champion = {name: (workdir / name).read_bytes() for name in self._mutable}
        merged = {name: self._merge(change, name, content, description) for name, content in champion.items()}
        if merged == champion:
            raise NoProposal(f"{description}: the champion has it already")
        for name, content in merged.items():
            (workdir / name).write_bytes(content)
        return description

    def _merge(self, change: Kept, name: str, champion: bytes, description: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="autoresearch-adopt-") as folder:
            paths = [Path(folder, role) for role in ("champion", "before", "after")]
            paths[0].write_bytes(champion)
            for commit, path in zip((change.parent, change.commit), paths[1:], strict=True):
                blob = self._git.maybe("rev-parse", "--verify", "--quiet", f"{commit}:./{name}")
                if blob is None:
                    raise NoProposal(f"{description}: its commit has no {name}")
                path.write_bytes(self._git.content(blob))
            status, merged, said = self._git.run("merge-file", "-p", "-q", *map(str, paths))
        if status:
            conflicts = f"{status} conflict{'s' * (status != 1)} in {name}" if status < 128 else f"{name}: {said}"
            raise NoProposal(f"{description}: does not apply to the champion ({conflicts})")
        return merged
