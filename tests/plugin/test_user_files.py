"""Proves that a hundred discards leave the user's files, index and HEAD as they were, whatever git thinks of them.

Needs git; forks.py says how a night takes a fraction of a second.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from hypothesis import settings

from tests.plugin.forks import LOOP, Idea, Nights, build, git, outcomes, train, user_view

HUNT = settings.get_current_profile_name() == "hunt"
TRIES = 100 if HUNT else 6  # each is a start of pytest


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    with Nights(tmp_path_factory.mktemp("nights")) as nights:
        yield nights


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Return a repository with a file in every combination of tracked, ignored, staged, modified and removed."""
    top = build(tmp_path / "project")
    files = []
    for folder in ("", "sub folder/"):
        for tracked, ignored, staged, last in product((0, 1), (0, 1), (0, 1), ("same", "modified", "removed")):
            name = f"{folder}{tracked=} {staged=} {last}.{'log' if ignored else 'txt'}"
            files.append((top / name, tracked, staged, last))
    (top / "sub folder").mkdir()
    for path, tracked, _, _ in files:
        if tracked:
            path.write_bytes(b"committed\r\n")
            git(top, "add", "-f", str(path))
    git(top, "commit", "-q", "-m", "files", "--", *(str(path) for path, tracked, _, _ in files if tracked))
    for path, tracked, staged, last in files:
        if staged:
            path.write_bytes(b"staged\0\n")
            git(top, "add", "-f", str(path))
        if last == "modified" or not (tracked or staged):
            path.write_bytes(b"mine \xff\r\n")
            path.chmod(0o755)
        if last == "removed":
            path.unlink(missing_ok=True)
    (top / "link.txt").symlink_to("nowhere")
    (top / "added and removed from the index.txt").write_text("intended\n")
    git(top, "add", "-N", "added and removed from the index.txt")
    git(top, "rm", "-q", "--cached", "pytest.ini")
    return top


def seen(top: Path) -> dict[str, object]:
    """Return what is the user's, with git's opinion of it."""
    status = git(top, "status", "--porcelain", "--ignored", "--untracked-files=all", "--", ".", ":!.autoresearch")
    return {**user_view(top), "status": status, "stash": git(top, "for-each-ref", "refs/stash", "refs/heads/main")}


def test_discards_of_a_loop(nights: Nights, top: Path) -> None:
    before = seen(top)
    ideas = [Idea(description=f"worse {n}", text=train(2.0 + n)) for n in range(100)]
    ended = nights.run(top, *LOOP, ideas=ideas)
    assert [outcome for outcome in outcomes(top) if outcome not in ("baseline", "champion")] == ["discard"] * 100, ended
    assert seen(top) == before


def test_discards_of_tries(nights: Nights, top: Path) -> None:
    before = seen(top)
    for number in range(TRIES):
        (top / "train.py").write_text(train(2.0 + number))
        ended = nights.run(top, "--autoresearch-try", f"worse {number}", "--autoresearch-tag=lab")
        assert ended.code == 1, ended.out
    assert outcomes(top) == ["baseline"] * 3 + ["discard"] * TRIES
    assert seen(top) == before


@pytest.mark.parametrize("plant", ["checkout is reset", "checkout is cleaned"])
def test_a_planted_bug_shows(nights: Nights, top: Path, plant: str) -> None:
    before = seen(top)
    nights.run(top, *LOOP, ideas=[Idea(description="worse", text=train(2.0))], plant=plant)
    assert seen(top) != before
