"""THREATS class 9, the repository: whatever a proposer does with git beside its edit is undone and named, or changes
nothing, and what is the user's stays as it is, to the byte.

Needs git and the fake runner of tests/plugin/lab.py; two tests need to be allowed to mount a small file system. A kill
between any two steps is in tests/plugin/test_kill.py, user files through many discards in test_user_files.py there.
"""

import fcntl
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.nights import Acted, act, plan, run
from tests.plugin.lab import Lab
from tests.shortage import small_disk

COMMIT = 'git("commit", "-q", "-a", "--no-verify", "--no-gpg-sign", "-m", "mine")'

ACTS = {
    "an honest edit": act(""),
    "untracked files": act('write("mine.txt", "keep me")\nwrite("oracle/deep.txt", "me too")'),
    "staged stray files": act('write("stray.py", "x = 1")\ngit("add", "-A")'),
    "a staged edit": act(
        'write("notes.md", "staged")\ngit("add", "-A")', "crash", "^changed what is not its own: changed: .*/notes.md$"
    ),
    "a commit": act(COMMIT, "crash", "own: moved: branch autoresearch/lab to [0-9a-f]{7}$"),
    "several commits": act(
        f'{COMMIT}\nwrite("notes.md", "two")\n{COMMIT}\nwrite("notes.md", "three")\n{COMMIT}',
        "crash",
        "own: changed: .*/notes.md, moved: branch autoresearch/lab to [0-9a-f]{7}$",
    ),
    "a branch switch": act(
        'git("switch", "-q", "-c", "elsewhere")', "crash", "moved: HEAD off branch autoresearch/lab$"
    ),
    "a detached head": act('git("switch", "-q", "--detach")', "crash", "moved: HEAD off branch autoresearch/lab$"),
    "a reset": act('git("reset", "-q", "--hard", "main")', "crash", "moved: branch autoresearch/lab to [0-9a-f]{7}$"),
    "a deleted branch": act(
        'git("update-ref", "-d", "refs/heads/autoresearch/lab")', "crash", "deleted: branch autoresearch/lab$"
    ),
    "a merge under way": act(
        '(common / "worktrees/lab/MERGE_HEAD").write_text(git("rev-parse", "HEAD"))', "crash", "a merge$"
    ),
    "a rebase under way": act('(common / "worktrees/lab/rebase-merge").mkdir()', "crash", "own: began: a rebase$"),
    "locks left by a killed git": act(
        """
        for name in ("worktrees/lab/index.lock", "worktrees/lab/HEAD.lock", "refs/heads/autoresearch/lab.lock"):
            (common / name).touch()
        """
    ),
    "no .git": act('(top / ".git").unlink()', "crash", "own: changed: .git$"),
    "a repository of its own": act(
        '(top / ".git").unlink()\ngit("init", "-q", str(top))', "crash", "own: changed: .git$"
    ),
    "the user's repository": act('(top / ".git").write_text(f"gitdir: {common}")', "crash", "own: changed: .git$"),
    "no work tree": act("shutil.rmtree(top)", "", "train.py is missing"),
    "failing hooks": act(
        r"""
        (common / "hooks").mkdir(exist_ok=True)
        for name in ("pre-commit", "commit-msg", "post-checkout", "reference-transaction", "post-index-change"):
            hook = common / "hooks" / name
            hook.write_text("#!/bin/sh\nexit 1\n")
            hook.chmod(0o755)
        """
    ),
    "commit signing": act('git("config", "commit.gpgSign", "true")\ngit("config", "gpg.program", "/bin/false")'),
    "no user": act('git("config", "user.useConfigOnly", "true")\ngit("config", "--unset", "user.email")'),
    "a folder in the place of the results": act(
        '(workdir / "results.tsv").unlink()\nwrite("results.tsv/mine.txt", "keep me")'
    ),
    "a link out of the results": act(
        'write("victim.txt", "keep me")\n(workdir / "results.tsv").unlink()\n'
        '(workdir / "results.tsv").symlink_to("victim.txt")'
    ),
    "another honest edit": act(""),
}


def users(lab: Lab) -> dict[str, Any]:
    """Return all that is the user's: HEAD, index, stash, branches, and every file outside .git and .autoresearch."""
    files = (path for path in sorted(lab.top.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {
        "HEAD": lab.git("symbolic-ref", "HEAD"),
        "refs": lab.git("for-each-ref", "refs/heads/main", "refs/tags", "refs/stash"),
        "index": lab.git("ls-files", "--stage", "--debug"),
        "files": {
            path: (path.read_bytes(), path.stat().st_mode)
            for path in files
            if path.relative_to(lab.top).parts[0] not in (".git", ".autoresearch")
        },
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Acted, dict[str, Any], dict[str, Any]]:
    """The night of all acts in a subfolder whose path is hard to quote, and what was the user's before and after."""
    lab = Lab.build(tmp_path_factory.mktemp("repository") / "mono repo ✓", folder="größe & co/ $x *")
    lab.write("notes.md", "committed\n")
    lab.write("staged.md", "committed\n")
    lab.write(".gitignore", "*.log\nconftest.py\nacts.json\n")
    lab.commit("notes")
    lab.write("notes.md", "modified\n")
    lab.write("staged.md", "staged\n")
    lab.git("add", "staged.md")
    lab.write("staged.md", "staged, then modified\n")
    lab.write("untracked.txt", "mine\n")
    lab.write("run.log", "ignored\n")
    plan(lab, ACTS)
    before = users(lab)
    acted = run(lab, ACTS)
    return acted, before, users(lab)


@pytest.mark.parametrize("name", ACTS)
def test_an_act_beside_the_edit(name: str, seen: tuple[Acted, dict[str, Any], dict[str, Any]]) -> None:
    seen[0].check(name, ACTS[name])


def test_what_is_the_users_is_as_it_was(seen: tuple[Acted, dict[str, Any], dict[str, Any]]) -> None:
    _, before, after = seen
    assert after == before


def test_a_keep_sweeps_nothing_in(seen: tuple[Acted, dict[str, Any], dict[str, Any]]) -> None:
    lab = seen[0].lab
    names = lab.git("-c", "core.quotePath=false", "diff", "--name-only", "-z", "main", "autoresearch/lab")
    assert names.split("\0")[:-1] == [f"{lab.folder}/results.tsv", f"{lab.folder}/train.py"]
    kept = [name for name, planted in ACTS.items() if planted.verdict == "keep"]
    assert lab.git("log", "--reverse", "--format=%s", "main..autoresearch/lab").splitlines() == kept


def test_what_a_proposer_left_beside_stays(seen: tuple[Acted, dict[str, Any], dict[str, Any]]) -> None:
    lab = seen[0].lab
    state = lab.top / ".git/autoresearch/lab"
    assert [path.read_text() for path in state.glob("aside-*/results.tsv/mine.txt")] == ["keep me"]
    assert (lab.top / ".autoresearch/lab" / lab.folder / "victim.txt").read_text() == "keep me"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab.build(tmp_path / "project")


def test_two_at_once(lab: Lab) -> None:
    lock = lab.top / ".git/autoresearch/loop.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        held.write("4711\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        line = "another loop or try (pid 4711) is at work in this repository: wait for it or stop it"
        assert lab.loop().error == f"ERROR: {line}"
        assert lab.pytest("--autoresearch-try=x").error == f"ERROR: {line}"
    assert not (lab.root / ".autoresearch").exists()


def rebase(lab: Lab) -> None:
    lab.write("notes.md", "one")
    lab.commit("one")
    lab.git("-c", "sequence.editor=sed -i s/pick/edit/", "rebase", "-q", "-i", "HEAD~1")


CANNOT: dict[str, tuple[Callable[[Lab], object], str]] = {
    "a rebase under way": (rebase, "a rebase is under way in .*: finish it or `git rebase --abort` first"),
    "a detached head": (lambda lab: lab.git("switch", "-q", "--detach"), "has a detached HEAD: `git switch main`"),
    "an edit": (lambda lab: lab.write("train.py", "x = 1\n"), "train.py has uncommitted changes"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_must_be_settled_first_is_said_in_one_line(name: str, lab: Lab) -> None:
    arrange, line = CANNOT[name]
    arrange(lab)
    before = users(lab) if name == "an edit" else None
    night = lab.loop()
    assert night.code == 4
    assert re.search(line, night.error)
    assert before is None or users(lab) == before


def test_a_full_disk_ends_the_loop_in_one_line_and_the_next_start_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        lab = Lab.build(disk / "project")
        acts = {
            "an honest edit": act(""),
            "fills the disk": act(
                """
                with open(workdir / "big", "wb", buffering=0) as file:
                    try:
                        while True: file.write(bytes(4096))
                    except OSError: pass
                """
            ),
        }
        acted = run(lab, acts)
        assert acted.night.code == 4 and acted.night.error, acted.night.out
        (disk / "project/.autoresearch/lab/big").unlink()
        wider = 'write("train.py", (workdir / "train.py").read_text().replace("WIDTH = 64", "WIDTH = 66"))'
        again = run(lab, {"after it": act(wider)})
        assert again.night.code == 0, again.night.out
        # What the disk spoilt was not recorded, or recorded as the machine's fault and run again: charged to nobody
        assert set(lab.verdicts) <= {"keep", "retry"} and lab.verdicts[-1] == "keep"
        first, second = lab.git("log", "--reverse", "--format=%s", "main..autoresearch/lab").splitlines()
        assert first == "an honest edit" and second in ("fills the disk", "after it")


def test_a_read_only_checkout_is_one_line_and_an_honest_one_runs(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        lab = Lab.build(disk / "project")
        lab.plan(("rate nearer", "RATE = 0.04", "RATE = 0.03"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        night = lab.loop()
        assert night.code == 4 and "Read-only file system" in night.error
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert lab.loop().code == 0 and lab.verdicts == ["keep"]
