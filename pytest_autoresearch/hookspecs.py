"""The hooks that a conftest.py or another plugin can implement."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .records import Policy, Result, Standing, Verdict
    from .settings import Settings


@pytest.hookspec(firstresult=True)
def pytest_autoresearch_propose(
    settings: "Settings",
    workdir: Path,
    history: "Sequence[dict[str, Any]]",
    number: int,
    seed: int,
    refused: Sequence[str],
    crash: str,
) -> str | None:
    """Edit the mutable files in `workdir` and return a one-line description.

    None leaves it to the next proposer, at last the built-in one; `propose.NoProposal` says why there is none now.
    `workdir` holds the champion. `history` is what was imported and the ledger's runs, oldest first. `seed` is this
    proposal's own. `refused` says why earlier proposals for this `number` were not run, oldest first. `crash` is empty,
    or what the last proposal for this `number` ended with: then `workdir` holds that proposal, to be repaired.
    """


@pytest.hookspec(firstresult=True)
def pytest_autoresearch_decide(
    standing: "Standing", runs: "Sequence[Result]", lines_added: int, policy: "Policy"
) -> "Verdict | None":
    """Return the verdict on a candidate that has been run `len(runs)` times; the default is `ratchet.decide`."""


@pytest.hookspec
def pytest_autoresearch_finished(settings: "Settings", record: "dict[str, Any]") -> None:
    """Called after an experiment's record is on disk and git has moved."""
