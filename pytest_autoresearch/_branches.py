"""What other machines kept, read from their branches: which branch a name means, and its kept commits."""

import re
from dataclasses import dataclass

import pytest

from ._git import Plumbing

CANDIDATE = "Autoresearch-Candidate"  # trailer of a kept commit
FIELD, END = "\x1f", "\x1e"


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A branch of this repository, or one that was fetched."""

    ref: str  # in full
    name: str  # without the remote: what the machine that made it calls it


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A kept commit: the champion's tree with one change more."""

    commit: str
    parent: str
    candidate: str  # commit whose runs earned it
    description: str
    score: float | None  # None under another metric


def score_trailer(metric: str) -> str:
    """Return the trailer that names a kept commit's score."""
    return "Autoresearch-" + (
        "-".join(word.capitalize() for word in re.split(r"[^A-Za-z0-9]+", metric) if word) or "Score"
    )


def find(git: Plumbing, name: str, option: str) -> Branch:
    """Return the branch that `name` means: a local one, a fetched one with its remote, or else without it.

    Raises a UsageError, naming `option`, where there is none or the choice of several remotes.
    """
    refs = git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes").splitlines()
    local = f"refs/heads/{name}"
    if local in refs:
        return Branch(ref=local, name=name)
    fetched = [ref for ref in refs if ref.startswith("refs/remotes/")]
    matches = [ref for ref in fetched if ref == f"refs/remotes/{name}"]
    matches = matches or [ref for ref in fetched if ref.split("/", 3)[3:] == [name]]
    if not matches:
        raise pytest.UsageError(f"{option}: there is no branch {name!r} here: `git fetch` it, or correct the name")
    if len(matches) > 1:
        choice = " or ".join(ref.removeprefix("refs/remotes/") for ref in matches)
        raise pytest.UsageError(f"{option}: {name!r} is a branch of several remotes: name {choice}")
    return Branch(ref=matches[0], name=matches[0].split("/", 3)[3])


def kept(git: Plumbing, ref: str, metric: str, *without: str) -> list[Kept]:
    """Return the kept commits of `ref`, oldest first, those aside that the commits `without` have too."""
    trailers = (f"%(trailers:key={key},valueonly,separator=%x20)" for key in (CANDIDATE, score_trailer(metric)))
    form = FIELD.join(("%H", "%P", "%s", *trailers)) + END
    log = git(
        "log", "--first-parent", "--reverse", f"--format={form}", ref, *(f"^{commit}" for commit in without), "--"
    )
    found = []
    for entry in log.split(END)[:-1]:
        commit, parents, description, candidate, score = entry.lstrip("\n").split(FIELD)
        if candidate:
            found.append(
                Kept(
                    commit=commit,
                    parent=parents.partition(" ")[0],
                    candidate=candidate,
                    description=description,
                    score=float(score) if score else None,
                )
            )
    return found
