"""The workspace on real repositories: what a keep and a discard move, that nothing else is touched, that a kill at
any step is repaired, and one clear line for each repository that cannot be worked with. Needs git.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_autoresearch.ledger import Ledger, Record, results_tsv, run_record
from pytest_autoresearch.records import Candidate, Result, Verdict
from pytest_autoresearch.workspace import Workspace, WorkspaceError

TRAIN = b"LR = 0.04  # learning rate\nprint(LR)\n"
BETTER = b"LR = 0.08  # learning rate\n"
METRIC = "val_bpb"


def git(at: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(at), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give git a home without settings of the person who runs the tests."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "project")


def make(root: Path, train: str = "train.py") -> Path:
    """Make a repository with one commit, by a person whom git knows only here."""
    (root / train).parent.mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    for name in (train, "oracle.py", "notes.md", "staged.md"):
        (root / name).write_bytes(TRAIN if name == train else f"{name}\n".encode())
    (root / ".gitignore").write_text("*.log\n")
    git(root, "add", "-A")
    git(root, "-c", "user.name=Ada", "-c", "user.email=ada@example.org", "commit", "-q", "-m", "begin")
    return root


def opened(how: str, root: Path, tag: str = "nov23", mutable: tuple[str, ...] = ("train.py",)) -> Workspace:
    openers: dict[str, Callable[..., Workspace]] = {"loop": Workspace.for_loop, "try": Workspace.for_try}
    return openers[how](root, mutable=mutable, prefix="autoresearch", tag=tag)


def record(candidate: Candidate, outcome: str | None, score: float = 0.99) -> Record:
    """Return a finished run's record at a fixed time."""
    return run_record(
        kind="experiment" if outcome else "baseline",
        candidate=candidate,
        run=1,
        seed=1,
        result=Result(status="ok", score=score, memory_gb=1.0),
        verdict=Verdict(outcome=outcome, reason="so") if outcome else None,  # type: ignore[arg-type]
        time="2026-11-23T01:02:03+00:00",
    )


class Night:
    """A workspace with its ledger, as the loop and the try use them."""

    def __init__(self, how: str, root: Path, **settings: Any) -> None:
        self.ws = opened(how, root, **settings)
        self.log = Ledger.open(self.ws.state / "ledger.jsonl")
        self.note = self.ws.resume(self.log.runs, METRIC)
        if not self.log.runs:
            self.log.append(record(self.ws.baseline(), None, 1.0))

    def experiment(self, outcome: str, content: bytes, description: str = "an idea") -> Candidate:
        (self.ws.workdir / self.ws.mutable[0]).write_bytes(content)
        candidate = self.ws.candidate(self.log.next_number(), description)
        self.finish(record(candidate, outcome))
        return candidate

    def finish(self, final: Record) -> None:
        self.log.append(final)
        if final["verdict"]["outcome"] == "keep":
            self.ws.keep(self.log.runs, METRIC)
        else:
            self.ws.restore()
            self.ws.write_results(results_tsv(self.log.runs, METRIC))

    def __enter__(self) -> "Night":
        return self

    def __exit__(self, *_: object) -> None:
        self.ws.close()


def user_view(root: Path) -> dict[str, Any]:
    """Return all that is the user's: HEAD, index, and every file outside .git and .autoresearch."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        "HEAD": (root / ".git/HEAD").read_text(),
        "main": git(root, "rev-parse", "main"),
        "index": git(root, "ls-files", "--stage"),
        "files": {
            str(path.relative_to(root)): path.read_bytes()
            for path in files
            if path.relative_to(root).parts[0] not in (".git", ".autoresearch")
        },
    }


def make_a_mess(root: Path) -> None:
    """Leave a modified, a staged, an untracked and an ignored file."""
    (root / "notes.md").write_text("modified\n")
    (root / "staged.md").write_text("staged\n")
    git(root, "add", "staged.md")
    (root / "staged.md").write_text("staged, then modified\n")
    (root / "untracked.txt").write_text("mine\n")
    (root / "run.log").write_text("ignored\n")


def test_a_loop_keeps_and_discards_in_its_own_worktree(root: Path) -> None:
    make_a_mess(root)
    before = user_view(root)
    with Night("loop", root) as night:
        ws = night.ws
        assert ws.workdir == root / ".autoresearch/nov23"
        assert ws.state == root / ".git/autoresearch/nov23"
        assert (ws.head, ws.champion) == (git(root, "rev-parse", "main"),) * 2
        dropped = night.experiment("discard", b"LR = 9\n")
        assert (ws.workdir / "train.py").read_bytes() == TRAIN
        assert git(root, "rev-parse", "autoresearch/nov23") == git(root, "rev-parse", "main")
        kept = night.experiment("keep", BETTER, "raise\tthe LR\nto 0.08")
        night.experiment("crash", b"LR = 7\n")
        assert ws.champion == kept.commit
        assert ws.head == git(root, "rev-parse", "autoresearch/nov23")
        assert (dropped.lines_added, kept.lines_added) == (-1, -1)
        assert ws.files(dropped.commit) == {"train.py": b"LR = 9\n"}
        assert ws.foreign_changes() == []
    assert git(root, "log", "-1", "--format=%B", "autoresearch/nov23") == (
        f"raise the LR to 0.08\n\nAutoresearch-Candidate: {kept.commit}\nAutoresearch-Val-Bpb: 0.990000\n"
    )
    assert git(root, "diff", "--name-only", "main", "autoresearch/nov23") == "results.tsv\ntrain.py"
    table = git(root, "show", "autoresearch/nov23:results.tsv")
    assert table.splitlines()[-1] == f"{kept.commit[:7]}\t0.990000\t1.0\tkeep\traise the LR to 0.08"
    assert (root / ".autoresearch/nov23/results.tsv").read_text().splitlines()[-1].endswith("crash\tan idea")
    assert git(root, "for-each-ref", "--format=%(refname)", "refs/autoresearch") == "\n".join(
        f"refs/autoresearch/nov23/{number:04d}" for number in (1, 2, 3)
    )
    assert git(root / ".autoresearch/nov23", "status", "--porcelain") == " M results.tsv"
    assert user_view(root) == before


def test_the_next_start_goes_on(root: Path) -> None:
    with Night("loop", root) as night:
        kept = night.experiment("keep", BETTER)
        head = night.ws.head
        (night.ws.workdir / "train.py").write_bytes(b"half an edit")
    with Night("loop", root) as night:
        assert (night.ws.head, night.ws.champion, night.note) == (head, kept.commit, None)
        assert (night.ws.workdir / "train.py").read_bytes() == BETTER
        assert night.ws.baseline().commit == kept.commit


def test_a_try_beside_another_branch_moves_only_its_own(root: Path) -> None:
    make_a_mess(root)
    before = user_view(root)
    for outcome, content in [("discard", b"LR = 9\n"), ("keep", BETTER), ("crash", b"LR = 7\n")]:
        (root / "train.py").write_bytes(content)
        with Night("try", root) as night:
            assert (root / "train.py").read_bytes() == content
            night.experiment(outcome, content)
            assert night.ws.results_path == root / ".git/autoresearch/nov23/results.tsv"
    assert git(root, "show", "autoresearch/nov23:train.py") + "\n" == BETTER.decode()
    assert (root / ".git/autoresearch/nov23/results.tsv").read_text().count("\n") == 5
    after = user_view(root)
    assert after["files"].pop("train.py") == BETTER  # the discarded edit gives way to the champion
    before["files"].pop("train.py")
    assert after == before


def test_a_try_on_the_branch_keeps_the_checkout_in_step(root: Path) -> None:
    git(root, "switch", "-q", "-c", "autoresearch/mine")
    make_a_mess(root)
    git(root, "config", "core.quotePath", "false")
    status = git(root, "status", "--porcelain")
    for outcome, content in [("discard", b"LR = 9\n"), ("keep", BETTER), ("crash", b"LR = 7\n")]:
        (root / "train.py").write_bytes(content)
        git(root, "add", "train.py")
        with Night("try", root, tag="ignored") as night:
            assert (night.ws.tag, night.ws.workdir) == ("mine", root)
            night.experiment(outcome, content)
        if outcome == "keep":
            assert git(root, "status", "--porcelain") == status
    assert (root / "train.py").read_bytes() == BETTER
    assert git(root, "status", "--porcelain") == " M notes.md\n M results.tsv\nMM staged.md\n?? untracked.txt"
    assert (root / "results.tsv").read_text().splitlines()[-1].split("\t")[3] == "crash"
    assert git(root, "log", "--format=%s") == "an idea\nbegin"


def test_an_edit_made_during_the_run_of_a_try_survives(root: Path) -> None:
    (root / "train.py").write_bytes(b"LR = 9\n")
    with Night("try", root) as night:
        night.ws.candidate(1, "nine")
        (root / "train.py").write_bytes(b"LR = 10\n")
        assert night.ws.restore() == ["train.py was edited during the run: left as it is"]
        assert (root / "train.py").read_bytes() == b"LR = 10\n"


def test_a_candidate_has_the_champions_mode(root: Path) -> None:
    with Night("loop", root) as night:
        (night.ws.workdir / "train.py").write_bytes(BETTER)
        (night.ws.workdir / "train.py").chmod(0o755)
        candidate = night.ws.candidate(1, "")
        assert candidate.description == "no description"
        assert git(root, "ls-tree", candidate.commit, "train.py").startswith("100644 ")


# ---- repositories as people have them


def failing_hooks(root: Path, home: Path) -> None:
    for name in ("pre-commit", "commit-msg", "post-checkout", "reference-transaction", "post-index-change"):
        hook = root / ".git/hooks" / name
        hook.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
        hook.chmod(0o755)


def signing(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[commit]\n\tgpgSign = true\n[gpg]\n\tprogram = /bin/false\n")


def nobody(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[user]\n\tuseConfigOnly = true\n")


def autocrlf(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[core]\n\tautocrlf = true\n")
    (root / "train.py").unlink()
    git(root, "checkout", "--", "train.py")
    assert (root / "train.py").read_bytes() == TRAIN.replace(b"\n", b"\r\n")


def inherited(root: Path, home: Path) -> None:
    os.environ.update(GIT_DIR="/nowhere", GIT_INDEX_FILE="/nowhere/index", GIT_WORK_TREE="/", GIT_PREFIX="x/")


def filters(root: Path, home: Path) -> None:
    (home / ".gitconfig").write_text(
        '[filter "up"]\n\tclean = tr a-z A-Z\n\tsmudge = tr A-Z a-z\n[core]\n\tattributesFile = ~/attributes\n'
    )
    (home / "attributes").write_text("train.py filter=up\n")


def replaced(root: Path, home: Path) -> None:
    blob = git(root, "rev-parse", "main:train.py")
    other = git(root, "rev-parse", "main:oracle.py")
    git(root, "replace", blob, other)


def in_rebase_elsewhere(root: Path, home: Path) -> None:
    git(root, "worktree", "add", "-q", "--detach", str(home / "other"))
    (root / ".git/worktrees/other/rebase-merge").mkdir()


def submodule(root: Path, home: Path) -> None:
    other = make(home / "library")
    git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "library")
    git(root, "-c", "user.name=Ada", "-c", "user.email=ada@example.org", "commit", "-q", "-m", "library")


@pytest.mark.parametrize("how", ["loop", "try"])
@pytest.mark.parametrize(
    "condition",
    [failing_hooks, signing, nobody, autocrlf, inherited, filters, replaced, in_rebase_elsewhere, submodule],
)
def test_a_keep_and_a_discard_in(
    how: str, condition: Callable[[Path, Path], None], root: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_PREFIX"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what a condition sets
        del os.environ[name]
    condition(root, home)
    with Night(how, root) as night:
        assert night.ws.files(night.ws.head) == {"train.py": TRAIN}
        kept = night.experiment("keep", b"LR = 1\r\nx = 'Y'\n")
        night.experiment("discard", b"LR = 2\n")
        assert (night.ws.workdir / "train.py").read_bytes() == b"LR = 1\r\nx = 'Y'\n"
        assert night.ws.files(night.ws.head) == night.ws.files(kept.commit) == {"train.py": b"LR = 1\r\nx = 'Y'\n"}
        assert night.ws.foreign_changes() == []
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    author = git(root, "log", "-1", "--format=%an <%ae> %cn <%ce>", "autoresearch/nov23")
    assert author == "autoresearch <autoresearch@localhost> autoresearch <autoresearch@localhost>"
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main"


@pytest.mark.parametrize("how", ["loop", "try"])
def test_a_subfolder_with_spaces_and_unicode(how: str, tmp_path: Path) -> None:
    name = "pakete/größe & co/träin *.py"
    root = make(tmp_path / "mono repo ✓", name)
    git(root, "config", "user.name", "Grace")
    git(root, "config", "user.email", "grace@example.org")
    with Night(how, root / "pakete", mutable=("größe & co/träin *.py",)) as night:
        assert night.ws.workdir == (root / ".autoresearch/nov23/pakete" if how == "loop" else root / "pakete")
        night.experiment("keep", BETTER)
        night.experiment("discard", b"LR = 2\n")
        assert night.ws.files(night.ws.head) == {"größe & co/träin *.py": BETTER}
    names = git(root, "-c", "core.quotePath=false", "diff", "--name-only", "main", "autoresearch/nov23")
    assert names == f"{name}\npakete/results.tsv"
    assert git(root, "log", "-1", "--format=%an <%ae>", "autoresearch/nov23") == "Grace <grace@example.org>"


# ---- what a proposer may do to the loop's worktree


def test_a_proposers_other_doings_are_named_and_undone(root: Path) -> None:
    with Night("loop", root) as night:
        ws, at = night.ws, night.ws.workdir
        head = ws.head
        (at / "oracle.py").write_text("score = 0\n")
        (at / "notes.md").unlink()
        (at / "train.py").write_bytes(BETTER)
        (at / "scratch.txt").write_text("keep me\n")
        git(at, "add", "-A")
        git(at, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "an agent's own commit")
        moved = git(at, "rev-parse", "--short=7", "HEAD")
        git(at, "switch", "-q", "-c", "elsewhere")
        assert ws.foreign_changes() == [
            "changed: notes.md",
            "changed: oracle.py",
            f"moved: branch autoresearch/nov23 to {moved}",
            "moved: HEAD off branch autoresearch/nov23",
        ]
        ws.restore_foreign()
        assert ws.foreign_changes() == []
        assert git(root, "rev-parse", "autoresearch/nov23") == head
        assert (at / "oracle.py").read_text() == "oracle.py\n"
        assert (at / "scratch.txt").read_text() == "keep me\n"
        assert (at / "train.py").read_bytes() == BETTER  # still the candidate
        assert night.ws.files(ws.candidate(1, "mine").commit) == {"train.py": BETTER}


@pytest.mark.parametrize("shape", ["missing", "symlink", "folder", "pipe", "outside"])
def test_a_candidate_must_be_a_regular_file(shape: str, tmp_path: Path) -> None:
    root = make(tmp_path / "project", "src/train.py")
    with Night("loop", root, mutable=("src/train.py",)) as night:
        path = night.ws.workdir / "src/train.py"
        path.unlink()
        if shape == "symlink":
            path.symlink_to(root / "oracle.py")
        elif shape == "folder":
            path.mkdir()
        elif shape == "pipe":
            os.mkfifo(path)
        elif shape == "outside":
            path.parent.rmdir()
            (tmp_path / "away").mkdir()
            (tmp_path / "away/train.py").write_bytes(BETTER)
            path.parent.symlink_to(tmp_path / "away")
        with pytest.raises(WorkspaceError, match=r"missing or no regular file: put it back|leads through a symlink"):
            night.ws.candidate(1, "odd")
        if shape in ("missing", "symlink", "pipe"):
            night.ws.restore()
            assert path.read_bytes() == TRAIN and not path.is_symlink()
        assert (root / "oracle.py").read_text() == "oracle.py\n"
        if shape == "outside":
            assert (tmp_path / "away/train.py").read_bytes() == BETTER


def test_a_deleted_worktree_is_made_anew(root: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
    shutil.rmtree(root / ".autoresearch")
    with Night("loop", root) as night:
        assert (night.ws.workdir / "train.py").read_bytes() == BETTER
        assert (night.ws.workdir / "results.tsv").exists()


def test_a_moved_repository_is_mended(root: Path, tmp_path: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
    moved = tmp_path / "moved"
    root.rename(moved)
    with Night("loop", moved) as night:
        assert night.ws.workdir == moved / ".autoresearch/nov23"
        night.experiment("keep", b"LR = 3\n")
    assert git(moved, "show", "autoresearch/nov23:train.py") == "LR = 3"


def test_a_loop_started_in_its_own_worktree_works_there(root: Path) -> None:
    with Night("loop", root) as night:
        at = night.ws.workdir
    with Night("loop", at) as night:
        assert night.ws.workdir == at
    (at / "train.py").write_bytes(BETTER)
    with Night("try", at) as night:
        assert (night.ws.workdir, night.ws.tag) == (at, "nov23")
        night.experiment("keep", BETTER)
    assert git(at, "status", "--porcelain") == ""


# ---- one clear line


def dirty(root: Path) -> None:
    (root / "train.py").write_bytes(BETTER)


def removed(root: Path) -> None:
    (root / "train.py").unlink()


def linked(root: Path) -> None:
    (root / "train.py").rename(root / "real.py")
    (root / "train.py").symlink_to("real.py")


def uncommitted(root: Path) -> None:
    git(root, "rm", "-q", "--cached", "train.py")
    git(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "forget it")


def committed_link(root: Path) -> None:
    linked(root)
    git(root, "add", "-A")
    git(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "link it")


def detached(root: Path) -> None:
    git(root, "switch", "-q", "--detach")


def merging(root: Path) -> None:
    (root / ".git/MERGE_HEAD").write_text(git(root, "rev-parse", "HEAD") + "\n")


def rebasing(root: Path) -> None:
    (root / ".git/rebase-merge").mkdir()


def no_repository(root: Path) -> None:
    shutil.rmtree(root / ".git")


def no_commit(root: Path) -> None:
    shutil.rmtree(root / ".git")
    git(root, "init", "-q")


def checked_out(root: Path) -> None:
    git(root, "switch", "-q", "-c", "autoresearch/nov23")


def in_the_way(root: Path) -> None:
    (root / ".autoresearch/nov23").mkdir(parents=True)
    (root / ".autoresearch/nov23/thesis.tex").write_text("precious")


@pytest.mark.parametrize(
    ("how", "condition", "line"),
    [
        ("loop", no_repository, r": no git repository: `git init`, `git add -A` and `git commit` first$"),
        ("try", no_repository, r": no git repository: "),
        ("loop", no_commit, r" has no commit yet: `git add -A` and `git commit` first$"),
        ("loop", detached, r" has a detached HEAD: `git switch main`, or another branch, first$"),
        ("try", detached, r" has a detached HEAD: "),
        ("loop", rebasing, r"^a rebase is under way in .*: finish it or `git rebase --abort` first$"),
        ("try", merging, r"^a merge is under way in .*: finish it or `git merge --abort` first$"),
        ("loop", dirty, r"^train.py has uncommitted changes, .* `git commit`, .* `git stash`, .* --autoresearch-try "),
        ("loop", removed, r"^train.py is missing or no regular file: `git checkout -- train.py`$"),
        ("loop", linked, r"^train.py is missing or no regular file: "),
        ("try", removed, r"^mutable file .*train.py is missing or no regular file: put it back as one$"),
        ("try", linked, r"^mutable file .*train.py is missing or no regular file: "),
        ("loop", uncommitted, r"^mutable file train.py is not in commit .{7} of autoresearch/nov23: commit it "),
        ("try", uncommitted, r"^mutable file train.py is not in commit .{7} of autoresearch/nov23: commit it "),
        ("loop", committed_link, r"^mutable file train.py is no regular file in commit "),
        ("loop", checked_out, r"^branch autoresearch/nov23 is checked out in .*: `git switch main` there, or "),
        ("loop", in_the_way, r"nov23 is in the way and no worktree of this repository: move it away$"),
    ],
)
def test_what_cannot_be_worked_with(how: str, condition: Callable[[Path], None], line: str, root: Path) -> None:
    condition(root)
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and ".git" not in path.parts}
    with pytest.raises(WorkspaceError, match=line) as caught:
        opened(how, root)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("tag", ["a b", "../up", "a/b", "x.lock", ""])
def test_a_bad_tag(tag: str, root: Path) -> None:
    with pytest.raises(WorkspaceError, match="cannot be a tag: choose letters, digits and dashes"):
        opened("loop", root, tag=tag)


@pytest.mark.parametrize("path", ["/etc/passwd", "../train.py"])
def test_a_mutable_path_outside(path: str, root: Path) -> None:
    with pytest.raises(WorkspaceError, match="must be a path inside the project"):
        opened("loop", root, mutable=(path,))


def test_one_at_a_time(root: Path) -> None:
    with opened("loop", root), pytest.raises(WorkspaceError, match=rf"another loop or try \(pid {os.getpid()}\) is at"):
        opened("try", root, tag="other")
    opened("try", root).close()


def test_a_branch_that_the_ledger_does_not_know(root: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
        head = night.ws.head
    at = night.ws.workdir
    who = ("-c", "user.name=A", "-c", "user.email=a@b")
    (at / "notes.md").write_text("a word about it\n")
    git(at, *who, "commit", "-q", "-m", "a note", "notes.md")
    with Night("loop", root) as night:  # ahead with the same mutable files: the same champion
        assert night.ws.head == git(at, "rev-parse", "HEAD") != head
        assert night.ws.champion == night.log.runs[-1]["commit"]
        night.experiment("keep", b"LR = 5\n")
        head = night.ws.head
    (at / "train.py").write_bytes(b"LR = 6\n")
    git(at, *who, "commit", "-q", "-m", "slipped in", "train.py")
    with pytest.raises(WorkspaceError, match=rf"no experiment made: undo them with `git reset --soft {head[:7]}` "):
        Night("try", at)


def test_a_branch_that_was_set_back(root: Path) -> None:
    with Night("loop", root) as night:
        night.experiment("keep", BETTER)
        night.experiment("keep", b"LR = 5\n")
        head = night.ws.head
    git(root, "update-ref", "refs/heads/autoresearch/nov23", "main")
    with pytest.raises(
        WorkspaceError, match=rf"is at .{{7}}, but the ledger's champion is {head[:7]}: `git branch -f "
    ):
        Night("loop", root)


def test_a_results_table_of_somebody_else_is_not_overwritten(root: Path) -> None:
    checked_out(root)
    (root / "results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n1234567\t0.9\t1\tkeep\tmine\n")
    with pytest.raises(WorkspaceError, match="holds rows that are not this ledger's: move it away"):
        Night("try", root)


# ---- kill -9 between any two steps

CHILD = """
# Forks once for each line of stdin: the number of steps that the fork may do before it is killed.
import json, os, signal, sys
from pathlib import Path
from pytest_autoresearch import _git, ledger
from pytest_autoresearch.ledger import Ledger, results_tsv
from pytest_autoresearch.workspace import Workspace

root, how, record = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for line in sys.stdin:
    point = int(line)
    if (pid := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()

ws = getattr(Workspace, "for_" + how)(root, mutable=("train.py",), prefix="autoresearch", tag="nov23")
log = Ledger.open(ws.state / "ledger.jsonl")
if how == "loop":
    (ws.workdir / "results.tsv").touch()
else:
    ws.resume(log.runs, "val_bpb")

steps = 0
READING = {"rev-parse", "ls-tree", "cat-file", "log", "symbolic-ref", "ls-files"}  # before or after is the same
def deadly(real):
    def call(*args, **kwargs):
        global steps
        if READING.isdisjoint(map(str, args)):
            if steps == point:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
        return real(*args, **kwargs)
    return call

_git.Plumbing.run = deadly(_git.Plumbing.run)
for name in ("write", "fsync", "replace", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))

ws.head = record["parent"]
log.append(record)
if record["verdict"]["outcome"] == "keep":
    ws.keep(log.runs, "val_bpb")
else:
    ws.restore()
    ws.write_results(results_tsv(log.runs, "val_bpb"))
"""


@pytest.mark.parametrize(("how", "outcome"), [("loop", "keep"), ("loop", "discard"), ("try", "keep")])
def test_a_kill_at_any_step_is_repaired(how: str, outcome: str, root: Path) -> None:
    if how == "try":
        checked_out(root)
    with Night(how, root) as night:
        ws = night.ws
        (ws.workdir / "train.py").write_bytes(BETTER)
        candidate = ws.candidate(1, "raise the LR")
        final = record(candidate, outcome)
    ledger_before = ws.state.joinpath("ledger.jsonl").read_bytes()
    index = Path(git(ws.workdir, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    index_before = index.read_bytes()

    def finish(night: Night) -> None:
        (ws.workdir / "train.py").write_bytes(BETTER)
        night.finish(final)

    def rewind() -> None:
        git(root, "update-ref", f"refs/heads/{ws.branch}", candidate.parent)
        (ws.workdir / "train.py").write_bytes(BETTER)
        (ws.workdir / "results.tsv").unlink(missing_ok=True)
        (ws.state / "ledger.jsonl").write_bytes(ledger_before)
        index.write_bytes(index_before)

    def seen() -> dict[str, Any]:
        return {
            "branch": git(root, "rev-parse", ws.branch),
            "ledger": (ws.state / "ledger.jsonl").read_bytes(),
            "results": (ws.workdir / "results.tsv").read_bytes(),
            "train.py": (ws.workdir / "train.py").read_bytes(),
            "index": git(ws.workdir, "ls-files", "--stage"),
            "status": git(ws.workdir, "status", "--porcelain"),
        }

    rewind()
    with Night(how, root) as night:
        finish(night)
    whole = seen()
    assert whole["train.py"] == (BETTER if outcome == "keep" else TRAIN)

    command = [sys.executable, "-c", CHILD, str(root), how, json.dumps(final)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        points, status = 0, -signal.SIGKILL
        while status:
            rewind()
            print(points, file=child.stdin, flush=True)
            status = int(child.stdout.readline())
            assert status in (0, -signal.SIGKILL)
            with Night(how, root) as night:
                if len(night.log.runs) == 1:  # killed before it was on disk: the experiment is run again
                    finish(night)
            assert seen() == whole, f"killed at step {points}"
            points += 1
        child.stdin.close()
    assert points > 5
